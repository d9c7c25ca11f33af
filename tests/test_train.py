"""The step and its laws: every layout equals one device, accumulation weighs by counts, what is frozen stays, a bad step changes nothing."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import models, optim, sharding, tasks, train, trees
from bigflax.hosts import StopSignal
from bigflax.metrics import Mean

ONE = {"data": 1}
MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "data=2 fsdp=4": {"data": 2, "fsdp": 4},
    "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2},
}
FAMILIES = {
    "gpt2": dict(embd_pdrop=0.0, resid_pdrop=0.0),
    "llama": dict(),
    "bert": dict(hidden_dropout_prob=0.0),
}


def mesh_of(sizes):
    count = int(np.prod(list(sizes.values())))
    return sharding.make_mesh(**sizes, devices=jax.devices()[:count])


def batch_of(rows=8, length=16, vocab=256, seed=0):
    """Rows of very different lengths: labels after the first n are ignored."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (rows, length + 1))
    real = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
    return {"input_ids": jnp.asarray(ids[:, :-1]), "labels": jnp.asarray(np.where(real, ids[:, 1:], -100))}


def put(batch, mesh):
    return jax.device_put(batch, sharding.batch_sharding(mesh))


def build(name, mesh, *, accumulate=1, tx=None, table=sharding.TABLE, **config):
    model = models.create(name, size="tiny", **{**FAMILIES[name], **config})
    tx = tx or optim.make(lr=1e-3, steps=10, axes=model.axes)
    state = train.init_state(model.init, tx, mesh=mesh, axes=model.axes, table=table)
    return state, train.train_step(tasks.token_loss(model), tx, state, accumulate=accumulate, table=table)


@pytest.fixture(scope="module")
def one_device():
    """Loss and weights after two steps on one device, by family."""

    def run(name):
        mesh = mesh_of(ONE)
        state, step = build(name, mesh, tx=optax.sgd(0.1))
        losses = []
        for i in range(2):
            state, metrics = step(state, put(batch_of(seed=i), mesh))
            losses.append(float(metrics["loss"].value))
        return losses, jax.device_get(state.params)

    cache = {}
    return lambda name: cache.setdefault(name, run(name))


BETWEEN = {**sharding.TABLE, "between": ("context", "tensor")}  # sequence parallelism: Korthikanti et al. 2022
LAYOUTS = {
    **{name: (sizes, sharding.TABLE) for name, sizes in MESHES.items()},
    "fsdp=2 tensor=4, cut between": ({"fsdp": 2, "tensor": 4}, BETWEEN),
}


@pytest.mark.parametrize("sizes, table", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "bert"))])
def test_every_layout_equals_one_device(name, sizes, table, one_device):
    losses, params = one_device(name)
    mesh = mesh_of(sizes)
    state, step = build(name, mesh, tx=optax.sgd(0.1), table=table)
    for i in range(2):
        state, metrics = step(state, put(batch_of(seed=i), mesh))
        # float32, sums in another order over at most 8 x 16 x 256 terms
        assert float(metrics["loss"].value) == pytest.approx(losses[i], rel=1e-5)
    for (leaf, got), (_, want) in zip(trees.named_leaves(jax.device_get(state.params)), trees.named_leaves(params), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1e-2, np.abs(want).max()), err_msg=leaf)
    assert step.compiled._cache_size() == 1


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_moments_lie_as_their_weights(sizes, optimizer):
    mesh = mesh_of(sizes)
    model = models.create("llama", size="tiny")
    tx = optim.make(lr=1e-3, steps=10, name=optimizer, axes=model.axes)
    state = train.init_state(model.init, tx, mesh=mesh, axes=model.axes)
    weights = dict(trees.named_leaves(state.params))
    seen = 0
    for name, leaf in trees.named_leaves(state.opt):
        owner = next((w for n, w in weights.items() if name.endswith("/" + n) and w.shape == leaf.shape), None)
        if owner is not None:
            assert leaf.sharding.is_equivalent_to(owner.sharding, leaf.ndim), name
            seen += 1
    assert seen >= len(weights)  # a moment at least for each weight
    if "fsdp" in sizes:
        assert not weights["blocks/mlp/up"].sharding.is_fully_replicated


