"""Topologies: what is written is what is rented; a mesh of stand-ins is the mesh that the compiler's devices make."""

import itertools
import os

import pytest
from running import child_python, needs_libtpu

from bigflax import sharding, topology

SHAPES = {  # text, slices -> chips, devices, dimensions with joined ends
    "v5e:4x4": (1, 16, 16, ()),
    "v5e:16x16": (1, 256, 256, (0, 1)),
    "v5e:8x16": (2, 256, 256, (1,)),
    "v6e:2x4": (1, 8, 8, ()),
    "v5p:4x4x4": (1, 64, 64, (0, 1, 2)),
    "v5p:2x2x4": (1, 16, 16, ()),
    "tpu7x:2x2x1": (1, 4, 8, ()),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name):
    slices, chips, devices, joined = SHAPES[name]
    place = topology.parse(name, slices)
    assert (place.chips, place.devices, place.name) == (chips, devices, name)
    assert tuple(dim for dim in range(len(place.shape)) if place.wraps(dim)) == joined
    stand_ins = place.stand_ins()
    assert len(stand_ins) == devices
    assert len({(d.coords, d.core_on_chip, d.slice_index) for d in stand_ins}) == devices


MISTAKES = {
    "v5e": "the topology 'v5e' is not of 2 dimensions; write it like v5e:4x4",
    "v5p:4x4": "not of 3 dimensions; write it like v5p:4x4x4",
    "v5e:4x0": "not of 2 dimensions",
    "v5:4x4": "unknown chip 'v5'",
    "h100:8": "unknown chip 'h100'",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(text):
    with pytest.raises(ValueError, match=MISTAKES[text]):
        topology.parse(text)


def test_no_slices():
    with pytest.raises(ValueError, match="0 slices are none"):
        topology.parse("v5e:4x4", 0)


def test_neighbours_on_inner_axes_are_neighbours_on_the_grid():
    mesh = sharding.make_mesh(devices=topology.parse("v5p:4x4x4", 2).stand_ins(), slice=2, fsdp=16, tensor=4)
    assert {device.slice_index for device in mesh.devices[1].flat} == {1}
    for row in mesh.devices.reshape(-1, 4):
        steps = [sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) for one, other in itertools.pairwise(row)]
        assert max(steps) == 1


def test_without_the_compiler_its_devices_are_a_sentence(monkeypatch):
    monkeypatch.setattr(topology, "has_compiler", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'bigflax\[plan\]'"):
        topology.devices("v5e:4x4")


COMPILERS = """
from bigflax import sharding, topology
cases = {("v5p:4x4x4", 1): dict(fsdp=16, tensor=4), ("v5e:4x4", 2): dict(slice=2, fsdp=-1), ("tpu7x:2x2x1", 1): dict(fsdp=8), ("v5e:1x1", 1): {}}
for (name, slices), sizes in cases.items():
    both = topology.devices(name, slices), topology.parse(name, slices).stand_ins()
    real, ours = (sharding.make_mesh(devices=devices, **sizes).devices for devices in both)
    place = lambda d: (tuple(d.coords), d.core_on_chip, getattr(d, "slice_index", None) or 0, d.device_kind)
    assert [*map(place, real.flat)] == [*map(place, ours.flat)], name
try:
    topology.devices("v5e:3x5")
except ValueError as error:
    print(error)
import os
print("TPU_ACCELERATOR_TYPE" in os.environ)
"""


@needs_libtpu
def test_stand_ins_stand_where_the_compilers_devices_do():
    env = {name: value for name, value in os.environ.items() if name not in topology.ALONE}
    said = child_python(COMPILERS, env=env).splitlines()
    assert said[0].startswith("there is no topology v5e:3x5: ")
    assert said[1:] == ["False"]  # a TPU of one's own, if there ever is one, is not told to be alone
