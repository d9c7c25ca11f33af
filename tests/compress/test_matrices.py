"""One matrix at a time: what each method makes is what its paper's algorithm makes in float64, and keeps the products better than what it improves on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress import references

from bigflax import ops, weights
from bigflax.compress import factoring, pruning, quantizing
from bigflax.compress.matrices import as_matrix, highest
from bigflax.compress.observing import Seen

K, N, ROWS = 48, 24, 160
RNG = np.random.default_rng(0)
# Inputs of very unequal size that depend on each other, as activations are
X = (RNG.normal(size=(ROWS, K)) @ (RNG.normal(size=(K, K)) * 0.3 + np.eye(K)) * np.exp(RNG.normal(size=K))).astype(np.float32)
W = RNG.normal(size=(K, N)).astype(np.float32)
SEEN = Seen(jnp.float32(ROWS), jnp.asarray(X.T @ X), jnp.abs(X).sum(0), jnp.abs(X).max(0))
AXES = {  # axes, shape, letters of a product with x [ROWS, ..inputs]
    "plain": ("embed -> mlp", (K, N), "bk,kn->bn", (K,)),
    "to heads": ("embed -> heads head_dim", (K, 3, 8), "bk,knh->bnh", (K,)),
    "from heads": ("heads head_dim -> embed", (3, 16, N), "bkh,khn->bn", (3, 16)),
    "outputs first": ("vocab <- embed", (N, K), "bk,nk->bn", (K,)),
}
each_axes = pytest.mark.parametrize("axes, shape, spec, inputs", AXES.values(), ids=AXES)


def laid_out(axes, shape):
    return jnp.asarray(W.T if "<-" in axes else W).reshape(shape)


def off(made, axes):
    """How far the products are from those of W, as a share."""
    got = np.asarray(as_matrix(weights.dense(made), axes))
    return float(np.linalg.norm(X @ (got - W)) / np.linalg.norm(X @ W))


FORMATS = {  # format -> the largest error as a part of a group's largest number
    "int8": 1 / 255, "int8:16": 1 / 255, "int4:16": 1 / 15, "int4:16:asym": 1.3 / 15, "int3:8": 1 / 7, "int2:8": 1 / 3, "nf4:16": 0.152, "fp8": 1 / 16,
    "fp8:16": 1 / 16, "mxfp4": 1 / 4 + 0.01, "int6:8": 1 / 63,
}  # fmt: skip


@each_axes
@pytest.mark.parametrize("text, bound", FORMATS.items(), ids=FORMATS)
def test_rounding_is_bounded_wherever_the_inputs_are(text, bound, axes, shape, spec, inputs):
    fmt, w = quantizing.read_format(text), laid_out(axes, shape)
    if text == "mxfp4":
        fmt = quantizing.Format("mxfp4", 16)  # 32 does not divide 48
    q = quantizing.rtn(w, fmt, axes=axes, clip=False)
    assert weights.shape(q) == shape and q.dtype == w.dtype
    got = as_matrix(weights.dense(q), axes)
    largest = np.abs(np.asarray(quantizing.to_groups(jnp.asarray(W), fmt))).max(1)
    spread = largest if not fmt.zero else np.ptp(np.asarray(quantizing.to_groups(jnp.asarray(W), fmt)), axis=1) / 2
    limit = np.repeat(np.maximum(largest, spread) if not fmt.zero else spread * 1.0, K // len(largest), axis=0)
    if text == "mxfp4":
        limit = 2 * limit  # the scale is the next power of two
    assert np.all(np.abs(np.asarray(got) - W) <= limit * bound * (1 + 1e-5) + 1e-6)
    x = jnp.asarray(X).reshape(ROWS, *inputs)
    np.testing.assert_allclose(ops.einsum(spec, x, q), jnp.einsum(spec, x, weights.dense(q)), atol=2e-5 * float(jnp.abs(X @ W).max()))


@pytest.mark.parametrize("text", ["int4:16", "int3:16:asym", "nf4:16", "int2:16", "fp8", "mxfp4"])
def test_clipping_errs_less(text):
    fmt = quantizing.read_format(text)
    fmt = fmt if text != "mxfp4" else quantizing.Format("mxfp4", 16)
    w = jnp.asarray(W**3)  # a few large numbers
    error = lambda clip: float(jnp.sum(jnp.square(weights.dense(quantizing.rtn(w, fmt, axes="embed -> mlp", clip=clip)) - w)))
    assert error(True) <= error(False)
    if text != "fp8":  # whose steps shrink with the numbers
        assert error(True) < 0.99 * error(False)


@pytest.mark.parametrize("order", [False, True], ids=["as they are", "largest first"])
@pytest.mark.parametrize("block", [16, 20, 128])
@pytest.mark.parametrize("group", [16, K])
def test_gptq_is_the_papers(order, block, group):
    fmt = quantizing.Format("int4", group)
    q = quantizing.gptq(jnp.asarray(W), fmt, axes="embed -> mlp", seen=SEEN, order=order, clip=False, block=block)
    codes, scale = references.gptq(W.T, X.T.astype(np.float64) @ X, 4, group, order=order)
    np.testing.assert_allclose(np.repeat(q.scale, group, axis=0), scale.T, rtol=1e-6)
    same = np.asarray(q.qvalue).astype(int) == codes.T
    assert same.mean() > 0.995  # float32 may fall to the other side of a half


@pytest.mark.parametrize("group", [16, K])
def test_awq_is_the_papers(group):
    made = quantizing.awq(jnp.asarray(W), quantizing.Format("int4", group), axes="embed -> mlp", seen=SEEN, clip=False)
    tried = references.awq(W.T.astype(np.float64), X.astype(np.float64), 4, group)
    error, want, s = min(tried, key=lambda row: np.abs(1 / made.scale[:, 0] / row[2] - 1).max())
    np.testing.assert_allclose(1 / made.scale[:, 0], s, rtol=1e-4)
    # The largest of a group lies half a step beyond the last code, where float32 may fall to either side: so of two s nearly as good either may be the best
    assert error <= 1.05 * min(row[0] for row in tried) < 0.6 * max(row[0] for row in tried)
    tie = np.abs(np.abs(W.T * s / references.grid(W.T * s, 4, group)) - 7.5) < 1e-4
    assert np.mean((np.abs(np.asarray(weights.dense(made)) - want.T) < 1e-4) | tie.T) > 0.995


def test_smoothquant_is_the_papers():
    made = quantizing.smoothquant(jnp.asarray(W), quantizing.Format("int8"), axes="embed -> mlp", seen=SEEN)
    np.testing.assert_allclose(1 / made.scale[:, 0], references.smoothquant(W.T, X), rtol=1e-5)


PATTERNS = {"50%": dict(share=0.5), "30%": dict(share=0.3), "2:4": dict(keep=2, of=4), "4:8": dict(keep=4, of=8)}


@pytest.mark.parametrize("text, said", PATTERNS.items(), ids=PATTERNS)
def test_wanda_and_sparsegpt_are_the_papers(text, said):
    pattern = pruning.read_pattern(text)
    made = pruning.wanda(jnp.asarray(W), pattern, axes="embed -> mlp", seen=SEEN)
    np.testing.assert_array_equal(made.mask, references.wanda(W.T, X, **said).T)
    np.testing.assert_array_equal(weights.dense(made), np.where(made.mask, W, 0))
    for block in (16, 32):  # 32 does not divide 48
        made = pruning.sparsegpt(jnp.asarray(W), pattern, axes="embed -> mlp", seen=SEEN, block=block)
        want = references.sparsegpt(W.T, X.T.astype(np.float64) @ X, block=block, **said).T
        assert np.mean((want != 0) == np.asarray(made.mask)) > 0.995
        both = (want != 0) & np.asarray(made.mask)
        assert np.mean(np.abs(np.asarray(made.w) - want)[both] < 1e-3) > 0.98  # a mask that differs moves a few others


@pytest.mark.parametrize("text, said", PATTERNS.items(), ids=PATTERNS)
def test_alps_is_the_papers(text, said):
    pattern = pruning.read_pattern(text)
    made = pruning.alps(jnp.asarray(W), pattern, axes="embed -> mlp", seen=SEEN, fits=40)
    want = references.alps(W.T, X.T.astype(np.float64) @ X, **said).T
    assert np.mean((want != 0) == np.asarray(made.mask)) > 0.98  # what comes near to going once goes another way for ever
    assert off(made, "embed -> mlp") == pytest.approx(np.linalg.norm(X @ (want - W)) / np.linalg.norm(X @ W), rel=0.005)
    rival = pruning.sparsegpt(jnp.asarray(W), pattern, axes="embed -> mlp", seen=SEEN)
    assert off(made, "embed -> mlp") < 0.95 * off(rival, "embed -> mlp")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(("shape", "axes"), [((60,), (0,)), ((4, 50, 3), (1,)), ((3, 20, 30), (1, 2)), ((17, 9), (0, 1))])
def test_the_highest_are_those_that_a_sort_finds(share, shape, axes):
    """Of both signs, with many equals: of those the first go."""
    scores = np.random.default_rng(0).normal(size=shape).round(1).astype(np.float32) + 0.0
    scores.flat[:3] = [np.inf, -np.inf, 0.0]
    size = int(np.prod([shape[axis] for axis in axes]))
    zeros = int(share * size)
    found = jax.jit(lambda scores, zeros: highest(scores, zeros, axes))(scores, zeros)
    flat = lambda x: np.moveaxis(np.asarray(x), axes, range(len(shape) - len(axes), len(shape))).reshape(-1, size)
    np.testing.assert_array_equal(flat(found), np.argsort(np.argsort(flat(scores), 1, kind="stable"), 1) >= zeros)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@each_axes
def test_patterns_hold_along_the_inputs(text, method, axes, shape, spec, inputs):
    pattern = pruning.read_pattern(text)
    made = getattr(pruning, method)(laid_out(axes, shape), pattern, axes=axes, seen=SEEN)
    mask = np.asarray(as_matrix(made.mask, axes))
    if pattern.of:
        assert np.all(mask.reshape(K // pattern.of, pattern.of, N).sum(1) == pattern.of - pattern.zeros)
    assert abs(mask.mean() - (1 - pattern.zeros / (pattern.of or 1))) < 0.01
    small = pruning.packed({"w": made}, {"w": axes})["w"]
    assert isinstance(small, weights.Sparse) or shape[weights.input_axis(axes)] % 8
    np.testing.assert_array_equal(weights.dense(small), weights.dense(made))


@pytest.mark.parametrize("rank", [4, 12])
def test_whitening_reaches_the_least_error_there_is(rank):
    made = factoring.whitened(jnp.asarray(W), rank, axes="embed -> mlp", seen=SEEN, damp=0.0)
    least = references.svd_llm(W.T.astype(np.float64), X.astype(np.float64), rank)
    assert np.linalg.norm(X @ (np.asarray(weights.dense(made)) - W)) <= least * 1.001
    assert off(made, "embed -> mlp") < off(factoring.asvd(jnp.asarray(W), rank, axes="embed -> mlp", seen=SEEN), "embed -> mlp")
    assert off(made, "embed -> mlp") < off(factoring.svd(jnp.asarray(W), rank, axes="embed -> mlp"), "embed -> mlp")


@each_axes
@pytest.mark.parametrize("method", ["svd", "asvd", "whitened"])
def test_low_rank_wherever_the_inputs_are(method, axes, shape, spec, inputs):
    make = getattr(factoring, method)
    made, plain = make(laid_out(axes, shape), 5, axes=axes, seen=SEEN), make(jnp.asarray(W), 5, axes="embed -> mlp", seen=SEEN)
    assert weights.shape(made) == shape
    np.testing.assert_allclose(as_matrix(weights.dense(made), axes), weights.dense(plain), atol=1e-4)


@pytest.mark.parametrize("smooth", [0.01, 1.0])
def test_words_that_come_often_err_least(smooth):
    """A table's rows, weighed by how often they are looked up; nothing of the rank errs less on those."""
    table, often = W.T.copy(), np.exp(2 * np.random.default_rng(1).normal(size=N)).round()  # [words, K]
    seen, axes = Seen(jnp.float32(0), often=jnp.asarray(often)), "vocab <- embed"
    error = lambda made: np.sqrt((often + smooth) @ np.square(np.asarray(weights.dense(made), np.float64) - table).sum(1))
    made = factoring.frequency(jnp.asarray(table), 5, axes=axes, seen=seen, smooth=smooth)
    least = references.frequency_svd(table.astype(np.float64), often + smooth, 5)
    assert least <= error(made) * (1 + 1e-6) and error(made) <= least * 1.001
    assert error(made) < 0.95 * error(factoring.svd(jnp.asarray(table), 5, axes=axes))
    ids, x = jnp.arange(N)[::-1], jnp.asarray(X)
    np.testing.assert_allclose(ops.take(made, ids), weights.dense(made)[ids], atol=1e-4)
    np.testing.assert_allclose(ops.einsum("bd,vd->bv", x, made), x @ weights.dense(made).T, atol=1e-4 * float(jnp.abs(X @ W).max()))