def test_an_average_lies_as_its_weights_and_is_evaluated():
    """After three steps on eight devices, the last of them bad, it is the average of two: 1 and 10/11 of the weights have entered by then."""
    mesh, batch = mesh_of({"data": 2, "fsdp": 4}), plain_batch()
    tx = optim.make(lr=1e-2, steps=100, ema=0.9)
    state = train.init_state({**plain_init(jax.random.key(0)), "fixed": jnp.ones(8)}, tx, mesh=mesh, freeze=[("fixed", True)])
    step, seen = train.train_step(plain_loss, tx, state), [jax.device_get(state.params)]
    for poison in (1.0, 1.0, jnp.nan):
        state, _ = step(state, put({**batch, "y": batch["y"] * poison}, mesh))
        seen.append(jax.device_get(state.params))
    assert int(state.skipped) == 1 and step.compiled._cache_size() == 1
    for name, w in state.averaged.items():
        assert w.sharding.is_equivalent_to(state.weights[name].sharding, w.ndim), name
    want = jax.tree.map(lambda a, b, c: (0.1 * a + 0.9 * b) * 2 / 11 + c * 9 / 11, *seen[:3])
    for name in ("w1", "w2"):
        np.testing.assert_allclose(state.averaged[name], want[name], rtol=1e-5)
    measure = train.eval_step(plain_loss, mesh)
    assert train.evaluate(measure, state.averaged, [batch])["loss"] != train.evaluate(measure, state.weights, [batch])["loss"]


def test_state_is_born_sharded():
    """The program that makes the state holds no array larger than a device's share of the largest weight."""
    mesh = mesh_of({"fsdp": 8})
    model = models.create("llama", size="tiny", hidden_size=128, vocab_size=1024)
    tx = optim.make(lr=1e-3, steps=10, axes=model.axes)
    state = train.init_state(model.init, tx, mesh=mesh, axes=model.axes)
    share = max(w.addressable_shards[0].data.nbytes for w in jax.tree.leaves(state.params))
    assert share * 8 <= max(w.nbytes for w in jax.tree.leaves(state.params))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_the_large_batch(accumulate):
    """Micro-batches with different numbers of real tokens give the gradient of the whole batch."""
    mesh = mesh_of({"data": 2})
    results = {}
    for parts in (1, accumulate):
        state, step = build("gpt2", mesh, accumulate=parts, tx=optax.sgd(1.0))
        before = jax.device_get(state.params)
        state, metrics = step(state, put(batch_of(), mesh))
        results[parts] = (jax.tree.map(np.subtract, before, jax.device_get(state.params)), float(metrics["loss"].value))
    grads, many = results[1][0], results[accumulate][0]
    for (name, a), (_, b) in zip(trees.named_leaves(grads), trees.named_leaves(many), strict=True):
        # the difference of float32 weights of size one carries their rounding: 2^-24 each
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max() + 2**-23, err_msg=name)
    assert results[1][1] == pytest.approx(results[accumulate][1], rel=1e-6)


def plain_loss(params, batch, rng):
    prediction = jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"]
    return jnp.mean((prediction - batch["y"]) ** 2)


def plain_init(rng):
    return {"w1": jax.random.normal(rng, (4, 16)), "w2": jax.random.normal(rng, (16, 1))}


def plain_batch():
    x = jax.random.normal(jax.random.key(2), (8, 4))
    return {"x": x, "y": x[:, :1] * 2}


@pytest.mark.parametrize("axes", [None, {"w1": "embed -> mlp", "w2": "mlp -> _"}], ids=["no axes", "axes"])
@pytest.mark.parametrize("sizes", [ONE, *MESHES.values()], ids=["one", *MESHES])
def test_a_plain_function_learns(sizes, axes):
    mesh = mesh_of(sizes)
    tx = optim.make(lr=1e-2, steps=100)
    state = train.init_state(plain_init, tx, mesh=mesh, axes=axes)
    step = train.train_step(plain_loss, tx, state)
    losses = []
    for _ in range(60):
        state, metrics = step(state, put(plain_batch(), mesh))
        losses.append(float(metrics["loss"].value))
    assert losses[-1] < 0.2 * losses[0] and int(state.step) == 60 and step.compiled._cache_size() == 1


