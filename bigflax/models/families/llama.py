"""Llama 2 and 3: rotary positions, grouped-query attention, RMS norm, SwiGLU, no biases. Touvron et al. 2023; Grattafiori et al. 2024.

Arguments are the fields of the Hugging Face config (`model_type` "llama"), with its defaults. The same with a norm on queries and keys, which trains
better from nothing, is `qwen3`.
"""

from typing import Any

from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import Rope, head_width, normal

_LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, rope_theta=500000.0, rms_norm_eps=1e-5, max_position_embeddings=8192)
_LLAMA32 = dict(
    vocab_size=128256, num_key_value_heads=8, intermediate_size=8192, tie_word_embeddings=True, rope_theta=500000.0, rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
)  # fmt: skip
_SMOL = {  # SmolLM and SmolLM2 have the same three shapes
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
    "360m": dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5),
    "1.7b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32),
}
_smol = lambda size, length, theta: dict(
    **_SMOL[size], vocab_size=49152, tie_word_embeddings=True, rms_norm_eps=1e-5, max_position_embeddings=length, rope_theta=theta
)
SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    "llama2-7b": dict(rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama2-13b": dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, rms_norm_eps=1e-5, max_position_embeddings=4096,
    ),
    "llama3-8b": dict(**_LLAMA3, intermediate_size=14336),
    "llama3-70b": dict(**_LLAMA3, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "llama3.2-1b": dict(**_LLAMA32, hidden_size=2048, num_hidden_layers=16),
    "llama3.2-3b": dict(**_LLAMA32, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24),
    "tinyllama-1.1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4, rms_norm_eps=1e-5),
    **{f"smollm-{size}": _smol(size, 2048, 10000.0) for size in _SMOL},
    "smollm2-135m": _smol("135m", 8192, 100000.0),
    "smollm2-360m": _smol("360m", 8192, 100000.0),
    "smollm2-1.7b": _smol("1.7b", 8192, 130000.0),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 32000,
    hidden_size: int = 4096,
    intermediate_size: int = 11008,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    hidden_act: str = "silu",
    max_position_embeddings: int = 2048,  # rotary positions have no table: what was trained on, kept for whoever reads the config
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init = normal(initializer_range)
    out_init = normal(initializer_range / (2 * num_hidden_layers) ** 0.5)
    norm = lambda: Norm("rms", rms_norm_eps)
    attention = Attention(
        num_attention_heads, head_dim or head_width(hidden_size, num_attention_heads), num_key_value_heads,
        rope=Rope(rope_theta, scaling=rope_scaling), bias=attention_bias, init=init, out_init=out_init,
    )  # fmt: skip
    mlp = Mlp(intermediate_size, hidden_act, gated=True, bias=mlp_bias, init=init, out_init=out_init)
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=(Group((Block(attention, mlp, norm()),), num_hidden_layers),),
        norm=norm(), head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init),
        remat=remat, unroll=unroll,
    )  # fmt: skip


PREFIX = "model."
NAMES = {
    "embed_tokens.weight": ("embed/tokens", "V D"),
    "layers.{l}.input_layernorm.weight": ("blocks/norm1/scale", "D"),
    **{f"layers.{{l}}.self_attn.{x}_proj.weight": (f"blocks/attention/{x}", "(N H) D -> D N H") for x in "qkv"},
    **{f"layers.{{l}}.self_attn.{x}_proj.bias": (f"blocks/attention/{x}_bias", "(N H) -> N H") for x in "qkv"},
    "layers.{l}.self_attn.o_proj.weight": ("blocks/attention/out", "D (N H) -> N H D"),
    "layers.{l}.self_attn.o_proj.bias": ("blocks/attention/out_bias", "D"),
    "layers.{l}.post_attention_layernorm.weight": ("blocks/norm2/scale", "D"),
    **{f"layers.{{l}}.mlp.{x}_proj.weight": (f"blocks/mlp/{x}", "F D -> D F") for x in ("gate", "up")},
    **{f"layers.{{l}}.mlp.{x}_proj.bias": (f"blocks/mlp/{x}_bias", "F") for x in ("gate", "up")},
    "layers.{l}.mlp.down_proj.weight": ("blocks/mlp/down", "D F -> F D"),
    "layers.{l}.mlp.down_proj.bias": ("blocks/mlp/down_bias", "D"),
    "norm.weight": ("norm/scale", "D"),
}


def heads(name: str) -> dict:
    """The heads of a decoder whose classes in transformers begin with `name`."""
    return {
        None: (f"{name}Model", {}),
        "causal_lm": (f"{name}ForCausalLM", {"lm_head.weight": ("head/w", "V D")}),
        "sequence_classification": (f"{name}ForSequenceClassification", {"score.weight": ("head/scores/w", "C D -> D C")}),
    }


HEADS = heads("Llama")
BUFFERS = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
IGNORED = ("attention_dropout",)
FIXED = {"pretraining_tp": 1}
