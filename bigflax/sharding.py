"""Layout: one mesh, one table from axis names to mesh axes, and everything's sharding read off the two.

A weight names its axes where it is declared ("embed -> mlp"), an activation where it is constrained (`constrain(x, "batch", "seq", None)`).
TABLE says which mesh axis carries which name. The meshes' axes, outermost first:

    slice     slices of a multi-slice TPU, over the data-centre network        data     copies of the model
    stage     pipeline stages                                                  fsdp     weights sharded over copies (ZeRO-3)
    expert    experts of a mixture                                             context  pieces of a sequence
    tensor    heads, mlp columns and vocabulary within a layer

Outside of a mixture's layers `expert`, and outside of a pipeline (pipeline.py) `stage`, is one more axis of data, and of fsdp: else its devices
would all compute the same.
An axis of size 1 costs nothing. The mesh is always of Auto axes and always passed explicitly; nothing here depends on an ambient mesh.
Left out on purpose: sharding by weight name. Names of axes say the same with a tenth of the rules.
"""

import contextlib
import contextvars
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigflax import trees
from bigflax.weights import is_typed, parse_axes, part_axes

MESH_AXES = ("slice", "data", "stage", "fsdp", "expert", "context", "tensor")

Table = Mapping[str, Any]
TABLE: Table = {
    "batch": ("slice", "data", "fsdp", "expert", "stage"),
    "seq": "context",
    "between": "context",  # the sequence between two branches: ("context", "tensor") keeps and norms a piece of it on each device (arXiv 2205.05198)
    "layers": "stage",
    "embed": ("fsdp", "expert", "stage"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}


class Layout(NamedTuple):
    """What a function traced inside of a step may know of where it will run."""

    mesh: Mesh
    table: Table
    micro_batches: int | None  # of a pipeline (pipeline.py); None: one for each stage
    repeats: int
    pipelines: list[Any]  # the plans of those that were traced


_tracing: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("bigflax_layout", default=None)


def make_mesh(*, devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """A mesh of the named axes in the order of MESH_AXES: `make_mesh(data=2, fsdp=-1)`; one size may be -1 and takes the rest.

    Without sizes, all devices lie on `data`. Neighbours on the inner axes are neighbours on the chips' network; devices of several slices lie
    on `slice`, and on it alone. Raises ValueError for an unknown axis, sizes whose product is not the number of devices, or a `slice` that is
    not the number of slices there are.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    for axis in sizes:
        if axis not in MESH_AXES:
            raise ValueError(f"unknown mesh axis {axis!r}; {trees.did_you_mean(axis, MESH_AXES, 'the axes are')}")
    sizes = {axis: sizes[axis] for axis in MESH_AXES if axis in sizes} or {"data": -1}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    wild = [axis for axis, size in sizes.items() if size == -1]
    said = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(wild) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {said}: sizes are at least 1, and one of them may be -1 (takes the rest)")
    if wild:
        sizes[wild[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {said} needs a multiple of {fixed} devices, but there are {len(devices)}" if wild else
                         f"mesh {said} needs {fixed} devices, but there are {len(devices)}; give one axis the size -1 to take what is there")  # fmt: skip
    slices = sorted({getattr(device, "slice_index", None) or 0 for device in devices})
    if len(slices) > 1 and sizes.get("slice") != len(slices):
        raise ValueError(f"the devices lie in {len(slices)} slices, and the mesh says {said}; give it slice={len(slices)}")
    inner = {axis: 1 if axis == "slice" and len(slices) > 1 else size for axis, size in sizes.items()}
    parts = [[device for device in devices if (getattr(device, "slice_index", None) or 0) == i] for i in slices]
    grids = [mesh_utils.create_device_mesh(tuple(inner.values()), part, allow_split_physical_axes=True) for part in parts]
    # Auto, said aloud: jax.make_mesh's own default is Explicit. `slice` is the outermost axis.
    return Mesh(np.concatenate(grids), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def axes_of(name: str | None, size: int, mesh: Mesh, table: Table = TABLE, used: Sequence[str] = ()) -> tuple[str, ...]:
    """The mesh axes, larger than 1 and not `used`, that carry a dimension of this axis name: as many in the table's order as divide it."""
    wanted = table.get(name) if name is not None else None
    chosen: tuple[str, ...] = ()
    for axis in (wanted,) if isinstance(wanted, str) else wanted or ():
        share = math.prod(mesh.shape[a] for a in chosen) * mesh.shape.get(axis, 1)
        if mesh.shape.get(axis, 1) > 1 and axis not in used and size % share == 0:
            chosen += (axis,)
    return chosen


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, table: Table = TABLE) -> PartitionSpec:
    """Which mesh axes carry each dimension of an array whose axes bear these names.

    Each mesh axis is used once, by the first dimension that asks for it. A dimension that an axis does not divide stays whole on it
    (a vocabulary of 50257 over tensor=2): such an array is replicated there, never padded.
    """
    used: tuple[str, ...] = ()
    parts = []
    for name, size in zip(names, shape, strict=True):
        chosen = axes_of(name, size, mesh, table, used)
        used += chosen
        parts.append(chosen if len(chosen) > 1 else chosen[0] if chosen else None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def shardings(params: Any, axes: Any, mesh: Mesh, table: Table = TABLE) -> Any:
    """A NamedSharding for every array of `params` (arrays or ShapeDtypeStructs, typed weights included).

    `axes` is a tree of strings as the model declares them, with one string where `params` may hold a typed weight. None (a plain
    function, which names nothing) shards the largest dimension of each weight over fsdp.
    """
    if axes is None:
        return jax.tree.map(lambda w: NamedSharding(mesh, spec(_largest(w.shape), w.shape, mesh, table)), params)
    per_part = jax.tree.map(lambda w, text: part_axes(w, text), params, axes, is_leaf=is_typed)
    return jax.tree.map(lambda w, text: NamedSharding(mesh, spec(_names(text, w.shape), w.shape, mesh, table)), params, per_part)


def _largest(shape: Sequence[int]) -> list[str | None]:
    best = int(np.argmax(shape)) if len(shape) > 1 else -1
    return ["embed" if i == best else None for i in range(len(shape))]


def _names(text: str, shape: Sequence[int]) -> tuple[str, ...]:
    names = parse_axes(text).names
    if len(names) != len(shape):
        raise ValueError(f"axes {text!r} name {len(names)} dimensions, but the weight has shape {tuple(shape)}")
    return names


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_axes(mesh: Mesh, table: Table = TABLE) -> tuple[str, ...]:
    """The mesh axes over which a batch lies, those of size 1 left out."""
    wanted = table["batch"]
    return tuple(a for a in ((wanted,) if isinstance(wanted, str) else wanted) if mesh.shape.get(a, 1) > 1)


def batch_sharding(mesh: Mesh, table: Table = TABLE) -> NamedSharding:
    """How a batch lies: its first dimension over `batch_axes`."""
    axes = batch_axes(mesh, table)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def check_batch(size: int, mesh: Mesh, table: Table = TABLE) -> None:
    """Raises ValueError where a batch of `size` does not divide over the devices that carry it."""
    axes = batch_axes(mesh, table)
    parts = math.prod(mesh.shape[a] for a in axes)
    if size % parts:
        near = max(parts, size - size % parts)
        raise ValueError(f"batch {size} does not divide over {parts} devices on axes {', '.join(map(repr, axes))}; nearest is {near}")


def whole(x: Any) -> np.ndarray:
    """All of an array, on the host. One that lies on several hosts all of them must ask for together."""
    if not getattr(x, "is_fully_addressable", True):
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says how an activation lies, inside a step; outside of `tracing_on` it does nothing, so models run anywhere."""
    current = _tracing.get()
    if current is None or math.prod(current[0].shape.values()) == 1:
        return x
    mesh, table, *_ = current
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, x.shape, mesh, table)))


@contextlib.contextmanager
def tracing_on(mesh: Mesh | None, table: Table = TABLE, *, micro_batches: int | None = None, repeats: int = 1):
    """While a function is traced inside, `constrain` speaks of this mesh, and `platform` of its devices."""
    token = _tracing.set(None if mesh is None else Layout(mesh, table, micro_batches, repeats, []))
    try:
        yield
    finally:
        _tracing.reset(token)


def current_layout() -> Layout | None:
    """The layout of the enclosing `tracing_on`: part of what a program compiled inside depends on, so part of its cache key."""
    return _tracing.get()


NOWHERE = "nowhere"  # the platform of a device whose programs are counted, not run


def platform() -> str:
    """Where the function being traced will run, "cpu", "gpu" or "tpu": on the layout's devices, which may be those of a machine that is only
    planned for; else on this process's own. Fast paths are chosen by it."""
    layout = _tracing.get()
    if layout is None:
        return jax.default_backend()
    name = layout.mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name
