"""What fine-tuning puts upon a weight, its `base`, which may be any weight."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bigflax.weights.axes import Axes, parse_axes, write_axes
from bigflax.weights.laws import Weight, along, can_train, dense, dimensions, part_axes, parts, shape, typed

Array = jax.Array


@typed("base", "a", "b", "key", meta=["alpha", "rs", "rate"])
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


@typed("base", "a", "b", "magnitude", "key", meta=["alpha", "rs", "rate"])
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


@typed("base", "scale", "bias")
@dataclasses.dataclass(frozen=True)
class IA3:
    """w = base * scale, with scale: [..stack, ..1, ..outputs], or [..stack, ..inputs, ..1] where it scales what goes in.

    Published IA3 scales a layer's output, its bias included, which our modules add behind the product. So where there is one, `bias`
    [..stack, ..outputs] is a copy of it that does not train, and the product gives x w + (scale - 1) bias.
    """

    base: Weight
    scale: Array
    bias: Array | None = None


@typed("base", "down", "down_bias", "up", "up_bias", "bias", meta=["act"])
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


@typed("base", "prompt")
@dataclasses.dataclass(frozen=True)
class Prompted:
    """A table, base [V, D], whose ids V to V + P - 1 are the rows of `prompt` [P, D]. Those are looked up (`ops.take`) and nothing else: as a matrix
    (a head that is tied to the table) it is its base."""

    base: Weight
    prompt: Array


@typed("base", "delta")
@dataclasses.dataclass(frozen=True)
class Perturbed:
    """A table, base [V, D], of which `ops.take` gives the rows of ids [B, T] plus delta [B, T, D]: an attack on what is embedded, made for one
    batch (adversarial.py). As a matrix (a head that is tied to the table) it is its base."""

    base: Weight
    delta: Array


Adapted = LoRA | DoRA | IA3 | Adapter | Prompted | Perturbed  # what stands upon a `base`
# The parts that are no matrices, whatever their dimensions, and scores of a mask (compressed.py): they do not decay.
VECTORS = ("magnitude", "scale", "down_bias", "up_bias", "scores")


@shape.register(Adapted)
def _(w):
    return shape(w.base)


def rows(w: Weight) -> int:
    """How many ids `ops.take` knows: the rows of the table, and those of its prompt."""
    if isinstance(w, Perturbed):
        return rows(w.base)
    return shape(w)[0] + (w.prompt.shape[0] if isinstance(w, Prompted) else 0)


@dense.register
def _(w: LoRA):
    for_each_layer = lambda a, b: jnp.tensordot(a, b, 1)
    for _ in range(w.stacked):
        for_each_layer = jax.vmap(for_each_layer)
    base = dense(w.base)
    return base + (for_each_layer(w.a, w.b) * w.scale).astype(base.dtype)


@dense.register
def _(w: DoRA):
    v = dense(w.direction)
    return v * w.factor.astype(v.dtype)


@dense.register
def _(w: IA3):
    if w.bias is not None:
        raise ValueError("an IA3 over a product with a bias is no array alone, for it scales the bias too; peft.merge merges both")
    base = dense(w.base)
    return base * w.scale.astype(base.dtype)


@dense.register
def _(w: Adapter):
    raise ValueError(
        "an adapter is a function, not a matrix: no array can stand for it, so it is not merged; keep it, or peft.split it off"
    )


@dense.register(Prompted)
@dense.register(Perturbed)
def _(w):
    return dense(w.base)


def _length(v: Array, kept: Sequence[int]) -> Array:
    """The norm of v over the axes along which `kept` is 1, which stay as 1, in float32."""
    over = tuple(i for i, size in enumerate(kept) if size == 1)
    return jnp.sqrt(jnp.sum(jnp.square(v.astype(jnp.float32)), over, keepdims=True))


@part_axes.register(Adapted)
def _(w, axes: str):
    ax = parse_axes(axes)
    inner = lambda first, second: write_axes(Axes(ax.stack, first, second, False))
    outputs = ax.first if ax.outputs_first else ax.second
    names: dict[str, str] = {
        "a": inner(ax.first, ("_",)), "b": inner(("_",), ax.second), "down": inner(outputs, ("_",)), "down_bias": inner((), ("_",)),
        "up": inner(("_",), outputs), "up_bias": inner((), outputs), "bias": inner((), outputs), "key": inner((), ()), "prompt": inner(("_",), ax.second),
        "delta": "batch seq _",
    }  # fmt: skip
    names |= {name: along(part, shape(w), axes) for name, part in parts(w).items() if name in ("magnitude", "scale")}
    return dataclasses.replace(w, base=part_axes(w.base, axes), **{name: names[name] for name in parts(w)})


@can_train.register(Adapted)
def _(w, axes: str = ""):
    if "statistic" in parse_axes(axes).names:
        return jax.tree.map(lambda _: False, w)
    return dataclasses.replace(w, base=can_train(w.base), **{name: name not in ("bias", "key") for name in parts(w)})


def lora(w: Weight, rank: int, *, axes: str, rng: Array, alpha: float | None = None, rs: bool = False, dtype: Any = jnp.float32) -> LoRA:
    """LoRA over any weight: `a` is drawn uniformly (He et al., gain 1/3), `b` is zero, so `dense(lora(w)) == dense(w)` at the start."""
    stack, first, second = dimensions(w, axes, "LoRA", rank)
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
    dimensions(w, axes, "IA3")
    ones = [size if i < len(ax.stack) or (i in ax.contracted) == inputs else 1 for i, size in enumerate(full)]
    return IA3(w, jnp.ones(ones, dtype), None if inputs else bias)


def adapter(
    w: Weight, size: int, *, axes: str, rng: Array, act: str = "relu", bias: Array | None = None, dtype: Any = jnp.float32
) -> Adapter:
    """An adapter of `size` behind the product with any weight: `up` is zero, so that it does nothing at the start."""
    stack, first, second = dimensions(w, axes, "an adapter", size)
    outputs = first if parse_axes(axes).outputs_first else second
    down = jax.random.normal(rng, (*stack, *outputs, size), dtype) / math.sqrt(math.prod(outputs))
    zeros = lambda *shape: jnp.zeros((*stack, *shape), dtype)
    return Adapter(w, down, zeros(size), zeros(size, *outputs), zeros(*outputs), bias, act)


def prompted(w: Weight, prompt: Array) -> Prompted:
    """The table w [V, D] with the rows of `prompt` [P, D] below its own."""
    if len(shape(w)) != 2 or prompt.shape[1:] != shape(w)[1:]:
        raise ValueError(f"a prompt {tuple(prompt.shape)} has no place below a table {shape(w)}: give rows [P, D] for a table [V, D]")
    return Prompted(w, prompt)