POISON = {"loss": lambda x: x * jnp.nan, "infinite": lambda x: x * jnp.inf}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_a_bad_step_changes_nothing_but_the_counters(poison):
    mesh = mesh_of(ONE)
    tx = optim.make(lr=1e-2, steps=100)
    state = train.init_state(plain_init, tx, mesh=mesh)
    step = train.train_step(plain_loss, tx, state)
    state, _ = step(state, plain_batch())
    before = jax.device_get((state.params, state.opt))
    state, _ = step(state, {**plain_batch(), "y": poison(jnp.ones((8, 1)))})
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt)))
    assert (int(state.step), int(state.skipped)) == (2, 1)
    state, _ = step(state, plain_batch())
    assert (int(state.step), int(state.skipped)) == (3, 1)
    assert not np.array_equal(before[0]["w1"], state.params["w1"])


def test_what_is_frozen_stays_and_costs_no_optimizer_state():
    mesh = mesh_of({"fsdp": 8})
    tx = optim.make(lr=1e-2, steps=100)
    state = train.init_state(plain_init, tx, mesh=mesh, freeze=[("w1", True)])
    assert trees.count(state.opt) == 2 * 16 + 2  # two moments of w2 and two counters: the schedule's and Adam's
    before = jax.device_get(state.weights)
    step = train.train_step(plain_loss, tx, state)
    state, _ = step(state, put(plain_batch(), mesh))
    np.testing.assert_array_equal(state.weights["w1"], before["w1"])
    assert not np.array_equal(state.weights["w2"], before["w2"])


def counting(params, batch, rng):
    """A loss of a model that counts the rows it has seen and keeps their mean, neither of which trains."""
    updates = {"seen": params["seen"] + batch["x"].shape[0], "mean": 0.5 * params["mean"] + 0.5 * batch["x"].mean(0)}
    return plain_loss(params, batch, rng), {}, updates


def counting_state(mesh, freeze=(("mean", True),)):
    init = lambda rng: {**plain_init(rng), "seen": jnp.zeros((), jnp.int32), "mean": jnp.zeros(4)}
    return train.init_state(init, optax.sgd(0.1), mesh=mesh, freeze=freeze)


@pytest.mark.parametrize("sizes", [ONE, {"fsdp": 8}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_take_the_place_of_frozen_leaves(sizes, accumulate):
    """Once a step, averaged over micro-batches, which leaves a count of the rows of one; the weights learn as without."""
    mesh, batch = mesh_of(sizes), {name: jnp.tile(x, (2, 1)) for name, x in plain_batch().items()}
    state = counting_state(mesh)
    frozen = state.frozen
    step = train.train_step(counting, optax.sgd(0.1), state, accumulate=accumulate)
    for _ in range(2):
        state, _ = step(state, put(batch, mesh))
    assert int(state.weights["seen"]) == 2 * 16 // accumulate and state.weights["seen"].dtype == jnp.int32
    np.testing.assert_allclose(state.weights["mean"], 0.75 * batch["x"].mean(0), rtol=1e-5, atol=1e-6)
    assert int(frozen["seen"]) == 0  # the frozen tree is not donated: whoever shares it still has it
    assert step.compiled._cache_size() == 1 and state.frozen["mean"].sharding == frozen["mean"].sharding
    without = train.init_state(plain_init, optax.sgd(0.1), mesh=mesh)
    plain = train.train_step(plain_loss, optax.sgd(0.1), without, accumulate=accumulate)
    for _ in range(2):
        without, _ = plain(without, put(batch, mesh))
    np.testing.assert_array_equal(state.params["w1"], without.params["w1"])


def test_a_bad_step_updates_nothing():
    state = counting_state(mesh_of(ONE))
    step = train.train_step(counting, optax.sgd(0.1), state)
    state, _ = step(state, plain_batch())
    before = jax.device_get(state.frozen)
    state, _ = step(state, {**plain_batch(), "y": jnp.full((8, 1), jnp.nan)})
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.frozen))
    assert int(state.skipped) == 1


