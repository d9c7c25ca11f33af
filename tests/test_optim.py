"""Schedules at their corners, what decays, and the laws that every optimizer keeps. A new optimizer joins OPTIMIZERS and gets them all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import models, optim, trees, weights

LR = 0.5
# arguments, {step: learning rate}; with a warmup of w the rate at step i < w is lr (1/w + (1 - 1/w) i/w)
SCHEDULES = {
    "cosine": (dict(steps=100, warmup_steps=10), {0: LR / 10, 5: LR * 0.55, 10: LR, 55: LR * 0.55, 100: LR * 0.1, 200: LR * 0.1}),
    "cosine to zero": (dict(steps=100, final=0.0), {0: LR, 25: LR * (1 + 0.5**0.5) / 2, 50: LR / 2, 100: 0.0}),
    "linear": (
        dict(steps=100, kind="linear", warmup_steps=20, final=0.5),
        {0: LR / 20, 20: LR, 60: LR * 0.75, 100: LR * 0.5, 101: LR * 0.5},
    ),
    "wsd": (dict(steps=100, kind="wsd", warmup_steps=4), {0: LR / 4, 4: LR, 80: LR, 90: LR * 0.55, 100: LR * 0.1}),
    "wsd, decay said": (dict(steps=100, kind="wsd", decay_steps=50, final=0.0), {0: LR, 50: LR, 75: LR / 2, 100: 0.0}),
    "wsd, decay longer than the run": (dict(steps=10, kind="wsd", decay_steps=50, warmup_steps=2, final=0.0), {2: LR, 6: LR / 2, 10: 0.0}),
    "constant": (dict(steps=100, kind="constant", warmup_steps=2), {0: LR / 2, 2: LR, 100: LR}),
}


@pytest.mark.parametrize("options, corners", SCHEDULES.values(), ids=SCHEDULES)
def test_schedule_at_its_corners(options, corners):
    rate = optim.schedule(lr=LR, **options)
    got = {step: float(rate(step)) for step in corners}
    assert got == pytest.approx(corners, rel=1e-5, abs=1e-7)


# A model in small: name -> shape, axes, whether it decays by default with the axes and without.
WEIGHTS = {
    "tokens": ((12, 4), "vocab <- embed", True, True),
    "positions": ((6, 4), "positions <- embed", True, True),
    "q": ((3, 4, 2, 3), "layers | embed -> heads head_dim", True, True),
    "q_bias": ((3, 2, 3), "layers | heads head_dim", False, True),  # three dimensions and not a matrix: only the axes tell
    "norm": ((3, 4), "layers | norm", False, True),
    "bias": ((12,), "vocab", False, False),
}
AXES = {name: axes for name, (_, axes, _, _) in WEIGHTS.items()}
SHAPES = {name: shape for name, (shape, *_) in WEIGHTS.items()}
OPTIMIZERS = {name: dict(name=name, axes=AXES) for name in optim.OPTIMIZERS}
each_optimizer = pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)


def tree(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def updates_of(tx, params, grads, steps=1):
    """The updates of the last of `steps` steps with the same gradient, all in one program."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    seen = jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[1])(params, grads)
    return jax.tree.map(lambda x: np.asarray(x)[-1], seen)


def test_every_optimizer_is_in_the_table():
    assert set(OPTIMIZERS) == set(optim.OPTIMIZERS)


TOLD = [*((name, "axes") for name in OPTIMIZERS), ("adamw", "dimensions"), ("adamw", "rules"), ("muon", "rules")]


@pytest.mark.parametrize("name, told", TOLD, ids=str)
def test_decay_takes_rate_times_decay_of_what_it_names_and_leaves_the_rest(name, told):
    """Without a gradient an update is decay alone: -lr * weight_decay * w, step after step, for every optimizer alike."""
    rules = [("tokens", False), ("q|.*bias", True), (".*", False)]
    decays = {
        "axes": {name: by_axes for name, (_, _, by_axes, _) in WEIGHTS.items()},
        "dimensions": {name: by_ndim for name, (_, _, _, by_ndim) in WEIGHTS.items()},
        "rules": {name: name in ("q", "q_bias", "bias") for name in WEIGHTS},
    }[told]
    more = {"axes": {}, "dimensions": {"axes": None}, "rules": {"decay": rules}}[told]
    tx = optim.make(lr=LR, steps=9, kind="constant", weight_decay=0.1, **{**OPTIMIZERS[name], **more})
    params = tree()
    updates = updates_of(tx, params, jax.tree.map(jnp.zeros_like, params), steps=3)
    left = (1 - LR * 0.1) ** 2  # of the weight, before the third step
    for name, w in params.items():
        want = -LR * 0.1 * left * np.asarray(w) if decays[name] else np.zeros(w.shape)
        np.testing.assert_allclose(updates[name], want, rtol=1e-5, atol=1e-7, err_msg=name)


