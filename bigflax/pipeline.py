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

What it costs: weights that lie over fsdp are gathered in every tick, not once a pass; the input is gathered over the stages, and the output summed
over them, once a step. Left out on purpose: schedules that mix forward and backward (1F1B); with remat "full" a tick keeps its input alone.

Legend: B rows, S stages, M micro-batches, R rounds, L layers, C = L / (S R) layers of a piece, T ticks.
"""

from collections.abc import Callable
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
    stages = int(np.prod([layout.mesh.shape[axis] for axis in axes]))
    micro, repeats = layout.micro_batches or stages, layout.repeats
    shares = int(np.prod([layout.mesh.shape[axis] for axis in _inside(layout)[1]]))
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


def check(layout: Layout) -> None:
    """Raises ValueError where the mesh has stages and nothing traced under the layout was a pipeline: its devices would all do the same."""
    idle = {axis: size for axis, size in layout.mesh.shape.items() if size > 1 and axis == layout.table.get("layers")}
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
    table, rows = _inside(layout)
    axes, S, M, R, C = plan
    B, k = len(x), np.arange(M * R + S - 1)[:, None] - np.arange(S)
    m_TS, r_TS = k % (M * R) // (S * R) * S + k % S, k % (M * R) // S % R

    def place(x: jax.Array, *where: Any) -> jax.Array:
        """x with its first dimensions over these axes; the others lie as they may."""
        spec = PartitionSpec(*where, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - len(where)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))

    cut = lambda x: place(place(x, rows).reshape(B // M, M, *x.shape[1:]).swapaxes(0, 1), None, rows)
    join = lambda x: x.swapaxes(0, 1).reshape(B, *x.shape[2:])
    # A copy for each stage: its gradient is then summed over the stages once, not in every tick.
    copies = lambda x: place(jnp.broadcast_to(x, (S, *x.shape)), axes)
    pieces = lambda w: place(place(w.reshape(R, S, C, *w.shape[1:]), None, axes).swapaxes(0, 1), axes)

    leaves, tree = jax.tree.flatten(shared)
    has_rows = [isinstance(leaf, jax.Array) and leaf.ndim > 1 and len(leaf) == B for leaf in leaves]
    is_whole = [isinstance(leaf, jax.Array) and not row for leaf, row in zip(leaves, has_rows, strict=True)]

    def call(w, x, by_rows, whole, key):
        by_rows, whole = iter(by_rows), iter(whole)
        kinds = zip(leaves, has_rows, is_whole, strict=True)
        now = [next(by_rows) if row else next(whole) if array else leaf for leaf, row, array in kinds]
        return layer(w, x, jax.tree.unflatten(tree, now), key)

    remembered = call if policy is None else jax.checkpoint(call, policy=_below_stages(policy), prevent_cse=False)

    def stage(w, x, by_rows, whole, s, m, r):
        """One piece of the model on one micro-batch: (x, seen with a leading axis of C)."""

        def one(x, c_w):
            c, w = c_w
            fold = None if key is None else jax.random.fold_in(jax.random.fold_in(key, (r * S + s) * C + c), m)
            return remembered(w, x, by_rows, whole, fold)

        if tied:
            return jax.lax.scan(lambda x, c: one(x, (c, w)), x, jnp.arange(C))
        w = jax.tree.map(lambda w: w[0] if R == 1 else jax.lax.dynamic_index_in_dim(w, r, keepdims=False), w)
        return jax.lax.scan(one, x, (jnp.arange(C), w))

    stage = stage if keep else jax.checkpoint(stage, prevent_cse=False)
    per_stage = jax.tree.map(copies if tied else pieces, weights)
    by_rows = [leaf for leaf, row in zip(leaves, has_rows, strict=True) if row]
    whole = [leaf for leaf, array in zip(leaves, is_whole, strict=True) if array]
    of_stage = lambda s: (jnp.arange(S) == s).reshape(S, *[1] * x.ndim)

    def tick(state, now):
        fresh, by_rows, m, r = now
        state = jnp.where(of_stage(0) & (r[0] == 0), fresh, state)
        with tracing_on(layout.mesh, table):
            out, seen = jax.vmap(stage, spmd_axis_name=axes)(per_stage, state, by_rows, copied, jnp.arange(S), m, r)
        return place(jnp.roll(place(out, axes, rows), 1, axis=0), axes, rows), (out, seen)

    copied, x_M = [copies(leaf) for leaf in whole], cut(x)
    fresh = place(jnp.broadcast_to(x_M[m_TS[:, 0]][:, None], (len(m_TS), S, *x_M.shape[1:])), None, axes, rows)
    given = [place(cut(leaf)[m_TS], None, axes, rows) for leaf in by_rows]
    start = place(jnp.broadcast_to(x_M[0], (S, *x_M.shape[1:])), axes, rows)
    _, (out, seen) = jax.lax.scan(tick, start, (fresh, given, jnp.asarray(m_TS), jnp.asarray(r_TS)))

    last = out[S - 1 :].reshape(M // S, R, S, *out.shape[1:])[:, -1].reshape(M, *out.shape[1:])
    y = join(jnp.sum(jnp.where(of_stage(S - 1), last, 0), axis=1))
    if not jax.tree.leaves(seen):
        return y, seen
    shapes = jax.eval_shape(call, weights if tied else jax.tree.map(lambda w: w[0], weights), x, by_rows, whole, key)[1]

    def whole_again(x, like):
        """[T, S, C, ...] as [L, ...]: of each stage the M R ticks that were no bubbles, in the order of layers and rows."""
        x = jax.vmap(lambda x, s: jax.lax.dynamic_slice_in_dim(x, s, M * R), (1, 0), spmd_axis_name=axes)(x, jnp.arange(S))
        x = x.reshape(S, M // S, R, S, *x.shape[2:])
        x = jnp.moveaxis(x, (2, 0, 4), (0, 1, 2)).reshape(L, M, *x.shape[5:])
        if x.shape[2:] == like.shape:
            return jnp.sum(x, axis=1)
        return x.swapaxes(1, 2).reshape(len(x), *like.shape)

    L = S * R * C
    return y, jax.tree.map(whole_again, seen, shapes)


def _inside(layout: Layout) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The table within a stage, where its mesh axes are taken, and the axes over which the rows of a micro-batch lie."""
    taken = layout.table["layers"]
    taken = (taken,) if isinstance(taken, str) else tuple(taken)
    table = {name: tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if a not in taken) for name, axes in layout.table.items()}
    return table, batch_axes(layout.mesh, table)


def _below_stages(policy: Policy) -> Policy:
    """The policy of one stage, under the `vmap` over all: a product's first batch dimension is that of the stages, and not seen."""

    def keeps(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive is jax.lax.dot_general_p:
            contracted, (left, right) = params["dimension_numbers"]
            params = params | {"dimension_numbers": (contracted, (left[1:], right[1:]))}
        return policy(primitive, *avals, **params)

    return keeps
