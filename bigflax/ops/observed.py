"""Products of an Observed weight: those of its base, while the "gradient" of its `seen` is defined as the statistics of what it was multiplied with.

So they come out of scans, vmaps and shardings as gradients do, summed over every use of a weight. Of a mixture (moe.py) each expert sees the rows that were
sent to it and have room there. While Paired weights stand beside it, a batch is two, and what is seen is of its second half.

Legend: S a stack of matrices, R rows, K inputs.
"""

import contextlib
import contextvars
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigflax.ops.matmul import lettered, lookup, operands, product
from bigflax.weights import Observed, Paired, Seen

Array = jax.Array

_real: contextvars.ContextVar[Array | None] = contextvars.ContextVar("bigflax_real", default=None)
_counted: contextvars.ContextVar[dict[Any, "Use"] | None] = contextvars.ContextVar("bigflax_counted", default=None)


@contextlib.contextmanager
def reading(real_BT: Array | None):
    """While a model is traced inside, rows of [B, T, ..] count where this is not 0: padding teaches nothing."""
    token = _real.set(None if real_BT is None else (real_BT > 0).astype(jnp.float32))
    try:
        yield
    finally:
        _real.reset(token)


class Use(NamedTuple):
    """How many rows a matrix is multiplied with, whether padding among them does not count, and the array that was given, where there is one for all."""

    rows: int
    masked: bool
    given: Any = None


@contextlib.contextmanager
def counting():
    """While a model is traced inside, nothing is looked at but the `Use` of each Observed: {key: Use}, in the order of their first. Of one that is used several
    times it is the last, of experts all that are sent to any of them."""
    counted: dict[Any, Use] = {}
    token = _counted.set(counted)
    try:
        yield counted
    finally:
        _counted.reset(token)


@product.register
def _(w: Observed, spec, x, precision=None) -> Array:
    spec = lettered(spec, x.ndim)
    inputs, weight, output = operands(spec)
    stack = "".join(c for c in weight if c in inputs and c in output)
    summed = "".join(c for c in weight if c in inputs and c not in output)
    rows = "".join(c for c in inputs if c not in stack + summed)
    flat_SRK = jnp.einsum(f"{inputs}->{stack}{rows}{summed}", x).reshape(
        *(x.shape[inputs.index(c)] for c in stack), -1, int(np.prod([x.shape[inputs.index(c)] for c in summed]))
    )
    real, there, masked = _real.get(), jnp.ones(flat_SRK.shape[-2], jnp.float32), False
    if real is not None and real.shape == x.shape[:2] and inputs[:2] == rows[:2]:
        there = jnp.broadcast_to(real.reshape(*real.shape, *(1,) * (len(rows) - 2)), [x.shape[inputs.index(c)] for c in rows]).reshape(-1)
        masked = True
    return watched(w, product(w.base, spec, x, precision), flat_SRK, there, masked, x)


@product.register
def _(w: Paired, spec, x, precision=None) -> Array:
    first, second = jnp.split(x, 2)
    return jnp.concatenate([product(w.first, spec, first, precision), product(w.second, spec, second, precision)])


@lookup.register
def _(w_VD: Observed, ids, dtype=None, axes=("vocab", "embed")) -> Array:
    rows, real = lookup(w_VD.base, ids, dtype, axes), _real.get()
    if w_VD.seen.often is None:
        return rows
    there = jnp.ones(ids.shape, jnp.float32) if real is None or real.shape != ids.shape else real
    nothing = jax.tree.map(jnp.zeros_like, w_VD.seen)
    return told(w_VD, rows, dataclasses.replace(nothing, often=nothing.often.at[ids].add(there, mode="clip")))


def watched(w: Observed, y: Array, x: Array, there: Array, masked: bool = True, given: Any = None) -> Array:
    """y, the product of rows x [.., R, K]; those count that `there` [.., R], float32, says, each as much as it says; `masked` where padding does not. Where
    `there` has a stack in front and x has none, every matrix is given all rows. `given` is what x was made of."""
    if (counted := _counted.get()) is not None:
        counted[w.key] = Use(x.shape[-2], masked, given)
        return y
    return _watch(y, jax.lax.stop_gradient(x), there, w.seen)


@jax.custom_vjp
def _watch(y, x, there, seen):
    return y


def _statistics(saved, g):
    x, there, seen = saved
    x_SRK, before_SRK = x.astype(jnp.float32) * there[..., None], None
    if seen.cross is not None:
        halves = lambda rows, axis: jnp.split(rows, 2, axis)
        (before_SRK, x_SRK), there = halves(x_SRK, -2), halves(there, -1)[1]
    found = Seen(
        jnp.broadcast_to(there.sum(-1), seen.count.shape),
        None if seen.hessian is None else jnp.einsum("...rk,...rj->...kj", x_SRK, x_SRK),
        None if seen.size is None else jnp.abs(x_SRK).sum(-2),
        None if seen.peak is None else jnp.abs(x_SRK).max(-2),
        None if seen.often is None else jnp.zeros_like(seen.often),
        None if seen.cross is None else jnp.einsum("...rk,...rj->...kj", x_SRK, before_SRK),
    )
    return g, jnp.zeros_like(x), jnp.zeros_like(saved[1]), found


_watch.defvjp(lambda y, x, there, seen: (y, (x, there, seen)), _statistics)


def told(w: Observed, y: Array, found: Seen) -> Array:
    """y, beside which `found` was seen."""
    return _tell(y, jax.lax.stop_gradient(found), w.seen)


@jax.custom_vjp
def _tell(y, found, seen):
    return y


_tell.defvjp(lambda y, found, seen: (y, found), lambda found, g: (g, jax.tree.map(jnp.zeros_like, found), found))
