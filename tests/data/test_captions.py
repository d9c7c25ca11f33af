"""Images and their texts as rows: what a record holds, where a text ends, what is drawn, what is refused."""

import io

import numpy as np
import pytest

from bigflax import data
from bigflax.data.images import View
from bigflax.data.sources import Arrays

Image = pytest.importorskip("PIL.Image", reason="an extra")
BYTES = data.byte_tokenizer()
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
OPTIONS = dict(length=6, size=8)


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def encoded():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


FORMS = {"a file's name": "a.png", "a file": encoded(), "as in Hugging Face's data sets": {"bytes": encoded()}, "an array": PIXELS}


@pytest.mark.parametrize("image", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("text, want", [("cat", [*b"cat", "end", "pad", "pad"]), ("cat, cats", [*b"cat, ", "end"])])
def test_a_row_is_the_whole_image_and_the_text_with_its_end(image, text, want, folder):
    row = data.captioned(BYTES, folder=str(folder), **OPTIONS)({"image": image, "text": text})
    marks = {"end": BYTES.eos_id, "pad": BYTES.pad_id}
    np.testing.assert_array_equal(row["input_ids"], [marks.get(x, x) for x in want])
    np.testing.assert_array_equal(row["attention_mask"], [x != "pad" for x in want])
    clip = data.NORMALIZED["clip"]
    np.testing.assert_array_equal(row["pixel_values"], View(8, clip["mean"], clip["std"], central=1.0)(PIXELS))


def test_a_batch_has_the_shapes_known_without_a_source_and_its_padding_has_no_text(folder):
    source = Arrays({"image": np.stack([PIXELS] * 3)}, "made")
    read = data.captioned(BYTES, **OPTIONS)
    with data.record_batches(
        source, lambda record, rng: read({**record, "text": "cat"}, rng), batch_size=4, split="all", repeat=False
    ) as batches:
        spec, (batch,) = batches.spec, list(batches)
    shapes = data.captioned_shapes(batch_size=4, **OPTIONS)
    assert {k: (x.shape, x.dtype) for k, x in spec.items()} == {k: (x.shape, x.dtype) for k, x in shapes.items()}
    np.testing.assert_array_equal(np.asarray(batch["attention_mask"]).any(1), [True, True, True, False])


def test_views_are_drawn_and_changed_in_training_alone_and_never_mirrored():
    record, ramp = {"text": "cat"}, np.broadcast_to(np.arange(0, 256, 32, dtype=np.uint8)[None, :, None], (8, 8, 3))
    views = lambda n, **more: [
        data.captioned(BYTES, **OPTIONS, **more)({"image": ramp, **record}, np.random.default_rng(i))["pixel_values"] for i in range(n)
    ]
    drawn = views(50)
    assert len({x.tobytes() for x in drawn}) > 10 and all(x[0, 4, 6] > x[0, 4, 1] for x in drawn)  # brighter to the right, as it was
    black = views(1, augment="erase:1:1:1:1:black")[0]
    assert black.max() < 0 < drawn[0].max()
    held_out = data.captioned(BYTES, **OPTIONS, augment="erase:1:1:1:1:black")({"image": ramp, **record})
    assert held_out["pixel_values"].max() > 0


def test_words_are_left_out_in_training_alone():
    read, record = data.captioned(BYTES, **OPTIONS, augment_text="delete:1"), {"image": PIXELS, "text": "a b"}
    length = lambda rng: int(read(record, rng)["attention_mask"].sum())
    assert length(None) == 4 and all(length(np.random.default_rng(i)) < 4 for i in range(5))  # one word, its blank, and the end


REFUSED = {
    "no such file": ({"image": "c.png", "text": "cat"}, "the image 'c.png' cannot be read: .*No such file"),
    "half a file": ({"image": "b.png", "text": "cat"}, "not a whole image"),
    "no image": ({"img": "a.png", "text": "cat"}, "no field 'image', nearest is 'img'"),
    "no text": ({"image": "a.png", "text": " "}, "field 'text' is empty"),
}


@pytest.mark.parametrize("record, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(record, message, folder):
    with pytest.raises(ValueError, match=message):
        data.captioned(BYTES, folder=str(folder), **OPTIONS)(record)
