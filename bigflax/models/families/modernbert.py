"""ModernBERT: an encoder made like recent decoders: rotary positions, gated mlps, pre-norm, two local layers to a global one, no biases.
Warner et al. 2024 (arXiv 2412.13663).

Arguments are the fields of the Hugging Face config (`model_type` "modernbert"), with its defaults.
"""

from typing import Any

from bigflax.models.families.bert import layer
from bigflax.models.heads import EmbeddingHead, Head, MlmHead, SequenceHead, TokenHead
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer, alternating, attention_kinds
from bigflax.nn import Rope, head_width, normal, pick

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, local_attention=16),
    "base": dict(classifier_pooling="mean"),
    "large": dict(hidden_size=1024, intermediate_size=2624, num_hidden_layers=28, num_attention_heads=16, classifier_pooling="mean"),
}


def build(
    *,
    vocab_size: int = 50368,
    hidden_size: int = 768,
    intermediate_size: int = 1152,
    num_hidden_layers: int = 22,
    num_attention_heads: int = 12,
    hidden_activation: str = "gelu",
    max_position_embeddings: int = 8192,
    pad_token_id: int | None = None,  # for transformers alone, whose own default lies outside of a smaller vocabulary
    initializer_range: float = 0.02,
    norm_eps: float = 1e-5,
    norm_bias: bool = False,
    attention_bias: bool = False,
    attention_dropout: float = 0.0,
    global_attn_every_n_layers: int = 3,
    layer_types: Any = None,
    local_attention: int = 128,
    global_rope_theta: float = 160000.0,
    local_rope_theta: float = 10000.0,
    embedding_dropout: float = 0.0,
    mlp_bias: bool = False,
    classifier_pooling: str = "cls",
    classifier_dropout: float = 0.0,
    classifier_bias: bool = False,
    classifier_activation: str = "gelu",
    head: str | None = "masked_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init = normal(initializer_range)
    out_init = normal(initializer_range / (2 * num_hidden_layers) ** 0.5)
    norm = lambda: Norm("layer", norm_eps, bias=norm_bias)

    def block(kind: str, *without: str) -> Block:
        local = kind == "sliding_attention"
        attention = Attention(
            num_attention_heads, head_width(hidden_size, num_attention_heads), causal=False, bias=attention_bias, dropout=attention_dropout,
            rope=Rope(local_rope_theta if local else global_rope_theta), init=init, out_init=out_init,
            window=local_attention // 2 + 1 if local else None,  # so many tokens on either side, and itself
        )  # fmt: skip
        mlp = Mlp(intermediate_size, hidden_activation, gated=True, bias=mlp_bias, init=init, out_init=out_init)
        return Block(attention, mlp, norm(), without=without)

    default = lambda i: "sliding_attention" if i % global_attn_every_n_layers else "full_attention"
    first, *others = attention_kinds(layer_types, num_hidden_layers, default)
    later = alternating(others, block) if others else ()
    before: dict[str, Any] = dict(act=classifier_activation, norm=norm(), dense_bias=classifier_bias, init=init)
    pool = pick({"cls": "first", "mean": "mean"}, classifier_pooling, "classifier_pooling")
    heads: dict[Any, Head | None] = {
        None: None,
        "embedding": EmbeddingHead(),
        "masked_lm": MlmHead(vocab_size, **before),
        "sequence_classification": SequenceHead(num_labels, pool, dropout=classifier_dropout, **before),
        "token_classification": TokenHead(num_labels, dropout=classifier_dropout, **before),
        "question_answering": TokenHead(2, ("start_logits", "end_logits"), dropout=classifier_dropout, **before),
    }
    return Transformer(
        embed=Embed(vocab_size, hidden_size, norm=norm(), dropout=embedding_dropout, dtype=dtype, init=init),
        groups=(Group((block(first, "norm1"),), 1), *later), norm=norm(), head=pick(heads, head, "head"), remat=remat, unroll=unroll,
    )  # fmt: skip


def _lines(name: str, leaf: str, *, of_layer: str = "layers.{l}.") -> dict:
    """A norm, whose bias most configs leave out."""
    return {f"{of_layer}{name}.{theirs}": (f"{leaf}/{ours}", "D") for theirs, ours in (("weight", "scale"), ("bias", "bias"))}


_joined = lambda *parts: " ".join(f"blocks/{part}" for part in parts)
PREFIX = "model."
NAMES = {
    "embeddings.tok_embeddings.weight": ("embed/tokens", "V D"),
    **_lines("embeddings.norm", "embed/norm", of_layer=""),
    **_lines("attn_norm", "blocks/norm1"),
    "layers.{l}.attn.Wqkv.weight": (_joined("attention/q", "attention/k", "attention/v"), "(S N H) D -> S D N H"),
    "layers.{l}.attn.Wqkv.bias": (_joined("attention/q_bias", "attention/k_bias", "attention/v_bias"), "(S N H) -> S N H"),
    "layers.{l}.attn.Wo.weight": ("blocks/attention/out", "D (N H) -> N H D"),
    "layers.{l}.attn.Wo.bias": ("blocks/attention/out_bias", "D"),
    **_lines("mlp_norm", "blocks/norm2"),
    "layers.{l}.mlp.Wi.weight": (_joined("mlp/gate", "mlp/up"), "(S F) D -> S D F"),
    "layers.{l}.mlp.Wi.bias": (_joined("mlp/gate_bias", "mlp/up_bias"), "(S F) -> S F"),
    "layers.{l}.mlp.Wo.weight": ("blocks/mlp/down", "D F -> F D"),
    "layers.{l}.mlp.Wo.bias": ("blocks/mlp/down_bias", "D"),
    **_lines("final_norm", "norm", of_layer=""),
}
_BEFORE = {**layer("head.dense", "head/dense"), **_lines("head.norm", "head/norm", of_layer="")}
_SCORES = {**_BEFORE, **layer("classifier", "head/scores")}
HEADS = {
    None: ("ModernBertModel", {}),
    "embedding": ("ModernBertModel", {}),
    "masked_lm": ("ModernBertForMaskedLM", {**_BEFORE, "decoder.bias": ("head/bias", "V")}),
    "sequence_classification": ("ModernBertForSequenceClassification", _SCORES),
    "token_classification": ("ModernBertForTokenClassification", _SCORES),
    "question_answering": ("ModernBertForQuestionAnswering", _SCORES),
}
BUFFERS = (r"decoder\.weight",)
RENAMED = {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"}
IGNORED = (
    "deterministic_flash_attn", "initializer_cutoff_factor", "layer_norm_eps", "position_embedding_type", "reference_compile",
    "repad_logits_with_grad", r"sparse_pred.*",
)  # fmt: skip
FIXED = {"decoder_bias": True, "mlp_dropout": 0.0, "rope_scaling": None, "tie_word_embeddings": True}
