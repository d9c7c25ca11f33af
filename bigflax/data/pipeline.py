"""Deterministic pipelines from sources to fixed-shape examples, in grain.

The stream of records is a function of (source, seed, split) alone. Position p = epoch * n + i visits every record once an epoch in an
order that a keyed permutation of the indices gives (grain's index shuffle: no buffer, nothing to warm up). Virtual shard v of S owns the
positions v, v + S, v + 2 S, ... and turns them into rows by itself. So whoever runs a shard, on whatever host, gets the same rows, and a
shard's state is a few integers. The split hashes each record's name (or content): a record's side never depends on the others, on the
order, or on the machine. Left out on purpose: a cache of tokens (tokenizing runs at many times the training rate, see tests/benchmarks)
and shuffling inside documents.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from bigflax.data.loader import Loader
from bigflax.data.mixture import Mixture
from bigflax.data.packing import Example, Mask, Pieces, cut, document, pack
from bigflax.data.quality import Quality
from bigflax.data.sources import Source, fingerprint
from bigflax.data.text import Tokenizer

MakeShard = Callable[[int, int], grain.IterDataset]
Read = Callable[[dict[str, Any], np.random.Generator | None], Example]
SPLITS = ("train", "validation", "all")


def fraction(content: str | bytes) -> float:
    """A number in [0, 1), uniform over contents: the first 64 bits of their BLAKE2b."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


def in_split(content: str | bytes, split: str, validation_fraction: float) -> bool:
    """Exactly one of "train" and "validation" holds; more validation_fraction only moves records from train to validation."""
    return split == "all" or (fraction(content) < validation_fraction) == (split == "validation")


def sub_seed(seed: int, *names: object) -> int:
    """32 bits of (seed, names): sources of one mixture, and shards of one source, shuffle independently."""
    return int(fraction(json.dumps([seed, *map(str, names)])) * 2**32)


@dataclasses.dataclass
class Records:
    """Good records of one side of a split of a source, by index: `records(i)` is the record or None, `records(i, read)` what `read` makes of it, which
    may raise ValueError for a bad one. What the pipelines below read from."""

    source: Source
    quality: Quality = dataclasses.field(default_factory=lambda: Quality(field=None))
    split: str = "all"
    validation_fraction: float = 0.05
    split_by: str = "name"

    def __post_init__(self):
        if self.split not in SPLITS or self.split_by not in ("name", "content"):
            raise ValueError(
                f"split={self.split!r}, split_by={self.split_by!r}: expected one of {', '.join(SPLITS)}, and 'name' or 'content'"
            )
        if not 0 <= self.validation_fraction <= 1:
            raise ValueError(f"validation_fraction {self.validation_fraction} is outside [0, 1]")
        self._fruitless = 0  # reads in a row that gave nothing
        if not any(self.chosen(i) for i in range(len(self.source))):
            raise ValueError(
                f"no record of the {len(self.source)} falls into the {self.split} split with validation_fraction={self.validation_fraction}"
            )

    def chosen(self, index: int) -> bool:
        """By name this reads nothing; by content the record decides only when it is read."""
        return self.split_by == "content" or in_split(self.source.name(index), self.split, self.validation_fraction)

    def __call__(self, index: int, read: Callable[[dict[str, Any]], Any] = lambda record: record) -> Any:
        if not self.chosen(index):
            return None
        name = self.source.name(index)
        record = self.quality(self.source[index], name)
        if record is not None and self.split_by == "content" and not in_split(_content(record), self.split, self.validation_fraction):
            record = None
        try:
            record = None if record is None else read(record)
        except ValueError as error:
            record = self.quality.reject(name, str(error))
        self._fruitless = 0 if record is not None else self._fruitless + 1
        if self._fruitless > 100 * len(self.source):  # an endless stream of nothing would hang; this is wrong with a chance of exp(-100)
            reason = self.quality.bad.get(name, "of the other split")
            raise ValueError(f"the {self.split} split holds no good record; the last one read is {name}: {reason}")
        return record

    def fingerprint(self) -> str:
        content = [fingerprint(self.source), self.split, self.validation_fraction, self.split_by, self.quality.field, self.quality.max_line]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _content(record: Mapping[str, Any]) -> bytes:
    parts = (np.ascontiguousarray(v).tobytes() if isinstance(v, np.ndarray) else str(v).encode() for _, v in sorted(record.items()))
    return b"\0".join(parts)


