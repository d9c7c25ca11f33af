"""Weighted mixtures of row streams.

Row k of virtual shard v has the global number g = k * shards + v, and comes from the source whose interval of cumulated weights holds
the fraction of g * phi (phi the golden ratio; a Weyl sequence). So the choice is a function of g alone, every stretch of n rows holds
each source's share to within O(log n) rows, and so does each single batch. Rows are mixed after packing: a weight is a share of rows,
hence of tokens, however long a source's documents are. Source of the sequence: Knuth, TAOCP vol. 3, section 6.4 (Fibonacci hashing).
Left out on purpose: weights that change during the run.
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import grain

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd


def choose(number: int, cumulated: Sequence[float]) -> int:
    """The source of global row `number`; `cumulated` rises to 1."""
    fraction = (number * GOLDEN % 2**64) / 2**64
    return min(bisect.bisect_right(cumulated, fraction), len(cumulated) - 1)


class Mixture(grain.IterDataset):
    """Rows of shard `shard` of `shards`, drawn from `parents` by `weights` until all have ended (an ended one's turn goes to the next)."""

    def __init__(self, parents: Sequence[grain.IterDataset], weights: Sequence[float], shard: int, shards: int):
        super().__init__(list(parents))
        if len(parents) != len(weights) or min(weights) <= 0:
            raise ValueError(f"a mixture needs one weight above 0 for each of its {len(parents)} sources, not {list(weights)}")
        self._cumulated = [total / sum(weights) for total in itertools.accumulate(weights)]
        self._shard, self._shards = shard, shards

    def __iter__(self) -> "_MixtureIterator":
        return _MixtureIterator([iter(parent) for parent in self._parents], self._cumulated, self._shard, self._shards)


class _MixtureIterator(grain.DatasetIterator):
    def __init__(self, parents, cumulated, shard: int, shards: int):
        super().__init__(parents)
        self._cumulated, self._shard, self._shards, self._row = cumulated, shard, shards, 0

    def __next__(self):
        first = choose(self._row * self._shards + self._shard, self._cumulated)
        for turn in range(len(self._parents)):
            try:
                row = next(self._parents[(first + turn) % len(self._parents)])
            except StopIteration:
                continue
            self._row += 1
            return row
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        return {"row": self._row, "parents": [parent.get_state() for parent in self._parents]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._row = state["row"]
        for parent, parent_state in zip(self._parents, state["parents"], strict=True):
            parent.set_state(parent_state)
