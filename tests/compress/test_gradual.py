"""Masks that move while weights train: they leave out what the schedule says, whatever optimizer, layout or interruption."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import Checkpoints, Mean, ops, optim, sharding, train, trees, weights
from bigflax.compress import gradual

KEY = jax.random.key(0)
L, D, F, B = 2, 8, 16, 16
AXES = {"up": "layers | embed -> mlp", "down": "layers | mlp -> embed", "bias": "layers | norm"}
SHAPES = {"up": (L, D, F), "down": (L, F, D), "bias": (L, D)}
SCHEDULE = dict(final=0.7, steps=4, begin=1)
METHODS = {"magnitude": [(".*", "magnitude")], "movement": [(".*", "movement")], "both": [("up", "movement"), ("down", "magnitude")]}


def fresh(rules):
    params = {name: 0.3 * jax.random.normal(jax.random.fold_in(KEY, i), shape) for i, (name, shape) in enumerate(SHAPES.items())}
    return gradual.moving(params, rules, axes=AXES)


def batch_of(seed):
    x = jax.random.normal(jax.random.fold_in(KEY, 100 + seed), (B, D))
    return {"x": x, "y": jnp.roll(x, 1, axis=1) * 2}


def forward(params, x):
    def layer(x, w):
        return x + ops.einsum("bf,fd->bd", jax.nn.relu(ops.einsum("bd,df->bf", x, w["up"])), w["down"]) + w["bias"], None

    return jax.lax.scan(layer, x, params)[0]


def loss_fn(params, batch, rng=None):
    error = jnp.sum((forward(params, batch["x"]) - batch["y"]) ** 2, axis=-1)
    return Mean(jnp.sum(error), jnp.float32(len(error))), {"error": jnp.max(error)}


def begun(rules, *, sizes=None, accumulate=1, every=1):
    """(state, step) of AdamW with decay on this layout."""
    mesh = sharding.make_mesh(**sizes) if sizes else sharding.make_mesh(devices=jax.devices()[:1])
    tx = optim.make(lr=0.02, steps=20, kind="constant", weight_decay=0.1, axes=AXES)
    state = train.init_state(fresh(rules), tx, mesh=mesh, axes=AXES)
    moved = gradual.gradual(loss_fn, gradual.cubic(**SCHEDULE), every=every)
    return state, train.train_step(moved, tx, state, accumulate=accumulate)


def run(state, step, first, last):
    for i in range(first, last):
        state, metrics = step(state, jax.device_put(batch_of(i), sharding.batch_sharding(state.mesh)))
    return state, metrics


def of(state):
    """{name: Moving}."""
    return {name: w for name, w in weights.named_weights(state.weights) if isinstance(w, weights.Moving)}


def share(step):
    """Zhu and Gupta's equation 1 in Python's numbers."""
    done = min(max((step - SCHEDULE["begin"]) / SCHEDULE["steps"], 0), 1)
    return SCHEDULE["final"] * (1 - (1 - done) ** 3)


def test_the_schedule_is_that_of_the_paper():
    schedule = gradual.cubic(**SCHEDULE)
    np.testing.assert_allclose([schedule(t) for t in range(9)], [share(t) for t in range(9)], rtol=1e-6)
    assert [float(schedule(t)) for t in (0, 1, 5, 1000)] == [0, 0, np.float32(0.7), np.float32(0.7)]
    np.testing.assert_allclose(gradual.cubic(0.8, steps=10, initial=0.3)(jnp.array([0, 5, 10])), [0.3, 0.8 - 0.5 / 8, 0.8], rtol=1e-6)


RUNS = {
    "magnitude": ("magnitude", {}),
    "movement": ("movement", {}),
    "both, every other step, in micro-batches": ("both", dict(every=2, accumulate=4)),
    "movement, on a mesh": ("movement", dict(sizes=dict(fsdp=4, tensor=2))),
}


@pytest.mark.parametrize("method, options", RUNS.values(), ids=RUNS)
def test_as_many_are_left_out_as_the_schedule_says(method, options):
    state, step = begun(METHODS[method], **options)
    assert set(of(state)) == {"up", "down"} and not isinstance(state.weights["bias"], weights.Moving)
    every, before = options.get("every", 1), 0.0
    for t in range(1, 8):
        state, metrics = run(state, step, t - 1, t)
        at = t - t % every
        for name, w in of(state).items():
            gone = round(share(at) * D * F)
            np.testing.assert_array_equal(jnp.sum(~w.mask, (1, 2)), [gone] * L, f"{name} after {t} steps")
            np.testing.assert_array_equal(w.step, [t] * L)
            assert not np.any(np.asarray(weights.dense(w))[~np.asarray(w.mask)])
        np.testing.assert_allclose(metrics["sparsity"].total / metrics["sparsity"].count, before, rtol=1e-6)
        before = round(share(at) * D * F) / (D * F)
    assert not state.skipped
    if "sizes" in options:
        assert of(state)["up"].mask.sharding == of(state)["up"].w.sharding
        assert tuple(of(state)["up"].mask.sharding.spec) == (None, "fsdp", "tensor")
    # a mask that AdamW and its decay cannot undo: the loss is that of the arrays with zeros
    arrays = gradual.sparsified(state.weights)
    np.testing.assert_allclose(forward(state.weights, batch_of(0)["x"]), forward(arrays, batch_of(0)["x"]), rtol=1e-5)


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path):
    state, step = begun(METHODS["both"], every=2)
    whole, _ = run(state, step, 0, 7)
    state, step = begun(METHODS["both"], every=2)
    half, _ = run(state, step, 0, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, half)
        like, step = begun(METHODS["both"], every=2)
        again, _ = run(checkpoints.restore(like).state, step, 3, 7)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_gradients_are_those_of_the_paper():
    """Of w through what is kept; of S as if it were the mask: dL/dW' w (section 4)."""
    params = fresh(METHODS["movement"])
    masks = {name: jax.random.bernoulli(jax.random.fold_in(KEY, i), 0.5, SHAPES[name]) for i, name in enumerate(("up", "down"))}
    params |= {name: weights.Moving(params[name].w, mask, params[name].step, params[name].scores) for name, mask in masks.items()}
    kept, rest = trees.partition(params, weights.trainable(params, AXES))
    loss = lambda params: loss_fn(params, batch_of(0))[0].total
    grads = jax.grad(lambda kept: loss(trees.combine(kept, rest)))(kept)
    exact = jax.grad(loss)({name: weights.dense(w) for name, w in params.items()})
    for name, mask in masks.items():
        np.testing.assert_allclose(grads[name].w, exact[name] * mask, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grads[name].scores, exact[name] * params[name].w, rtol=1e-5, atol=1e-5)
        assert np.any(np.asarray(grads[name].scores)[~np.asarray(mask)])


