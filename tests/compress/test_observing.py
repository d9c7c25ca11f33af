"""What goes into each matrix, seen in two independent ways: through a whole model at once, and layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bigflax import models, sharding, trees, weights
from bigflax.compress import observing
from bigflax.compress.observing import layer_by_layer, observe
from bigflax.weights import parse_axes

KEY = jax.random.key(0)


MODELS = {  # what is unlike the others in how its layers lie and what they read
    "a decoder": ("llama", "causal_lm"),
    "an encoder": ("bert", "sequence_classification"),
    "kinds of layers in turn": ("gemma3_text", "causal_lm"),
    "a first layer of its own": ("modernbert", "masked_lm"),
    "tied layers": ("albert", "masked_lm"),
    "a pair": ("t5", "seq2seq_lm"),
    "another pair": ("bart", "seq2seq_lm"),
    "images": ("vit", "image_classification"),
    "two towers": ("clip", None),
    "a mixture, but for its experts": ("mixtral", "causal_lm"),
}


def case(name):
    """(forward, params, two batches, axes, names of what multiplies) of a model."""
    family, head = MODELS[name]
    model = models.create(family, size="tiny", head=head)
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(KEY, x.shape).astype(x.dtype), model.init(KEY))
    forward = lambda params, batch: model.apply(params, **batch)
    names = [n for n, text in trees.named_leaves(model.axes) if _multiplies(n, text)]
    return forward, params, [given(model, seed) for seed in range(2)], model.axes, names


def given(model, seed):
    """Three rows of what the model reads; of words one row is shorter."""
    rng, found = np.random.default_rng(seed), {}
    for name, like in model.module.example().items():
        if name.endswith("ids"):
            found[name] = rng.integers(4, 40, (3, 8)).astype(np.int32)
            found[name.replace("input_ids", "attention_mask")] = (np.arange(8) < np.array([[8], [8], [5]])).astype(np.int32)
        else:
            found[name] = rng.normal(size=(3, *like.shape[1:])).astype(np.float32)
    return found


def _multiplies(name, text):
    ax = parse_axes(text)
    return (
        bool(ax.contracted)
        and "experts" not in ax.stack
        and not name.endswith(("tokens", "positions", "types", "table"))
        and "_" not in ax.names
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_sees_what_the_whole_model_does(name):
    forward, params, batches, axes, names = case(name)
    whole, seen = observe(forward, params, batches, names, axes=axes, wants=observing.WANTS), {}

    def change(name, w, found):
        seen.setdefault(name, []).append(found)
        return w

    same = layer_by_layer(forward, params, batches, change, names, axes=axes, wants=observing.WANTS, rows=1)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    for name in names:
        parts = seen[name][0] if "layers" not in parse_axes(dict(trees.named_leaves(axes))[name]).stack else observing.stacked(seen[name])
        for field in ("count", "hessian", "size", "peak"):
            want = getattr(whole[name], field)
            np.testing.assert_allclose(
                getattr(parts, field), want, rtol=2e-4, atol=1e-5 * float(jnp.abs(want).max()), err_msg=f"{name} {field}"
            )


def test_a_mixtures_experts_are_refused():
    forward, params, batches, axes, _ = case("a mixture, but for its experts")
    with pytest.raises(ValueError, match="nothing went into blocks/mlp/up"):
        observe(forward, params, batches, ["blocks/mlp/up"], axes=axes)


def test_what_is_seen_is_what_goes_in():
    """The inputs of q are the normed states before each layer, which the model gives on request."""
    model = models.create("bert", size="tiny", head=None)
    params, (batch, _) = model.init(KEY), [given(model, seed) for seed in range(2)]
    seen = observe(lambda p, b: model.apply(p, **b), params, [batch], ["blocks/attention/q"], axes=model.axes, wants=observing.WANTS)[
        "blocks/attention/q"
    ]
    states = model.apply(params, **batch, hidden_states=True)["hidden_states"]
    real = batch["attention_mask"] > 0
    for layer, x in enumerate(states[:-1]):
        x = np.asarray(x, np.float64)[real]
        np.testing.assert_allclose(seen.hessian[layer], x.T @ x, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(seen.size[layer], np.abs(x).sum(0), rtol=1e-5)
        np.testing.assert_allclose(seen.peak[layer], np.abs(x).max(0), rtol=1e-6)
    np.testing.assert_array_equal(seen.count, real.sum())


def test_a_layer_is_fitted_to_what_the_changed_layers_before_it_give():
    forward, params, batches, axes, _ = case("a decoder")
    names, seen = ["blocks/mlp/down"], []

    def silence(name, w, found):
        seen.append(found)
        return w * 0

    changed = layer_by_layer(forward, params, batches, silence, names, axes=axes)
    want = observe(forward, changed, batches, names, axes=axes)["blocks/mlp/down"]
    np.testing.assert_allclose(observing.stacked(seen).hessian, want.hessian, rtol=1e-4, atol=1e-5 * float(want.hessian.max()))
    before = observe(forward, params, batches, names, axes=axes)["blocks/mlp/down"]
    assert float(jnp.abs(before.hessian[1:] - want.hessian[1:]).max()) > 0.05 * float(before.hessian.max())


@pytest.mark.slow
def test_observing_costs_no_mesh_its_layout():
    """Sharded over 8 devices the statistics are those of one."""
    forward, params, batches, axes, names = case("a decoder")
    model = models.create("llama", size="tiny")
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    laid = jax.device_put(params, sharding.shardings(params, axes, mesh))
    batch = {name: np.concatenate([x, x, x[:2]]) for name, x in batches[0].items()}
    there = {name: jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp"))) for name, x in batch.items()}

    def on_mesh(params, batch):
        with sharding.tracing_on(mesh):
            return model.apply(params, **batch)

    one, many = observe(forward, params, [batch], names, axes=axes), observe(on_mesh, laid, [there], names, axes=axes)
    for name in names:
        np.testing.assert_allclose(many[name].hessian, one[name].hessian, rtol=1e-4, atol=1e-5 * float(one[name].hessian.max()))


def test_layers_of_unlike_size_are_filled_up():
    layers = [weights.LowRank(jnp.ones((4, r)), jnp.ones((r, 3))) for r in (2, 3)]
    made = observing.stacked(layers)
    for i, w in enumerate(layers):
        np.testing.assert_array_equal(weights.dense(made)[i], weights.dense(w))
    with pytest.raises(ValueError, match="different types"):
        observing.stacked([jnp.ones((4, 3)), layers[0]])


MISTAKES = {
    "no batches": (lambda f, p, b, a: layer_by_layer(f, p, [], lambda *x: x[1], ["blocks/mlp/up"], axes=a), "no batches"),
    "a norm": (lambda f, p, b, a: observe(f, p, b, ["norm/scale"], axes=a), "has no inputs to observe"),
    "what only looks up": (lambda f, p, b, a: observe(f, p, b, ["embed/tokens"], axes=a), "nothing went into embed/tokens"),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, message):
    forward, params, batches, axes, _ = case("a decoder")
    with pytest.raises(ValueError, match=message):
        call(forward, params, batches, axes)
