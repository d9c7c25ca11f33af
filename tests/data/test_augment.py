"""Laws of every augmentation: the same key gives the same, another key another; shape, dtype and range stay; strength 0 changes nothing."""

import inspect
import itertools
import pickle
import sys
import types

import numpy as np
import pytest

from bigflax import data
from bigflax.data.augment import OPERATIONS, TABLES, create
from bigflax.data.sources import Arrays

pytest.importorskip("PIL.Image", reason="an extra")
RNG = np.random.default_rng(0)
Y, X = np.mgrid[:16, :20]
SMOOTH = np.stack([8 * Y, 8 * X, 120 + 6 * Y - 5 * X], -1).astype(np.uint8)
COLOR, GRAY = RNG.integers(20, 220, (16, 20, 3), np.uint8), RNG.integers(20, 220, (28, 28, 1), np.uint8)
TEXT = " The quick  brown fox\njumps over the lazy dog ; twice , then it\trests . "
WAVE, MEL = (0.2 * RNG.normal(size=400)).astype(np.float32).clip(-1, 1), RNG.normal(size=(8, 50)).astype(np.float32)


class WordNet:
    """As nltk has it: every word has two synonyms and itself."""

    def synsets(self, word):
        lemma = lambda name: types.SimpleNamespace(name=lambda: name)
        return [types.SimpleNamespace(lemmas=lambda: [lemma(word), lemma(f"{word}_ish"), lemma(f"un{word}")])] if word.isalpha() else []


@pytest.fixture(autouse=True)
def wordnet(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", types.ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", types.SimpleNamespace(wordnet=WordNet()))
    create.__globals__["_synonyms"].cache_clear()


def operation(name):
    """One operation of RandAugment at a magnitude, either way."""
    return lambda value, rng: OPERATIONS[name](value, rng.choice((-1, 1)) * 0.9)


IMAGES = {  # what is said; the same at strength 0; which values
    "crop": ("crop:3", "crop:0"), "crop, mirrored": ("crop:3:reflect", "crop:0:reflect"), "shift": ("shift:2.5", "shift:0"),
    "rotate": ("rotate:20", "rotate:0"), "scale": ("scale:0.3", "scale:0"), "shear": ("shear:20", "shear:0"),
    "affine": ("affine", "affine:0:0:0:0"), "elastic": ("elastic:1.5", "elastic:0"), "jitter": ("jitter", "jitter:0:0:0:0"),
    "erase": ("erase:1", "erase:0"), "erase, black": ("erase:1:fill=black", "erase:1:0:0"), "randaugment": ("randaugment:4", "randaugment:0"),
    "several": ("crop:2,jitter:hue=0.2,erase:0.9", ""),
}  # fmt: skip
CASES = {
    **{f"{name}, {kind}": ("image", *said, value) for name, said in IMAGES.items() for kind, value in {"color": COLOR, "gray": GRAY}.items()},
    "swap": ("text", "swap:0.3", "swap:0", TEXT), "delete": ("text", "delete:0.3", "delete:0", TEXT),
    "synonyms": ("text", "synonyms:0.3", "synonyms:0", TEXT), "shift of sound": ("wave", "shift:0.4", "shift:0", WAVE),
    "gain": ("wave", "gain:20", "gain:0", WAVE), "noise": ("wave", "noise:5", "noise:0", WAVE),
    "mask of bands": ("mel", "mask:4:0", "mask:0:0", MEL), "mask of frames": ("mel", "mask:0:20:3", "mask:4:20:0", MEL),
}  # fmt: skip
many = pytest.mark.parametrize("kind, said, nothing, value", CASES.values(), ids=CASES)
equal = np.testing.assert_array_equal
key = lambda index: np.random.default_rng([7, 1, index])


def test_the_table_is_whole():
    tried = {(kind, name.split(":")[0]) for kind, said, *_ in CASES.values() for name in said.split(",")}
    assert tried == {(kind, name) for kind, table in TABLES.items() for name in table}


@many
def test_what_is_drawn_is_a_function_of_the_key(kind, said, nothing, value):
    before, chain = pickle.dumps(value), create(kind, said)
    seen = [chain(value, key(index)) for index in range(40)]
    for index, again in enumerate(seen):
        equal(pickle.loads(pickle.dumps(chain))(value, key(index)), again)  # in a worker process too
    assert len({str(one) if kind == "text" else one.tobytes() for one in seen}) > 15  # of 40 keys; posterize and equalize do not draw
    assert pickle.dumps(value) == before  # and what was read is as it was


