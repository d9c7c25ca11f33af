"""Gemma 3, its text part: five local layers to a global one, each kind with its own rotation, QK-norm. 2025 (arXiv 2503.19786).

Arguments are the fields of the Hugging Face config (`model_type` "gemma3_text"), with its defaults.
"""

from typing import Any

from bigflax.models.families import gemma2, llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Mlp, Norm, Transformer, alternating, attention_kinds
from bigflax.nn import Rope, normal

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "1b": dict(vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_attention_heads=4, num_key_value_heads=1, sliding_window=512),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 262208,
    hidden_size: int = 2304,
    intermediate_size: int = 9216,
    num_hidden_layers: int = 26,
    num_attention_heads: int = 8,
    num_key_value_heads: int = 4,
    head_dim: int = 256,
    hidden_activation: str = "gelu_pytorch_tanh",
    max_position_embeddings: int = 131072,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = True,
    rope_theta: float = 1000000.0,
    rope_scaling: Any = None,
    attention_bias: bool = False,
    rope_local_base_freq: float = 10000.0,
    query_pre_attn_scalar: float = 256,
    sliding_window: int = 4096,
    layer_types: Any = None,
    final_logit_softcapping: float | None = None,
    attn_logit_softcapping: float | None = None,
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
        rope = Rope(rope_local_base_freq) if local else Rope(rope_theta, scaling=rope_scaling)
        attention = Attention(
            num_attention_heads, head_dim, num_key_value_heads, rope=rope, norm=norm(), bias=attention_bias, window=sliding_window if local else None,
            softcap=attn_logit_softcapping, scale=query_pre_attn_scalar**-0.5, init=init, out_init=init,
        )  # fmt: skip
        return Block(attention, mlp(), norm(), order="sandwich")

    kinds = attention_kinds(layer_types, num_hidden_layers, lambda i: "sliding_attention" if (i + 1) % 6 else "full_attention")
    groups = alternating(kinds, block)
    return Transformer(
        embed=Embed(vocab_size, hidden_size, scale=hidden_size**0.5, dtype=dtype, init=init), groups=groups, norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init,
            softcap=final_logit_softcapping), remat=remat, unroll=unroll,
    )  # fmt: skip


NAMES = {
    **gemma2.NAMES,
    **{f"layers.{{l}}.self_attn.{x}_norm.weight": (f"blocks/attention/{x}_norm/scale", "H") for x in "qk"},
}
HEADS = llama.heads("Gemma3") | {None: ("Gemma3TextModel", {})}
HEADS["sequence_classification"] = ("Gemma3TextForSequenceClassification", HEADS["sequence_classification"][1])
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
IGNORED = ("attention_dropout", "cache_implementation", "_?sliding_window_pattern")
FIXED = {"use_bidirectional_attention": False}