@pytest.mark.parametrize("method, kept", [("magnitude", [True, True, False, False]), ("movement", [False, False, True, True])])
def test_movement_keeps_what_grows_and_magnitude_what_is_large(method, kept):
    """Two large weights that training takes towards zero, and two small ones that it makes larger."""
    params = gradual.moving({"w": jnp.array([[1.0], [-1.0], [0.1], [-0.1]])}, [("w", method)], axes={"w": "embed -> mlp"})
    want = jnp.array([[0.6], [-0.6], [0.3], [-0.3]])

    def loss(params, batch, rng=None):
        return jnp.sum((ops.einsum("bd,df->bf", batch, params["w"]) - batch @ want) ** 2)

    tx = optax.adam(0.01)
    state = train.init_state(params, tx, mesh=sharding.make_mesh(devices=jax.devices()[:1]), axes={"w": "embed -> mlp"})
    step = train.train_step(gradual.gradual(loss, gradual.cubic(0.5, steps=1, begin=4)), tx, state)
    for _ in range(6):
        state, _ = step(state, jnp.eye(4))
    assert state.weights["w"].mask[:, 0].tolist() == kept


@functools.cache
def trained():
    return run(*begun(METHODS["both"]), 0, 5)[0].weights


@pytest.mark.parametrize("kind, types", [("array", jax.Array), ("masked", weights.Masked), ("sparse", weights.Sparse)])
def test_it_ends_as_what_is_asked_for(kind, types):
    ended = gradual.sparsified(trained(), kind, axes=AXES)
    for name in ("up", "down"):
        assert isinstance(ended[name], types)
        np.testing.assert_array_equal(weights.dense(ended[name]), weights.dense(trained()[name]))
        assert int(jnp.sum(weights.dense(ended[name]) == 0)) == L * round(0.7 * D * F)
    np.testing.assert_array_equal(ended["bias"], trained()["bias"])


def test_scores_do_not_decay():
    params = {"up": fresh(METHODS["movement"])["up"]}
    params["up"] = weights.Moving(params["up"].w, params["up"].mask, params["up"].step, jnp.ones((L, D, F)))
    kept, _ = trees.partition(params, weights.trainable(params))
    tx = optim.make(lr=0.1, steps=9, weight_decay=0.5, clip=None, axes=AXES)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, kept), tx.init(kept), kept)
    assert not np.any(updates["up"].scores) and np.all(np.asarray(updates["up"].w) != 0)


MISTAKES = {
    "no such method": (lambda: fresh([(".*", "moving")]), "no pruning by 'moving'; .*'movement'"),
    "no matrix": (lambda: fresh([("bias", "magnitude")]), "match no matrix; biases and norms are not pruned"),
    "no weight": (lambda: fresh([("upp", "magnitude")]), "'upp' matches no weight"),
    "a typed weight": (
        lambda: gradual.moving({"w": weights.quantize(jnp.ones((4, 4)), axes="a -> b")}, [("w", "magnitude")], axes={"w": "a -> b"}),
        "w is a QArray already; masks move over arrays",
    ),
    "no mask": (
        lambda: gradual.gradual(loss_fn, lambda t: 0.5)(gradual.sparsified(fresh(METHODS["both"])), batch_of(0)),
        "no mask to move: put Moving weights",
    ),
    "all of it": (lambda: gradual.cubic(1.0, steps=3), "shares below 1, in at least one step, not from 0.0 to 1.0 in 3"),
    "never": (lambda: gradual.gradual(loss_fn, lambda t: 0.5, every=0), "at least one, not 0"),
    "no such end": (lambda: gradual.sparsified({}, "dense"), "does not end as 'dense'; .*'array'"),
    "sparse without axes": (lambda: gradual.sparsified({}, "sparse"), "pass axes=model.axes"),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
