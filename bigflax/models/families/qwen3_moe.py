"""Qwen 3 with mixtures: Qwen 3's attention, 8 of 128 narrow experts, none shared. Yang et al. 2025 (arXiv 2505.09388).

Arguments are the fields of the Hugging Face config (`model_type` "qwen3_moe"), with its defaults.
"""

from typing import Any

from bigflax.models.families import llama, qwen2_moe, qwen3
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Norm, Transformer
from bigflax.nn import Moe, Rope, head_width, normal

_PUBLISHED = dict(head_dim=128, norm_topk_prob=True, rope_theta=1e6, max_position_embeddings=40960)
SIZES = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=48,
    ),
    "30b-a3b": dict(**_PUBLISHED, num_hidden_layers=48),
    "235b-a22b": dict(**_PUBLISHED, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, moe_intermediate_size=1536),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 151936,
    hidden_size: int = 2048,
    num_hidden_layers: int = 24,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = 4,
    head_dim: int | None = None,
    hidden_act: str = "silu",
    max_position_embeddings: int = 32768,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    attention_bias: bool = False,
    use_sliding_window: bool = False,
    sliding_window: int | None = 4096,
    num_experts_per_tok: int = 8,
    num_experts: int = 128,
    moe_intermediate_size: int = 768,
    norm_topk_prob: bool = False,
    router_aux_loss_coef: float = 0.001,  # what tasks.token_loss weighs the load-balance loss by
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dispatch: str | None = None,  # how tokens reach their experts: ops/moe.py
    capacity_factor: float | None = None,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("rms", rms_norm_eps)
    attention = Attention(
        num_attention_heads, head_dim or head_width(hidden_size, num_attention_heads), num_key_value_heads, norm=norm(), bias=attention_bias,
        rope=Rope(rope_theta, scaling=rope_scaling), window=sliding_window if use_sliding_window else None, init=init, out_init=init,
    )  # fmt: skip
    moe = Moe(
        num_experts, num_experts_per_tok, moe_intermediate_size, hidden_act, normalize=norm_topk_prob, implementation=dispatch,
        capacity_factor=capacity_factor, init=init, out_init=init,
    )  # fmt: skip
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=(Group((Block(attention, moe, norm()),), num_hidden_layers),),
        norm=norm(), head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init),
        remat=remat, unroll=unroll,
    )  # fmt: skip


NAMES = {**qwen2_moe.NAMES, **{name: line for name, line in qwen3.NAMES.items() if "_norm." in name}}
HEADS = llama.heads("Qwen3Moe")
PREFIX, BUFFERS, RENAMED, IGNORED, FIXED = llama.PREFIX, llama.BUFFERS, qwen2_moe.RENAMED, qwen2_moe.IGNORED, qwen2_moe.FIXED
