"""Records with answers, one row each: how a labelled record becomes an example of fixed shape.

    read = labelled(tokenizer, length=64, classes=("no", "yes"))          a reader: read(record, rng) -> {"input_ids": int32 [T], ...}
    batches = example_batches(source, read, batch_size=32, mesh=mesh)

A reader's function is made from what the data are read with (a tokenizer, the names of the classes) and from its own keyword arguments, which
are keys of a recipe's data section. It raises ValueError for a record that is not as it should be: one bad record, counted and named as
quality.py says. `rng` is a NumPy generator that follows from (seed, epoch, index) in training, None elsewhere: what a reader draws from it
resumes with the data. Texts longer than `length` are cut, shorter ones padded.

Left out on purpose: rows of several lengths. One shape is one compiled program.

Legend: T length of a row, C classes.
"""

import collections
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from bigflax.data.augment import Said, create
from bigflax.data.loader import Loader
from bigflax.data.packing import IGNORED, Example, document, pack
from bigflax.data.pipeline import MakeShard, Mixed, Records, make_loader, positions, read, sub_seed
from bigflax.data.quality import Quality
from bigflax.data.sources import Record, Source
from bigflax.data.text import Tokenizer

Shapes = dict[str, jax.ShapeDtypeStruct]
Read = Callable[[Record, np.random.Generator | None], Example]


# -- readers ---------------------------------------------------------------------------------------------------------------


def labelled(
    tokenizer: Tokenizer, classes: Sequence[str], *, length: int, text: str = "text", pair: str | None = None, label: str = "label",
    augment: Said = (),
) -> Read:  # fmt: skip
    """A text, or a `pair` of them, and one of `classes`, by name or number: input_ids, attention_mask[, token_type_ids] [T], labels [].

    `augment` names what is done to the texts in training (augment.py): "delete:0.1,swap".
    """
    changed = create("text", augment)

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        if rng is not None and changed.functions:
            record = {**record, **{name: changed(text_of(record, name), rng) for name in (text, pair) if name is not None}}
        return {**_words(record, tokenizer, length, text, pair), "labels": np.array(class_of(field(record, label), classes), np.int32)}

    return reader


def many_labelled(
    tokenizer: Tokenizer, classes: Sequence[str], *, length: int, text: str = "text", pair: str | None = None, label: str = "labels"
) -> Read:
    """As `labelled`, with any number of classes, a list or one string of names between commas: labels float32 [C] of zeros and ones."""

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        target = np.zeros(len(classes), np.float32)
        target[[class_of(one, classes) for one in listed(field(record, label))]] = 1
        return {**_words(record, tokenizer, length, text, pair), "labels": target}

    return reader


def scored(tokenizer: Tokenizer, *, length: int, text: str = "text", pair: str | None = None, label: str = "score") -> Read:
    """As `labelled`, with a number: labels float32 []."""

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        try:
            score = np.array(field(record, label), np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{label} {record.get(label)!r} is no number") from error
        if not np.isfinite(score):
            raise ValueError(f"{label} {record[label]!r} is not finite")
        return {**_words(record, tokenizer, length, text, pair), "labels": score}

    return reader


def paired(tokenizer: Tokenizer, *, length: int, text: str = "anchor", positive: str = "positive", negative: str | None = None) -> Read:
    """Two texts that belong together, and a third that does not where `negative` names its field: input_ids, attention_mask [2 or 3, T]."""
    names = (text, positive, *(() if negative is None else (negative,)))

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        rows = [tokenizer.row(text_of(record, name), length=length) for name in names]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return reader


def translated(
    tokenizer: Tokenizer, *, length: int, target_length: int, text: str = "source", target: str = "target", prefix: str = ""
) -> Read:
    """A text, behind a `prefix`, and the one that is to be written for it: input_ids, attention_mask [T]; labels [target_length], with the marks of
    the tokenizer's own and one at the end in any case."""

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        row = tokenizer.row(prefix + text_of(record, text), length=length)
        return {**row, "labels": to_write(tokenizer, text_of(record, target), target_length)}

    return reader


def to_write(tokenizer: Tokenizer, text: str, length: int) -> np.ndarray:
    """int32 [length]: a text as a decoder is to write it, its end too; then -100."""
    row, labels = tokenizer.row(text, length=length), np.full(length, IGNORED, np.int32)
    ids = row["input_ids"][row["attention_mask"] > 0]
    *_, end = document((), tokenizer.bos_id, tokenizer.eos_id)
    if ids[-1] != end:
        ids = np.append(ids[: length - 1], end)
    labels[: len(ids)] = ids
    return labels


def labelled_shapes(*, length: int, batch_size: int, pair: str | None = None) -> Shapes:
    """Shapes and dtypes of a batch of `labelled`, known without a source."""
    return row_shapes(length, batch_size, pair) | {"labels": jax.ShapeDtypeStruct((batch_size,), np.int32)}


def many_labelled_shapes(*, length: int, batch_size: int, pair: str | None = None, classes: Sequence[str] | None = None) -> Shapes:
    """Those of `many_labelled`, whose classes must be named."""
    if classes is None:
        raise ValueError("without data the classes are not known; name them: data.classes")
    return row_shapes(length, batch_size, pair) | {"labels": jax.ShapeDtypeStruct((batch_size, len(classes)), np.float32)}


def scored_shapes(*, length: int, batch_size: int, pair: str | None = None) -> Shapes:
    """Those of `scored`."""
    return row_shapes(length, batch_size, pair) | {"labels": jax.ShapeDtypeStruct((batch_size,), np.float32)}


def paired_shapes(*, length: int, batch_size: int, negative: str | None = None) -> Shapes:
    """Those of `paired`."""
    many = 2 if negative is None else 3
    return {name: jax.ShapeDtypeStruct((batch_size, many, length), np.int32) for name in row_shapes(length, batch_size)}


def translated_shapes(*, length: int, target_length: int, batch_size: int) -> Shapes:
    """Those of `translated`."""
    return row_shapes(length, batch_size) | {"labels": jax.ShapeDtypeStruct((batch_size, target_length), np.int32)}


def row_shapes(length: int, batch_size: int, pair: str | None = None) -> Shapes:
    """Those of `Tokenizer.row`."""
    names = ("input_ids", "attention_mask", *(("token_type_ids",) if pair else ()))
    return {name: jax.ShapeDtypeStruct((batch_size, length), np.int32) for name in names}


def field(record: Mapping[str, Any], name: str) -> Any:
    """A field of a record. Raises ValueError that names the nearest there is."""
    if name not in record:
        close = difflib.get_close_matches(name, record, 1, cutoff=0.0)
        raise ValueError(f"no field {name!r}" + (f", nearest is {close[0]!r}" if close else ""))
    return record[name]


def text_of(record: Mapping[str, Any], name: str) -> str:
    """A field that is a text. Raises ValueError for anything else, and for one of blanks."""
    found = field(record, name)
    if isinstance(found, bytes):
        found = found.decode()  # a UnicodeDecodeError is a ValueError
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"field {name!r} is {'empty' if isinstance(found, str) else f'{type(found).__name__}, not text'}")
    return found


