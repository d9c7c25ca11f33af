"""Attention as one TPU kernel: JAX's Pallas "splash" attention, which holds a block of logits at a time and never [T, S].

The kernel is told the scale in q, which is rounded once more where the scale is no power of two and q is bfloat16. Blocks that causal and
window blank wholesale are left out of its grid; segment ids blank single logits within a block. Heads of one group share their keys as they
lie, and any head width goes. On other machines Pallas interprets it, which is how tests hold it to the reference.

A row that may see no key comes out of the kernel as a mean over what lies in its blocks, so such rows are found and blanked. Rows of padding,
segment 0 on both sides, see each other.

On a mesh it runs below `shard_map`, each device for its rows and heads; where a sequence lies over several, as context.py says: a kernel is told
where each of its rows stands, in the balanced order too.

Sources: Dao et al. 2022 (FlashAttention, arXiv 2205.14135); `jax.experimental.pallas.ops.tpu.splash_attention`.

Left out on purpose: bias, and positions that are data: neither fits the kernel's grid, so both take the XLA path.

Shapes: B batch, T query time, S key time, N heads, K kv heads, H head width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as rules
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigflax.ops import context
from bigflax.ops.masks import SAVED, Mask, near, sees
from bigflax.sharding import platform

LANES = 128  # lengths are multiples of it
BLOCKS = (512, 1024)  # the most queries, and keys, at once: with more, two blocks of logits in float32 crowd the kernel's memory


def can(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, bias: jax.Array | None, pieces: int = 1) -> bool:
    """Whether the kernel computes this request, with the queries cut in `pieces` along T."""
    same = q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float32)
    lengths = q.shape[1] % (LANES * pieces) == 0 == k.shape[1] % LANES
    blank = (mask.causal or mask.window is not None) and q.shape[1] > k.shape[1]  # rows behind every key
    return same and lengths and mask.rising and not blank and bias is None


@dataclasses.dataclass(frozen=True)
class Rule(rules.Mask):
    """Causal and window as the kernel takes them: a function of two positions, and the position of each row."""

    lengths: tuple[int, int]
    causal: bool
    window: int | None
    order: tuple[int, ...]  # where runs of equally many rows begin

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lengths

    @property
    def q_sequence(self) -> np.ndarray:
        size = self.lengths[0] // len(self.order)
        return np.concatenate([np.arange(start, start + size, dtype=np.int32) for start in self.order])

    def __getitem__(self, at: Any) -> np.ndarray:
        return self.mask_function(self.q_sequence[at[0]][:, None], np.arange(self.lengths[1])[at[1]][None])

    @property
    def mask_function(self) -> "Near":
        return Near(self.causal, self.window)


@dataclasses.dataclass(frozen=True)
class Near:
    """Equal where what it computes is equal: the kernel is compiled anew for each function that differs."""

    causal: bool
    window: int | None

    def __call__(self, q: Any, kv: Any) -> Any:
        return functools.reduce(lambda a, b: a & b, near(Mask(self.causal, self.window), q, kv))


@functools.lru_cache(64)
def kernel(
    T: int, S: int, heads: int, causal: bool, window: int | None, softcap: float | None, interpret: bool, shards: int = 1,
    order: tuple[int, ...] = (0,),
) -> kernels.SplashAttentionKernel:  # fmt: skip
    """The kernel for `heads` heads, a tree of small arrays that say which blocks to visit; cut in `shards` along T by `parts(kernel, ...)`."""
    full = not causal and window is None
    mask = rules.FullMask((T, S)) if full else Rule((T, S), causal, window, order)
    q, kv = _block(T // max(shards, len(order)), BLOCKS[0]), _block(S, BLOCKS[1])
    sizes = kernels.BlockSizes(q, kv, min(kv, BLOCKS[0]) if kv % BLOCKS[0] == 0 else kv, q, kv, _block(kv, BLOCKS[0]), q, kv)
    with jax.core.eval_context():  # ensure_compile_time_eval does not reach through a scan of Flax
        made = kernels.make_splash_mha(
            rules.MultiHeadMask([mask] * heads), block_sizes=sizes, attn_logits_soft_cap=softcap, interpret=interpret, head_shards=1,
            q_seq_shards=1 if full else shards, residual_checkpoint_name=SAVED,
        )  # fmt: skip
        return jax.tree.map(np.asarray, made)  # no device's: the program may be for another


def _block(length: int, most: int) -> int:
    """The largest multiple of LANES up to `most` that divides `length`."""
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)


def splash(q, k, v, mask: Mask, scale: float, softcap: float | None, at: context.Place) -> jax.Array:
    """Attention by the kernel, on each device for its rows and heads."""
    (_, T, N, _), S, n = q.shape, k.shape[1], at.parts(at.seq)
    rule = Mask(mask.causal, mask.window)
    # A window lets all devices work alike where they are.
    own = context.balances(mask, T, S, at) and mask.window is None and T // n % (2 * LANES) == 0
    shards = 1 if rule == Mask() else n  # without a mask the kernel is one device's
    rows = T // n * shards
    run = kernel(rows, S, N // at.parts(at.heads), *rule[:2], softcap, platform() != "tpu", shards, context.order(T, n) if own else (0,))
    where = None
    if at.mesh is not None:
        cut = run.manual_sharding_spec(NamedSharding(at.mesh, P(None, at.seq)))
        where = cut if shards > 1 else jax.tree.map(lambda _: P(), run)
    local = functools.partial(_local, at, rule, scale, own)
    return context.below(context.recomputed(local, SAVED) if n > 1 else local, q, k, v, mask, None, at, run, where)


def _local(at: context.Place, rule: Mask, scale: float, own: bool, q, k, v, arrays, run) -> jax.Array:
    """`own`: the kernel was made for rows in the balanced order."""
    q_ids, kv_ids, S = arrays[1], context.gather(arrays[2], at.keys), k.shape[1] * at.parts(at.keys)
    seen = sees(context.placed(at, Mask(*rule[:2], q_ids, kv_ids), q, S), q.shape[1], S, arrays[2])
    swap = (lambda x: None if x is None else jnp.concatenate(context.exchange(x, at), axis=1)) if own else lambda x: x
    out = _call(run, swap(q), context.gather(k, at.keys), context.gather(v, at.keys), swap(q_ids), kv_ids, scale)
    out = context.give_back(jnp.stack(jnp.split(out, 2, axis=1)), at) if own else out
    return out if seen is None else jnp.where(seen[:, :, None, None], out, 0)


def _call(run, q, k, v, q_ids: jax.Array | None, kv_ids: jax.Array | None, scale: float) -> jax.Array:
    """What the kernel makes of arrays as ours lie; a row without a key is not blanked."""
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    B, _, T, _ = q_BNTH.shape
    ids = None
    if q_ids is not None and kv_ids is not None:
        ids = kernels.SegmentIds(jnp.broadcast_to(q_ids, (B, T)), jnp.broadcast_to(kv_ids, (B, k.shape[1])))
    return jax.vmap(lambda q, k, v, ids: run(q, k, v, segment_ids=ids))(q_BNTH, k_BKSH, v_BKSH, ids).transpose(0, 2, 1, 3)
