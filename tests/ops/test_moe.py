"""Mixtures of experts: by hand one token at a time, both paths beside each other on one device and on eight, and the loss that balances."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import for_tpu, needs_libtpu

from bigflax import models, ops, sharding, tasks, train, trees, weights

B, T, D, F, E, C = 8, 6, 8, 12, 8, 2
RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
X, LOGITS = jnp.asarray(draw(B, T, D)), 2 * draw(B, T, E)
AXES = {"gate": "experts | embed -> mlp", "up": "experts | embed -> mlp", "down": "experts | mlp -> embed"}
PARAMS = {"gate": draw(E, D, F), "up": draw(E, D, F), "down": draw(E, F, D)}
WAYS, ROOM = [*ops.moe.IMPLEMENTATIONS], E / C  # a capacity that all tokens of a device fit in
CLOSE = dict(rtol=1e-5, atol=1e-4)  # float32: sums of a dozen terms of size 1 to 10, in another order


def expert(x, w, product):
    return product(jnp.tanh(product(x, w["gate"])) * product(x, w["up"]), w["down"])


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def routed_by_hand(normalize):
    """(gates, experts) of each token, the likeliest first."""
    probs = softmax(LOGITS.astype(np.float64))
    chosen = np.argsort(-probs, -1)[..., :C]
    gates = np.take_along_axis(probs, chosen, -1)
    return gates / gates.sum(-1, keepdims=True) if normalize else gates, chosen


def by_hand(params, gates, chosen):
    x, y = np.asarray(X, np.float64), np.zeros((B, T, D))
    for b, t, c in np.ndindex(B, T, C):
        gate, up, down = (np.asarray(params[name], np.float64)[chosen[b, t, c]] for name in ("gate", "up", "down"))
        y[b, t] += gates[b, t, c] * ((np.tanh(x[b, t] @ gate) * (x[b, t] @ up)) @ down)
    return y


@pytest.mark.parametrize("normalize", [True, False])
def test_a_router_takes_the_likeliest(normalize):
    probs, gates, chosen = ops.route(jnp.asarray(LOGITS), C, normalize=normalize)
    want_gates, want_chosen = routed_by_hand(normalize)
    np.testing.assert_array_equal(chosen, want_chosen)
    np.testing.assert_allclose(gates, want_gates, rtol=1e-5)
    np.testing.assert_allclose(probs, softmax(LOGITS), rtol=1e-5)


def test_the_best_first_and_softmax_then_is_the_normalized_router():
    best = np.sort(LOGITS, -1)[..., ::-1][..., :C]
    np.testing.assert_allclose(ops.route(jnp.asarray(LOGITS), C, normalize=True)[1], softmax(best), rtol=1e-5)


@functools.cache
def lora_of(name):
    made = weights.lora(jnp.asarray(PARAMS[name]), 3, axes=AXES[name], rng=jax.random.key(1), alpha=2.0)
    return weights.LoRA(made.base, made.a, 0.3 * jax.random.normal(jax.random.key(2), made.b.shape), made.alpha)


@functools.cache
def dora_of(name):
    made = weights.dora(jnp.asarray(PARAMS[name]), 3, axes=AXES[name], rng=jax.random.key(1), alpha=2.0)
    return weights.DoRA(made.base, made.a, lora_of(name).b, 1.3 * made.magnitude, made.alpha)


int8 = lambda name: weights.quantize(jnp.asarray(PARAMS[name]), "int8", axes=AXES[name])
WEIGHTS = {
    "arrays": lambda name: jnp.asarray(PARAMS[name]),
    "int8": int8,
    "int8 by groups": lambda name: weights.quantize(jnp.asarray(PARAMS[name]), "int8", axes=AXES[name], group=4),
    "lora": lora_of,
    "lora over int8": lambda name: weights.LoRA(int8(name), lora_of(name).a, lora_of(name).b, 2.0),
    "dora": dora_of,
}
each_weight = pytest.mark.parametrize("kind", WEIGHTS)


@each_weight
@pytest.mark.parametrize("implementation", WAYS)
def test_both_paths_are_a_loop_over_tokens(kind, implementation):
    params = {name: WEIGHTS[kind](name) for name in PARAMS}
    gates, chosen = routed_by_hand(normalize=True)
    run = lambda params: ops.mixture(
        expert, X, jnp.asarray(gates, jnp.float32), chosen, params, AXES, implementation=implementation, capacity_factor=ROOM
    )[0]
    want = by_hand({name: weights.dense(w) for name, w in params.items()}, gates, chosen)
    np.testing.assert_allclose(jax.jit(run)(params), want, rtol=1e-4, atol=1e-3)


@each_weight
def test_every_way_multiplies_by_shards_of_any_weight(kind):
    mesh, params = sharding.make_mesh(expert=2, fsdp=2, tensor=2), {name: WEIGHTS[kind](name) for name in PARAMS}
    gates, chosen = routed_by_hand(normalize=True)
    want = by_hand({name: weights.dense(w) for name, w in params.items()}, gates, chosen)
    placed = jax.device_put(params, sharding.shardings(params, AXES, mesh))
    for way in WAYS:
        run = functools.partial(ops.mixture, expert, axes=AXES, implementation=way, capacity_factor=ROOM)
        with sharding.tracing_on(mesh):
            y, dropped = jax.jit(run)(X, jnp.asarray(gates, jnp.float32), chosen, placed)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)
        assert not dropped


def value_and_grad(implementation, params, x, logits):
    """The output, and the gradients of its product with fixed numbers by x, by the router's logits and by what trains of the weights."""
    toward = jnp.asarray(np.random.default_rng(1).normal(size=X.shape), jnp.float32)
    kept = lambda params: {name: w if not isinstance(w, weights.LoRA) else (w.a, w.b) for name, w in params.items()}

    def loss(trained, x, logits):
        w = {n: weights.LoRA(params[n].base, *p, params[n].alpha) if isinstance(p, tuple) else p for n, p in trained.items()}
        _, gates, chosen = ops.route(logits, C, normalize=False)
        y = ops.mixture(expert, x, gates, chosen, w, AXES, implementation=implementation, capacity_factor=ROOM)[0]
        return jnp.sum(y * toward), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(kept(params), x, logits)
    return y, grads


