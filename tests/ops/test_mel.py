"""Spectrograms against Whisper's own extractor, where transformers is there, and against its stored numbers; python tests/ops/test_mel.py writes them."""

from pathlib import Path

import jax
import numpy as np
import pytest

from bigflax.ops.mel import RATE, log_mel, mel_filters

GOLDEN = Path(__file__).parent / "golden" / "mel.npz"
CLOSE = 1e-4  # of features of size 1: float32 against float64


def speech(seconds):
    """Two rows like speech: a gliding voice with harmonics under formants, in syllables, breath between them; the second lower and noisier."""
    rng, t, rows = np.random.default_rng(0), np.arange(round(seconds * RATE)) / RATE, []
    for pitch, noise in ((180, 0.002), (95, 0.02)):
        phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.15 * np.sin(2 * np.pi * 0.7 * t))) / RATE
        voice = sum(np.exp(-(((k * pitch - 600) / 500) ** 2)) * np.sin(k * phase) + np.sin(k * phase) / k**2 for k in range(1, 30))
        syllables = np.clip(np.sin(2 * np.pi * 3 * t), 0, 1) ** 0.5
        rows.append(0.1 * voice * syllables + noise * rng.normal(size=t.shape))
    return np.stack(rows).astype(np.float32)


def reference(waveform, mels, seconds):
    """By the NumPy path of transformers' extractor: rows are cut or filled up, then taken as they are."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=mels)
    fixed = np.zeros((len(waveform), round(seconds * RATE)), np.float32)
    fixed[:, : waveform.shape[1]] = waveform[:, : fixed.shape[1]]
    return extractor._np_extract_fbank_features(fixed, "cpu")


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("seconds", [1.0, 2.5, 3.0], ids=["cut", "as long", "silence behind"])
def test_it_is_what_whisper_hears(mels, seconds):
    waveform = speech(2.5)
    got = jax.jit(log_mel, static_argnames=("mels", "seconds"))(waveform, mels=mels, seconds=seconds)
    assert got.shape == (2, mels, 100 * seconds) and got.dtype == np.float32
    np.testing.assert_allclose(got, reference(waveform, mels, seconds), rtol=0, atol=CLOSE)


def test_thirty_seconds_as_stored():
    got = np.asarray(jax.jit(log_mel)(speech(2.5)))
    assert got.shape == (2, 80, 3000)
    stored = np.load(GOLDEN)
    np.testing.assert_allclose(got[:, :, stored["frames"]], stored["features"], rtol=0, atol=CLOSE)


def test_filters_are_triangles_of_area_one():
    """In Hz: 40 Hz between two frequencies. Below 1 kHz the 80 are narrower than that, and some catch little."""
    filters = mel_filters(80)
    assert filters.shape == (201, 80) and (filters >= 0).all()
    np.testing.assert_allclose(filters[:, 50:].sum(0) * 40, 1, atol=0.1)
    peaks = filters.argmax(0)
    assert (np.diff(peaks) >= 0).all() and (np.diff(peaks[40:]) > 0).all()


MISTAKES = {
    "one row without its axis": (lambda: log_mel(np.zeros(400)), r"\[B, samples\] at 16 kHz of one channel, not \[400\]"),
    "half a frame": (lambda: log_mel(np.zeros((1, 400)), seconds=0.005), "0.005 seconds are not a whole number of frames"),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


if __name__ == "__main__":
    frames = np.arange(0, 300, 11)
    np.savez_compressed(GOLDEN, frames=frames, features=reference(speech(2.5), 80, 30)[:, :, frames].astype(np.float32))
