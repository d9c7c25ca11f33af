"""Scaled dot-product attention, grouped-query included: one definition, and the fast paths that are held to it.

    out[b, t, n] = sum_s softmax_s(softcap(scale * q[b, t, n] . k[b, s, n']) + bias[b, n, t, s]) v[b, s, n'],    n' = n // (N / K)

over the keys s that row t may see. One rule says which:

    (not causal or kv_position <= q_position) and (window is None or |q_position - kv_position| < window) and q_segment == kv_segment

So packing is two arrays of segment ids, an `attention_mask` is kv_segments=attention_mask with q_segments=1, a cache is kv_positions.
A row that may see no key gives zeros, in value and in gradient.

The "xla" path leaves out what the causal mask and the window blank wholesale: it cuts the queries into four or more static blocks and
multiplies each only by the keys it can reach. Forward and backward at B 2, T 256, N 12, H 64, float32, CPU time over two cores:
46 ms, against 70 ms for the plain einsum, 68 ms with transposes to BNTH alone, and 83 ms for `jax.nn.dot_product_attention`.

Sources: Vaswani et al. 2017 (arXiv 1706.03762); Ainslie et al. 2023 (grouped queries, 2305.13245); Gemma 2 (softcap, 2408.00118).

Left out on purpose: dropout on the weights (recent models have none), returning the weights (`explain` does, from the reference),
and for now TPU splash attention: on TPU the XLA path runs, which keeps [B, N, T, S] for the backward pass unless rematerialized.

Shapes: B batch, T query time, S key time, N heads, K kv heads, G = N / K query heads a kv head, H head width, Z 1 or B.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bigflax.sharding import platform

IMPLEMENTATIONS = ("reference", "xla", "cudnn")
BLOCKS = 4  # at T 256, 8 blocks are slower again: the products become too small to fill two cores
ROWS = (64, 512)  # the fewest and the most queries a block
NEVER = float(jnp.finfo(jnp.float32).min)  # not -inf: a row of -inf alone would be NaN in the backward pass


class Mask(NamedTuple):
    """Who may see whom; None is no restriction, and positions None are 0, 1, 2 ..."""

    causal: bool
    window: int | None
    q_segments: jax.Array | None
    kv_segments: jax.Array | None
    q_positions: jax.Array | None
    kv_positions: jax.Array | None

    @property
    def plain(self) -> bool:
        """Whether the mask is known without looking at any array."""
        return self.q_segments is None and self.q_positions is None and self.kv_positions is None


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Returns BTNH in q's dtype; the softmax is float32 whatever the inputs are.

    Segments and positions are [B, T] and [B, S], or [T] and [S] where all rows share them. Leave positions out where they rise with the
    index, as in packed documents: only then can blocks be skipped. `scale` is 1 / sqrt(H) unless given. `bias`
    broadcasts to [B, N, T, S], is added after the softcap, and has a gradient. `implementation` is "reference" (everything in float32,
    the definition), "xla", "cudnn" (NVIDIA GPUs; float16 or bfloat16 with causal and window only: any other request takes "xla", for
    cuDNN would need a dense mask), or None, which takes the fastest that the backend has.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, window, q_segments, kv_segments)
    mask = Mask(causal, window, *map(_rows, (q_segments, kv_segments, q_positions, kv_positions)))
    scale = 1 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale
    name = _choose(implementation)
    if name == "cudnn" and _cudnn_can(q_BTNH, k_BSKH, v_BSKH, mask, softcap, bias):
        return _cudnn(q_BTNH, k_BSKH, v_BSKH, mask, scale)
    function = _reference if name == "reference" else _xla
    return function(q_BTNH, k_BSKH, v_BSKH, mask, scale, softcap, bias)


def _choose(implementation: str | None) -> str:
    """The implementation that runs. Raises ValueError for an unknown one, and for cuDNN away from a GPU."""
    backend = platform()
    if implementation is None:
        return "cudnn" if backend == "gpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention has no implementation {implementation!r}; take one of {', '.join(IMPLEMENTATIONS)}, or None")
    if implementation == "cudnn" and backend != "gpu":
        raise ValueError(f"implementation='cudnn' needs an NVIDIA GPU and JAX runs on {backend!r} here; take 'xla', or None to choose")
    return implementation


def _check(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, q_segments, kv_segments) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"attention takes q [B,T,N,H], k [B,S,K,H] and v [B,S,K,H], not {q.shape}, {k.shape} and {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide over {k.shape[2]} kv heads; make the first a multiple of the second")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("give q_segments and kv_segments together; for an attention_mask, ones as q_segments and the mask as kv_segments")
    if window is not None and window < 1:
        raise ValueError(f"window {window} lets no key through; it counts a query's own position, so give 1 or more, or None")


def _rows(ids: jax.Array | None) -> jax.Array | None:
    """[T] as [1, T]."""
    return None if ids is None else jnp.atleast_2d(jnp.asarray(ids))


def _allowed(mask: Mask, T: int, S: int, rows: slice = slice(None), keys: slice = slice(None)) -> jax.Array | None:
    """[Z, T', S'] bool for these rows and keys, or None where every key is allowed."""
    terms = []
    if mask.causal or mask.window is not None:
        q = (jnp.arange(T)[None] if mask.q_positions is None else mask.q_positions)[:, rows, None]
        kv = (jnp.arange(S)[None] if mask.kv_positions is None else mask.kv_positions)[:, None, keys]
        terms += [kv <= q] if mask.causal else []
        terms += [abs(q - kv) < mask.window] if mask.window is not None else []
    if mask.q_segments is not None and mask.kv_segments is not None:
        terms += [mask.q_segments[:, rows, None] == mask.kv_segments[:, None, keys]]
    return functools.reduce(jnp.logical_and, terms) if terms else None


def _reference(q, k, v, mask: Mask, scale: float, softcap: float | None, bias: jax.Array | None) -> jax.Array:
    """The definition, all of it in float32: what the tests hold the others to."""
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k32, v32 = jnp.repeat(k32, groups, 2), jnp.repeat(v32, groups, 2)
    logits_BNTS = jnp.einsum("btnh,bsnh->bnts", q32, k32, precision="highest") * scale
    if softcap is not None:
        logits_BNTS = softcap * jnp.tanh(logits_BNTS / softcap)
    if bias is not None:
        logits_BNTS += bias
    allowed = _allowed(mask, q.shape[1], k.shape[1])
    seen = jnp.ones((), bool) if allowed is None else allowed[:, None]
    weights_BNTS = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits_BNTS, NEVER), axis=-1), 0)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v32, precision="highest").astype(q.dtype)


def _xla(q, k, v, mask: Mask, scale: float, softcap: float | None, bias: jax.Array | None) -> jax.Array:
    """The same by blocks of queries, each with the keys that it can reach.

    Four dimensions throughout: with the G heads of a group on an axis of their own, the same products are a quarter slower on the CPU.
    """
    T, S = q.shape[1], k.shape[1]
    if q.dtype == jnp.float32:  # T*H products instead of T*S; a narrower q would be rounded twice
        q, scale = q * scale, 1.0
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    if bias is not None:
        bias = jnp.broadcast_to(bias, jnp.broadcast_shapes(bias.shape, (1, 1, T, S)))
    outs = []
    for rows, keys in _blocks(mask, T, S):
        logits_BNTS = _grouped("bkth,bksh->bkts", q_BNTH[:, :, rows], k_BKSH[:, :, keys]) * scale
        allowed = _allowed(mask, T, S, rows, keys)
        weights_BNTS = _softmax(logits_BNTS, softcap, None if bias is None else bias[..., rows, keys], allowed)
        out_BNTH = _grouped("bkts,bksh->bkth", weights_BNTS.astype(v.dtype), v_BKSH[:, :, keys])
        if allowed is not None and (not mask.plain or T > S):  # only then can a row be blank
            out_BNTH = jnp.where(allowed.any(-1)[:, None, :, None], out_BNTH, 0)
        outs.append(out_BNTH.astype(q.dtype))
    out_BNTH = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2)
    return out_BNTH.transpose(0, 2, 1, 3)


def _grouped(spec: str, x_BNTX: jax.Array, y_BKSX: jax.Array) -> jax.Array:
    """The product of [B, N, T, ...] and [B, K, S, ...] in float32: the G heads of a group lie below each other as rows of one matrix."""
    B, N, T, X = x_BNTX.shape
    out = jnp.einsum(spec, x_BNTX.reshape(B, y_BKSX.shape[1], -1, X), y_BKSX, preferred_element_type=jnp.float32)
    return out.reshape(B, N, T, -1)


def _softmax(logits: jax.Array, softcap: float | None, bias: jax.Array | None, allowed: jax.Array | None) -> jax.Array:
    """Weights over keys; a row that may see none is uniform here and blanked after the second product, which is smaller."""
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits += bias
    return jax.nn.softmax(logits if allowed is None else jnp.where(allowed[:, None], logits, NEVER), axis=-1)


def _blocks(mask: Mask, T: int, S: int) -> list[tuple[slice, slice]]:
    """(rows, keys) that cover the queries; one block where positions are data or nothing would be saved."""
    reach = mask.q_positions is None and mask.kv_positions is None and (mask.causal or mask.window is not None)
    if not reach:
        return [(slice(0, T), slice(0, S))]
    size, blocks = min(max(-(-T // BLOCKS), ROWS[0]), ROWS[1]), []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = 0 if mask.window is None else max(0, start - mask.window + 1)
        last = min(S, stop if mask.causal else stop + (mask.window or 0) - 1)
        first = min(first, last - 1)  # rows beyond every key keep one key, which the mask then blanks
        blocks.append((slice(start, stop), slice(first, last)))
    return blocks


def _cudnn_can(q, k, v, mask: Mask, softcap: float | None, bias: jax.Array | None) -> bool:
    half = q.dtype in (jnp.float16, jnp.bfloat16) and q.dtype == k.dtype == v.dtype
    heads = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and v.shape[-1] == q.shape[-1]
    return (
        half
        and heads
        and mask.plain
        and softcap is None
        and bias is None
        and (mask.causal or mask.window is None)
        and q.shape[1] == k.shape[1]
    )


def _cudnn(q, k, v, mask: Mask, scale: float) -> jax.Array:
    left = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=mask.causal, local_window_size=left, implementation="cudnn")
