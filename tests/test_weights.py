"""The laws of typed weights: every type in WEIGHTS is held to every law below. A new type joins the table and gets them all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bigflax import ops, sharding, trees, weights

AXES = "embed -> heads head_dim"
KEY = jax.random.key(0)


def _random(shape, seed=1):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape) * 0.1


def _lora(w, axes, rank=2):
    """With a `b` that is not zero, so that a law cannot hold by both sides being the base."""
    made = weights.lora(w, rank, axes=axes, rng=KEY, alpha=3.0)
    return dataclasses.replace(made, b=_random(made.b.shape, 2))


# name -> (array, axes) -> weight
WEIGHTS = {
    "array": lambda w, axes: w,
    "int8": lambda w, axes: weights.quantize(w, "int8", axes=axes),
    "int8 by groups": lambda w, axes: weights.quantize(w, "int8", axes=axes, group=2),
    "lora": _lora,
    "lora over int8": lambda w, axes: _lora(weights.quantize(w, "int8", axes=axes), axes),
    "lora over lora": lambda w, axes: _lora(_lora(w, axes), axes, rank=3),
}
# Their products round, so that they are held to an error instead; every other law is theirs too.
ROUNDED = {f"rounded to {kind}": lambda w, axes, kind=kind: weights.Rounded(w, kind) for kind in weights.KINDS}
# axes, shape of one layer's weight, a product, the operand's shape
PRODUCTS = {
    "plain": ("embed -> mlp", (8, 6), "btd,df->btf", (2, 5, 8)),
    "to heads": ("embed -> heads head_dim", (8, 2, 4), "btd,dnh->btnh", (2, 5, 8)),
    "from heads": ("heads head_dim -> embed", (2, 4, 8), "btnh,nhd->btd", (2, 5, 2, 4)),
    "transposed": ("vocab <- embed", (6, 8), "btd,vd->btv", (2, 5, 8)),
}
each_weight = pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
each_rounded = pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED)
each_of_all = pytest.mark.parametrize("make", (WEIGHTS | ROUNDED).values(), ids=WEIGHTS | ROUNDED)
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
    # float32: the same products in another order, over at most 8 terms and a rank of 5
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
        assert isinstance(w, weights.Quantized)
        return
    grads = jax.grad(lambda kept: jnp.sum(ops.einsum("bd,df->bf", x, trees.combine(kept, rest)) ** 2))(kept)
    want = jax.grad(lambda kept: jnp.sum((x @ weights.dense(trees.combine(kept, rest))) ** 2))(kept)
    for (name, g), (_, v) in zip(trees.named_leaves(grads), trees.named_leaves(want), strict=True):
        assert float(jnp.abs(g).max()) > 0, name
        np.testing.assert_allclose(g, v, rtol=1e-4, atol=1e-6, err_msg=name)


@each_of_all
def test_sharded_equals_whole(make):
    axes = "layers | embed -> heads head_dim"
    w, x = make(_random((2, 8, 2, 4)), axes), _random((4, 8), 3)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    where = sharding.shardings(w, axes, mesh)
    assert all(isinstance(s, NamedSharding) for s in jax.tree.leaves(where))
    largest = max(zip(jax.tree.leaves(w), jax.tree.leaves(where), strict=True), key=lambda pair: pair[0].size)[1]
    assert tuple(largest.spec) == (None, "fsdp", "tensor")
    product = jax.jit(lambda w: jax.vmap(lambda w: ops.einsum("bd,dnh->bnh", x, w))(w))
    np.testing.assert_allclose(product(jax.device_put(w, where)), product(w), atol=1e-6)


@each_of_all
def test_rows(make):
    w, ids = make(_random((6, 8)), "vocab <- embed"), jnp.array([[0, 5], [3, 3]])
    np.testing.assert_allclose(ops.take(w, ids), weights.dense(w)[ids], atol=1e-6)


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


def test_lora_starts_as_its_base():
    w = _random((8, 6))
    np.testing.assert_array_equal(weights.dense(weights.lora(w, 4, axes="embed -> mlp", rng=KEY)), w)


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
    "rank 0": (lambda: weights.lora(jnp.ones((6, 4)), 0, axes="embed -> mlp", rng=KEY), "rank of at least 1"),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
