"""A plan by the compiler: a step lowered and compiled for devices that need not be here, and what the program says of itself.

Memory is the compiler's own account of one device: arguments, which hold weights, optimizer and batch; temporaries; code. Collectives are read
from the program's text with the number of times that each runs (hlo.py). FLOPs executed are counted in the traced step, recomputation
included: the compilers' own figure counts the body of a loop once, whatever its length (flops.py).
"""

import collections
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from bigflax import hlo, topology, train, trees
from bigflax.chips import chip
from bigflax.flops import count_jaxpr
from bigflax.planner import roofline
from bigflax.planner.report import GIB, Plan, Traffic
from bigflax.sharding import make_mesh
from bigflax.topology import Topology

RESERVED = GIB / 4  # of a TPU's memory the runtime keeps so much: of 16 GiB programs get 15.75
SOURCES = {"tpu": "TPU compiler", "cpu": "CPU compiler, whose memory is an estimate"}


def plan(
    step: Any, state: Any, batch: Any, *, topology: str | None = None, slices: int = 1, model_flops: float | None = None,
    steps: int | None = None, price: float | None = None, say: Callable[[str], None] = lambda text: None,
) -> Plan:  # fmt: skip
    """The Plan of `step(state, batch)`: of `bigflax.train_step`, or any jitted function whose first argument is the state.

    `state` and `batch` are trees of arrays or ShapeDtypeStructs with NamedShardings on one mesh. Without `topology` that mesh's devices are
    planned for, which are then a topology's (`bigflax.topology.devices`); with one ("v5p:4x4x4"), the same mesh on its devices, as many of
    them: a step that is no `train_step` must not have closed over the old mesh. Without libtpu the fake CPU devices' compiler answers, and
    memory is an estimate. `model_flops` are by default three times those of the `train_step`'s loss, else what is executed. `price` is in
    dollars a chip and hour, by default the table's (chips.py). `say` hears of the progress.

    Raises ValueError where no leaf has a mesh, or the topology another number of devices.
    """
    mesh = _mesh_of((state, batch))
    place = _place(mesh, topology, slices)
    if topology is not None:
        mesh = _mesh_on(place, mesh)
        state, batch = move(state, mesh), move(batch, mesh)
        step = step.on(state) if hasattr(step, "on") else step
    began = time.perf_counter()
    say("tracing")
    traced = step.trace(state, batch)
    program = count_jaxpr(traced.jaxpr)
    if hasattr(step, "loss_fn"):
        model = train.model_flops(step.loss_fn, state.weights, batch)
        program *= model / (3 * train.forward_flops(step.loss_fn, state.weights, batch, mesh))
        model_flops = model if model_flops is None else model_flops
    model_flops = program if model_flops is None else model_flops
    say("compiling")
    found = _compile(traced)
    memory = _memory(found, state, batch)
    traffic = [] if isinstance(found, float) else read_traffic(found.as_text(), mesh, place)
    peak = roofline.peak(place)
    return Plan(
        topology=str(place), chips=place.chips, devices=mesh.devices.size, mesh=dict(mesh.shape), source=SOURCES[_platform(mesh)],
        memory=memory, capacity=capacity(place), model_flops=model_flops, program_flops=program, peak=peak, traffic=tuple(traffic),
        seconds=roofline.seconds(program, roofline.moved(memory), traffic, peak, place), tokens=tokens(batch), steps=steps,
        price=place.chip.price if price is None else price, compiled_in=time.perf_counter() - began,
    )  # fmt: skip


def capacity(place: Topology) -> float:
    """Bytes that a program may use of one device."""
    return place.chip.hbm / place.chip.devices - RESERVED


def tokens(batch: Any) -> int:
    """Of a batch of token ids as many as it has, of any other as many rows."""
    leaves = dict(trees.named_leaves(batch))
    ids = next((leaf for name, leaf in leaves.items() if name.endswith("input_ids")), None)
    return int(ids.size) if ids is not None else max((leaf.shape[0] for leaf in leaves.values() if leaf.ndim), default=0)


def move(tree: Any, mesh: Mesh) -> Any:
    """The tree as ShapeDtypeStructs that lie on `mesh` as they lie on a mesh of the same axes."""

    def one(x: Any) -> Any:
        where = NamedSharding(mesh, x.sharding.spec) if isinstance(x.sharding, NamedSharding) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(one, tree)


