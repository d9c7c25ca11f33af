"""Cross-entropy of a vocabulary head, without holding the logits.

    l = softcap(x w^T + bias),   lse = log sum_v exp l_v,   loss = lse - l[label] + z_loss * lse^2

The logits of one batch, [B, T, V] in float32, are the largest array of a language model's step. Here the vocabulary passes in chunks of rows, the
sum of exponentials carried along; the backward pass keeps lse only, computes each chunk's logits again, and forms

    dl_v = g (p_v (1 + 2 z_loss lse) - [v = label]) softcap'(l),   dx += dl w,   dw = dl^T x,   dbias = sum dl

at the price of one more product in four. On a mesh that shards the table's width (FSDP) a chunk of it is gathered at a time, in the dtype of the
products, and the gradient of a chunk, which is whole when it leaves, is scattered at once: no device ever holds the table or its gradient, and each
travels once a pass. A chunk takes as many rows from every device that has a part of the vocabulary. The label's logit is picked by
`where(id == label)`, not by a gather, which a sharded vocabulary would have to collect.

8,192 tokens, V 131,072, D 4096 on one chip of a v5e, bfloat16 x over float32 w, temporaries as its compiler plans them: 129 MiB, of which dx in
float32 is 128, against 4,096 for optax over float32 logits and 6,144 over bfloat16 ones (tests/benchmarks/bench_head.py).

On the CPU one piece and plain autodiff are fastest while the logits are small. 512 tokens, D 768, V 50257, float32, forward and backward,
against optax over `x @ w.T`: one piece 0.98 of the time and 103 MB of temporaries (optax 206).

Sources: Wijmans et al. 2024 (Cut Cross-Entropy, arXiv 2411.09009); PaLM, 2204.02311 (z-loss); Milakov and Gimelshein 2018 (the running
sum of a softmax, 1805.02867).

Left out on purpose: chunks of tokens (each would add to a float32 gradient of the whole table, whole on every device, or scatter it anew), and
gradients taken in the forward sweep (2,048 MB, at V 131k on v5e).

Shapes: B batch, T time, D width, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigflax.ops.matmul import einsum
from bigflax.sharding import axes_of, constrain, current_layout, platform
from bigflax.weights import Perturbed, Prompted, is_typed, shape

IGNORE = -100
NAIVE_LOGITS = 2**28  # one GiB of float32 logits: up to here a CPU takes them in one piece
CHUNK_LOGITS = 2**24  # 64 MiB of them a device
CHUNK_ROWS = (1024, 16384)  # the fewest, whose product fills the chip, and the most, which are gathered at once
NEVER = float(jnp.finfo(jnp.float32).min)  # the logit of padding


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
    `w_VD` may be a typed weight: then its parts get the gradients. `chunk` is the number of the table's rows at once on each device; None chooses
    by backend and size, and as many as there are, or more, means one piece.
    """
    B, T, _ = x_BTD.shape
    V, w_VD = shape(w_VD)[0], _table(w_VD)
    if labels_BT.shape != (B, T):
        raise ValueError(f"labels are {labels_BT.shape} for x {x_BTD.shape}; give one label a position, {(B, T)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk} rows of the vocabulary; give 1 or more, or None to choose")
    rows, along, parts = _spread(B, T, V)
    cut = _cut(V, parts, _choose_chunk(B * T // rows // along, V // parts) if chunk is None else chunk)
    options = dict(softcap=softcap, z_loss=z_loss)
    if cut.count == 1 and along > 1:  # nothing lies over B T where both lie over devices: as one matrix, x would be gathered
        return _direct(x_BTD, w_VD, bias, labels_BT, **options)
    if cut.count == 1:  # as one matrix: with B and T apart, XLA on the CPU holds the logits twice more
        loss, correct = _direct(x_BTD.reshape(B * T, -1), w_VD, bias, labels_BT.reshape(B * T), **options)
        return loss.reshape(B, T), correct.reshape(B, T)
    x_BTD = constrain(x_BTD, "batch", "seq", None)
    if not is_typed(w_VD):
        both: Any = _recomputed((cut, softcap, z_loss), x_BTD, w_VD, bias, labels_BT)  # custom_vjp hides its type
        return both
    return _sweep((cut, softcap, z_loss), x_BTD, w_VD, bias, labels_BT)[:2]


class Cut(NamedTuple):
    """A vocabulary of `rows`, which lie in `parts` pieces on as many devices, of each of which a chunk takes `size`; `count` chunks are all."""

    rows: int
    parts: int
    size: int
    count: int

    def ids(self, i: jax.Array) -> jax.Array:
        """The ids of chunk i, and `rows` in the place of what is padding: [parts * size]."""
        here = i * self.size + jnp.arange(self.size)
        each = self.rows // self.parts
        return jnp.where(here < each, jnp.arange(self.parts)[:, None] * each + here, self.rows).reshape(-1)

    def split(self, a_V: jax.Array, *names: str | None) -> jax.Array:
        """[V, ...] as [count, parts, size, ...], each device's piece of it in each chunk."""
        a = a_V.reshape(self.parts, self.rows // self.parts, *a_V.shape[1:])
        a = jnp.pad(a, ((0, 0), (0, self.count * self.size - a.shape[1]), *((0, 0),) * (a.ndim - 2)))
        a = a.reshape(self.parts, self.count, self.size, *a.shape[2:]).swapaxes(0, 1)
        return constrain(a, None, "vocab", None, *names)

    def join(self, a: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        a = a.reshape(self.count, self.parts, self.size, *a.shape[2:]).swapaxes(0, 1)
        return a.reshape(self.parts, self.count * self.size, *a.shape[3:])[:, : self.rows // self.parts].reshape(self.rows, *a.shape[3:])


def _spread(B: int, T: int, V: int) -> tuple[int, int, int]:
    """Over how many devices the step being traced lays a batch's rows, their time, and the vocabulary."""
    layout = current_layout()
    if layout is None:
        return 1, 1, 1
    parts = lambda name, size: math.prod(layout[0].shape[a] for a in axes_of(name, size, layout.mesh, layout.table))
    return parts("batch", B), parts("seq", T), parts("vocab", V)


def _choose_chunk(tokens: int, rows: int) -> int:
    if platform() == "cpu" and tokens * rows <= NAIVE_LOGITS:
        return rows
    return min(max(CHUNK_LOGITS // tokens, CHUNK_ROWS[0]), CHUNK_ROWS[1])


def _cut(V: int, parts: int, chunk: int) -> Cut:
    """Even chunks of `chunk` rows at most a device: a few more of them where that saves the padding, which is a copy of the weight."""
    rows = V // parts
    count = -(-rows // chunk)
    count = next((n for n in range(count, 2 * count) if rows % n == 0), count)
    return Cut(V, parts, -(-rows // count), count)


def _table(w_VD: Any) -> Any:
    """Of a tied table what are outputs: prompts are none, and these are not perturbed."""
    while isinstance(w_VD, Prompted | Perturbed):
        w_VD = w_VD.base
    return w_VD


def vocab_logits(x: jax.Array, w_VD: Any, bias: jax.Array | None = None, softcap: float | None = None) -> jax.Array:
    """[T, D] or [B, T, D] -> [..., V] float32."""
    w_VD = _table(w_VD)
    if not is_typed(w_VD):
        logits = jnp.matmul(x, w_VD.astype(x.dtype).T, preferred_element_type=jnp.float32)
    else:
        logits = einsum("btd,vd->btv" if x.ndim == 3 else "td,vd->tv", x, w_VD).astype(jnp.float32)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _direct(x, w_VD, bias, labels, *, softcap, z_loss) -> tuple[jax.Array, jax.Array]:
    """The definition, in one piece: what the tests hold the chunks to."""
    logits = vocab_logits(x, w_VD, bias, softcap)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    target = jnp.where(ids == labels[..., None], logits, 0).sum(-1)
    return _loss(jax.nn.logsumexp(logits, axis=-1), target, labels, z_loss), logits.argmax(-1) == labels


def _loss(lse, target, labels, z_loss: float) -> jax.Array:
    return jnp.where(labels != IGNORE, lse - target + (z_loss * jnp.square(lse) if z_loss else 0), 0)


def _chunks(cut: Cut, w_VD: Any, bias: jax.Array | None) -> tuple[Any, Callable[..., Any]]:
    """(what the chunks have of the weight and the bias, a function from one chunk's parts to both, which adds what a typed weight's chunks share)."""
    leaves, tree = jax.tree.flatten((w_VD, bias))
    own = [leaf.shape[:1] == (cut.rows,) for leaf in leaves]
    names = lambda leaf: () if leaf.ndim == 1 else ("embed",) if not is_typed(w_VD) else (None,) * (leaf.ndim - 1)
    each = [cut.split(leaf, *names(leaf)) for leaf, mine in zip(leaves, own, strict=True) if mine]
    flat = lambda part: part.reshape(-1, *part.shape[2:])

    def whole(each):
        parts = iter(each)
        return jax.tree.unflatten(tree, [flat(next(parts)) if mine else leaf for leaf, mine in zip(leaves, own, strict=True)])

    return each, whole


def _sweep(options, x_BTD, w_VD, bias, labels_BT):
    """(loss, correct, lse): the sum of exponentials is carried along with the largest logit so far, and with that one's lowest id."""
    cut, softcap, z_loss = options
    each, whole = _chunks(cut, w_VD, bias)
    wide_BTD = x_BTD.astype(jnp.float32)  # autodiff sums the chunks' dx in the dtype of what they share

    @jax.checkpoint
    def one(seen, chunk):
        top, total, target, best = seen
        i, w_b = chunk
        w, b = whole(w_b)
        ids = cut.ids(i)
        logits = vocab_logits(wide_BTD.astype(x_BTD.dtype), _gathered(w, x_BTD.dtype, i), b, softcap)
        logits = constrain(jnp.where(ids < cut.rows, logits, NEVER), "batch", "seq", "vocab")
        highest = jax.lax.stop_gradient(logits.max(-1))
        first = jnp.where(logits == highest[..., None], ids, cut.rows).min(-1)
        best = jnp.where(highest > top, first, jnp.where(highest == top, jnp.minimum(best, first), best))
        new = jnp.maximum(top, highest)
        total = total * jnp.exp(top - new) + jnp.exp(logits - new[..., None]).sum(-1)
        target += jnp.where(ids == labels_BT[..., None], logits, 0).sum(-1)
        return (new, total, target, best), None

    zeros = jnp.zeros(labels_BT.shape, jnp.float32)
    start = (zeros + NEVER, zeros, zeros, jnp.full(labels_BT.shape, cut.rows))
    (top, total, target, best), _ = jax.lax.scan(one, start, (jnp.arange(cut.count), each))
    lse = top + jnp.log(total)
    return _loss(lse, target, labels_BT, z_loss), best == labels_BT, lse


def _gathered(w_VD: Any, dtype: Any, i: jax.Array) -> Any:
    """Chunk i of the table in the products' dtype, cast before it is gathered so that half the bytes travel, and whole in its width."""
    if is_typed(w_VD):
        return w_VD
    # Times one, in a way that XLA cannot see through: it would cast the whole table ahead of the loop, and hold that copy all along.
    return constrain((w_VD * (1 + 0.0 * i.astype(w_VD.dtype))).astype(dtype), "vocab", None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(options, x_BTD, w_VD, bias, labels_BT) -> tuple[jax.Array, jax.Array]:
    return _sweep(options, x_BTD, w_VD, bias, labels_BT)[:2]


def _forward(options, x_BTD, w_VD, bias, labels_BT):
    loss, correct, lse = _sweep(options, x_BTD, w_VD, bias, labels_BT)
    return (loss, correct), (x_BTD, w_VD, bias, labels_BT, lse)


def _backward(options, saved, cotangents):
    cut, softcap, z_loss = options
    x_BTD, w_VD, bias, labels_BT, lse_BT = saved
    each, whole = _chunks(cut, w_VD, bias)
    g_BT1 = jnp.where(labels_BT != IGNORE, cotangents[0], 0)[..., None]

    def one(dx_BTD, chunk):
        i, parts = chunk
        w, b = whole(parts)
        w, ids = _gathered(w, x_BTD.dtype, i), cut.ids(i)
        logits = vocab_logits(x_BTD, w, b, softcap)
        p = jnp.where(ids < cut.rows, jnp.exp(logits - lse_BT[..., None]), 0)
        dlogits = p * (g_BT1 * (1 + 2 * z_loss * lse_BT[..., None])) - jnp.where(ids == labels_BT[..., None], g_BT1, 0)
        if softcap is not None:
            dlogits *= 1 - jnp.square(logits / softcap)
        narrow = constrain(dlogits.astype(x_BTD.dtype), "batch", "seq", "vocab")
        dx_BTD += constrain(jnp.einsum("btv,vd->btd", narrow, w, preferred_element_type=jnp.float32), "batch", "seq", None)
        dw = constrain(jnp.einsum("btv,btd->vd", narrow, x_BTD, preferred_element_type=jnp.float32), "vocab", "embed")
        return dx_BTD, (dw.astype(w_VD.dtype), None if bias is None else dlogits.sum((0, 1)))

    start = jnp.zeros(x_BTD.shape, jnp.float32)
    dx_BTD, (dw, dbias) = jax.lax.scan(one, start, (jnp.arange(cut.count), each))
    return dx_BTD.astype(x_BTD.dtype), cut.join(dw), None if bias is None or dbias is None else cut.join(dbias).astype(bias.dtype), None


_recomputed.defvjp(_forward, _backward)
