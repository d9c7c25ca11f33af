"""T5: an encoder-decoder with relative positions, RMS norms before each part, no biases, logits unscaled. Raffel et al. 2020 (arXiv 1910.10683).

The first version has ReLU and ties its head to the table, of states times D^-1/2; version 1.1 and Flan-T5 have a gated GELU and a head of
their own. Arguments are the fields of the Hugging Face config (`model_type` "t5"), with its defaults. The stored config need not say whether
the head is tied: the file does, which holds a second table or not (`settle`).
"""

from collections.abc import Container, Mapping
from typing import Any

from bigflax.models.heads import EmbeddingHead, Head, LmHead, TokenHead
from bigflax.models.seq2seq import Seq2Seq, Table
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import RelativeBias, normal, pick

SMALL = dict(d_model=512, d_ff=1024, num_layers=8, num_heads=6)
BASE = dict(d_model=768, d_ff=2048, num_layers=12, num_heads=12)
LARGE = dict(d_model=1024, d_ff=2816, num_layers=24, num_heads=16)
XL = dict(d_model=2048, d_ff=5120, num_layers=24, num_heads=32)
XXL = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
_1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
SIZES = {
    "tiny": dict(vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    "small": dict(),
    "base": dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "large": dict(d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    "3b": dict(d_model=1024, d_ff=16384, d_kv=128, num_layers=24, num_heads=32),
    "11b": dict(d_model=1024, d_ff=65536, d_kv=128, num_layers=24, num_heads=128),
    "v1.1-small": SMALL | _1_1,
    "v1.1-base": BASE | _1_1,
    "v1.1-large": LARGE | _1_1,
    "v1.1-xl": XL | _1_1,
    "v1.1-xxl": XXL | _1_1,
}

DERIVED = ("scale_decoder_outputs",)


def build(
    *,
    vocab_size: int = 32128,
    d_model: int = 512,
    d_kv: int = 64,
    d_ff: int = 2048,
    num_layers: int = 6,
    num_decoder_layers: int | None = None,
    num_heads: int = 8,
    relative_attention_num_buckets: int = 32,
    relative_attention_max_distance: int = 128,
    dropout_rate: float = 0.1,
    layer_norm_epsilon: float = 1e-6,
    initializer_factor: float = 1.0,
    feed_forward_proj: str = "relu",
    tie_word_embeddings: bool = True,
    scale_decoder_outputs: bool | None = None,  # whether the states are, before the head; None: where it is tied
    decoder_start_token_id: int = 0,
    pad_token_id: int = 0,
    head: str | None = "seq2seq_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Seq2Seq:
    gate, _, act = feed_forward_proj.rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(f"feed_forward_proj {feed_forward_proj!r} is neither an activation nor 'gated-' and one")
    init = lambda size: normal(initializer_factor * size**-0.5)
    norm, drop = lambda: Norm("rms", layer_norm_epsilon), dropout_rate

    def attention(causal: bool, cross: bool = False) -> Attention:
        return Attention(
            num_heads, d_kv, causal=causal, cross=cross, scale=1.0, dropout=drop, init=init(d_model), q_init=init(d_model * d_kv),
            out_init=init(num_heads * d_kv),
        )  # fmt: skip

    def stack(layers: int, decodes: bool) -> Transformer:
        mlp = Mlp(
            d_ff,
            "gelu_new" if feed_forward_proj == "gated-gelu" else act,
            gated=gate == "gated",
            dropout=drop,
            init=init(d_model),
            out_init=init(d_ff),
        )
        block = Block(attention(decodes), mlp, norm(), cross=attention(False, cross=True) if decodes else None)
        return Transformer(
            embed=Embed(vocab_size, d_model, dropout=drop, dtype=dtype), groups=(Group((block,), layers),), norm=norm(),
            relative=RelativeBias(
                num_heads, relative_attention_num_buckets, relative_attention_max_distance, both_ways=not decodes, init=init(d_model),
            ),
            remat=remat, unroll=unroll,
        )  # fmt: skip

    scaled = tie_word_embeddings if scale_decoder_outputs is None else scale_decoder_outputs
    heads: dict[Any, Head | None] = {
        None: None,
        "embedding": EmbeddingHead(),
        # a head of its own begins where a tied and scaled one does, as in t5x: logits of a size that does not grow with the width
        "seq2seq_lm": LmHead(vocab_size, tie_word_embeddings, init=init(d_model), scale=d_model**-0.5 if scaled else None),
        "question_answering": TokenHead(2, ("start_logits", "end_logits"), init=init(d_model)),
    }
    return Seq2Seq(
        Table(vocab_size, d_model, normal(initializer_factor)), encoder=stack(num_layers, False), head=pick(heads, head, "head"),
        decoder=None if head == "embedding" else stack(num_decoder_layers or num_layers, True), start=decoder_start_token_id, pad=pad_token_id,
    )  # fmt: skip


def settle(config: Mapping[str, Any], files: Container[str]) -> dict[str, Any]:
    """The two fields of a config that transformers settles by the file: it ties the head exactly where there is no table for one, and
    scales by what the config said before."""
    return {
        "tie_word_embeddings": "lm_head.weight" not in files,
        "scale_decoder_outputs": config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
    }


def _layers(side: str, mlp: int, up: Mapping[str, str]) -> dict:
    """The lines of a stack whose layers end with part number `mlp`, of which `up` are the tensors before the activation."""
    theirs, ours = f"{side}.block.{{l}}.layer", f"{side}/blocks"
    parts = [(f"{theirs}.0.SelfAttention", "attention", f"{theirs}.0.layer_norm", "norm1")]
    parts += [(f"{theirs}.1.EncDecAttention", "cross", f"{theirs}.1.layer_norm", "norm_cross")] if mlp == 2 else []
    lines = {}
    for attention, name, norm, norm_name in parts:
        lines |= {f"{attention}.{x}.weight": (f"{ours}/{name}/{x}", "(N H) D -> D N H") for x in "qkv"}
        lines |= {f"{attention}.o.weight": (f"{ours}/{name}/out", "D (N H) -> N H D"), f"{norm}.weight": (f"{ours}/{norm_name}/scale", "D")}
    return {
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (f"{side}/relative/w", "P N"),
        **lines,
        **{f"{theirs}.{mlp}.DenseReluDense.{x}.weight": (f"{ours}/mlp/{leaf}", "F D -> D F") for x, leaf in up.items()},
        f"{theirs}.{mlp}.DenseReluDense.wo.weight": (f"{ours}/mlp/down", "D F -> F D"),
        f"{theirs}.{mlp}.layer_norm.weight": (f"{ours}/norm2/scale", "D"),
        f"{side}.final_layer_norm.weight": (f"{side}/norm/scale", "D"),
    }


PREFIX = ""


def names(config: Mapping[str, Any]) -> dict:
    """The table, which depends on whether the activation is gated."""
    up = {"wi_0": "gate", "wi_1": "up"} if config["feed_forward_proj"].startswith("gated-") else {"wi": "up"}
    return {"shared.weight": ("embed/tokens", "V D"), **_layers("encoder", 1, up), **_layers("decoder", 2, up)}


def heads(name: str) -> dict:
    """The heads of a family whose architectures begin with `name`."""
    return {
        None: (f"{name}Model", {}),
        "embedding": (f"{name}EncoderModel", {}),
        "seq2seq_lm": (f"{name}ForConditionalGeneration", {"lm_head.weight": ("head/w", "V D")}),
        "question_answering": (
            f"{name}ForQuestionAnswering",
            {"qa_outputs.weight": ("head/scores/w", "C D -> D C"), "qa_outputs.bias": ("head/scores/b", "C")},
        ),
    }


HEADS = heads("T5")
UNUSED = {"embedding": (r"decoder\..*", r"lm_head\.weight")}  # what a head may leave lying in the file
BUFFERS = (r"(encoder|decoder)\.embed_tokens\.weight", r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
# is_gated_act and dense_act_fn follow from feed_forward_proj; the encoder alone says that it is no pair
IGNORED = ("classifier_dropout", "is_encoder_decoder", "is_gated_act", "dense_act_fn", "n_positions", "output_past")
FIXED = {"is_decoder": False}