def test_evaluation_ignores_updates():
    state = counting_state(mesh_of(ONE))
    got = train.evaluate(train.eval_step(counting), state.weights, [plain_batch()])
    assert got == train.evaluate(train.eval_step(plain_loss), state.weights, [plain_batch()])


def test_what_axes_call_a_statistic_is_frozen():
    axes = {"w1": "embed -> mlp", "w2": "mlp -> _", "seen": "", "mean": "statistic"}
    init = lambda rng: {**plain_init(rng), "seen": jnp.zeros((), jnp.int32), "mean": jnp.zeros(4)}
    state = train.init_state(init, optax.sgd(0.1), mesh=mesh_of(ONE), axes=axes)
    assert [name for name, _ in trees.named_leaves(state.frozen)] == ["mean", "seen"]


WRONG_UPDATES = {
    "a name": ({"meen": jnp.zeros(4)}, {}, "the loss updates 'meen', which is no frozen leaf; frozen are 'seen', 'mean'"),
    "what trains": (
        {"mean": jnp.zeros(4)},
        {"freeze": ()},
        "'mean', which is no frozen leaf; it trains: pass axes=model.axes to init_state",
    ),
    "a shape": ({"mean": jnp.zeros(3)}, {}, r"updates 'mean' of shape \(4,\) with an array of shape \(3,\)"),
}


@pytest.mark.parametrize("updates, options, message", WRONG_UPDATES.values(), ids=WRONG_UPDATES)
def test_wrong_updates(updates, options, message):
    state = counting_state(mesh_of(ONE), **options)
    step = train.train_step(lambda params, batch, rng: (plain_loss(params, batch, rng), {}, updates), optax.sgd(0.1), state)
    with pytest.raises(ValueError, match=message):
        step(state, plain_batch())


def test_freezing_everything_is_an_error():
    with pytest.raises(ValueError, match="nothing trains"):
        train.init_state(plain_init, optax.sgd(0.1), mesh=mesh_of(ONE), freeze=[(".*", True)])


def test_starting_from_weights_leaves_them_alone():
    params = plain_init(jax.random.key(0))
    tx = optax.sgd(0.1)
    state = train.init_state(params, tx, mesh=mesh_of(ONE))
    state, _ = train.train_step(plain_loss, tx, state)(state, plain_batch())
    assert np.isfinite(params["w1"]).all()  # donation of the state did not take the caller's arrays


def test_like_is_what_init_makes():
    mesh = mesh_of({"fsdp": 4, "tensor": 2})
    model = models.create("gpt2", size="tiny")
    tx = optim.make(lr=1e-3, steps=10, axes=model.axes)
    like = train.state_like(model.init, tx, mesh=mesh, axes=model.axes)
    state = train.init_state(model.init, tx, mesh=mesh, axes=model.axes)
    assert jax.tree.structure(like) == jax.tree.structure(state)
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype, a.sharding.is_equivalent_to(b.sharding, a.ndim)) == (b.shape, b.dtype, True) or pytest.fail(str(a)),
        like,
        state,
    )


def test_randomness_is_of_seed_and_step():
    noise = lambda params, batch, rng: (jnp.sum(params["w2"] * 0.0), {"noise": jax.random.uniform(rng)})
    mesh = mesh_of(ONE)

    def draws(seed):
        tx = optax.sgd(0.1)
        state = train.init_state(plain_init, tx, mesh=mesh)
        step = train.train_step(noise, tx, state, seed=seed)
        out = []
        for _ in range(3):
            state, metrics = step(state, plain_batch())
            out.append(float(metrics["noise"].value))
        return out

    assert draws(0) == draws(0) != draws(1)
    assert len(set(draws(0))) == 3


