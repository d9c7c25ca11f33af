"""Weights of few bits, and weights that train as floats while their products, or they themselves, are computed in few bits."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from bigflax import trees
from bigflax.weights.axes import parse_axes
from bigflax.weights.laws import TYPES, along, can_train, dense, is_typed, named_weights, part_axes, shape, typed

Array = jax.Array
Quantized = qwix.QArray
TYPES.append(Quantized)


@typed("w", meta=["kind"])
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A float array whose products, in training, are computed in 8 bits (ops/matmul.py says which of them): `kind` is a key of KINDS."""

    w: Array
    kind: str


@typed("w", "scale", "zero", meta=["bits"])
@dataclasses.dataclass(frozen=True)
class Learned:
    """w^ = (clip(round(x), low, high) - zero) * scale with x = w / scale + zero, low = -2^(bits - 1), high = 2^(bits - 1) - 1, while `w`, an array, and `scale`
    train. `scale`, and `zero`, which stays, lie as a Quantized's: along each axis a number for each of w's, or for each group of them.

        dw^/dw     = 1 where low < x < high, else 0                                         straight through
        dw^/dscale = g (round(x) - x where low < x < high, else the clipped code - zero)    g = 1 / sqrt(numbers in a group * high)

    LSQ, Esser et al. 2020 (1902.08153): equations 1 and 2, 5, 3, and g of section 2.2; there without a zero point."""

    w: Array
    scale: Array
    zero: Array | None = None
    bits: int = 4

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def grouped(self) -> tuple[Array, Array, Array]:
        """w with an axis more for each that lies in groups; scale, and zero in float32, of size 1 along these."""
        full, part = [], []
        for size, many in zip(self.w.shape, self.scale.shape, strict=True):
            tiled = many not in (1, size)
            full += [many, size // many] if tiled else [size]
            part += [many, 1] if tiled else [many]
        zero = jnp.zeros([1] * len(part)) if self.zero is None else self.zero.astype(jnp.float32).reshape(part)
        return self.w.reshape(full), self.scale.reshape(part), zero


# kind -> the types of what a product and its gradient are made of: activations and weights, the gradient that comes back, and whether the
# weight's own gradient is such a product too
KINDS = {"int8": ("int8", "int8", False), "fp8": ("float8_e4m3fn", "float8_e5m2", True)}


@dense.register
def _(w: Quantized):
    return qwix.dequantize(w)


@part_axes.register
def _(w: Quantized, axes: str):
    zero = None if w.zero_point is None else along(w.zero_point, w.qvalue.shape, axes)
    return dataclasses.replace(w, qvalue=axes, scale=along(w.scale, w.qvalue.shape, axes), zero_point=zero)


@can_train.register
def _(w: Quantized, axes: str = ""):
    return jax.tree.map(lambda _: False, w)


@shape.register
def _(w: Rounded):
    return shape(w.w)


@dense.register
def _(w: Rounded):
    return w.w


@part_axes.register
def _(w: Rounded, axes: str):
    return Rounded(axes, w.kind)  # type: ignore[arg-type]


@can_train.register
def _(w: Rounded, axes: str = ""):
    return Rounded(can_train(w.w, axes), w.kind)  # type: ignore[arg-type]


@shape.register
def _(w: Learned):
    return shape(w.w)


@dense.register
def _(w: Learned):
    made: Any = _learned(w.limits, *w.grouped)  # custom_vjp hides its type
    return made.reshape(w.w.shape)


@part_axes.register
def _(w: Learned, axes: str):
    beside = lambda part: None if part is None else along(part, w.w.shape, axes)
    return Learned(axes, beside(w.scale), beside(w.zero), w.bits)  # type: ignore[arg-type]


@can_train.register
def _(w: Learned, axes: str = ""):
    return Learned(can_train(w.w, axes), can_train(w.scale), None if w.zero is None else False, w.bits)  # type: ignore[arg-type]


LEAST = 1e-12  # a scale that training takes to zero or below it counts as this, and its gradient can bring it back


def _steps(limits: tuple[int, int], w: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
    """(x, the codes), float32."""
    x = w.astype(jnp.float32) / jnp.maximum(scale, LEAST).astype(jnp.float32) + zero
    return x, jnp.clip(jnp.round(x), *limits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _learned(limits: tuple[int, int], w: Array, scale: Array, zero: Array) -> Array:
    _, codes = _steps(limits, w, scale, zero)
    return (codes - zero).astype(scale.dtype) * jnp.maximum(scale, LEAST)


def _learned_backward(limits, saved, d):
    w, scale, zero = saved
    (low, high), (x, codes) = limits, _steps(limits, w, scale, zero)
    inside = (low < x) & (x < high)
    slope = jnp.where(inside, codes - x, codes - zero)
    alike = [axis for axis, many in enumerate(scale.shape) if many == 1]
    factor = 1 / math.sqrt(w.size / scale.size * high)
    along_scale = factor * jnp.sum(d.astype(jnp.float32) * slope, alike, keepdims=True)
    return jnp.where(inside, d, jnp.zeros((), d.dtype)).astype(w.dtype), along_scale.astype(scale.dtype), jnp.zeros_like(zero)


_learned.defvjp(lambda limits, w, scale, zero: (_learned(limits, w, scale, zero), (w, scale, zero)), _learned_backward)


def coded(w: Learned) -> Quantized:
    """The codes and scales that `w` multiplies by: dense(coded(w)) == dense(w), to the bit."""
    _, codes = _steps(w.limits, *w.grouped)
    stored = "int8" if w.bits > 4 else "int4"
    zero = None if w.zero is None else w.zero.astype(stored)
    return Quantized(codes.reshape(w.w.shape).astype(stored), jnp.maximum(w.scale, LEAST), zero, f"int{w.bits}")


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
