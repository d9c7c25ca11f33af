"""Operations over arrays and typed weights; beside every fast path stands a plain reference, and a test holds the two together."""

from bigflax.ops import compressed, observed  # noqa: F401  (their products register themselves)
from bigflax.ops.attention import attention, attention_weights
from bigflax.ops.cross_entropy import linear_cross_entropy, vocab_logits
from bigflax.ops.matmul import casting, einsum, take
from bigflax.ops.mel import log_mel
from bigflax.ops.moe import dropped_share, load_balance, mixture, route, router_sums
from bigflax.ops.norms import layer_norm, rms_norm
from bigflax.ops.rope import rope, rope_frequencies

__all__ = [
    "attention", "attention_weights", "casting", "dropped_share", "einsum", "layer_norm", "linear_cross_entropy", "load_balance", "log_mel", "mixture",
    "rms_norm", "rope", "rope_frequencies", "route", "router_sums", "take", "vocab_logits",
]  # fmt: skip
