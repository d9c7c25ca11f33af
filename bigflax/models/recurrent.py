"""Recurrent layers, LSTM and GRU, as blocks of a Transformer: an embedding, layers one after the other, a head.

    LSTM   i, f, g, o = W x + b + U h + b'      c = sigmoid(f) c + sigmoid(i) tanh(g)      h = sigmoid(o) tanh(c)
    GRU    r, z = sigmoid(W x + b + U h + b')   n = tanh(W x + b + r (U h + b'))           h = (1 - z) n + z h

The gates are those of torch.nn.LSTM and GRU, both biases included, so that their weights can be read. Hochreiter & Schmidhuber 1997 (Neural
Computation 9); Cho et al. 2014 (arXiv 1406.1078). Products with all inputs are one; time is scanned.

Padding changes no state of what is real, on whichever side it is, and its own outputs are zero, as those of PyTorch's packed sequences;
documents packed into a row (`segment_ids`) each begin from zero. Left out on purpose: initial states as inputs, projections, peepholes, and
generation from a cache of states. Legend: B batch, T time, D width in, F width of the state, G gates.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigflax import ops
from bigflax.nn import Initializer, dropout, weight
from bigflax.sharding import constrain


def _lstm(x_BGF, u_BGF, state):
    i, f, g, o = jnp.moveaxis(x_BGF + u_BGF, 1, 0)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(x_BGF, u_BGF, state):
    r, z = jnp.moveaxis(jax.nn.sigmoid(x_BGF[:, :2] + u_BGF[:, :2]), 1, 0)
    n = jnp.tanh(x_BGF[:, 2] + r * u_BGF[:, 2])
    return ((1 - z) * n + z * state[0],)


CELLS = {"lstm": (4, 2, _lstm), "gru": (3, 1, _gru)}  # gates, parts of the state, of which the first goes out, and the step


class Direction(nn.Module):
    """One layer in one direction over [B, T, D]: the states [B, T, F], zero where `segments_BT` is 0."""

    cell: str
    features: int
    init: Initializer
    backwards: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        (B, _, D), F = x_BTD.shape, self.features
        G, parts, step = CELLS[self.cell]
        x_BTGF = ops.einsum("btd,dgf->btgf", x_BTD, weight(self, "w", (D, G, F), "embed -> _ mlp", self.init))
        x_BTGF += weight(self, "w_bias", (G, F), "_ mlp", self.init).astype(x_BTD.dtype)
        u_FGH = weight(self, "u", (F, G, F), "_ -> _ mlp", self.init)
        u_bias_GF = weight(self, "u_bias", (G, F), "_ mlp", self.init).astype(x_BTD.dtype)

        def turn(carry, now):
            state, last_B = carry
            x_BGF, segment_B = now
            real_B1, goes_on_B1 = (segment_B > 0)[:, None], (segment_B == last_B)[:, None]
            before = tuple(jnp.where(goes_on_B1, part, 0) for part in state)
            new = step(x_BGF, ops.einsum("bf,fgh->bgh", before[0], u_FGH) + u_bias_GF, before)
            state = tuple(jnp.where(real_B1, n, old) for n, old in zip(new, state, strict=True))
            return (state, jnp.where(segment_B > 0, segment_B, last_B)), jnp.where(real_B1, new[0], 0)

        start = tuple(jnp.zeros((B, F), x_BTD.dtype) for _ in range(parts)), jnp.zeros((B,), segments_BT.dtype)
        over = (jnp.swapaxes(x_BTGF, 0, 1), segments_BT.T)
        return jnp.swapaxes(jax.lax.scan(turn, start, over, reverse=self.backwards)[1], 0, 1)


class Recurrent(nn.Module):
    """A layer in one direction, or in both, whose states are joined: [B, T, F or 2 F]; `dropout` is that of its input.

    A block of a Transformer, with its signature; it has no use for positions.
    """

    cell: str
    features: int
    init: Initializer
    both: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BTD, cache=None, *, keep=(), kv_segments=None, **_):
        if cache is not None:
            raise ValueError("recurrent layers keep no cache: compute the whole sequence at each token")
        segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32) if kv_segments is None else kv_segments
        x_BTD = dropout(self, x_BTD, self.dropout)
        run = lambda name, backwards: Direction(self.cell, self.features, self.init, backwards, name=name)(x_BTD, segments_BT)
        y_BTD = jnp.concatenate([run("forward", False), run("backward", True)], -1) if self.both else run("forward", False)
        y_BTD = constrain(y_BTD, "batch", "seq", None)
        seen: dict[str, Any] = {"cache": None, "hidden": y_BTD if "hidden" in keep else None}
        return y_BTD, seen
