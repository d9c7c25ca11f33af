"""What goes into each matrix, seen in two independent ways: through a whole model at once, and layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bigflax import models, ops, sharding, trees, weights
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
    "a mixture": ("mixtral", "causal_lm"),
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
    return bool(ax.contracted) and not name.endswith(("tokens", "positions", "types", "table")) and "_" not in ax.names


@pytest.mark.slow
@pytest.mark.parametrize("correct", [False, True], ids=["once", "twice, side by side"])
@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_sees_what_the_whole_model_does(name, correct):
    """And where nothing is changed, there is nothing to correct."""
    forward, params, batches, axes, names = case(name)
    whole, seen = observe(forward, params, batches, names, axes=axes, wants=observing.WANTS), {}

    def change(name, w, found):
        seen.setdefault(name, []).append(found)
        return w

    same = layer_by_layer(forward, params, batches, change, names, axes=axes, wants=observing.WANTS, rows=1, correct=correct)
    # float32: two sums that are one in exact arithmetic, their difference divided by a hundredth of the hessian
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max()) * correct), same, params)
    for name in names:
        parts = seen[name][0] if "layers" not in parse_axes(dict(trees.named_leaves(axes))[name]).stack else observing.stacked(seen[name])
        for field in ("count", "hessian", "size", "peak"):
            want = getattr(whole[name], field)
            np.testing.assert_allclose(
                getattr(parts, field), want, rtol=2e-4, atol=1e-5 * float(jnp.abs(want).max()), err_msg=f"{name} {field}"
            )


# -- mixtures --------------------------------------------------------------------------------------------------------------

B, T, D, F, E, C = 3, 6, 6, 5, 4, 2
AXES = {"gate": "experts | embed -> mlp", "up": "experts | embed -> mlp", "down": "experts | mlp -> embed"}


@pytest.fixture(scope="module")
def mixture():
    """(params, x [B, T, D], gates, chosen [B, T, C], which tokens are real): of 4 experts one is never chosen."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"gate": draw(E, D, F), "up": draw(E, D, F), "down": draw(E, F, D)}
    logits = draw(B, T, E) + np.array([0, 0, 0, -99], np.float32)
    _, gates, chosen = ops.route(jnp.asarray(logits), C, normalize=True)
    return params, draw(B, T, D), gates, np.asarray(chosen), np.arange(T) < np.array([[6], [4], [5]])


def by_expert(x, w, product):
    return product(jnp.tanh(product(x, w["gate"])) * product(x, w["up"]), w["down"])


def by_hand(params, x, chosen, real, room):
    """{name: [E] lists of what went into each expert's matrix}, one choice of a token at a time, likelier choices first, in float64; an expert has room for
    so many."""
    seen = {name: [[] for _ in range(E)] for name in params}
    for c, b, t in np.ndindex(C, B, T):
        e, row = chosen[b, t, c], x[b, t].astype(np.float64)
        if real[b, t] and len(seen["up"][e]) < room:
            gate, up = (row @ params[name][e].astype(np.float64) for name in ("gate", "up"))
            for name, went in {"gate": row, "up": row, "down": np.tanh(gate) * up}.items():
                seen[name][e].append(went)
    return seen


WAYS = {  # implementation, its factor, how many rows an expert has room for
    **{way: (way, None, B * T) for way in ("reference", "ragged", "exchange")},
    "capacity": ("capacity", E / C, B * T), "capacity that drops": ("capacity", 0.5, 5),
}  # fmt: skip


@pytest.mark.parametrize("mesh", [None, dict(expert=2, fsdp=2, tensor=2)], ids=["one device", "a mesh"])
@pytest.mark.parametrize("way, factor, room", WAYS.values(), ids=WAYS)
def test_each_expert_sees_the_tokens_that_are_sent_to_it(way, factor, room, mesh, mixture):
    params, x, gates, chosen, real = mixture
    mesh = None if mesh is None else sharding.make_mesh(**mesh)

    def forward(params, batch):
        run = lambda: ops.mixture(
            by_expert,
            batch["x"],
            gates,
            chosen,
            params,
            AXES,
            implementation=way,
            capacity_factor=factor,
            real_BT=batch["attention_mask"] > 0,
        )[0]
        if mesh is None:
            return run()
        with sharding.tracing_on(mesh):
            return run()

    want = by_hand(params, x, chosen, real, room)
    assert not want["up"][3] and all(1 < len(rows) for rows in want["up"][:3])
    seen = observe(forward, params, [{"x": x, "attention_mask": real.astype(np.int32)}], list(params), axes=AXES, wants=observing.WANTS)
    for name, rows in want.items():
        K, found = params[name].shape[1], seen[name]
        rows = [np.array(each).reshape(-1, K) for each in rows]
        np.testing.assert_array_equal(found.count, [len(each) for each in rows])
        # float32: sums of a dozen products of sums of six
        np.testing.assert_allclose(found.hessian, [each.T @ each for each in rows], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.size, [np.abs(each).sum(0) for each in rows], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.peak, [np.abs(each).max(0, initial=0) for each in rows], rtol=1e-5, atol=1e-6)


