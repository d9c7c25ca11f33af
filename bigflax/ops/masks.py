"""Who may see whom: the one rule that every implementation of attention follows (attention.py states it).

Shapes: T query time, S key time, Z 1 or B.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

SAVED = "attention"  # the checkpoint name of attention's output and log-sums: a policy that saves it has no attention computed twice
NEVER = float(jnp.finfo(jnp.float32).min)  # not -inf: a row of -inf alone would be NaN in the backward pass


class Mask(NamedTuple):
    """None is no restriction, and positions None are 0, 1, 2 ...; arrays are [Z, T] for queries and [Z, S] for keys."""

    causal: bool = False
    window: int | None = None
    q_segments: jax.Array | None = None
    kv_segments: jax.Array | None = None
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None

    @property
    def rising(self) -> bool:
        """Whether positions are those of the index, so that causal and window are known without looking at any array."""
        return self.q_positions is None and self.kv_positions is None

    @property
    def plain(self) -> bool:
        """Whether all of it is known without looking at any array."""
        return self.rising and self.q_segments is None


def near(mask: Mask, q: jax.Array, kv: jax.Array) -> list[jax.Array]:
    """What causal and window say of positions that broadcast against each other, NumPy's or JAX's: terms to be joined by `and`."""
    terms = [kv <= q] if mask.causal else []
    return terms + ([abs(q - kv) < mask.window] if mask.window is not None else [])


def allowed(mask: Mask, T: int, S: int, rows: slice = slice(None), keys: slice = slice(None)) -> jax.Array | None:
    """[Z, T', S'] bool for these rows and keys, or None where every key is allowed."""
    terms = []
    if mask.causal or mask.window is not None:
        q = (jnp.arange(T)[None] if mask.q_positions is None else mask.q_positions)[:, rows, None]
        kv = (jnp.arange(S)[None] if mask.kv_positions is None else mask.kv_positions)[:, None, keys]
        terms = near(mask, q, kv)
    if mask.q_segments is not None and mask.kv_segments is not None:
        terms += [mask.q_segments[:, rows, None] == mask.kv_segments[:, None, keys]]
    return functools.reduce(jnp.logical_and, terms) if terms else None


def sees(mask: Mask, T: int, S: int, own: jax.Array | None) -> jax.Array | None:
    """[Z, T] bool, whether a row may see any key, or None where every row may; `own` are the keys' segments where the rows themselves stand.

    For masks whose causal and window let each row see itself. Nothing of size [T, S] is held, nor looked at where all segments are their own.
    """
    if mask.q_segments is None:
        return None

    def search() -> jax.Array:
        seen = allowed(mask, T, S)
        assert seen is not None
        return seen.any(-1)

    if own is None or own.shape[1] != T:
        return search()
    found = jax.eval_shape(search)
    return jax.lax.cond(jnp.all(mask.q_segments == own), lambda: jnp.ones(found.shape, bool), search)
