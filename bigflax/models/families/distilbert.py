"""DistilBERT: BERT's body at half the depth, without token types and pooler. Sanh et al. 2019 (arXiv 1910.01108).

Arguments are the fields of the Hugging Face config (`model_type` "distilbert"), with its defaults.
"""

from bigflax.models.families.bert import layer, norm_lines
from bigflax.models.heads import encoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import head_width, normal

SIZES = {"tiny": dict(vocab_size=256, dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_position_embeddings=128), "base": dict()}


def build(
    *,
    vocab_size: int = 30522,
    max_position_embeddings: int = 512,
    n_layers: int = 6,
    n_heads: int = 12,
    dim: int = 768,
    hidden_dim: int = 3072,
    dropout: float = 0.1,
    activation: str = "gelu",
    initializer_range: float = 0.02,
    seq_classif_dropout: float = 0.2,
    head: str | None = "masked_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("layer", 1e-12)
    attention = Attention(n_heads, head_width(dim, n_heads), causal=False, bias=True, dropout=dropout, init=init, out_init=init)
    block = Block(attention, Mlp(hidden_dim, activation, bias=True, dropout=dropout, init=init, out_init=init), norm(), order="post")
    return Transformer(
        embed=Embed(vocab_size, dim, positions=max_position_embeddings, norm=norm(), dropout=dropout, dtype=dtype, init=init),
        groups=(Group((block,), n_layers),),
        head=encoder_head(
            head, vocab=vocab_size, norm=norm, labels=num_labels, init=init, mlm_act=activation, act="relu", dropout=seq_classif_dropout, pooler=False,
        ),
        remat=remat, unroll=unroll,
    )  # fmt: skip


PREFIX = "distilbert."
NAMES = {
    "embeddings.word_embeddings.weight": ("embed/tokens", "V D"),
    "embeddings.position_embeddings.weight": ("embed/positions", "P D"),
    **norm_lines("embeddings.LayerNorm", "embed/norm"),
    **{f"transformer.layer.{{l}}.attention.{x}_lin.weight": (f"blocks/attention/{x}", "(N H) D -> D N H") for x in "qkv"},
    **{f"transformer.layer.{{l}}.attention.{x}_lin.bias": (f"blocks/attention/{x}_bias", "(N H) -> N H") for x in "qkv"},
    "transformer.layer.{l}.attention.out_lin.weight": ("blocks/attention/out", "D (N H) -> N H D"),
    "transformer.layer.{l}.attention.out_lin.bias": ("blocks/attention/out_bias", "D"),
    **norm_lines("transformer.layer.{l}.sa_layer_norm", "blocks/norm1"),
    "transformer.layer.{l}.ffn.lin1.weight": ("blocks/mlp/up", "F D -> D F"),
    "transformer.layer.{l}.ffn.lin1.bias": ("blocks/mlp/up_bias", "F"),
    "transformer.layer.{l}.ffn.lin2.weight": ("blocks/mlp/down", "D F -> F D"),
    "transformer.layer.{l}.ffn.lin2.bias": ("blocks/mlp/down_bias", "D"),
    **norm_lines("transformer.layer.{l}.output_layer_norm", "blocks/norm2"),
}
HEADS = {
    None: ("DistilBertModel", {}),
    "embedding": ("DistilBertModel", {}),
    "masked_lm": (
        "DistilBertForMaskedLM",
        {**layer("vocab_transform", "head/dense"), **norm_lines("vocab_layer_norm", "head/norm"), "vocab_projector.bias": ("head/bias", "V")},
    ),
    "sequence_classification": (
        "DistilBertForSequenceClassification", {**layer("pre_classifier", "head/dense"), **layer("classifier", "head/scores")},
    ),
    "token_classification": ("DistilBertForTokenClassification", layer("classifier", "head/scores")),
    "question_answering": ("DistilBertForQuestionAnswering", layer("qa_outputs", "head/scores")),
}  # fmt: skip
BUFFERS = (r"embeddings\.position_ids", r"vocab_projector\.weight")
IGNORED = ("attention_dropout", "qa_dropout")
FIXED = {"sinusoidal_pos_embds": False, "tie_word_embeddings": True, "tie_weights_": True}