def test_a_table_of_which_nothing_was_looked_up_is_cut_plainly():
    seen = Seen(jnp.float32(9), often=jnp.zeros(N))
    made, plain = (
        f(jnp.asarray(W.T), 5, axes="vocab <- embed", **o) for f, o in ((factoring.frequency, {"seen": seen}), (factoring.svd, {}))
    )
    np.testing.assert_allclose(weights.dense(made), weights.dense(plain), atol=1e-4)


BETTER = {  # what makes the products' error less than what
    "gptq than rounding": (lambda w, fmt, axes: quantizing.gptq(w, fmt, axes=axes, seen=SEEN), 0.8),
    "awq than rounding": (lambda w, fmt, axes: quantizing.awq(w, fmt, axes=axes, seen=SEEN), 0.9),
    "turned and gptq than rounding": (lambda w, fmt, axes: quantizing.turned(w, fmt, axes=axes, seen=SEEN), 0.9),
}


@each_axes
@pytest.mark.parametrize("make, share", BETTER.values(), ids=BETTER)
def test_products_are_nearer(make, share, axes, shape, spec, inputs):
    w, fmt = laid_out(axes, shape), quantizing.read_format("int4:16")
    made = make(w, fmt, axes)
    assert off(made, axes) < share * off(quantizing.rtn(w, fmt, axes=axes, clip=False), axes)
    x = jnp.asarray(X).reshape(ROWS, *inputs)
    want = jnp.einsum(spec, x, weights.dense(made))
    np.testing.assert_allclose(ops.einsum(spec, x, made), want, atol=1e-4 * float(jnp.abs(want).max()))