def test_an_expert_that_was_sent_little_is_filled_up_with_the_mean_token():
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(n, D)) * (i + 1) for i, n in enumerate((20, 2, 0))]
    seen = observing.Seen(
        *(jnp.asarray(np.array(part), jnp.float32) for part in (
            [len(x) for x in rows], [x.T @ x for x in rows], [np.abs(x).sum(0) for x in rows], [np.abs(x).max(0, initial=0) for x in rows]))
    )  # fmt: skip
    found, everything = observing.pooled(seen), np.concatenate(rows)
    np.testing.assert_array_equal(found.count, [20, D, D])
    for e, lacks in enumerate((0, D - 2, D)):
        want = rows[e].T @ rows[e] + lacks * everything.T @ everything / 22
        np.testing.assert_allclose(found.hessian[e], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.size[e], np.abs(rows[e]).sum(0) + lacks * np.abs(everything).sum(0) / 22, rtol=1e-5)
    mean = np.mean([np.abs(x).max(0) for x in rows[:2]], 0)
    np.testing.assert_allclose(found.peak, [np.abs(rows[0]).max(0), np.maximum(np.abs(rows[1]).max(0), mean), mean], rtol=1e-6)


def test_a_table_sees_how_often_its_rows_are_looked_up():
    """Of real tokens, in a model whose head is the same table."""
    model = models.create("bert", size="tiny", head="masked_lm")
    batches = [given(model, seed) for seed in range(2)]
    seen = observe(
        lambda p, b: model.apply(p, **b), model.init(KEY), batches, ["embed/tokens", "embed/positions"], axes=model.axes, wants=("often",)
    )
    real = np.concatenate([batch["input_ids"][batch["attention_mask"] > 0] for batch in batches])
    often = seen["embed/tokens"].often
    np.testing.assert_array_equal(often, np.bincount(real, minlength=len(often)))
    assert seen["embed/tokens"].hessian is None and float(seen["embed/positions"].often[0]) > 0


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


@pytest.mark.parametrize("name, uses", [("an encoder", 1), ("tied layers", 2), ("a pair", 1), ("images", 1)])
def test_positions_are_counted_without_a_look_at_them(name, uses):
    forward, params, batches, axes, names = case(name)
    want = observe(forward, params, batches, names, axes=axes, wants=("size",))
    got = observing.positions(forward, params, batches, names, axes=axes)
    assert max(float(want[name].count.min()) / got[name] for name in names) == uses
    assert all(float(want[name].count.min()) / got[name] in (1, uses) for name in names)


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


def test_a_matrix_is_corrected_for_what_layers_before_it_lost():
    """To where its products are nearest to the old ones: damped least squares in float64, of the states between layers, which the model gives on request."""
    model = models.create("bert", size="tiny", head=None)
    params, batch, seen = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(KEY, x.shape), model.init(KEY)), given(model, 0), {}
    coarse = lambda name, w, found: [seen.setdefault(name, []).append(w), jnp.round(w * 4) / 4][1]
    names = [name for name, text in trees.named_leaves(model.axes) if name.startswith("blocks/") and parse_axes(text).contracted]
    made = layer_by_layer(lambda p, b: model.apply(p, **b), params, [batch], coarse, names, axes=model.axes, correct=True, rows=2)
    assert [name.split("/")[-1] for name in seen] == ["q", "k", "v", "out", "up", "down"]
    states = lambda params: np.asarray(model.apply(params, **batch, hidden_states=True)["hidden_states"][1], np.float64)
    y, x = (states(params)[batch["attention_mask"] > 0] for params in (params, made))
    w = np.asarray(params["blocks"]["attention"]["q"][1], np.float64).reshape(x.shape[1], -1)
    damp = 0.01 * np.mean(np.square(x).sum(0)) * np.eye(len(w))
    want = np.linalg.solve(x.T @ x + damp, x.T @ y @ w + damp @ w)
    got = np.asarray(seen["blocks/attention/q"][1]).reshape(w.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert np.abs(got - w).max() > 0.05 * np.abs(w).max()


@pytest.mark.parametrize("correct", [False, True])
def test_what_is_lost_within_a_layer_is_made_good_there(correct):
    """Half of each value is lost: the matrix behind it doubles."""
    forward, params, batches, axes, _ = case("a decoder")
    change = lambda name, w, found: w / 2 if name.endswith("v") else w
    made = layer_by_layer(forward, params, batches, change, ["blocks/attention/v", "blocks/attention/out"], axes=axes, correct=correct)
    out = lambda params: np.asarray(forward(params, batches[0])["logits"])[batches[0]["attention_mask"] > 0]
    off = np.linalg.norm(out(made) - out(params)) / np.linalg.norm(out(params))
    assert off < 0.02 if correct else off > 0.2  # a hundredth of damping leaves that much of the half


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
