"""Qwen 1.5 and 2 with mixtures: many narrow experts, and one that every token passes through behind a gate. Qwen team 2024 (arXiv 2407.10671).

Arguments are the fields of the Hugging Face config (`model_type` "qwen2_moe"), with its defaults.
"""

from typing import Any

from bigflax.models.families import llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Mlp, Norm, Transformer, alternating, attention_kinds
from bigflax.nn import Moe, Rope, head_width, normal

SIZES = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=48, shared_expert_intermediate_size=96,
    ),
    "1.5-a2.7b": dict(max_position_embeddings=8192, rope_theta=1e6),
    "57b-a14b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, num_experts=64, num_experts_per_tok=8,
        moe_intermediate_size=2560, shared_expert_intermediate_size=20480, rope_theta=1e6),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 151936,
    hidden_size: int = 2048,
    num_hidden_layers: int = 24,
    num_attention_heads: int = 16,
    num_key_value_heads: int | None = 16,
    hidden_act: str = "silu",
    max_position_embeddings: int = 32768,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    qkv_bias: bool = True,
    use_sliding_window: bool = False,
    sliding_window: int | None = 4096,
    max_window_layers: int = 28,
    layer_types: Any = None,
    num_experts_per_tok: int = 4,
    num_experts: int = 60,
    moe_intermediate_size: int = 1408,
    shared_expert_intermediate_size: int = 5632,
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
    local = lambda i: "sliding_attention" if use_sliding_window and i < max_window_layers and i % 2 == 0 else "full_attention"

    def block(kind: str) -> Block:
        attention = Attention(
            num_attention_heads, head_width(hidden_size, num_attention_heads), num_key_value_heads, bias=qkv_bias, out_bias=False,
            rope=Rope(rope_theta, scaling=rope_scaling), window=sliding_window if kind == "sliding_attention" else None, init=init, out_init=init,
        )  # fmt: skip
        shared = Mlp(shared_expert_intermediate_size, hidden_act, gated=True, init=init, out_init=init)
        moe = Moe(
            num_experts,
            num_experts_per_tok,
            moe_intermediate_size,
            hidden_act,
            normalize=norm_topk_prob,
            shared=shared,
            implementation=dispatch,
            capacity_factor=capacity_factor,
            init=init,
            out_init=init,
        )
        return Block(attention, moe, norm())

    groups = alternating(attention_kinds(layer_types, num_hidden_layers, local), block)
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=groups, norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


_SHAPES = {"gate": "F D -> D F", "up": "F D -> D F", "down": "D F -> F D"}
NAMES = {
    **{name: line for name, line in llama.NAMES.items() if ".mlp." not in name},  # a layer here has experts alone
    "layers.{l}.mlp.gate.weight": ("blocks/mlp/router/w", "E D -> D E"),
    **{f"layers.{{l}}.mlp.experts.{{e}}.{x}_proj.weight": (f"blocks/mlp/{x}", pattern) for x, pattern in _SHAPES.items()},
    **{f"layers.{{l}}.mlp.shared_expert.{x}_proj.weight": (f"blocks/mlp/shared/{x}", pattern) for x, pattern in _SHAPES.items()},
    "layers.{l}.mlp.shared_expert_gate.weight": ("blocks/mlp/shared_gate/w", "E D -> D E"),
}
HEADS = llama.heads("Qwen2Moe")
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
RENAMED = {"num_local_experts": "num_experts"}
IGNORED = ("attention_dropout", "output_router_logits", "intermediate_size")  # the last is that of layers without experts
FIXED = {"decoder_sparse_step": 1, "mlp_only_layers": []}
