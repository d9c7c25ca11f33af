"""Images with their classes: decoded, cut out, scaled, normalized.

    source = open_source("images", path="photos")                    a folder with one subfolder a class
    batches = record_batches(source, viewed(size=224), batch_size=256, mesh=mesh)

In training a view is a part of the image drawn at random, of `min_area` to the whole of its area and with an aspect from 1 / `aspect` to
`aspect`, scaled to a square, and mirrored with chance `flip` (Szegedy et al. 2015, arXiv 1409.4842, section 6). Otherwise it is the central
square, `central` of the short side: the same as to scale the short side to size / central and to cut the middle out. Both take one
resampling, bilinear and antialiased. `augment`, in training alone, acts on the square: the functions of augment.py by name, in order. What is
drawn is a function of (seed, epoch, index) alone, so it resumes and does not ask who draws it. Images that are all of one kind and size, as
digits are, want them whole: min_area=1, aspect=1, flip=0, central=1.

Left out on purpose: views that are not square, labels that are not one class, what mixes images (ops/mixing.py, inside the step).

Legend: H height, W width, C channels.
"""

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigflax.data.augment import Chain, Said, create
from bigflax.data.examples import field
from bigflax.data.packing import Example
from bigflax.data.pipeline import Read
from bigflax.data.pixels import NORMALIZED, channels_first
from bigflax.data.records import decoded, extra
from bigflax.data.sources import Record, Source

MEAN, STD = NORMALIZED["imagenet"]["mean"], NORMALIZED["imagenet"]["std"]


def pixels_of(image: Any, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C] of such an array, or of an encoded file, bytes or {"bytes": bytes} as Hugging Face's data sets have it. Raises ValueError for what
    is neither, and for other channels."""
    encoded = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(encoded, bytes):
        encoded = np.asarray(decoded(io.BytesIO(encoded), "L" if channels == 1 else "RGB"))
    if not isinstance(encoded, np.ndarray) or encoded.dtype != np.uint8 or encoded.ndim not in (2, 3) or not encoded.size:
        what = f"{encoded.dtype}{list(encoded.shape)}" if isinstance(encoded, np.ndarray) else type(encoded).__name__
        raise ValueError(f"an image is uint8 [height, width, channels] or an encoded file, not {what}")
    pixels = encoded.reshape(*encoded.shape[:2], -1)
    if pixels.shape[2] != channels:
        raise ValueError(f"an image of {pixels.shape[2]} channels cannot be normalized with the means of {channels}")
    return pixels


def _class(label: Any, classes: int | None) -> np.ndarray:
    if not np.issubdtype(np.asarray(label).dtype, np.integer) or np.ndim(label):
        raise ValueError(f"a class is a whole number, not {label!r}")
    if label < 0 or (classes is not None and label >= classes):
        raise ValueError(f"class {label} is {'below 0' if label < 0 else f'not below the number of classes, {classes}'}")
    return np.array(label, np.int32)


@dataclasses.dataclass(frozen=True)
class View:
    """`view(image, rng, augment) -> float32 [C, size, size]` of uint8 [H, W, C]; without `rng` the central one, and nothing of `augment`."""

    size: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    min_area: float = 0.08
    aspect: float = 4 / 3
    flip: float = 0.5
    central: float = 0.875

    def __post_init__(self):
        if self.size < 1 or len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ValueError(
                f"size {self.size} must be at least 1, and mean and std of 1 or of 3 channels, not {len(self.mean)} and {len(self.std)}"
            )
        if not (0 < self.min_area <= 1 and 0 < self.central <= 1 and 0 <= self.flip <= 1 and self.aspect >= 1):
            raise ValueError(
                f"min_area {self.min_area} and central {self.central} are parts of a whole, flip {self.flip} is a chance, and aspect "
                f"{self.aspect} is at least 1"
            )

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None, augment: Chain | None = None) -> np.ndarray:
        library, (height, width) = extra("PIL.Image", "images"), image.shape[:2]
        box = self.middle(height, width) if rng is None else self.part(height, width, rng)
        scaled = library.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
        pixels = np.asarray(scaled.resize((self.size, self.size), library.Resampling.BILINEAR, box=box)).reshape(self.size, self.size, -1)
        if rng is not None and rng.random() < self.flip:
            pixels = pixels[:, ::-1]
        if rng is not None and augment is not None:
            pixels = augment(np.ascontiguousarray(pixels), rng)
        return channels_first(mean=self.mean, std=self.std)({"image": pixels})["pixel_values"]

    def middle(self, height: int, width: int) -> tuple[float, float, float, float]:
        """(left, upper, right, lower) of the central square."""
        side = self.central * min(height, width)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2

    def part(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
        """A box drawn at random; one that would reach beyond the image is made smaller, its aspect kept."""
        area, aspect = rng.uniform(self.min_area, 1) * height * width, self.aspect ** rng.uniform(-1, 1)
        w, h = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        fits = min(1.0, width / w, height / h)
        w, h = min(w * fits, width), min(h * fits, height)  # min: what rounding adds
        left, upper = rng.uniform(0, width - w), rng.uniform(0, height - h)
        return left, upper, left + w, upper + h


def viewed(
    *, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, min_area: float = 0.08, aspect: float = 4 / 3, flip: float = 0.5,
    central: float = 0.875, augment: Said = None, image_field: str = "image", label_field: str = "labels", num_labels: int | None = None,
) -> Read:  # fmt: skip
    """An image and its class: pixel_values float32 [C, size, size], labels int32 []; views are random, and augmented, in training alone.

    `augment`: "randaugment:2:9,erase:0.25", see augment.py. C is the length of `mean`. `num_labels`: where given, an image of a class beyond is a bad
    record.
    """
    view, chain = View(size, tuple(mean), tuple(std), min_area, aspect, flip, central), create("image", augment)

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        pixels, label = pixels_of(field(record, image_field), len(view.mean)), _class(field(record, label_field), num_labels)
        return {"pixel_values": view(pixels, rng, chain), "labels": label}

    return reader


def image_shapes(*, size: int, batch_size: int, mean: Sequence[float] = MEAN) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of `viewed`, known without a source."""
    pixels = jax.ShapeDtypeStruct((batch_size, len(mean), size, size), np.float32)
    return {"pixel_values": pixels, "labels": jax.ShapeDtypeStruct((batch_size,), np.int32)}


def count_classes(sources: Iterable[Source]) -> int | None:
    """How many classes sources name, the same ones each; None where they name none (arrays, tables). Raises ValueError for one alone."""
    named = {tuple(getattr(source, "classes", ())) for source in sources}
    if len(named) > 1:
        raise ValueError(f"the sources have different classes: {' and '.join(', '.join(names[:5]) or 'none' for names in sorted(named))}")
    names = named.pop()
    if len(names) == 1:
        raise ValueError(f"all images are of one class, {names[0]!r}: to tell classes apart takes two subfolders or more")
    return len(names) or None