def test_evaluation_weighs_by_count():
    loss = lambda params, batch, rng: Mean(jnp.sum(batch), jnp.int32(batch.size))
    batches = [jnp.ones(6), jnp.zeros(2)]
    assert train.evaluate(train.eval_step(loss), None, batches) == {"loss": 0.75}
    assert train.evaluate(train.eval_step(loss), None, batches, limit=1) == {"loss": 1.0}


class Batches:
    """A loader in the small: counts what it handed out."""

    def __init__(self, number=1000):
        self.number, self.given, self.stall = number, 0, 0.0

    def __iter__(self):
        while self.given < self.number:
            self.given += 1
            yield plain_batch()

    def state(self):
        return {"given": self.given}


class Shelf:
    """Checkpoints in the small."""

    def __init__(self):
        self.saved = []

    def save(self, step, state, *, data, meta, metrics):
        assert int(state.step) == step == data["given"]
        self.saved.append((step, metrics))


def run_fit(**options):
    tx = optim.make(lr=1e-2, steps=50)
    state = train.init_state(plain_init, tx, mesh=mesh_of(ONE))
    records, shelf = [], Shelf()
    state = train.fit(
        state, train.train_step(plain_loss, tx, state), options.pop("loader", Batches()), checkpoints=shelf,
        write=lambda step, values: records.append((step, values)), **{"steps": 20, **options},
    )  # fmt: skip
    return state, records, shelf


def test_fit_logs_evaluates_and_saves_when_told():
    scores = iter([3.0, 1.0, 2.0, 4.0])
    state, records, shelf = run_fit(
        log_every=4, eval_every=5, save_every=8, evaluate=lambda state: {"loss": next(scores)}, watch=train.Watch("loss")
    )
    assert int(state.step) == 20
    assert [s for s, r in records if "loss" in r] == [4, 8, 12, 16, 20]
    assert [(s, r["eval/loss"]) for s, r in records if "eval/loss" in r] == [(5, 3.0), (10, 1.0), (15, 2.0), (20, 4.0)]
    # every 8, the best evaluations with their metrics, and the end
    assert shelf.saved == [(5, {"loss": 3.0}), (8, None), (10, {"loss": 1.0}), (16, None), (20, {"loss": 4.0})]
    first = records[0][1]
    assert {"loss", "grad_norm", "step_time", "data_stall", "memory", "eta"} <= first.keys()


def test_early_stop():
    state, _, shelf = run_fit(eval_every=2, evaluate=lambda state: {"loss": 1.0}, watch=train.Watch("loss", patience=3))
    assert int(state.step) == 8 and shelf.saved[-1][0] == 8


def test_the_end_of_the_data_is_the_end():
    state, _, shelf = run_fit(loader=Batches(7))
    assert int(state.step) == 7 and shelf.saved[-1][0] == 7


def test_a_stop_signal_saves_and_ends():
    class Interrupting(Batches):
        def __iter__(self):
            for batch in super().__iter__():
                if self.given == 5:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

    with StopSignal() as stop:
        state, _, shelf = run_fit(loader=Interrupting(), stop=stop)
    assert stop.received == "SIGTERM" and int(state.step) == 5 and shelf.saved == [(5, None)]


def test_the_largest_is_best_where_more_is_better():
    scores = iter([0.5, 0.9, 0.7, 0.9])  # what is no better is not better
    watch = train.Watch("accuracy", mode="max", patience=2)
    state, _, shelf = run_fit(eval_every=4, evaluate=lambda state: {"accuracy": next(scores)}, watch=watch)
    assert (watch.best, int(state.step)) == (0.9, 16)
    assert shelf.saved == [(4, {"accuracy": 0.5}), (8, {"accuracy": 0.9}), (16, {"accuracy": 0.9})]


def test_a_metric_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no metric 'los' to watch; the evaluation has 'loss'"):
        train.Watch("los").see({"loss": 1.0})


def test_a_profile_is_written(tmp_path):
    run_fit(profile=str(tmp_path), steps=12)
    assert list(tmp_path.rglob("*.xplane.pb"))
