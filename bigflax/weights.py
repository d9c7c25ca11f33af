"""Weights: an array, or a typed value that stands where an array stood.

    Quantized(qvalue, scale)   w = (qvalue - zero_point) * scale         an array of the Qwix library, with our laws
    Rounded(w, kind)           w itself, which trains; only its products round it, and what they multiply it by, to 8 bits
    LoRA(base, a, b)           w = base + (a . b) * alpha / rank          `base` may be any weight, so LoRA(Quantized) is QLoRA
    DoRA(base, a, b, m)        w = m * v / |v|, v = LoRA(base, a, b)      |v| is over the inputs of each output
    IA3(base, scale)           w = base * scale                           `scale` varies over the outputs or over the inputs
    Adapter(base, down, up)    y = z + act(z down) up, z = x base         no matrix at all: its product is not linear
    Prompted(base, prompt)     w = base, a table that `ops.take` sees with more rows, those of the prompt, below its own

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
adapters, Houlsby et al. 2019 (1902.00751) and Pfeiffer et al. 2020 (2005.00247); prompts, Lester et al. 2021 (2104.08691).
Left out on purpose: Sparse and LowRank arrive with the functions that make them (compress/).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix

from bigflax import trees

Array = jax.Array
Quantized = qwix.QArray
Weight = Any  # Array, or one of the types below: what ops.einsum multiplies by


def _weight(*parts: str, meta: Sequence[str] = ()):
    """Registers a typed weight as a pytree of these parts."""
    return functools.partial(jax.tree_util.register_dataclass, data_fields=[*parts], meta_fields=[*meta])


@_weight("w", meta=["kind"])
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A float array whose products, in training, are computed in 8 bits (ops/matmul.py says which of them): `kind` is a key of KINDS."""

    w: Array
    kind: str


@_weight("base", "a", "b", "key", meta=["alpha", "rs", "rate"])
@dataclasses.dataclass(frozen=True)
class LoRA:
    """w = base + (a . b) * scale, with a: [..stack, ..first, rank] and b: [..stack, rank, ..second], the axes of `base` as they are written;
    the scale is alpha / rank, or with `rs` alpha / sqrt(rank).

    Within a training step it may hold the `key` [..stack] of that step, and then entries of what `a` multiplies are dropped with the chance `rate`
    (peft.dropout): a weight stays a value, and randomness a function of the step."""

    base: Weight
    a: Array
    b: Array
    alpha: float = 1.0
    rs: bool = False
    key: Array | None = None
    rate: float = 0.0

    @property
    def scale(self) -> float:
        rank = self.a.shape[-1]
        return self.alpha / (math.sqrt(rank) if self.rs else rank)

    @property
    def stacked(self) -> int:
        """How many leading layer axes the parts carry: what a and b have too many for their base."""
        return self.a.ndim + self.b.ndim - 2 - len(shape(self.base))


@_weight("base", "a", "b", "magnitude", "key", meta=["alpha", "rs", "rate"])
@dataclasses.dataclass(frozen=True)
class DoRA:
    """w = magnitude * v / |v|, where v is the LoRA of the same parts and |v| its norm over the inputs, a constant to the gradient.

    `magnitude` is [..stack, ..1, ..outputs] (outputs first where `base` has them first)."""

    base: Weight
    a: Array
    b: Array
    magnitude: Array
    alpha: float = 1.0
    rs: bool = False
    key: Array | None = None
    rate: float = 0.0

    @property
    def direction(self) -> LoRA:
        return LoRA(self.base, self.a, self.b, self.alpha, self.rs, self.key, self.rate)

    @property
    def stacked(self) -> int:
        return self.direction.stacked

    @property
    def factor(self) -> Array:
        """magnitude / |v|, float32 in the shape of `magnitude`."""
        return self.magnitude / jax.lax.stop_gradient(_length(dense(self.direction), self.magnitude.shape))


@_weight("base", "scale", "bias")
@dataclasses.dataclass(frozen=True)
class IA3:
    """w = base * scale, with scale: [..stack, ..1, ..outputs], or [..stack, ..inputs, ..1] where it scales what goes in.

    Published IA3 scales a layer's output, its bias included, which our modules add behind the product. So where there is one, `bias`
    [..stack, ..outputs] is a copy of it that does not train, and the product gives x w + (scale - 1) bias.
    """

    base: Weight
    scale: Array
    bias: Array | None = None


