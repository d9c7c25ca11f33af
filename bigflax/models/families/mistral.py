"""Mistral: Llama with a sliding window. Jiang et al. 2023 (arXiv 2310.06825).

Arguments are the fields of the Hugging Face config (`model_type` "mistral"), with its defaults.
"""

from typing import Any

from bigflax.models.families import llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import Rope, head_width, normal

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    "7b-v0.1": dict(rms_norm_eps=1e-5, max_position_embeddings=32768),
    "7b-v0.3": dict(vocab_size=32768, rms_norm_eps=1e-5, max_position_embeddings=32768, rope_theta=1000000.0, sliding_window=None),
}


def build(
    *,
    vocab_size: int = 32000,
    hidden_size: int = 4096,
    intermediate_size: int = 14336,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = 8,
    head_dim: int | None = None,
    hidden_act: str = "silu",
    max_position_embeddings: int = 131072,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    sliding_window: int | None = 4096,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("rms", rms_norm_eps)
    attention = Attention(
        num_attention_heads, head_dim or head_width(hidden_size, num_attention_heads), num_key_value_heads,
        rope=Rope(rope_theta, scaling=rope_scaling), window=sliding_window, init=init, out_init=init,
    )  # fmt: skip
    block = Block(attention, Mlp(intermediate_size, hidden_act, gated=True, init=init, out_init=init), norm())
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=(Group((block,), num_hidden_layers),), norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


NAMES = llama.NAMES
HEADS = llama.heads("Mistral")
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
IGNORED = ("attention_dropout",)
FIXED: dict = {}
