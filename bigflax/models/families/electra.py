"""ELECTRA: BERT that learns which tokens were replaced; a narrow embedding, projected to the width. Clark et al. 2020 (arXiv 2003.10555).

Arguments are the fields of the Hugging Face config (`model_type` "electra"), with its defaults.
"""

from bigflax.models.families import bert
from bigflax.models.families.bert import layer, norm_lines
from bigflax.models.heads import TokenHead, encoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Linear, Mlp, Norm, Transformer
from bigflax.nn import head_width, normal

SIZES = {
    "tiny": dict(
        vocab_size=256, embedding_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128,
    ),
    "small": dict(),
    "base": dict(embedding_size=768, hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "large": dict(embedding_size=1024, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 30522,
    embedding_size: int = 128,
    hidden_size: int = 256,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 4,
    intermediate_size: int = 1024,
    hidden_act: str = "gelu",
    hidden_dropout_prob: float = 0.1,
    max_position_embeddings: int = 512,
    type_vocab_size: int = 2,
    initializer_range: float = 0.02,
    layer_norm_eps: float = 1e-12,
    classifier_dropout: float | None = None,
    head: str | None = "discriminator",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, drop = normal(initializer_range), hidden_dropout_prob
    norm = lambda: Norm("layer", layer_norm_eps)
    attention = Attention(
        num_attention_heads, head_width(hidden_size, num_attention_heads), causal=False, bias=True, dropout=drop, init=init, out_init=init
    )
    block = Block(attention, Mlp(intermediate_size, hidden_act, bias=True, dropout=drop, init=init, out_init=init), norm(), order="post")
    return Transformer(
        embed=Embed(
            vocab_size, embedding_size, positions=max_position_embeddings, types=type_vocab_size, norm=norm(), dropout=drop, dtype=dtype, init=init,
        ),
        project=Linear(hidden_size, "_ -> embed", init=init) if embedding_size != hidden_size else None,
        groups=(Group((block,), num_hidden_layers),),
        head=encoder_head(
            head, vocab=vocab_size, norm=norm, labels=num_labels, init=init, act="gelu", pooler=False,
            dropout=drop if classifier_dropout is None else classifier_dropout, first=TokenHead(1, ("logits",), hidden_act, init=init),
        ),
        remat=remat, unroll=unroll,
    )  # fmt: skip


PREFIX = "electra."
NAMES = {**bert.NAMES, **layer("embeddings_project", "project")}
HEADS = {
    None: ("ElectraModel", {}),
    "embedding": ("ElectraModel", {}),
    "discriminator": (
        "ElectraForPreTraining",
        {**layer("discriminator_predictions.dense", "head/dense"), **layer("discriminator_predictions.dense_prediction", "head/scores")},
    ),
    "masked_lm": (
        "ElectraForMaskedLM",
        {
            **layer("generator_predictions.dense", "head/dense"), **norm_lines("generator_predictions.LayerNorm", "head/norm"),
            "generator_lm_head.bias": ("head/bias", "V"),
        },
    ),
    "sequence_classification": (
        "ElectraForSequenceClassification", {**layer("classifier.dense", "head/dense"), **layer("classifier.out_proj", "head/scores")},
    ),
    "token_classification": ("ElectraForTokenClassification", layer("classifier", "head/scores")),
    "question_answering": ("ElectraForQuestionAnswering", layer("qa_outputs", "head/scores")),
}  # fmt: skip
BUFFERS = (r"embeddings\.position_ids", r"generator_lm_head\.weight")
IGNORED = (*bert.IGNORED, r"summary_.*")
FIXED = bert.FIXED
