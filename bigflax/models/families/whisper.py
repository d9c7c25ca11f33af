"""Whisper: speech to text. Two convolutions over a spectrogram, norms before each part, keys without a bias. Radford et al. 2022 (arXiv 2212.04356).

Arguments are the fields of the Hugging Face config (`model_type` "whisper"), with its defaults.
"""

from typing import Any

from bigflax.models.families.bart import layers
from bigflax.models.families.bert import norm_lines
from bigflax.models.heads import Head, LmHead
from bigflax.models.seq2seq import Seq2Seq, Table
from bigflax.models.speech import MelEmbed
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import head_width, normal, pick


def _size(width: int, layers: int, **more: Any) -> dict:
    both = dict(layers=layers, attention_heads=width // 64, ffn_dim=4 * width)
    return {"d_model": width, **{f"{side}_{field}": value for side in ("encoder", "decoder") for field, value in both.items()}, **more}


SIZES = {
    "tiny": _size(64, 2, vocab_size=256, num_mel_bins=16, max_source_positions=64, max_target_positions=128)
    | dict(encoder_attention_heads=4, decoder_attention_heads=4),
    "whisper-tiny": _size(384, 4),
    "whisper-base": _size(512, 6),
    "whisper-small": _size(768, 12),
    "whisper-medium": _size(1024, 24),
    "whisper-large-v3": _size(1280, 32, vocab_size=51866, num_mel_bins=128),
}


def build(
    *,
    vocab_size: int = 51865,
    num_mel_bins: int = 80,
    encoder_layers: int = 4,
    encoder_attention_heads: int = 6,
    encoder_ffn_dim: int = 1536,
    decoder_layers: int = 4,
    decoder_attention_heads: int = 6,
    decoder_ffn_dim: int = 1536,
    activation_function: str = "gelu",
    d_model: int = 384,
    dropout: float = 0.0,
    init_std: float = 0.02,
    max_source_positions: int = 1500,
    max_target_positions: int = 448,
    tie_word_embeddings: bool = True,
    decoder_start_token_id: int = 50257,
    pad_token_id: int = 50256,
    head: str | None = "seq2seq_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Seq2Seq:
    init, norm = normal(init_std), lambda: Norm("layer", 1e-5)

    def attention(heads: int, causal: bool, cross: bool = False) -> Attention:
        return Attention(
            heads,
            head_width(d_model, heads),
            causal=causal,
            cross=cross,
            bias=True,
            k_bias=False,
            dropout=dropout,
            init=init,
            out_init=init,
        )

    def stack(embed: Any, layers: int, heads: int, width: int, decodes: bool) -> Transformer:
        mlp = Mlp(width, activation_function, bias=True, dropout=dropout, init=init, out_init=init)
        block = Block(attention(heads, decodes), mlp, norm(), cross=attention(heads, False, cross=True) if decodes else None)
        return Transformer(embed=embed, groups=(Group((block,), layers),), norm=norm(), remat=remat, unroll=unroll)

    hears = MelEmbed(num_mel_bins, d_model, max_source_positions, dropout, dtype, init)
    reads = Embed(vocab_size, d_model, positions=max_target_positions, dropout=dropout, dtype=dtype, init=init)
    heads: dict[Any, Head | None] = {None: None, "seq2seq_lm": LmHead(vocab_size, tie_word_embeddings, init=init)}
    return Seq2Seq(
        Table(vocab_size, d_model, init), encoder=stack(hears, encoder_layers, encoder_attention_heads, encoder_ffn_dim, False),
        decoder=stack(reads, decoder_layers, decoder_attention_heads, decoder_ffn_dim, True), head=pick(heads, head, "head"),
        start=decoder_start_token_id, pad=pad_token_id,
    )  # fmt: skip


PREFIX = "model."
NAMES = {
    "decoder.embed_tokens.weight": ("embed/tokens", "V D"),
    "decoder.embed_positions.weight": ("decoder/embed/positions", "P D"),
    "encoder.embed_positions.weight": ("encoder/embed/positions", "P D"),
    **{f"encoder.conv{i}.weight": (f"encoder/embed/conv{i}/w", "D C W -> W C D") for i in (1, 2)},
    **{f"encoder.conv{i}.bias": (f"encoder/embed/conv{i}/b", "D") for i in (1, 2)},
    **layers("encoder", "qv"),
    **layers("decoder", "qv"),
    **norm_lines("encoder.layer_norm", "encoder/norm"),
    **norm_lines("decoder.layer_norm", "decoder/norm"),
}
HEADS = {
    None: ("WhisperModel", {}),
    "seq2seq_lm": ("WhisperForConditionalGeneration", {"proj_out.weight": ("head/w", "V D")}),
}
BUFFERS = (r"proj_out\.weight",)
# Dropout of attention weights and of layers is not done, nor is the masking of spectrograms; the rest speaks of generation and of other heads.
IGNORED = (
    "attention_dropout", "activation_dropout", "(en|de)coder_layerdrop", "apply_spec_augment", "mask_.*", "(begin_)?suppress_tokens",
    "forced_decoder_ids", "median_filter_width", "classifier_proj_size", "use_weighted_layer_sum", "num_hidden_layers",
)  # fmt: skip
FIXED = {"is_encoder_decoder": True, "scale_embedding": False}
