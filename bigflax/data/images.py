"""Batches of images with their classes: decoded, cut out, scaled, normalized.

    source = open_source("images", path="photos")                    a folder with one subfolder a class
    batches = image_batches(source, size=224, batch_size=256, mesh=mesh)

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

import grain
import jax
import numpy as np

from bigflax.data.augment import Chain, Said, create
from bigflax.data.examples import field
from bigflax.data.loader import Loader
from bigflax.data.packing import Example
from bigflax.data.pipeline import MakeShard, Mixed, Records, make_loader, positions, read, sub_seed
from bigflax.data.pixels import NORMALIZED, channels_first
from bigflax.data.quality import Quality
from bigflax.data.records import decoded, extra
from bigflax.data.sources import Record, Source

MEAN, STD = NORMALIZED["imagenet"]["mean"], NORMALIZED["imagenet"]["std"]


class Pictures:
    """A source of {"image": uint8 [H, W, C], "labels": int32} over one whose records hold an image, an array or an encoded file, and a class.

    A file may be bytes or {"bytes": bytes}, as Hugging Face's data sets have it. What is no such image, or no class below `classes`, is a fault.
    """

    def __init__(self, source: Source, *, channels: int = 3, classes: int | None = None, image: str = "image", label: str = "labels"):
        self._source, self._channels, self._classes, self._image, self._label = source, channels, classes, image, label

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        if "fault" in record:
            return record
        try:
            return {"image": self._pixels(field(record, self._image)), "labels": self._class(field(record, self._label))}
        except ValueError as error:
            return {"fault": str(error)}

    def _pixels(self, image: Any) -> np.ndarray:
        encoded = image.get("bytes") if isinstance(image, Mapping) else image
        if isinstance(encoded, bytes):
            encoded = np.asarray(decoded(io.BytesIO(encoded), "L" if self._channels == 1 else "RGB"))
        if not isinstance(encoded, np.ndarray) or encoded.dtype != np.uint8 or encoded.ndim not in (2, 3) or not encoded.size:
            what = f"{encoded.dtype}{list(encoded.shape)}" if isinstance(encoded, np.ndarray) else type(encoded).__name__
            raise ValueError(f"an image is uint8 [height, width, channels] or an encoded file, not {what}")
        pixels = encoded.reshape(*encoded.shape[:2], -1)
        if pixels.shape[2] != self._channels:
            raise ValueError(f"an image of {pixels.shape[2]} channels cannot be normalized with the means of {self._channels}")
        return pixels

    def _class(self, label: Any) -> np.int32:
        if not np.issubdtype(np.asarray(label).dtype, np.integer) or np.ndim(label):
            raise ValueError(f"a class is a whole number, not {label!r}")
        if label < 0 or (self._classes is not None and label >= self._classes):
            raise ValueError(f"class {label} is {'below 0' if label < 0 else f'not below the number of classes, {self._classes}'}")
        return np.int32(label)


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


@dataclasses.dataclass
class Views:
    """make_shard(v, S) of {"pixel_values", "labels"}: a view of each image, drawn at random where `random`."""

    records: Records
    view: View
    random: bool
    seed: int = 0
    repeat: bool | int = True
    read_threads: int = 0
    augment: Chain | None = None

    def element(self, at: dict[str, int]) -> Example | None:
        record = self.records(at["index"])
        if record is None:
            return None
        rng = np.random.default_rng([self.seed, at["epoch"], at["index"]]) if self.random else None
        return {"pixel_values": self.view(record["image"], rng, self.augment), "labels": record["labels"]}

    def __call__(self, shard: int, shards: int) -> grain.IterDataset:
        return read(
            positions(self.records, shard, shards, seed=self.seed, repeat=self.repeat), self.element, read_threads=self.read_threads
        )


def image_batches(
    source: Source | Sequence[tuple[Source, float]],
    *,
    size: int,
    batch_size: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    min_area: float = 0.08,
    aspect: float = 4 / 3,
    flip: float = 0.5,
    central: float = 0.875,
    augment: Said = None,
    image_field: str = "image",
    label_field: str = "labels",
    classes: int | None = None,
    split: str = "train",
    validation_fraction: float = 0.05,
    split_by: str = "name",
    seed: int = 0,
    repeat: bool | int = True,
    mesh=None,
    quality: Quality | None = None,
    read_threads: int = 0,
    **loader,
) -> Loader:
    """Batches of pixel_values float32 [B, C, size, size] and labels int32 [B]; views are random, and augmented, in the "train" split alone.

    `augment`: "randaugment:2:9,erase:0.25", see augment.py. C is the length of `mean`. `classes`: where given, an image of
    a class beyond is a bad record. Other options as for `text_batches`.
    """
    quality = quality or Quality(field=None)
    weighted = [(source, 1.0)] if isinstance(source, Source) else list(source)
    view = View(size, tuple(mean), tuple(std), min_area, aspect, flip, central)
    chain = create("image", augment)
    pictures = lambda one: Pictures(one, channels=len(view.mean), classes=classes, image=image_field, label=label_field)
    parts: list[MakeShard] = [
        Views(
            Records(pictures(one), quality, split, validation_fraction, split_by), view, split == "train", sub_seed(seed, "source", k),
            repeat, read_threads, chain,
        )
        for k, (one, _) in enumerate(weighted)
    ]  # fmt: skip
    weights = [float(weight) for _, weight in weighted]
    make = parts[0] if len(parts) == 1 else Mixed(parts, weights)
    stream = {"data": [part.records.fingerprint() for part in parts], "weights": weights, "view": dataclasses.asdict(view)}
    identity = {**stream, "augment": chain.said or None, "fields": [image_field, label_field], "seed": seed, "repeat": repeat}
    return make_loader(make, batch_size, mesh, quality, repeat, identity, loader)


def image_shapes(*, size: int, batch_size: int, mean: Sequence[float] = MEAN) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of `image_batches`, known without a source."""
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
