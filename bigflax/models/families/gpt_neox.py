"""GPT-NeoX and Pythia: attention and mlp side by side, rotary positions on a part of each head. Black et al. 2022 (arXiv 2204.06745).

Arguments are the fields of the Hugging Face config (`model_type` "gpt_neox"), with its defaults.
"""

from typing import Any

from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import Rope, head_width, normal

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4),
    "pythia-70m": dict(vocab_size=50304, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8),
    "pythia-160m": dict(vocab_size=50304, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "pythia-1.4b": dict(vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16),
    "20b": dict(hidden_act="gelu_fast"),
}


def build(
    *,
    vocab_size: int = 50432,
    hidden_size: int = 6144,
    intermediate_size: int = 24576,
    num_hidden_layers: int = 44,
    num_attention_heads: int = 64,
    hidden_act: str = "gelu",
    hidden_dropout: float = 0.0,
    max_position_embeddings: int = 2048,
    initializer_range: float = 0.02,
    layer_norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    use_parallel_residual: bool = True,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    partial_rotary_factor: float = 0.25,
    attention_bias: bool = True,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("layer", layer_norm_eps)
    attention = Attention(
        num_attention_heads, head_width(hidden_size, num_attention_heads), rope=Rope(rope_theta, partial_rotary_factor, rope_scaling),
        bias=attention_bias, dropout=hidden_dropout, init=init, out_init=init,
    )  # fmt: skip
    mlp = Mlp(intermediate_size, hidden_act, bias=True, dropout=hidden_dropout, init=init, out_init=init)
    block = Block(attention, mlp, norm(), order="parallel" if use_parallel_residual else "pre")
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=(Group((block,), num_hidden_layers),), norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


_QKV = "blocks/attention/q{0} blocks/attention/k{0} blocks/attention/v{0}"
PREFIX = "gpt_neox."
NAMES = {
    "embed_in.weight": ("embed/tokens", "V D"),
    **{f"layers.{{l}}.input_layernorm.{ours}": (f"blocks/norm1/{name}", "D") for ours, name in (("weight", "scale"), ("bias", "bias"))},
    **{
        f"layers.{{l}}.post_attention_layernorm.{ours}": (f"blocks/norm2/{name}", "D")
        for ours, name in (("weight", "scale"), ("bias", "bias"))
    },
    "layers.{l}.attention.query_key_value.weight": (_QKV.format(""), "(N S H) D -> S D N H"),
    "layers.{l}.attention.query_key_value.bias": (_QKV.format("_bias"), "(N S H) -> S N H"),
    "layers.{l}.attention.dense.weight": ("blocks/attention/out", "D (N H) -> N H D"),
    "layers.{l}.attention.dense.bias": ("blocks/attention/out_bias", "D"),
    "layers.{l}.mlp.dense_h_to_4h.weight": ("blocks/mlp/up", "F D -> D F"),
    "layers.{l}.mlp.dense_h_to_4h.bias": ("blocks/mlp/up_bias", "F"),
    "layers.{l}.mlp.dense_4h_to_h.weight": ("blocks/mlp/down", "D F -> F D"),
    "layers.{l}.mlp.dense_4h_to_h.bias": ("blocks/mlp/down_bias", "D"),
    "final_layer_norm.weight": ("norm/scale", "D"),
    "final_layer_norm.bias": ("norm/bias", "D"),
}
HEADS = {
    None: ("GPTNeoXModel", {}),
    "causal_lm": ("GPTNeoXForCausalLM", {"embed_out.weight": ("head/w", "V D")}),
    "sequence_classification": ("GPTNeoXForSequenceClassification", {"score.weight": ("head/scores/w", "C D -> D C")}),
}
BUFFERS = (r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)
RENAMED = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
IGNORED = ("attention_dropout", "classifier_dropout")
FIXED: dict = {}
