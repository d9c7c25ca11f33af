"""BART: an encoder-decoder with learned positions whose tables begin two rows early, and norms after each part. Lewis et al. 2019 (arXiv 1910.13461).

Arguments are the fields of the Hugging Face config (`model_type` "bart"), with its defaults.
"""

from typing import Any

from bigflax.models.families.bert import layer, norm_lines
from bigflax.models.heads import Head, LmHead, SequenceHead, TokenHead
from bigflax.models.seq2seq import Seq2Seq, Table
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import head_width, normal, pick

SIZES = {
    "tiny": dict(
        vocab_size=256, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, max_position_embeddings=128,
    ),
    "base": dict(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12, encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
    ),
    "large": dict(),
    "large-cnn": dict(vocab_size=50264),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 50265,
    max_position_embeddings: int = 1024,
    encoder_layers: int = 12,
    encoder_ffn_dim: int = 4096,
    encoder_attention_heads: int = 16,
    decoder_layers: int = 12,
    decoder_ffn_dim: int = 4096,
    decoder_attention_heads: int = 16,
    activation_function: str = "gelu",
    d_model: int = 1024,
    dropout: float = 0.1,
    init_std: float = 0.02,
    classifier_dropout: float = 0.0,
    scale_embedding: bool = False,
    tie_word_embeddings: bool = True,
    decoder_start_token_id: int = 2,
    pad_token_id: int = 1,
    eos_token_id: int = 2,
    head: str | None = "seq2seq_lm",
    num_labels: int = 3,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Seq2Seq:
    init, norm = normal(init_std), lambda: Norm("layer", 1e-5)

    def attention(heads: int, causal: bool, cross: bool = False) -> Attention:
        return Attention(
            heads, head_width(d_model, heads), causal=causal, cross=cross, bias=True, dropout=dropout, init=init, out_init=init
        )

    def stack(layers: int, heads: int, width: int, decodes: bool) -> Transformer:
        mlp = Mlp(width, activation_function, bias=True, dropout=dropout, init=init, out_init=init)
        cross = attention(heads, False, cross=True) if decodes else None
        return Transformer(
            embed=Embed(
                vocab_size, d_model, positions=max_position_embeddings, first_position=2, scale=d_model**0.5 if scale_embedding else None,
                norm=norm(), dropout=dropout, dtype=dtype, init=init,
            ),
            groups=(Group((Block(attention(heads, decodes), mlp, norm(), order="post", cross=cross),), layers),), remat=remat, unroll=unroll,
        )  # fmt: skip

    heads: dict[Any, Head | None] = {
        None: None,
        "seq2seq_lm": LmHead(vocab_size, tie_word_embeddings, init=init, bias=True),
        "sequence_classification": SequenceHead(num_labels, "last", act="tanh", dropout=classifier_dropout, init=init),
        "question_answering": TokenHead(2, ("start_logits", "end_logits"), init=init),
    }
    return Seq2Seq(
        Table(vocab_size, d_model, init), encoder=stack(encoder_layers, encoder_attention_heads, encoder_ffn_dim, False),
        decoder=stack(decoder_layers, decoder_attention_heads, decoder_ffn_dim, True), head=pick(heads, head, "head"),
        start=decoder_start_token_id, pad=pad_token_id, eos=eos_token_id,
    )  # fmt: skip


def layers(side: str, biased: str = "qkv") -> dict:
    """The lines of the encoder's or the decoder's layers; `biased` are the projections with a bias."""
    parts, lines = {"self_attn": ("attention", "norm1")} | ({"encoder_attn": ("cross", "norm_cross")} if side == "decoder" else {}), {}
    theirs, ours = f"{side}.layers.{{l}}", f"{side}/blocks"
    for part, (name, norm) in parts.items():
        lines |= {f"{theirs}.{part}.{x}_proj.weight": (f"{ours}/{name}/{x}", "(N H) D -> D N H") for x in "qkv"}
        lines |= {f"{theirs}.{part}.{x}_proj.bias": (f"{ours}/{name}/{x}_bias", "(N H) -> N H") for x in biased}
        lines[f"{theirs}.{part}.out_proj.weight"] = (f"{ours}/{name}/out", "D (N H) -> N H D")
        lines[f"{theirs}.{part}.out_proj.bias"] = (f"{ours}/{name}/out_bias", "D")
        lines |= norm_lines(f"{theirs}.{part}_layer_norm", f"{ours}/{norm}")
    for fc, leaf, pattern in (("fc1", "up", "F D -> D F"), ("fc2", "down", "D F -> F D")):
        lines |= {f"{theirs}.{fc}.weight": (f"{ours}/mlp/{leaf}", pattern), f"{theirs}.{fc}.bias": (f"{ours}/mlp/{leaf}_bias", pattern[0])}
    return lines | norm_lines(f"{theirs}.final_layer_norm", f"{ours}/norm2")


def _stack(side: str) -> dict:
    return {
        f"{side}.embed_positions.weight": (f"{side}/embed/positions", "P D"),
        **norm_lines(f"{side}.layernorm_embedding", f"{side}/embed/norm"),
        **layers(side),
    }


PREFIX = "model."
NAMES = {"shared.weight": ("embed/tokens", "V D"), **_stack("encoder"), **_stack("decoder")}
HEADS = {
    None: ("BartModel", {}),
    "seq2seq_lm": ("BartForConditionalGeneration", {"final_logits_bias": ("head/bias", "Z V"), "lm_head.weight": ("head/w", "V D")}),
    "sequence_classification": (
        "BartForSequenceClassification",
        {**layer("classification_head.dense", "head/dense"), **layer("classification_head.out_proj", "head/scores")},
    ),
    "question_answering": ("BartForQuestionAnswering", layer("qa_outputs", "head/scores")),
}
BUFFERS = (r"(encoder|decoder)\.embed_tokens\.weight", r"(encoder|decoder)\.version")
# Dropout of attention weights and of layers is not done; what a config says of generation is generation_config.json's.
IGNORED = (
    "attention_dropout", "activation_dropout", "(en|de)coder_layerdrop", "forced_[be]os_token_id", "num_beams", "min_length", "length_penalty",
    "no_repeat_ngram_size", "early_stopping", "num_hidden_layers", "classif_dropout", "save_step", "extra_pos_embeddings",
    "output_past", "force_bos_token_to_be_generated", "_num_labels",
)  # fmt: skip
FIXED = {
    "is_encoder_decoder": True, "normalize_before": False, "add_final_layer_norm": False, "add_bias_logits": False, "normalize_embedding": True,
    "static_position_embeddings": False,
}  # fmt: skip
