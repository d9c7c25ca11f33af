"""Each loss against its definition in NumPy float64, and the laws that all of them keep."""

import itertools
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


def mix(log_p, log_q, share):
    return np.log(share * np.exp(log_p) + (1 - share) * np.exp(log_q))


DEFINED = {  # kind, options -> of log p (teacher) and log q (student)
    "forward": ({}, kl),
    "reverse": ({}, lambda p, q: kl(q, p)),
    "js": ({}, lambda p, q: (kl(p, mix(p, q, 0.5)) + kl(q, mix(p, q, 0.5))) / 2),
    "js, beta": (dict(beta=0.2), lambda p, q: 0.2 * kl(p, mix(p, q, 0.2)) + 0.8 * kl(q, mix(p, q, 0.2))),
    "skewed": ({}, lambda p, q: kl(p, mix(p, q, 0.1))),
    "skewed, more": (dict(skew=0.4), lambda p, q: kl(p, mix(p, q, 0.4))),
    "skewed_reverse": ({}, lambda p, q: kl(q, mix(q, p, 0.1))),
}
TOP = np.argsort(-OTHER, -1)[..., :3]


def joined(log_p, ids=TOP):
    """Log probabilities of `ids`, and of all others together."""
    rest = np.exp(log_p).copy()
    np.put_along_axis(rest, ids, 0, -1)
    return np.concatenate([np.take_along_axis(log_p, ids, -1), np.log(rest.sum(-1, keepdims=True))], -1)


VALUES = joined(log_softmax(OTHER / 2))
DIVERGENCES = {  # function, what the teacher gives, options, the definition as a function of the student's logits in float64
    **{
        f"kl_divergence, {name}": (
            losses.kl_divergence,
            (OTHER,),
            dict(temperature=2.0, kind=name.split(",")[0], **options),
            lambda x, of=of: 4 * of(log_softmax(OTHER / 2), log_softmax(x / 2)),
        )
        for name, (options, of) in DEFINED.items()
    },
    **{
        f"top_k_divergence, {name}": (
            losses.top_k_divergence,
            (VALUES, TOP),
            dict(temperature=2.0, kind=name.split(",")[0], **options),
            lambda x, of=of: 4 * of(VALUES, joined(log_softmax(x / 2))),
        )
        for name, (options, of) in DEFINED.items()
    },
}


