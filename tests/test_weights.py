"""The laws of typed weights: every type in WEIGHTS is held to every law below. A new type joins the table and gets them all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bigflax import ops, sharding, trees, weights
from bigflax.compress import observing

AXES = "embed -> heads head_dim"
KEY = jax.random.key(0)


def _random(shape, seed=1):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape) * 0.1


def _lora(w, axes, rank=2):
    """With a `b` that is not zero, so that a law cannot hold by both sides being the base."""
    made = weights.lora(w, rank, axes=axes, rng=KEY, alpha=3.0)
    return dataclasses.replace(made, b=_random(made.b.shape, 2))


def _stirred(w):
    """Parts that are no longer what they began as."""
    return dataclasses.replace(
        w, **{name: part + 0.5 * _random(part.shape, 10 + i) for i, (name, part) in enumerate(weights.parts(w).items())}
    )


def _outputs(w, axes):
    """The shape of a bias of `w`."""
    ax = weights.parse_axes(axes)
    return tuple(size for i, size in enumerate(w.shape) if i not in ax.contracted)


def _adapter(w, axes):
    return _stirred(weights.adapter(w, 3, axes=axes, rng=KEY, act="gelu", bias=_random(_outputs(w, axes), 5)))


def _low_rank(w, axes, rank=3):
    """One that is not near w: the laws compare with what it stands for."""
    ax = weights.parse_axes(axes)
    stack, cut = w.shape[: len(ax.stack)], len(ax.stack + ax.first)
    a, b = _random((*w.shape[:cut], rank), 2), _random((*stack, rank, *w.shape[cut:]), 3)
    return weights.LowRank(a, b, len(ax.second))


def _mask(w, axes, keep=2, of=4):
    """The `keep` largest of each `of` along the last inputs."""
    at = weights.input_axis(axes)
    groups = np.moveaxis(np.abs(np.asarray(w)), at, -1).reshape(-1, min(of, w.shape[at]))
    there = np.argsort(np.argsort(-groups, -1), -1) < keep
    shape = np.moveaxis(np.asarray(w), at, -1).shape
    return jnp.asarray(np.moveaxis(there.reshape(shape), -1, at))


def _scaled(w, axes, base=lambda w: w):
    scale = weights.ia3(w, axes=axes, inputs=True).scale
    scale = scale + jnp.abs(_random(scale.shape, 7))
    return weights.Scaled(base(w / scale), scale)


# name -> (array, axes) -> weight
WEIGHTS = {
    "array": lambda w, axes: w,
    "int8": lambda w, axes: weights.quantize(w, "int8", axes=axes),
    "int8 by groups": lambda w, axes: weights.quantize(w, "int8", axes=axes, group=2),
    "nf4 by groups": lambda w, axes: weights.quantize(w, "nf4", axes=axes, group=2),
    "lora": _lora,
    "lora over int8": lambda w, axes: _lora(weights.quantize(w, "int8", axes=axes), axes),
    "lora over lora": lambda w, axes: dataclasses.replace(_lora(_lora(w, axes), axes, rank=3), rs=True),
    "dora": lambda w, axes: _stirred(weights.dora(w, 2, axes=axes, rng=KEY, alpha=3.0)),
    "ia3 of inputs": lambda w, axes: _stirred(weights.ia3(w, axes=axes, inputs=True)),
    "low rank": _low_rank,
    "low rank of int8": lambda w, axes: int8_factors(_low_rank(w, axes), axes),
    "sparse 2:4": lambda w, axes: weights.sparse(w, _mask(w, axes), axes=axes),
    "sparse int8": lambda w, axes: sparse_int8(w, axes),
    "sparse, not all outputs as many": lambda w, axes: weights.sparse(w, _mask(w, axes) & (w > -0.1), axes=axes),
    "masked": lambda w, axes: weights.Masked(w, _mask(w, axes)),
    "moving": lambda w, axes: _moving(w, axes),
    "moving by scores": lambda w, axes: _moving(w, axes, _random(w.shape, 8)),
    "learned int4": lambda w, axes: _learned(w, axes, 4),
    "learned int3 by groups, with a zero": lambda w, axes: _learned(w, axes, 3, 2, zero=True),
    "scaled learned int4": lambda w, axes: _scaled(w, axes, lambda w: _learned(w, axes, 4)),
    "lora over learned int4": lambda w, axes: _lora(_learned(w, axes, 4), axes),
    "scaled": _scaled,
    "scaled int8": lambda w, axes: _scaled(w, axes, lambda w: weights.quantize(w, axes=axes)),
    "rotated": lambda w, axes: weights.rotated(w, KEY, axes=axes),
    "rotated int8": lambda w, axes: rotated_int8(w, axes),
    "lora over scaled int8": lambda w, axes: _lora(_scaled(w, axes, lambda w: weights.quantize(w, axes=axes)), axes),
    "observed int8": lambda w, axes: _observed(weights.quantize(w, axes=axes), axes),
    "ia3 of outputs over lora": lambda w, axes: _stirred(weights.ia3(_lora(w, axes), axes=axes)),
}


def _observed(w, axes):
    return weights.Observed(w, observing.blank(w, axes, observing.WANTS))


def _moving(w, axes, scores=None):
    return weights.Moving(w, _mask(w, axes), jnp.zeros(w.shape[: len(weights.parse_axes(axes).stack)], jnp.int32), scores)


def _learned(w, axes, bits, group=None, zero=False):
    """One of which some numbers are clipped."""
    scale = weights.quantize(w, axes=axes, group=group).scale * (0.7 * 127.5 / (2 ** (bits - 1) - 0.5))
    return weights.Learned(w, scale, jnp.round(10 * _random(scale.shape, 9)).astype(jnp.int8) if zero else None, bits)


def int8_factors(w, axes):
    ax = weights.parse_axes(axes)
    factor = lambda first, second: weights.write_axes(weights.Axes(ax.stack, first, second, False))
    a, b = weights.quantize(w.a, axes=factor(ax.first, ("_",))), weights.quantize(w.b, axes=factor(("_",), ax.second))
    return weights.LowRank(a, b, w.split)


def sparse_int8(w, axes):
    made = weights.sparse(w, _mask(w, axes), axes=axes)
    return dataclasses.replace(made, values=weights.quantize(made.values, axes=axes))


def rotated_int8(w, axes):
    made = weights.rotated(w, KEY, axes=axes)
    return dataclasses.replace(made, base=weights.quantize(made.base, axes=axes))


# Their products round, so that they are held to an error instead; every other law is theirs too.
ROUNDED = {f"rounded to {kind}": lambda w, axes, kind=kind: weights.Rounded(w, kind) for kind in weights.KINDS}
# Their products are not linear, and `dense` refuses them: laws of their own, beside those that do not speak of a matrix.
CURVED = {
    "adapter": _adapter,
    "ia3 with a bias": lambda w, axes: _stirred(weights.ia3(w, axes=axes, bias=_random(_outputs(w, axes), 5))),
}
# axes, shape of one layer's weight, a product, the operand's shape
PRODUCTS = {
    "plain": ("embed -> mlp", (8, 6), "btd,df->btf", (2, 5, 8)),
    "to heads": ("embed -> heads head_dim", (8, 2, 4), "btd,dnh->btnh", (2, 5, 8)),
    "from heads": ("heads head_dim -> embed", (2, 8, 8), "btnh,nhd->btd", (2, 5, 2, 8)),
    "transposed": ("vocab <- embed", (6, 8), "btd,vd->btv", (2, 5, 8)),
}
each_weight = pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
each_rounded = pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED)
each_of_all = pytest.mark.parametrize("make", (WEIGHTS | ROUNDED).values(), ids=WEIGHTS | ROUNDED)
each_curved = pytest.mark.parametrize("make", CURVED.values(), ids=CURVED)
each_anywhere = pytest.mark.parametrize("make", (WEIGHTS | ROUNDED | CURVED).values(), ids=WEIGHTS | ROUNDED | CURVED)
each_product = pytest.mark.parametrize("axes, shape, spec, x_shape", PRODUCTS.values(), ids=PRODUCTS)


@each_of_all
@each_product
@pytest.mark.parametrize("layers", [(), (3,)], ids=["one", "stacked"])
def test_logical_shape(make, axes, shape, spec, x_shape, layers):
    axes = f"layers | {axes}" if layers else axes
    w = make(_random((*layers, *shape)), axes)
    assert weights.shape(w) == weights.dense(w).shape == (*layers, *shape)


@each_weight
@each_product
def test_einsum_is_that_of_the_dense_array(make, axes, shape, spec, x_shape):
    w, x = make(_random(shape), axes), _random(x_shape, 3)
    want = jnp.einsum(spec, x, weights.dense(w))
    # float32: the same products in another order, over at most 16 terms and a rank of 5
    np.testing.assert_allclose(
        jax.jit(ops.einsum, static_argnums=0)(spec, x, w), want, rtol=0, atol=2e-6 * float(jnp.abs(want).max()) + 1e-7
    )


@each_weight
def test_bfloat16_operand_decides_the_dtype(make):
    w, x = make(_random((8, 6)), "embed -> mlp"), _random((2, 5, 8), 3).astype(jnp.bfloat16)
    y = ops.einsum("btd,df->btf", x, w)
    assert y.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: each of the few roundings on the way is at most 2^-8 of the largest term
    want = jnp.einsum("btd,df->btf", x.astype(jnp.float32), weights.dense(w))
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=2**-6 * float(jnp.abs(want).max()))


@each_weight
def test_a_scan_over_layers_slices_it(make):
    w, x = make(_random((3, 8, 8)), "layers | embed -> mlp"), _random((2, 8), 3)
    got, _ = jax.jit(lambda w, x: jax.lax.scan(lambda x, w: (ops.einsum("bd,df->bf", x, w), None), x, w))(w, x)
    want = x
    for layer in weights.dense(w):
        want = want @ layer
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@each_weight
def test_gradient_reaches_what_trains_and_nothing_else(make):
    w, x = make(_random((8, 6)), "embed -> mlp"), _random((2, 8), 3)
    kept, rest = trees.partition(w, weights.trainable(w))
    if not jax.tree.leaves(kept):
        assert any(isinstance(part, weights.Quantized) for part in jax.tree.leaves(w, is_leaf=lambda x: isinstance(x, weights.Quantized)))
        return
    grads = jax.grad(lambda kept: jnp.sum(ops.einsum("bd,df->bf", x, trees.combine(kept, rest)) ** 2))(kept)
    want = jax.grad(lambda kept: jnp.sum((x @ weights.dense(trees.combine(kept, rest))) ** 2))(kept)
    for (name, g), (_, v) in zip(trees.named_leaves(grads), trees.named_leaves(want), strict=True):
        assert float(jnp.abs(g).max()) > 0, name
        np.testing.assert_allclose(g, v, rtol=1e-4, atol=1e-6, err_msg=name)


@each_anywhere
def test_sharded_equals_whole(make):
    axes = "layers | embed -> heads head_dim"
    w, x = make(_random((2, 8, 2, 4)), axes), _random((4, 8), 3)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    where = sharding.shardings(w, axes, mesh)
    assert all(isinstance(s, NamedSharding) for s in jax.tree.leaves(where))
    largest = max(zip(jax.tree.leaves(w), jax.tree.leaves(where), strict=True), key=lambda pair: pair[0].size)[1]
    if isinstance(w, weights.LowRank):  # each factor has one of the two
        assert {axis for s in jax.tree.leaves(where) for axis in s.spec} == {None, "fsdp", "tensor"}
    else:
        assert tuple(largest.spec) == (None, "fsdp", "tensor")
    product = jax.jit(lambda w: jax.vmap(lambda w: ops.einsum("bd,dnh->bnh", x, w))(w))
    np.testing.assert_allclose(product(jax.device_put(w, where)), product(w), atol=1e-6)


def _formula(spec, x, w):
    """What the products of CURVED are, written out over matrices: the outputs are the last letters of the product."""
    outs = w.bias.shape
    z, flat = jnp.einsum(spec, x, w.base), lambda a: a.reshape(*a.shape[: -len(outs)], -1)
    if isinstance(w, weights.IA3):
        scale = w.scale.reshape(outs)
        return (z + w.bias) * scale - w.bias
    down, up = w.down.reshape(-1, w.down.shape[-1]), flat(w.up)
    return z + (jax.nn.gelu(flat(z + w.bias) @ down + w.down_bias) @ up + flat(w.up_bias)).reshape(z.shape)


@each_curved
@each_product
def test_products_that_no_array_has(make, axes, shape, spec, x_shape):
    w, x = make(_random(shape), axes), _random(x_shape, 3)
    want = _formula(spec, x, w)
    assert weights.shape(w) == shape
    np.testing.assert_allclose(jax.jit(ops.einsum, static_argnums=0)(spec, x, w), want, atol=4e-6 * float(jnp.abs(want).max()))
    assert ops.einsum(spec, x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="no array"):
        weights.dense(w)
    kept, rest = trees.partition(w, weights.trainable(w))
    gradients = lambda product: jax.jit(jax.grad(lambda kept: jnp.sum(product(spec, x, trees.combine(kept, rest)) ** 2)))(kept)
    grads, exact = gradients(ops.einsum), gradients(_formula)
    assert grads.bias is None  # a copy: what it copies is a weight of its own
    for (name, g), (_, v) in zip(trees.named_leaves(grads), trees.named_leaves(exact), strict=True):
        assert float(jnp.abs(g).max()) > 0, name
        np.testing.assert_allclose(g, v, rtol=1e-4, atol=1e-6, err_msg=name)


@each_curved
def test_those_scan_as_they_loop(make):
    w, x = make(_random((3, 8, 8)), "layers | embed -> mlp"), _random((2, 8), 3)
    got, _ = jax.jit(lambda w, x: jax.lax.scan(lambda x, w: (ops.einsum("...d,df->...f", x, w), None), x, w))(w, x)
    want = x
    for i in range(3):
        want = ops.einsum("bd,df->bf", want, jax.tree.map(lambda part, i=i: part[i], w))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * float(jnp.abs(want).max()))


@each_of_all
def test_rows(make):
    w, ids = make(_random((6, 8)), "vocab <- embed"), jnp.array([[0, 5], [3, 3]])
    np.testing.assert_allclose(ops.take(w, ids), weights.dense(w)[ids], atol=1e-6)


def test_a_prompt_is_looked_up_and_is_no_output():
    axes, prompt, ids = "vocab <- embed", _random((3, 8), 2), jnp.array([[6, 7, 8, 0], [3, 5, 8, 6]])
    for base in (_random((6, 8)), weights.quantize(_random((6, 8)), axes=axes), _lora(_random((6, 8)), axes)):
        w = weights.prompted(base, prompt)
        assert weights.shape(w) == weights.dense(w).shape == (6, 8)
        assert weights.rows(w) == 9
        np.testing.assert_allclose(ops.take(w, ids), jnp.concatenate([weights.dense(base), prompt])[ids], atol=1e-6)
        x = _random((2, 5, 8), 3)
        np.testing.assert_array_equal(ops.einsum("btd,vd->btv", x, w), ops.einsum("btd,vd->btv", x, base))
        where = sharding.shardings(w, axes, sharding.make_mesh(fsdp=4, tensor=2))
        np.testing.assert_allclose(jax.jit(ops.take)(jax.device_put(w, where), ids), ops.take(w, ids), atol=1e-6)
    assert jax.tree.leaves(weights.trainable(weights.prompted(weights.quantize(prompt, axes=axes), prompt))) == [False, False, True]
    grad = jax.grad(lambda p: jnp.sum(ops.take(weights.prompted(base, p), ids) ** 2))(prompt)
    np.testing.assert_allclose(grad, 2 * prompt * jnp.array([[2], [1], [2]]), rtol=1e-6)  # twice the row, as often as it was looked up


def test_a_perturbed_table_moves_what_is_looked_up_and_is_no_other_matrix():
    axes, delta, ids = "vocab <- embed", _random((2, 5, 8), 2), jnp.array([[0, 1, 2, 5, 0], [3, 5, 5, 4, 7]])
    prompt, x = _random((2, 8), 4), _random((2, 5, 8), 3)
    for base in (_random((6, 8)), weights.prompted(_lora(weights.quantize(_random((6, 8)), axes=axes), axes), prompt)):
        w = weights.Perturbed(base, delta)
        assert weights.shape(w) == weights.dense(w).shape == (6, 8) and weights.rows(w) == weights.rows(base)
        np.testing.assert_array_equal(ops.take(w, ids), ops.take(base, ids) + delta)
        assert ops.take(w, ids, jnp.bfloat16).dtype == jnp.bfloat16
        np.testing.assert_array_equal(ops.einsum("btd,vd->btv", x, w), ops.einsum("btd,vd->btv", x, base))
        entropy = jax.jit(lambda w: ops.linear_cross_entropy(x, w, ids % 6, chunk=4)[0])  # of a head that is tied to it
        np.testing.assert_array_equal(entropy(w), entropy(base))
        where = sharding.shardings(w, axes, sharding.make_mesh(data=2, tensor=2, fsdp=2))
        np.testing.assert_allclose(jax.jit(ops.take)(jax.device_put(w, where), ids), ops.take(w, ids), atol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda d: jnp.sum(ops.take(weights.Perturbed(base, d), ids)))(delta), jnp.ones((2, 5, 8)))
    with pytest.raises(ValueError, match=r"ids of shape \(2, 3\) are looked up in a table that is perturbed for \(2, 5\)"):
        ops.take(w, ids[:, :3])


@each_product
@pytest.mark.parametrize("group", [None, 2])
def test_int8_error_is_half_a_step(axes, shape, spec, x_shape, group):
    w = _random(shape)
    q = weights.quantize(w, "int8", axes=axes, group=group)
    scale = q.scale
    for i, (full, part) in enumerate(zip(q.qvalue.shape, scale.shape, strict=True)):
        scale = jnp.repeat(scale, full // part, axis=i)
    # and one rounding of float32 in the product code * scale, of at most 127 steps
    assert bool(jnp.all(jnp.abs(w - weights.dense(q)) <= scale * (0.5 + 127 * 2**-23)))


W8A8 = {
    "each row": (lambda w, axes: weights.W8A8(weights.quantize(w, axes=axes)), lambda x: jnp.abs(x).max()),
    "all rows": (lambda w, axes: weights.W8A8(weights.quantize(w, axes=axes), jnp.float32(0.004)), lambda x: 127 * 0.004),
}


@each_product
@pytest.mark.parametrize("make, largest", W8A8.values(), ids=W8A8)
def test_w8a8_rounds_what_goes_in(make, largest, axes, shape, spec, x_shape):
    """Each entry of x is off by half a step of a 127th of the largest of its row, or of what one scale holds."""
    w, x = make(_random(shape), axes), _random(x_shape, 3)
    assert weights.shape(w) == shape and not any(jax.tree.leaves(weights.trainable(w)))
    off = jnp.abs(jax.jit(ops.einsum, static_argnums=0)(spec, x, w) - jnp.einsum(spec, x, weights.dense(w)))
    bound = jnp.einsum(spec, jnp.full_like(x, largest(x) / 254), jnp.abs(weights.dense(w)))
    assert bool(jnp.all(off <= bound + 1e-6)) and float(off.max()) > 0
    assert ops.einsum(spec, x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16
    np.testing.assert_array_equal(ops.take(w, jnp.array([1, 0])), weights.dense(w)[jnp.array([1, 0])])
    layers = jax.tree.map(lambda part: jnp.stack([part, part]), w)
    _, scanned = jax.jit(lambda w: jax.lax.scan(lambda _, w: (None, ops.einsum(spec, x, w)), None, w))(layers)
    np.testing.assert_allclose(scanned[0], ops.einsum(spec, x, w), atol=1e-6)
    text = jax.jit(ops.einsum, static_argnums=0).lower(spec, x, w).as_text()
    assert any("dot_general" in line and line.count("xi8>") >= 2 for line in text.splitlines())


def rounding(w, spec, x):
    """How far rounding to 8 bits may take `einsum(spec, x, w)`: int8 is off by half a step of a 127th of the largest, float8_e4m3fn, which keeps
    four bits with the leading one, by a sixteenth of the number itself; both operands are."""
    sizes = jnp.einsum(spec, jnp.abs(x), jnp.abs(w.w))
    if w.kind == "fp8":
        return sizes * (2 * 2**-4 + 2**-8) + 1e-5 * sizes.max()  # and what is below the normal numbers, 2^-15 of the largest
    terms = jnp.einsum(spec, jnp.ones_like(x), jnp.ones_like(w.w))
    return terms * jnp.abs(x).max() * jnp.abs(w.w).max() * (2 / 254 + 1 / 254**2)


@each_rounded
@each_product
def test_rounded_products_are_as_near_as_eight_bits(make, axes, shape, spec, x_shape):
    w, x = make(_random(shape), axes), _random(x_shape, 3)
    off = jnp.abs(jax.jit(ops.einsum, static_argnums=0)(spec, x, w) - jnp.einsum(spec, x, w.w))
    assert bool(jnp.all(off <= rounding(w, spec, x)))
    assert float(off.max()) > 0  # it does round
    assert ops.einsum(spec, x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


@each_rounded
def test_rounded_weights_scan_as_they_loop(make):
    w, x = make(_random((3, 8, 8)), "layers | embed -> mlp"), _random((2, 8), 3)
    got, _ = jax.jit(lambda w, x: jax.lax.scan(lambda x, w: (ops.einsum("...d,df->...f", x, w), None), x, w))(w, x)
    want = x
    for i in range(3):
        want = ops.einsum("bd,df->bf", want, jax.tree.map(lambda part, i=i: part[i], w))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7 * float(jnp.abs(want).max()))


# relative error of a gradient's norm. Rounding a product's operands to e4m3 moves it by about 2^-4 / sqrt(3) of each, e5m2 by twice that
NEAR = {"int8": 2**-5, "fp8": 2**-3}


@each_rounded
def test_rounded_products_have_near_gradients(make):
    w, x, v = make(_random((32, 16)), "embed -> mlp"), _random((64, 32), 3), _random((64, 16), 4)
    loss = lambda w, x: jnp.sum(ops.einsum("bd,df->bf", x, w) * v)
    grads, exact = jax.jit(jax.grad(loss, (0, 1)))(w, x), jax.grad(loss, (0, 1))(w.w, x)
    for got, want in zip((grads[0].w, grads[1]), exact, strict=True):
        assert got.dtype == want.dtype
        assert float(jnp.linalg.norm(got - want)) <= NEAR[w.kind] * float(jnp.linalg.norm(want))
    text = jax.jit(jax.grad(loss, (0, 1))).lower(w, x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    narrow = [line for line in products if line.count("xi8>" if w.kind == "int8" else "xf8E") >= 2]
    assert (len(narrow), len(products)) == {"int8": (1, 2), "fp8": (2, 2)}[w.kind]  # dx and dw; y is not needed here


TREE = {
    "tokens": ("vocab <- embed", (6, 8)), "up": ("layers | embed -> mlp", (2, 8, 4)), "router": ("layers | embed -> _", (2, 8, 4)),
    "norm": ("layers | norm", (2, 8)), "filter": ("_ _ _ -> embed", (3, 2, 2, 8)),
}  # fmt: skip


def test_rounded_reaches_products_with_named_axes_alone():
    params, axes = ({name: part(*row) for name, row in TREE.items()} for part in (lambda _, s: jnp.ones(s), lambda text, _: text))
    made = weights.rounded(params, [(".*", "int8")], axes)
    assert [name for name, w in made.items() if isinstance(w, weights.Rounded)] == ["up"]
    assert (
        weights.rounded(params | {"down": params["up"]}, [("up", None), (".*", "fp8")], axes | {"down": axes["up"]})["up"] is params["up"]
    )
    for rules, message in [([("up", "int4")], "'int4'.*'int8'"), ([("norm", "int8")], "round no weight"), ([("u", "int8")], "matches no")]:
        with pytest.raises(ValueError, match=message):
            weights.rounded(params, rules, axes)


STARTS = {  # and how near its product is to that of its base
    "lora": (lambda w, axes: weights.lora(w, 4, axes=axes, rng=KEY), 0),
    "dora": (lambda w, axes: weights.dora(w, 4, axes=axes, rng=KEY), 2**-22),  # |w| / |w|, summed in two orders
    "ia3": (lambda w, axes: weights.ia3(w, axes=axes), 0),
    "adapter": (lambda w, axes: weights.adapter(w, 4, axes=axes, rng=KEY, bias=_random((6,), 5)), 0),
}


@pytest.mark.parametrize("make, near", STARTS.values(), ids=STARTS)
def test_it_starts_as_its_base(make, near):
    w, x = _random((8, 6)), _random((5, 8), 3)
    y = x @ w
    np.testing.assert_allclose(ops.einsum("bd,df->bf", x, make(w, "embed -> mlp")), y, rtol=0, atol=near * float(jnp.abs(y).max()))


def test_doras_norm_is_a_constant_and_is_of_the_outputs():
    """Equation 11 of the paper: the gradient of v is that of (m / |v|) v, |v| held."""
    w, x = _stirred(weights.dora(_random((8, 6)), 2, axes="embed -> mlp", rng=KEY)), _random((5, 8), 3)
    v = weights.dense(w.direction)
    assert w.magnitude.shape == (1, 6)
    np.testing.assert_allclose(jnp.linalg.norm(weights.dense(w), axis=0), jnp.abs(w.magnitude[0]), rtol=1e-6)
    grads = jax.grad(lambda w: jnp.sum(ops.einsum("bd,df->bf", x, w)))(w)
    dv = jnp.outer(x.sum(0), w.magnitude[0] / jnp.linalg.norm(v, axis=0))
    np.testing.assert_allclose(grads.b, w.a.T @ dv * w.direction.scale, rtol=1e-5, atol=1e-6)


AXIS_STRINGS = ["embed -> heads head_dim", "vocab <- embed", "layers | embed -> mlp", "norm", "layers | norm", "a b | c d -> _ e"]


@pytest.mark.parametrize("text", AXIS_STRINGS)
def test_axis_strings_read_and_write(text):
    assert weights.write_axes(weights.parse_axes(text)) == text


MISTAKES = {
    "a bias": (lambda: weights.quantize(jnp.ones(4), axes="norm"), "no inputs"),
    "a group that does not divide": (
        lambda: weights.quantize(jnp.ones((6, 4)), axes="embed -> mlp", group=4),
        "group 4 does not divide axis 'embed' of 6; nearest is 2",
    ),
    "a prompt of another width": (
        lambda: weights.prompted(jnp.ones((6, 4)), jnp.ones((2, 3))),
        r"\(2, 3\) has no place below a table \(6, 4\)",
    ),
    "an adapter on rows": (
        lambda: ops.take(weights.adapter(jnp.ones((6, 4)), 2, axes="v <- e", rng=KEY), jnp.ones(3, int)),
        "rows of a table",
    ),
    "rank 0": (lambda: weights.lora(jnp.ones((6, 4)), 0, axes="embed -> mlp", rng=KEY), "rank of at least 1"),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
