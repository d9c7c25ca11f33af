"""What compression leaves in a weight's place: fewer numbers, or a base that is easier to round beside what undoes it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from bigflax.weights.axes import Axes, parse_axes, write_axes
from bigflax.weights.laws import Weight, along, can_train, dense, part_axes, shape, typed

Array = jax.Array


@typed("a", "b", meta=["split"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """w = a . b, with a: [..stack, ..first, rank] and b: [..stack, rank, ..second], the axes of w as they are written; both may be any weight.

    `split` is the number of second axes: what b has more, less its rank, are layers."""

    a: Weight
    b: Weight
    split: int = 1

    @staticmethod
    def factor_axes(axes: str) -> tuple[str, str]:
        """The axes of a and b, of a weight of these axes."""
        ax = parse_axes(axes)
        return write_axes(Axes(ax.stack, ax.first, ("_",), False)), write_axes(Axes(ax.stack, ("_",), ax.second, False))


@typed("values", "bits", meta=["axis"])
@dataclasses.dataclass(frozen=True)
class Sparse:
    """w with zeros: `values`, any weight, holds along `axis` what is not zero, in order, and `bits` [.., K / 8, ..] uint8 says of each of the K places,
    lowest bit first, whether one of the values stands there.

    `axis` is that of the last inputs, counted from the end. Of N:M sparsity, and where every output keeps as many, `values` is K N / M long; where
    some keep fewer, the rest of their `values` is not read."""

    values: Weight
    bits: Array
    axis: int


@typed("w", "mask")
@dataclasses.dataclass(frozen=True)
class Masked:
    """w where `mask` is true, else zero: an array of zeros that training leaves alone, for both have one shape."""

    w: Array
    mask: Array


@typed("w", "mask", "step", "scores")
@dataclasses.dataclass(frozen=True)
class Moving:
    """w where `mask` is true, else zero, while the mask moves (compress/gradual.py): `step` [..stack] int32 counts the steps that it has seen. `scores`, where
    there are some, are learned as if they stood in the mask's place: their gradient is that of the product's matrix, times w."""

    w: Array
    mask: Array
    step: Array
    scores: Array | None = None


@typed("base", "scale")
@dataclasses.dataclass(frozen=True)
class Scaled:
    """w = base * scale, with scale [.., inputs, ..1] of size 1 along the outputs: what goes in is multiplied by it. It does not train."""

    base: Weight
    scale: Array


@typed("base", "signs", meta=["axis"])
@dataclasses.dataclass(frozen=True)
class Rotated:
    """w = R^T base, where R = H diag(signs) turns the last inputs, `axis` counted from the end: an orthogonal matrix that spreads what is large over all.

    H is block diagonal, of normed Hadamard matrices as large as the largest power of two that divides the axis; `signs` [.., K, ..1] are +-1."""

    base: Weight
    signs: Array
    axis: int


@typed("base", "scale")
@dataclasses.dataclass(frozen=True)
class W8A8:
    """w = base, a Quantized of int8, whose products round what they multiply it by to int8 too: each row with a scale of its own, or with `scale` [], where
    there is one, all rows."""

    base: Weight
    scale: Array | None = None


# -- shape and dense -------------------------------------------------------------------------------------------------------


@shape.register
def _(w: LowRank):
    return (*shape(w.a)[:-1], *shape(w.b)[len(shape(w.b)) - w.split :])


@dense.register
def _(w: LowRank):
    a, b = dense(w.a), dense(w.b)
    product = lambda a, b: jnp.tensordot(a, b, 1)
    for _ in range(b.ndim - 1 - w.split):
        product = jax.vmap(product)
    return product(a, b)


@shape.register
def _(w: Sparse):
    full = list(shape(w.values))
    full[w.axis] = 8 * w.bits.shape[w.axis]
    return tuple(full)


@dense.register
def _(w: Sparse):
    values, bits = jnp.moveaxis(dense(w.values), w.axis, -1), jnp.moveaxis(w.bits, w.axis, -1)
    there = ((bits[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1).reshape(*bits.shape[:-1], -1)
    place = jnp.maximum(jnp.cumsum(there, -1, dtype=jnp.int32) - 1, 0)
    return jnp.moveaxis(jnp.take_along_axis(values, place, -1) * there.astype(values.dtype), -1, w.axis)


@shape.register(Masked | Moving)
def _(w):
    return shape(w.w)


@dense.register
def _(w: Masked):
    return jnp.where(w.mask, w.w, jnp.zeros((), w.w.dtype))


@dense.register
def _(w: Moving):
    kept = jnp.where(w.mask, w.w, jnp.zeros((), w.w.dtype))
    if w.scores is None:
        return kept
    nothing = w.scores - jax.lax.stop_gradient(w.scores)  # but its gradient
    return kept + nothing.astype(kept.dtype) * w.w


@shape.register(Scaled | Rotated | W8A8)
def _(w):
    return shape(w.base)


@dense.register
def _(w: Scaled):
    base = dense(w.base)
    return base * w.scale.astype(base.dtype)


@dense.register
def _(w: Rotated):
    base = dense(w.base)
    return hadamard(base, w.axis) * w.signs.astype(base.dtype)


@dense.register
def _(w: W8A8):
    return dense(w.base)


def hadamard(x: Array, axis: int) -> Array:
    """x times a normed block-diagonal Hadamard matrix along this axis, in float32; twice is x again."""
    K = x.shape[axis]
    block = K & -K  # the largest power of two that divides it
    left = 2 ** (block.bit_length() // 2)
    parts = jnp.moveaxis(x, axis, -1).reshape(*x.shape[:axis], *x.shape[axis % x.ndim + 1 :], K // block, left, block // left)
    # A Hadamard matrix of a b is the Kronecker product of those of a and b: two small products instead of a large one.
    turned = jnp.einsum("...ab,ac,bd->...cd", parts.astype(jnp.float32), _sylvester(left), _sylvester(block // left))
    return jnp.moveaxis(turned.reshape(*turned.shape[:-3], K), -1, axis).astype(x.dtype)


def _sylvester(n: int) -> np.ndarray:
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / math.sqrt(n)


# -- how the parts lie, and what of them trains ----------------------------------------------------------------------------


@part_axes.register
def _(w: LowRank, axes: str):
    a, b = w.factor_axes(axes)
    return LowRank(part_axes(w.a, a), part_axes(w.b, b), w.split)


@part_axes.register
def _(w: Sparse, axes: str):
    return Sparse(part_axes(w.values, axes), axes, w.axis)  # type: ignore[arg-type]


@part_axes.register
def _(w: Masked, axes: str):
    return Masked(axes, axes)  # type: ignore[arg-type]


@part_axes.register
def _(w: Moving, axes: str):
    return Moving(axes, axes, " ".join(parse_axes(axes).stack), w.scores if w.scores is None else axes)  # type: ignore[arg-type]


@part_axes.register(Scaled | Rotated)
def _(w, axes: str):
    part = "scale" if isinstance(w, Scaled) else "signs"
    return dataclasses.replace(w, base=part_axes(w.base, axes), **{part: along(getattr(w, part), shape(w), axes)})


@part_axes.register
def _(w: W8A8, axes: str):
    return W8A8(part_axes(w.base, axes), w.scale if w.scale is None else " ".join(parse_axes(axes).stack))  # type: ignore[arg-type]


@can_train.register
def _(w: LowRank, axes: str = ""):
    return LowRank(can_train(w.a), can_train(w.b), w.split)


@can_train.register
def _(w: Sparse, axes: str = ""):
    return Sparse(can_train(w.values), False, w.axis)  # type: ignore[arg-type]


@can_train.register
def _(w: Masked, axes: str = ""):
    return Masked(can_train(w.w), False)  # type: ignore[arg-type]


@can_train.register
def _(w: Moving, axes: str = ""):
    return Moving(can_train(w.w), False, False, w.scores if w.scores is None else can_train(w.scores))  # type: ignore[arg-type]


@can_train.register
def _(w: Scaled, axes: str = ""):
    return Scaled(can_train(w.base), False)  # type: ignore[arg-type]


@can_train.register
def _(w: Rotated, axes: str = ""):
    return Rotated(can_train(w.base), False, w.axis)  # type: ignore[arg-type]


@can_train.register
def _(w: W8A8, axes: str = ""):
    return jax.tree.map(lambda _: False, w)


# -- makers ----------------------------------------------------------------------------------------------------------------


def input_axis(axes: str) -> int:
    """That of the last inputs, counted from the end: it stays where it is when a scan takes the layers away."""
    ax = parse_axes(axes)
    if not ax.contracted:
        raise ValueError(f"a weight with axes {axes!r} has no inputs; compress matrices, not biases and norms")
    return ax.contracted[-1] - len(ax.names)


def rotated(w: Array, rng: Array, *, axes: str) -> Rotated:
    """`w` turned by a random rotation of its last inputs: `dense(rotated(w)) ~ w`."""
    at, ax = input_axis(axes), parse_axes(axes)
    ones = [size if i < len(ax.stack) or i in ax.contracted else 1 for i, size in enumerate(w.shape)]
    signs = jax.random.rademacher(rng, ones, jnp.int8)
    return Rotated(hadamard(w * signs.astype(w.dtype), at), signs, at)


def sparse(w: Array, mask: Array, *, axes: str) -> Sparse:
    """`w` where `mask` is true. Raises ValueError where 8 does not divide the last inputs. Concrete arrays only: how many values an output has
    decides shapes."""
    at = input_axis(axes)
    if w.shape[at] % 8:
        raise ValueError(f"a sparse weight keeps a bit for each of its last inputs, in bytes; 8 does not divide {w.shape[at]}")
    there, of = np.moveaxis(np.asarray(mask), at, -1), np.moveaxis(np.asarray(w), at, -1)
    bits = np.packbits(there, axis=-1, bitorder="little")
    most = max(1, int(there.sum(-1).max()))
    order = np.argsort(~there, axis=-1, kind="stable")[..., :most]
    values = np.take_along_axis(of, order, -1) * np.take_along_axis(there, order, -1)
    return Sparse(jnp.asarray(np.moveaxis(values, -1, at)), jnp.asarray(np.moveaxis(bits, -1, at)), at)
