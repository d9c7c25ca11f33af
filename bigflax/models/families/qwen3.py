"""Qwen 3: grouped-query attention with a norm on queries and keys, no biases. Yang et al. 2025 (arXiv 2505.09388).

Arguments are the fields of the Hugging Face config (`model_type` "qwen3"), with its defaults.
"""

from typing import Any

from bigflax.models.families import llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Mlp, Norm, Transformer, alternating, attention_kinds
from bigflax.nn import Rope, normal

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        tie_word_embeddings=True, rope_theta=1e6),
    "1.7b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        tie_word_embeddings=True, rope_theta=1e6),
    "8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, rope_theta=1e6),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 151936,
    hidden_size: int = 4096,
    intermediate_size: int = 22016,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = 32,
    head_dim: int = 128,
    hidden_act: str = "silu",
    max_position_embeddings: int = 32768,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    attention_bias: bool = False,
    use_sliding_window: bool = False,
    sliding_window: int | None = None,
    max_window_layers: int = 28,
    layer_types: Any = None,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("rms", rms_norm_eps)
    out_init = normal(initializer_range / (2 * num_hidden_layers) ** 0.5)
    window = sliding_window if use_sliding_window else None
    local = lambda i: "sliding_attention" if window is not None and i >= max_window_layers else "full_attention"
    mlp = lambda: Mlp(intermediate_size, hidden_act, gated=True, init=init, out_init=out_init)

    def block(kind: str) -> Block:
        attention = Attention(
            num_attention_heads, head_dim, num_key_value_heads, norm=norm(), bias=attention_bias,
            rope=Rope(rope_theta, scaling=rope_scaling), window=window if kind == "sliding_attention" else None, init=init, out_init=out_init,
        )  # fmt: skip
        return Block(attention, mlp(), norm())

    groups = alternating(attention_kinds(layer_types, num_hidden_layers, local), block)
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=groups, norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


NAMES = {**llama.NAMES, **{f"layers.{{l}}.self_attn.{x}_norm.weight": (f"blocks/attention/{x}_norm/scale", "H") for x in "qk"}}
HEADS = llama.heads("Qwen3")
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
IGNORED = ("attention_dropout",)
FIXED: dict = {}
