"""The reader of compiled programs: each way of writing a collective counts once, loops multiply, every notation of groups is read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bigflax import hlo, sharding

PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7)]
APART = [(0, 4), (1, 5), (2, 6), (3, 7)]
GROUPS = {  # as the compilers write them, on 8 devices
    "{{0,1},{2,3},{4,5},{6,7}}": PAIRS,
    "{{0,4},{1,5},{2,6},{3,7}}": APART,
    "{}": [tuple(range(8))],
    "[4,2]<=[8]": PAIRS,
    "[4,2]<=[2,4]T(1,0)": APART,
    "[2,4]<=[2,2,2]T(1,0,2)": [(0, 1, 4, 5), (2, 3, 6, 7)],
    "mesh['a'=4,'b'=2] {'b'}": PAIRS,
    "mesh['a'=2,'b'=4,'c'=1] {'a'}": APART,
    "mesh['a'=2,'b'=4] {'b':(2)2}": PAIRS,
    "mesh['a'=8] {'a':(1)2}": APART,
    "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": APART,
    "mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}": [(0, 2), (1, 3)],
    "mesh['a'=2,'b'=4] {'b','a'}": [(0, 4, 1, 5, 2, 6, 3, 7)],
}


@pytest.mark.parametrize("text, want", GROUPS.items(), ids=GROUPS)
def test_groups(text, want):
    program = f"""HloModule m, num_partitions=8

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %all-reduce.1 = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={text}, use_global_device_ids=true, to_apply=%add
}}
"""
    (one,) = hlo.collectives(program)
    assert (one.kind, one.bytes, one.count, one.groups, one.name, one.computation) == ("all-reduce", 16, 1, want, "all-reduce.1", "main")


# Lines of TPU programs, shortened (hlo/NAME.txt): kind, bytes, count and first group of each collective
TEXTS = {
    "loops": [("collective-permute", 4096, 10, (0, 3))],
    "fusions": [
        ("all-gather", 2048, 1, (0, 1)),
        ("reduce-scatter", 1024, 1, (0, 1)),
        ("all-to-all", 8, 1, (0, 1)),
        ("all-gather", 32, 1, (0, 1)),
        ("all-reduce", 20, 1, (0, 1)),
    ],
    "slices": [("all-reduce", 1024, 1, (0, 4))],
}


@pytest.mark.parametrize("name", TEXTS)
def test_each_counts_once(name):
    text = (Path(__file__).parent / "hlo" / f"{name}.txt").read_text()
    assert [(c.kind, c.bytes, c.count, c.groups[0]) for c in hlo.collectives(text)] == TEXTS[name]


def test_what_a_compiled_program_sends():
    """A scan of 3 turns within one of 5, on 8 fake devices: three kinds of collectives, each along its own axis of the mesh."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

    def inner(x, _):
        return jax.lax.ppermute(jax.lax.psum(x, "fsdp"), "data", [(0, 1), (1, 0)]) * 0.5, None

    def outer(x, _):
        x = jax.lax.scan(inner, x, None, length=3)[0]
        return jnp.tanh(x) * jnp.sum(jax.lax.all_gather(x, ("data", "tensor"))), None

    local = lambda x: jax.lax.scan(outer, x, None, length=5)[0]
    fn = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=P(("data", "fsdp", "tensor")), out_specs=P(("data", "fsdp", "tensor")), check_vma=False)
    )
    found = hlo.collectives(fn.lower(jnp.ones((8, 16))).compile().as_text())
    shape = dict(mesh.shape)
    assert sorted((c.kind, c.bytes, c.count, hlo.axes_of_groups(c.groups, shape), c.wire) for c in found) == [
        ("all-gather", 4 * 64, 5, ("data", "tensor"), 3 * 64),
        ("all-reduce", 64, 15, ("fsdp",), 64),
        ("collective-permute", 64, 15, ("data",), 64),
    ]


def test_axes_of_groups():
    shape = {"slice": 2, "data": 1, "fsdp": 4}
    assert hlo.axes_of_groups([(0, 1, 2, 3)], shape) == ("fsdp",)
    assert hlo.axes_of_groups(APART, shape) == ("slice",)
    assert hlo.axes_of_groups([(0, 5)], shape) == ("slice", "fsdp")
    assert hlo.axes_of_groups([(0,), (1,)], shape) == ()