def positions(records: Records, shard: int, shards: int, *, seed: int, repeat: bool | int) -> grain.MapDataset:
    """{"epoch", "index"} of each position of this shard."""
    n = len(records.source)
    order = grain.MapDataset.range(n).shuffle(seed=sub_seed(seed, "shuffle"))
    if repeat:
        order = order.repeat(None if repeat is True else int(repeat))
    numbered = order.map_with_index(functools.partial(_numbered, n))
    return numbered[shard::shards]


def _numbered(n: int, position: int, index: int) -> dict[str, int]:
    return {"epoch": position // n, "index": int(index)}


@dataclasses.dataclass(frozen=True)
class _Named(grain.transforms.Map):
    """A map with a name: grain looks up the source line of a bare function, for each of thousands of small pipelines."""

    function: Callable[[Any], Any]

    def map(self, element: Any) -> Any:
        return self.function(element)

    def __str__(self) -> str:
        return "read"


def read(at: grain.MapDataset, element: Callable[[dict], dict | None], *, read_threads: int = 0) -> grain.IterDataset:
    """Maps `element` over positions, ahead of time in `read_threads` threads if any (for far storage), and drops what it makes None."""
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
    rows = at.map(_Named(element)).to_iter_dataset(options)
    # grain warns when most elements are dropped, which is what a small split does by design
    return grain.experimental.WithOptionsIterDataset(rows, grain.experimental.DatasetOptions(filter_warn_threshold_ratio=None))


@dataclasses.dataclass
class Text:
    """make_shard(v, S) -> rows of text: "causal" (packed) or "masked" (fixed length). One source; `Mixed` joins several."""

    records: Records
    tokenizer: Tokenizer
    length: int
    objective: str = "causal"
    seed: int = 0
    repeat: bool | int = True
    interleave: int = 8
    bins: int = 8
    mask_rate: float = 0.15
    token_type_ids: bool = False
    read_threads: int = 0

    def __post_init__(self):
        if self.interleave < 1:
            raise ValueError(f"interleave {self.interleave} must be at least 1: the documents that a shard reads in turn")
        if self.objective not in ("causal", "masked"):
            raise ValueError(f"objective={self.objective!r} is neither 'causal' nor 'masked'")
        if self.records.quality.field is None:
            raise ValueError("text needs the name of its field: Quality(field='text')")
        if self.length < 3:
            raise ValueError(f"length {self.length} is below 3: a row must hold a token between its marks")
        if self.objective == "masked" and self.tokenizer.mask_id is None:
            raise ValueError("masked language modelling needs a mask token; name it: load_tokenizer(path, mask=...)")

    def element(self, at: dict[str, int]) -> dict[str, Any] | None:
        record = self.records(at["index"])
        return record and {**at, "text": record[self.records.quality.field or "text"]}

    def split(self, element: dict[str, Any]) -> Iterator[Example]:
        """The pieces of one document, made as they are asked for."""
        if self.objective == "masked":
            return self.mask({**element, "ids": self.tokenizer.encode(element["text"])})
        parts = self.tokenizer.encode_parts(element["text"], max(1024, 4 * self.length))  # characters: about a row's worth
        return cut(document(parts, self.tokenizer.bos_id, self.tokenizer.eos_id), self.length)

    @functools.cached_property
    def mask(self) -> Mask:
        t = self.tokenizer
        ordinary = np.setdiff1d(np.arange(t.vocab_size, dtype=np.int32), t.special_ids)
        bos, eos = (int(mark[0]) for mark in document((), t.bos_id, t.eos_id))
        assert t.mask_id is not None  # __post_init__ saw to it
        return Mask(self.length, bos, eos, t.pad_id, t.mask_id, ordinary, self.mask_rate, self.seed, self.token_type_ids)

    def __call__(self, shard: int, shards: int) -> grain.IterDataset:
        pieces = self.pieces(shard, shards)
        if self.objective == "masked":
            return pieces
        return pack(pieces, self.length, bins=self.bins, pad_id=self.tokenizer.pad_id, seed=sub_seed(self.seed, "bins", shard))

    def pieces(self, shard: int, shards: int) -> grain.IterDataset:
        """Pieces of `interleave` documents in turn. One document after the other, a long one would fill its shard's row for many steps
        on end: the loss falls on it and not elsewhere."""

        def part(k: int) -> grain.IterDataset:
            at = positions(self.records, shard + k * shards, shards * self.interleave, seed=self.seed, repeat=self.repeat)
            return Pieces(read(at, self.element, read_threads=self.read_threads), self.split)

        parts = [part(k) for k in range(self.interleave)]
        return parts[0] if len(parts) == 1 else Mixture(parts, [1.0] * len(parts), shard, shards)


@dataclasses.dataclass
class Mixed:
    """make_shard(v, S) over several make_shards and their weights."""

    parts: Sequence[MakeShard]
    weights: Sequence[float]

    def __call__(self, shard: int, shards: int) -> grain.IterDataset:
        return Mixture([part(shard, shards) for part in self.parts], self.weights, shard, shards)


@dataclasses.dataclass
class Examples:
    """make_shard(v, S) of what `read` makes of each record; `random`: it is given a generator to draw from. `packed`: rows of that length, of which
    `bins` are open at a time, are packed of it (packing.py)."""

    records: Records
    read: Read
    random: bool
    seed: int = 0
    repeat: bool | int = True
    read_threads: int = 0
    packed: int | None = None
    bins: int = 8

    def element(self, at: dict[str, int]) -> Example | None:
        rng = np.random.default_rng([self.seed, at["epoch"], at["index"]]) if self.random else None
        return self.records(at["index"], lambda record: self.read(record, rng))

    def __call__(self, shard: int, shards: int) -> grain.IterDataset:
        at = positions(self.records, shard, shards, seed=self.seed, repeat=self.repeat)
        found = read(at, self.element, read_threads=self.read_threads)
        return found if self.packed is None else pack(found, self.packed, bins=self.bins, seed=sub_seed(self.seed, "bins", shard))


def sample_texts(records: Records, *, seed: int = 0) -> Iterator[str]:
    """Texts of good records in shuffled order, once each: what a tokenizer is trained on (of the train split, never the held-out one). Where no field
    is named, all that a record holds."""
    at, field = positions(records, 0, 1, seed=seed, repeat=False), records.quality.field
    for i in range(len(at)):
        record = records(where["index"]) if (where := at[i]) is not None else None
        if record is not None:
            yield from _texts(record if field is None else record[field])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str | bytes):
        yield value if isinstance(value, str) else value.decode(errors="replace")
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def text_batches(
    source: Source | Sequence[tuple[Source, float]],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch_size: int,
    objective: str = "causal",
    split: str = "train",
    validation_fraction: float = 0.05,
    split_by: str = "name",
    seed: int = 0,
    repeat: bool | int = True,
    mesh=None,
    quality: Quality | None = None,
    interleave: int = 8,
    bins: int = 8,
    mask_rate: float = 0.15,
    token_type_ids: bool = False,
    read_threads: int = 0,
    **loader,
) -> Loader:
    """Batches of text for language modelling, from one source or from weighted ones: [(source, weight), ...]. `loader`: see `Loader`.

    "causal": input_ids, labels, segment_ids, position_ids. "masked": input_ids, labels, attention_mask, and token_type_ids if wanted.
    repeat: True for ever, False one pass, n passes. A finite stream is one virtual shard unless told otherwise: full rows, and padding only
    at its very end.
    """
    quality = quality or Quality()
    weighted = [(source, 1.0)] if isinstance(source, Source) else list(source)
    options = {"repeat": repeat, "interleave": interleave, "bins": bins, "mask_rate": mask_rate, "token_type_ids": token_type_ids}
    parts = [
        Text(
            Records(one, quality, split, validation_fraction, split_by),
            tokenizer,
            length,
            objective,
            sub_seed(seed, "source", k),  # two sources of a mixture must not shuffle alike
            read_threads=read_threads,
            **options,
        )
        for k, (one, _) in enumerate(weighted)
    ]
    identity = {"tokenizer": tokenizer.fingerprint, "length": length, "objective": objective, "seed": seed, **options}
    # the packers of all shards work at the same step, once every `bins` steps: as many batches ahead even that out
    return joined(parts, weighted, batch_size, mesh, quality, identity, {"prefetch": bins if objective == "causal" else 2, **loader})