@each_optimizer
def test_a_quadratic_falls(options):
    """sum |w - target|^2, whose entries differ by about 1.4: fifty steps bring it down to less than a fifth."""
    params, target = tree(), tree(seed=1)
    lr = {"sgd": 0.02, "adafactor": 0.3, "muon": 0.3}.get(options["name"], 0.1)
    tx = optim.make(lr=lr, steps=50, weight_decay=0.0, clip=None, **options)
    loss = lambda params: sum(jnp.sum((w - t) ** 2) for w, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    _, losses = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), None, length=50))(params)
    assert float(losses[-1]) < 0.2 * float(losses[0]), losses


@each_optimizer
def test_the_schedule_is_what_scales_the_update(options):
    """At step 0 of a warmup of four the update is a quarter of what it is without one."""
    made = lambda **more: optim.make(lr=LR, steps=100, kind="constant", **options, **more)
    params, grads = ({name: tree(seed)[name] for name in ("q", "bias")} for seed in (0, 1))
    whole, quarter = updates_of(made(), params, grads), updates_of(made(warmup_steps=4), params, grads)
    for name in params:
        np.testing.assert_allclose(quarter[name], whole[name] / 4, rtol=1e-5, atol=1e-8, err_msg=name)
        assert np.abs(whole[name]).max() > 0, name


def test_clip_is_by_the_norm_of_all_gradients_together():
    params = {name: tree()[name] for name in ("tokens", "bias")}
    sgd = dict(name="sgd", lr=1.0, steps=9, kind="constant", weight_decay=0.0, b1=0.0)
    for scale, clip, factor in [(10.0, 1.0, None), (1e-3, 1.0, 1.0), (10.0, None, 1.0)]:
        grads = {name: tree(seed=1, scale=scale)[name] for name in params}
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        assert float(optim.global_norm(grads)) == pytest.approx(norm, rel=1e-5)
        got = updates_of(optim.make(**sgd, clip=clip), params, grads)
        for name, g in grads.items():
            np.testing.assert_allclose(got[name], -np.asarray(g) * (1 / norm if factor is None else factor), rtol=1e-4, err_msg=name)


MUON = {
    "q": ((16, 2, 4), "embed -> heads head_dim", (16, 8)),
    "out": ((2, 4, 16), "heads head_dim -> embed", (8, 16)),
    "up": ((8, 24), "embed -> mlp", (8, 24)),
}


@pytest.mark.parametrize("shape, axes, matrix", MUON.values(), ids=MUON)
def test_muon_orthogonalizes_each_layer_alone_between_its_inputs_and_outputs(shape, axes, matrix):
    make = lambda axes: optim.make(name="muon", lr=1.0, steps=9, kind="constant", weight_decay=0.0, clip=None, axes=axes)
    rng = np.random.default_rng(0)
    grads = np.stack([size * rng.normal(size=shape) for size in (1.0, 10.0, 0.1)]).astype(np.float32)
    stacked = updates_of(make({"w": f"layers | {axes}"}), {"w": jnp.ones_like(grads)}, {"w": jnp.asarray(grads)})["w"]
    alone = {f"layer{i}": g for i, g in enumerate(grads)}
    alone = updates_of(make({name: axes for name in alone}), {name: jnp.ones(shape) for name in alone}, alone)
    for i in range(3):
        np.testing.assert_allclose(stacked[i], alone[f"layer{i}"], atol=1e-4)  # five iterations of a matrix polynomial in float32
        singular = np.linalg.svd(stacked[i].reshape(matrix), compute_uv=False) / (0.2 * np.sqrt(max(matrix)))
        assert (singular > 0.6).all(), singular  # Newton-Schulz with Jordan's coefficients ends between 0.68 and 1.13, not at 1
        assert (singular < 1.2).all(), singular


def test_muon_leaves_embeddings_and_vectors_to_adam():
    """Adam's first update has entries of size lr wherever there is a gradient; an orthogonal one does not."""
    params, grads = tree(), tree(seed=1)
    updates = updates_of(optim.make(name="muon", lr=1.0, steps=9, kind="constant", weight_decay=0.0, axes=AXES), params, grads)
    adam = {name for name, update in updates.items() if np.allclose(np.abs(update), np.abs(update).max(), rtol=1e-3)}
    assert adam == set(WEIGHTS) - {"q"}


@each_optimizer
def test_what_is_frozen_is_not_in_the_tree(options):
    """train.py gives None where a weight is frozen: its optimizer holds nothing for it."""
    params = {**tree(), "q": None, "norm": None}
    tx = optim.make(lr=LR, steps=9, **options)
    whole, part = (sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tx.init, p))) for p in (tree(), params))
    assert part < whole or options["name"] == "adafactor"  # which keeps one number a small weight
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


# family -> name: how many times the factor, from a top of 0
DEPTHS = {
    "bert": {"embed/tokens": 3, "embed/norm/scale": 3, "blocks/mlp/up": [2, 1], "blocks/norm1/scale": [2, 1], "head/dense/w": 0},
    "modernbert": {"embed/tokens": 5, "blocks_0/mlp/up": [4], "blocks_1/0/mlp/up": [3], "blocks_1/2/attention/q": [1], "norm/scale": 0},
    "albert": {"embed/tokens": 2, "project/w": 2, "blocks/mlp/up": 1},  # one set of weights, and so one layer
    "bart": {"embed/tokens": 3, "encoder/blocks/mlp/up": [2, 1], "decoder/blocks/mlp/up": [2, 1], "decoder/embed/positions": 3},
    "clip": {"text/embed/tokens": 3, "vision/embed/patches": 3, "vision/blocks/mlp/up": [2, 1], "text_project/w": 0, "logit_scale": 0},
    "resnet": {"stem/0/conv/w": 6, "stages_0/blocks_0/body/0/conv/w": 5, "stages_0/blocks_1/body/0/conv/w": [4], "stages_1/blocks_0/body/2/conv/w": 3,
               "stages_1/blocks_1/body/2/conv/w": [2, 1], "head/scores/w": 0},
}  # fmt: skip


