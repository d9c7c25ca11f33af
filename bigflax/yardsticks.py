"""Yardsticks: what well-known compressors and a counting model make of the same held-out text, in bits per byte.

A language model's bits per byte stands beside these, so that "the loss fell" is measured against something outside of the run.
Left out on purpose: PPM and context mixing, which beat them all and take longer than the training does.
"""

import lzma
import zlib

import numpy as np


def gzip_bits_per_byte(text: bytes) -> float:
    """Deflate at level 9 over the whole text, as `gzip -9` writes it, without the file header."""
    return 8 * len(zlib.compress(text, 9)) / max(1, len(text))


def xz_bits_per_byte(text: bytes) -> float:
    """LZMA2 at preset 9 over the whole text, as `xz -9` writes it."""
    return 8 * len(lzma.compress(text, preset=9)) / max(1, len(text))


def ngram_bits_per_byte(train: bytes, held_out: bytes, order: int = 3) -> float:
    """A byte model of the given order, counted on `train` and scored on `held_out`.

    Interpolated by Witten-Bell: p(c | h) = (n(h c) + t(h) p(c | h')) / (n(h) + t(h)), with t(h) the number of different bytes seen after h
    and h' one byte shorter; below all, the uniform 1/256. (Bell, Cleary & Witten 1990, "Text Compression", chapter 5.)
    """
    if not 1 <= order <= 3:
        raise ValueError(f"order {order} is not 1, 2 or 3: the counts of longer contexts do not fit a plain table")
    seen, new = np.frombuffer(train, np.uint8).astype(np.int64), np.frombuffer(held_out, np.uint8).astype(np.int64)
    probability = np.full(len(new), 1 / 256)
    for length in range(1, order + 1):
        counts = np.bincount(_codes(seen, length), minlength=256**length)
        table = counts.reshape(-1, 256)
        total, kinds = table.sum(1), (table > 0).sum(1)
        codes = _codes(new, length)
        context = codes // 256
        first = length - 1  # the bytes before have no context of this length and keep the shorter one's estimate
        n, t = total[context], kinds[context]
        with_seen = (counts[codes] + t * probability[first:]) / np.maximum(n + t, 1)
        probability[first:] = np.where(n > 0, with_seen, probability[first:])
    return float(-np.log2(probability).mean()) if len(new) else 0.0


def _codes(text: np.ndarray, length: int) -> np.ndarray:
    """Each run of `length` bytes as one number, base 256."""
    codes = np.zeros(max(0, len(text) - length + 1), np.int64)
    for i in range(length):
        codes = codes * 256 + text[i : len(text) - length + 1 + i]
    return codes
