"""Weights of few bits, and weights that train as floats while their products are computed in few bits."""

import dataclasses
import math
from typing import Any

import jax
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
