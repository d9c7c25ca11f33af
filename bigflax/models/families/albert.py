"""ALBERT: BERT whose layers share one set of weights, above a narrow embedding that is projected to the width. Lan et al. 2020 (1909.11942).

Arguments are the fields of the Hugging Face config (`model_type` "albert"), with its defaults. Left out on purpose: several groups of shared
layers, and several layers a group, which no published model has.
"""

from bigflax.models.families import bert
from bigflax.models.families.bert import layer, norm_lines
from bigflax.models.heads import encoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Linear, Mlp, Norm, Transformer
from bigflax.nn import head_width, normal

SIZES = {
    "tiny": dict(
        vocab_size=256, embedding_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128,
    ),
    "base": dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "xlarge": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=8192),
    "xxlarge": dict(),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 30000,
    embedding_size: int = 128,
    hidden_size: int = 4096,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 64,
    intermediate_size: int = 16384,
    hidden_act: str = "gelu_new",
    hidden_dropout_prob: float = 0.0,
    max_position_embeddings: int = 512,
    type_vocab_size: int = 2,
    initializer_range: float = 0.02,
    layer_norm_eps: float = 1e-12,
    classifier_dropout_prob: float = 0.1,
    head: str | None = "masked_lm",
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
    block = Block(attention, Mlp(intermediate_size, hidden_act, bias=True, init=init, out_init=init), norm(), order="post")
    return Transformer(
        embed=Embed(
            vocab_size, embedding_size, positions=max_position_embeddings, types=type_vocab_size, norm=norm(), dropout=drop, dtype=dtype, init=init,
        ),
        project=Linear(hidden_size, "_ -> embed", init=init), groups=(Group((block,), num_hidden_layers, tied=True),),
        head=encoder_head(
            head, vocab=vocab_size, norm=norm, labels=num_labels, init=init, mlm_act=hidden_act, dropout=classifier_dropout_prob,
        ),
        remat=remat, unroll=unroll,
    )  # fmt: skip


PREFIX = "albert."
_LAYER = "encoder.albert_layer_groups.0.albert_layers.0"
NAMES = {
    **{name: line for name, line in bert.NAMES.items() if name.startswith("embeddings.")},
    **layer("encoder.embedding_hidden_mapping_in", "project"),
    **{f"{_LAYER}.attention.{n}.weight": (f"blocks/attention/{n[0]}", "(N H) D -> D N H") for n in ("query", "key", "value")},
    **{f"{_LAYER}.attention.{n}.bias": (f"blocks/attention/{n[0]}_bias", "(N H) -> N H") for n in ("query", "key", "value")},
    f"{_LAYER}.attention.dense.weight": ("blocks/attention/out", "D (N H) -> N H D"),
    f"{_LAYER}.attention.dense.bias": ("blocks/attention/out_bias", "D"),
    **norm_lines(f"{_LAYER}.attention.LayerNorm", "blocks/norm1"),
    f"{_LAYER}.ffn.weight": ("blocks/mlp/up", "F D -> D F"),
    f"{_LAYER}.ffn.bias": ("blocks/mlp/up_bias", "F"),
    f"{_LAYER}.ffn_output.weight": ("blocks/mlp/down", "D F -> F D"),
    f"{_LAYER}.ffn_output.bias": ("blocks/mlp/down_bias", "D"),
    **norm_lines(f"{_LAYER}.full_layer_layer_norm", "blocks/norm2"),
}
_POOLER = layer("albert.pooler", "head/dense")
HEADS = {
    None: ("AlbertModel", _POOLER),
    "embedding": ("AlbertModel", {}),
    "masked_lm": (
        "AlbertForMaskedLM",
        {**layer("predictions.dense", "head/dense"), **norm_lines("predictions.LayerNorm", "head/norm"), "predictions.bias": ("head/bias", "V")},
    ),
    "sequence_classification": ("AlbertForSequenceClassification", {**_POOLER, **layer("classifier", "head/scores")}),
    "token_classification": ("AlbertForTokenClassification", layer("classifier", "head/scores")),
    "question_answering": ("AlbertForQuestionAnswering", layer("qa_outputs", "head/scores")),
}  # fmt: skip
BUFFERS = (r"embeddings\.position_ids", r"predictions\.decoder\.(weight|bias)", r"sop_classifier\..*", r"pooler\..*")
# the last four stand in published configs and mean nothing to the models of that name
IGNORED = (*bert.IGNORED, "net_structure_type", "gap_size", "num_memory_blocks", "down_scale_factor")
FIXED = {**bert.FIXED, "num_hidden_groups": 1, "inner_group_num": 1}
