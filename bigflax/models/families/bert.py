"""BERT: bidirectional, learned positions and token types, post-norm, masked-LM head. Devlin et al. 2019 (arXiv 1810.04805).

Arguments are the fields of the Hugging Face config (`model_type` "bert"), with its defaults.
"""

from bigflax.models.heads import encoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
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
    classifier_dropout: float | None = None,
    head: str | None = "masked_lm",
    num_labels: int = 2,
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
    head_ = encoder_head(
        head,
        vocab=vocab_size,
        norm=norm,
        labels=num_labels,
        init=init,
        mlm_act=hidden_act,
        dropout=drop if classifier_dropout is None else classifier_dropout,
    )
    return Transformer(
        embed=Embed(vocab_size, hidden_size, positions=max_position_embeddings, types=type_vocab_size, norm=norm(), dropout=drop, dtype=dtype, init=init),
        groups=(Group((Block(attention, mlp, norm(), order="post"),), num_hidden_layers),), head=head_, remat=remat, unroll=unroll,
    )  # fmt: skip


PREFIX = "bert."
NAMES = {
    "embeddings.word_embeddings.weight": ("embed/tokens", "V D"),
    "embeddings.position_embeddings.weight": ("embed/positions", "P D"),
    "embeddings.token_type_embeddings.weight": ("embed/types", "P D"),
    "embeddings.LayerNorm.weight": ("embed/norm/scale", "D"),
    "embeddings.LayerNorm.bias": ("embed/norm/bias", "D"),
    **{
        f"encoder.layer.{{l}}.attention.self.{n}.weight": (f"blocks/attention/{n[0]}", "(N H) D -> D N H")
        for n in ("query", "key", "value")
    },
    **{
        f"encoder.layer.{{l}}.attention.self.{n}.bias": (f"blocks/attention/{n[0]}_bias", "(N H) -> N H") for n in ("query", "key", "value")
    },
    "encoder.layer.{l}.attention.output.dense.weight": ("blocks/attention/out", "D (N H) -> N H D"),
    "encoder.layer.{l}.attention.output.dense.bias": ("blocks/attention/out_bias", "D"),
    "encoder.layer.{l}.attention.output.LayerNorm.weight": ("blocks/norm1/scale", "D"),
    "encoder.layer.{l}.attention.output.LayerNorm.bias": ("blocks/norm1/bias", "D"),
    "encoder.layer.{l}.intermediate.dense.weight": ("blocks/mlp/up", "F D -> D F"),
    "encoder.layer.{l}.intermediate.dense.bias": ("blocks/mlp/up_bias", "F"),
    "encoder.layer.{l}.output.dense.weight": ("blocks/mlp/down", "D F -> F D"),
    "encoder.layer.{l}.output.dense.bias": ("blocks/mlp/down_bias", "D"),
    "encoder.layer.{l}.output.LayerNorm.weight": ("blocks/norm2/scale", "D"),
    "encoder.layer.{l}.output.LayerNorm.bias": ("blocks/norm2/bias", "D"),
}


def layer(name: str, leaf: str) -> dict:
    """The lines of a layer with bias, as PyTorch stores it."""
    return {f"{name}.weight": (f"{leaf}/w", "F D -> D F"), f"{name}.bias": (f"{leaf}/b", "F")}


def norm_lines(name: str, leaf: str) -> dict:
    return {f"{name}.weight": (f"{leaf}/scale", "D"), f"{name}.bias": (f"{leaf}/bias", "D")}


_POOLER = layer("bert.pooler.dense", "head/dense")
_scores = lambda name: layer(name, "head/scores")
_MASKED = {
    "cls.predictions.transform.dense.weight": ("head/dense/w", "E D -> D E"),
    "cls.predictions.transform.dense.bias": ("head/dense/b", "D"),
    "cls.predictions.transform.LayerNorm.weight": ("head/norm/scale", "D"),
    "cls.predictions.transform.LayerNorm.bias": ("head/norm/bias", "D"),
    "cls.predictions.bias": ("head/bias", "V"),
}
HEADS = {
    None: ("BertModel", _POOLER),
    "embedding": ("BertModel", {}),
    "masked_lm": ("BertForMaskedLM", _MASKED),
    "sequence_classification": ("BertForSequenceClassification", {**_POOLER, **_scores("classifier")}),
    "token_classification": ("BertForTokenClassification", _scores("classifier")),
    "question_answering": ("BertForQuestionAnswering", _scores("qa_outputs")),
}
BUFFERS = (r"embeddings\.position_ids", r"cls\.predictions\.decoder\.(weight|bias)", r"cls\.seq_relationship\..*", r"pooler\..*")
IGNORED = ("attention_probs_dropout_prob", "gradient_checkpointing")
FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
