"""Kinds of data that a recipe can have, by the input that its model takes: the model says what it is fed, so a recipe need not."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from bigflax.data.images import image_batches, image_shapes
from bigflax.data.loader import Loader
from bigflax.data.pipeline import text_batches, text_shapes


class Kind(NamedTuple):
    """What is to be known of a kind.

    `batches(sources, ..., split, seed, repeat, mesh, quality)`: its other parameters are the keys of a recipe's data section. `shapes`, of some of
    these: those of a batch, known without a source. `given`: those that the run fills in. `follows`: fields of the model that follow from the data
    where the recipe leaves them None. `tokenized`: there is a tokenizer, and text to be sampled and measured.
    """

    batches: Callable[..., Loader]
    shapes: Callable[..., dict[str, jax.ShapeDtypeStruct]]
    given: tuple[str, ...]
    follows: tuple[str, ...]
    tokenized: bool


KINDS = {
    "input_ids": Kind(text_batches, text_shapes, ("tokenizer",), ("vocab_size",), True),
    "pixel_values": Kind(image_batches, image_shapes, ("classes",), ("num_labels", "image_size", "num_channels"), False),
}
