"""Gemma 2: local and global layers in turn, norms on both sides, soft-capped logits. Gemma team 2024 (arXiv 2408.00118).

Arguments are the fields of the Hugging Face config (`model_type` "gemma2"), with its defaults.
"""

import re
from typing import Any

from bigflax.models.families import llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Mlp, Norm, Transformer, alternating, attention_kinds
from bigflax.nn import Rope, normal

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "2b": dict(),
    "9b": dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8),
    "27b": dict(hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32, num_key_value_heads=16,
        head_dim=128, query_pre_attn_scalar=144),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 256000,
    hidden_size: int = 2304,
    intermediate_size: int = 9216,
    num_hidden_layers: int = 26,
    num_attention_heads: int = 8,
    num_key_value_heads: int = 4,
    head_dim: int = 256,
    hidden_activation: str = "gelu_pytorch_tanh",
    max_position_embeddings: int = 8192,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = True,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    attention_bias: bool = False,
    query_pre_attn_scalar: float = 256,
    sliding_window: int = 4096,
    layer_types: Any = None,
    final_logit_softcapping: float | None = 30.0,
    attn_logit_softcapping: float | None = 50.0,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("rms", rms_norm_eps, around_one=True)
    mlp = lambda: Mlp(intermediate_size, hidden_activation, gated=True, init=init, out_init=init)

    def block(kind: str) -> Block:
        local = kind == "sliding_attention"
        rope = Rope(rope_theta, scaling=rope_scaling)
        attention = Attention(
            num_attention_heads, head_dim, num_key_value_heads, rope=rope, bias=attention_bias, window=sliding_window if local else None,
            softcap=attn_logit_softcapping, scale=query_pre_attn_scalar**-0.5, init=init, out_init=init,
        )  # fmt: skip
        return Block(attention, mlp(), norm(), order="sandwich")

    kinds = attention_kinds(layer_types, num_hidden_layers, lambda i: "sliding_attention" if (i + 1) % 2 else "full_attention")
    groups = alternating(kinds, block)
    return Transformer(
        embed=Embed(vocab_size, hidden_size, scale=hidden_size**0.5, dtype=dtype, init=init), groups=groups, norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init,
            softcap=final_logit_softcapping), remat=remat, unroll=unroll,
    )  # fmt: skip


_NORMS = {"post_attention_layernorm": "pre_feedforward_layernorm"}  # Llama's norm before the mlp -> Gemma's
NAMES = {
    **{re.sub("|".join(_NORMS), lambda m: _NORMS[m.group()], name): line for name, line in llama.NAMES.items()},
    "layers.{l}.post_attention_layernorm.weight": ("blocks/norm1_out/scale", "D"),
    "layers.{l}.post_feedforward_layernorm.weight": ("blocks/norm2_out/scale", "D"),
}
HEADS = llama.heads("Gemma2")
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
IGNORED = ("attention_dropout", "cache_implementation", "hidden_act")  # transformers computes hidden_activation here
FIXED = {"use_bidirectional_attention": False}
