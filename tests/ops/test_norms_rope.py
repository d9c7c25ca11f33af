"""Norms against float64; rope against its defining laws and the published scalings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax.ops import layer_norm, rms_norm, rope, rope_frequencies

RNG = np.random.default_rng(0)
X, SCALE, BIAS = (RNG.normal(size=shape) for shape in ((3, 5, 48), 48, 48))
MEAN = X - X.mean(-1, keepdims=True)
NORMS = {  # function, NumPy's answer in float64
    "rms": (lambda x: rms_norm(x, SCALE), X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6) * SCALE),
    "rms, eps": (lambda x: rms_norm(x, SCALE, eps=0.5), X / np.sqrt((X**2).mean(-1, keepdims=True) + 0.5) * SCALE),
    "rms, offset": (lambda x: rms_norm(x, SCALE, offset=1.0), X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6) * (1 + SCALE)),
    "layer": (lambda x: layer_norm(x, SCALE, BIAS), MEAN / np.sqrt((MEAN**2).mean(-1, keepdims=True) + 1e-5) * SCALE + BIAS),
    "layer without bias": (lambda x: layer_norm(x, SCALE), MEAN / np.sqrt((MEAN**2).mean(-1, keepdims=True) + 1e-5) * SCALE),
}
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)


@pytest.mark.parametrize("case", NORMS)
def test_norm_is_the_formula(case):
    norm, expected = NORMS[case]
    # float32: a few roundings of numbers below 10
    np.testing.assert_allclose(jax.jit(norm)(jnp.asarray(X, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("case", NORMS)
def test_norm_keeps_dtype_and_rounds_once(case):
    norm, _ = NORMS[case]
    x = jnp.asarray(X, jnp.bfloat16)
    norm = jax.jit(norm)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    assert (y == norm(x.astype(jnp.float32)).astype(jnp.bfloat16)).all()  # statistics were float32: only the result is rounded


@pytest.mark.parametrize("case", NORMS)
def test_norm_gradient_is_the_slope(case):
    norm, _ = NORMS[case]
    x, direction = jnp.asarray(X, jnp.float32), jnp.asarray(RNG.normal(size=X.shape), jnp.float32)
    loss = jax.jit(lambda h: jnp.sum(jnp.sin(norm(x + h * direction))))
    # a central difference of step 0.01 is off by the third derivative times 2e-5, and by float32 rounding of a sum of 720 over 0.02
    np.testing.assert_allclose(jax.grad(loss)(0.0), (loss(1e-2) - loss(-1e-2)) / 2e-2, atol=0.2, rtol=1e-2)


def test_layer_norm_survives_a_large_mean():
    x = jnp.asarray(X + 1000, jnp.float32)  # mean(x^2) - mean(x)^2 would keep one digit of the variance here
    np.testing.assert_allclose(layer_norm(x, np.ones(48)), NORMS["layer without bias"][1] / SCALE, atol=2e-3)  # x itself is off by 3e-5


turn = jax.jit(rope)


def spin(x, position, **options):
    inv_freq, factor = rope_frequencies(x.shape[-1], **options)
    return turn(x.astype(np.float32)[None, None, None], np.full((1, 1), position), inv_freq, factor=factor)[0, 0, 0]


ROPES = {
    "plain": {},
    "theta": dict(theta=500000.0),
    "half of the channels": dict(fraction=0.5),
    "linear": dict(scaling=dict(type="linear", factor=4.0)),
    "dynamic": dict(scaling=dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=128), length=512),
    "llama3": dict(scaling=LLAMA3),
    "yarn": dict(scaling=YARN),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_knows_differences_only_and_keeps_norms(case):
    q, k = RNG.normal(size=(2, 32))
    factor = rope_frequencies(32, **ROPES[case])[1]
    at = [(7, 3), (107, 103), (4, 0)]
    dots = [float(spin(q, m, **ROPES[case]) @ spin(k, n, **ROPES[case])) for m, n in at]
    # float32 angles up to 107 are off by 4e-6; a dot product of 32 terms of size 1
    np.testing.assert_allclose(dots, dots[0], atol=1e-4)
    assert abs(float(spin(q, 8, **ROPES[case]) @ spin(k, 3, **ROPES[case])) - dots[0]) > 1e-3
    np.testing.assert_allclose(np.linalg.norm(spin(q, 55, **ROPES[case])), factor * np.linalg.norm(q), rtol=1e-5)
    np.testing.assert_allclose(spin(q, 0, **ROPES[case]), factor * q, rtol=1e-5)


def test_rope_turns_the_pairs_i_and_i_plus_half():
    x = RNG.normal(size=(2, 6, 3, 16))
    inv_freq, _ = rope_frequencies(16, theta=100.0)
    positions = np.array([[0, 1, 2, 0, 1, 2], [5, 6, 7, 8, 9, 10]])
    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * positions[..., None, None] * 100.0 ** (-np.arange(8) / 8))
    y = turn(jnp.asarray(x, jnp.float32), positions, inv_freq)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)  # float32 angles up to 10


def test_partial_rope_leaves_the_other_channels():
    x = RNG.normal(size=32)
    y, whole = spin(x, 9, fraction=0.25), spin(x[:8], 9)
    np.testing.assert_array_equal(y[8:], x[8:].astype(np.float32))
    np.testing.assert_allclose(y[:8], whole, atol=1e-6)


def test_far_positions_stay_apart_in_bfloat16():
    x, inv_freq = jnp.ones((1, 2, 1, 16), jnp.bfloat16), rope_frequencies(16)[0]
    y = turn(x, jnp.array([100_000, 100_001]), inv_freq)
    assert y.dtype == jnp.bfloat16
    assert float(jnp.abs(y[0, 0] - y[0, 1]).max()) > 0.4


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    plain, scaled = (rope_frequencies(128, theta=500000.0, scaling=s)[0] for s in (None, LLAMA3))
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns < 4) & (turns > 1)
    smooth = (turns - 1) / 3  # the published code: (trained / wavelength - low) / (high - low)
    np.testing.assert_allclose(scaled[between], ((1 - smooth) * plain / 8 + smooth * plain)[between], rtol=1e-5)
    assert between.any()


def test_yarn_ramps_between_its_two_channels():
    plain, (scaled, factor) = rope_frequencies(64)[0], rope_frequencies(64, scaling=YARN)
    turns = 2048 * plain / (2 * np.pi)
    fast, slow = np.flatnonzero(turns > 32).max(), np.flatnonzero(turns < 1).min()
    np.testing.assert_allclose(scaled[: fast + 1], plain[: fast + 1], rtol=1e-6)
    np.testing.assert_allclose(scaled[slow:], plain[slow:] / 4, rtol=1e-6)
    blend = (scaled / plain - 0.25) / 0.75
    steps = np.diff(blend[fast : slow + 1])
    np.testing.assert_allclose(steps, -1 / (slow - fast), rtol=1e-4)  # straight in the channel's number
    assert factor == pytest.approx(0.1 * np.log(4) + 1)
    assert rope_frequencies(64, scaling=YARN | dict(attention_factor=1.5))[1] == 1.5
    assert rope_frequencies(64, scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707))[1] == 1.0


def test_dynamic_waits_for_the_trained_length():
    plain = rope_frequencies(64)[0]
    scaling = dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=128)
    dynamic = lambda length: rope_frequencies(64, scaling=scaling, length=length)[0]
    np.testing.assert_array_equal(dynamic(None), plain)
    np.testing.assert_array_equal(dynamic(100), plain)
    longer = dynamic(256)
    np.testing.assert_allclose(jax.jit(dynamic)(256), longer, rtol=1e-5)  # a length that is only known when it runs
    # theta' = theta (2 * 2 - 1)^(64/62), so the slowest pair slows by 3 exactly
    np.testing.assert_allclose(longer[[0, -1]], plain[[0, -1]] / [1, 3], rtol=1e-5)


def test_linear_divides():
    np.testing.assert_allclose(rope_frequencies(64, scaling=dict(type="linear", factor=4.0))[0], rope_frequencies(64)[0] / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scaling=dict(rope_type="longrope")), "take one of default, linear"),
        (dict(scaling=dict(rope_type="yarn", factor=2.0)), "lacks 'original_max_position_embeddings'"),
        (dict(fraction=0.08), "make it even"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        rope_frequencies(64, **options)
