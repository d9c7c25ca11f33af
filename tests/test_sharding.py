"""Meshes, the axis table, and what it makes of weights and activations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bigflax import sharding

MESHES = {
    "nothing said": ({}, {"data": 8}),
    "one axis": ({"fsdp": 8}, {"fsdp": 8}),
    "-1 takes the rest": ({"tensor": 2, "data": -1}, {"data": 4, "tensor": 2}),
    "order is ours": ({"tensor": 2, "fsdp": 2, "data": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
    "size 1": ({"data": 1, "fsdp": -1}, {"data": 1, "fsdp": 8}),
}


@pytest.mark.parametrize("sizes, want", MESHES.values(), ids=MESHES)
def test_mesh(sizes, want):
    mesh = sharding.make_mesh(**sizes)
    assert list(mesh.shape.items()) == list(want.items())
    assert set(mesh.axis_types) == {AxisType.Auto}


MISTAKES = {
    "unknown axis": ({"model": 8}, "unknown mesh axis 'model'"),
    "too many devices": ({"data": 16}, "mesh data=16 needs 16 devices, but there are 8"),
    "does not divide": ({"data": -1, "tensor": 3}, "needs a multiple of 3 devices, but there are 8"),
    "two wild": ({"data": -1, "tensor": -1}, "one of them may be -1"),
    "zero": ({"data": 0}, "sizes are at least 1"),
}


@pytest.mark.parametrize("sizes, message", MISTAKES.values(), ids=MISTAKES)
def test_mesh_mistakes(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


class Chip:
    """A device of a machine that is not here."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number, slice_index):
        self.id, self.coords, self.core_on_chip, self.slice_index = number, (number % 4 // 2, number % 2, 0), 0, slice_index


def test_slices_lie_on_their_axis_alone():
    chips = [Chip(i, i // 4) for i in (5, 0, 6, 1, 4, 2, 7, 3)]
    mesh = sharding.make_mesh(devices=chips, slice=2, fsdp=-1)
    assert dict(mesh.shape) == {"slice": 2, "fsdp": 4}
    assert [{chip.slice_index for chip in row} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="lie in 2 slices, and the mesh says data=8; give it slice=2"):
        sharding.make_mesh(devices=chips, data=8)


def test_the_platform_is_that_of_the_layouts_devices():
    assert sharding.platform() == "cpu"
    with sharding.tracing_on(sharding.make_mesh(devices=[Chip(i, 0) for i in range(4)], fsdp=4)):
        assert sharding.platform() == "tpu"


SPECS = {
    "matrix": (("embed", "mlp"), (8, 16), P("fsdp", "tensor")),
    "stacked": (("layers", "embed", "heads", "head_dim"), (3, 8, 2, 4), P(None, "fsdp", "tensor")),
    "batch takes two": (("batch", "seq", None), (8, 5, 3), P(("data", "fsdp"))),
    "what does not divide stays whole": (("vocab", "embed"), (7, 8), P(None, "fsdp")),
    "half of what is asked divides": (("batch", None), (2, 8), P("data")),
    "an axis is used once": (("embed", "embed"), (8, 8), P("fsdp")),
    "no names": ((None, "norm"), (8, 8), P()),
}
APART = {  # outside of the experts their axis is one more of data and of fsdp
    "batch": (("batch", "seq", None), (8, 5, 3), P(("fsdp", "expert"))),
    "matrix": (("embed", "mlp"), (8, 16), P(("fsdp", "expert"), "tensor")),
    "experts": (("experts", "embed", "mlp"), (4, 8, 16), P("expert", "fsdp", "tensor")),
    "experts that do not divide": (("experts", "embed", "mlp"), (3, 8, 16), P(None, ("fsdp", "expert"), "tensor")),
}


@pytest.mark.parametrize("names, shape, want", SPECS.values(), ids=SPECS)
def test_spec(names, shape, want):
    assert sharding.spec(names, shape, sharding.make_mesh(data=2, fsdp=2, tensor=2)) == want


@pytest.mark.parametrize("names, shape, want", APART.values(), ids=APART)
def test_spec_with_experts_apart(names, shape, want):
    assert sharding.spec(names, shape, sharding.make_mesh(fsdp=2, expert=2, tensor=2)) == want


def test_nameless_weights_share_their_largest_dimension():
    shapes = {"w": jax.ShapeDtypeStruct((3, 16), jnp.float32), "b": jax.ShapeDtypeStruct((16,), jnp.float32)}
    where = sharding.shardings(shapes, None, sharding.make_mesh(fsdp=8))
    assert (where["w"].spec, where["b"].spec) == (P(None, "fsdp"), P())


def test_axes_of_another_rank_are_refused():
    with pytest.raises(ValueError, match="name 2 dimensions, but the weight has shape"):
        sharding.shardings({"w": jnp.ones((2, 2, 2))}, {"w": "embed -> mlp"}, sharding.make_mesh(data=8))


def test_constraint_is_in_the_lowered_program():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

    def f(x):
        with sharding.tracing_on(mesh):
            return sharding.constrain(x * 2, "batch", None, "mlp")

    x = jnp.ones((4, 3, 8))
    text = jax.jit(f).lower(x).as_text()
    assert "sharding_constraint" in text and '{"data", "fsdp"}' in text and '"tensor"' in text, text
    assert jax.jit(f)(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
    assert sharding.constrain(x, "batch", None, None) is x  # outside of a step it says nothing


def test_batch_that_does_not_divide():
    mesh = sharding.make_mesh(data=4, tensor=2)
    sharding.check_batch(12, mesh)
    with pytest.raises(ValueError, match="batch 13 does not divide over 4 devices on axes 'data'; nearest is 12"):
        sharding.check_batch(13, mesh)
