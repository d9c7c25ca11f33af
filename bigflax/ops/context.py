"""Attention whose sequence lies over several devices: context parallelism, by gathering keys and values.

Queries stay where they are; each device collects the keys and values of the whole sequence (segments and positions too) and attends to them
from where its own queries stand. On the way back each gathers them again, so that no device keeps them, and their gradients are scattered.

Under a causal mask the devices of the first pieces would have little to do. So each of n devices cuts its piece in two and they exchange
queries, 2n halves in all: device i computes halves i and 2n-1-i, which together see 2n+1 halves of keys whatever i is, and sends what came out
back. It is done here and nowhere else: no token, label or position of the batch is moved.

    pairs (half of queries, half of keys) that a device multiplies      all keys 4n      causal where they lie, the last one 4n-1      balanced 2n+1

In XLA's own products a device goes through its 2n+1 pairs (half of queries, half of keys) in one scan with an online softmax (Milakov &
Gimelshein 2018, arXiv 1805.02867), and its backward pass through the same pairs with the log-sums that were kept (Dao et al. 2022, 2205.14135):
nothing of size [T, T] exists. On a TPU it is one splash kernel whose grid knows where each row stands.

Sources: Liu et al. 2023 (ring attention, 2310.01889); Brandon et al. 2023 (striped attention, 2311.09431); Llama 3 (2407.21783, section 3.3.2).

Left out on purpose: the ring, which sends the same bytes in n-1 messages; and with a bias, positions that are data or no causal mask, the
exchange: there [B, N, T/n, S] exists on the XLA path, and is computed again on the way back. Nor does that path leave out what a window blanks.

Shapes: B batch, T query time, S key time, N heads, K kv heads, H head width, C half of a device's T.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bigflax.ops.masks import NEVER, SAVED, Mask, near
from bigflax.ops.xla_attention import grouped, xla
from bigflax.sharding import axes_of, current_layout

Axes = tuple[str, ...]


class Place(NamedTuple):
    """How queries, keys and values lie: the mesh axes that carry each dimension, () for none."""

    mesh: Mesh | None = None
    batch: Axes = ()
    seq: Axes = ()
    keys: Axes = ()
    heads: Axes = ()

    def parts(self, axes: Axes) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes) if self.mesh is not None else 1

    def ids(self, x: jax.Array | None, time: Axes) -> P | None:
        """How segments or positions lie, [1 or B, T]."""
        return None if x is None else P(self.batch if x.shape[0] > 1 else None, time)

    def bias(self, x: jax.Array | None) -> P | None:
        """How a bias lies, whose dimensions of size 1 stand for all."""
        if x is None:
            return None
        axes = (self.batch, self.heads, self.seq, ())[4 - x.ndim :]
        return P(*(None if size == 1 else a for a, size in zip(axes, x.shape, strict=True)))


def place(q: jax.Array, k: jax.Array) -> Place:
    """Where the layout being traced on puts them."""
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return Place()
    axes = functools.partial(axes_of, mesh=layout.mesh, table=layout.table)
    batch = axes("batch", q.shape[0])
    seq = axes("seq", q.shape[1], used=batch)
    keys = axes("seq", k.shape[1], used=batch) if seq else ()
    return Place(layout.mesh, batch, seq, keys, axes("heads", q.shape[2], used=(*batch, *seq)))


def spread(q, k, v, mask: Mask, scale: float, softcap: float | None, bias: jax.Array | None, at: Place) -> jax.Array:
    """Attention over a sequence that lies over `at.seq`, in XLA's products."""
    rule, T = Mask(mask.causal, mask.window), q.shape[1]
    if balances(mask, T, k.shape[1], at) and bias is None and T % (2 * at.parts(at.seq)) == 0:
        pairs = Pairs(at, rule, scale, softcap)
        return below(lambda q, k, v, arrays, _: _by_pairs(pairs, q, k, v, *arrays[1:3]), q, k, v, mask, bias, at)
    local = recomputed(functools.partial(_by_rows, at, rule, scale, softcap))
    return checkpoint_name(below(local, q, k, v, mask, bias, at), SAVED)


def balances(mask: Mask, T: int, S: int, at: Place) -> bool:
    """Whether the devices would have unequal work where the queries lie."""
    return mask.causal and T == S and mask.rising and at.parts(at.seq) > 1


