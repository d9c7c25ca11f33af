"""Mixtures of experts: by hand one token at a time, both paths beside each other on one device and on eight, and the loss that balances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import ops, sharding, weights

B, T, D, F, E, C = 4, 6, 8, 12, 4, 2
RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
X, LOGITS = jnp.asarray(draw(B, T, D)), 2 * draw(B, T, E)
AXES = {"gate": "experts | embed -> mlp", "up": "experts | embed -> mlp", "down": "experts | mlp -> embed"}
PARAMS = {"gate": draw(E, D, F), "up": draw(E, D, F), "down": draw(E, F, D)}
WAYS, ROOM = ops.moe.IMPLEMENTATIONS, E / C  # a capacity that all tokens of a device fit in
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


int8 = lambda name: weights.quantize(jnp.asarray(PARAMS[name]), "int8", axes=AXES[name])
WEIGHTS = {
    "arrays": lambda name: jnp.asarray(PARAMS[name]),
    "int8": int8,
    "int8 by groups": lambda name: weights.quantize(jnp.asarray(PARAMS[name]), "int8", axes=AXES[name], group=4),
    "lora": lora_of,
    "lora over int8": lambda name: weights.LoRA(int8(name), lora_of(name).a, lora_of(name).b, 2.0),
}
each_weight = pytest.mark.parametrize("kind", WEIGHTS)


@each_weight
@pytest.mark.parametrize("implementation", WAYS)
def test_both_paths_are_a_loop_over_tokens(kind, implementation):
    params = {name: WEIGHTS[kind](name) for name in PARAMS}
    gates, chosen = routed_by_hand(normalize=True)
    run = lambda params: ops.mixture(expert, X, jnp.asarray(gates, jnp.float32), chosen, params, AXES, implementation=implementation, capacity_factor=ROOM)[0]
    want = by_hand({name: weights.dense(w) for name, w in params.items()}, gates, chosen)
    np.testing.assert_allclose(jax.jit(run)(params), want, rtol=1e-4, atol=1e-3)


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
    "expert=8, which four do not divide": dict(expert=8),
    "expert=2 fsdp=2 tensor=2": dict(expert=2, fsdp=2, tensor=2),
    "data=2 expert=4": dict(data=2, expert=4),
    "context=2 expert=2 tensor=2": dict(context=2, expert=2, tensor=2),
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
    one = np.tile(np.array([40.0, 40.0, 0, 0], np.float32), (1, 3, 1))
    np.testing.assert_allclose(ops.load_balance(stacked_sums([one], None)), E * C / 2, rtol=1e-5)  # two of four share p


def test_padding_has_no_say_in_the_balance():
    other = np.where(REAL[..., None], LOGITS, 9 * draw(B, T, E))
    assert float(ops.load_balance(stacked_sums([other], REAL))) == float(ops.load_balance(stacked_sums([LOGITS], REAL)))
    assert float(ops.load_balance(stacked_sums([other], None))) != float(ops.load_balance(stacked_sums([LOGITS], None)))


def test_mistakes():
    with pytest.raises(ValueError, match="5 experts a token cannot be chosen from 4"):
        ops.route(jnp.asarray(LOGITS), 5, normalize=True)
    with pytest.raises(ValueError, match="no implementation 'sorted'; take one of reference, ragged, or None"):
        ops.mixture(expert, X, LOGITS[..., :C], jnp.zeros((B, T, C), int), PARAMS, AXES, implementation="sorted")
