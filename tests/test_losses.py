"""Each loss against its definition in NumPy float64, and the laws that all of them keep."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import losses

RNG = np.random.default_rng(0)
LOGITS, OTHER = RNG.normal(size=(2, 3, 4, 11)) * 2
LABELS = RNG.integers(0, 11, (3, 4))
IGNORING = np.where(RNG.random((3, 4)) < 0.4, -100, LABELS)
BITS = RNG.integers(0, 2, (3, 4, 11))
A, B = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in RNG.normal(size=(2, 6, 5)))
PAIRS = RNG.normal(size=(4, 9))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def picked(logits, labels):
    return np.take_along_axis(log_softmax(logits), np.maximum(labels, 0)[..., None], -1)[..., 0]


def log_sigmoid(x):
    return -np.log(1 + np.exp(-x))


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def smoothed():
    target = 0.9 * np.eye(11)[LABELS] + 0.1 / 11
    return -(target * log_softmax(LOGITS)).sum(-1)


def divergences():
    q, p = log_softmax(LOGITS / 2), log_softmax(OTHER / 2)
    mix = lambda share: np.log(share * np.exp(p) + (1 - share) * np.exp(q))
    return {
        "forward": 4 * kl(p, q),
        "reverse": 4 * kl(q, p),
        "js": 4 * (kl(p, mix(0.5)) + kl(q, mix(0.5))) / 2,
        "skewed": 4 * kl(p, mix(0.1)),
    }


SOFT = RNG.dirichlet(np.ones(11), (3, 4))
SOFT_IGNORING = np.where(IGNORING[..., None] == -100, -100.0, SOFT)
SIMILAR = 7 * A @ B.T
SIGNS = 2 * np.eye(6) - 1
REAL = np.arange(6) < 4
FOUR = -(np.diag(log_softmax(SIMILAR[:4, :4])) + np.diag(log_softmax(SIMILAR[:4, :4].T))) / 2
TRUE = np.where(BITS == 1, log_sigmoid(LOGITS), log_sigmoid(-LOGITS))
CASES = {  # function, arguments, options, the definition
    "token_log_probs": (losses.token_log_probs, (LOGITS, LABELS), {}, picked(LOGITS, LABELS)),
    "cross_entropy": (losses.cross_entropy, (LOGITS, LABELS), {}, -picked(LOGITS, LABELS)),
    "cross_entropy, ignoring": (losses.cross_entropy, (LOGITS, IGNORING), {}, np.where(IGNORING == -100, 0, -picked(LOGITS, IGNORING))),
    "cross_entropy, smoothing": (losses.cross_entropy, (LOGITS, LABELS), dict(smoothing=0.1), smoothed()),
    "cross_entropy, z_loss": (
        losses.cross_entropy,
        (LOGITS, LABELS),
        dict(z_loss=0.1),
        -picked(LOGITS, LABELS) + 0.1 * np.log(np.exp(LOGITS).sum(-1)) ** 2,
    ),
    "cross_entropy, soft": (
        losses.cross_entropy,
        (LOGITS, SOFT_IGNORING),
        dict(smoothing=0.1),
        np.where(IGNORING == -100, 0, -((0.9 * SOFT + 0.1 / 11) * log_softmax(LOGITS)).sum(-1)),
    ),
    "cross_entropy, focal": (
        losses.cross_entropy,
        (LOGITS, IGNORING),
        dict(gamma=2.0),
        np.where(IGNORING == -100, 0, -((1 - np.exp(picked(LOGITS, IGNORING))) ** 2) * picked(LOGITS, IGNORING)),
    ),
    "cross_entropy, focal below 1": (
        losses.cross_entropy,
        (LOGITS, LABELS),
        dict(gamma=0.5),
        -np.sqrt(1 - np.exp(picked(LOGITS, LABELS))) * picked(LOGITS, LABELS),
    ),
    "cross_entropy, class weights": (
        losses.cross_entropy,
        (LOGITS, LABELS),
        dict(weights=np.arange(11) / 5),
        -(LABELS / 5) * picked(LOGITS, LABELS),
    ),
    "cross_entropy, all of it": (
        losses.cross_entropy,
        (LOGITS, SOFT_IGNORING),
        dict(gamma=1.5, smoothing=0.1, weights=np.arange(11) / 5),
        np.where(
            IGNORING == -100,
            0,
            -((0.9 * SOFT + 0.1 / 11) * np.arange(11) / 5 * (1 - np.exp(log_softmax(LOGITS))) ** 1.5 * log_softmax(LOGITS)).sum(-1),
        ),
    ),
    "binary_cross_entropy": (losses.binary_cross_entropy, (LOGITS, BITS), {}, -TRUE),
    "focal": (losses.focal, (LOGITS, BITS), {}, -((1 - np.exp(TRUE)) ** 2) * TRUE),
    "focal, alpha": (losses.focal, (LOGITS, BITS), dict(gamma=1.0, alpha=0.3), -np.where(BITS == 1, 0.3, 0.7) * (1 - np.exp(TRUE)) * TRUE),
    "mse": (losses.mse, (LOGITS, OTHER), {}, (LOGITS - OTHER) ** 2),
    "huber": (
        losses.huber,
        (LOGITS, OTHER),
        dict(delta=0.5),
        np.where(abs(LOGITS - OTHER) < 0.5, (LOGITS - OTHER) ** 2 / 2, 0.5 * (abs(LOGITS - OTHER) - 0.25)),
    ),
    **{
        f"kl_divergence, {kind}": (losses.kl_divergence, (LOGITS, OTHER), dict(temperature=2.0, kind=kind), value)
        for kind, value in divergences().items()
    },
    "contrastive": (losses.contrastive, (A, B, 7.0), {}, -(np.diag(log_softmax(SIMILAR)) + np.diag(log_softmax(SIMILAR.T))) / 2),
    "sigmoid_contrastive": (losses.sigmoid_contrastive, (A, B, 7.0, -2.0), {}, -log_sigmoid(SIGNS * (SIMILAR - 2)).sum(-1)),
    "contrastive, two of padding": (losses.contrastive, (A, B, 7.0), dict(real=REAL), np.pad(FOUR, (0, 2))),
    "sigmoid_contrastive, two of padding": (
        losses.sigmoid_contrastive,
        (A, B, 7.0, -2.0),
        dict(real=REAL),
        np.pad(-log_sigmoid(SIGNS * (SIMILAR - 2))[:4, :4].sum(-1), (0, 2)),
    ),
    "dpo": (losses.dpo, (*PAIRS, 0.5), {}, -log_sigmoid(0.5 * (PAIRS[0] - PAIRS[2] - PAIRS[1] + PAIRS[3]))),
    "dpo, ipo": (losses.dpo, (*PAIRS / 8, 0.5), dict(kind="ipo"), ((PAIRS[0] - PAIRS[2] - PAIRS[1] + PAIRS[3]) / 8 - 1) ** 2),
    "dpo, hinge": (losses.dpo, (*PAIRS, 0.5), dict(kind="hinge"), np.maximum(0, 1 - 0.5 * (PAIRS[0] - PAIRS[2] - PAIRS[1] + PAIRS[3]))),
    "bradley_terry": (losses.bradley_terry, (PAIRS[0], PAIRS[1]), {}, -log_sigmoid(PAIRS[0] - PAIRS[1])),
}


def arrays(args, dtype=jnp.float32):
    return tuple(jnp.asarray(a, dtype) if np.asarray(a).dtype == np.float64 else jnp.asarray(a) for a in args)


@pytest.mark.parametrize("case", CASES)
def test_is_the_definition(case):
    function, args, options, expected = CASES[case]
    value = jax.jit(lambda *a: function(*a, **options))(*arrays(args))
    assert value.shape == expected.shape  # one value per example or token, no mean
    np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5)  # float32: a dozen roundings of numbers below 60


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_in_float32_out(case):
    function, args, options, _ = CASES[case]
    narrow = arrays(args, jnp.bfloat16)
    wide = tuple(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in narrow)
    function = jax.jit(partial(function, **options))
    value = function(*narrow)
    assert value.dtype == jnp.float32
    # nothing but the inputs is rounded, except differences and products of bfloat16 arguments: 2^-9 of numbers below 8, twice
    np.testing.assert_allclose(value, function(*wide), atol=2 * 2**-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gradients_are_finite_even_far_out(case, size):
    function, args, options, _ = CASES[case]
    first, *rest = arrays(args)
    grad = jax.jit(jax.grad(lambda x: function(x * size, *rest, **options).sum()))(first)
    assert np.isfinite(grad).all()


def test_ignored_tokens_move_nothing():
    logits, labels = arrays((LOGITS, IGNORING))
    grad = jax.grad(lambda x: losses.cross_entropy(x, labels, smoothing=0.1, z_loss=0.1).sum())(logits)
    assert not grad[labels == -100].any()
    assert grad[labels != -100].any(-1).all()
    assert not losses.token_log_probs(logits, labels)[labels == -100].any()


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_divergences_are_zero_at_equality_and_positive_elsewhere(kind):
    student, teacher = arrays((LOGITS, OTHER))
    same = lambda x: losses.kl_divergence(x, student, temperature=3.0, kind=kind)
    np.testing.assert_allclose(same(student), 0, atol=1e-5)  # 9 times a sum of 11 float32 roundings
    np.testing.assert_allclose(same(student + 5), 0, atol=1e-5)  # logits are known up to a constant
    np.testing.assert_allclose(jax.grad(lambda x: same(x).sum())(student), 0, atol=1e-5)  # the minimum
    assert (losses.kl_divergence(student, teacher, kind=kind) > 0).all()


def test_divergence_of_a_teacher_that_rules_words_out():
    teacher = jnp.asarray(LOGITS, jnp.float32).at[..., :3].set(-jnp.inf)
    value, grad = jax.value_and_grad(lambda x: losses.kl_divergence(x, teacher).sum())(jnp.asarray(OTHER, jnp.float32))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_js_is_symmetric_and_bounded():
    student, teacher = arrays((LOGITS, OTHER))
    js = lambda a, b: losses.kl_divergence(a, b, kind="js")
    np.testing.assert_allclose(js(student, teacher), js(teacher, student), atol=1e-6)
    assert (js(20 * student, 20 * teacher) <= np.log(2) + 1e-6).all()


def test_temperature_keeps_the_gradients_size():
    student, teacher = arrays((LOGITS, OTHER))
    norm = lambda t: jnp.linalg.norm(jax.grad(lambda x: losses.kl_divergence(x, teacher, temperature=t).sum())(student))
    # Hinton et al., equation 4: as the temperature grows the gradient tends to (z - v) / V of centred logits, whatever its value
    np.testing.assert_allclose(norm(100.0), norm(200.0), rtol=0.02)


def test_contrastive_is_least_where_pairs_match():
    a, b = arrays((A, B))
    assert losses.contrastive(a, a, 20.0).mean() < losses.contrastive(a, b, 20.0).mean()
    np.testing.assert_allclose(losses.contrastive(a, b, 3.0), losses.contrastive(b, a, 3.0), atol=1e-6)
    np.testing.assert_allclose(losses.contrastive(a, b, 0.0), np.log(6), atol=1e-6)  # knowing nothing: log of the batch


def test_dpo_starts_at_log_two_and_prefers_the_chosen():
    chosen, rejected, *_ = arrays(PAIRS)
    np.testing.assert_allclose(losses.dpo(chosen, rejected, chosen, rejected, 0.3), np.log(2), atol=1e-6)
    up, down = jax.grad(lambda c, r: losses.dpo(c, r, chosen, rejected, 0.3).sum(), (0, 1))(chosen, rejected)
    assert (up < 0).all()
    assert (down > 0).all()
    half = losses.dpo(chosen, rejected, *arrays(PAIRS[2:]), 0.3, smoothing=0.5)
    np.testing.assert_allclose(half, losses.dpo(rejected, chosen, *arrays(PAIRS[[3, 2]]), 0.3, smoothing=0.5), atol=1e-6)


def test_unknown_kinds():
    with pytest.raises(ValueError, match="forward, reverse, js, skewed"):
        losses.kl_divergence(jnp.ones(3), jnp.ones(3), kind="kl")
    with pytest.raises(ValueError, match="no kind 'kto'; take one of sigmoid, ipo, hinge"):
        losses.dpo(*arrays(PAIRS), kind="kto")
