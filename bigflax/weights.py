"""Weights: an array, or a typed value that stands where an array stood.

    Quantized(qvalue, scale)   w = (qvalue - zero_point) * scale         an array of the Qwix library, with our laws
    LoRA(base, a, b)           w = base + (a . b) * alpha / rank          `base` may be any weight, so LoRA(Quantized) is QLoRA
    Rounded(w, kind)           w itself, which trains; only its products round it, and what they multiply it by, to 8 bits

Every type keeps these laws (tests/test_weights.py holds each type to each of them):

    shape(w) == dense(w).shape                       the logical shape, derived from the parts and never stored
    einsum(spec, x, w) ~ einsum(spec, x, dense(w))   `ops.einsum` multiplies by any of them; ~ is as near as 8 bits for a Rounded
    w under scan, jit, grad, shardings               each is a registered pytree; a leading layer axis rides on every part

Axes of a weight are one string, written where the weight is declared:

    "embed -> heads head_dim"            inputs, then outputs
    "vocab <- embed"                     outputs first: rows are outputs (embedding tables and heads)
    "layers | embed -> mlp"              a stack of layers in front
    "norm"                               no inputs: a bias or a scale; "_" is an axis without a name
    "statistic"                          no weight at all: a running mean or variance, which never trains

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685), section 4.1; QLoRA, Dettmers et al. 2023 (arXiv 2305.14314), equation 5.
Left out on purpose: Sparse and LowRank arrive with the functions that make them (compress/).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix

from bigflax import trees

Array = jax.Array
Quantized = qwix.QArray
Weight = Any  # Array | Quantized | LoRA | Rounded: what ops.einsum multiplies by


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["alpha"])
@dataclasses.dataclass(frozen=True)
class LoRA:
    """w = base + (a . b) * alpha / rank, with a: [..stack, ..inputs, rank] and b: [..stack, rank, ..outputs]."""

    base: Weight
    a: Array
    b: Array
    alpha: float = 1.0

    @property
    def scale(self) -> float:
        return self.alpha / self.a.shape[-1]

    @property
    def stacked(self) -> int:
        """How many leading layer axes the parts carry: what a and b have too many for their base."""
        return self.a.ndim + self.b.ndim - 2 - len(shape(self.base))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A float array whose products, in training, are computed in 8 bits (ops/matmul.py says which of them): `kind` is a key of KINDS."""

    w: Array
    kind: str


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
    return isinstance(w, (LoRA, Quantized, Rounded))


def shape(w: Weight) -> tuple[int, ...]:
    """The logical shape: that of the array in whose place `w` stands, layer axes included."""
    return shape(w.base) if isinstance(w, LoRA) else tuple(w.w.shape if isinstance(w, Rounded) else w.shape)


def dense(w: Weight) -> Array:
    """The array that `w` stands for. For reading, tests and export; training multiplies without building it."""
    if isinstance(w, LoRA):
        for_each_layer = lambda a, b: jnp.tensordot(a, b, 1)
        for _ in range(w.stacked):
            for_each_layer = jax.vmap(for_each_layer)
        base = dense(w.base)
        return base + (for_each_layer(w.a, w.b) * w.scale).astype(base.dtype)
    if isinstance(w, Rounded):
        return w.w
    return qwix.dequantize(w) if isinstance(w, Quantized) else w


def part_axes(w: Weight, axes: str) -> Any:
    """The axes of each part of `w`, in `w`'s own structure: a scale keeps the axes along which it varies, LoRA's `a` its base's inputs."""
    ax = parse_axes(axes)
    if isinstance(w, LoRA):
        a, b = Axes(ax.stack, ax.first, ("_",), False), Axes(ax.stack, ("_",), ax.second, False)
        return LoRA(part_axes(w.base, axes), write_axes(a), write_axes(b), w.alpha)  # type: ignore[arg-type]
    if isinstance(w, Rounded):
        return Rounded(axes, w.kind)  # type: ignore[arg-type]
    if isinstance(w, Quantized):
        full = w.qvalue.shape
        along = lambda part: " ".join(n if s == f else "_" for n, s, f in zip(ax.names, part.shape, full, strict=True))
        return dataclasses.replace(w, qvalue=axes, scale=along(w.scale), zero_point=None if w.zero_point is None else along(w.zero_point))
    return axes


def quantize(w: Array, qtype: str = "int8", *, axes: str, group: int | None = None) -> Quantized:
    """Round-to-nearest: returns q with `shape(q) == w.shape` and `abs(w - dense(q)) <= q.scale / 2` everywhere.

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


def lora(w: Weight, rank: int, *, axes: str, rng: Array, alpha: float | None = None, dtype: Any = jnp.float32) -> LoRA:
    """LoRA over any weight: `a` is drawn uniformly (He et al., gain 1/3), `b` is zero, so `dense(lora(w)) == dense(w)` at the start."""
    ax, full = parse_axes(axes), shape(w)
    stack, ins, outs = full[: len(ax.stack)], full[len(ax.stack) : len(ax.stack + ax.first)], full[len(ax.stack + ax.first) :]
    if not ax.first or rank < 1:
        raise ValueError(f"LoRA needs a matrix and a rank of at least 1, not axes {axes!r} and rank {rank}")
    bound = 1 / math.sqrt(math.prod(ins))
    a = jax.random.uniform(rng, (*stack, *ins, rank), dtype, -bound, bound)
    return LoRA(w, a, jnp.zeros((*stack, rank, *outs), dtype), float(rank if alpha is None else alpha))


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
        if isinstance(w, LoRA):
            return LoRA(one(w.base), True, True, w.alpha)  # type: ignore[arg-type]
        if isinstance(w, Rounded):
            return Rounded(one(w.w), w.kind)  # type: ignore[arg-type]
        return bool(jnp.issubdtype(w.dtype, jnp.inexact))

    return jax.tree.map(one, tree, *([] if axes is None else [axes]), is_leaf=is_typed)


def named_weights(params: Any) -> list[tuple[str, Weight]]:
    """`trees.named_leaves` that stops at typed weights."""
    return trees.named_leaves(params, is_leaf=is_typed)