@_weight("base", "down", "down_bias", "up", "up_bias", "bias", meta=["act"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A bottleneck behind a product: y = z + act(z down + down_bias) up + up_bias - bias, z = x base + bias, with down: [..stack, ..outputs, r],
    down_bias: [..stack, r], up: [..stack, r, ..outputs], up_bias: [..stack, ..outputs].

    `bias` [..stack, ..outputs] is a copy, which does not train, of what the module adds to y: so that what it adds makes y the adapter's output.
    `act` is the name of a function of jax.nn.
    """

    base: Weight
    down: Array
    down_bias: Array
    up: Array
    up_bias: Array
    bias: Array | None = None
    act: str = "relu"


@_weight("base", "prompt")
@dataclasses.dataclass(frozen=True)
class Prompted:
    """A table, base [V, D], whose ids V to V + P - 1 are the rows of `prompt` [P, D]. Those are looked up (`ops.take`) and nothing else: as a matrix
    (a head that is tied to the table) it is its base."""

    base: Weight
    prompt: Array


Adapted = LoRA | DoRA | IA3 | Adapter | Prompted  # what stands upon a `base`
# The parts of those that are no matrices, whatever their dimensions: they do not decay.
VECTORS = ("magnitude", "scale", "down_bias", "up_bias")


# kind -> the types of what a product and its gradient are made of: activations and weights, the gradient that comes back, and whether the
# weight's own gradient is such a product too
KINDS = {"int8": ("int8", "int8", False), "fp8": ("float8_e4m3fn", "float8_e5m2", True)}


class Axes(NamedTuple):
    """The names of a weight's axes, read from its string: `names == stack + first + second`."""

    stack: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]
    outputs_first: bool

    @property
    def names(self) -> tuple[str, ...]:
        return self.stack + self.first + self.second

    @property
    def contracted(self) -> tuple[int, ...]:
        """The positions of the input axes, over which a product sums."""
        start = len(self.stack) + (len(self.first) if self.outputs_first else 0)
        return tuple(range(start, start + len(self.second if self.outputs_first else self.first)))


def parse_axes(text: str) -> Axes:
    """Reads "layers | embed -> heads head_dim"."""
    stack, _, rest = text.rpartition("|")
    arrow = next((a for a in ("->", "<-") if a in rest), None)
    first, second = rest.split(arrow) if arrow else ("", rest)
    return Axes(tuple(stack.split()), tuple(first.split()), tuple(second.split()), arrow == "<-")


def write_axes(axes: Axes) -> str:
    """The inverse of `parse_axes`."""
    arrow = " <- " if axes.outputs_first else " -> "
    body = arrow.join((" ".join(axes.first), " ".join(axes.second))) if axes.first else " ".join(axes.second)
    return f"{' '.join(axes.stack)} | {body}" if axes.stack else body


def is_typed(w: Any) -> bool:
    """True for a typed weight, False for an array."""
    return isinstance(w, (Adapted, Quantized, Rounded))


def shape(w: Weight) -> tuple[int, ...]:
    """The logical shape: that of the array in whose place `w` stands, layer axes included."""
    return shape(w.base) if isinstance(w, Adapted) else tuple(w.w.shape if isinstance(w, Rounded) else w.shape)


def rows(w: Weight) -> int:
    """How many ids `ops.take` knows: the rows of the table, and those of its prompt."""
    return shape(w)[0] + (w.prompt.shape[0] if isinstance(w, Prompted) else 0)


def parts(w: Adapted) -> dict[str, Array]:
    """What stands upon the base, by name; `bias`, a copy, and `key` among them do not train."""
    return {f.name: part for f in dataclasses.fields(w) if f.name != "base" and hasattr(part := getattr(w, f.name), "dtype")}


def dense(w: Weight) -> Array:
    """The array that `w` stands for. For reading, tests and export; training multiplies without building it. Raises ValueError where none does."""
    if isinstance(w, LoRA):
        for_each_layer = lambda a, b: jnp.tensordot(a, b, 1)
        for _ in range(w.stacked):
            for_each_layer = jax.vmap(for_each_layer)
        base = dense(w.base)
        return base + (for_each_layer(w.a, w.b) * w.scale).astype(base.dtype)
    if isinstance(w, DoRA):
        v = dense(w.direction)
        return v * w.factor.astype(v.dtype)
    if isinstance(w, IA3) and w.bias is None:
        base = dense(w.base)
        return base * w.scale.astype(base.dtype)
    if isinstance(w, IA3):
        raise ValueError("an IA3 over a product with a bias is no array alone, for it scales the bias too; peft.merge merges both")
    if isinstance(w, Adapter):
        raise ValueError(
            "an adapter is a function, not a matrix: no array can stand for it, so it is not merged; keep it, or peft.split it off"
        )
    if isinstance(w, Prompted):
        return dense(w.base)
    if isinstance(w, Rounded):
        return w.w
    return qwix.dequantize(w) if isinstance(w, Quantized) else w


def _length(v: Array, kept: Sequence[int]) -> Array:
    """The norm of v over the axes along which `kept` is 1, which stay as 1, in float32."""
    over = tuple(i for i, size in enumerate(kept) if size == 1)
    return jnp.sqrt(jnp.sum(jnp.square(v.astype(jnp.float32)), over, keepdims=True))


def part_axes(w: Weight, axes: str) -> Any:
    """The axes of each part of `w`, in `w`'s own structure: a scale keeps the axes along which it varies, LoRA's `a` its base's first ones."""
    ax = parse_axes(axes)
    along = lambda part, full: " ".join(n if s == f else "_" for n, s, f in zip(ax.names, part.shape, full, strict=True))
    inner = lambda first, second: write_axes(Axes(ax.stack, first, second, False))
    outputs = ax.first if ax.outputs_first else ax.second
    if isinstance(w, Adapted):
        names: dict[str, str] = {
            "a": inner(ax.first, ("_",)), "b": inner(("_",), ax.second), "down": inner(outputs, ("_",)), "down_bias": inner((), ("_",)),
            "up": inner(("_",), outputs), "up_bias": inner((), outputs), "bias": inner((), outputs), "key": inner((), ()), "prompt": inner(("_",), ax.second),
        }  # fmt: skip
        names |= {name: along(part, shape(w)) for name, part in parts(w).items() if name in ("magnitude", "scale")}
        return dataclasses.replace(w, base=part_axes(w.base, axes), **{name: names[name] for name in parts(w)})
    if isinstance(w, Rounded):
        return Rounded(axes, w.kind)  # type: ignore[arg-type]
    if isinstance(w, Quantized):
        zero = None if w.zero_point is None else along(w.zero_point, w.qvalue.shape)
        return dataclasses.replace(w, qvalue=axes, scale=along(w.scale, w.qvalue.shape), zero_point=zero)
    return axes


def quantize(w: Array, qtype: str = "int8", *, axes: str, group: int | None = None) -> Quantized:
    """Round-to-nearest: returns q with `shape(q) == w.shape` and, of "int8" and "int4", `abs(w - dense(q)) <= q.scale / 2` everywhere; "nf4" has
    steps of unequal size.

    One scale for each output channel and layer, shared over the input axes; with `group`, one for each `group` entries of the last input axis.
    """
    ax = parse_axes(axes)
    if not ax.contracted:
        raise ValueError(f"a weight with axes {axes!r} has no inputs to share a scale over; quantize matrices, not biases and norms")
    kept = [i for i in range(w.ndim) if i not in ax.contracted]
    tiles = {}
    if group is not None:
        last, size = ax.contracted[-1], w.shape[ax.contracted[-1]]
        if size % group:
            raise ValueError(f"group {group} does not divide axis {ax.names[last]!r} of {size}; nearest is {math.gcd(group, size)}")
        tiles = {last: group}
    return qwix.quantize(w, qtype, channelwise_axes=kept, tiled_axes=tiles)


def lora(w: Weight, rank: int, *, axes: str, rng: Array, alpha: float | None = None, rs: bool = False, dtype: Any = jnp.float32) -> LoRA:
    """LoRA over any weight: `a` is drawn uniformly (He et al., gain 1/3), `b` is zero, so `dense(lora(w)) == dense(w)` at the start."""
    stack, first, second = _dimensions(w, axes, "LoRA", rank)
    bound = 1 / math.sqrt(math.prod(first))
    a = jax.random.uniform(rng, (*stack, *first, rank), dtype, -bound, bound)
    return LoRA(w, a, jnp.zeros((*stack, rank, *second), dtype), float(rank if alpha is None else alpha), rs)


def dora(w: Weight, rank: int, *, axes: str, rng: Array, alpha: float | None = None, rs: bool = False, dtype: Any = jnp.float32) -> DoRA:
    """DoRA over any weight: its magnitude is the norm of w, so that it is w at the start but for the rounding of a quotient."""
    made, ax, full = lora(w, rank, axes=axes, rng=rng, alpha=alpha, rs=rs, dtype=dtype), parse_axes(axes), shape(w)
    kept = [1 if i in ax.contracted else size for i, size in enumerate(full)]
    return DoRA(w, made.a, made.b, _length(dense(w), kept).astype(dtype), made.alpha, rs)


def ia3(w: Weight, *, axes: str, inputs: bool = False, bias: Array | None = None, dtype: Any = jnp.float32) -> IA3:
    """IA3 over any weight: ones, along the outputs or the inputs; `bias` is what the module adds to the outputs that are scaled."""
    ax, full = parse_axes(axes), shape(w)
    _dimensions(w, axes, "IA3")
    ones = [size if i < len(ax.stack) or (i in ax.contracted) == inputs else 1 for i, size in enumerate(full)]
    return IA3(w, jnp.ones(ones, dtype), None if inputs else bias)


def adapter(
    w: Weight, size: int, *, axes: str, rng: Array, act: str = "relu", bias: Array | None = None, dtype: Any = jnp.float32
) -> Adapter:
    """An adapter of `size` behind the product with any weight: `up` is zero, so that it does nothing at the start."""
    stack, first, second = _dimensions(w, axes, "an adapter", size)
    outputs = first if parse_axes(axes).outputs_first else second
    down = jax.random.normal(rng, (*stack, *outputs, size), dtype) / math.sqrt(math.prod(outputs))
    zeros = lambda *shape: jnp.zeros((*stack, *shape), dtype)
    return Adapter(w, down, zeros(size), zeros(size, *outputs), zeros(*outputs), bias, act)


def prompted(w: Weight, prompt: Array) -> Prompted:
    """The table w [V, D] with the rows of `prompt` [P, D] below its own."""
    if len(shape(w)) != 2 or prompt.shape[1:] != shape(w)[1:]:
        raise ValueError(f"a prompt {tuple(prompt.shape)} has no place below a table {shape(w)}: give rows [P, D] for a table [V, D]")
    return Prompted(w, prompt)


def _dimensions(w: Weight, axes: str, what: str, rank: int = 1) -> tuple[tuple[int, ...], ...]:
    """The shape of w in three: stack, first axes, second axes. Raises ValueError where it is no matrix, or for a rank below 1."""
    ax, full = parse_axes(axes), shape(w)
    if not ax.first or rank < 1:
        raise ValueError(f"{what} needs a matrix and a rank of at least 1, not axes {axes!r} and rank {rank}")
    cut = (len(ax.stack), len(ax.stack + ax.first))
    return full[: cut[0]], full[cut[0] : cut[1]], full[cut[1] :]


def rounded(params: Any, rules: trees.Rules, axes: Any) -> Any:
    """The tree with Rounded in the place of arrays, of the kind that the first matching rule says, None for none: `[("blocks/.*", "int8")]`.

    Only what multiplies is touched, and only where all of its axes have names ("embed -> mlp"): never norms, biases, tables ("vocab <- embed"),
    routers ("embed -> _") or filters, whatever the rules match. Raises ValueError for an unknown kind, and where no weight is left.
    """
    for _, kind in rules:
        if kind is not None and kind not in KINDS:
            raise ValueError(f"products cannot be rounded to {kind!r}; {trees.did_you_mean(str(kind), KINDS, 'there are')}")

    def one(w, text, kind):
        ax = parse_axes(text)
        multiplies = bool(ax.first) and not ax.outputs_first and "_" not in ax.names
        return Rounded(w, kind) if kind is not None and multiplies and not is_typed(w) else w

    made = jax.tree.map(one, params, axes, trees.apply_rules(rules, params, is_leaf=is_typed), is_leaf=is_typed)
    if not any(isinstance(w, Rounded) for _, w in named_weights(made)):
        raise ValueError(f"the rules {list(rules)!r} round no weight; they act on matrices with named axes, such as 'embed -> mlp'")
    return made


def trainable(tree: Any, axes: Any = None) -> Any:
    """A same-shaped tree of booleans: False for what can never train: integer leaves, the parts of a quantized weight, and, where the
    tree of `axes` is given, running statistics, whose axes are named "statistic"."""

    def one(w, text=""):
        if isinstance(w, Quantized) or "statistic" in parse_axes(text).names:
            return jax.tree.map(lambda _: False, w)
        if isinstance(w, Adapted):
            return dataclasses.replace(w, base=one(w.base), **{name: name not in ("bias", "key") for name in parts(w)})
        if isinstance(w, Rounded):
            return Rounded(one(w.w), w.kind)  # type: ignore[arg-type]
        return bool(jnp.issubdtype(w.dtype, jnp.inexact))

    return jax.tree.map(one, tree, *([] if axes is None else [axes]), is_leaf=is_typed)


def trains(params: Any, freeze: trees.Rules, axes: Any = None) -> Any:
    """The tree of booleans of what trains: what can (`trainable`) and what no rule of `freeze` holds."""
    frozen = trees.apply_rules(freeze, params, default=False)
    return jax.tree.map(lambda can, no: can and not no, trainable(params, axes), frozen)


def named_weights(params: Any) -> list[tuple[str, Weight]]:
    """`trees.named_leaves` that stops at typed weights."""
    return trees.named_leaves(params, is_leaf=is_typed)
