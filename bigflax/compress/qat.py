"""Quantization-aware training: weights of few bits that train as floats, and so do their scales.

    params = learned(model, params, [("blocks/.*/(q|k|v|out|up|gate|down)", "int4:128")], method="gptq", forward=forward, batches=batches)
    tx = paced(optim.make(...))                                          any loss, any loop; the model that they were of is the teacher (distill.py)
    params = settled(state.weights)                                      Quantized, to the bit what was multiplied by

A `Learned` weight (weights/narrow.py) is rounded in each product, straight through, and its scales learn by LSQ: Esser et al. 2020, arXiv 1902.08153. Where
they begin decides what a few hundred steps can reach. A method of compress.quantize says it, so that training goes on where that ends:

    rtn          the grid that errs least, each weight by itself
    gptq, awq, hadamard                                                  by what goes into each matrix (quantizing.py)
    lsq          2 mean |w| / sqrt(Q_P), section 2.1: for training from nothing, and for weights that are not trained out

A weight begins as what it was, moved as far as it takes to have the code that the method gave it (GPTQ's is often not the nearest) and not to be clipped,
where it would get no gradient. So the first product is the method's own, and a weight that it moved lies at the border to the code that it came from.
A small decoder of int2 after 100 steps by its teacher alone, KL from it: from gptq 0.0007, from lsq 0.0009, where rounding had 0.2019 and GPTQ 0.0230.

LSQ multiplies the gradient of a scale by g = 1 / sqrt(N Q_P), so that scales and weights move in proportion to their sizes (section 2.2). An optimizer that
divides by the size of gradients, Adam or Lion, undoes that: all numbers move by the rate. What is left of the paper's argument is that a weight is about
sqrt(Q_P) scales large, and so `paced` divides the steps of scales by that.

Left out on purpose: nf4, fp8 and mxfp4, whose steps are not of one size; zero points that learn (LSQ+, Bhalgat et al. 2020); what weights are multiplied
with (`weights.rounded` trains through products of 8 bits); zeros, factors and adapters that learn to be rounded.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigflax import nn, trees
from bigflax.compress import QUANTIZE, Forward, Method, matrixwise, quantizing
from bigflax.compress.matrices import as_matrix
from bigflax.compress.observing import Seen
from bigflax.weights import Learned, Quantized, Rotated, Scaled, Weight, coded, hadamard, is_typed

Array = jax.Array
MARGIN = 0.01  # of a step: so far from a border a weight begins at least


def read_whole(text: str) -> quantizing.Format:
    """Reads "int4:128". Raises ValueError for what is no format, or none of whole numbers."""
    fmt = quantizing.read_format(text)
    if not fmt.whole:
        raise ValueError(
            f"{text!r} has steps of unequal size, which do not learn; take a format of whole numbers, int8 to int2, or quantize"
        )
    return fmt


def lsq(w: Array, fmt: quantizing.Format, *, axes: str, seen: Seen | None = None) -> Quantized:
    """Round to nearest on the scale that LSQ begins with. Raises ValueError for a format with a zero point."""
    if fmt.zero:
        raise ValueError(f"lsq begins around zero, and {fmt} has a zero point beside; leave out ':asym', or begin with rtn or gptq")
    groups = quantizing.to_groups(as_matrix(w, axes), fmt)
    mean_GN = jnp.abs(groups).mean(1)
    scale_GN = jnp.where(mean_GN > 0, 2 * mean_GN / math.sqrt(2 ** (fmt.bits - 1) - 1), 1.0)
    codes = quantizing.encode(groups, scale_GN[:, None], None, fmt)
    return quantizing.quantized_of(codes.reshape(-1, codes.shape[-1]), scale_GN, None, fmt, axes, w.shape, w.dtype)


METHODS: Mapping[str, Method] = {**{name: QUANTIZE[name] for name in ("rtn", "gptq", "awq", "hadamard")}, "lsq": Method(lsq)}


def learned(
    model: nn.Model, params: Any, rules: trees.Rules, *, method: str = "rtn", forward: Forward | None = None,
    batches: Iterable[Any] | None = None, rows: int = 8, correct: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """The params with a Learned in the place of each matrix that the rules match, of the format that they say, "int4:128", which begins as a method of METHODS
    quantizes it; where that scales or rotates the inputs, within a Scaled or a Rotated.

    Raises ValueError before any work as `compress.quantize` does, for formats that are no whole numbers, and for weights that are no arrays."""

    def over(make, w, value, *, axes, seen):
        if is_typed(w):
            raise ValueError(f"a {type(w).__name__} cannot learn to be rounded; arrays can: train them before other steps, or quantize it")
        return begun(make(w, value, axes=axes, seen=seen), w)

    return matrixwise(METHODS, over, read_whole, model, params, rules, method, forward, batches, rows, options, correct)


def begun(made: Weight, w: Array) -> Weight:
    """A Learned that has the codes of `made`, a Quantized, or one within a Scaled or a Rotated, and else is as near to the array as these allow, in float32.

    Of a whole model that is quantized already: jax.tree.map(begun, small, params, is_leaf=is_typed); arrays stay. Where the weights from before are lost, give
    `dense(made)`, from which every code is equally far. Raises ValueError where there are no codes of whole numbers."""
    if not is_typed(made):
        return made
    if isinstance(made, Scaled):
        return dataclasses.replace(made, base=begun(made.base, w / made.scale))
    if isinstance(made, Rotated):
        return dataclasses.replace(made, base=begun(made.base, hadamard(w * made.signs.astype(w.dtype), made.axis)))
    if not isinstance(made, Quantized) or not str(made.qtype).startswith("int"):
        kind = f"Quantized of {made.qtype}" if isinstance(made, Quantized) else type(made).__name__
        raise ValueError(f"a {kind} has no codes of whole numbers, whose steps could learn; begin with a Quantized of int8 to int2")
    start = Learned(w, made.scale, made.zero_point, int(str(made.qtype)[3:]))
    (w, scale, zero), (low, high) = start.grouped, start.limits
    codes, scale = made.qvalue.astype(jnp.float32).reshape(w.shape), scale.astype(jnp.float32)
    least, most = jnp.maximum(codes - 0.5, low) + MARGIN, jnp.minimum(codes + 0.5, high) - MARGIN
    x = jnp.clip(w.astype(jnp.float32) / scale + zero, least, most)
    return dataclasses.replace(start, w=((x - zero) * scale).astype(w.dtype).reshape(start.w.shape))


def settled(params: Any) -> Any:
    """The params with the Quantized that each Learned has been multiplied as in its place."""
    return _within(params, coded)


def paced(tx: optax.GradientTransformation, rate: float = 1.0) -> optax.GradientTransformation:
    """The optimizer, with the steps of each Learned's scale times rate / sqrt(Q_P): for one whose steps do not grow with the gradient, as Adam's and Lion's."""

    def slower(w: Learned) -> Learned:
        return w if w.scale is None else dataclasses.replace(w, scale=w.scale * (rate / math.sqrt(w.limits[1])))

    return optax.chain(tx, optax.stateless(lambda updates, params: _within(updates, slower)))


def _within(tree: Any, one: Any) -> Any:
    """The tree with `one` of each Learned, wherever it stands."""
    here = lambda w: isinstance(w, Learned)
    return jax.tree.map(lambda w: one(w) if here(w) else w, tree, is_leaf=here)
