"""Rows of a table on a mesh: the tokens travel, and not the table."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import ops
from bigflax.sharding import make_mesh, spec, tracing_on
from bigflax.weights import lora

V, D = 64, 32
MESHES = {
    "fsdp": dict(fsdp=8),
    "fsdp and tensor": dict(fsdp=4, tensor=2),
    "data, fsdp and context": dict(data=2, fsdp=2, context=2),
    "tensor": dict(data=4, tensor=2),
}
IDS = {"one row a device": (8, 12), "one row for all": (1, 12)}


def laid(mesh, names, a):
    return jax.device_put(a, jax.NamedSharding(mesh, spec(names, a.shape, mesh)))


def loss(w, ids, g):
    return jnp.sum(jnp.sin(ops.take(w, ids)) * g)


@pytest.mark.parametrize("shape", IDS.values(), ids=IDS)
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_rows_and_their_gradient_are_those_of_one_device(sizes, shape):
    rng, mesh = np.random.default_rng(0), make_mesh(**sizes)
    w, g = jnp.asarray(rng.normal(size=(V, D)), jnp.float32), jnp.asarray(rng.normal(size=(*shape, D)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, V + 9, shape))  # some are clipped
    with tracing_on(mesh):
        put = laid(mesh, ("vocab", "embed"), w), laid(mesh, ("batch", "seq"), ids), laid(mesh, ("batch", "seq", None), g)
        rows, grad = jax.jit(lambda *a: (ops.take(*a[:2]), jax.grad(loss)(*a)))(*put)
    np.testing.assert_array_equal(rows, w[jnp.minimum(ids, V - 1)])
    np.testing.assert_allclose(grad, jax.grad(loss)(w, ids, g), atol=1e-6)  # up to a dozen tokens of one id, in another order


@pytest.mark.parametrize("sizes", [MESHES["fsdp"], MESHES["fsdp and tensor"]], ids=str)
def test_neither_the_table_nor_its_gradient_travels(sizes):
    mesh, V, D = make_mesh(**sizes), 8192, 32  # of 8 x 4 tokens
    like = lambda names, *shape: jax.ShapeDtypeStruct(
        shape, jnp.int32 if names == ("batch", "seq") else jnp.float32, sharding=jax.NamedSharding(mesh, spec(names, shape, mesh))
    )
    w = like(("vocab", "embed"), V, D)
    with tracing_on(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=w.sharding).lower(
            w, like(("batch", "seq"), 8, 4), like(("batch", "seq", None), 8, 4, D)
        )
    moved = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", step.compile().as_text())
    sizes_moved = [np.prod([int(n) for n in dims.split(",")]) for kind in moved for dims in re.findall(r"\[([\d,]+)\]", kind)]
    assert sizes_moved and max(sizes_moved) <= 8 * 4 * D


def test_lora_looks_up_both():
    mesh, ids = make_mesh(fsdp=8), jnp.arange(96).reshape(8, 12) % V
    made = jax.tree.map(lambda part: part + 0.1, lora(jnp.ones((V, D)), 2, axes="vocab <- embed", rng=jax.random.key(0)))
    want = ops.take(made, ids)
    with tracing_on(mesh):
        np.testing.assert_allclose(jax.jit(ops.take)(made, ids), want, rtol=1e-6)
