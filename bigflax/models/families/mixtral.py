"""Mixtral: Mistral whose every layer chooses two of eight mlps for a token. Jiang et al. 2024 (arXiv 2401.04088).

Arguments are the fields of the Hugging Face config (`model_type` "mixtral"), with its defaults.
"""

from typing import Any

from bigflax.models.families import llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Norm, Transformer
from bigflax.nn import Moe, Rope, head_width, normal

SIZES = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    ),
    "8x7b": dict(max_position_embeddings=32768),
    "8x22b": dict(hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48, max_position_embeddings=65536),
}  # fmt: skip


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
    rms_norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    rope_theta: float = 1000000.0,
    rope_scaling: Any = None,
    sliding_window: int | None = None,
    num_experts_per_tok: int = 2,
    num_local_experts: int = 8,
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
        num_attention_heads, head_dim or head_width(hidden_size, num_attention_heads), num_key_value_heads,
        rope=Rope(rope_theta, scaling=rope_scaling), window=sliding_window, init=init, out_init=init,
    )  # fmt: skip
    moe = Moe(
        num_local_experts, num_experts_per_tok, intermediate_size, hidden_act, implementation=dispatch, capacity_factor=capacity_factor,
        init=init, out_init=init,
    )  # fmt: skip
    block = Block(attention, moe, norm())
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=(Group((block,), num_hidden_layers),), norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


_EXPERT = {"w1": ("gate", "F D -> D F"), "w2": ("down", "D F -> F D"), "w3": ("up", "F D -> D F")}
NAMES = {
    **{name: line for name, line in llama.NAMES.items() if ".mlp." not in name},
    "layers.{l}.block_sparse_moe.gate.weight": ("blocks/mlp/router/w", "E D -> D E"),
    **{f"layers.{{l}}.block_sparse_moe.experts.{{e}}.{n}.weight": (f"blocks/mlp/{x}", pattern) for n, (x, pattern) in _EXPERT.items()},
}
HEADS = llama.heads("Mixtral")
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
IGNORED = ("attention_dropout", "output_router_logits")
FIXED = {"router_jitter_noise": 0.0}
