"""One tiny config a family, as transformers has it, and inputs for it: shared by the tests that compare with PyTorch and with stored outputs."""

import tempfile
import zlib
from pathlib import Path

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
    "image_classification",
    "image_classification_with_teacher",
    None,
)
# family -> what it reads where that is not rows of tokens (READERS below); ours alone: families that transformers does not have
READS: dict[str, str] = {
    **dict.fromkeys(("bart", "mt5", "t5"), "pairs"),
    **dict.fromkeys(("cnn", "convnext", "deit", "mobilenet_v2", "resnet", "vit"), "images"),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), "images of any size"),
    **dict.fromkeys(("clip", "siglip"), "image and text"),
    "whisper": "speech",
}
OURS_ALONE: set[str] = {"cnn", "rnn"}
# family -> fields of its config; 3 layers, so that no other number is taken for theirs
COMMON = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=44, max_position_embeddings=LONGEST)
DECODER = dict(**COMMON, num_key_value_heads=2)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, output_router_logits=True)
rope = lambda **more: dict(rope_parameters=dict(rope_type="default", rope_theta=1000.0) | more)
MODERN_ROPE = dict(
    rope_parameters={f"{kind}_attention": dict(rope_type="default", rope_theta=t) for kind, t in (("full", 500.0), ("sliding", 50.0))}
)
# images that are neither square nor cut without a rest
VISION = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=44, image_size=(12, 17), patch_size=4)
DINO = dict({k: v for k, v in VISION.items() if k != "intermediate_size"}, mlp_ratio=2, image_size=13, layerscale_value=0.5)
TOWERS = dict(  # of different widths and lengths
    text_config=dict(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=36, max_position_embeddings=LONGEST, vocab_size=VOCAB
    ),
    vision_config=dict(VISION, image_size=13),
)
END = 3  # of a text, in the family that looks for it
towers = lambda **text: dict(text_config=dict(TOWERS["text_config"], **text), vision_config=TOWERS["vision_config"])
LOCAL = ["sliding_attention", "sliding_attention", "full_attention"]
SIDES = dict(layers=3, attention_heads=4, ffn_dim=44)
PAIR = dict(d_model=24, **{f"{side}_{field}": n for side in ("encoder", "decoder") for field, n in SIDES.items()}) | dict(decoder_layers=2)
T5 = dict(
    d_model=24, d_kv=5, d_ff=44, num_layers=3, num_decoder_layers=2, num_heads=4, relative_attention_num_buckets=8,
    relative_attention_max_distance=12, decoder_start_token_id=0,
)  # fmt: skip
FAMILIES = {
    "albert": dict(COMMON, embedding_size=12),
    "bart": dict(PAIR, max_position_embeddings=LONGEST, scale_embedding=True, decoder_start_token_id=2),
    "bert": COMMON,
    "cnn": dict(num_channels=3, image_size=32, hidden_sizes=[6, 10], dense_size=12),
    "convnext": dict(num_stages=3, hidden_sizes=[8, 12, 20], depths=[1, 3, 2], layer_scale_init_value=0.5, layer_norm_eps=0.01),
    "clip": dict(**towers(eos_token_id=END, pad_token_id=0, bos_token_id=1), projection_dim=20),
    "deit": VISION,
    "dinov2": DINO,
    "dinov2_with_registers": dict(DINO, use_swiglu_ffn=True, num_register_tokens=2),
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
    "mixtral": dict(DECODER, num_local_experts=4, sliding_window=4, output_router_logits=True),
    "modernbert": dict(COMMON, num_hidden_layers=5, local_attention=7, **MODERN_ROPE),
    "mobilenet_v2": dict(depth_multiplier=0.25, output_stride=16),
    "mt5": T5,
    "olmo2": DECODER,
    "opt": dict(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, ffn_dim=44, max_position_embeddings=LONGEST, word_embed_proj_dim=24,
    ),
    "phi3": dict(DECODER, hidden_size=32, sliding_window=5, **rope(partial_rotary_factor=0.5)),
    "qwen2": dict(DECODER, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen2_moe": dict(DECODER, **EXPERTS, shared_expert_intermediate_size=28, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": dict(DECODER, head_dim=8),
    "qwen3_moe": dict(DECODER, **EXPERTS, head_dim=8, norm_topk_prob=True),
    "resnet": dict(embedding_size=6, hidden_sizes=[8, 12, 20], depths=[1, 3, 2]),
    "rnn": dict(embedding_size=12, hidden_size=20, num_hidden_layers=3),
    "roberta": dict(COMMON, max_position_embeddings=LONGEST + 1),
    "smollm3": dict(DECODER, num_hidden_layers=5, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=4, **rope()),
    "siglip": towers(projection_size=24, eos_token_id=2, pad_token_id=0, bos_token_id=1),
    "vit": VISION,
    "t5": T5,
    "whisper": dict(PAIR, num_mel_bins=10, max_source_positions=7, max_target_positions=LONGEST, decoder_start_token_id=1),
    "xlm-roberta": dict(COMMON, max_position_embeddings=LONGEST + 1),
}  # fmt: skip
# "family, what" -> head, fields of its config: what else of a family is compared, on outputs and on what is written
_BIASES = dict(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True)
VARIANTS = {
    "llama, linear": ("causal_lm", dict(DECODER, **rope(rope_type="linear", factor=4.0))),
    "llama, dynamic": ("causal_lm", dict(DECODER, **rope(rope_type="dynamic", factor=4.0))),
    "llama, yarn": ("causal_lm", dict(DECODER, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=8))),
    "llama, biases": ("causal_lm", dict(DECODER, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "modernbert, biases and the mean": ("sequence_classification", dict(FAMILIES["modernbert"], **_BIASES, classifier_pooling="mean")),
    "modernbert, biases": ("masked_lm", dict(FAMILIES["modernbert"], **_BIASES)),
    "qwen2_moe, normalized": (
        "causal_lm",
        dict(DECODER, **EXPERTS, shared_expert_intermediate_size=28, norm_topk_prob=True, qkv_bias=False),
    ),
}
LABELS = 5


def torch_model(name, head):
    """A model of transformers in evaluation mode, every weight drawn by its name in the file (a bias that is forgotten must be missed)."""
    import transformers
    from safetensors.numpy import save_file

    from bigflax import models

    family, fields = name.partition(",")[0], VARIANTS[name][1] if name in VARIANTS else FAMILIES[name]
    labels = 2 if head == "question_answering" else LABELS  # start and end
    words = READS.get(family, "tokens") in ("tokens", "pairs", "speech")
    tokens = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2) if words else {}
    config = transformers.CONFIG_MAPPING[family](**{**tokens, "num_labels": labels, **fields})
    kind = getattr(transformers, models.family(family).HEADS[head][0])
    with tempfile.TemporaryDirectory() as folder:
        kind(config).save_pretrained(folder)
        for file in Path(folder).glob("*.safetensors"):
            save_file({name: drawn(name, w.shape) for name, w in load_tensors(folder).items()}, file, metadata={"format": "pt"})
        model = kind.from_pretrained(folder).eval()
    for name, w in kind(config).named_parameters():  # loading forgets what does not learn: Whisper's fixed positions
        model.get_parameter(name).requires_grad_(w.requires_grad)
    return model


def drawn(name, shape):
    """float32 numbers that are a function of a tensor's name: around one for the scales of norms, around zero for all else."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.asarray(rng.integers(1, 9), np.int64)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 2.0, shape).astype(np.float32)
    is_scale = len(shape) == 1 and name.endswith("weight")
    return np.asarray(rng.normal(size=shape) * 0.2 + is_scale, np.float32)


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
    if family in ("albert", "bert", "electra", "roberta"):
        given["token_type_ids"] = rng.integers(0, 2, ids.shape)
    return given, [real]


def _images(family, kind, rng):
    size = dict(FAMILIES[family].get("vision_config", FAMILIES[family])).get("image_size", 32)
    height, width = (size, size) if isinstance(size, int) else size
    height, width = {"larger": (2 * height, 3 * width), "smaller": (height - 4, width)}.get(kind, (height, width))
    return {"pixel_values": rng.normal(size=(3, 3, height, width)).astype(np.float32)}, []


def _image_and_text(family, kind, rng):
    given, reals = _tokens(family, kind, rng)
    length = reals[0].sum(1)
    given["input_ids"] = np.where(given["input_ids"] == END, END + 1, given["input_ids"])
    given["input_ids"][np.arange(3), length - 1] = END
    return given | _images(family, kind, rng)[0], reals


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
    "tokens": (_tokens, ("plain", "padded right", "padded left", "longest")), "images": (_images, ("plain",)),
    "images of any size": (_images, ("plain", "larger", "smaller")), "image and text": (_image_and_text, ("plain", "padded right")),
    "pairs": (_pairs, ("plain", "padded right", "padded left", "longest")), "speech": (_speech, ("plain", "padded right", "longest")),
}  # fmt: skip


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
    states = ("last_hidden_state", "pooler_output", "text_embeds", "image_embeds", "logits_per_text")
    trained = [name for name in SCORES if name in out] or [name for name in states if name in out]
    return {name: rng.normal(size=out[name].shape).astype(np.float32) for name in trained}


def load_tensors(folder):
    """Every tensor of a folder's safetensors."""
    from safetensors.numpy import load_file

    return {name: w for file in sorted(Path(folder).glob("*.safetensors")) for name, w in load_file(file).items()}
