"""Images and texts that belong together, as two towers read them (models/two_tower.py): a view of the one, the tokens of the other.

    {"image": "cat.png", "text": "a cat on a windowsill"}          or the image itself, an array or an encoded file, as images.py takes it

A text is followed by its end, at which CLIP reads it. In training a view is a part of the image drawn at random, as images.py says, and nearly
all of it, as open_clip draws it: what is cut away the text may name. For the same reason nothing is mirrored: texts tell left from right.

Left out on purpose: several texts for an image (write a record for each; each is a negative of the others where they meet in a batch).
"""

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from bigflax.data.augment import Said, create
from bigflax.data.examples import Shapes, ended, field, row_shapes, text_of
from bigflax.data.images import View, pixels_of
from bigflax.data.packing import Example
from bigflax.data.pipeline import Read
from bigflax.data.pixels import NORMALIZED
from bigflax.data.sources import Record
from bigflax.data.text import Tokenizer

MEAN, STD = NORMALIZED["clip"]["mean"], NORMALIZED["clip"]["std"]


def captioned(
    tokenizer: Tokenizer, *, length: int, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, min_area: float = 0.9,
    aspect: float = 4 / 3, flip: float = 0.0, central: float = 1.0, augment: Said = None, augment_text: Said = None, image: str = "image",
    text: str = "text", folder: str = "",
) -> Read:  # fmt: skip
    """pixel_values float32 [C, size, size]; input_ids, attention_mask [length]. Names of files are below `folder`. `augment` and `augment_text` say
    what is done to images and texts in training (augment.py): "affine:10", "delete:0.1". The other options are those of `viewed`."""
    view = View(size, tuple(mean), tuple(std), min_area, aspect, flip, central)
    changed, reworded = create("image", augment), create("text", augment_text)

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        found = field(record, image)
        if isinstance(found, str):
            try:
                found = (epath.Path(folder) / found).read_bytes()
            except OSError as error:
                raise ValueError(f"the image {found!r} cannot be read: {error}") from error
        pixels, words = view(pixels_of(found, len(view.mean)), rng, changed), text_of(record, text)
        return {"pixel_values": pixels, **ended(tokenizer, words if rng is None else reworded(words, rng), length=length)}

    return reader


def captioned_shapes(*, length: int, size: int, batch_size: int, mean: Sequence[float] = MEAN) -> Shapes:
    """Shapes and dtypes of a batch of `captioned`, known without a source."""
    pixels = jax.ShapeDtypeStruct((batch_size, len(mean), size, size), np.float32)
    return {"pixel_values": pixels, **row_shapes(length, batch_size)}
