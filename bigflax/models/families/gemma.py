"""Gemma 1: scaled embeddings, GeGLU, norms whose stored scale is added to one. Gemma team 2024 (arXiv 2403.08295).

Arguments are the fields of the Hugging Face config (`model_type` "gemma"), with its defaults.
"""

from typing import Any

from bigflax.models.families import llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import Rope, normal

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "2b": dict(hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1),
    "7b": dict(),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 256000,
    hidden_size: int = 3072,
    intermediate_size: int = 24576,
    num_hidden_layers: int = 28,
    num_attention_heads: int = 16,
    num_key_value_heads: int = 16,
    head_dim: int = 256,
    hidden_act: str = "gelu_pytorch_tanh",
    max_position_embeddings: int = 8192,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = True,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    attention_bias: bool = False,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("rms", rms_norm_eps, around_one=True)
    attention = Attention(
        num_attention_heads, head_dim, num_key_value_heads, rope=Rope(rope_theta, scaling=rope_scaling), bias=attention_bias, init=init, out_init=init,
    )  # fmt: skip
    block = Block(attention, Mlp(intermediate_size, hidden_act, gated=True, init=init, out_init=init), norm())
    return Transformer(
        embed=Embed(vocab_size, hidden_size, scale=hidden_size**0.5, dtype=dtype, init=init), groups=(Group((block,), num_hidden_layers),), norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


NAMES = llama.NAMES
HEADS = llama.heads("Gemma")
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
IGNORED = ("attention_dropout", "hidden_activation")  # transformers computes hidden_act and never reads the other
FIXED = {"use_bidirectional_attention": False}