def relations(x, heads=2):
    x = x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
    return log_softmax(x @ x.swapaxes(-1, -2) / np.sqrt(x.shape[-1]))


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
    **{name: (function, (LOGITS, *teacher), options, of(LOGITS)) for name, (function, teacher, options, of) in DIVERGENCES.items()},
    "relation_divergence": (
        losses.relation_divergence,
        (LOGITS[..., :6], OTHER[..., :10]),
        dict(heads=2),
        kl(relations(OTHER[..., :10]), relations(LOGITS[..., :6])).mean(1),
    ),
    "affinity_divergence": (
        losses.affinity_divergence,
        (SIMILAR, SIMILAR.T),
        {},
        (kl(log_softmax(SIMILAR.T), log_softmax(SIMILAR)) + kl(log_softmax(SIMILAR), log_softmax(SIMILAR.T))) / 2,
    ),
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


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_zero_at_equality_and_positive_elsewhere(name):
    function, teacher, options, _ = DIVERGENCES[name]
    student, other, *teacher = arrays((LOGITS, OTHER, *teacher))
    apart = lambda x: function(x, *teacher, **options)
    np.testing.assert_allclose(apart(other), 0, atol=1e-5)  # 4 times a sum of 11 float32 roundings
    np.testing.assert_allclose(apart(other + 5), 0, atol=1e-5)  # logits are known up to a constant
    np.testing.assert_allclose(jax.grad(lambda x: apart(x).sum())(other), 0, atol=1e-5)  # the minimum
    assert (apart(student) > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_of_divergences_are_those_of_the_definition(name):
    function, teacher, options, of = DIVERGENCES[name]
    student, *teacher = arrays((LOGITS, *teacher))
    grad = jax.grad(lambda x: function(x, *teacher, **options).sum())(student)
    for v in range(11):
        step = 1e-5 * np.eye(11)[v]
        slope = (of(LOGITS + step) - of(LOGITS - step)) / 2e-5
        np.testing.assert_allclose(grad[..., v], slope, atol=2e-5)  # float32 sums of 11 numbers below 20; the quotient is right to 1e-9


def test_limits_of_divergences():
    """Those with a parameter end in the plain ones: Agarwal et al., below equation 1, and Ko et al."""
    student, teacher = arrays((LOGITS / 4, OTHER / 4))  # p / q stays below 20
    apart = lambda kind, **options: losses.kl_divergence(student, teacher, kind=kind, **options)
    np.testing.assert_allclose(apart("js", beta=1e-3) / 1e-3, apart("forward"), rtol=0.02)  # beta times p / q
    np.testing.assert_allclose(apart("js", beta=1 - 1e-3) / 1e-3, apart("reverse"), rtol=0.02)
    for skewed, plain in (("skewed", "forward"), ("skewed_reverse", "reverse")):
        np.testing.assert_allclose(apart(skewed, skew=0.0), apart(plain), rtol=1e-5)
        np.testing.assert_allclose(apart(skewed, skew=1.0), 0, atol=1e-5)


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_joining_classes_only_loses(kind):
    """Of a teacher's k likeliest: less than of all, more of more, and of all classes all."""
    student, teacher = arrays((LOGITS, OTHER))
    options = dict(temperature=2.0, kind=kind)
    some = [losses.top_k_divergence(student, *losses.top_k(teacher, k, temperature=2.0), **options) for k in (1, 4, 10, 11)]
    assert all((few <= more + 1e-5).all() for few, more in itertools.pairwise(some))
    np.testing.assert_allclose(some[-1], losses.kl_divergence(student, teacher, **options), rtol=1e-5, atol=1e-6)
    values, ids = losses.top_k(teacher, 11)  # nothing is left in the tail
    assert np.isfinite(jax.grad(lambda x: losses.top_k_divergence(x, values, ids, kind=kind).sum())(student)).all()


def test_the_top_of_a_teacher():
    values, ids = losses.top_k(arrays((OTHER,))[0], 3, temperature=2.0)
    np.testing.assert_array_equal(ids, TOP)
    np.testing.assert_allclose(values, VALUES, rtol=1e-5)
    with pytest.raises(ValueError, match="of 11 classes the 12 likeliest cannot be kept; give from 1 to 11"):
        losses.top_k(jnp.asarray(OTHER), 12)


def test_relations_see_what_is_real_alone():
    student, teacher = arrays((LOGITS[..., :6], OTHER[..., :10]))
    real = jnp.arange(4) < 3
    value = losses.relation_divergence(student, teacher, heads=2, real=jnp.broadcast_to(real, (3, 4)))
    np.testing.assert_allclose(value[:, :3], losses.relation_divergence(student[:, :3], teacher[:, :3], heads=2), rtol=1e-5)
    with pytest.raises(ValueError, match="a width of 6 does not divide into 4 relation heads"):
        losses.relation_divergence(student, teacher, heads=4)
    off = ~jnp.eye(6, dtype=bool) & (REAL & REAL[:, None])
    near, far = arrays((SIMILAR, SIMILAR.T))
    alone = losses.affinity_divergence(near[:4, :4], far[:4, :4], real=off[:4, :4])
    np.testing.assert_allclose(losses.affinity_divergence(near, far, real=off), np.pad(alone, (0, 2)), rtol=1e-5, atol=1e-6)


def test_divergence_of_a_teacher_that_rules_words_out():
    teacher = jnp.asarray(LOGITS, jnp.float32).at[..., :3].set(-jnp.inf)
    value, grad = jax.value_and_grad(lambda x: losses.kl_divergence(x, teacher).sum())(jnp.asarray(OTHER, jnp.float32))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_a_teacher_without_numbers_is_seen(kind):
    """A step that is not finite changes nothing and is counted; a loss of 0 would say that all is well."""
    student, teacher = arrays((LOGITS[0, 0], OTHER[0, 0]))
    assert np.isnan(losses.kl_divergence(student, teacher.at[0].set(jnp.nan), kind=kind))
    assert np.isnan(losses.kl_divergence(teacher.at[0].set(jnp.nan), student, kind=kind))


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