MESHES = {
    "one device": None,
    "expert=8": dict(expert=8),
    "expert=2 fsdp=2 tensor=2": dict(expert=2, fsdp=2, tensor=2),
    "data=2 expert=4": dict(data=2, expert=4),
    "context=2 expert=2 tensor=2": dict(context=2, expert=2, tensor=2),
    "fsdp=2 context=2 expert=2": dict(fsdp=2, context=2, expert=2),
}


@pytest.mark.parametrize("kind", ["arrays", "lora"])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_the_paths_agree_in_value_and_gradient(sizes, kind):
    params = {name: WEIGHTS[kind](name) for name in PARAMS}
    want = jax.jit(functools.partial(value_and_grad, "reference"))(params, X, LOGITS)
    mesh = None if sizes is None else sharding.make_mesh(**sizes)
    placed = (params, X, LOGITS)
    if mesh is not None:
        rows = jax.NamedSharding(mesh, sharding.spec(("batch", "seq", None), X.shape, mesh))
        placed = (jax.device_put(params, sharding.shardings(params, AXES, mesh)), *(jax.device_put(x, rows) for x in (X, LOGITS)))
    for implementation in WAYS:
        with sharding.tracing_on(mesh):
            got = jax.jit(functools.partial(value_and_grad, implementation))(*placed)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), jax.device_get(got), jax.device_get(want))


def test_an_expert_that_nobody_chose_has_no_gradient_and_no_say():
    gates, chosen = jnp.full((B, T, 1), 0.5), jnp.full((B, T, 1), 2)
    for way in WAYS:
        run = functools.partial(ops.mixture, expert, X, gates, chosen, axes=AXES, implementation=way, capacity_factor=ROOM)
        loss = lambda params, run=run: jnp.sum(run(params)[0] ** 2)
        for g in jax.tree.leaves(jax.grad(loss)({name: jnp.asarray(w) for name, w in PARAMS.items()})):
            assert np.abs(g[2]).max() > 0 and not np.delete(np.asarray(g), 2, axis=0).any()


# -- room, and what finds none ----------------------------------------------------------------------------------------------


