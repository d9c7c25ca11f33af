"""Pipeline parallelism: equal layers as stages, each on devices of its own, and micro-batches that walk through them.

One program runs on all devices (GSPMD: Xu et al. 2021, arXiv 2105.04663, section 3.3). The stages' activations are one array [S, rows, ...] that
lies over the mesh axis of the stages; in each tick all stages compute at once (a `vmap` over S), and a roll of the array by one, which is a
collective-permute, hands every stage's output to the next:

    tick t, stage s:   k = t - s,   micro-batch m = k // (S R) S + k % S,   round r = k // S % R        0 <= k < M R, else a bubble
    ticks              M R + S - 1, of which a stage stands idle in S - 1: a share of (S - 1) / (M R + S - 1)

With R = 1 stage s has the layers s L / S ... With R > 1 (interleaved: Narayanan et al. 2021, 2104.04473, section 2.2) it has R pieces of L / (S R)
layers, piece r being the r S + s-th of the model: the bubble shrinks by R, each micro-batch goes around R times, and as the weights are stored in
the order of the layers, they are laid out anew once a step and their gradients back again.

Bubbles compute on real rows, so that nothing overflows there; what they compute is dropped. Micro-batch m are the rows m, m + M ...

Outside of the pipeline the stages' devices share the rows, as the table's "batch" says: an embedding or a head is computed once.
What it costs: weights that lie over fsdp are gathered in every tick, and their gradients scattered, not once a pass (over data and slices
gradients are added up first); the input is gathered over the stages, and the output summed over them, once a step.
Left out on purpose: schedules that mix forward and backward (1F1B); with remat "full" a tick keeps its input alone, at the price of one more
pass forward.

Legend: B rows, S stages, M micro-batches, R rounds, L layers, C = L / (S R) layers of a piece, T ticks, G groups of rows over `data` and `slice`.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bigflax.sharding import Layout, axes_of, batch_axes, current_layout, tracing_on

Layer = Callable[[Any, jax.Array, dict[str, Any], jax.Array | None], tuple[jax.Array, Any]]
Policy = Callable[..., Any]


class Plan(NamedTuple):
    """How a stack of layers runs as a pipeline: over these mesh axes, in so many stages, micro-batches and rounds."""

    axes: tuple[str, ...]
    stages: int
    micro_batches: int
    repeats: int
    pieces: int  # layers of a piece


def plan(layers: int, rows: int) -> Plan | None:
    """The plan for `layers` over a batch of `rows` in the enclosing step; None where they run one after the other.

    That is where the layout gives layers no mesh axis, or one that does not divide them; and where the step says no number of micro-batches
    (evaluation) and the rows do not divide into one for each stage. Raises ValueError where it says one that cannot be.
    """
    layout = current_layout()
    axes = () if layout is None else axes_of("layers", layers, layout.mesh, layout.table)
    if layout is None or not axes:
        return None
    _, alone, others = _inside(layout)
    stages, shares = _size(layout, axes), _size(layout, alone + others)
    micro, repeats = layout.micro_batches or stages, layout.repeats
    if micro % stages:
        raise ValueError(f"{micro} micro-batches do not fill a pipeline of {stages} stages evenly; take a multiple of {stages}")
    if layers % (stages * repeats):
        raise ValueError(f"{layers} layers do not divide into {stages} stages x {repeats} rounds; take repeats=1")
    if rows % (micro * shares):
        if layout.micro_batches is None:
            return None
        near = max(micro * shares, rows - rows % (micro * shares))
        raise ValueError(f"batch {rows} does not divide into {micro} micro-batches over {shares} devices; nearest is {near}")
    return Plan(axes, stages, micro, repeats, layers // (stages * repeats))


def check() -> None:
    """Raises ValueError where the mesh of the enclosing step has stages, and nothing traced in it so far was a pipeline."""
    if (layout := current_layout()) is None:
        return
    idle = {axis: layout.mesh.shape[axis] for axis in _axes(layout.table.get("layers")) if layout.mesh.shape.get(axis, 1) > 1}
    if idle and not layout.pipelines:
        said = ", ".join(f"{axis}={size}" for axis, size in idle.items())
        raise ValueError(
            f"the mesh has {said}, but nothing here runs as a pipeline: that takes a scanned stack of layers whose number {said} divides; "
            f"give these devices to fsdp instead"
        )


def run(
    layer: Layer, weights: Any, x: jax.Array, shared: dict[str, Any], plan: Plan, *, tied: bool = False, key: jax.Array | None = None,
    policy: Policy | None = None, keep: bool = True,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """What a scan of `layer(weights, x, shared, key) -> (x, seen)` over all layers returns: x, and `seen` with a leading layer axis.

    `weights` have a leading layer axis, unless the layers are `tied`. Arrays of `shared` with two or more dimensions, of which the first is
    that of x, are cut into micro-batches as x is; all else reaches each layer whole. What a layer returns beside x is joined from the
    micro-batches where it has a row for each of x's; where it has the same shape for any number of rows, it is a sum over them, and added.
    `key` is folded with the number of each layer and micro-batch. `policy` says what of a layer is kept for its backward pass (None: all of
    it); without `keep`, each tick keeps its input alone.
    """
    layout = current_layout()
    assert layout is not None
    layout.pipelines.append(plan)
    table, alone, rows = _inside(layout)
    axes, S, M, R, C = plan
    G, L = _size(layout, alone), S * R * C
    B, k = len(x), np.arange(M * R + S - 1)[:, None] - np.arange(S)
    m_TS, r_TS = k % (M * R) // (S * R) * S + k % S, k % (M * R) // S % R

    def place(x: jax.Array, *where: Any) -> jax.Array:
        """x with its first dimensions over these axes; the others lie as they may."""
        spec = PartitionSpec(*where, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - len(where)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))

    def cut(x: jax.Array) -> jax.Array:
        """[B, ...] as [M, G, B / (M G), ...]; every device keeps its own rows."""
        x = place(x, alone + rows).reshape(G, B // (M * G), M, *x.shape[1:])
        return place(jnp.moveaxis(x, 2, 0), None, alone, rows)

    def copies(x: jax.Array) -> jax.Array:
        """One for each stage and group of rows: so gradients are summed over those axes once, not in every tick."""
        return place(jnp.broadcast_to(x, (S, G, *x.shape)), axes, alone)

    def pieces(w: jax.Array) -> jax.Array:
        """[L, ...] as [S, G, R, C, ...]."""
        w = place(place(w.reshape(R, S, C, *w.shape[1:]), None, axes).swapaxes(0, 1), axes)
        return place(jnp.broadcast_to(w[:, None], (S, G, *w.shape[1:])), axes, alone)

    leaves, tree = jax.tree.flatten(shared)
    has_rows = [isinstance(leaf, jax.Array) and leaf.ndim > 1 and len(leaf) == B for leaf in leaves]
    is_whole = [isinstance(leaf, jax.Array) and not row for leaf, row in zip(leaves, has_rows, strict=True)]

    def call(w, x, by_rows, whole, key):
        by_rows, whole = iter(by_rows), iter(whole)
        kinds = zip(leaves, has_rows, is_whole, strict=True)
        now = [next(by_rows) if row else next(whole) if array else leaf for leaf, row, array in kinds]
        return layer(w, x, jax.tree.unflatten(tree, now), key)

    remembered = call if policy is None else jax.checkpoint(call, policy=_below_stages(policy), prevent_cse=False)

    def stage(w, x, by_rows, whole, s, m, r, g):
        """One piece of the model on one group of a micro-batch: (x, seen with a leading axis of C)."""

        def one(x, c_w):
            c, w = c_w
            fold = None if key is None else jax.random.fold_in(jax.random.fold_in(key, (r * S + s) * C + c), m * G + g)
            return remembered(w, x, by_rows, whole, fold)

        if tied:
            return jax.lax.scan(lambda x, c: one(x, (c, w)), x, jnp.arange(C))
        w = jax.tree.map(lambda w: w[0] if R == 1 else jax.lax.dynamic_index_in_dim(w, r, keepdims=False), w)
        return jax.lax.scan(one, x, (jnp.arange(C), w))

    stage = stage if keep else jax.checkpoint(stage, prevent_cse=False)
    per_stage = jax.tree.map(copies if tied else pieces, weights)
    by_rows = [leaf for leaf, row in zip(leaves, has_rows, strict=True) if row]
    whole = [leaf for leaf, array in zip(leaves, is_whole, strict=True) if array]
    of_stage = lambda s: (jnp.arange(S) == s).reshape(S, *[1] * (x.ndim + 1))
    run_groups = jax.vmap(stage, (0, 0, 0, 0, None, None, None, 0), spmd_axis_name=alone)
    run_stages = jax.vmap(run_groups, (0, 0, 0, 0, 0, 0, 0, None), spmd_axis_name=axes)

    def tick(state, now):
        fresh, by_rows, m, r = now
        state = jnp.where(of_stage(0) & (r[0] == 0), fresh, state)
        with tracing_on(layout.mesh, table):
            out, seen = run_stages(per_stage, state, by_rows, copied, jnp.arange(S), m, r, jnp.arange(G))
        return place(_hand_on(place(out, axes, alone, rows)), axes, alone, rows), (out, seen)

    copied, x_M = [copies(leaf) for leaf in whole], cut(x)
    to_stages = lambda x: place(jnp.broadcast_to(x[:, None], (len(x), S, *x.shape[1:])), None, axes, alone, rows)
    given = [place(cut(leaf)[m_TS], None, axes, alone, rows) for leaf in by_rows]
    now = to_stages(x_M[m_TS[:, 0]]), given, jnp.asarray(m_TS), jnp.asarray(r_TS)
    _, (out, seen) = jax.lax.scan(tick, to_stages(x_M[:1])[0], now)

    last = out[S - 1 :].reshape(M // S, R, S, *out.shape[1:])[:, -1].reshape(M, *out.shape[1:])
    y = jnp.moveaxis(jnp.sum(jnp.where(of_stage(S - 1), last, 0), axis=1), 0, 2).reshape(x.shape)
    if not jax.tree.leaves(seen):
        return y, seen
    shapes = jax.eval_shape(call, weights if tied else jax.tree.map(lambda w: w[0], weights), x, by_rows, whole, key)[1]

    def joined(x, like):
        """[T, S, G, C, ...] as [L, ...]: of each stage the M R ticks that were no bubbles, in the order of layers and rows."""
        x = jax.vmap(lambda x, s: jax.lax.dynamic_slice_in_dim(x, s, M * R), (1, 0), spmd_axis_name=axes)(x, jnp.arange(S))
        x = jnp.moveaxis(x.reshape(S, M // S, R, S, G, C, *x.shape[4:]), (2, 0, 5, 4), (0, 1, 2, 3)).reshape(L, G, M, *x.shape[4:])
        return jnp.sum(x, axis=(1, 2)) if x.shape[3:] == like.shape else jnp.moveaxis(x, 2, 3).reshape(L, *like.shape)

    return y, jax.tree.map(joined, seen, shapes)


def _inside(layout: Layout) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """(the table within a stage, axes that carry nothing but rows, the other axes of rows). A micro-batch lies over the latter two."""
    tuples = {name: _axes(axes) for name, axes in layout.table.items()}
    rows = [axis for axis in batch_axes(layout.mesh, layout.table) if axis not in tuples["layers"]]
    others = {axis for name, axes in tuples.items() if name != "batch" for axis in axes}
    alone = tuple(itertools.takewhile(lambda axis: axis not in others, rows))
    taken = {*tuples["layers"], *alone}
    return {name: tuple(axis for axis in axes if axis not in taken) for name, axes in tuples.items()}, alone, tuple(rows[len(alone) :])


def _axes(axes: str | Iterable[str] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _size(layout: Layout, axes: Iterable[str]) -> int:
    return math.prod(layout.mesh.shape[axis] for axis in axes)


@jax.custom_vjp
def _hand_on(x: jax.Array) -> jax.Array:
    """Each stage's output to the next one: one collective-permute forward and one back, where the derivative of a roll would be two."""
    return jnp.roll(x, 1, axis=0)


_hand_on.defvjp(lambda x: (_hand_on(x), None), lambda _, g: (jnp.roll(g, -1, axis=0),))


def _below_stages(policy: Policy) -> Policy:
    """The policy of a layer, under the `vmap` over stages and groups: a product's first two batch dimensions are these, and not seen."""

    def keeps(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive is jax.lax.dot_general_p:
            contracted, (left, right) = params["dimension_numbers"]
            params = params | {"dimension_numbers": (contracted, (left[2:], right[2:]))}
        return policy(primitive, *avals, **params)

    return keeps
