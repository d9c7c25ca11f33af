"""One tiny config a family, as transformers has it, and inputs for it: shared by the tests that compare with PyTorch and with stored outputs."""

import zlib

import numpy as np

VOCAB, LENGTH, LONGEST = 40, 9, 16
HEADS = (
    "causal_lm",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "discriminator",
    "seq2seq_lm",
    "embedding",
    None,
)
# family -> what it reads where that is not rows of tokens (READERS below); ours alone: families that transformers does not have
READS: dict[str, str] = {"bart": "pairs", "mt5": "pairs", "t5": "pairs", "whisper": "speech"}
OURS_ALONE: set[str] = set()
# family -> fields of its config; 3 layers, so that no other number is taken for theirs
COMMON = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=44, max_position_embeddings=LONGEST)
DECODER = dict(**COMMON, num_key_value_heads=2)
rope = lambda **more: dict(rope_parameters=dict(rope_type="default", rope_theta=1000.0) | more)
LOCAL = ["sliding_attention", "sliding_attention", "full_attention"]
SIDES = dict(layers=3, attention_heads=4, ffn_dim=44)
PAIR = dict(d_model=24, **{f"{side}_{field}": n for side in ("encoder", "decoder") for field, n in SIDES.items()}) | dict(decoder_layers=2)
T5 = dict(
    d_model=24, d_kv=5, d_ff=44, num_layers=3, num_decoder_layers=2, num_heads=4, relative_attention_num_buckets=8,
    relative_attention_max_distance=12, decoder_start_token_id=0,
)  # fmt: skip
FAMILIES = {
    "bart": dict(PAIR, max_position_embeddings=LONGEST, scale_embedding=True, decoder_start_token_id=2),
    "bert": COMMON,
    "distilbert": dict(dim=24, n_layers=3, n_heads=4, hidden_dim=44, max_position_embeddings=LONGEST),
    "electra": dict(COMMON, embedding_size=12),
    "gemma": dict(**DECODER, head_dim=8, **rope()),
    "gemma2": dict(
        DECODER, head_dim=8, num_hidden_layers=5, sliding_window=4, query_pre_attn_scalar=10, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
    "gemma3_text": dict(
        DECODER, head_dim=8, num_hidden_layers=8, sliding_window=4, query_pre_attn_scalar=10, layer_types=[*LOCAL, *LOCAL, *LOCAL[:2]],
        rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=100.0),
            full_attention=dict(rope_type="linear", factor=2.0, rope_theta=1000.0)),
    ),
    "gpt2": dict(n_embd=24, n_layer=3, n_head=4, n_positions=LONGEST),
    "gpt_neox": dict(COMMON, hidden_size=32, **rope(partial_rotary_factor=0.5)),
    "llama": dict(
        DECODER, **rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8),
    ),
    "mistral": dict(DECODER, sliding_window=4),
    "mt5": T5,
    "olmo2": DECODER,
    "opt": dict(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, ffn_dim=44, max_position_embeddings=LONGEST, word_embed_proj_dim=24,
    ),
    "phi3": dict(DECODER, hidden_size=32, sliding_window=5, **rope(partial_rotary_factor=0.5)),
    "qwen2": dict(DECODER, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": dict(DECODER, head_dim=8),
    "roberta": dict(COMMON, max_position_embeddings=LONGEST + 1),
    "t5": T5,
    "whisper": dict(PAIR, num_mel_bins=10, max_source_positions=7, max_target_positions=LONGEST, decoder_start_token_id=1),
    "xlm-roberta": dict(COMMON, max_position_embeddings=LONGEST + 1),
}  # fmt: skip
LABELS = 5


def torch_model(family, head):
    """A model of transformers in evaluation mode, every weight drawn by its name (a bias that is forgotten must be missed)."""
    import torch
    import transformers

    from bigflax import models

    labels = 2 if head == "question_answering" else LABELS  # start and end
    words = READS.get(family, "tokens") in ("tokens", "pairs", "speech")
    tokens = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2) if words else {}
    config = transformers.CONFIG_MAPPING[family](**{**tokens, "num_labels": labels, **FAMILIES[family]})
    model = getattr(transformers, models.family(family).HEADS[head][0])(config).eval()
    with torch.no_grad():
        for name, w in [*model.named_parameters(), *((name, w) for name, w in model.named_buffers() if name == "final_logits_bias")]:
            w.copy_(torch.from_numpy(drawn(name, tuple(w.shape))))
    return model


