"""Weights: an array, or a typed value that stands where an array stood.

    Quantized(qvalue, scale)   w = (qvalue - zero_point) * scale         an array of the Qwix library, with our laws
    Rounded(w, kind)           w itself, which trains; only its products round it, and what they multiply it by, to 8 bits
    Learned(w, scale)          w rounded to codes of few bits, straight through, while it and its `scale` train
    LoRA(base, a, b)           w = base + (a . b) * alpha / rank          `base` may be any weight, so LoRA(Quantized) is QLoRA
    DoRA(base, a, b, m)        w = m * v / |v|, v = LoRA(base, a, b)      |v| is over the inputs of each output
    IA3(base, scale)           w = base * scale                           `scale` varies over the outputs or over the inputs
    Adapter(base, down, up)    y = z + act(z down) up, z = x base         no matrix at all: its product is not linear
    Prompted(base, prompt)     w = base, a table that `ops.take` sees with more rows, those of the prompt, below its own
    Perturbed(base, delta)     w = base, a table whose rows `ops.take` gives with `delta` added to them, another for each position of a batch

Every type keeps these laws (tests/test_weights.py holds each type to each of them):

    shape(w) == dense(w).shape                       the logical shape, derived from the parts and never stored
    einsum(spec, x, w) ~ einsum(spec, x, dense(w))   `ops.einsum` multiplies by any of them; ~ is as near as 8 bits for a Rounded
    w under scan, jit, grad, shardings               each is a registered pytree; a leading layer axis rides on every part

An Adapter has no `dense`, and neither has an IA3 that knows its module's bias: both are functions of it too. A part that varies along some of the
axes of its weight (Quantized's scale, DoRA's magnitude, IA3's scale) has size 1 along the others, which says along which without a word.

Axes of a weight are one string, written where the weight is declared:

    "embed -> heads head_dim"            inputs, then outputs
    "vocab <- embed"                     outputs first: rows are outputs (embedding tables and heads)
    "layers | embed -> mlp"              a stack of layers in front
    "norm"                               no inputs: a bias or a scale; "_" is an axis without a name
    "statistic"                          no weight at all: a running mean or variance, which never trains

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685), section 4.1; its scale alpha / sqrt(rank), Kalajdzievski 2023 (2312.03732); QLoRA, Dettmers et
al. 2023 (2305.14314), equation 5; DoRA, Liu et al. 2024 (2402.09353), equation 5 and section 4.3; IA3, Liu et al. 2022 (2205.05638), section 3.3;
learned scales, Esser et al. 2020 (1902.08153), equation 3; adapters, Houlsby et al. 2019 (1902.00751) and Pfeiffer et al. 2020 (2005.00247); prompts,
Lester et al. 2021 (2104.08691).
and what compression leaves (compressed.py, by compress/):

    LowRank(a, b)              w = a . b                                 fewer numbers
    Sparse(values, bits)       w = values where a bit is set, else 0     N:M, or as many for every output
    Masked(w, mask)            w where mask, else 0                      while it trains
    Moving(w, mask, step)      w where mask, else zero                   while its mask moves, by |w| or by learned `scores`
    Scaled(base, scale)        w = base * scale                          `scale` varies over the inputs, and does not train
    Rotated(base, signs)       w = R^T base                              R an orthogonal matrix that spreads what is large
    W8A8(base)                 w = base, whose products round to int8 what they multiply
    Observed(base, seen)       w = base, while somebody looks at what it is multiplied with: never saved, never trained
    Paired(first, second)      one for each half of a batch, while a model and what is made of it are compared: never saved, never trained
"""

from bigflax.weights.adapted import (
    IA3,
    VECTORS,
    Adapted,
    Adapter,
    DoRA,
    LoRA,
    Perturbed,
    Prompted,
    adapter,
    dora,
    ia3,
    lora,
    prompted,
    rows,
)
from bigflax.weights.axes import Axes, parse_axes, write_axes
from bigflax.weights.compressed import W8A8, LowRank, Masked, Moving, Rotated, Scaled, Sparse, hadamard, input_axis, rotated, sparse
from bigflax.weights.laws import (
    TYPES,
    Array,
    Weight,
    can_train,
    dense,
    is_typed,
    named_weights,
    part_axes,
    parts,
    shape,
    trainable,
    trains,
    typed,
)
from bigflax.weights.narrow import KINDS, Learned, Quantized, Rounded, coded, quantize, rounded
from bigflax.weights.observed import Observed, Paired, Seen

__all__ = [
    "IA3", "KINDS", "TYPES", "VECTORS", "W8A8", "Adapted", "Adapter", "Array", "Axes", "DoRA", "Learned", "LoRA", "LowRank", "Masked", "Moving",
    "Observed", "Paired", "Perturbed", "Prompted", "Quantized", "Rotated", "Rounded", "Scaled", "Seen", "Sparse", "Weight", "adapter", "can_train", "coded",
    "dense", "dora", "hadamard", "ia3", "input_axis", "is_typed", "lora", "named_weights", "parse_axes", "part_axes", "parts", "prompted", "quantize",
    "rotated", "rounded", "rows", "shape", "sparse", "trainable", "trains", "typed", "write_axes",
]  # fmt: skip
