"""A plan in a second: no compiler, only what the traced loss and the layout say.

Weights, optimizer state and batch are exact: their shapes divided as they lie. Temporaries are

    kept        what the forward pass leaves for the backward one, read off `jax.vjp` of the loss for the rows of one device
    gradients   float32, laid out as their weights
    working     the activations of the layer that the backward pass is in, and twice the largest array of all (a chunk of logits)
    gathered    the weights of two layers, whole over the axes that the batch lies on; XLA casts all layers' before the first, as they lie

Collectives are what the layout promises: over the batch's axes each weight gathered once a pass, and its gradient scattered where it is sharded,
reduced where it is not; over `tensor` the activations of a layer reduced twice a pass; over `context` keys and values gathered.

Good for choosing between layouts, not for the last tenth of a chip's memory: XLA fuses, rematerializes and copies as it sees fit.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bigflax import train, trees
from bigflax.flops import count_jaxpr
from bigflax.planner import roofline
from bigflax.planner.compiled import capacity, shard_bytes, split, tokens
from bigflax.planner.report import Plan, Traffic
from bigflax.sharding import MESH_AXES, batch_axes, make_mesh, tracing_on
from bigflax.topology import Topology
from bigflax.weights import parse_axes

SINGLE = 2**28  # bytes of a table that lie gathered at a time: it passes in chunks


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a loss computes and keeps for one row of a batch: FLOPs, and bytes; those `split` by `tensor`, heads and mlp columns, apart."""

    model: float  # a training step
    executed: float  # forward and backward passes, recomputation included
    kept: float
    kept_split: float
    working_split: float  # the products of one layer
    largest: float  # of all arrays: a chunk of logits
    width: float  # the activations between two layers
    layers: int


