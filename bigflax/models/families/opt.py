"""OPT: GPT-2 with ReLU, learned positions whose table begins two rows early, separate projections. Zhang et al. 2022 (arXiv 2205.01068).

Arguments are the fields of the Hugging Face config (`model_type` "opt"), with its defaults.
"""

from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import head_width, normal

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128),
    "125m": dict(),
    "1.3b": dict(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32),
    "6.7b": dict(hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32),
}


def build(
    *,
    vocab_size: int = 50272,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    ffn_dim: int = 3072,
    max_position_embeddings: int = 2048,
    dropout: float = 0.1,
    num_attention_heads: int = 12,
    activation_function: str = "relu",
    init_std: float = 0.02,
    word_embed_proj_dim: int | None = None,
    tie_word_embeddings: bool = True,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    if word_embed_proj_dim not in (None, hidden_size):
        raise ValueError(
            f"word_embed_proj_dim {word_embed_proj_dim} is not hidden_size {hidden_size}: opt-350m's projected embedding is not supported"
        )
    init, norm = normal(init_std), lambda: Norm("layer", 1e-5)
    attention = Attention(
        num_attention_heads, head_width(hidden_size, num_attention_heads), bias=True, dropout=dropout, init=init, out_init=init
    )
    block = Block(attention, Mlp(ffn_dim, activation_function, bias=True, dropout=dropout, init=init, out_init=init), norm())
    return Transformer(
        embed=Embed(vocab_size, hidden_size, positions=max_position_embeddings, first_position=2, dtype=dtype, init=init),
        groups=(Group((block,), num_hidden_layers),), norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


PREFIX = "model."
NAMES = {
    "decoder.embed_tokens.weight": ("embed/tokens", "V D"),
    "decoder.embed_positions.weight": ("embed/positions", "P D"),
    **{f"decoder.layers.{{l}}.self_attn.{x}_proj.weight": (f"blocks/attention/{x}", "(N H) D -> D N H") for x in "qkv"},
    **{f"decoder.layers.{{l}}.self_attn.{x}_proj.bias": (f"blocks/attention/{x}_bias", "(N H) -> N H") for x in "qkv"},
    "decoder.layers.{l}.self_attn.out_proj.weight": ("blocks/attention/out", "D (N H) -> N H D"),
    "decoder.layers.{l}.self_attn.out_proj.bias": ("blocks/attention/out_bias", "D"),
    "decoder.layers.{l}.self_attn_layer_norm.weight": ("blocks/norm1/scale", "D"),
    "decoder.layers.{l}.self_attn_layer_norm.bias": ("blocks/norm1/bias", "D"),
    "decoder.layers.{l}.fc1.weight": ("blocks/mlp/up", "F D -> D F"),
    "decoder.layers.{l}.fc1.bias": ("blocks/mlp/up_bias", "F"),
    "decoder.layers.{l}.fc2.weight": ("blocks/mlp/down", "D F -> F D"),
    "decoder.layers.{l}.fc2.bias": ("blocks/mlp/down_bias", "D"),
    "decoder.layers.{l}.final_layer_norm.weight": ("blocks/norm2/scale", "D"),
    "decoder.layers.{l}.final_layer_norm.bias": ("blocks/norm2/bias", "D"),
    "decoder.final_layer_norm.weight": ("norm/scale", "D"),
    "decoder.final_layer_norm.bias": ("norm/bias", "D"),
}
HEADS = {
    None: ("OPTModel", {}),
    "causal_lm": ("OPTForCausalLM", {"lm_head.weight": ("head/w", "V D")}),
    "sequence_classification": ("OPTForSequenceClassification", {"score.weight": ("head/scores/w", "C D -> D C")}),
}
BUFFERS = ()
IGNORED = ("attention_dropout", "layerdrop", "activation_dropout")
FIXED = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True, "layer_norm_elementwise_affine": True}
