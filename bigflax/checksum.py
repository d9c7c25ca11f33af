"""Checksums of arrays that lie in pieces, on any mesh and any number of processes.

The checksum of an array whose bit patterns, as words of at most 32 bits in row-major order, are b_0 ... b_n:

    sum_i mix(b_i) (K i + 1)  mod 2^32,     mix(b) = m ^ (m >> 15),  m = M b mod 2^32

M is odd and K even, so mix is a bijection and every factor is odd: one changed word always changes the sum. Other damage (a block of
zeros, two rows exchanged) escapes with probability 2^-32. As a sum over words it can be taken piece by piece: each process adds up
the shards that it holds, and the total does not depend on how the array was laid out.

Source of the constants: the finalizer of MurmurHash3 (Appleby, 2011).
Left out on purpose: protection against an adversary, who needs a cryptographic hash of files.
"""

import functools
import math

import numpy as np

MIX, STEP = 0x85EBCA6B, (2 * 0xC2B2AE35) % 2**32
PIECE = 2**16  # words at a time: they and their temporaries stay in the second-level cache


def checksum(block: np.ndarray, start: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> int:
    """What `block`, which lies at index `start` of an array of `shape`, adds to the checksum of that array; by default it is all of it.

    In a row from word i on: sum_c m_c (K (i + c) + 1) = (K i + 1) sum_c m_c + sum_c m_c K c, so K c is one table for all rows.
    """
    if not block.size:
        return 0
    rows, starts = _rows(block, start or (0,) * block.ndim, shape or block.shape)
    total, table = 0, _table()
    for c in range(0, rows.shape[1], PIECE):
        width = min(PIECE, rows.shape[1] - c)
        first = (starts + np.uint64(c)).astype(np.uint32) * np.uint32(STEP) + np.uint32(1)
        height = max(1, PIECE // width)
        for r in range(0, len(rows), height):
            mixed = np.multiply(rows[r : r + height, c : c + width], np.uint32(MIX), dtype=np.uint32)
            mixed ^= mixed >> np.uint32(15)  # without it, numbers rounded to few digits, which end in zeros, leave the low bits unused
            total += int((mixed.sum(1, dtype=np.uint32) * first[r : r + height]).sum(dtype=np.uint32))
            mixed *= table[:width]
            total += int(mixed.sum(dtype=np.uint32))
    return total % 2**32


@functools.cache
def _table() -> np.ndarray:
    return np.arange(PIECE, dtype=np.uint32) * np.uint32(STEP)


def _rows(block: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`block` as rows of words that are neighbours in the whole array too, and the index there of each row's first word."""
    axis = max(block.ndim - 1, 0)
    while axis > 0 and block.shape[axis] == shape[axis]:
        axis -= 1  # whole trailing axes are contiguous: they join the row
    starts = np.zeros(1, np.uint64)
    for i in range(min(axis + 1, block.ndim)):
        along = start[i] + np.arange(block.shape[i] if i < axis else 1, dtype=np.uint64)
        starts = (starts[:, None] + along * np.uint64(math.prod(shape[i + 1 :]))).reshape(-1)
    size = min(block.dtype.itemsize, 4)
    words = np.ascontiguousarray(block).reshape(len(starts), -1).view(f"u{size}")
    return words, starts * np.uint64(block.dtype.itemsize // size)
