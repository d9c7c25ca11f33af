"""From documents to fixed-shape rows: cutting, first-fit packing, masking.

A document is ids = [bos] + tokens + [eos]; inputs are ids[:-1], labels ids[1:]. One longer than `length` is cut into pieces of length +
1 ids that overlap by one, so every token is a label exactly once. Pieces are packed whole, first fit (grain), into rows with segment ids
(from 1; 0 is padding) and positions. Masking follows Devlin et al. 2019, arXiv:1810.04805, section 3.1: 15% of the tokens; of these 80%
become [MASK], 10% any token, 10% stay. Left out on purpose: next-sentence pairs (RoBERTa, arXiv:1907.11692, shows they do not help) and
best-fit packing (first fit wastes 1 to 3%).

Legend: T length of a row.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import numpy as np

IGNORED = -100  # a label that no loss counts
Example = dict[str, np.ndarray]


def document(parts: Iterable[np.ndarray], bos_id: int | None, eos_id: int | None) -> Iterator[np.ndarray]:
    """The ids of a document in parts: bos, those of its text, eos."""
    if bos_id is None or eos_id is None:
        raise ValueError("this tokenizer marks neither beginning nor end of a document; name them: load_tokenizer(path, bos=..., eos=...)")
    return itertools.chain([np.array([bos_id], np.int32)], parts, [np.array([eos_id], np.int32)])


def cut(parts: Iterable[np.ndarray], length: int) -> Iterator[Example]:
    """Pieces {"pairs": int32[n, 2]}, 1 <= n <= length, of (input id, label); end to end, inputs are ids[:-1] and labels ids[1:].

    The ids come in parts of any size and are cut as they come: a long document does not hold up the first of its pieces.
    """
    ids = np.zeros(0, np.int32)
    for part in parts:
        ids = np.concatenate([ids, part])
        whole = max(0, len(ids) - 1) // length * length
        pairs = np.stack([ids[:whole], ids[1 : whole + 1]], axis=1)
        yield from ({"pairs": pairs[start : start + length]} for start in range(0, whole, length))
        ids = ids[whole:]
    if len(ids) > 1:
        yield {"pairs": np.stack([ids[:-1], ids[1:]], axis=1)}


class Pieces(grain.IterDataset):
    """The examples of `split(element)`, element after element: unlike grain's flat map, lazily, and resumed by taking them again."""

    def __init__(self, parent: grain.IterDataset, split: Callable[[dict[str, Any]], Iterator[Example]]):
        super().__init__(parent)
        self._split = split

    def __iter__(self) -> "_PiecesIterator":
        return _PiecesIterator(iter(self._parent), self._split)


class _PiecesIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, split):
        super().__init__(parent)
        self._split, self._pieces, self._taken, self._before = split, iter(()), 0, parent.get_state()

    def __next__(self) -> Example:
        while (piece := next(self._pieces, None)) is None:
            self._before, self._taken = self._parent.get_state(), 0
            self._pieces = self._split(next(self._parent))
        self._taken += 1
        return piece

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._before, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._before, self._taken, self._pieces = state["parent"], state["taken"], iter(())
        if self._taken:
            self._pieces = itertools.islice(self._split(next(self._parent)), self._taken, None)


def pack(pieces: grain.IterDataset, length: int, *, bins: int = 8, pad_id: int = 0, seed: int = 0) -> grain.IterDataset:
    """Pieces {"pairs"} -> rows of [T]: input_ids (pad_id at padding), labels (-100 at padding), segment_ids, position_ids.

    `bins` rows are open at a time; when a piece fits into none, all are emitted, shuffled.
    """
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"pairs": length},
        padding_struct={"pairs": np.array([pad_id, IGNORED], np.int32)},
        num_packing_bins=bins,
        shuffle_bins=True,
        seed=seed,
    )
    return packed.map(_row)


def _row(packed: Example) -> Example:
    # one packed feature, not two: the packer's time goes by the feature. Copies, because a view would keep all `bins` rows alive
    inputs, labels = packed["pairs"].T.copy()
    return {
        "input_ids": inputs,
        "labels": labels,
        "segment_ids": packed["pairs_segment_ids"].copy(),
        "position_ids": packed["pairs_positions"].copy(),
    }


@dataclasses.dataclass(frozen=True)
class Mask:
    """Elements {"ids", "epoch", "index"} -> masked rows of [T]: input_ids, labels (-100 where nothing is asked), attention_mask,
    token_type_ids if wanted.

    `ids` come without marks; each piece is enclosed in bos and eos. What is masked is a function of (seed, epoch, index, piece) alone.
    """

    length: int
    bos_id: int
    eos_id: int
    pad_id: int
    mask_id: int
    ordinary_ids: np.ndarray = dataclasses.field(repr=False)  # what the random 10% are drawn from
    rate: float = 0.15
    seed: int = 0
    token_type_ids: bool = False

    def __call__(self, element: dict[str, Any]) -> Iterator[Example]:
        ids, room, key = element["ids"], self.length - 2, [self.seed, int(element["epoch"]), int(element["index"])]
        return (self.row(ids[start : start + room], np.random.default_rng([*key, start])) for start in range(0, len(ids), room))

    def row(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
        inputs, labels, n = np.full(self.length, self.pad_id, np.int32), np.full(self.length, IGNORED, np.int32), len(ids)
        inputs[: n + 2] = [self.bos_id, *ids, self.eos_id]
        where = 1 + rng.permutation(n)[: max(1, round(self.rate * n))]
        labels[where] = inputs[where]
        fate, other = rng.random(len(where)), rng.choice(self.ordinary_ids, len(where))
        inputs[where] = np.where(fate < 0.8, self.mask_id, np.where(fate < 0.9, other, inputs[where]))
        row = {"input_ids": inputs, "labels": labels, "attention_mask": (np.arange(self.length) < n + 2).astype(np.int32)}
        return {**row, "token_type_ids": np.zeros(self.length, np.int32)} if self.token_type_ids else row