def order(T: int, n: int) -> tuple[int, ...]:
    """Where the two halves that each device computes begin, device by device."""
    return tuple(half * T // (2 * n) for i in range(n) for half in (i, 2 * n - 1 - i))


def below(
    local: Callable[..., jax.Array], q, k, v, mask: Mask, bias: jax.Array | None, at: Place, extra: Any = None, where: Any = None
) -> Any:
    """`local(q, k, v, (bias, *arrays of the mask), extra)` on each device's part of them; `extra` lies as `where` says."""
    k, v = (_shared(x, at.parts(at.heads)) for x in (k, v))
    arrays = (bias, *mask[2:])
    if at.mesh is None:
        return local(q, k, v, arrays, extra)
    rows, columns = P(at.batch, at.seq, at.heads), P(at.batch, at.keys, at.heads)
    ids = [at.ids(x, axes) for x, axes in zip(mask[2:], (at.seq, at.keys) * 2, strict=True)]
    specs = (rows, columns, columns, (at.bias(bias), *ids), where)
    # Unchecked: neither a Pallas kernel nor a stage's copy of it, below vmap, says over which axes its outputs vary.
    return jax.shard_map(local, mesh=at.mesh, in_specs=specs, out_specs=rows, check_vma=False)(q, k, v, arrays, extra)


def recomputed(local: Callable[..., jax.Array], *saved: str) -> Callable[..., jax.Array]:
    """`local`, what it gathered gathered again on the way back; what bears a name of `saved` is kept.

    Without barriers against common subexpressions: in a layer that is itself recomputed, XLA finds the two gathers to be one.
    """
    return jax.checkpoint(local, policy=jax.checkpoint_policies.save_only_these_names(*saved), prevent_cse=False)


def _shared(x_BSKH: jax.Array, parts: int) -> jax.Array:
    """Each kv head as often as makes them divide over `parts` devices, where those of a group's queries find theirs."""
    return jnp.repeat(x_BSKH, parts // math.gcd(x_BSKH.shape[2], parts), axis=2)


def gather(x: jax.Array | None, axes: Axes) -> Any:
    """All of the second dimension."""
    return x if x is None or not axes else jax.lax.all_gather(x, axes, axis=1, tiled=True)


def placed(at: Place, mask: Mask, q: jax.Array, S: int) -> Mask:
    """The mask of this device's rows, standing where they stand, over all keys."""
    if mask.rising and at.seq:
        start = jax.lax.axis_index(at.seq) * q.shape[1]
        mask = mask._replace(q_positions=(start + jnp.arange(q.shape[1]))[None], kv_positions=jnp.arange(S)[None])
    return mask


def _by_rows(at: Place, rule: Mask, scale: float, softcap: float | None, q, k, v, arrays, _) -> jax.Array:
    """This device's queries, where they stand, with all keys."""
    bias, *ids = arrays
    mask = Mask(rule.causal, rule.window, ids[0], gather(ids[1], at.keys), ids[2], gather(ids[3], at.keys))
    k, v = gather(k, at.keys), gather(v, at.keys)
    return xla(q, k, v, placed(at, mask, q, k.shape[1]), scale, softcap, bias)


# -- the balanced order ----------------------------------------------------------------------------------------------------


def _routes(n: int) -> list[list[tuple[int, int]]]:
    """Where the first, and the second, half of each device's piece goes: half h to device h, or 2n-1-h behind the middle. Two permutations."""
    return [[(i, min(2 * i + half, 2 * n - 1 - 2 * i - half)) for i in range(n)] for half in (0, 1)]


def _even(at: Place) -> jax.Array:
    return jax.lax.axis_index(at.seq) % 2 == 0  # such a device gets its lower half as somebody's first


def exchange(x_BT: jax.Array, at: Place) -> jax.Array:
    """[2, B, C, ...]: of device i the halves i and 2n-1-i, for the two halves [B, 2C, ...] that are its own."""
    pieces = zip(jnp.split(x_BT, 2, axis=1), _routes(at.parts(at.seq)), strict=True)
    a, b = (jax.lax.ppermute(piece, at.seq, route) for piece, route in pieces)
    return jnp.stack([jnp.where(_even(at), a, b), jnp.where(_even(at), b, a)])


def give_back(x_2BC: jax.Array, at: Place) -> jax.Array:
    """The inverse of `exchange`."""
    low, high = x_2BC
    pieces = zip((jnp.where(_even(at), low, high), jnp.where(_even(at), high, low)), _routes(at.parts(at.seq)), strict=True)
    return jnp.concatenate([jax.lax.ppermute(piece, at.seq, [(b, a) for a, b in route]) for piece, route in pieces], axis=1)


class Pairs(NamedTuple):
    """What is known of the 2n+1 pairs (half of queries, half of keys) before any array is."""

    at: Place
    rule: Mask
    scale: float
    softcap: float | None

    @property
    def steps(self) -> jax.Array:
        return jnp.arange(2 * self.at.parts(self.at.seq) + 1)

    def pair(self, step, q_2BNCH, q_ids_2BC, k_BKSH, v_BKSH, kv_ids_BS):
        """(whether the upper half's, where its keys begin, q, k, v, who sees whom [Z, C, C]) of one step."""
        i, n, C = jax.lax.axis_index(self.at.seq), self.at.parts(self.at.seq), q_2BNCH.shape[3]
        upper = (step > i).astype(jnp.int32)
        start = (step - upper * (i + 1)) * C
        rows = jnp.where(upper, 2 * n - 1 - i, i) * C + jnp.arange(C)
        seen = functools.reduce(jnp.logical_and, near(self.rule, rows[:, None], (start + jnp.arange(C))[None]))[None]
        keys = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, C, axis)
        if q_ids_2BC is not None:
            seen &= q_ids_2BC[upper][:, :, None] == keys(kv_ids_BS, 1)[:, None]
        return upper, start, q_2BNCH[upper], keys(k_BKSH, 2), keys(v_BKSH, 2), seen

    def logits(self, q_BNCH, k_BKCH, seen) -> jax.Array:
        logits = grouped("bkth,bksh->bkts", q_BNCH, k_BKCH) * self.scale
        logits = logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)
        return jnp.where(seen[:, None], logits, NEVER)

    def zeros(self, *shape: int) -> jax.Array:
        return jax.lax.pcast(jnp.zeros(shape, jnp.float32), (*self.at.batch, *self.at.seq, *self.at.heads), to="varying")

    def collect(self, q, k, v, q_ids, kv_ids):
        """Halves of queries [2, B, N, C, H], their segments, all keys and values [B, K, S, H], their segments."""
        k, v, kv_ids = (gather(x, self.at.keys) for x in (k, v, kv_ids))
        q_ids = None if q_ids is None else exchange(q_ids, self.at)
        return exchange(q, self.at).swapaxes(2, 3), q_ids, k.swapaxes(1, 2), v.swapaxes(1, 2), kv_ids


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_pairs(pairs: Pairs, q, k, v, q_ids, kv_ids) -> jax.Array:
    return _forward(pairs, q, k, v, q_ids, kv_ids)[0]


