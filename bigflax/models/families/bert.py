"""BERT: bidirectional, learned positions and token types, post-norm, masked-LM head. Devlin et al. 2019 (arXiv 1810.04805).

Arguments are the fields of the Hugging Face config (`model_type` "bert"), with its defaults.
"""

from bigflax.models.transformer import Attention, Block, Embed, MlmHead, Mlp, Norm, Transformer
from bigflax.nn import head_width, normal

SIZES = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=128
    ),
    "minilm-l6": dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "base": dict(),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}


def build(
    *,
    vocab_size: int = 30522,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    intermediate_size: int = 3072,
    hidden_act: str = "gelu",
    hidden_dropout_prob: float = 0.1,
    max_position_embeddings: int = 512,
    type_vocab_size: int = 2,
    initializer_range: float = 0.02,
    layer_norm_eps: float = 1e-12,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init = normal(initializer_range)
    norm = lambda: Norm("layer", layer_norm_eps)
    drop = hidden_dropout_prob
    attention = Attention(
        num_attention_heads, head_width(hidden_size, num_attention_heads), causal=False, bias=True, dropout=drop, init=init, out_init=init
    )
    mlp = Mlp(intermediate_size, hidden_act, bias=True, dropout=drop, init=init, out_init=init)
    return Transformer(
        embed=Embed(vocab_size, hidden_size, positions=max_position_embeddings, types=type_vocab_size, norm=norm(), dropout=drop, dtype=dtype, init=init),
        blocks=Block(attention, mlp, norm(), order="post"), layers=num_hidden_layers, head=MlmHead(vocab_size, hidden_act, norm()),
        remat=remat, unroll=unroll,
    )  # fmt: skip
