"""Images of a folder, channels last, as a model takes them."""

import pickle

import jax
import numpy as np
import pytest

from bigflax import data, models

IMAGE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.mark.parametrize("mean, std", [tuple(how.values()) for how in data.NORMALIZED.values()], ids=data.NORMALIZED)
def test_every_pixel(mean, std):
    got = pickle.loads(pickle.dumps(data.channels_first(mean=mean, std=std)))({"image": IMAGE, "labels": np.int32(3)})
    assert got["labels"] == 3 and got.keys() == {"pixel_values", "labels"} and got["pixel_values"].dtype == np.float32
    for y, x, c in np.ndindex(IMAGE.shape):
        assert got["pixel_values"][c, y, x] == pytest.approx((IMAGE[y, x, c] / 255 - mean[c]) / std[c], abs=1e-6)


@pytest.mark.parametrize(
    "name, processor", {"half": "ViTImageProcessor", "imagenet": "BitImageProcessor", "clip": "CLIPImageProcessor"}.items()
)
def test_it_is_what_the_processors_of_transformers_make(name, processor):
    transformers = pytest.importorskip("transformers", reason="an oracle for tests")
    kind = getattr(transformers, processor)
    how = data.NORMALIZED[name]
    theirs = kind(do_resize=False, do_center_crop=False, image_mean=list(how["mean"]), image_std=list(how["std"]))
    if name != "imagenet":  # that of DINOv2, whose folders say the means
        np.testing.assert_allclose(kind().image_mean, how["mean"])
        np.testing.assert_allclose(kind().image_std, how["std"])
    want = np.asarray(theirs(images=[IMAGE])["pixel_values"])[0]
    np.testing.assert_allclose(data.channels_first(**how)({"image": IMAGE})["pixel_values"], want, atol=2e-6)  # of numbers up to 2.6


def test_gray_images_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="an image of 1 channels cannot be normalized with the means of 3"):
        data.channels_first(**data.NORMALIZED["half"])({"image": IMAGE[..., :1]})


def test_a_folder_of_images_goes_into_a_model(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="an extra")
    for i in range(4):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        image.fromarray(IMAGE + np.uint8(i)).save(tmp_path / f"class{i % 2}" / f"{i}.png")
    source = data.open_source("images", path=tmp_path, size=32)
    batch = next(iter(data.record_batches(source, data.channels_first(**data.NORMALIZED["half"]), batch_size=4, split="all")))
    model = models.create("vit", size="tiny")
    out = model.apply(jax.jit(model.init)(jax.random.key(0)), pixel_values=batch["pixel_values"])
    assert out["logits"].shape == (4, 2) and sorted(np.asarray(batch["labels"])) == [0, 0, 1, 1]
