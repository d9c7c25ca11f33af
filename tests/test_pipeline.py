"""A pipeline is the scan over the same layers: values, every gradient, and what layers return beside, for any schedule on any mesh."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import models, nn, pipeline, sharding, tasks, train, trees
from bigflax.flops import count_flops

B, T, D, L = 32, 4, 6, 8
# mesh, micro-batches, rounds
SCHEDULES = {
    "stage=2": (dict(stage=2), 2, 1),
    "stage=2 fsdp=4, twice as many": (dict(stage=2, fsdp=4), 4, 1),
    "stage=2 data=2 fsdp=2, four times as many": (dict(stage=2, data=2, fsdp=2), 8, 1),
    "stage=4 tensor=2": (dict(stage=4, tensor=2), 4, 1),
    "stage=8": (dict(stage=8), 16, 1),
    "stage=2 data=4, two rounds": (dict(stage=2, data=4), 4, 2),
    "stage=2 slice=2 fsdp=2, four rounds": (dict(slice=2, stage=2, fsdp=2), 8, 4),
    "stage=4 fsdp=2, two rounds": (dict(stage=4, fsdp=2), 4, 2),
}


def mesh_of(sizes):
    return sharding.make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def layer(w, x, shared, key):
    y = jnp.tanh(x @ w["a"] + shared["rows"][..., None] * w["b"]) + shared["whole"]
    y = sharding.constrain(y, "batch", None, None)
    assert shared["static"] is True
    return y, {"hidden": y, "sum": jnp.sum(y**2, (0, 1)), "count": jnp.sum(shared["rows"] > 0), "none": None}


def parts(seed=0):
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
    w = {"a": draw(0, L, D, D) / 3, "b": draw(1, L, D)}
    return w, draw(2, B, T, D), draw(3, B, T), draw(4, 1, T, D) / 9


def loss_of(run):
    def loss(w, x, rows, whole):
        y, seen = run(w, x, {"rows": rows, "whole": whole, "static": True})
        weigh = lambda a, seed: jnp.sum(a * jax.random.normal(jax.random.key(seed), a.shape))
        return weigh(y, 1) + weigh(seen["hidden"], 2) + weigh(seen["sum"], 3) / B, (y, seen)

    return loss


def plain(tied):
    def run(w, x, shared):
        if tied:
            return jax.lax.scan(lambda x, _: layer(w, x, shared, None), x, None, length=L)
        return jax.lax.scan(lambda x, w: layer(w, x, shared, None), x, w)

    return run


@pytest.mark.parametrize("sizes, micro, repeats", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_is_the_scan(sizes, micro, repeats):
    check(sizes, micro, repeats, "none", tied=False)


@pytest.mark.parametrize("remat, tied", [("full", False), ("dots", False), ("full", True)])
def test_rematerialized_and_tied_too(remat, tied):
    check(*SCHEDULES["stage=2 data=4, two rounds"], remat, tied)


def check(sizes, micro, repeats, remat, tied):
    w, *rest = parts()
    w = jax.tree.map(lambda w: w[0], w) if tied else w
    mesh = mesh_of(sizes)

    def piped(w, x, shared):
        plan = pipeline.plan(L, len(x))
        assert (plan.micro_batches, plan.repeats, plan.pieces) == (micro, repeats, L // sizes["stage"] // repeats)
        return pipeline.run(layer, w, x, shared, plan, tied=tied, policy=nn.REMAT[remat], keep=remat != "full")

    def step(*args):
        with sharding.tracing_on(mesh, micro_batches=micro, repeats=repeats):
            return jax.value_and_grad(loss_of(piped), argnums=(0, 1, 2, 3), has_aux=True)(*args)

    got = jax.jit(step)(w, *rest)
    want = jax.jit(jax.value_and_grad(loss_of(plain(tied)), argnums=(0, 1, 2, 3), has_aux=True))(w, *rest)
    for (name, a), (_, b) in zip(trees.named_leaves(got), trees.named_leaves(want), strict=True):
        # float32, sums over at most 32 x 4 x 8 terms in another order
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=name)


def test_a_policy_keeps_what_it_keeps_without_stages():
    """Products with weights are kept and not computed again; with "full" the tick, and in it each layer, is."""

    def work(remat):
        def grads(w, x):
            dense = lambda w, x, shared, key: (jnp.tanh(x @ w), None)
            with sharding.tracing_on(mesh_of(dict(stage=2, data=2))):
                plan = pipeline.plan(L, B)
                run = lambda w, x: pipeline.run(dense, w, x, {}, plan, policy=nn.REMAT[remat], keep=remat != "full")[0]
                return jax.grad(lambda w, x: jnp.sum(run(w, x) ** 2), argnums=(0, 1))(w, x)

        return count_flops(grads, jnp.ones((L, D, D)), jnp.ones((B, T, D)))

    forward = 3 * 2 * L * 2 * (B // 2 * T) * D * D // 2  # three ticks, and each of both stages its half of the layers on half of the rows
    assert (work("none"), work("dots"), work("full")) == (3 * forward, 3 * forward, 5 * forward)


def test_each_layer_and_micro_batch_draws_its_own():
    """Every row of every layer has its own random bits, but where two devices hold rows of one micro-batch they draw together: none repeats."""

    def drawing(w, x, shared, key):
        return x, {"bits": jax.random.bits(key, (len(x),))}

    def run(seed):
        with sharding.tracing_on(mesh_of(dict(stage=2, data=2)), micro_batches=4, repeats=2):
            x = jnp.zeros((B, T))
            return pipeline.run(drawing, jnp.zeros((L, 1)), x, {}, pipeline.plan(L, B), key=jax.random.key(seed))[1]["bits"]

    bits = np.asarray(jax.jit(run)(0))
    assert bits.shape == (L, B) and len(np.unique(bits)) == L * B
    np.testing.assert_array_equal(bits, jax.jit(run)(0))
    assert not np.intersect1d(bits, jax.jit(run)(1)).size


# -- models ----------------------------------------------------------------------------------------------------------------


def batch_of(rows=16, length=16, vocab=256, packed=False):
    """Rows of very different lengths; packed, two documents a row, cut at another place in each."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (rows, length + 1))
    real, at, cut = np.arange(length) < rng.integers(1, length + 1, (rows, 1)), np.arange(length), rng.integers(2, length - 2, (rows, 1))
    batch = {"input_ids": ids[:, :-1], "labels": np.where(real, ids[:, 1:], -100)}
    if packed:
        batch |= {"segment_ids": 1 + (at >= cut), "position_ids": np.where(at >= cut, at - cut, at)}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def one_step(family, sizes, config, *, packed=False, **options):
    """(metrics, gradients) of one step of plain SGD at rate 1, and with how much rounding: 2^-24 of a weight before it and after."""
    mesh = mesh_of(sizes)
    model = models.create(family, size="tiny", **config)
    tx = optax.sgd(1.0)
    state = train.init_state(model.init, tx, mesh=mesh, axes=model.axes)
    step = train.train_step(tasks.token_loss(model), tx, state, **options)
    before, batch = jax.device_get(state.params), batch_of(packed=packed)
    batch |= {"decoder_input_ids": batch["input_ids"][:, ::-1]} if family == "t5" else {}
    state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
    grads = jax.tree.map(np.subtract, before, jax.device_get(state.params))
    rounding = jax.tree.map(lambda w: 2**-23 * max(1, np.abs(w).max()), before)
    return {name: float(getattr(m, "value", m)) for name, m in metrics.items()}, grads, rounding


