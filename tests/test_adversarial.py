"""The laws of adversarial losses, each held to every row of ATTACKS, and that who trains with one withstands more. A new one joins the table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import adversarial, make_mesh, models, nn, ops, sharding, tasks, train, trees, weights
from bigflax.flops import count_flops

V, D, C = 12, 6, 3
TEXT = dict(on="embed/tokens", eps=0.4)


def init(rng):
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(rng, i), shape)
    return {"embed": {"tokens": draw(0, V, D)}, "up": draw(1, D, 8) * 0.5, "head": draw(2, 8, C) * 0.5}


def apply(params, *, rng=None, input_ids, attention_mask, logits=True):
    """Classes of a sequence by the mean of its real tokens, with dropout where there is a key."""
    h_BTF = jnp.tanh(ops.einsum("btd,df->btf", ops.take(params["embed"]["tokens"], input_ids), params["up"]))
    real_BT1 = attention_mask[..., None].astype(jnp.float32)
    h_BF = (h_BTF * real_BT1).sum(1) / real_BT1.sum(1)
    h_BF = h_BF if rng is None else h_BF * jax.random.bernoulli(rng, 0.9, h_BF.shape)
    return {"logits": h_BF @ params["head"]}


MODEL = nn.Model(init, apply, {"embed": {"tokens": "vocab <- embed"}, "up": "embed -> mlp", "head": "mlp -> _"})
LOSS = tasks.classification(MODEL)
ATTACKS = {
    "fgsm": lambda loss_fn, **more: adversarial.fgsm(loss_fn, **TEXT | more),
    "pgd": lambda loss_fn, **more: adversarial.pgd(loss_fn, **TEXT | more),
    "pgd, linf from anywhere": lambda loss_fn, **more: adversarial.pgd(loss_fn, **TEXT | dict(norm="linf", random=True) | more),
    "freelb": lambda loss_fn, **more: adversarial.freelb(loss_fn, **TEXT | more),
    "smart": lambda loss_fn, **more: adversarial.smart(loss_fn, MODEL, **TEXT | more),
    "attacked": lambda loss_fn, **more: adversarial.attacked(loss_fn, **TEXT | more),
}
each = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)


def batch_of(rows=8, length=5, seed=0):
    rng = np.random.default_rng(seed)
    real = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
    labels = np.where(rng.random(rows) < 0.2, -100, rng.integers(0, C, rows))
    return {
        name: jnp.asarray(x, jnp.int32)
        for name, x in dict(input_ids=rng.integers(0, V, real.shape), attention_mask=real, labels=labels).items()
    }


PARAMS, BATCH, KEY = init(jax.random.key(0)), batch_of(), jax.random.key(1)


def graded(loss_fn, params=PARAMS, batch=BATCH, rng=KEY):
    """(loss, metrics), gradient of the total."""

    def total(params):
        loss, metrics, _ = train.split_loss(loss_fn(params, batch, rng))
        return loss.total, (loss, metrics)

    (_, seen), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return *seen, grads


PLAIN = functools.cache(lambda: graded(LOSS))


@each
def test_a_ball_of_no_size_changes_nothing(make):
    loss, metrics, grads = graded(make(LOSS, eps=0.0))
    want, clean, plain = PLAIN()
    assert (float(loss.total), int(loss.count)) == (float(want.total), int(want.count))
    assert {name: float(metrics[name].value) for name in clean} == {name: float(m.value) for name, m in clean.items()}
    for (name, g), (_, w) in zip(trees.named_leaves(grads), trees.named_leaves(plain), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6, err_msg=name)  # weighted sums of equal gradients


@each
def test_the_attack_raises_the_loss_and_metrics_are_those_of_the_batch(make):
    loss, metrics, grads = graded(make(LOSS))
    want, clean, _ = PLAIN()
    worse = metrics["attacked_loss"] if "attacked_loss" in metrics else loss
    assert float(worse.value) > float(want.value) * 1.05
    assert float(metrics["accuracy"].value) == float(clean["accuracy"].value)
    assert float(metrics.get("clean_loss", loss).value) == pytest.approx(float(want.value), rel=1e-6)
    assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def by_hand(climbs, shares, *, size, norm="l2", eps=0.4, rng=None):
    """Total and gradient of the weighed losses along the way up, one pass after the other, each row on its own."""
    table = PARAMS["embed"]["tokens"]
    perturbed = lambda params, delta: {**params, "embed": {"tokens": weights.Perturbed(params["embed"]["tokens"], delta)}}
    at = jax.jit(jax.value_and_grad(lambda params, delta: LOSS(perturbed(params, delta), BATCH, rng)[0].total, (0, 1)))
    delta, total, grads = np.zeros((*BATCH["input_ids"].shape, table.shape[1]), np.float32), 0.0, jax.tree.map(jnp.zeros_like, PARAMS)
    for share in shares:
        value, (gp, g) = at(PARAMS, delta)
        total += share * float(value)
        grads = jax.tree.map(lambda a, b, share=share: a + share * b, grads, gp)
        for i, real in enumerate(np.asarray(BATCH["attention_mask"], bool)):
            step = np.where(real[:, None], g[i], 0)
            step = np.sign(step) if norm == "linf" else step / max(np.linalg.norm(step), 1e-30)
            new = delta[i] + size * step
            delta[i] = np.clip(new, -eps, eps) if norm == "linf" else new * min(1, eps / max(np.linalg.norm(new), 1e-30))
    return total, grads


STEP = 2.5 * 0.4 / 3
HAND = {  # name, options -> what each pass counts, size of a step, norm
    "fgsm": (ATTACKS["fgsm"], (0.5, 0.5), dict(size=0.4, norm="linf")),
    "pgd": (ATTACKS["pgd"], (0, 0, 0, 1), dict(size=STEP)),
    "pgd, linf": (lambda loss_fn: ATTACKS["pgd"](loss_fn, norm="linf"), (0, 0, 0, 1), dict(size=STEP, norm="linf")),
    "freelb": (ATTACKS["freelb"], (1 / 3, 1 / 3, 1 / 3), dict(size=STEP)),
    "freelb, one step": (lambda loss_fn: ATTACKS["freelb"](loss_fn, steps=1), (1,), dict(size=STEP)),
}


@pytest.mark.parametrize("make, shares, way", HAND.values(), ids=HAND)
def test_is_the_plain_loop(make, shares, way):
    loss, _, grads = graded(make(LOSS), rng=None)
    total, want = by_hand(len(shares), shares, **way)
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    for (name, g), (_, w) in zip(trees.named_leaves(grads), trees.named_leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5, err_msg=name)  # float32, sums of about a hundred terms


@pytest.mark.parametrize("norm", adversarial.NORMS)
def test_the_attack_stays_in_its_ball_and_off_padding(norm):
    attack = adversarial.Attack(on="embed/tokens", eps=0.3, norm=norm, step_size=0.2, random=True)
    place = attack.place(PARAMS, BATCH)
    far = lambda delta: np.abs(delta).max((1, 2)) if norm == "linf" else np.sqrt((np.square(np.asarray(delta, float))).sum((1, 2)))
    delta = attack.start(place, KEY)
    assert (far(delta) > 0).all() and (far(delta) <= 0.3 * (1 + 1e-6)).all()
    for i in range(5):
        delta = attack.climb(delta, jax.random.normal(jax.random.key(i), delta.shape) * 1e-25, place)  # whose squares float32 does not have
        assert (far(delta) <= 0.3 * (1 + 1e-6)).all() and (far(delta) > 0.1).all()  # projection rounds once
        assert not delta[BATCH["attention_mask"] == 0].any()
    assert not attack.climb(place.zero, jnp.zeros_like(delta), place).any()  # nowhere to go


def test_free_is_free():
    """K passes forward and back, each for the weights and for the way up at once."""
    place = adversarial.Attack(**TEXT).place(PARAMS, BATCH)
    one = count_flops(jax.grad(lambda params, delta: LOSS(*place.put(params, delta))[0].total, (0, 1)), PARAMS, place.zero)
    all_of_it = count_flops(jax.grad(lambda params: ATTACKS["freelb"](LOSS)(params, BATCH)[0].total), PARAMS)
    assert all_of_it == 3 * one


def test_what_is_frozen_has_no_gradient_of_its_own():
    """Of the passes that climb too: with all but the head frozen, FreeLB differentiates by the head and the perturbation alone."""
    head = lambda head: ATTACKS["freelb"](LOSS)({**PARAMS, "head": head}, BATCH)[0].total
    text = str(jax.make_jaxpr(jax.grad(head))(PARAMS["head"]))
    whole = str(jax.make_jaxpr(jax.grad(lambda params: ATTACKS["freelb"](LOSS)(params, BATCH)[0].total))(PARAMS))
    assert text.count("dot_general") < whole.count("dot_general") and f"f32[{V},{D}] = scatter-add" not in text
    alone, among = jax.jit(jax.grad(head))(PARAMS["head"]), graded(ATTACKS["freelb"](LOSS), rng=None)[2]["head"]
    np.testing.assert_allclose(alone, among, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_typed_weights_are_as_good():
    """QLoRA beneath the attack: what is quantized stays out of it, and all of the rest has a gradient."""
    axes = "embed -> mlp"
    up = weights.lora(weights.quantize(PARAMS["up"], axes=axes), 2, axes=axes, rng=KEY)
    table = weights.lora(PARAMS["embed"]["tokens"], 2, axes="vocab <- embed", rng=KEY)
    params = {"embed": {"tokens": table}, "up": dataclasses.replace(up, b=jnp.ones_like(up.b)), "head": PARAMS["head"]}
    live, rest = trees.partition(params, weights.trainable(params))
    loss_fn = ATTACKS["freelb"](LOSS)
    grads = jax.jit(jax.grad(lambda live: loss_fn(trees.combine(live, rest), BATCH)[0].total))(live)
    want = jax.jit(
        jax.grad(lambda live: loss_fn({**trees.combine(live, rest), "up": weights.dense(trees.combine(live, rest)["up"])}, BATCH)[0].total)
    )(live)
    assert len(jax.tree.leaves(grads)) == 6 and jax.tree.leaves(grads["up"].base) == []
    for (name, g), (_, w) in zip(trees.named_leaves(grads), trees.named_leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name, accumulate", [("freelb", 2), pytest.param("smart", 1, marks=pytest.mark.slow)])
def test_eight_devices_and_accumulation_equal_one(name, accumulate):
    """Rows climb alone, so nothing depends on where they are; without a key, which is another for each micro-batch."""
    loss_fn, results = ATTACKS[name](LOSS), []
    for sizes, parts in (({"data": 1}, 1), ({"data": 4, "fsdp": 2}, accumulate)):
        mesh = make_mesh(**sizes, devices=jax.devices()[: sizes["data"] * sizes.get("fsdp", 1)])
        state = train.init_state(PARAMS, optax.sgd(0.5), mesh=mesh, axes=MODEL.axes)
        step = train.train_step(lambda params, batch, rng: loss_fn(params, batch), optax.sgd(0.5), state, accumulate=parts)
        state, metrics = step(state, jax.device_put(batch_of(16), sharding.batch_sharding(mesh)))
        results.append((jax.device_get(state.params), float(metrics["loss"].value)))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), results[0][0], results[1][0])  # float32, other orders


MODELS = {  # family, its config, the attack
    "gpt2, tied": ("gpt2", dict(n_layer=2, n_embd=32, n_head=2), "freelb"),
    "bert in bfloat16": (
        "bert",
        dict(head="sequence_classification", num_labels=C, dtype="bfloat16", num_hidden_layers=2, hidden_size=32, intermediate_size=32),
        "pgd",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family, config, name", MODELS.values(), ids=MODELS)
def test_models_know_of_nothing(family, config, name):
    """A step over eight devices: its loss is above the clean one, and the weights of table and layers move."""
    model = models.create(family, size="tiny", vocab_size=64, **config)
    ids = np.random.default_rng(0).integers(0, 64, (8, 8))
    batch = {"input_ids": ids, "labels": ids if family == "gpt2" else ids[:, 0] % C}
    loss_fn = tasks.token_loss(model, chunk=16) if family == "gpt2" else tasks.classification(model)
    mesh = make_mesh(fsdp=8)
    state = train.init_state(model.init, optax.sgd(0.1), mesh=mesh, axes=model.axes)
    step = train.train_step(ATTACKS[name](loss_fn, eps=0.5), optax.sgd(0.1), state)
    before = jax.device_get(state.params)
    state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
    assert int(state.skipped) == 0 and float(metrics["loss"].value) > float(metrics["clean_loss"].value)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, jax.device_get(state.params))
    assert moved["embed"]["tokens"] and moved["blocks"]["mlp"]["up"]


# -- pixels, and what adversarial training is for ----------------------------------------------------------------------------

PIXELS = dict(on="pixel_values", eps=0.3, norm="linf", bounds=(-1.0, 1.0))


def images(rows, seed):
    """Two classes, told by one pixel beyond any small push but missing in a twentieth of the images, and by 24 noisy ones together, which a push
    smaller than the image turns around (after Tsipras et al. 2019, arXiv 1805.12152, section 2)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    sign = 2.0 * labels[:, None] - 1
    pixels = np.concatenate(
        [0.9 * sign * (rng.random((rows, 1)) < 0.95), np.clip(0.2 * sign + 0.25 * rng.normal(size=(rows, 24)), -1, 1)], 1
    )
    return {"pixel_values": jnp.asarray(pixels.reshape(rows, 1, 5, 5), jnp.float32), "labels": jnp.asarray(labels)}


