"""A weight that looks at what it is multiplied with: what calibration puts in a weight's place for one pass (ops/observed.py, compress/observing.py)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bigflax.weights.axes import parse_axes
from bigflax.weights.laws import Array, Weight, can_train, dense, part_axes, shape, typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """Statistics of what a matrix was multiplied with, float32, K its inputs in their order: the sum of x x^T [K, K], of |x| [K], the largest |x| [K], and how
    many x there were; of a table how often each of its rows was looked up [N]. `cross` is the sum of x y^T [K, K], where y stands in the place of x in another
    half of the batch (`Paired`), of which nothing else is seen. Those that nobody wants are None. A stack of matrices has its axes in front."""

    count: Array
    hessian: Any = None
    size: Any = None
    peak: Any = None
    often: Any = None
    cross: Any = None

    def __add__(self, other: "Seen") -> "Seen":
        both = lambda fn, a, b: None if a is None else fn(a, b)
        return Seen(
            self.count + other.count, both(jnp.add, self.hessian, other.hessian), both(jnp.add, self.size, other.size),
            both(jnp.maximum, self.peak, other.peak), both(jnp.add, self.often, other.often), both(jnp.add, self.cross, other.cross),
        )  # fmt: skip

    @property
    def squares(self) -> Array:
        """The sum of x^2 for each input."""
        return jnp.diagonal(self.hessian, axis1=-2, axis2=-1)


@typed("base", "seen", meta=["key"])
@dataclasses.dataclass(frozen=True)
class Observed:
    """A weight whose `seen`, zeros, has for a gradient the statistics of what it is multiplied with; `key` is by what `ops.observed.counting` knows it."""

    base: Weight
    seen: Seen
    key: Any = None


@shape.register
def _(w: Observed):
    return shape(w.base)


@dense.register
def _(w: Observed):
    return dense(w.base)


@part_axes.register
def _(w: Observed, axes: str):
    ax = parse_axes(axes)
    seen = jax.tree.map(lambda part: " ".join((*ax.stack, *"_" * (part.ndim - len(ax.stack)))), w.seen)
    return Observed(part_axes(w.base, axes), seen, w.key)


@can_train.register
def _(w: Observed, axes: str = ""):
    return jax.tree.map(lambda _: False, w)


@typed("first", "second")
@dataclasses.dataclass(frozen=True)
class Paired:
    """Two weights of one shape: the first half of a batch is multiplied with one, the second with the other, so that a model and what is made of it compute
    side by side."""

    first: Weight
    second: Weight


@shape.register
def _(w: Paired):
    return shape(w.first)


@dense.register
def _(w: Paired):
    raise ValueError("a Paired stands for two arrays")


@part_axes.register
def _(w: Paired, axes: str):
    return Paired(part_axes(w.first, axes), part_axes(w.second, axes))


@can_train.register
def _(w: Paired, axes: str = ""):
    return jax.tree.map(lambda _: False, w)