def trace(loss_fn: Any, weights: Any, batch: Any, place: Topology, *, rows: int = 1) -> Trace:
    """Traces the loss of so many rows of the batch, as many as a device will have, as for a chip of `place`, forward and backward; `weights` and
    `batch` are shapes."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    params, rest = trees.partition(weights, jax.tree.map(lambda w: bool(jnp.issubdtype(w.dtype, jnp.inexact)), weights))
    total = lambda params, batch: train.split_loss(loss_fn(trees.combine(params, rest), batch, None))[0].total

    def both(params, batch):
        loss, back = jax.vjp(lambda params: total(params, batch), params)
        return back, back(jnp.ones_like(loss))

    mesh = make_mesh(devices=place.stand_ins()[:1], data=1)
    with tracing_on(mesh):
        closed, (residuals, _) = jax.make_jaxpr(both, return_shape=True)(params, one)
    given = {tuple(w.shape) for w in jax.tree.leaves(params)}  # a cast weight is kept too, but as it lies
    sizes = {math.prod(shape) for shape in given}  # nor is a weight's gradient, in whatever pieces, ever whole
    kept = [x for x in jax.tree.leaves(residuals) if tuple(x.shape) not in given]
    scans = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan"]
    longest = max(scans, key=lambda eqn: count_jaxpr(eqn.params["jaxpr"]) * eqn.params["length"], default=None)
    if longest is None:
        layers, carried, body = 1, None, closed.jaxpr
    else:
        layers, body = longest.params["length"], longest.params["jaxpr"].jaxpr
        ends = zip(
            longest.outvars, body.outvars, strict=True
        )  # what is carried has the same shape in and out of a turn, what is stacked has not
        carried = max((out.aval for out, inner in ends if out.aval.shape == inner.aval.shape), key=_bytes, default=None)
    between = lambda x: carried is not None and tuple(x.shape[-len(carried.shape) :]) == tuple(carried.shape)
    whole = sum(_bytes(x) for x in kept if between(x))
    model = train.model_flops(loss_fn, weights, one)
    executed = count_jaxpr(closed) * model / (3 * train.forward_flops(loss_fn, weights, one, mesh))
    products = [v.aval for eqn in _equations(body) if eqn.primitive.name in PRODUCTS for v in eqn.outvars]
    others = [v.aval for eqn in _equations(closed.jaxpr) for v in eqn.outvars if math.prod(v.aval.shape) not in sizes]
    return Trace(
        model=model / rows, executed=executed / rows, kept=whole / rows, kept_split=(sum(map(_bytes, kept)) - whole) / rows,
        working_split=sum(map(_bytes, products)) / rows, largest=max(map(_bytes, others), default=0) / rows,
        width=0 if carried is None else _bytes(carried) / rows, layers=layers,
    )  # fmt: skip


PRODUCTS = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated", "pallas_call")


def estimate(
    traced: Trace, state: Any, batch: Any, place: Topology, *, axes: Any = None, accumulate: int = 1, choices: int = 1, dtype_bytes: int = 2,
    steps: int | None = None, price: float | None = None,
) -> Plan:  # fmt: skip
    """The Plan of a train step of this loss whose `state` and `batch`, ShapeDtypeStructs, lie on a mesh of `place.stand_ins()`.

    `axes` are the model's, which tell experts from what is gathered; `accumulate` is the number of micro-batches, `choices` how many experts a
    token passes through, `dtype_bytes` the size of a number that is computed with.
    """
    mesh = state.mesh
    sizes = {axis: mesh.shape.get(axis, 1) for axis in MESH_AXES}
    weights, optimizer = split(state)
    rows_all = jax.tree.leaves(batch)[0].shape[0]
    spread = math.prod(sizes[axis] for axis in batch_axes(mesh))
    rows = rows_all / spread / accumulate / sizes["context"] / sizes["stage"]
    gathered, traffic = _weights(state.params, axes, mesh, place, dtype_bytes, accumulate)
    one, many = rows * traced.width, max(1, sizes["tensor"])
    if sizes["tensor"] > 1:
        traffic.append(_traffic("all-reduce", ("tensor",), 6 * traced.layers * accumulate, one, mesh, place))
    if sizes["context"] > 1:
        traffic.append(_traffic("all-gather", ("context",), 4 * traced.layers * accumulate, one * sizes["context"] / many, mesh, place))
    if sizes["expert"] > 1:  # there and back, forward, backward, and once more where the layer is computed again
        traffic.append(_traffic("all-to-all", ("expert",), 6 * traced.layers * accumulate, choices * one, mesh, place))
    temporaries = {
        "kept": rows * (traced.kept + traced.kept_split / many) / sizes["stage"] * (sizes["stage"] if sizes["stage"] > 1 else 1),
        "gradients": shard_bytes(state.params) * (2 if accumulate > 1 else 1),
        "working": 2 * rows * (traced.working_split + traced.largest) / many,
        "gathered": gathered + (shard_bytes(state.params) * dtype_bytes / 4 if dtype_bytes < 4 else 0),
    }
    memory = {"weights": weights, "optimizer": optimizer, "batch": shard_bytes(batch), "temporaries": sum(temporaries.values()), "code": 0}
    program, peak = traced.executed * rows_all, roofline.peak(place)
    bubble = 1 + (sizes["stage"] - 1) / max(1, accumulate)
    times = dict(roofline.seconds(program * (bubble if sizes["stage"] > 1 else 1), roofline.moved(memory), traffic, peak, place))
    return Plan(
        topology=str(place), chips=place.chips, devices=mesh.devices.size, mesh=dict(mesh.shape), source="estimate", memory=memory,
        capacity=capacity(place), model_flops=traced.model * rows_all, program_flops=program, peak=peak,
        traffic=tuple(sorted(traffic, key=lambda t: -t.seconds)), seconds=times, tokens=tokens(batch), steps=steps,
        price=place.chip.price if price is None else price,
    )  # fmt: skip


def _weights(params: Any, axes: Any, mesh: Mesh, place: Topology, dtype_bytes: int, passes: int) -> tuple[float, list[Traffic]]:
    """(bytes of gathered weights that lie there at a time, the collectives of weights and their gradients)."""
    carry = [axis for axis in mesh.shape if axis in batch_axes(mesh)]
    names = {} if axes is None else {name: parse_axes(text).names for name, text in trees.named_leaves(axes)}
    layer, single = 0.0, 0.0
    gathers: dict[tuple[str, ...], float] = collections.defaultdict(float)
    reduces: dict[tuple[str, ...], float] = collections.defaultdict(float)
    for name, leaf in trees.named_leaves(params):
        parts = [(part,) if isinstance(part, str) else part or () for part in leaf.sharding.spec]
        apart = {axis for part, of in zip(parts, names.get(name, ()), strict=False) if of == "experts" for axis in part}
        lies = {axis for part in parts for axis in part}
        mine = tuple(axis for axis in carry if axis in lies and axis not in apart)
        others = tuple(axis for axis in carry if axis not in lies)
        here = math.prod(leaf.sharding.shard_shape(leaf.shape))
        whole = here * math.prod(mesh.shape[axis] for axis in mine) * dtype_bytes
        layers = leaf.shape[0] if names.get(name, ("layers",) if leaf.ndim > 2 else ())[:1] == ("layers",) else 1
        if mine:
            gathers[mine] += whole
            layer, single = (layer + whole / layers, single) if layers > 1 else (layer, max(single, whole))
        if others:
            reduces[others] += here * 4
    traffic = [_traffic("all-gather", over, 2 * passes, size, mesh, place) for over, size in gathers.items()]
    for over, size in gathers.items():
        traffic.append(_traffic("reduce-scatter", over, passes, size / math.prod(mesh.shape[axis] for axis in over), mesh, place))
    traffic += [_traffic("all-reduce", over, passes, size, mesh, place) for over, size in reduces.items()]
    return 2 * layer + min(single, SINGLE), traffic


def _traffic(kind: str, axes: tuple[str, ...], count: int, size: float, mesh: Mesh, place: Topology) -> Traffic:
    return Traffic(kind, axes, count, count * size, count * roofline.collective_seconds(kind, size, axes, mesh, place))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner functions too."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "pallas_call":
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                        yield from _equations(inner)


def _bytes(x: Any) -> float:
    return math.prod(x.shape) * trees.itemsize(x.dtype)