def _words(record: Record, tokenizer: Tokenizer, length: int, text: str, pair: str | None) -> Example:
    return tokenizer.row(text_of(record, text), None if pair is None else text_of(record, pair), length=length)


# -- classes ---------------------------------------------------------------------------------------------------------------


def listed(value: Any) -> list[Any]:
    """A list of labels; a string is split at commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, Sequence | np.ndarray) else [value]


def class_of(value: Any, classes: Sequence[str]) -> int:
    """The number of a class, given by name or by number. Raises ValueError for none of them."""
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode()
    if (name := str(value)) in classes:
        return list(classes).index(name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes):
        return value
    close = difflib.get_close_matches(name, classes, 3, cutoff=0.0)
    raise ValueError(f"label {value!r} is none of the {len(classes)} classes; the nearest are {', '.join(map(repr, close))}")


def find_classes(sources: Iterable[Source], name: str, said: Sequence[str] | None = None, *, least: int = 2) -> tuple[str, ...]:
    """The names of the classes in the field `name` of all records, in order, numbers by size: read through once. With `said`, these, and all are
    to be met. Raises ValueError for a class without a record, and for fewer than `least`.
    """
    found: collections.Counter[str] = collections.Counter()
    for source in sources:
        for index in range(len(source)):
            value = source[index].get(name)
            values = listed(value) if isinstance(value, list | tuple) else [] if value is None else [value]
            found.update(str(v.item() if isinstance(v, np.ndarray) else v) for v in values)
    if said is not None:
        if missing := [one for one in said if not found[one]]:
            raise ValueError(f"no record is of class {missing[0]!r}; the field {name!r} has {', '.join(map(repr, [*found][:8])) or 'none'}")
        return tuple(said)
    if len(found) < least:
        only = f"only {next(iter(found))!r}" if found else "nothing"
        raise ValueError(f"the field {name!r} of the records holds {only}; to tell classes apart takes {least} or more")
    return tuple(sorted(found, key=(lambda text: (int(text), text)) if all(text.lstrip("-").isdigit() for text in found) else None))


# -- batches ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Examples:
    """make_shard(v, S) of what `read` makes of each record; `random`: it is given a generator to draw from. `packed`: rows of that length, of which
    `bins` are open at a time, are packed of it (packing.py)."""

    records: Records
    read: Read
    random: bool
    seed: int = 0
    repeat: bool | int = True
    shuffle: bool = True
    read_threads: int = 0
    packed: int | None = None
    bins: int = 8

    def element(self, at: dict[str, int]) -> Example | None:
        record = self.records(at["index"])
        if record is None:
            return None
        try:
            return self.read(record, np.random.default_rng([self.seed, at["epoch"], at["index"]]) if self.random else None)
        except ValueError as error:
            return self.records.quality.reject(self.records.source.name(at["index"]), str(error))

    def __call__(self, shard: int, shards: int) -> grain.IterDataset:
        at = positions(self.records, shard, shards, seed=self.seed, repeat=self.repeat, shuffle=self.shuffle)
        found = read(at, self.element, read_threads=self.read_threads)
        return found if self.packed is None else pack(found, self.packed, bins=self.bins, seed=sub_seed(self.seed, "bins", shard))


def example_batches(
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
    """Batches of what `read` makes of the records. `identity`: what else decides about the rows, as JSON keeps it. Options as for `text_batches`.

    `packed`: what it makes are pairs (input id, label), which are packed into rows of this length, as packing.py says.
    """
    quality = quality or Quality(field=None)
    weighted = [(source, 1.0)] if isinstance(source, Source) else list(source)
    parts: list[MakeShard] = [
        Examples(
            Records(one, quality, split, validation_fraction, split_by), read, split == "train", sub_seed(seed, "source", k), repeat,
            read_threads=read_threads, packed=packed, bins=bins,
        )
        for k, (one, _) in enumerate(weighted)
    ]  # fmt: skip
    weights = [float(weight) for _, weight in weighted]
    make = parts[0] if len(parts) == 1 else Mixed(parts, weights)
    stream = {"data": [part.records.fingerprint() for part in parts], "weights": weights, "seed": seed, "repeat": repeat}
    stream |= {} if packed is None else {"packed": packed, "bins": bins}
    return make_loader(make, batch_size, mesh, quality, repeat, {**stream, **(identity or {})}, loader)