def drawn(name, shape):
    """float32 numbers that are a function of a tensor's name: around one for the scales of norms, around zero for all else."""
    for module, file in {
        "embed_out": "lm_head",
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    }.items():  # other names than in files
        name = name.replace(module, file)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    is_scale = len(shape) == 1 and name.endswith("weight")
    return (rng.normal(size=shape) * 0.2 + is_scale).astype(np.float32)


def kinds(family):
    """The kinds of inputs that a family is tried with."""
    return READERS[READS.get(family, "tokens")][1]


def inputs(family, kind="plain"):
    """(inputs by name, masks [B, T] of what is real: outputs of that shape are compared there alone)."""
    rng = np.random.default_rng(zlib.crc32(f"{family} {kind}".encode()))
    return READERS[READS.get(family, "tokens")][0](family, kind, rng)


def _tokens(family, kind, rng):
    length = LONGEST if kind == "longest" else LENGTH
    ids, real = rng.integers(3, VOCAB, (3, length)), np.ones((3, length), bool)
    if kind.startswith("padded"):
        for row, n in enumerate((length, 4, 6)):
            real[row, (slice(n, None) if kind.endswith("right") else slice(0, length - n))] = False
        ids = np.where(real, ids, 0)
    given = {"input_ids": ids, "attention_mask": real.astype(np.int64)}
    if kind == "padded left":
        given["position_ids"] = np.maximum(real.cumsum(1) - 1, 0)
    if family in ("bert", "electra", "roberta"):
        given["token_type_ids"] = rng.integers(0, 2, ids.shape)
    return given, [real]


def _pairs(family, kind, rng):
    """Rows for the encoder, and for the decoder shorter ones; BART's are as long, for its classifier looks where the encoder reads eos."""
    given, (real,) = _tokens(family, kind, rng)
    if family == "bart":
        given["input_ids"] = np.where(real & (real[:, ::-1].cumsum(1)[:, ::-1] == 1), 2, given["input_ids"])
    given.pop("position_ids", None)
    length, side = real.shape[1] - (0 if family == "bart" else 2), slice(None) if kind != "padded left" else slice(None, None, -1)
    decoded = real[:, side][:, :length][:, side]
    ids = np.where(decoded, rng.integers(3, VOCAB, decoded.shape), 0)
    return given | {"decoder_input_ids": ids, "decoder_attention_mask": decoded.astype(np.int64)}, [real, decoded]


def _speech(family, kind, rng):
    """Spectrograms as long as the model's table of positions, and rows of tokens."""
    given, (real,) = _tokens(family, kind, rng)
    sound = rng.normal(size=(3, 10, 14)).astype(np.float32)
    return {"input_features": sound, "decoder_input_ids": given["input_ids"], "decoder_attention_mask": given["attention_mask"]}, [real]


# what a family reads -> (maker of inputs, their kinds)
READERS = {
    "tokens": (_tokens, ("plain", "padded right", "padded left", "longest")),
    "pairs": (_pairs, ("plain", "padded right", "padded left", "longest")),
    "speech": (_speech, ("plain", "padded right", "longest")),
}


def masked(x, reals):
    """The array with zeros where nothing real is."""
    x = np.asarray(x, np.float32)
    for real in reals:
        if x.shape[:2] == real.shape:
            return np.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)
    return x


SCORES = ("logits", "start_logits", "end_logits")


def outputs(out):
    """The names of what a model gives that is to be compared; tuples are states of the layers."""
    return [name for name in out if name not in ("cache", "head") and (name != "last_hidden_state" or not {*out} & {*SCORES})]


def labels_for(out):
    """Random targets for the outputs that a loss is taken of."""
    rng = np.random.default_rng(0)
    trained = [name for name in SCORES if name in out] or [name for name in ("last_hidden_state", "pooler_output") if name in out]
    return {name: rng.normal(size=out[name].shape).astype(np.float32) for name in trained}


def load_tensors(folder):
    """Every tensor of a folder's safetensors."""
    from pathlib import Path

    from safetensors.numpy import load_file

    return {name: w for file in sorted(Path(folder).glob("*.safetensors")) for name, w in load_file(file).items()}
