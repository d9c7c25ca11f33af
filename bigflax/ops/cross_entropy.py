"""Cross-entropy of a vocabulary head, without holding the logits.

    l = softcap(x w^T + bias),   lse = log sum_v exp l_v,   loss = lse - l[label] + z_loss * lse^2

The logits of one batch, [B, T, V] in float32, are the largest array of a language model's step. Here tokens pass in chunks; the backward
pass keeps lse only, computes each chunk's logits again, and forms

    dl_v = g (p_v (1 + 2 z_loss lse) - [v = label]) softcap'(l),   dx = dl w,   dw += dl^T x,   dbias += sum dl

at the price of one more product in four. A chunk is cut along T, so that each keeps all rows of a sharded batch; its size counts the
tokens of one device, so that a larger mesh does not make its products smaller. The label's logit is picked by `where(iota == label)`, not
by a gather, which a sharded vocabulary would have to collect.

On the CPU one piece and plain autodiff are fastest while the logits are small. 512 tokens, D 768, V 50257, float32, forward and backward,
against optax over `x @ w.T`: one piece 0.98 of the time and 103 MB of temporaries (optax 206), chunks of 128 tokens 1.4 of it and 209 MB,
most of that dw in float32.

Sources: Wijmans et al. 2024 (Cut Cross-Entropy, arXiv 2411.09009); PaLM, 2204.02311 (z-loss).

Left out on purpose: chunks of the vocabulary (642 MB against 520 MB at V 131k on v5e), and gradients taken in the forward sweep (2,048 MB).

Shapes: B batch, T time, C time of a chunk, D width, V vocabulary.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bigflax.ops.matmul import einsum
from bigflax.sharding import axes_of, constrain, current_layout, platform
from bigflax.weights import is_typed, shape

IGNORE = -100
NAIVE_LOGITS = 2**28  # one GiB of float32 logits: up to here a CPU takes them in one piece
CHUNK_LOGITS = 2**28
CHUNK_TOKENS = (2048, 8192)


def linear_cross_entropy(
    x_BTD: jax.Array,
    w_VD: Any,
    labels_BT: jax.Array,
    *,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns (loss [B, T] float32, correct [B, T] bool: whether the label's logit is the first largest, as argmax has it).

    Label -100 gives loss 0, gradient 0 and correct False. Products run in x's dtype and accumulate in float32; everything else is float32.
    `w_VD` may be a typed weight: then its parts get the gradients. `chunk` is the number of tokens at once on each device; None chooses by backend
    and size, and as many as there are, or more, means one piece.
    """
    B, T, _ = x_BTD.shape
    V = shape(w_VD)[0]
    if labels_BT.shape != (B, T):
        raise ValueError(f"labels are {labels_BT.shape} for x {x_BTD.shape}; give one label a position, {(B, T)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk} tokens; give 1 or more, or None to choose")
    across, along, vocab = _spread(B, T, V)
    chunk = _choose_chunk(B * T // across // along, V // vocab) if chunk is None else chunk
    C, count = _cut(B, T, chunk * across * along)
    options = dict(softcap=softcap, z_loss=z_loss)
    if count == 1 and along > 1:  # nothing lies over B T where both lie over devices: as one matrix, x would be gathered
        return _direct(x_BTD, w_VD, bias, labels_BT, **options)
    if count == 1:  # as one matrix: with B and T apart, XLA on the CPU holds the logits twice more
        loss, correct = _direct(x_BTD.reshape(B * T, -1), w_VD, bias, labels_BT.reshape(B * T), **options)
        return loss.reshape(B, T), correct.reshape(B, T)
    x = constrain(_chunks(x_BTD, C, count, 0), None, "batch", "seq", None)
    labels = constrain(_chunks(labels_BT, C, count, IGNORE), None, "batch", "seq")
    if not is_typed(w_VD):
        both: Any = _recomputed(tuple(options.items()), x, w_VD, bias, labels)  # custom_vjp hides its type
        loss, correct = both
    else:
        body = jax.checkpoint(lambda x_BCD, labels_BC: _direct(x_BCD, w_VD, bias, labels_BC, **options))
        loss, correct = jax.lax.map(lambda pair: body(*pair), (x, labels))
    return _join(loss)[:, :T], _join(correct)[:, :T]


def _spread(B: int, T: int, V: int) -> tuple[int, int, int]:
    """Over how many devices the step being traced lays a batch's rows, their time, and the vocabulary."""
    layout = current_layout()
    if layout is None:
        return 1, 1, 1
    parts = lambda name, size: math.prod(layout[0].shape[a] for a in axes_of(name, size, layout.mesh, layout.table))
    return parts("batch", B), parts("seq", T), parts("vocab", V)


def _choose_chunk(tokens: int, V: int) -> int:
    if platform() == "cpu" and tokens * V <= NAIVE_LOGITS:
        return tokens
    return min(max(CHUNK_LOGITS // V, CHUNK_TOKENS[0]), CHUNK_TOKENS[1])


def _cut(B: int, T: int, chunk: int) -> tuple[int, int]:
    """(C, count): time steps a chunk, evenly, and chunks."""
    count = -(-T // max(1, min(T, chunk // B)))
    return -(-T // count), count


def _chunks(a_BT: jax.Array, C: int, count: int, fill: int) -> jax.Array:
    """[B, T, ...] padded by `fill` and cut to [count, B, C, ...]."""
    B, T = a_BT.shape[:2]
    padded = jnp.pad(a_BT, ((0, 0), (0, C * count - T), *((0, 0),) * (a_BT.ndim - 2)), constant_values=fill)
    return padded.reshape(B, count, C, *a_BT.shape[2:]).swapaxes(0, 1)


def _join(a_NBC: jax.Array) -> jax.Array:
    """[count, B, C, ...] as [B, count * C, ...]."""
    count, B, C = a_NBC.shape[:3]
    return a_NBC.swapaxes(0, 1).reshape(B, count * C, *a_NBC.shape[3:])


def _logits(x: jax.Array, w_VD: Any, bias: jax.Array | None, softcap: float | None) -> jax.Array:
    """[..., D] -> [..., V] float32."""
    if not is_typed(w_VD):
        logits = jnp.matmul(x, w_VD.astype(x.dtype).T, preferred_element_type=jnp.float32)
    else:
        logits = einsum("btd,vd->btv" if x.ndim == 3 else "td,vd->tv", x, w_VD).astype(jnp.float32)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _measure(logits: jax.Array, labels: jax.Array, z_loss: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, correct, lse), each of the labels' shape."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.where(ids == labels[..., None], logits, 0).sum(-1)
    valid = labels != IGNORE
    loss = lse - target + (z_loss * jnp.square(lse) if z_loss else 0)
    return jnp.where(valid, loss, 0), logits.argmax(-1) == labels, lse


def _direct(x, w_VD, bias, labels, *, softcap, z_loss) -> tuple[jax.Array, jax.Array]:
    """The definition, in one piece: what the tests hold the chunks to."""
    return _measure(_logits(x, w_VD, bias, softcap), labels, z_loss)[:2]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(options, x_NBCD, w_VD, bias, labels_NBC) -> tuple[jax.Array, jax.Array]:
    return _forward(options, x_NBCD, w_VD, bias, labels_NBC)[0]


def _forward(options, x_NBCD, w_VD, bias, labels_NBC):
    softcap, z_loss = dict(options).values()
    w = w_VD.astype(x_NBCD.dtype)
    one = lambda pair: _measure(_logits(pair[0], w, bias, softcap), pair[1], z_loss)
    loss, correct, lse = jax.lax.map(one, (x_NBCD, labels_NBC))
    return (loss, correct), (x_NBCD, w_VD, bias, labels_NBC, lse)


def _backward(options, saved, cotangents):
    softcap, z_loss = dict(options).values()
    x_NBCD, w_VD, bias, labels_NBC, lse_NBC = saved
    w = w_VD.astype(x_NBCD.dtype)

    def one(sums, chunk):
        x, labels, lse, g = chunk
        logits = _logits(x, w, bias, softcap)
        g = jnp.where(labels != IGNORE, g, 0)[..., None]
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == labels[..., None]
        dlogits = jnp.exp(logits - lse[..., None]) * (g * (1 + 2 * z_loss * lse[..., None])) - jnp.where(hit, g, 0)
        if softcap is not None:
            dlogits *= 1 - jnp.square(logits / softcap)
        narrow = dlogits.astype(x.dtype)
        dx = jnp.einsum("btv,vd->btd", narrow, w, preferred_element_type=jnp.float32).astype(x.dtype)
        dw = sums[0] + jnp.einsum("btv,btd->vd", narrow, x, preferred_element_type=jnp.float32)
        return (dw, None if bias is None else sums[1] + dlogits.sum((0, 1))), dx

    start = (jnp.zeros(w_VD.shape, jnp.float32), None if bias is None else jnp.zeros(bias.shape, jnp.float32))
    (dw, dbias), dx_NBCD = jax.lax.scan(one, start, (x_NBCD, labels_NBC, lse_NBC, cotangents[0]))
    return dx_NBCD, dw.astype(w_VD.dtype), None if bias is None or dbias is None else dbias.astype(bias.dtype), None


_recomputed.defvjp(_forward, _backward)