def test_moving_outliers_into_the_weights_helps_products_of_8_bits():
    loud = X * np.where(np.arange(K) == 3, 60, 1).astype(np.float32)
    seen = Seen(jnp.float32(ROWS), peak=jnp.abs(loud).max(0))
    w, fmt = jnp.asarray(W), quantizing.read_format("int8")
    error = lambda made: float(jnp.linalg.norm(ops.einsum("bk,kn->bn", jnp.asarray(loud), made) - loud @ W) / np.linalg.norm(loud @ W))
    assert error(quantizing.smoothquant(w, fmt, axes="embed -> mlp", seen=seen)) < 0.7 * error(quantizing.w8a8(w, fmt, axes="embed -> mlp"))


MISTAKES = {
    "a type": (lambda: quantizing.read_format("int9"), "'int9' is no format.*'int8'"),
    "no format": (lambda: quantizing.read_format("int4/128"), "is no format such as"),
    "a zero point of floats": (lambda: quantizing.read_format("nf4:32:asym"), "only whole numbers"),
    "mxfp4 of 64": (lambda: quantizing.read_format("mxfp4:64"), "32 inputs"),
    "a group that does not divide": (
        lambda: quantizing.rtn(jnp.asarray(W), quantizing.read_format("int4:32"), axes="embed -> mlp"),
        "a group of 32 does not divide 48 inputs; nearest is 16",
    ),
    "a group across heads": (
        lambda: quantizing.rtn(jnp.asarray(W).reshape(3, 16, N), quantizing.read_format("int4:24"), axes="heads head_dim -> embed"),
        r"groups of 24 inputs do not fit axes of \[3, 16\]",
    ),
    "a pattern": (lambda: pruning.read_pattern("half"), "no pattern of zeros"),
    "4:2": (lambda: pruning.read_pattern("4:2"), "no pattern of zeros"),
    "a share": (lambda: factoring.read_share(1.5), "no share"),
    "a rank that saves nothing": (lambda: factoring.svd(jnp.asarray(W), 16, axes="embed -> mlp"), "as many numbers as before; take 1 to 15"),
    "frequency of no table": (
        lambda: factoring.frequency(jnp.asarray(W), 5, axes="embed -> mlp", seen=Seen(jnp.float32(1), often=jnp.ones(N))), "take 'whitened'",
    ),
    "frequency without a floor": (
        lambda: factoring.frequency(jnp.asarray(W.T), 5, axes="vocab <- embed", seen=Seen(jnp.float32(1), often=jnp.ones(N)), smooth=0.0),
        "smooth 0.0 leaves rows",
    ),
    "8 bits of 4": (lambda: quantizing.w8a8(jnp.asarray(W), quantizing.read_format("int4"), axes="embed -> mlp"), "need weights of int8"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_that_never_spoke_has_a_say():
    """Inputs that are always zero: their weights go, and the factor stays finite."""
    quiet = X.copy()
    quiet[:, 5] = 0
    seen = Seen(jnp.float32(ROWS), jnp.asarray(quiet.T @ quiet))
    q = quantizing.gptq(jnp.asarray(W), quantizing.read_format("int4:16"), axes="embed -> mlp", seen=seen)
    assert bool(jnp.all(jnp.isfinite(weights.dense(q)))) and bool(jnp.all(weights.dense(q)[5] == 0))
    jax.block_until_ready(q)
