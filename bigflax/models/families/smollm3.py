"""SmolLM3: Llama in which every fourth layer turns nothing (NoPE). Hugging Face 2025; NoPE: Yang et al. 2025 (arXiv 2501.18795).

Arguments are the fields of the Hugging Face config (`model_type` "smollm3"), with its defaults.
"""

from typing import Any

from bigflax.models.families import llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Mlp, Norm, Transformer, alternating, attention_kinds
from bigflax.nn import Rope, head_width, normal

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2),
    "3b": dict(max_position_embeddings=65536, rope_theta=5000000.0),
}


def build(
    *,
    vocab_size: int = 128256,
    hidden_size: int = 2048,
    intermediate_size: int = 11008,
    num_hidden_layers: int = 36,
    num_attention_heads: int = 16,
    num_key_value_heads: int | None = 4,
    hidden_act: str = "silu",
    max_position_embeddings: int = 32768,
    pad_token_id: int | None = None,  # for transformers alone, whose own default lies outside of a smaller vocabulary
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = True,
    rope_theta: float = 2000000.0,
    rope_scaling: Any = None,
    no_rope_layers: Any = None,  # 1 where a layer does turn, 0 where not
    no_rope_layer_interval: int = 4,
    use_sliding_window: bool = False,
    sliding_window: int | None = None,
    layer_types: Any = None,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("rms", rms_norm_eps)
    window = sliding_window if use_sliding_window else None
    layers = range(num_hidden_layers)
    turns = [(i + 1) % no_rope_layer_interval != 0 for i in layers] if no_rope_layers is None else [bool(turn) for turn in no_rope_layers]
    if len(turns) != num_hidden_layers:
        raise ValueError(f"no_rope_layers lists {len(turns)} layers, but the model has {num_hidden_layers}")
    local = lambda i: "full_attention" if window is None or turns[i] else "sliding_attention"

    def block(kind: tuple[bool, str]) -> Block:
        attention = Attention(
            num_attention_heads, head_width(hidden_size, num_attention_heads), num_key_value_heads, bias=attention_bias, init=init, out_init=init,
            rope=Rope(rope_theta, scaling=rope_scaling) if kind[0] else None, window=window if kind[1] == "sliding_attention" else None,
        )  # fmt: skip
        return Block(attention, Mlp(intermediate_size, hidden_act, gated=True, bias=mlp_bias, init=init, out_init=init), norm())

    groups = alternating([*zip(turns, attention_kinds(layer_types, num_hidden_layers, local), strict=True)], block)
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=groups, norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


NAMES = llama.NAMES
HEADS = llama.heads("SmolLM3")
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
IGNORED = ("attention_dropout",)
FIXED: dict = {}