LINEAR = nn.Model(
    lambda rng: {"w": jnp.zeros((25, 2))},
    lambda params, *, rng=None, pixel_values: {"logits": pixel_values.reshape(-1, 25) @ params["w"]},
    None,
)


def test_adversarial_training_withstands_more():
    """Measured on the held-out images, plainly and under the attack: 100% and 7% after plain training, 100% and 94% after pgd."""
    mesh, batch, held_out = make_mesh(data=1, devices=jax.devices()[:1]), images(256, 0), images(256, 1)
    plain, score = tasks.classification(LINEAR), {}
    for name, loss_fn in {"plain": plain, "pgd": adversarial.pgd(plain, **PIXELS)}.items():
        state = train.init_state(LINEAR.init, optax.adam(0.05), mesh=mesh)
        step = train.train_step(loss_fn, optax.adam(0.05), state)
        for _ in range(100):
            state, _ = step(state, batch)
        score[name] = train.evaluate(train.eval_step(adversarial.attacked(plain, **PIXELS, steps=5), mesh), state.weights, [held_out])
    assert score["plain"]["accuracy"] > 0.95 and score["plain"]["attacked_accuracy"] < 0.5
    assert score["pgd"]["attacked_accuracy"] > score["plain"]["attacked_accuracy"] + 0.3


def test_bounds_hold_what_is_attacked():
    batch = images(8, 0)
    attack = adversarial.Attack(**PIXELS, step_size=1.0)
    place = attack.place({}, batch)
    delta = attack.climb(place.zero, jnp.ones_like(place.zero), place)
    there = place.put({}, delta)[1]["pixel_values"]
    assert float(there.max()) <= 1.0 and float(delta.max()) == pytest.approx(0.3, rel=1e-6)


MISTAKES = {
    "a name": (dict(on="embed/token"), "no 'embed/token' to perturb.*'embed/tokens'"),
    "whole numbers": (dict(on="input_ids"), "'input_ids' are int32, which have no neighbours"),
    "bounds of a weight": (dict(bounds=(0, 1)), "bounds hold an input.* and 'embed/tokens' is a weight"),
    "a norm": (dict(norm="l1"), "no ball of norm 'l1'; there are 'l2', 'linf'"),
    "a radius": (dict(eps=-1.0), "eps of at least 0 and steps of at least 1, not -1.0 and 3"),
}


@pytest.mark.parametrize("options, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        ATTACKS["pgd"](LOSS, **options)(PARAMS, BATCH)