def text_shapes(
    *, length: int, batch_size: int, objective: str = "causal", token_type_ids: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of `text_batches`, known without a source or a tokenizer."""
    more = (
        ("segment_ids", "position_ids") if objective == "causal" else ("attention_mask", *(("token_type_ids",) if token_type_ids else ()))
    )
    return {name: jax.ShapeDtypeStruct((batch_size, length), np.int32) for name in ("input_ids", "labels", *more)}


def record_batches(
    source: Source | Sequence[tuple[Source, float]],
    read: Read,
    *,
    batch_size: int,
    split: str = "train",
    validation_fraction: float = 0.05,
    split_by: str = "name",
    seed: int = 0,
    repeat: bool | int = True,
    mesh=None,
    quality: Quality | None = None,
    identity: Mapping[str, Any] | None = None,
    read_threads: int = 0,
    packed: int | None = None,
    bins: int = 8,
    **loader,
) -> Loader:
    """Batches of `read(record, rng)`: dicts of arrays of fixed shape. It raises ValueError for a bad record; `rng`, in the "train" split alone, is a
    generator that follows from (seed, epoch, index): what is drawn from it resumes with the data.

    `identity`: what else decides about the rows, as JSON keeps it. `packed`: what is read are pairs (input id, label), which are packed into rows of
    this length, as packing.py says. Other options as for `text_batches`.
    """
    quality = quality or Quality(field=None)
    weighted = [(source, 1.0)] if isinstance(source, Source) else list(source)
    parts = [
        Examples(
            Records(one, quality, split, validation_fraction, split_by), read, split == "train", sub_seed(seed, "source", k), repeat,
            read_threads, packed, bins,
        )
        for k, (one, _) in enumerate(weighted)
    ]  # fmt: skip
    stream = {"seed": seed, "repeat": repeat, **({} if packed is None else {"packed": packed, "bins": bins}), **(identity or {})}
    return joined(parts, weighted, batch_size, mesh, quality, stream, loader)


def joined(parts: Sequence[Any], weighted: Sequence[tuple[Source, float]], batch_size: int, mesh, quality, identity, options) -> Loader:
    """The loader of one source's make_shard, or of several by their weights; a finite one is one virtual shard unless `options` say otherwise."""
    weights, repeat = [float(weight) for _, weight in weighted], identity["repeat"]
    make = parts[0] if len(parts) == 1 else Mixed(parts, weights)
    identity = {"data": [part.records.fingerprint() for part in parts], "weights": weights, **identity}
    options = {"shards": None if repeat is True else 1, **options}
    return Loader(make, batch_size=batch_size, mesh=mesh, quality=quality, finite=repeat is not True, identity=identity, **options)
