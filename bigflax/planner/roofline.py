"""The roofline: the least time that a step takes, by what limits it.

    compute   FLOPs that the program executes, recomputation included / peak of the chips
    hbm       the state read and written and all temporaries written and read once / the memory's bandwidth: what moves at the least, for
              memory that is used again and again within a layer counts once
    ici, dcn  bytes of the collectives over the links that their mesh axes have, within a slice and between slices

A step takes at least the longest of them, if all overlap perfectly. For collectives of n devices over links of W bytes/s (scaling book, "Sharded
matrices"), V the bytes of the whole array:

    all-gather, reduce-scatter   V (n - 1) / n / W        all-reduce          twice that
    all-to-all                   V / 4 / W                collective-permute  V / W: around rings both ways at a time

W adds up the links of a device along the physical dimensions that the mesh axis spans, both ways where the ends are joined (topology.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigflax.topology import Topology


def links(axes: Sequence[str], mesh: Any, topology: Topology) -> float:
    """Bytes/s that a device can send along these mesh axes together."""
    chip = topology.chip
    if "slice" in axes:
        return chip.dcn
    dims = sorted({dim for axis in axes for dim in _spanned(axis, mesh)})
    if not dims:  # the cores of one chip, or chips on one switch
        return chip.links * chip.link_bandwidth if not topology.shape or chip.devices == 1 else chip.hbm_bandwidth
    return sum(chip.link_bandwidth * (2 if topology.wraps(dim) else 1) for dim in dims)


def _spanned(axis: str, mesh: Any) -> list[int]:
    """The dimensions of the grid of chips along which devices of one group of this mesh axis differ."""
    along = np.moveaxis(mesh.devices, list(mesh.shape).index(axis), 0)
    places = np.array([getattr(device, "coords", (0, 0, 0)) for device in along.reshape(len(along), -1)[:, 0]])
    return [dim for dim in range(places.shape[1]) if len(set(places[:, dim])) > 1]


def collective_seconds(kind: str, result: float, axes: Sequence[str], mesh: Any, topology: Topology) -> float:
    """Time of one collective whose result has so many bytes on a device."""
    n = int(np.prod([mesh.shape[axis] for axis in axes]))
    speed = links(axes, mesh, topology)
    if n == 1 or not speed:
        return 0.0
    whole = result * n if kind == "reduce-scatter" else result
    if kind == "collective-permute":
        return result / speed
    if kind in ("all-to-all", "ragged-all-to-all"):
        return whole / 4 / speed
    return (2 if kind == "all-reduce" else 1) * whole * (n - 1) / n / speed


def peak(topology: Topology) -> float:
    """bfloat16 FLOP/s of all its chips."""
    return topology.chips * topology.chip.bf16


def moved(memory: Mapping[str, float]) -> float:
    """Bytes between a device and its memory, at least: the state read and written, temporaries written and read."""
    return 2 * (memory["weights"] + memory["optimizer"] + memory["temporaries"]) + memory["batch"]


def seconds(flops: float, hbm: float, traffic: Sequence[Any], peak: float, topology: Topology) -> Mapping[str, float]:
    """The terms; `flops` and `peak` of all devices, `hbm` bytes of one."""
    return {
        "compute": flops / peak,
        "hbm": hbm * topology.chip.devices / topology.chip.hbm_bandwidth,
        "ici": sum(t.seconds for t in traffic if "slice" not in t.axes),
        "dcn": sum(t.seconds for t in traffic if "slice" in t.axes),
    }
