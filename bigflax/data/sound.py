"""Sound and what is said in it: wav files, or samples, as rows of one length at 16 kHz, and the text to be written for them.

    {"audio": "a.wav" or its bytes, "text": "good morning"}          or "audio": {"array": samples in -1..1, "sampling_rate": 8000}

A model hears spectrograms; they are made of the rows inside of the step (ops.log_mel), on the device. Files are read by the standard library.
Left out on purpose: formats other than PCM in wav, more than one channel (they are averaged), and changes of pitch or speed.
"""

import io
import os
import wave
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bigflax.data.augment import Said, create
from bigflax.data.examples import Read, Shapes, field, text_of, to_write
from bigflax.data.packing import IGNORED, Example
from bigflax.data.sources import Record
from bigflax.data.text import Tokenizer
from bigflax.ops.mel import RATE

START = "<|startoftranscript|>"  # the first of the marks that Whisper's decoder is given; its texts begin with a blank


def transcribed(
    tokenizer: Tokenizer, *, seconds: float = 30.0, target_length: int, sound: str = "audio", text: str = "text", folder: str = "",
    augment: Said = (),
) -> Read:  # fmt: skip
    """waveform float32 [16,000 seconds], cut or followed by silence, labels [target_length]; names of files are below `folder`.

    Of a tokenizer that begins a text with Whisper's marks ("no timestamps", and of several languages which one) also decoder_input_ids
    [target_length]: the marks are read and not learned. `augment` names what is done to the row in training (augment.py): "shift:1600,noise".
    """
    marks, changed = given(tokenizer), create("wave", augment)

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        said = text_of(record, text)
        heard, row = samples(field(record, sound), folder), np.zeros(round(seconds * RATE), np.float32)
        row[: len(heard)] = heard[: len(row)]
        example = {"waveform": row if rng is None else changed(row, rng)}
        if not marks:
            return example | {"labels": to_write(tokenizer, said, target_length)}
        ids = to_write(tokenizer, f" {said.strip()}", target_length + 1)
        before, after = np.where(ids == IGNORED, tokenizer.pad_id, ids)[:-1], np.where(np.arange(len(ids)) < marks, IGNORED, ids)[1:]
        return example | {"decoder_input_ids": before, "labels": after}

    return reader


def given(tokenizer: Tokenizer) -> int:
    """How many tokens a decoder is given before it writes a text: those that the tokenizer puts there, where they are Whisper's; else 0."""
    whole = tokenizer.inner.encode("a")
    return whole.special_tokens_mask.index(0) if whole.tokens[0] == START else 0


def transcribed_shapes(*, seconds: float, target_length: int, batch_size: int) -> Shapes:
    """Shapes and dtypes of a batch of `transcribed`, known without a source; what a tokenizer of marks adds is made of the labels in the step
    where it is not there."""
    waveform = jax.ShapeDtypeStruct((batch_size, round(seconds * RATE)), np.float32)
    return {"waveform": waveform, "labels": jax.ShapeDtypeStruct((batch_size, target_length), np.int32)}


def samples(found: Any, folder: str = "") -> np.ndarray:
    """float32 [n] at 16 kHz of a wav file, its name or its bytes, or of samples and their rate. Raises ValueError for what is none of these."""
    if isinstance(found, Mapping) and "array" in found:
        heard, rate = np.asarray(found["array"], np.float32), int(field(found, "sampling_rate"))
    elif isinstance(found, str | bytes | os.PathLike):
        heard, rate = read_wav(found if isinstance(found, bytes) else os.path.join(folder, found))
    else:
        raise ValueError(f"sound is a wav file or an array with its sampling_rate, not {type(found).__name__}")
    if heard.ndim != 1 or not len(heard) or not np.isfinite(heard).all():
        raise ValueError(f"sound is to be a row of finite samples, not an array of shape {list(heard.shape)}")
    return resample(heard, rate)


def read_wav(source: str | bytes) -> tuple[np.ndarray, int]:
    """(float32 [n] in -1..1, the mean of the channels; samples a second). Raises ValueError where it is no PCM wav file."""
    try:
        with wave.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            width, channels, rate, raw = file.getsampwidth(), file.getnchannels(), file.getframerate(), file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise ValueError(f"{'the sound' if isinstance(source, bytes) else repr(source)} cannot be read as wav: {error}") from error
    bytes_NW = np.frombuffer(raw, np.uint8).reshape(-1, width)
    if width == 1:  # the only kind without a sign
        values = (bytes_NW[:, 0].astype(np.float32) - 128) / 128
    else:
        whole = np.zeros((len(bytes_NW), 4), np.uint8)
        whole[:, 4 - width :] = bytes_NW
        values = whole.view("<i4")[:, 0].astype(np.float32) / 2**31
    return values.reshape(-1, channels).mean(1), rate


def resample(heard: np.ndarray, rate: int, to: int = RATE, *, zeros: int = 16) -> np.ndarray:
    """float32 [ceil(n to / rate)]: band-limited interpolation by a sinc with a Hann window over `zeros` of its zeros on either side; what the lower of
    the two rates cannot carry is left out (Smith and Gossett 1984)."""
    if rate == to:
        return heard
    cutoff = min(1.0, to / rate)
    at = np.arange(-(-len(heard) * to // rate)) * (rate / to)
    reach, out = int(np.ceil(zeros / cutoff)), np.zeros(len(at))
    padded = np.pad(heard, reach)
    for tap in range(1 - reach, reach + 1):
        index = np.floor(at).astype(int) + tap
        away = (at - index) * cutoff
        out += padded[index + reach] * cutoff * np.sinc(away) * np.where(np.abs(away) < zeros, 0.5 + 0.5 * np.cos(np.pi * away / zeros), 0)
    return out.astype(np.float32)