def by_hand_in_room(gates, chosen, experts, factor, parts, real):
    """(gates, 0 where dropped; how many were dropped): each of `parts` pieces of the tokens fills its places, the likeliest choices first."""
    kept, dropped = np.zeros((B * T, C)), 0
    for tokens in np.split(np.arange(B * T), parts):
        places = np.full(experts, min(len(tokens), int(np.ceil(factor * C * len(tokens) / experts))))
        for c, m in ((c, m) for c in range(C) for m in tokens if real.reshape(-1)[m]):
            e = chosen.reshape(-1, C)[m, c]
            kept[m, c], dropped = (gates.reshape(-1, C)[m, c], dropped) if places[e] > 0 else (0, dropped + 1)
            places[e] -= 1
    return kept.reshape(B, T, C), dropped


HOLES = np.random.default_rng(5).random((B, T)) > 0.3
CROWDED = {
    "one device": (None, 1, E),
    "data=2 expert=4": (dict(data=2, expert=4), 8, E),
    "expert=2 tensor=4": (dict(expert=2, tensor=4), 2, E),
    "six experts do not divide over four": (dict(data=2, expert=4), 8, 6),
}


@pytest.mark.parametrize("factor", [0.3, 0.6])
@pytest.mark.parametrize("real", [None, HOLES], ids=["whole rows", "padded"])
@pytest.mark.parametrize("sizes, parts, experts", CROWDED.values(), ids=CROWDED)
def test_what_finds_no_room_is_counted_and_adds_nothing(sizes, parts, experts, real, factor):
    """Padding takes no room and adds nothing."""
    mesh, params = None if sizes is None else sharding.make_mesh(**sizes), {name: jnp.asarray(w[:experts]) for name, w in PARAMS.items()}
    _, gates, chosen = ops.route(LOGITS[..., :experts], C, normalize=True)
    run = functools.partial(ops.mixture, expert, axes=AXES, implementation="capacity", capacity_factor=factor)
    with sharding.tracing_on(mesh):
        y, dropped = jax.jit(run)(X, gates, chosen, params, real_BT=real)
    kept, want = by_hand_in_room(
        np.asarray(gates), np.asarray(chosen), experts, factor, parts, np.ones((B, T), bool) if real is None else real
    )
    assert int(dropped) == want > 0
    np.testing.assert_allclose(y, by_hand(PARAMS, kept, np.asarray(chosen)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("factor", [0.5, 0.8])
@pytest.mark.parametrize("real", [None, HOLES], ids=["whole rows", "padded"])
@pytest.mark.parametrize("way", ["ragged", "exchange"])
def test_a_device_without_room_drops_its_last_rows(way, real, factor):
    """On data=2 expert=4 each device has one row of the batch and two experts: it takes the rows of these from its four, so many in all."""
    _, gates, chosen = ops.route(LOGITS, C, normalize=True)
    run = functools.partial(ops.mixture, expert, axes=AXES, implementation=way, capacity_factor=factor)
    with sharding.tracing_on(sharding.make_mesh(data=2, expert=4)):
        y, dropped = jax.jit(run)(X, gates, chosen, PARAMS, real_BT=real)
    kept, want, room = np.zeros((B, T, C)), 0, int(np.ceil(factor * C * 4 * T / 4))
    for group, device in np.ndindex(2, 4):
        mine = [row for row in np.ndindex(B, T, C) if row[0] // 4 == group and int(chosen[row]) // 2 == device]
        mine = [row for row in mine if real is None or real[row[:2]]]
        order = {"exchange": lambda b, t, c: (b, c, t), "ragged": lambda b, t, c: (c, b, t)}[way]
        mine.sort(key=lambda row: (int(chosen[row]), *order(*row)))
        for row in mine[:room]:
            kept[row] = gates[row]
        want += len(mine[room:])
    assert int(dropped) == want > 0
    np.testing.assert_allclose(y, by_hand(PARAMS, kept, np.asarray(chosen)), rtol=1e-4, atol=1e-3)


def test_the_share_that_was_dropped_is_of_all_layers_choices():
    sums = {"dropped": jnp.array([3, 1]), "chosen": jnp.array([[6.0, 4.0], [5.0, 5.0]])}
    assert float(ops.dropped_share(sums)["dropped"]) == pytest.approx(4 / 20)
    assert ops.dropped_share({"chosen": sums["chosen"]}) == {}


WITHOUT_EXCHANGE = {
    "six experts over four": (dict(data=2, expert=4), B, 6, (), "expert"),
    "three rows over two": (dict(expert=2, fsdp=2, tensor=2), 3, E, ("expert",), "fsdp"),
}


@pytest.mark.parametrize("way", ["ragged", "exchange", "capacity"])
@pytest.mark.parametrize("sizes, rows, experts, shared, width", WITHOUT_EXCHANGE.values(), ids=WITHOUT_EXCHANGE)
def test_what_does_not_divide_stays(sizes, rows, experts, shared, width, way):
    """The axis carries the weights' width instead of the experts, or every device looks at all tokens: no token travels, and all is as on one device."""
    mesh, params = sharding.make_mesh(**sizes), {name: jnp.asarray(w[:experts]) for name, w in PARAMS.items()}
    place = sharding.shardings(params, AXES, mesh)
    assert place["gate"].spec[1] == width
    group, *_ = ops.moe._group(X[:rows], params, AXES, mesh, sharding.TABLE)
    assert group == (shared, False)
    _, gates, chosen = ops.route(LOGITS[:rows, :, :experts], C, normalize=True)

    def loss(params, x, way):
        return jnp.sum(ops.mixture(expert, x, gates, chosen, params, AXES, implementation=way, capacity_factor=experts)[0] ** 2)

    want = jax.jit(jax.value_and_grad(functools.partial(loss, way="reference"), (0, 1)))(params, X[:rows])
    with sharding.tracing_on(mesh):
        step = (
            jax.jit(jax.value_and_grad(functools.partial(loss, way=way), (0, 1))).lower(jax.device_put(params, place), X[:rows]).compile()
        )
    assert "all-to-all" not in step.as_text()
    got = step(jax.device_put(params, place), X[:rows])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), *jax.device_get((got, want)))


# -- the parts that a platform has of its own -------------------------------------------------------------------------------


def test_the_stand_in_does_what_ragged_all_to_all_is_documented_to_do():
    mesh, given = (
        sharding.make_mesh(expert=2, devices=jax.devices()[:2]),
        ([1.0, 2, 2, 3, 4, 0], [0, 1, 0, 1], [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1]),
    )
    of = jax.sharding.PartitionSpec("expert")
    run = jax.shard_map(functools.partial(ops.moe._ragged_all_to_all, axis_name="expert"), mesh=mesh, in_specs=(of,) * 6, out_specs=of)
    operand, *slices = map(jnp.asarray, given)
    got = jax.jit(run)(operand[:, None], jnp.zeros((8, 1)), *slices)
    np.testing.assert_array_equal(got[:, 0], [1, 3, 0, 0, 2, 2, 4, 0])


@pytest.mark.parametrize("sizes", [[5, 0, 20, 7], [0, 0, 0, 0], [48, 0, 0, 0]], ids=str)
def test_the_tpu_kernel_is_ragged_dot(sizes):
    """Interpreted, where memory that nobody wrote is nan: rows of no group touch nothing, a group without rows has gradient 0."""
    x, w, toward, sizes = jnp.asarray(draw(48, D)), jnp.asarray(draw(4, D, F)), draw(48, F), jnp.asarray(sizes, jnp.int32)
    ours = (np.arange(48) < int(sizes.sum()))[:, None]
    loss = lambda product: lambda x, w: jnp.sum(jnp.where(ours, product(x, w, sizes) * toward, 0))
    want = jax.jit(jax.value_and_grad(loss(jax.lax.ragged_dot), (0, 1)))(jnp.where(ours, x, 0), w)
    value, (dx, dw) = jax.jit(jax.value_and_grad(loss(functools.partial(ops.moe._gmm, interpret=True)), (0, 1)))(
        jnp.where(ours, x, jnp.nan), w
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), (value, jnp.where(ours, dx, 0), dw), (want[0], *want[1]))


