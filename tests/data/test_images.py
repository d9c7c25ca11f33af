"""Images with classes, as batches: what a view is, what is drawn, what is refused."""

import inspect
import io
import itertools

import numpy as np
import pytest

from bigflax import data
from bigflax.data.images import MEAN, STD, View, pixels_of
from bigflax.data.sources import Arrays

Image = pytest.importorskip("PIL.Image", reason="an extra")
RNG = np.random.default_rng(0)
MANY = RNG.integers(0, 256, (40, 12, 18, 3), np.uint8)
PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def arrays(n=40, **more):
    return Arrays({"image": MANY[:n], "labels": np.arange(n) % 4, **more}, "made")


def batches(source, **options):
    """Of `viewed`, whose own options are among these."""
    options = {"size": 8, "batch_size": 4, "split": "all", "repeat": False, **options}
    view = {name: options.pop(name) for name in inspect.signature(data.viewed).parameters if name in options}
    return data.record_batches(source, data.viewed(**view), identity=view, **options)


# -- views -----------------------------------------------------------------------------------------------------------------


def test_the_central_view_of_a_whole_square_is_the_image():
    pixels = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(View(8, central=1.0)(pixels), data.channels_first(mean=MEAN, std=STD)({"image": pixels})["pixel_values"])


@pytest.mark.parametrize("height, width", [(300, 400), (500, 260), (256, 256)])
def test_the_central_view_is_the_middle_of_the_scaled_image(height, width):
    """As in two steps, the short side to 256 and then 224 x 224 from the middle; a smooth image, so that half a pixel of rounding is within 2%."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1).astype(np.uint8)
    short = min(height, width)
    scaled = Image.fromarray(pixels).resize((round(width * 256 / short), round(height * 256 / short)), Image.Resampling.BILINEAR)
    left, upper = (scaled.width - 224) // 2, (scaled.height - 224) // 2
    want = np.asarray(scaled.crop((left, upper, left + 224, upper + 224))).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(View(224, **PLAIN)(pixels), want, atol=0.02)


def test_parts_drawn_lie_inside_and_have_the_area_and_aspect_asked_for():
    view, seen = View(8, min_area=0.2, aspect=2.0), []
    for seed, (height, width) in itertools.product(range(200), [(30, 30), (20, 50)]):
        left, upper, right, lower = view.part(height, width, np.random.default_rng(seed))
        assert 0 <= left < right <= width + 1e-9 and 0 <= upper < lower <= height + 1e-9
        w, h = right - left, lower - upper
        assert 0.5 - 1e-9 <= w / h <= 2 + 1e-9
        seen.append((w * h / (height * width), left, upper))
    areas = np.array(seen)[:, 0]
    assert areas.max() <= 1 + 1e-9 and areas.min() < 0.25 and areas.max() > 0.9
    assert len({*seen}) == len(seen)


def test_flip_mirrors_the_width():
    pixels, whole = RNG.integers(0, 256, (8, 8, 3), np.uint8), dict(min_area=1.0, aspect=1.0, **PLAIN)
    plain, flipped = (View(8, flip=chance, **whole)(pixels, np.random.default_rng(0)) for chance in (0.0, 1.0))
    np.testing.assert_array_equal(plain, View(8, central=1.0, **PLAIN)(pixels))
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])
    half = [View(8, **whole)(pixels, np.random.default_rng(seed)) for seed in range(200)]
    assert 70 < sum(np.array_equal(one, flipped) for one in half) < 130  # of 200 at a chance of a half, 4 deviations


# -- batches -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [MEAN, (0.5,)], ids=["color", "gray"])
def test_the_batch_is_of_the_shapes_that_are_known_without_a_source(mean):
    pixels = MANY if len(mean) == 3 else MANY[..., 0]  # [H, W], as MNIST's digits come
    source, options = Arrays({"image": pixels, "labels": np.arange(40) % 4}, "made"), dict(size=8, batch_size=4, mean=mean)
    spec = batches(source, **options, std=mean).spec
    assert {k: (x.shape, x.dtype) for k, x in spec.items()} == {k: (x.shape, x.dtype) for k, x in data.image_shapes(**options).items()}


def test_a_view_depends_on_seed_epoch_and_index_alone():
    tones = MANY[:1] // 8 + np.arange(8, dtype=np.uint8)[:, None, None, None] * 28
    flat = Arrays({"image": tones, "labels": np.arange(8)}, "tones")

    def seen(**options):
        """The views of each image, by its label, sorted: they come from three epochs."""
        views = {label: [] for label in range(8)}
        for batch in batches(flat, batch_size=8, split="train", validation_fraction=0.0, repeat=3, **options):
            for x, y in zip(np.asarray(batch["pixel_values"]), np.asarray(batch["labels"]), strict=True):
                if y >= 0:
                    views[int(y)].append(x.tobytes())
        return {label: sorted(found) for label, found in views.items()}

    one = seen(seed=1)
    assert one == seen(seed=1, shards=4) == seen(seed=1, read_threads=2)
    assert all(len({*found}) == 3 for found in one.values())  # another one each epoch
    assert seen(seed=2) != one


def test_validation_is_not_drawn():
    """Two passes give the same pixels, those of the central view."""
    options = dict(split="validation", validation_fraction=0.5)
    loader = batches(arrays(), **options)
    first, again = ([np.asarray(b["pixel_values"]) for b in loader] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    want = {View(8)(image).tobytes() for image in MANY}
    assert {x.tobytes() for x in np.concatenate(first)[: len(first[0])]} <= want


def test_an_interrupted_stream_goes_on_bit_for_bit():
    options = dict(split="train", repeat=True, shards=2)
    with batches(arrays(), **options) as loader:
        whole = [np.asarray(b["pixel_values"]) for b in itertools.islice(loader, 9)]
    with batches(arrays(), **options) as loader:
        [next(loader) for _ in range(4)]
        state = loader.state()
    with batches(arrays(), **options) as loader:
        loader.restore(state)
        np.testing.assert_array_equal([np.asarray(b["pixel_values"]) for b in itertools.islice(loader, 5)], whole[4:])
    with batches(arrays(), **options, flip=0.0) as loader, pytest.raises(ValueError, match="not the one that was saved; changed: flip"):
        loader.restore(state)


def test_sources_of_a_mixture_come_by_their_weights():
    dark, light = (Arrays({"image": np.full((30, 9, 9, 3), tone, np.uint8), "labels": np.zeros(30, int)}, str(tone)) for tone in (0, 255))
    with batches([(dark, 3.0), (light, 1.0)], split="train", repeat=True, batch_size=16, **PLAIN) as loader:
        tones = [np.asarray(next(loader)["pixel_values"])[:, 0, 0, 0].mean() for _ in range(4)]
    np.testing.assert_allclose(tones, 0.25, atol=0.1)  # a row of 16 more or less


def test_workers_give_the_same_batches():
    options = dict(split="train", repeat=1)
    with batches(arrays(), **options, shards=2) as one, batches(arrays(), **options, shards=2, workers=1) as other:
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a["pixel_values"], b["pixel_values"])


# -- what is no image ----------------------------------------------------------------------------------------------------------

GOOD, PNG = MANY[0], encoded(MANY[0])
FORMS = {"array": GOOD, "file": PNG, "as in Hugging Face's data sets": {"bytes": PNG, "path": "x.png"}, "jpeg": encoded(GOOD, "JPEG")}
FAULTS = {
    "truncated": ({"image": PNG[:60], "labels": 0}, "not a whole image"),
    "no image": ({"image": b"text", "labels": 0}, "not a whole image"),
    "floats": ({"image": GOOD / 255, "labels": 0}, r"uint8 \[height, width, channels\] or an encoded file, not float64\[12, 18, 3\]"),
    "a path": ({"image": "x.png", "labels": 0}, "or an encoded file, not str"),
    "nothing": ({"image": None, "labels": 0}, "or an encoded file, not NoneType"),
    "gray": ({"image": GOOD[..., :1], "labels": 0}, "an image of 1 channels cannot be normalized with the means of 3"),
    "another field": ({"img": GOOD, "labels": 0}, "no field 'image', nearest is 'img'"),
    "no label": ({"image": GOOD, "label": 0}, "no field 'labels', nearest is 'label'"),
    "a name for a class": ({"image": GOOD, "labels": "cat"}, "a class is a whole number, not 'cat'"),
    "a class beyond": ({"image": GOOD, "labels": 4}, "class 4 is not below the number of classes, 4"),
    "a class below": ({"image": GOOD, "labels": -1}, "class -1 is below 0"),
}


class Given:
    """A source of what it is given."""

    def __init__(self, *records):
        self._records = records

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]

    def name(self, index):
        return f"record {index}"


@pytest.mark.parametrize("image", FORMS.values(), ids=FORMS)
def test_an_image_is_an_array_or_a_file(image):
    got = pixels_of(image)
    label = data.viewed(size=8)({"image": image, "labels": 3}, None)["labels"]
    assert got.dtype == np.uint8 and label == 3 and label.dtype == np.int32
    np.testing.assert_allclose(got.astype(float), GOOD, atol=255 if isinstance(image, bytes) and image != PNG else 0)  # JPEG loses
    assert pixels_of(encoded(GOOD), 1).shape == (12, 18, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_image_is_a_bad_record(fault, tmp_path):
    record, reason = FAULTS[fault]
    quality = data.Quality(field=None, quarantine=tmp_path / "bad.jsonl")
    source = Given(record, *({"image": GOOD, "labels": i % 4} for i in range(4)))
    labels = [label for batch in batches(source, quality=quality, num_labels=4) for label in np.asarray(batch["labels"]) if label >= 0]
    assert sorted(labels) == [0, 1, 2, 3] and [*quality.bad] == ["record 0"]
    with pytest.raises(data.BadRecord, match=f"bad record record 0: .*{reason}"):
        [*batches(source, quality=data.Quality(field=None, bad_records="stop"), num_labels=4)]


REFUSED = {
    "size": (dict(size=0), "size 0 must be at least 1"),
    "means": (dict(mean=(0.5, 0.5), std=(0.5, 0.5)), "mean and std of 1 or of 3 channels, not 2 and 2"),
    "mean and std": (dict(mean=(0.5,)), "mean and std of 1 or of 3 channels, not 1 and 3"),
    "area": (dict(min_area=0.0), "min_area 0.0 and central 0.875 are parts of a whole"),
    "aspect": (dict(aspect=0.5), "aspect 0.5 is at least 1"),
}


@pytest.mark.parametrize("options, said", REFUSED.values(), ids=REFUSED)
def test_refusals(options, said):
    with pytest.raises(ValueError, match=said):
        batches(arrays(), **options)


def test_classes_of_sources():
    named = lambda *classes: type("Folder", (Given,), {"classes": [*classes]})({})
    assert data.count_classes([named("a", "b"), named("a", "b")]) == 2
    assert data.count_classes([arrays()]) is None
    with pytest.raises(ValueError, match="all images are of one class, 'a'"):
        data.count_classes([named("a")])
    with pytest.raises(ValueError, match="the sources have different classes: a, b and a, c"):
        data.count_classes([named("a", "c"), named("a", "b")])
