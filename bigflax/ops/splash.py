"""Attention as one TPU kernel: JAX's Pallas "splash" attention, which holds a block of logits at a time and never [T, S].

The kernel is told the scale in q, which is rounded once more where the scale is no power of two and q is bfloat16. Blocks that causal and
window blank wholesale are left out of its grid; segment ids blank single logits within a block. Heads of one group share their keys as they
lie, and any head width goes. On other machines Pallas interprets it, which is how tests hold it to the reference.

A row that may see no key comes out of the kernel as a mean over what lies in its blocks; context.py, through which the kernel is called on any
layout, finds such rows (masks.sees) and blanks them. Rows of padding, segment 0 on both sides, see each other.

Sources: Dao et al. 2022 (FlashAttention, arXiv 2205.14135); `jax.experimental.pallas.ops.tpu.splash_attention`.

Left out on purpose: bias, and positions that are data: neither fits the kernel's grid, so both take the XLA path.

Shapes: B batch, T query time, S key time, N heads, K kv heads, H head width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as rules

from bigflax.ops.masks import Mask, near

LANES = 128  # lengths are multiples of it
BLOCKS = (512, 1024)  # the most queries, and keys, at once: with more, two blocks of logits in float32 crowd the kernel's memory
SAVED = "attention"  # the checkpoint name of the kernel's output and log-sums: a policy that saves it runs the kernel forward once


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
    order: tuple[int, ...]  # each run of equally many rows begins at this position

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


def splash(run: kernels.SplashAttentionKernel, q, k, v, q_ids: jax.Array | None, kv_ids: jax.Array | None, scale: float) -> jax.Array:
    """Attention over the rows of one device, by a kernel made for their lengths; a row without a key is not blanked."""
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    B, _, T, _ = q_BNTH.shape
    ids = None
    if q_ids is not None and kv_ids is not None:
        ids = kernels.SegmentIds(jnp.broadcast_to(q_ids, (B, T)), jnp.broadcast_to(kv_ids, (B, k.shape[1])))
    return jax.vmap(lambda q, k, v, ids: run(q, k, v, segment_ids=ids))(q_BNTH, k_BKSH, v_BKSH, ids).transpose(0, 2, 1, 3)
