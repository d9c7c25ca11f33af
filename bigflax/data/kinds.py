"""Kinds of data that a recipe can have. A model's input says which it is fed, unless the task reads records of its own (tasks.py)."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from bigflax.data.examples import find_classes
from bigflax.data.images import count_classes, image_shapes, viewed
from bigflax.data.loader import Loader
from bigflax.data.pipeline import record_batches, text_batches, text_shapes
from bigflax.data.text import Tokenizer


class Kind(NamedTuple):
    """What is to be known of a kind.

    `batches(sources, ..., split, seed, repeat, mesh, quality)`: its other parameters are the keys of a recipe's data section, with those of the
    `reader`, which gives the function that reads a record where `batches` takes one (examples.py). `shapes`, of some of these: those of a batch,
    known without a source. `given`: those that the run fills in. `follows`: fields of the model that follow from the data where the recipe leaves
    them None. `tokenized`: there is a tokenizer; `prose`: and text to be measured. `packed`: a row is no record. `classes(sources, data section)`:
    their names, or how many there are. `prompt(tokenizer, data section, text)`: the ids that a model of it is to continue, or None.
    """

    batches: Callable[..., Loader]
    shapes: Callable[..., dict[str, jax.ShapeDtypeStruct]]
    given: tuple[str, ...]
    follows: tuple[str, ...]
    tokenized: bool = False
    prose: bool = False
    packed: bool = False
    classes: Callable[..., Any] | None = None
    reader: Callable[..., Any] | None = None
    prompt: Callable[..., Any] | None = None


def reading(
    reader: Callable[..., Any], shapes: Callable[..., Any], *, classes: int | Callable[..., Any] | None = None, packed: bool = False,
    prompt: Callable[..., Any] | None = None, follows: tuple[str, ...] = (),
) -> Kind:  # fmt: skip
    """The kind whose records this reader reads; yours is made the same way. The run gives it what it has parameters for: the `tokenizer`, the names
    of the `classes`, the model's `num_labels`. Where it has `classes` they are found in the records, by `classes(sources, data section)` if given;
    else that many scores are asked of the model. `packed`: it makes pairs (record_batches). `follows`: further fields of the model."""
    takes = inspect.signature(reader).parameters
    find = classes if callable(classes) else None if classes is None else lambda *_: classes
    if find is None and "classes" in takes:
        find = lambda sources, data: find_classes(sources, data.label, data.classes)
    follows = (*(("vocab_size",) if "tokenizer" in takes else ()), *(("num_labels",) if find else ()), *follows)
    given = ("read", "identity", "packed", *(() if packed else ("bins",)))
    return Kind(
        record_batches, shapes, given, follows, tokenized="tokenizer" in takes, packed=packed, classes=find, reader=reader, prompt=prompt
    )


def _begun(tokenizer: Tokenizer, data: Any, text: str) -> np.ndarray | None:
    return np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.int32) if data.objective == "causal" else None


KINDS = {
    "input_ids": Kind(text_batches, text_shapes, ("tokenizer",), ("vocab_size",), tokenized=True, prose=True, packed=True, prompt=_begun),
    "pixel_values": reading(
        viewed, image_shapes, classes=lambda sources, _: count_classes(sources), follows=("image_size", "num_channels")
    ),
}
