"""Records with answers, one row each: how a labelled record becomes an example of fixed shape.

    read = labelled(tokenizer, length=64, classes=("no", "yes"))          a reader: read(record, rng) -> {"input_ids": int32 [T], ...}
    batches = record_batches(source, read, batch_size=32, mesh=mesh)

A reader's function is made from what the data are read with (a tokenizer, the names of the classes) and from its own keyword arguments, which
are keys of a recipe's data section. It raises ValueError for a record that is not as it should be: one bad record, counted and named as
quality.py says. `rng` is a NumPy generator that follows from (seed, epoch, index) in training, None elsewhere: what a reader draws from it
resumes with the data. Texts longer than `length` are cut, shorter ones padded.

With `unlabelled` a text may be without its label, null or no such field: its `labels` are -100, which no loss and no metric counts, and what is to be
learned of it a teacher says (taught.py).

Left out on purpose: rows of several lengths. One shape is one compiled program.

Legend: T length of a row, C classes.
"""

import collections
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigflax.data.augment import Said, create
from bigflax.data.packing import IGNORED, Example, document
from bigflax.data.pipeline import Read
from bigflax.data.sources import Record, Source
from bigflax.data.text import Tokenizer

Shapes = dict[str, jax.ShapeDtypeStruct]


# -- readers ---------------------------------------------------------------------------------------------------------------


def labelled(
    tokenizer: Tokenizer, classes: Sequence[str], *, length: int, text: str = "text", pair: str | None = None, label: str = "label",
    augment: Said = (), unlabelled: bool = False,
) -> Read:  # fmt: skip
    """A text, or a `pair` of them, and one of `classes`, by name or number: input_ids, attention_mask[, token_type_ids] [T], labels [].

    `augment` names what is done to the texts in training (augment.py): "delete:0.1,swap".
    """
    target = lambda record: np.array(class_of(field(record, label), classes), np.int32)
    return _words(tokenizer, length, text, pair, augment, _if_said(target, label, unlabelled, np.int32(IGNORED)))


def many_labelled(
    tokenizer: Tokenizer, classes: Sequence[str], *, length: int, text: str = "text", pair: str | None = None, label: str = "labels",
    augment: Said = (), unlabelled: bool = False,
) -> Read:  # fmt: skip
    """As `labelled`, with any number of classes, a list or one string of names between commas: labels float32 [C] of zeros and ones."""

    def target(record: Record) -> np.ndarray:
        chosen = np.zeros(len(classes), np.float32)
        chosen[[class_of(one, classes) for one in listed(field(record, label))]] = 1
        return chosen

    return _words(tokenizer, length, text, pair, augment, _if_said(target, label, unlabelled, np.full(len(classes), IGNORED, np.float32)))


def scored(
    tokenizer: Tokenizer, *, length: int, text: str = "text", pair: str | None = None, label: str = "score", augment: Said = (),
    unlabelled: bool = False,
) -> Read:  # fmt: skip
    """As `labelled`, with a number: labels float32 []."""

    def target(record: Record) -> np.ndarray:
        try:
            score = np.array(field(record, label), np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{label} {record.get(label)!r} is no number") from error
        if not np.isfinite(score):
            raise ValueError(f"{label} {record[label]!r} is not finite")
        return score

    return _words(tokenizer, length, text, pair, augment, _if_said(target, label, unlabelled, np.float32(IGNORED)))


def _if_said(target: Callable[[Record], np.ndarray], label: str, unlabelled: bool, nothing: Any) -> Callable[[Record], np.ndarray]:
    """`target`, or where a record may be without its `label`, and is, `nothing`."""
    return (lambda record: np.array(nothing) if record.get(label) is None else target(record)) if unlabelled else target


def _words(tokenizer: Tokenizer, length: int, text: str, pair: str | None, augment: Said, target: Callable[[Record], np.ndarray]) -> Read:
    """The row of a text, or of a pair, each changed by `augment` where there is a generator, and the `target` as labels."""
    changed = create("text", augment)

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        texts = [text_of(record, name) for name in (text, pair) if name is not None]
        texts = texts if rng is None else [changed(one, rng) for one in texts]
        return {**tokenizer.row(*texts, length=length), "labels": target(record)}

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
    row = ended(tokenizer, text, length=length)
    return np.where(row["attention_mask"] > 0, row["input_ids"], np.int32(IGNORED))


def ended(tokenizer: Tokenizer, text: str, *, length: int) -> dict[str, np.ndarray]:
    """`Tokenizer.row` of a text with its end, whether or not the tokenizer puts one there."""
    row = tokenizer.row(text, length=length)
    n, (*_, (end,)) = int(row["attention_mask"].sum()), document((), tokenizer.bos_id, tokenizer.eos_id)
    if row["input_ids"][n - 1] != end:
        at = min(n, length - 1)
        row["input_ids"][at], row["attention_mask"][at] = end, 1
    return row


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