def _forward(pairs: Pairs, q, k, v, q_ids, kv_ids):
    everything = pairs.collect(q, k, v, q_ids, kv_ids)
    shape = everything[0].shape

    def one(carry, step):
        upper, _, q_BNCH, k_BKCH, v_BKCH, seen = pairs.pair(step, *everything)
        out, most, total = (x[upper] for x in carry)
        logits = pairs.logits(q_BNCH, k_BKCH, seen)
        top = jnp.maximum(most, logits.max(-1))
        weights, fade = jnp.where(seen[:, None], jnp.exp(logits - top[..., None]), 0), jnp.exp(most - top)
        out = out * fade[..., None] + grouped("bkts,bksh->bkth", weights.astype(v.dtype), v_BKCH)
        new = (out, top, total * fade + weights.sum(-1))
        return tuple(old.at[upper].set(x) for old, x in zip(carry, new, strict=True)), None

    start = (pairs.zeros(*shape), pairs.zeros(*shape[:-1]) + NEVER, pairs.zeros(*shape[:-1]))
    (out, most, total), _ = jax.lax.scan(one, start, pairs.steps)
    total = jnp.where(total > 0, total, 1)  # a row without a key: its sum is 0
    out, logsum = (checkpoint_name(x, SAVED) for x in ((out / total[..., None]).astype(q.dtype), most + jnp.log(total)))
    return give_back(out.swapaxes(2, 3), pairs.at), (q, k, v, q_ids, kv_ids, out, logsum)


def _backward(pairs: Pairs, saved, dout):
    q, k, v, q_ids, kv_ids, out, logsum = saved
    everything = pairs.collect(q, k, v, q_ids, kv_ids)
    dout = exchange(dout, pairs.at).swapaxes(2, 3).astype(jnp.float32)
    dsum = -jnp.sum(dout * out, -1)  # with the log-sums held, the gradient of weights v less its mean

    def one(sums, step):
        upper, start, q_BNCH, k_BKCH, v_BKCH, seen = pairs.pair(step, *everything)

        def weigh(q_BNCH, k_BKCH, v_BKCH):
            weights = jnp.where(seen[:, None], jnp.exp(pairs.logits(q_BNCH, k_BKCH, seen) - logsum[upper][..., None]), 0)
            return grouped("bkts,bksh->bkth", weights.astype(v.dtype), v_BKCH), weights.sum(-1)

        dq, dk, dv = jax.vjp(weigh, q_BNCH, k_BKCH, v_BKCH)[1]((dout[upper], dsum[upper]))
        put = lambda sum, d: jax.lax.dynamic_update_slice_in_dim(
            sum, jax.lax.dynamic_slice_in_dim(sum, start, d.shape[2], 2) + d, start, axis=2
        )
        return (sums[0].at[upper].add(dq), put(sums[1], dk), put(sums[2], dv)), None

    shapes = (everything[0].shape, everything[2].shape, everything[3].shape)
    (dq, dk, dv), _ = jax.lax.scan(one, tuple(pairs.zeros(*shape) for shape in shapes), pairs.steps)
    scatter = lambda d, x: jax.lax.psum_scatter(d.swapaxes(1, 2).astype(x.dtype), pairs.at.keys, scatter_dimension=1, tiled=True)
    return give_back(dq.swapaxes(2, 3).astype(q.dtype), pairs.at), scatter(dk, k), scatter(dv, v), None, None


_by_pairs.defvjp(_forward, _backward)