class Chip:
    """A device of a machine that is not here."""

    platform, device_kind, process_index, slice_index = "tpu", "TPU v5 lite", 0, 0

    def __init__(self, number):
        self.id, self.coords, self.core_on_chip = number, (number % 4, number // 4, 0), 0


DEFAULTS = {"a group larger than the choices": (dict(fsdp=2, expert=4), "exchange"), "no larger": (dict(data=4, expert=2), "ragged"),
            "no group": (dict(fsdp=8), "ragged")}  # fmt: skip


@pytest.mark.parametrize("sizes, want", DEFAULTS.values(), ids=DEFAULTS)
def test_what_runs_where_nothing_is_said_drops_nothing(sizes, want):
    choose = functools.partial(ops.moe._choose, X, jnp.zeros((B, T, C), int), PARAMS, AXES)
    assert choose() == "reference"
    with sharding.tracing_on(sharding.make_mesh(**sizes, devices=[Chip(i) for i in range(8)])):
        assert choose() == want


# -- whole models ----------------------------------------------------------------------------------------------------------

SIZES = {
    "expert=2 fsdp=4": dict(fsdp=4, expert=2),
    "expert=4 data=2": dict(data=2, expert=4),
    "expert=8": dict(expert=8),
    "expert=2 fsdp=2 tensor=2": dict(fsdp=2, expert=2, tensor=2),
    "expert=4 tensor=2": dict(expert=4, tensor=2),
    "data=2 expert=2 context=2": dict(data=2, expert=2, context=2),
}
EIGHT = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts"}


@functools.cache
def trained(family, way, mesh):
    """The loss of a batch of rows of very different lengths, and every gradient; its metrics."""
    mesh = None if mesh is None else sharding.make_mesh(**dict(mesh))
    model = models.create(family, size="tiny", router_aux_loss_coef=0.1, dispatch=way, capacity_factor=E / 2, **{EIGHT[family]: E})
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (8, 17))
    real = np.arange(16) < rng.integers(4, 17, (8, 1))
    batch = {"input_ids": ids[:, :-1], "labels": np.where(real, ids[:, 1:], -100), "segment_ids": real.astype(np.int32)}
    params = jax.jit(model.init)(jax.random.key(0))
    if mesh is not None:
        params, batch = jax.device_put((params, batch), (sharding.shardings(params, model.axes, mesh), sharding.batch_sharding(mesh)))

    @jax.jit
    def run(params, batch):
        with sharding.tracing_on(mesh):
            return train.gradients(tasks.token_loss(model), params, jax.tree.map(lambda _: None, params), batch, None)

    grads, loss, metrics, _ = jax.device_get(run(params, batch))
    return grads, float(loss.value), {name: float(m.value) for name, m in metrics.items()}