@many
def test_shape_dtype_and_range_are_kept_and_strength_0_is_the_identity(kind, said, nothing, value):
    for index in range(40):
        out = create(kind, said)(value, key(index))
        if kind != "text":
            assert out.shape == value.shape and out.dtype == value.dtype
        if kind == "wave":
            assert np.abs(out).max() <= 1
        if kind == "mel":
            assert value.min() <= out.min() and out.max() <= value.max()
        equal(create(kind, nothing)(value, key(index)), value)


@pytest.mark.parametrize("image", [COLOR, GRAY], ids=["color", "gray"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_randaugment(name, image):
    """Each changes an image of noise except "identity", and those of color a gray one, and keeps what an image is; at level 0 nothing but the two
    that have no level changes anything."""
    for level in (-3.0, -0.9, 0.4, 3.0):
        out = OPERATIONS[name](image, level)
        assert out.shape == image.shape and out.dtype == np.uint8
        still = name == "identity" or (name == "color" and image is GRAY)
        assert np.array_equal(out, image) == still
    if name not in ("auto_contrast", "equalize"):
        equal(OPERATIONS[name](image, 0.0), image)


def bright(image):
    """Where the light is: (row, column) from the centre."""
    weights = image.sum(-1, dtype=float)
    return np.array(
        [(weights * (axis + 0.5 - n / 2)).sum() / weights.sum() for axis, n in zip(np.indices(weights.shape), weights.shape, strict=True)]
    )


def test_geometry_goes_where_it_says():
    """A spot right of the centre, 8 pixels out: where a turn, a shift and a scale put it, to a tenth of a pixel (bilinear)."""
    spot = np.zeros((33, 33, 1), np.uint8)
    spot[15:18, 23:26] = 200
    assert bright(spot) == pytest.approx([0, 8])
    turned = np.array([bright(create("image", "rotate:90")(spot, key(i))) for i in range(60)])
    np.testing.assert_allclose(np.hypot(*turned.T), 8, atol=0.1)
    angles = np.degrees(np.arctan2(*turned.T))
    assert angles.min() < -75 and angles.max() > 75 and (abs(angles) <= 90.1).all()
    moved = np.array([bright(create("image", "shift:5")(spot, key(i))) for i in range(60)]) - [0, 8]
    assert (abs(moved) <= 5.1).all() and (moved.max(0) > 4).all() and (moved.min(0) < -4).all()
    scaled = np.array([bright(create("image", "scale:0.5")(spot, key(i))) for i in range(60)])
    assert (abs(scaled[:, 0]) < 0.1).all() and 5.2 < scaled[:, 1].min() < 6 and 11 < scaled[:, 1].max() < 12.1
    leant = np.array([bright(create("image", "shear:45")(np.swapaxes(spot, 0, 1), key(i))) for i in range(60)])
    assert (abs(leant[:, 0] - 8) < 0.1).all() and leant[:, 1].max() > 6 and leant[:, 1].min() < -6


def test_turned_and_sheared_at_once_an_area_stays_as_large():
    square = np.zeros((41, 41, 1), np.uint8)
    square[14:27, 14:27] = 200
    areas = [create("image", "affine:60:0:40:0")(square, key(i)).sum(dtype=float) / square.sum(dtype=float) for i in range(40)]
    np.testing.assert_allclose(areas, 1, atol=0.03)  # bilinear: the edge of 52 pixels, each off by up to a tenth


def test_a_crop_is_a_part_of_the_padded_image():
    seen = {create("image", "crop:1:reflect")(SMOOTH, key(i)).tobytes() for i in range(100)}
    padded = np.pad(SMOOTH, ((1, 1), (1, 1), (0, 0)), "reflect")
    assert seen == {padded[t : t + 16, l : l + 20].tobytes() for t in range(3) for l in range(3)}  # all nine


def test_elastic_moves_smoothly_by_what_it_is_told():
    """Of a ramp of 8 a pixel the change is 8 times the move: about a pixel in root mean square, edges and rounding left out."""
    ramp = np.broadcast_to((8 * np.arange(31, dtype=np.uint8))[None, :, None], (31, 31, 1)).copy()
    moves = np.array([create("image", "elastic:1:3")(ramp, key(i))[3:-3, 3:-3, 0] / 8 - np.arange(3, 28) for i in range(30)])
    assert 0.7 < np.sqrt(np.square(moves).mean()) < 1.3
    assert np.abs(np.diff(moves, axis=1)).max() < 0.7 * np.abs(moves).max()  # neighbours go together


def test_erasing_takes_the_part_and_the_chance_that_it_is_told():
    white = np.full((40, 40, 1), 255, np.uint8)
    parts = np.array([(create("image", "erase:0.5:0.1:0.2:2:black")(white, key(i)) == 0).mean() for i in range(300)])
    assert 110 < (parts > 0).sum() < 190  # 150 at a deviation of 8.7, 4 of them
    assert 0.09 < parts[parts > 0].min() and parts.max() < 0.22  # sides are whole pixels


def test_jitter_turns_hues_and_keeps_gray():
    red, gray = (np.tile(np.array(c, np.uint8), (4, 4, 1)) for c in ((200, 30, 30), (90, 90, 90)))
    turned = {tuple(create("image", "jitter:0:0:0:0.5")(red, key(i))[0, 0]) for i in range(60)}
    assert any(g > r for r, g, b in turned) and any(b > r for r, g, b in turned) and all(max(c) == 200 for c in turned)
    for i in range(10):
        equal(create("image", "jitter:0:0:0.9:0.5")(gray, key(i)), gray)


# -- text and sound --------------------------------------------------------------------------------------------------------


def test_words_are_kept_dropped_or_named_anew():
    words = TEXT.split()
    for i in range(40):
        assert sorted(create("text", "swap:0.3")(TEXT, key(i)).split()) == sorted(words)
        left = iter(words)
        assert all(word in left for word in create("text", "delete:0.5")(TEXT, key(i)).split())  # in order
        new = create("text", "synonyms:0.2")(TEXT, key(i)).replace(" ish", "_ish").split()
        changed = [(a, b) for a, b in zip(words, new, strict=True) if a != b]
        assert len(changed) == 4 and all(b in (f"{a.lower()}_ish", f"un{a.lower()}") for a, b in changed)  # a fifth of 16, rounded up
        assert len(create("text", "delete:1")(TEXT, key(i)).split()) == 1
    lengths = [len(create("text", "delete:0.25")(TEXT, key(i)).split()) for i in range(200)]
    assert 11.5 < np.mean(lengths) < 12.5  # 12 of 16, deviation 1.73 / sqrt(200) = 0.12, 4 of them
    for text in ("", " ", "one"):
        assert [create("text", f"{name}:1")(text, key(0)) for name in ("swap", "delete")] == [text, text]


def test_without_wordnet_it_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(ImportError, match=r"synonyms come from WordNet: pip install nltk && python -m nltk.downloader wordnet"):
        create("text", "swap,synonyms")


def test_sound_comes_late_louder_and_noisier():
    for i in range(40):
        moved = create("wave", "shift:0.4")(WAVE, key(i))
        by = next(
            by for by in range(-160, 161) if np.array_equal(moved[max(0, by) : 400 + min(0, by)], WAVE[max(0, -by) : 400 - max(0, by)])
        )
        assert not moved[: max(0, by)].any() and not moved[400 + min(0, by) :].any()
        factors = create("wave", "gain:6")(0.1 * WAVE, key(i)) / (0.1 * WAVE)
        assert np.ptp(factors) < 1e-5 and 0.5 < factors.mean() < 2  # 6 decibels are a factor of 1.995
        added = create("wave", "noise:0.5")(0.1 * WAVE, key(i)) - 0.1 * WAVE
        assert np.square(added).mean() < 0.5**2 * 1.5 * np.square(0.1 * WAVE).mean()  # 400 draws: their variance is within 1.5


def test_masks_are_whole_bands_and_frames():
    for i in range(40):
        out = create("mel", "mask:3:10:2")(MEL, key(i))
        hidden = np.isclose(out, MEL.mean()) & (out != MEL)
        bands, frames = hidden.all(1), hidden.all(0)
        equal(hidden, bands[:, None] | frames[None])
        assert bands.sum() <= 6 and frames.sum() <= 20
        equal(out[~hidden], MEL[~hidden])
    assert max((create("mel", "mask:0:40:1:0.1")(MEL, key(i)) != MEL).all(0).sum() for i in range(60)) == 5  # a tenth of 50


# -- how it is said --------------------------------------------------------------------------------------------------------


def test_words_and_rows_say_the_same():
    words = create("image", "crop:2:reflect, erase:0.25:fill=black")
    for said in (
        [("crop", 2, "reflect"), ("erase", 0.25, {"fill": "black"})],
        ["crop:2:reflect", ["erase", {"chance": 0.25, "fill": "black"}]],
    ):
        assert create("image", said).said == words.said
    assert words.said[0] == ["crop", {"pixels": 2, "fill": "reflect"}] and create("text").said == create("text", "").said == []


MISTAKES = {
    "a kind": ("images", "crop", "there is no augmentation of 'images'; there is that of 'image'"),
    "a name": ("image", "rotat:3", "there is no augmentation 'rotat' of image; there are 'rotate'"),
    "a name of another kind": ("text", "crop", "there is no augmentation 'crop' of text; there are 'delete', 'swap', 'synonyms'"),
    "an option": ("image", "erase:chanse=1", "erase has no option 'chanse'; there are 'chance'"),
    "too many": ("image", "rotate:3:4", "rotate takes degrees, not 2 values"),
    "a word": ("image", "rotate:much", "rotate's degrees is a number, as 10.0 is, not 'much'"),
    "a whole number": ("image", "crop:2.5", "crop's pixels is a whole number, as 4 is, not 2.5"),
    "a yes": ("text", [["swap", True]], "swap's share is a number, as 0.1 is, not True"),
    "one row that is not in a list": ("image", ("shift", 2), r"said as 'name:value' or as \(name, \*values\), not as 2"),
    "a number": ("image", [("crop", 2, 3)], "crop's fill is a word, as 'black' is, not 3"),
    "a fill": ("image", "crop:2:mirror", "crop has no fill 'mirror'; there are 'black', 'edge', 'reflect'"),
    "a range": ("image", "jitter:hue=0.7", "hue 0.7 is not between 0 and 0.5"),
    "an order": ("image", "erase:1:0.3:0.2", "high 0.2 is not between 0.3 and 1"),
    "a magnitude": ("image", "randaugment:2:31", "m 31 is not between 0 and 30"),
    "a share": ("text", "delete:1.5", "share 1.5 is not between 0 and 1"),
    "a level": ("wave", "noise:-1", "level -1 is not between 0 and 10"),
}


@pytest.mark.parametrize("kind, said, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(kind, said, message):
    with pytest.raises(ValueError, match=message):
        create(kind, said)


# -- in batches of images ----------------------------------------------------------------------------------------------------

WHOLE = dict(size=16, batch_size=4, mean=(0.0,), std=(1.0,), min_area=1.0, aspect=1.0, flip=0.0, central=1.0)
DIGITS = RNG.integers(1, 256, (24, 16, 16), np.uint8)
MOVED = "crop:2,erase:0.5"


def batches(**options):
    options = {**WHOLE, "validation_fraction": 0.0, **options}
    view = {name: options.pop(name) for name in inspect.signature(data.viewed).parameters if name in options}
    source = Arrays({"image": DIGITS, "labels": np.arange(24)}, "made")
    return data.record_batches(source, data.viewed(**view), identity=view, **options)


def rows(loader):
    return [{name: np.asarray(value) for name, value in batch.items()} for batch in loader]


def test_an_image_of_a_batch_is_augmented_by_its_index_and_epoch_alone_and_keeps_its_label():
    """What the whole stream gives is what the function gives, whoever reads."""
    chain, seen = create("image", MOVED), {}
    with batches(augment=MOVED, repeat=2, shards=2, read_threads=2) as loader:
        for batch in rows(loader):
            for x, y in zip(batch["pixel_values"], batch["labels"], strict=True):
                seen.setdefault(int(y), []).append(np.rint(255 * x[0]).astype(np.uint8).tobytes())
    assert sorted(seen) == [*range(24)]
    from bigflax.data.pipeline import sub_seed

    def drawn(epoch, index):
        rng = np.random.default_rng([sub_seed(0, "source", 0), epoch, index])
        [rng.uniform() for _ in range(5)]  # the view's: area, aspect, left, upper, whether to mirror
        return chain(DIGITS[index][..., None], rng).tobytes()

    assert all(sorted(found) == sorted(drawn(epoch, index) for epoch in range(2)) for index, found in seen.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_augmented_stream_goes_on_bit_for_bit(workers):
    options = dict(augment=MOVED, shards=2)
    take = lambda loader, n: rows(itertools.islice(loader, n))
    with batches(**options) as loader:
        whole = take(loader, 12)
    with batches(**options) as loader:
        take(loader, 7)
        state = loader.state()
    with batches(**options, workers=workers) as loader:
        loader.restore(state)
        for got, want in zip(take(loader, 5), whole[7:], strict=True):
            equal(got["pixel_values"], want["pixel_values"])
            equal(got["labels"], want["labels"])
    with (
        batches(**options | {"augment": "crop:3"}) as loader,
        pytest.raises(ValueError, match="not the one that was saved; changed: augment"),
    ):
        loader.restore(state)


def test_held_out_images_stay_as_they_are():
    for split in ("validation", "all"):
        fraction = dict(validation_fraction=0.5) if split == "validation" else {}
        with batches(augment="crop:4,erase:1", split=split, repeat=False, **fraction) as loader:
            seen = {int(y): x for batch in rows(loader) for x, y in zip(batch["pixel_values"], batch["labels"], strict=True) if y >= 0}
        for index, pixels in seen.items():
            equal(np.rint(255 * pixels[0]), DIGITS[index])
