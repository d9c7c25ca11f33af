"""Attention of a layer: queries, keys and values of states, positions in them or beside them, and the cache that decoding writes.

A cache holds keys and values in the dtype that it began with, "int8" among them: codes with one float32 scale for each token and head, 1 + 4 / H bytes
a number. Attention reads them as floats again, which XLA fuses into its products. Left out on purpose: keys with a scale for each channel (KIVI: Liu et
al. 2024, arXiv 2402.02750), which want to be rounded many tokens at a time.

Legend: B batch, T time, S key time, D width, N heads, K kv heads, H head width.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bigflax import ops
from bigflax.nn.fence import NORMAL, Initializer, dropout, pick, weight, zeros
from bigflax.nn.layers import Norm
from bigflax.sharding import constrain
from bigflax.weights import dense, is_typed, quantize


def head_width(features: int, heads: int) -> int:
    """The width of a head where `heads` share `features` evenly. Raises ValueError where they cannot."""
    if features % heads:
        near = max(heads, features - features % heads)
        raise ValueError(f"a width of {features} does not divide over {heads} heads; nearest is {near}")
    return features // heads


class Rope(nn.Module):
    """Rotary positions: no weights, only how to turn q and k at given positions."""

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Any = None

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        inv_freq, factor = ops.rope_frequencies(
            x_BTNH.shape[-1], theta=self.theta, fraction=self.fraction, scaling=self.scaling, length=jnp.max(positions_BT) + 1
        )
        return ops.rope(x_BTNH, positions_BT, inv_freq, factor=factor)


class RelativeBias(nn.Module):
    """What is added to the logits for the distance between query and key, a number a head and bucket (T5; Raffel et al. 2020, 1910.10683).

    Half of the buckets are distances 0, 1, 2 ...; the others grow by equal factors up to `farthest`, beyond which all are one. With `both_ways`
    the first half of them all is for keys at or before the query and the second for those behind it; else those behind count as distance 0.
    """

    heads: int
    buckets: int = 32
    farthest: int = 128
    both_ways: bool = True
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, queries: int, keys: int, start: jax.Array | int = 0) -> jax.Array:
        """[1, N, T, S] for queries at `start`, `start` + 1 ... and keys at 0, 1 ..."""
        w_PN = weight(self, "w", (self.buckets, self.heads), "_ heads", self.init)
        distance_TS = jnp.arange(keys)[None, :] - (start + jnp.arange(queries))[:, None]
        row_TS = jnp.asarray(self._rows())[jnp.clip(distance_TS, -self.farthest, self.farthest) + self.farthest]
        return constrain(w_PN[row_TS].transpose(2, 0, 1)[None], None, "heads", "seq", None)

    def _rows(self) -> np.ndarray:
        """The bucket of each distance key - query from -farthest to farthest. On the host: a compiled logarithm may fall short of a whole number."""
        signed = np.arange(-self.farthest, self.farthest + 1)
        buckets = self.buckets // 2 if self.both_ways else self.buckets
        exact, far = buckets // 2, np.abs(signed) if self.both_ways else np.maximum(-signed, 0)
        steps = np.log(np.maximum(far, exact).astype(np.float32) / exact) / np.float32(math.log(self.farthest / exact)) * (buckets - exact)
        near_or_far = np.where(far < exact, far, np.minimum(exact + steps.astype(int), buckets - 1))
        return near_or_far + (buckets * (signed > 0) if self.both_ways else 0)


class Attention(nn.Module):
    """Multi-head or grouped-query attention, with optional rotary positions, QK-norm, window and soft cap.

    `__call__(x, cache, positions=, q_segments=, kv_segments=, bias=, keep=)` returns y and what else there is to see. `bias` [1 or B, N, T, S] is added to
    the logits.

    `seen["cache"]` is the new one, or None where none was given. A cache is `{"k", "v": [B, S, K, H], "index": [], "segments": [B, S]}` for one layer:
    new keys and values are written at `index`, as they are `held`, and attention runs over all that is written.

    `keep` asks for more. "attentions": [B, N, T, S] float32, how much each query weighs each key (ops.attention_weights: computed beside y, which stays
    what it is). "qkv": `{"q": [B, T, N, H], "k", "v": [B, T, K, H]}` of these states alone, biased and normed but not rotated: a rotation turns pairs of
    numbers, which whoever compares parts of a head may tear apart.

    A `cross` attention looks at `memory` [B, S, D'], another sequence's states; its cache, `{"k", "v", "segments"}`, keeps what was made of
    the memory, and where `memory` is None serves instead of it. `kv_segments` are then those of the memory; without `q_segments` each
    query sees all of it that is 1.
    """

    heads: int
    head_dim: int
    kv_heads: int | None = None
    causal: bool = True
    cross: bool = False
    rope: Rope | None = None
    norm: Norm | None = None  # of q and k before the rotation: over the width of each head,
    norm_heads: bool = False  # or over all heads together
    bias: bool = False
    k_bias: bool | None = None
    out_bias: bool | None = None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    dropout: float = 0.0
    init: Initializer = NORMAL
    q_init: Initializer | None = None
    out_init: Initializer = NORMAL

    @nn.compact
    def __call__(
        self, x_BTD, cache=None, *, memory=None, positions=None, q_segments=None, kv_segments=None, bias=None, keep=()
    ) -> tuple[jax.Array, dict[str, Any]]:
        D, N, H, T, seen = x_BTD.shape[-1], self.heads, self.head_dim, x_BTD.shape[1], {}
        options: dict[str, Any] = dict(causal=self.causal, window=self.window, scale=self.scale, softcap=self.softcap, bias=bias)
        q_BTNH = self._normed("q_norm", self._project(x_BTD, "q", N, "heads", self.bias, self.q_init or self.init))
        if self.cross:
            k_BSKH, v_BSKH, kv_segments, cache = self._recall(memory, kv_segments, cache)
            if kv_segments is None or q_segments is None:  # all of the memory that is real may be seen
                q_segments = None if kv_segments is None else jnp.ones(x_BTD.shape[:2], jnp.int32)
        else:
            k_BSKH, v_BSKH = self._keys(x_BTD)
            if "qkv" in keep:
                seen["qkv"] = {"q": q_BTNH, "k": k_BSKH, "v": v_BSKH}
            if self.rope is not None:
                at = jnp.arange(T)[None] if positions is None else positions
                q_BTNH, k_BSKH = self.rope(q_BTNH, at), self.rope(k_BSKH, at)
            if cache is not None:
                cache = write_cache(cache, k_BSKH, v_BSKH, kv_segments)
                k_BSKH, v_BSKH, kv_segments = dense(cache["k"]), dense(cache["v"]), cache["segments"]
                # Order, not position, decides what is past: a prompt padded on the left starts at position 0 behind its padding.
                options |= {"q_positions": (cache["index"] - T + jnp.arange(T))[None], "kv_positions": jnp.arange(k_BSKH.shape[1])[None]}
        options |= {"q_segments": q_segments, "kv_segments": kv_segments}
        q_BTNH, k_BSKH, v_BSKH = constrain(q_BTNH, "batch", "seq", "heads", None), k_BSKH.astype(x_BTD.dtype), v_BSKH.astype(x_BTD.dtype)
        y_BTNH = ops.attention(q_BTNH, k_BSKH, v_BSKH, **options)
        if "attentions" in keep:
            seen["attentions"] = constrain(ops.attention_weights(q_BTNH, k_BSKH, **options), "batch", "heads", "seq", None)
        y_BTD = ops.einsum("btnh,nhd->btd", y_BTNH, weight(self, "out", (N, H, D), "heads head_dim -> embed", self.out_init))
        y_BTD = checkpoint_name(y_BTD, "product")
        if self.bias if self.out_bias is None else self.out_bias:
            y_BTD += weight(self, "out_bias", (D,), "norm", zeros).astype(y_BTD.dtype)
        return dropout(self, y_BTD, self.dropout), {"cache": cache, **seen}

    def _keys(self, x_BSD):
        """Keys, normed where asked for but not yet rotated, and values: both [B, S, K, H]."""
        K = self.kv_heads or self.heads
        k_BSKH = self._project(x_BSD, "k", K, "kv_heads", self.bias if self.k_bias is None else self.k_bias, self.init)
        return self._normed("k_norm", k_BSKH), self._project(x_BSD, "v", K, "kv_heads", self.bias, self.init)

    def _recall(self, memory, segments, cache):
        """Keys, values and segments of the memory, or of the cache that was made of it, and the cache."""
        if memory is None:
            if cache is None:
                raise ValueError("a decoder that looks at an encoder's states was given none: pass the encoder's inputs too")
            return dense(cache["k"]), dense(cache["v"]), cache["segments"], cache
        k_BSKH, v_BSKH = self._keys(memory)
        if cache is not None:
            segments = jnp.ones(memory.shape[:2], jnp.int32) if segments is None else segments
            cache = {"k": like(cache["k"], k_BSKH), "v": like(cache["v"], v_BSKH), "segments": segments}
        return k_BSKH, v_BSKH, segments, cache

    def _normed(self, name, x_BTNH):
        if self.norm is None:
            return x_BTNH
        norm = self.norm.clone(parent=self, name=name)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape) if self.norm_heads else norm(x_BTNH)

    def _project(self, x_BTD, name, heads, axis, bias, init):
        w = weight(self, name, (x_BTD.shape[-1], heads, self.head_dim), f"embed -> {axis} head_dim", init)
        y_BTNH = checkpoint_name(ops.einsum("btd,dnh->btnh", x_BTD, w), "product")
        if not bias:
            return y_BTNH
        return y_BTNH + weight(self, f"{name}_bias", (heads, self.head_dim), f"{axis} head_dim", zeros).astype(y_BTNH.dtype)


# dtype of a cache -> what it holds of keys or values [..., H]
CACHES: dict[str, Callable[[jax.Array], Any]] = {
    "float32": lambda x: x.astype(jnp.float32),
    "bfloat16": lambda x: x.astype(jnp.bfloat16),
    "float16": lambda x: x.astype(jnp.float16),
    "int8": lambda x: quantize(x.astype(jnp.float32), "int8", axes=f"{' '.join('_' * (x.ndim - 1))} <- head_dim"),
}


def held(x: jax.Array, dtype: str) -> Any:
    """Keys or values [..., H] as a cache of a dtype of CACHES holds them: an array, or of "int8" a Quantized q with abs(x - dense(q)) <= q.scale / 2,
    where q.scale is [..., 1]. Raises ValueError for another dtype."""
    return pick(CACHES, dtype, "cache dtype")(x)


def like(old: Any, x: jax.Array) -> Any:
    """x as `old`, a cache's keys or values, holds them."""
    return held(x, "int8" if is_typed(old) else str(old.dtype))


def empty(shape: tuple[int, ...], dtype: str) -> Any:
    """Room for keys or values of this shape, [..., H]: zeros."""
    return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(lambda: held(jnp.zeros(shape), dtype)))


def write_cache(cache: dict[str, Any], k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None) -> dict[str, Any]:
    """The cache with T more keys and values at `index`. Segment 0 marks what is not to be attended to: padding, and what is not written yet."""
    at = cache["index"]
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=1)
    keep = lambda old, new: jax.tree.map(put, old, like(old, new))
    segments = jnp.ones(k_BTKH.shape[:2], jnp.int32) if segments_BT is None else segments_BT
    return {
        "k": keep(cache["k"], k_BTKH),
        "v": keep(cache["v"], v_BTKH),
        "segments": put(cache["segments"], segments),
        "index": at + k_BTKH.shape[1],
    }
