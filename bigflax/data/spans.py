"""Records whose answers are places in a text: a class for each word, or the words that answer a question.

    {"tokens": ["Ann", "lives", "here"], "tags": ["B-PER", "O", "O"]}       or "text" and "spans": [{"start": 0, "end": 3, "label": "PER"}]
    {"question": ..., "context": ..., "answers": {"text": ["Ann"], "answer_start": [0]}}                    as SQuAD has it; or a list of such

Places are characters in the records and tokens in the rows; the tokenizer says which lies where, so any kind of it will do.
Left out on purpose: more than one true answer; the first is meant.

Legend: T length of a row, W windows of a context.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigflax.data.examples import Read, Shapes, class_of, field, find_classes, row_shapes, text_of
from bigflax.data.packing import IGNORED, Example
from bigflax.data.sources import Record, Source
from bigflax.data.text import Tokenizer

OUTSIDE = "O"


def tagged(tokenizer: Tokenizer, classes: Sequence[str], *, length: int, text: str = "tokens", label: str = "tags") -> Read:
    """Words and a class each, by name or number, or a text and the spans of characters that bear a name, which become B- and I- tags of its words
    and marks. input_ids, attention_mask [T]; labels [T], those of the words at the first token of each, -100 elsewhere."""

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        line, starts, ends, tags = _words(record, text, label)
        row, at = tokenizer.placed(line, length=length)[0]
        last = at[:, 2] - 1  # a token may begin with the blank before its word
        word = np.searchsorted(starts, last, side="right") - 1
        inside = (at[:, 0] == 0) & (at[:, 2] > at[:, 1]) & (word >= 0) & (last < ends[word])
        labels = np.full(length, IGNORED, np.int32)
        words, first = np.unique(np.where(inside, word, -1), return_index=True)
        for w, place in zip(words, first, strict=True):
            if w >= 0:
                labels[place] = class_of(tags[w], classes)
        return {**row, "labels": labels}

    return reader


def _words(record: Record, text: str, label: str) -> tuple[str, np.ndarray, np.ndarray, list[Any]]:
    """A line, the characters where its words begin and end, and their tags."""
    found = field(record, text)
    if isinstance(found, str | bytes):
        line, spans = text_of(record, text), field(record, label)
        bounds = [match.span() for match in re.finditer(r"\w+|[^\w\s]", line)]
        return line, *np.array(bounds).T, _tags(bounds, spans, len(line))
    words, tags = [str(word) for word in found], list(field(record, label))
    if len(words) != len(tags) or not words or not all(word.strip() for word in words):
        raise ValueError(f"{len(words)} words in {text!r} and {len(tags)} tags in {label!r} are to be as many, and no word empty")
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    return " ".join(words), ends - [len(word) for word in words], ends, tags


def _tags(bounds: Sequence[tuple[int, int]], spans: Iterable[Mapping[str, Any]], size: int) -> list[str]:
    tags = [OUTSIDE] * len(bounds)
    for span in spans:
        begin, end, name = (field(span, key) for key in ("start", "end", "label"))
        covered = [i for i, (a, b) in enumerate(bounds) if a < end and b > begin]
        if not (0 <= begin < end <= size and covered):
            raise ValueError(f"a span of {name!r} from {begin} to {end} covers no word of the {size} characters")
        if clash := next((tags[i] for i in covered if tags[i] != OUTSIDE), None):
            raise ValueError(f"a span of {name!r} from {begin} to {end} overlaps one of {clash[2:]!r}: a word has one tag")
        for i in covered:
            tags[i] = f"{'B' if i == covered[0] else 'I'}-{name}"
    return tags


def find_tags(sources: Iterable[Source], data: Any) -> tuple[str, ...]:
    """The classes of `tagged`: those named, or those met, of spans "O" and each name's B- and I-. Raises ValueError for fewer than two."""
    if data.classes is not None:
        return tuple(data.classes)
    sources, names = list(sources), set()
    for source in sources:
        for i in range(len(source)):
            record = source[i]
            if isinstance(record.get(data.text), str | bytes):
                names |= {str(span.get("label")) for span in record.get(data.label) or ()}
    return (OUTSIDE, *(f"{mark}-{name}" for name in sorted(names) for mark in "BI")) if names else find_classes(sources, data.label)


def tagged_shapes(*, length: int, batch_size: int) -> Shapes:
    """Shapes and dtypes of a batch of `tagged`, known without a source."""
    return row_shapes(length, batch_size) | {"labels": jax.ShapeDtypeStruct((batch_size, length), np.int32)}


def answered(
    tokenizer: Tokenizer, *, length: int, stride: int = 0, windows: int = 1, question: str = "question", context: str = "context",
    answers: str = "answers",
) -> Read:  # fmt: skip
    """A question before the context that answers it: input_ids, attention_mask, token_type_ids [T]; labels [2], the first and the last token of
    the answer, both 0 where there is none.

    A context too long for a row is read in windows that overlap by `stride` tokens. In training one is drawn that holds the answer, or any where
    none does. Elsewhere a model sees all of them, up to `windows`: input_ids ... [W, T], labels [W, 2], -100 where there is no further window; a
    context that has more is a bad record. With `windows` 1 it sees the first that holds the answer alone, and what is said of long contexts is
    too good.
    """

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        line, span = text_of(record, context), _answer(record, context, answers)
        cut = tokenizer.placed(text_of(record, question), line, length=length, stride=stride)
        found = [{**row, "labels": np.array(_inside(at, span) or (0, 0), np.int32)} for row, at in cut]
        if rng is None and windows > 1:
            if len(found) > windows:
                raise ValueError(f"the context takes {len(found)} windows of {length} tokens, more than the {windows} of data.windows")
            none = {name: np.full_like(row, IGNORED if name == "labels" else 0) for name, row in found[0].items()}
            return {name: np.stack([one[name] for one in found + [none] * (windows - len(found))]) for name in none}
        held = [one for one in found if one["labels"].any()] or found
        return held[0 if rng is None else rng.integers(len(held))]

    return reader


def _answer(record: Record, context: str, answers: str) -> tuple[int, int] | None:
    """The characters of the first answer, from and to, or None. Raises ValueError where it does not stand there."""
    found = field(record, answers)
    if isinstance(found, Mapping):
        found = [{"text": text, "answer_start": start} for text, start in zip(found["text"], found["answer_start"], strict=True)]
    if not len(found):
        return None
    text, start = field(found[0], "text"), field(found[0], "answer_start")
    if not text or text_of(record, context)[start : start + len(text)] != text:
        raise ValueError(f"the answer {text!r} does not stand at character {start} of {context!r}")
    return start, start + len(text)


def _inside(at: np.ndarray, span: tuple[int, int] | None) -> tuple[int, int] | None:
    """The first and the last token of the span of the second text, where all of it is in this window."""
    (there,) = np.nonzero((at[:, 0] == 1) & (at[:, 2] > at[:, 1]))
    if span is None or not len(there) or at[there[0], 1] > span[0] or at[there[-1], 2] < span[1]:
        return None
    covered = there[(at[there, 1] < span[1]) & (at[there, 2] > span[0])]
    return int(covered[0]), int(covered[-1])


def answered_shapes(*, length: int, batch_size: int) -> Shapes:
    """Those of `answered`."""
    return row_shapes(length, batch_size, pair="context") | {"labels": jax.ShapeDtypeStruct((batch_size, 2), np.int32)}