@pytest.mark.parametrize("family", DEPTHS)
def test_rates_fall_from_the_top_to_the_bottom(family):
    model = models.create(family, size="tiny", **({"head": "sequence_classification"} if family == "bert" else {}))
    ones = jax.tree.map(lambda s: jnp.ones(s.shape), model.shapes())
    tx = optim.by_layer(0.5, model.axes)
    factors = dict(trees.named_leaves(tx.update(ones, tx.init(ones))[0]))
    for name, below in DEPTHS[family].items():
        each = np.asarray(factors[name])
        want = np.asarray([0.5**n for n in below]).reshape(-1, *[1] * (each.ndim - 1)) if isinstance(below, list) else 0.5**below
        np.testing.assert_array_equal(each, np.broadcast_to(want, each.shape), err_msg=name)
    assert {float(x) for f in factors.values() for x in np.unique(f)} == {
        0.5**n for n in range(max(np.max(b) for b in DEPTHS[family].values()) + 1)
    }


def test_rates_of_what_is_adapted_and_of_what_is_left_are_the_same():
    """LoRA's parts fall as the weight that they stand upon, and freezing what is below changes nothing above."""
    axes = {"embed": {"tokens": "vocab <- embed"}, "blocks_0": {"up": "layers | embed -> mlp"}, "blocks_1": {"up": "layers | embed -> mlp"}}
    lora = weights.lora(jnp.ones((3, 4, 5)), 2, axes="layers | embed -> mlp", rng=jax.random.key(0))
    tree = {"embed": {"tokens": None}, "blocks_0": {"up": None}, "blocks_1": {"up": lora}}
    tx = optim.by_layer(0.5, axes)
    got = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree))[0]["blocks_1"]["up"]
    for part in (got.base, got.a, got.b):
        np.testing.assert_array_equal(part[:, 0, 0], [0.125, 0.25, 0.5])


@pytest.mark.parametrize("options", [OPTIMIZERS["adamw"], OPTIMIZERS["muon"]], ids=["adamw", "muon"])
def test_layers_and_the_average_change_the_update_by_their_factors_alone(options):
    """Weight decay included, as in BEiT; the average follows the weights: 1/10 of them enter, then 2/11, until it is 1 - ema."""
    tx = optim.make(lr=LR, steps=9, layer_decay=0.5, ema=0.75, **options)
    params, grads = tree(), tree(1)
    plain, scaled = (updates_of(t, params, grads) for t in (optim.make(lr=LR, steps=9, **options), tx))
    for name, update in plain.items():  # names without blocks or embeddings are all at the top
        np.testing.assert_allclose(scaled[name], update, rtol=1e-6, atol=1e-9)
    state, now, want = tx.init(params), params, {name: np.asarray(w, float) for name, w in params.items()}
    step = jax.jit(lambda grads, state, now: tx.update(grads, state, now))
    for n in range(4 if options["name"] == "adamw" else 1):
        updates, state = step(grads, state, now)
        now = optax.apply_updates(now, updates)
        d = min(0.75, (1 + n) / (10 + n))
        want = {name: d * want[name] + (1 - d) * np.asarray(now[name], float) for name in want}
    for name, w in optim.averaged(state, now).items():
        np.testing.assert_allclose(w, want[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert optim.averaged(optim.make(lr=LR, steps=9, **options).init(params), now) is now


def test_an_average_of_narrow_weights_is_wide():
    """bfloat16 has no room for a thousandth more."""
    tx, params = optim.average(0.999), {"w": jnp.ones(3, jnp.bfloat16)}
    state = tx.init(params)
    assert state.average["w"].dtype == jnp.float32 and optim.averaged(state, params)["w"].dtype == jnp.bfloat16


MISTAKES = {
    "layers without axes": (dict(layer_decay=0.9), "layer_decay has to know which weights are stacks of layers: pass axes=model.axes"),
    "optimizer": (dict(name="adamv"), "unknown optimizer 'adamv'; there are 'adamw'"),
    "schedule": (dict(kind="cosin"), "unknown schedule 'cosin'; there are 'cosine'"),
    "warmup too long": (dict(warmup_steps=10), "warmup_steps 10 must be at least 0 and below the 10 steps of the run"),
    "warmup below 0": (dict(warmup_steps=-1), "warmup_steps -1 must be at least 0"),
    "muon without axes": (dict(name="muon"), "pass axes=model.axes"),
}


@pytest.mark.parametrize("options, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        optim.make(lr=LR, steps=10, **options)