ALL = "expert=2 fsdp=2 tensor=2"
LAWS = [("mixtral", mesh, way) for mesh in SIZES for way in WAYS]
LAWS += [(family, ALL, way) for family in ("qwen2_moe", "qwen3_moe") for way in WAYS[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("family, mesh, way", LAWS)
def test_every_way_on_every_mesh_teaches_what_one_device_does(family, mesh, way):
    grads, loss, metrics = trained(family, way, tuple(SIZES[mesh].items()))
    want_grads, want, want_metrics = trained(family, "reference", None)
    assert loss == pytest.approx(want, rel=1e-5)
    assert metrics["aux_loss"] == pytest.approx(want_metrics["aux_loss"], rel=1e-5)
    assert metrics.get("dropped", 0) == 0 and ("dropped" in metrics) == (way != "reference")
    for (name, g), (_, one) in zip(trees.named_leaves(grads), trees.named_leaves(want_grads), strict=True):
        # float32, sums in another order over at most 8 x 16 x 256 terms
        np.testing.assert_allclose(g, one, rtol=0, atol=1e-5 * np.abs(one).max(), err_msg=name)


LAYER = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from bigflax import nn, sharding
mesh = sharding.make_mesh(devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices, fsdp=2, expert=4)
module = nn.Moe(8, 2, 256, implementation=sys.argv[1], capacity_factor=1.0)
model = nn.model(module, x_BTD=jax.ShapeDtypeStruct((1, 8, 512), jnp.float32))
place = lambda s, where, dtype=None: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=where)
params = jax.tree.map(place, model.shapes(), sharding.shardings(model.shapes(), model.axes, mesh))
x = jax.ShapeDtypeStruct((8, 1024, 512), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
def loss(params, x):
    with sharding.tracing_on(mesh):
        return jnp.sum(jnp.square(module.apply({"params": params}, x)[0].astype(jnp.float32)))
print(jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile().as_text())
"""
SENT = 2 * 1024 * 512  # numbers: a row for each choice of a device's tokens


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("way, kind", [("exchange", "ragged-all-to-all"), ("capacity", "all-to-all")])
def test_on_a_tpu_rows_travel_in_their_group_once_a_direction_and_pass(way, kind):
    """There and back, forward and backward, between the four devices along `expert` and no others; the weights' width is gathered, and the sum
    of its gradients scattered, between the two along `fsdp`."""
    lines = for_tpu(LAYER, way).splitlines()
    of = lambda kind: [line for line in lines if re.search(rf"= \S+ {kind}(-start)?\(", line)]
    numbers = lambda line: math.prod(map(int, re.search(r"\[([\d,]+)\]", line).group(1).split(",")))
    moved = of(kind)
    assert len(moved) == 4 and all("{{0,1,2,3},{4,5,6,7}}" in line for line in moved), moved
    assert [*map(numbers, moved)] == [SENT] * 4  # with a capacity of 1 there is room for as many
    assert len([line for line in of("reduce-scatter") if "shard_map" in line]) == 3
    kernels = [line for line in lines if "tpu_custom_call" in line and "gmm" in line]
    assert len(kernels) == (9 if way == "exchange" else 0), kernels  # three products, and of each the gradients by rows and by weights


# -- balance ---------------------------------------------------------------------------------------------------------------

REAL = np.ones((B, T), bool)
REAL[1, 2:], REAL[2, :4] = False, False


def stacked_sums(layers, real):
    """`router_sums` of some layers' logits with a leading layer axis."""
    sums = [ops.router_sums(*(ops.route(jnp.asarray(l), C, normalize=False)[i] for i in (0, 2)), real) for l in layers]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *sums)


@pytest.mark.parametrize("real", [None, REAL], ids=["whole rows", "padded"])
def test_the_load_balance_loss_is_that_of_transformers(real):
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [LOGITS, 3 * draw(B, T, E)]
    flat = tuple(torch.from_numpy(l.reshape(-1, E)) for l in layers)
    want = load_balancing_loss_func(flat, E, C, None if real is None else torch.from_numpy(real.astype(np.int64)))
    np.testing.assert_allclose(ops.load_balance(stacked_sums(layers, real)), want, rtol=1e-5)


def test_the_load_balance_loss_by_hand():
    """C where every expert is as likely and as often chosen as any other; E C where one token's choice is everyone's."""
    even = np.zeros((1, E, E), np.float32)
    even[0, np.arange(E), np.arange(E)], even[0, np.arange(E), (np.arange(E) + 1) % E] = 1.1, 1.0
    np.testing.assert_allclose(ops.load_balance(stacked_sums([even], None)), C, rtol=1e-5)
    one = np.tile(np.array([40.0, 40.0] + [0.0] * (E - 2), np.float32), (1, 3, 1))
    np.testing.assert_allclose(ops.load_balance(stacked_sums([one], None)), E * C / 2, rtol=1e-5)  # two share p


def test_padding_has_no_say_in_the_balance():
    other = np.where(REAL[..., None], LOGITS, 9 * draw(B, T, E))
    assert float(ops.load_balance(stacked_sums([other], REAL))) == float(ops.load_balance(stacked_sums([LOGITS], REAL)))
    assert float(ops.load_balance(stacked_sums([other], None))) != float(ops.load_balance(stacked_sums([LOGITS], None)))


def test_mistakes():
    with pytest.raises(ValueError, match="9 experts a token cannot be chosen from 8"):
        ops.route(jnp.asarray(LOGITS), 9, normalize=True)
    with pytest.raises(ValueError, match="no implementation 'sorted'; take one of reference, ragged, exchange, capacity, or None"):
        ops.mixture(expert, X, LOGITS[..., :C], jnp.zeros((B, T, C), int), PARAMS, AXES, implementation="sorted")
