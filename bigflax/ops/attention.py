"""Scaled dot-product attention, grouped-query included: one definition, and the fast paths that are held to it.

    out[b, t, n] = sum_s softmax_s(softcap(scale * q[b, t, n] . k[b, s, n']) + bias[b, n, t, s]) v[b, s, n'],    n' = n // (N / K)

over the keys s that row t may see. One rule says which:

    (not causal or kv_position <= q_position) and (window is None or |q_position - kv_position| < window) and q_segment == kv_segment

So packing is two arrays of segment ids, an `attention_mask` is kv_segments=attention_mask with q_segments=1, a cache is kv_positions.
A row that may see no key gives zeros, in value and in gradient.

    reference   here: all of it in float32, whatever the mesh        splash   one kernel on a TPU (splash.py)
    xla         products in blocks (xla_attention.py)                cudnn    one call on an NVIDIA GPU, here

Where the layout lays a sequence over several devices, context.py has them share the work, in xla's products or by splash.

Sources: Vaswani et al. 2017 (arXiv 1706.03762); Ainslie et al. 2023 (grouped queries, 2305.13245); Gemma 2 (softcap, 2408.00118).

`attention_weights` gives the softmax itself, by the reference: no fast path ever holds it.

Left out on purpose: dropout on the weights (recent models have none), and cuDNN where a sequence lies over several devices.

Shapes: B batch, T query time, S key time, N heads, K kv heads, G = N / K query heads a kv head, H head width, Z 1 or B.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bigflax.ops import context
from bigflax.ops.masks import NEVER, SAVED, Mask, allowed
from bigflax.ops.xla_attention import xla
from bigflax.sharding import platform

IMPLEMENTATIONS = ("reference", "xla", "splash", "cudnn")


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
    the definition), "xla", "splash" (TPUs, and interpreted on a CPU; lengths in 128s, no bias, no positions), "cudnn" (NVIDIA GPUs; float16 or
    bfloat16 with causal and window only, for cuDNN would need a dense mask), or None, which takes the fastest that the layout's devices have.
    A request that the one named cannot take goes to "xla".
    """
    _check(q_BTNH, k_BSKH, v_BSKH, window, q_segments, kv_segments)
    mask = Mask(causal, window, *map(_rows, (q_segments, kv_segments, q_positions, kv_positions)))
    scale = 1 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale
    name = _choose(implementation)
    if name == "reference":
        return _reference(q_BTNH, k_BSKH, v_BSKH, mask, scale, softcap, bias)
    at = context.place(q_BTNH, k_BSKH)
    if name == "splash":
        from bigflax.ops import splash  # Pallas takes half a second to import

        if splash.can(q_BTNH, k_BSKH, v_BSKH, mask, bias, at.parts(at.seq)):
            return splash.splash(q_BTNH, k_BSKH, v_BSKH, mask, scale, softcap, at)
    if at.seq:
        return context.spread(q_BTNH, k_BSKH, v_BSKH, mask, scale, softcap, bias, at)
    if name == "cudnn" and _cudnn_can(q_BTNH, k_BSKH, v_BSKH, mask, softcap, bias):
        return checkpoint_name(_cudnn(q_BTNH, k_BSKH, v_BSKH, mask, scale), SAVED)
    return checkpoint_name(xla(q_BTNH, k_BSKH, v_BSKH, mask, scale, softcap, bias), SAVED)


def attention_weights(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
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
) -> jax.Array:
    """What `attention` with the same arguments weighs the values by: [B, N, T, S] float32, each row a distribution over the keys that it may see, or
    zeros where it may see none."""
    _check(q_BTNH, k_BSKH, k_BSKH, window, q_segments, kv_segments)
    mask = Mask(causal, window, *map(_rows, (q_segments, kv_segments, q_positions, kv_positions)))
    return _weights(q_BTNH, k_BSKH, mask, 1 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale, softcap, bias)


def _choose(implementation: str | None) -> str:
    """The implementation that runs. Raises ValueError for an unknown one, for cuDNN away from a GPU, and for splash on one."""
    backend = platform()
    if implementation is None:
        return {"gpu": "cudnn", "tpu": "splash"}.get(backend, "xla")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention has no implementation {implementation!r}; take one of {', '.join(IMPLEMENTATIONS)}, or None")
    if implementation == "cudnn" and backend != "gpu":
        raise ValueError(f"implementation='cudnn' needs an NVIDIA GPU and JAX runs on {backend!r} here; take 'xla', or None to choose")
    if implementation == "splash" and backend == "gpu":
        raise ValueError("implementation='splash' is a TPU's, which a CPU may interpret, and JAX runs on a GPU here; take None to choose")
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


def _reference(q, k, v, mask: Mask, scale: float, softcap: float | None, bias: jax.Array | None) -> jax.Array:
    """The definition, all of it in float32: what the tests hold the others to."""
    v32 = jnp.repeat(v.astype(jnp.float32), q.shape[2] // k.shape[2], 2)
    weights_BNTS = _weights(q, k, mask, scale, softcap, bias)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v32, precision="highest").astype(q.dtype)


def _weights(q, k, mask: Mask, scale: float, softcap: float | None, bias: jax.Array | None) -> jax.Array:
    q32, k32 = q.astype(jnp.float32), jnp.repeat(k.astype(jnp.float32), q.shape[2] // k.shape[2], 2)
    logits_BNTS = jnp.einsum("btnh,bsnh->bnts", q32, k32, precision="highest") * scale
    if softcap is not None:
        logits_BNTS = softcap * jnp.tanh(logits_BNTS / softcap)
    if bias is not None:
        logits_BNTS += bias
    near = allowed(mask, q.shape[1], k.shape[1])
    seen = jnp.ones((), bool) if near is None else near[:, None]
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits_BNTS, NEVER), axis=-1), 0)


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
