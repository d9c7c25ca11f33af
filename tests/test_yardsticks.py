"""Yardsticks against their definitions."""

import math

import numpy as np
import pytest

from bigflax import yardsticks

TEXT = b"def f(x):\n    return x + 1\n" * 40


def witten_bell(train: bytes, held: bytes, order: int) -> float:
    """The recursion as the book writes it, one byte at a time."""

    def p(c, h):
        shorter = p(c, h[1:]) if h else 1 / 256
        after = [train[i + len(h)] for i in range(len(train) - len(h)) if train[i : i + len(h)] == h]
        return (after.count(c) + len(set(after)) * shorter) / (len(after) + len(set(after))) if after else shorter

    return -np.mean([math.log2(p(c, held[max(0, i - order + 1) : i])) for i, c in enumerate(held)])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_is_the_recursion(order):
    train, held = TEXT[:150] + b"zebra", b"def g(y): return zz\x00"
    assert yardsticks.ngram_bits_per_byte(train, held, order) == pytest.approx(witten_bell(train, held, order), rel=1e-12)


def test_ngram_is_a_distribution():
    """Over all next bytes the probabilities sum to one."""
    bits = [len(TEXT[:60] + bytes([c])) * yardsticks.ngram_bits_per_byte(TEXT, TEXT[:60] + bytes([c])) for c in range(256)]
    base = 60 * yardsticks.ngram_bits_per_byte(TEXT, TEXT[:60])
    assert sum(2 ** -(b - base) for b in bits) == pytest.approx(1.0, rel=1e-6)


def test_order_out_of_range():
    with pytest.raises(ValueError, match="order 4"):
        yardsticks.ngram_bits_per_byte(b"a", b"a", 4)


@pytest.mark.parametrize("measure", [yardsticks.gzip_bits_per_byte, yardsticks.xz_bits_per_byte])
def test_compressors_tell_order_from_noise(measure):
    noise = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
    assert measure(TEXT) < 2 < 8 <= measure(noise) < 8.3
