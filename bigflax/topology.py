"""Topologies: what is rented, "v5p:4x4x4", as devices that a mesh can be made of although no such machine is here.

    devices("v5e:4x4")               those of the TPU compiler (extra `plan`): steps laid out on them can be compiled
    parse("v5e:4x4").stand_ins()     the same places on the network without a compiler: enough for a mesh, shardings and sizes

Chips of v2 to v6e lie on a grid of two (v5e, v6e) or three dimensions. Opposite edges are joined on v5e and v6e only along a dimension of 16; on
the others where all dimensions are multiples of 4 (Google Cloud, "TPU system architecture"; scaling book, "TPU networking").
Left out on purpose: twisted tori, and the names that count cores ("v4-32"), of which no two generations mean the same.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

from bigflax import trees
from bigflax.chips import CHIPS, Chip

FLAT = ("v5e", "v6e")
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
# What libtpu must be told where there is no TPU: else it asks the metadata server for one, and waits.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device that is nowhere: what a mesh asks of one, and no more."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int
    slice_index: int
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of `shape` chips each."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        return f"{self.name}, {self.slices} slices" if self.slices > 1 else self.name

    def wraps(self, dim: int) -> bool:
        """Whether the two ends of a dimension of the grid are joined, so that a ring along it has both directions."""
        if self.chip.name in FLAT:
            return self.shape[dim] == 16
        return len(self.shape) == 3 and all(size % 4 == 0 for size in self.shape)

    def stand_ins(self) -> list[StandIn]:
        """As many devices as the topology has, at their coordinates."""
        grid = [*self.shape, 1, 1][:3]
        places = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(grid)))]
        cells = [(at, core, i) for i in range(self.slices) for at in places for core in range(self.chip.devices)]
        return [StandIn(number, at, core, i, KINDS[self.chip.name]) for number, (at, core, i) in enumerate(cells)]


def parse(text: str, slices: int = 1) -> Topology:
    """Reads "v5p:4x4x4". Raises ValueError for a chip or a shape that there is not."""
    name, _, sizes = text.partition(":")
    if name not in GENERATIONS:
        raise ValueError(f"unknown chip {name!r} in the topology {text!r}; {trees.did_you_mean(name, GENERATIONS, 'there are')}")
    dims = 2 if name in FLAT else 3
    shape = tuple(int(part) if part.isdigit() else 0 for part in sizes.split("x"))
    if len(shape) != dims or 0 in shape:
        example = "4x4" if dims == 2 else "4x4x4"
        raise ValueError(f"the topology {text!r} is not of {dims} dimensions; write it like {name}:{example}")
    if slices < 1:
        raise ValueError(f"{slices} slices are none; give 1 or more")
    return Topology(CHIPS[name], shape, slices)


def devices(text: str, slices: int = 1) -> list[Any]:
    """The devices of a topology as the TPU compiler has them. Raises ImportError without libtpu, ValueError for a shape that is not sold."""
    import jax
    from jax.experimental import topologies

    topology = parse(text, slices)
    if not has_compiler():
        raise ImportError("the TPU compiler is not installed; pip install 'bigflax[plan]', or plan with --fast")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.chips == slices:
        options["chips_per_host_bounds"] = (1, 1, 1)
    with _alone():
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"there is no topology {topology.name}: {str(error).splitlines()[0]}") from None
    return list(found.devices)


@functools.cache
def has_compiler() -> bool:
    """Whether libtpu, which holds it, is installed."""
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """libtpu reads its variables when it is loaded; afterwards a real start, if there is ever one, must not see ours."""
    before = {name: os.environ.get(name) for name in ALONE}
    os.environ.update({name: value for name, value in ALONE.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