FOUR = dict(num_hidden_layers=4)
GEMMA = dict(num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3, head_dim=8)
MODELS = {  # family, config, mesh, options of the step
    "llama, packed": ("llama", FOUR, dict(stage=2, fsdp=4), dict(packed=True)),
    "llama, packed, full remat": ("llama", FOUR | dict(remat="full"), dict(stage=2, fsdp=2, tensor=2), dict(packed=True, micro_batches=4, repeats=2)),
    "llama, packed, four stages": ("llama", FOUR | dict(remat="dots"), dict(stage=4, data=2), dict(packed=True, micro_batches=8)),
    "llama, accumulated": ("llama", FOUR, dict(stage=2), dict(packed=True, micro_batches=4, accumulate=2)),
    "gpt2": ("gpt2", dict(n_layer=4, embd_pdrop=0.0, resid_pdrop=0.0), dict(stage=2, data=2, tensor=2), dict(micro_batches=4)),
    "bert": ("bert", FOUR | dict(hidden_dropout_prob=0.0), dict(stage=2, slice=2, fsdp=2), dict(repeats=2)),
    "mixtral": ("mixtral", FOUR, dict(stage=2, data=2, fsdp=2), dict(micro_batches=4)),
    "llama, a sequence over devices too": ("llama", FOUR, dict(stage=2, context=2, fsdp=2), dict(packed=True, micro_batches=4)),
    "mixtral, experts apart too": ("mixtral", FOUR | dict(dispatch="capacity", capacity_factor=8.0), dict(stage=2, expert=2, fsdp=2), dict(micro_batches=4)),
    "albert, whose layers are one": ("albert", FOUR | dict(hidden_dropout_prob=0.0), dict(stage=2, fsdp=4), {}),
    "t5, an encoder and a decoder": ("t5", dict(num_layers=2, num_decoder_layers=4, dropout_rate=0.0), dict(stage=2, fsdp=2), dict(micro_batches=4)),
    "gemma3, a group that does not divide": ("gemma3_text", GEMMA | dict(num_hidden_layers=5, layer_types=GEMMA["layer_types"][:5]), dict(stage=2, fsdp=2), {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family, config, sizes, options", MODELS.values(), ids=MODELS)
def test_models_equal_one_device(family, config, sizes, options):
    metrics, grads, rounding = one_step(family, sizes, config, **options)
    want, reference, _ = one_step(family, dict(data=1), config, packed=options.get("packed", False))
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    for (leaf, got), (_, wanted), (_, lost) in zip(*map(trees.named_leaves, (grads, reference, rounding)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max() + lost, err_msg=leaf)  # sums in another order


def test_dropout_keeps_its_share_and_follows_the_seed():
    class Dropping(linen.Module):
        @linen.compact
        def __call__(self, x, each=None):
            w = nn.weight(self, "w", (1,), "norm", nn.ones)
            return x, {"kept": nn.dropout(self, jnp.ones_like(x) * w, 0.25) > 0}

    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x):
            return {"kept": nn.stack(Dropping(parent=self, name="blocks"), L, x)[1]["kept"]}

    x = jnp.ones((B, 500))
    model = nn.model(Stack(), x=jax.ShapeDtypeStruct((1, 2), jnp.float32))
    params = model.init(jax.random.key(0))

    def kept(seed, sizes):
        with sharding.tracing_on(mesh_of(sizes), micro_batches=4, repeats=2 if "stage" in sizes else 1):
            return model.apply(params, rng=jax.random.key(seed), x=x)["kept"]

    run = lambda seed, **sizes: np.asarray(jax.jit(lambda seed: kept(seed, sizes))(seed))
    piped, scanned = run(0, stage=2, data=2), run(0, data=4)
    assert piped.shape == scanned.shape == (L, B, 500)
    sigma = np.sqrt(0.25 * 0.75 / piped[0].size)  # of the share in one layer, a binomial's
    assert np.abs(piped.mean((1, 2)) - 0.75).max() < 5 * sigma
    assert (piped != run(1, stage=2, data=2)).mean() > 0.3 and (piped == run(0, stage=2, data=2)).all()


BAD = {
    "nothing divides": ("llama", dict(num_hidden_layers=3), {}, "the mesh has stage=2, but nothing here runs as a pipeline"),
    "too few micro-batches": (
        "llama",
        FOUR,
        dict(micro_batches=3),
        "3 micro-batches do not fill a pipeline of 2 stages evenly; take a multiple of 2",
    ),
    "rounds": ("llama", FOUR, dict(repeats=3), "4 layers do not divide into 2 stages x 3 rounds"),
    "rows": ("llama", FOUR, dict(micro_batches=12), "batch 16 does not divide into 12 micro-batches over 1 devices; nearest is 12"),
    "grouped products": ("mixtral", FOUR | dict(dispatch="exchange"), {}, "'exchange' runs below stages on a TPU alone"),
}


@pytest.mark.parametrize("family, config, options, message", BAD.values(), ids=BAD)
def test_what_cannot_be_piped_says_so(family, config, options, message):
    with pytest.raises(ValueError, match=message):
        one_step(family, dict(stage=2), config, **options)


def test_evaluation_pipes_where_it_can():
    """Rows that do not divide run one layer after the other, with the same result."""
    mesh = mesh_of(dict(stage=2, fsdp=2))
    model = models.create("llama", size="tiny", num_hidden_layers=2)
    params = model.init(jax.random.key(0))
    placed = jax.device_put(params, sharding.shardings(params, model.axes, mesh))
    for rows, pipes in ((8, 1), (3, 0)):
        ids = batch_of(rows)["input_ids"]

        def run(params, ids):
            with sharding.tracing_on(mesh):
                return model.apply(params, input_ids=ids)["logits"], len(sharding.current_layout().pipelines)

        logits, count = jax.jit(run)(placed, ids)
        assert count == pipes
        # float32 logits of sums over 64 terms, two layers deep
        np.testing.assert_allclose(logits, model.apply(params, input_ids=ids)["logits"], rtol=0, atol=1e-5)
