"""RoBERTa, and in other weights XLM-R: BERT without its second task, positions that begin behind padding's. Liu et al. 2019 (arXiv 1907.11692).

Arguments are the fields of the Hugging Face config (`model_type` "roberta"), with its defaults. `position_ids` count from 0, as everywhere
here; the table's row is that plus `pad_token_id` + 1.
"""

import dataclasses

from bigflax.models.families import bert
from bigflax.models.families.bert import layer, norm_lines
from bigflax.models.transformer import Transformer

SIZES = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=130
    ),
    "base": dict(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5),
    "large": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1,
        layer_norm_eps=1e-5,
    ),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 50265,
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
    pad_token_id: int = 1,
    head: str | None = "masked_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    first = pad_token_id + 1
    like = bert.build(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size, hidden_act=hidden_act, hidden_dropout_prob=hidden_dropout_prob,
        max_position_embeddings=max_position_embeddings - first, type_vocab_size=type_vocab_size, initializer_range=initializer_range,
        layer_norm_eps=layer_norm_eps, classifier_dropout=classifier_dropout, head=head, num_labels=num_labels, dtype=dtype, remat=remat, unroll=unroll,
    )  # fmt: skip
    return dataclasses.replace(like, embed=dataclasses.replace(like.embed, first_position=first))


PREFIX, NAMES, FIXED = "roberta.", bert.NAMES, bert.FIXED
POSITION_ROWS = True  # transformers' own position_ids are rows of the table
_POOLER = layer("roberta.pooler.dense", "head/dense")


def heads(name: str) -> dict:
    """The heads where the classes of transformers begin with `name`."""
    return {
        None: (f"{name}Model", _POOLER),
        "embedding": (f"{name}Model", {}),
        "masked_lm": (
            f"{name}ForMaskedLM",
            {**layer("lm_head.dense", "head/dense"), **norm_lines("lm_head.layer_norm", "head/norm"), "lm_head.bias": ("head/bias", "V")},
        ),
        "sequence_classification": (
            f"{name}ForSequenceClassification", {**layer("classifier.dense", "head/dense"), **layer("classifier.out_proj", "head/scores")},
        ),
        "token_classification": (f"{name}ForTokenClassification", layer("classifier", "head/scores")),
        "question_answering": (f"{name}ForQuestionAnswering", layer("qa_outputs", "head/scores")),
    }  # fmt: skip


HEADS = heads("Roberta")
BUFFERS = (r"embeddings\.position_ids", r"lm_head\.decoder\.(weight|bias)", r"pooler\..*")
IGNORED = bert.IGNORED