def read_traffic(text: str, mesh: Mesh, place: Topology) -> list[Traffic]:
    """The collectives of a compiled program by kind and mesh axes, the most expensive first."""
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for one in hlo.collectives(text):
        axes = hlo.axes_of_groups(one.groups, dict(mesh.shape))
        if axes:
            row = sums[one.kind, axes]
            row[0] += one.count
            row[1] += one.count * one.bytes
            row[2] += one.count * roofline.collective_seconds(one.kind, one.bytes, axes, mesh, place)
    rows = [Traffic(kind, axes, int(n), size, seconds) for (kind, axes), (n, size, seconds) in sums.items()]
    return sorted(rows, key=lambda t: -t.seconds)


def _mesh_of(tree: Any) -> Mesh:
    for leaf in jax.tree.leaves(tree):
        if isinstance(where := getattr(leaf, "sharding", None), NamedSharding) and isinstance(where.mesh, Mesh):
            return where.mesh
    raise ValueError("no leaf of state or batch has a NamedSharding, which says the mesh; make them with bigflax.state_like")


def _place(mesh: Mesh, name: str | None, slices: int) -> Topology:
    if name is not None:
        return topology.parse(name, slices)
    devices = list(mesh.devices.flat)
    kind = chip(devices[0])
    if kind is None or not hasattr(devices[0], "coords"):
        raise ValueError(f"the mesh lies on {devices[0].device_kind!r}, which no chip is known of; pass topology=, as in 'v5e:4x4'")
    shape = tuple(1 + max(device.coords[dim] for device in devices) for dim in range(2 if kind.name in topology.FLAT else 3))
    return Topology(kind, shape, len({getattr(device, "slice_index", None) or 0 for device in devices}))


def _mesh_on(place: Topology, mesh: Mesh) -> Mesh:
    """The same mesh on the topology's devices, or without libtpu on fake ones."""
    if place.devices != mesh.devices.size:
        raise ValueError(
            f"the mesh has {mesh.devices.size} devices and {place} has {place.devices}; make it of topology.devices({place.name!r})"
        )
    if topology.has_compiler():
        devices = topology.devices(place.name, place.slices)
    elif len(devices := jax.devices("cpu")) < place.devices:
        raise ValueError(
            f"without libtpu (pip install 'bigflax[plan]') {place.devices} fake CPU devices must stand in; there are {len(devices)}: "
            f"set jax_num_cpu_devices"
        )
    return make_mesh(devices=devices[: place.devices], **mesh.shape)


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _compile(traced: Any) -> Any:
    """The compiled program; or, where it needs more memory than there is, how many bytes its temporaries would."""
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMG])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        return float(needed[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[needed[2]]


def _memory(found: Any, state: Any, batch: Any) -> dict[str, float]:
    """Bytes of one device by what they are for."""
    weights, optimizer = split(state)
    if isinstance(found, float):
        return {"weights": weights, "optimizer": optimizer, "batch": shard_bytes(batch), "temporaries": found, "code": 0}
    said = found.memory_analysis()
    arguments = said.argument_size_in_bytes
    fresh = said.output_size_in_bytes - said.alias_size_in_bytes  # what comes back in memory of its own
    return {
        "weights": weights, "optimizer": optimizer, "batch": max(0, arguments - weights - optimizer),
        "temporaries": said.temp_size_in_bytes + fresh, "code": said.generated_code_size_in_bytes,
    }  # fmt: skip


def split(state: Any) -> tuple[int, int]:
    """Bytes on one device of the weights, frozen ones too, and of the rest of the state: of a tree that is no State, what bears an optimizer's names."""
    if isinstance(state, train.State):
        weights = shard_bytes((state.params, state.frozen))
        return weights, shard_bytes(state) - weights
    marks = re.compile(r"(^|/)(opt|optimizer|opt_state|mu|nu|moments?)(/|$)")
    moments = sum(shard_bytes(leaf) for name, leaf in trees.named_leaves(state) if marks.search(name))
    return shard_bytes(state) - moments, moments


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""
    size = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape, x.dtype)
    return trees.nbytes(jax.tree.map(size, tree))
