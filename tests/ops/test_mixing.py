"""Mixed images and labels, against both papers' definitions; the key decides, labels that are none stay none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import make_mesh, nn, sharding, tasks
from bigflax.ops.mixing import mixed

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(16, 3, 10, 14)).astype(np.float32)
LABELS = np.array([*range(6), *range(6), 0, 3, 1, 4])
CASES = {"mixup": dict(mixup=0.8), "cutmix": dict(cutmix=1.0), "either": dict(mixup=0.4, cutmix=1.0)}
batch = lambda labels=LABELS: {"pixel_values": jnp.asarray(IMAGES), "labels": jnp.asarray(labels), "weights": jnp.ones(16)}
key = jax.random.key
mix = jax.jit(mixed, static_argnames=("classes", "mixup", "cutmix"))
many = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


@many
def test_images_and_labels_are_mixed_in_the_same_shares(options):
    """Each image is its own and the one before, in the shares that its label says: in every pixel for mixup, in whole pixels for cutmix."""
    seen, hot = [], np.eye(6)[LABELS]
    for seed in range(8):
        out = {name: np.asarray(value) for name, value in mix(batch(), key(seed), classes=6, **options).items()}
        assert out["pixel_values"].shape == IMAGES.shape and out["labels"].shape == (16, 6) and (out["weights"] == 1).all()
        for i in range(16):
            own, other = IMAGES[i], IMAGES[i - 1]
            parts = (out["pixel_values"][i] - other) / (own - other)  # of its own, pixel by pixel
            share = parts.mean()
            seen.append(share)
            # float32: noise of 1e-7 over a difference of the two that is seldom below 1e-3
            np.testing.assert_allclose(out["labels"][i], share * hot[i] + (1 - share) * hot[i - 1], atol=1e-3)
            whole = np.isclose(parts, 0, atol=1e-2) | np.isclose(parts, 1, atol=1e-2)
            even = np.ptp(parts) < 1e-2
            assert even or whole.all()
            if "mixup" not in options or not even:
                box = np.argwhere(np.isclose(parts, 0, atol=1e-2).all(0))
                assert len(box) == 0 or len(box) == np.prod(np.ptp(box, axis=0) + 1)  # a rectangle, the same in every channel
    assert min(seen) < 0.2 and max(seen) > 0.8 and 0.35 < np.mean(seen) < 0.75  # a half, or more for boxes cut by the edge


@many
def test_the_key_decides(options):
    draw = lambda seed: np.asarray(mix(batch(), key(seed), classes=6, **options)["pixel_values"])
    np.testing.assert_array_equal(draw(3), draw(3))
    assert not np.array_equal(draw(3), draw(4))


@many
def test_rows_without_a_label_stay_out(options):
    labels = np.where(np.arange(16) % 4 == 1, -100, LABELS)
    for seed in range(4):
        out = {name: np.asarray(value) for name, value in mix(batch(labels), key(seed), classes=6, **options).items()}
        alone = (labels == -100) | (np.roll(labels, 1) == -100)
        np.testing.assert_array_equal(out["pixel_values"][alone], IMAGES[alone])
        assert (out["labels"][labels == -100] == -100).all()
        np.testing.assert_allclose(out["labels"][labels != -100].sum(-1), 1, rtol=1e-6)
        assert not np.array_equal(out["pixel_values"], IMAGES)


def test_a_mesh_gives_the_same():
    mesh, options = make_mesh(data=-1), CASES["either"]
    laid = jax.device_put(batch(), sharding.batch_sharding(mesh))
    for name, value in mix(laid, key(1), classes=6, **options).items():
        np.testing.assert_allclose(value, mix(batch(), key(1), classes=6, **options)[name], rtol=1e-5, atol=1e-6)  # another program


def test_in_the_loss_of_images():
    """In training the loss is that of the mixed images over their soft labels; without a key nothing is mixed."""
    first = lambda params, *, rng=None, pixel_values: {"logits": pixel_values.reshape(16, -1)[:, :6]}
    model, params, given = (
        nn.Model(lambda rng: {}, first, {}, config={"num_labels": 6}),
        {},
        {name: batch()[name] for name in ("pixel_values", "labels")},
    )
    plain, mixing = tasks.classification(model), tasks.create("classification", model, **CASES["either"], smoothing=0.1)
    loss, metrics = jax.jit(mixing)(params, given, key(5))
    soft = mix(given, jax.random.split(key(5))[1], classes=6, **CASES["either"])
    logits = np.asarray(model.apply(params, pixel_values=soft["pixel_values"])["logits"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = 0.9 * np.asarray(soft["labels"]) + 0.1 / 6
    assert float(loss.value) == pytest.approx(-(target * log_p).sum(-1).mean(), rel=1e-5) and int(loss.count) == 16
    assert float(metrics["accuracy"].value) == np.mean(logits.argmax(-1) == np.asarray(soft["labels"]).argmax(-1))
    quiet = tasks.classification(model, **CASES["either"])
    assert float(quiet(params, given)[0].value) == float(plain(params, given)[0].value)


REFUSED = {
    "nothing": (dict(mixup=0.0), batch(), "mixup 0.0 and cutmix 0.0 are at least 0, and one of them is above"),
    "below 0": (dict(cutmix=-1.0), batch(), "cutmix -1.0 are at least 0"),
    "text": (
        dict(mixup=1.0),
        {"input_ids": jnp.ones((2, 3)), "labels": jnp.ones(2)},
        "for pixel_values .*; this batch has input_ids, labels",
    ),
    "soft already": (dict(mixup=1.0), {**batch(), "labels": jnp.ones((16, 6))}, r"with labels \[B\]"),
}


@pytest.mark.parametrize("options, given, message", REFUSED.values(), ids=REFUSED)
def test_refusals(options, given, message):
    with pytest.raises(ValueError, match=message):
        mixed(given, key(0), classes=6, **options)
