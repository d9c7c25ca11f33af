"""Mixtures of experts: a router chooses C of E small networks for each token, and their outputs are added, weighted by its gates.

    p = softmax(x r),    y = sum over the C largest p_e of gate_e f_e(x),    gate_e = p_e, or p_e / (their sum) where `normalize` says so

A softmax over the C largest logits alone (top-k first) is the normalized one: exp(l_e) / sum of the chosen exp(l). So there is one way.

    reference   every expert computes every token: E f-products a token, plain einsums
    ragged      rows sorted by expert, one grouped product a weight, sorted back: C f-products a token
    exchange    the same after each row has travelled to the device of its expert (`lax.ragged_all_to_all`)
    capacity    so too, but by a plain all-to-all and in plain products: each device has so many places for each expert, and drops what is over

On a mesh all run below `shard_map`. Tokens lie over the axis of `experts` as over any data axis; in a group of n devices along it each holds E / n
experts, their width gathered once a pass (FSDP), their columns over the axis of `mlp`, over which the outputs are summed. The first two collect
the tokens of the whole group and scatter the sums: (n - 1) M D numbers a device each way, forward and backward, with M its tokens. The other
two send (n - 1) / n C M D (capacity: times its factor, full or not). So the default is the reference on a CPU, where a grouped product is itself a dense one
over E copies of the rows; else ragged where n <= C, and exchange beyond. Neither drops. Where the number of experts does not divide over their
axis, it carries their width like one more axis of FSDP, and no token travels; where the batch does not, each device takes of all tokens what is its own.

Nothing dropped means room for the worst case, n M min(C, E / n) rows of D, and F, on a device, though only those that came are multiplied; with a
`capacity_factor` for factor C M, which `capacity` always has. Then what is dropped is counted: nobody loses rows without seeing it. One layer of
128 experts, 8 chosen, D 2048, F 768, over eight v5p of 4096 tokens each, bfloat16, all recomputed on the way back, temporaries of the TPU's compiler:
ragged 4.3 GiB, exchange 5.2 and with a factor of 2 1.2, capacity of 1.25 0.92 and of 2 1.3.

The load-balance loss of Switch Transformers (Fedus et al. 2021, arXiv 2101.03961, equations 4-6), over all layers at once as transformers has it:
E sum_e (choices of e / tokens) (mean p_e). It is C where all experts are chosen alike, and grows to E C where C experts take all. Capacity is theirs
too (section 2.2), and GShard's (Lepikhin et al. 2020, 2006.16668), where likelier choices go first; grouped products that drop none: MegaBlocks
(Gale et al. 2022, 2211.15841).

Left out on purpose: rows sent once to a device on which several experts chose them; what ragged sends is already less where that would count.

Shapes: B batch, T time, D width, F an expert's width, E experts, C choices a token, M tokens, R = C M rows, S places for rows, n devices a group.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bigflax.ops.matmul import einsum
from bigflax.ops.observed import told, watched
from bigflax.sharding import Table, axes_of, current_layout, platform, spec
from bigflax.weights import LoRA, Observed, Quantized, Seen, Weight, dense, parse_axes, part_axes, shape

Product = Callable[[jax.Array, Weight], jax.Array]
Params = Mapping[str, Weight]
TILE = 512  # rows at once of the grouped product on a TPU


class Group(NamedTuple):
    """The devices that share the experts among them: along `axes`, over which tokens lie too (`dealt`) or are whole."""

    axes: tuple[str, ...] = ()
    dealt: bool = False


def _devices(group: Group) -> int:
    return jax.lax.axis_size(group.axes) if group.axes else 1


def route(logits_BTE: jax.Array, choices: int, *, normalize: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(probabilities [B, T, E] in float32, gates [B, T, C] in float32, the experts chosen [B, T, C]), the likeliest first."""
    if not 1 <= choices <= logits_BTE.shape[-1]:
        raise ValueError(f"{choices} experts a token cannot be chosen from {logits_BTE.shape[-1]}")
    probs_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32))
    gates_BTC, chosen_BTC = jax.lax.top_k(probs_BTE, choices)
    return probs_BTE, gates_BTC / jnp.sum(gates_BTC, -1, keepdims=True) if normalize else gates_BTC, chosen_BTC


def mixture(
    expert: Callable[[jax.Array, Params, Product], jax.Array], x_BTD: jax.Array, gates_BTC: jax.Array, chosen_BTC: jax.Array, params: Params,
    axes: Mapping[str, str], *, implementation: str | None = None, capacity_factor: float | None = None, real_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """(sum_c gates[..., c] f_{chosen[..., c]}(x), [B, T, D] in x's dtype, where f_e(x) is `expert(x, params, product)`; choices dropped, int32 []).

    `product(x, w)` multiplies each row by its own expert's matrix of w [E, in, out], which may be typed; `axes` are those weights' axis
    strings. A LoRA goes through its rank everywhere; a Quantized is multiplied as it is by the reference and under capacity, and made dense for
    grouped products; others are made dense. An Observed sees of each expert the rows that it is sent, and keeps the mixture whole on a mesh.

    With "capacity" an expert takes `capacity_factor` C M / E rows of a device's M tokens, 1.25 where None is said; else a device takes that many
    times its share of its group's rows, and None means all. Where rows can be dropped, tokens that are not `real_BT` take no room, and what they
    choose adds nothing, nor while an Observed looks; where they cannot, None are counted.
    """
    if implementation is None:
        implementation = _choose(x_BTD, chosen_BTC, params, axes)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"a mixture has no implementation {implementation!r}; take one of {', '.join(IMPLEMENTATIONS)}, or None to choose")
    if implementation in GROUPED and _staged() and platform() != "tpu":
        raise ValueError(
            f"{implementation!r} runs below stages on a TPU alone: JAX cannot batch its grouped product; take 'capacity' or 'reference'"
        )
    drops = implementation == "capacity" or (capacity_factor is not None and implementation != "reference")
    if (drops or _observed(params)) and real_BT is not None:
        chosen_BTC = jnp.where(real_BT[..., None], chosen_BTC, shape(next(iter(params.values())))[0])
    local = functools.partial(IMPLEMENTATIONS[implementation], expert, capacity_factor)
    y_BTD, dropped = _on_mesh(local, x_BTD, gates_BTC.astype(x_BTD.dtype), chosen_BTC, params, axes)
    return y_BTD, dropped if drops else None


def router_sums(
    probs_BTE: jax.Array, chosen_BTC: jax.Array, real_BT: jax.Array | None, dropped: jax.Array | None = None
) -> dict[str, jax.Array]:
    """What one layer adds to the load-balance loss: how often each expert was chosen [E], its probabilities' sum [E], how many tokens [];
    and how many choices were "dropped" [], where they are counted."""
    E = probs_BTE.shape[-1]
    real_BT1 = jnp.ones((*probs_BTE.shape[:2], 1)) if real_BT is None else real_BT[..., None].astype(jnp.float32)
    times_BTE = jnp.sum(jax.nn.one_hot(chosen_BTC, E), axis=2)
    sums = {"chosen": jnp.sum(times_BTE * real_BT1, (0, 1)), "probs": jnp.sum(probs_BTE * real_BT1, (0, 1)), "tokens": jnp.sum(real_BT1)}
    return sums if dropped is None else {**sums, "dropped": dropped}


def load_balance(sums: Mapping[str, jax.Array]) -> jax.Array:
    """The load-balance loss of all layers, whose `router_sums` have a leading layer axis; its gradient goes through the probabilities."""
    tokens = jnp.maximum(jnp.sum(sums["tokens"]), 1)
    return sums["probs"].shape[-1] * jnp.sum(jnp.sum(sums["chosen"], 0) / tokens * (jnp.sum(sums["probs"], 0) / tokens))


def dropped_share(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """{"dropped": the share of all layers' choices that were dropped}, or nothing where `router_sums` do not count them."""
    return {} if "dropped" not in sums else {"dropped": jnp.sum(sums["dropped"]) / jnp.maximum(jnp.sum(sums["chosen"]), 1)}


# -- on a mesh -------------------------------------------------------------------------------------------------------------


def _group(x_BTD: jax.Array, params: Params, axes: Mapping[str, str], mesh: Any, table: Table) -> tuple[Group, Table, PartitionSpec]:
    """Who shares the experts, the mesh axes that each device's part of the weights keeps, and how the tokens lie."""
    rows = spec(("batch", "seq", None), x_BTD.shape, mesh, table)
    taken = {axis for lies in rows for axis in _each(lies)}
    sizes = {name: size for key, text in axes.items() for name, size in zip(parse_axes(text).names, shape(params[key]), strict=True)}
    experts = axes_of("experts", sizes["experts"], mesh, table)
    columns = axes_of("mlp", sizes["mlp"], mesh, table, (*taken, *experts))
    if 0 < len(taken & {*experts}) < len(experts):
        experts = tuple(axis for axis in experts if axis not in taken)
    return Group(experts, bool(taken & {*experts})), {"experts": experts, "mlp": columns}, rows


def _staged() -> bool:
    layout = current_layout()
    return layout is not None and layout.mesh.shape.get("stage", 1) > 1


def _choose(x_BTD, chosen_BTC, params, axes) -> str:
    layout = current_layout()
    if platform() == "cpu" or (_staged() and platform() != "tpu"):
        return "reference"
    if layout is None:
        return "ragged"
    group = _group(x_BTD, params, axes, layout.mesh, layout.table)[0]
    n = math.prod(layout.mesh.shape[axis] for axis in group.axes)
    return "exchange" if group.dealt and n > chosen_BTC.shape[-1] else "ragged"


def _on_mesh(local, x_BTD, gates_BTC, chosen_BTC, params, axes):
    """`local(x_MD, gates_CM, chosen_CM, params, group)` on each device's tokens and its part of the weights."""

    def flat(x_BTD, gates_BTC, chosen_BTC, params, group):
        of = lambda x_BTC: x_BTC.reshape(-1, x_BTC.shape[-1])
        y_MD, dropped = local(of(x_BTD), of(gates_BTC).T, of(chosen_BTC).T, params, group)
        return y_MD.reshape(x_BTD.shape), dropped

    params = {name: _narrow(w, x_BTD.dtype) for name, w in params.items()}
    layout = current_layout()
    if layout is None or math.prod(layout.mesh.shape.values()) == 1 or _observed(params):
        return flat(x_BTD, gates_BTC, chosen_BTC, params, Group())
    mesh, table, *_ = layout
    group, kept, rows = _group(x_BTD, params, axes, mesh, table)
    of_part = lambda table: lambda part, text: spec(parse_axes(text).names, part.shape, mesh, table)
    lie = lambda table: {name: jax.tree.map(of_part(table), w, part_axes(w, axes[name])) for name, w in params.items()}
    stored, inner = lie(table), lie(kept)
    summed = (*(() if group.dealt else group.axes), *kept["mlp"])
    everywhere = tuple({axis: None for lies in (*rows, group.axes) for axis in _each(lies)})

    def device(x_BTD, gates_BTC, chosen_BTC, params):
        params = jax.tree.map(_gather, params, stored, inner)
        y_BTD, dropped = flat(x_BTD, gates_BTC, chosen_BTC, params, group)
        return y_BTD[None], jax.lax.psum(dropped, everywhere) if everywhere else dropped

    # Without the check of what varies over which axis, which Pallas kernels cannot pass. Sums over the columns are taken outside: inside, they
    # would be taken again on the way back.
    spread = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(rows, rows, rows, stored),
        out_specs=(PartitionSpec(summed or None, *rows), PartitionSpec()),
        check_vma=False,
    )
    y_SBTD, dropped = spread(x_BTD, gates_BTC, chosen_BTC, params)
    return jax.lax.reduce_sum(y_SBTD, axes=(0,)), dropped


def _observed(params: Params) -> bool:
    return any(isinstance(w, Observed) for w in params.values())


def _each(lies: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if lies is None else (lies,) if isinstance(lies, str) else tuple(lies)


def _gather(part: jax.Array, stored: PartitionSpec, inner: PartitionSpec) -> jax.Array:
    """A part of a weight as it lies, made whole but for the axes of `inner`; its gradient is scattered the same way."""
    for i, lies in enumerate(stored):
        kept = inner[i] if i < len(inner) else None
        over = tuple(axis for axis in _each(lies) if axis not in _each(kept))
        part = jax.lax.all_gather(part, over, axis=i, tiled=True) if over else part
    return part


def _narrow(w: Weight, dtype: Any) -> Weight:
    """Floats in the dtype of the product before they are gathered; integers as they are, unless their scales are shared by groups of inputs, which
    a shard of columns may cut."""
    if isinstance(w, LoRA):
        return dataclasses.replace(w, base=_narrow(w.base, dtype), a=w.a.astype(dtype), b=w.b.astype(dtype), key=None)
    if isinstance(w, Observed):
        return dataclasses.replace(w, base=_narrow(w.base, dtype))
    if isinstance(w, Quantized) and all(part in (1, whole) for part, whole in zip(w.scale.shape, w.qvalue.shape, strict=True)):
        return w
    return dense(w).astype(dtype)


# -- rows and their places -------------------------------------------------------------------------------------------------
# row_S says which row, c M + m for the choice c of token m, lies in a place, R where none does; place_R where a row lies, S where nowhere.


def _sort(expert_R: jax.Array, E: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rows in the order of their experts, the place of each row in that order, how many rows each of the experts 0 to E - 1 has)."""
    order_R = jnp.argsort(expert_R, stable=True)
    return order_R, jnp.argsort(order_R), jnp.sum(expert_R[:, None] == jnp.arange(E), 0, dtype=jnp.int32)


@jax.custom_vjp
def _spread(x_MD: jax.Array, row_S: jax.Array, place_CM: jax.Array) -> jax.Array:
    """The token of each place's row, zeros where there is none. A gather both ways, where the gradient of one would be a scatter."""
    M = x_MD.shape[0]
    return x_MD.at[jnp.where(row_S < place_CM.size, row_S % M, M)].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _collect(y_SD: jax.Array, row_S: jax.Array, place_CM: jax.Array) -> jax.Array:
    """What lies in the place of each row, [C, M, D], zeros where it has none."""
    return y_SD.at[place_CM].get(mode="fill", fill_value=0)


def _spread_back(index, g_SD):
    return jnp.sum(_collect(g_SD, *index), 0), None, None


def _collect_back(index, g_CMD):
    row_S, _ = index
    return g_CMD.reshape(-1, g_CMD.shape[-1]).at[row_S].get(mode="fill", fill_value=0), None, None


_spread.defvjp(lambda x_MD, *index: (_spread(x_MD, *index), index), _spread_back)
_collect.defvjp(lambda y_SD, *index: (_collect(y_SD, *index), index), _collect_back)


def _room(tokens: int, choices: int, experts: int, n: int, factor: float | None) -> int:
    """Places on one of n devices of `experts` each for the rows of their tokens: all that could come, or `factor` times its share. On a TPU whole
    tiles of its kernel."""
    most = tokens * min(choices, experts)
    rows = most if factor is None else min(most, math.ceil(factor * choices * tokens / n))
    tile = 1 if platform() != "tpu" else TILE if rows > TILE else 16
    return -(-rows // tile) * tile


# -- the ways --------------------------------------------------------------------------------------------------------------


def _reference(expert, factor, x_MD, gates_CM, chosen_CM, params, group):
    """What the experts of this device add to each token of the group, by way of all that they make of it."""

    def of_all(x_MD, gates_CM, mine_CM, E):
        whose_CME = jax.nn.one_hot(mine_CM, E, dtype=x_MD.dtype)
        y_EMD = expert(x_MD, params, functools.partial(_by_all, lambda: jnp.sum(whose_CME, 0).T))
        share_EM = jnp.einsum("cme,cm->em", whose_CME, gates_CM)
        return jnp.einsum("emd,em->md", y_EMD, share_EM), jnp.int32(0)

    return _together(of_all, x_MD, gates_CM, chosen_CM, params, group)


def _ragged(expert, factor, x_MD, gates_CM, chosen_CM, params, group):
    """The same, of the rows that chose them. Those without room are the last expert's."""

    def of_chosen(x_MD, gates_CM, mine_CM, E):
        mine_R = jnp.where((mine_CM >= 0) & (mine_CM < E), mine_CM, E).reshape(-1)  # E: another device's, sorted behind all of ours
        order_R, place_R, sizes_E = _sort(mine_R, E)
        S, ours = _room(x_MD.shape[0], len(mine_CM), E, _devices(group), factor), jnp.sum(sizes_E)
        row_S = jnp.where(jnp.arange(S) < ours, jnp.resize(order_R, (S,)), mine_R.size)
        place_CM = jnp.where(place_R < ours, place_R, S).reshape(mine_CM.shape)
        kept_E = jnp.clip(S - jnp.cumsum(sizes_E) + sizes_E, 0, sizes_E)
        y_SD = expert(_spread(x_MD, row_S, place_CM), params, functools.partial(_grouped, kept_E))
        return jnp.einsum("cmd,cm->md", _collect(y_SD, row_S, place_CM), gates_CM), ours - jnp.sum(kept_E)

    return _together(of_chosen, x_MD, gates_CM, chosen_CM, params, group)


def _together(of, x_MD, gates_CM, chosen_CM, params, group):
    """`of(x_MD, gates_CM, chosen_CM, E)` for all tokens of the group, each choice counted from this device's first expert; of the sums each device
    gets those of its own tokens."""
    E = shape(next(iter(params.values())))[0]
    if group.dealt:
        x_MD = jax.lax.all_gather(x_MD, group.axes, tiled=True)
        gates_CM, chosen_CM = (jax.lax.all_gather(x, group.axes, axis=1, tiled=True) for x in (gates_CM, chosen_CM))
    y_MD, dropped = of(x_MD, gates_CM, chosen_CM - (jax.lax.axis_index(group.axes) * E if group.axes else 0), E)
    return jax.lax.psum_scatter(y_MD, group.axes, tiled=True) if group.dealt else y_MD, dropped


def _exchange(expert, factor, x_MD, gates_CM, chosen_CM, params, group):
    """Each row to the device of its expert and back. What arrives lies there by expert, then by sender: no second sort. What has no room stays."""
    if not group.dealt:
        return _ragged(expert, factor, x_MD, gates_CM, chosen_CM, params, group)
    me, n, mine = jax.lax.axis_index(group.axes), _devices(group), shape(next(iter(params.values())))[0]
    (C, M), E = chosen_CM.shape, n * mine
    S = _room(n * M, C, mine, n, factor)
    order_R, place_R, sizes_E = _sort(chosen_CM.reshape(-1), E)
    sizes_nE = jax.lax.all_gather(sizes_E, group.axes)
    start_nE = jnp.cumsum(sizes_nE, 1) - sizes_nE  # of an expert's rows on their sender
    total_ne = jnp.sum(sizes_nE, 0).reshape(n, mine)
    there_nE = (jnp.cumsum(total_ne, 1) - total_ne).reshape(E) + jnp.cumsum(sizes_nE, 0) - sizes_nE  # and on their expert's device
    sent_nE = jnp.clip(S - there_nE, 0, sizes_nE)
    here = lambda x_nE: jax.lax.dynamic_slice_in_dim(x_nE, me * mine, mine, 1)
    out = (start_nE[me], sent_nE[me], there_nE[me], here(sent_nE).reshape(-1))
    back = (here(there_nE).reshape(-1), here(sent_nE).reshape(-1), here(start_nE).reshape(-1), sent_nE[me])
    place_CM = place_R.reshape(C, M)
    move = _ragged_all_to_all if platform() == "cpu" else jax.lax.ragged_all_to_all
    x_SD = _carry((move, group.axes, S, C * M), _spread(x_MD, order_R, place_CM), out, back)
    y_SD = expert(x_SD, params, functools.partial(_grouped, jnp.sum(here(sent_nE), 0)))
    y_CMD = _collect(_carry((move, group.axes, C * M, S), y_SD, back, out), order_R, place_CM)
    return jnp.einsum("cmd,cm->md", y_CMD, gates_CM), jnp.sum(sizes_nE[me] - sent_nE[me])


def _capacity(expert, factor, x_MD, gates_CM, chosen_CM, params, group):
    """As many places for each expert on each device; a row that finds none is dropped, likelier choices and earlier tokens first to have one."""
    mine, (C, M) = shape(next(iter(params.values())))[0], chosen_CM.shape
    E = mine * _devices(group)
    K = min(M, math.ceil((1.25 if factor is None else factor) * C * M / E))
    expert_R = chosen_CM.reshape(-1)
    order_R, place_R, sizes_E = _sort(expert_R, E)
    start_E, free_K = jnp.cumsum(sizes_E) - sizes_E, jnp.arange(K)
    row_EK = jnp.where(free_K < sizes_E[:, None], order_R.at[start_E[:, None] + free_K].get(mode="clip"), C * M)
    turn_R = place_R - start_E.at[expert_R].get(mode="clip")
    place_CM = jnp.where((expert_R < E) & (turn_R < K), expert_R * K + turn_R, E * K).reshape(C, M)
    x_EKD, over_E = _spread(x_MD, row_EK.reshape(-1), place_CM).reshape(E, K, -1), jnp.maximum(sizes_E - K, 0)
    if group.dealt:
        x_EKD = jax.lax.all_to_all(x_EKD, group.axes, 0, 1, tiled=True)  # [E / n, n K, D]
    elif group.axes:
        first = jax.lax.axis_index(group.axes) * mine
        x_EKD, over_E = (jax.lax.dynamic_slice_in_dim(x, first, mine) for x in (x_EKD, over_E))
    y_EKD = expert(x_EKD, params, functools.partial(_by_all, lambda: row_EK < C * M))
    if group.dealt:
        y_EKD = jax.lax.all_to_all(y_EKD, group.axes, 1, 0, tiled=True)
    elif group.axes:
        y_EKD = jax.lax.dynamic_update_slice_in_dim(jnp.zeros((E, *y_EKD.shape[1:]), y_EKD.dtype), y_EKD, first, 0)
    y_CMD = _collect(y_EKD.reshape(E * K, -1), row_EK.reshape(-1), place_CM)
    return jnp.einsum("cmd,cm->md", y_CMD, gates_CM), jnp.sum(over_E)


def _by_all(whose_ER: Callable[[], jax.Array], x: jax.Array, w: Weight) -> jax.Array:
    """Rows [R, in], or of each expert its own [E, R, in], times each expert's matrix. `whose_ER()` says which rows are sent to whom, for who looks."""
    spec = "rd,edf->erf" if x.ndim == 2 else "erd,edf->erf"
    if isinstance(w, Observed):
        return watched(w, einsum(spec, x, w.base), x, whose_ER().astype(jnp.float32))
    return einsum(spec, x, w)


IMPLEMENTATIONS = {"reference": _reference, "ragged": _ragged, "exchange": _exchange, "capacity": _capacity}
GROUPED = ("ragged", "exchange")  # whose products are of rows sorted by expert


# -- what the platforms differ in ------------------------------------------------------------------------------------------


def _grouped(sizes_E: jax.Array, x_SD: jax.Array, w: Weight) -> jax.Array:
    """Each row times its expert's matrix, rows sorted by expert. Those behind the last are whatever the backend leaves there, forward and backward."""
    if isinstance(w, LoRA):
        return _grouped(sizes_E, x_SD, w.base) + _grouped(sizes_E, _grouped(sizes_E, x_SD, w.a), w.b) * w.scale
    if isinstance(w, Observed):
        return told(w, _grouped(sizes_E, x_SD, w.base), _seen(sizes_E, x_SD, w.seen))
    w = dense(w).astype(x_SD.dtype)
    if platform() == "tpu":
        return _gmm(x_SD, w, sizes_E)
    ours_S1 = (jnp.arange(x_SD.shape[0]) < jnp.sum(sizes_E))[:, None]
    return jnp.where(ours_S1, jax.lax.ragged_dot(jnp.where(ours_S1, x_SD, 0), w, sizes_E), 0)


def _seen(sizes_E: jax.Array, x_SD: jax.Array, wanted: Seen) -> Seen:
    """Statistics of each expert's rows, sorted by expert. The sum of x x^T is what a grouped product gives back to its weights for a gradient of x."""
    E, D = len(sizes_E), x_SD.shape[1]
    expert_S = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_SD.shape[0]), side="right")
    x_SD = jnp.where((expert_S < E)[:, None], jax.lax.stop_gradient(x_SD).astype(jnp.float32), 0)
    hessian = lambda: jax.vjp(lambda w: _grouped(sizes_E, x_SD, w), jnp.zeros((E, D, D)))[1](x_SD)[0]
    size = lambda: jnp.einsum("se,sd->ed", jax.nn.one_hot(expert_S, E), jnp.abs(x_SD))
    peak = lambda: jnp.maximum(jax.ops.segment_max(jnp.abs(x_SD), expert_S, E + 1)[:E], 0)
    wants = lambda part, of: None if part is None else of()
    return Seen(
        sizes_E.astype(jnp.float32), wants(wanted.hessian, hessian), wants(wanted.size, size), wants(wanted.peak, peak),
        wants(wanted.often, lambda: jnp.zeros_like(wanted.often)),
    )  # fmt: skip


# Backward rules are traced when the gradient is, perhaps outside of the layout: what it decides is decided on the way forward.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gmm(x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """The grouped product as a Pallas kernel that visits only tiles with rows: the weight gradient of `lax.ragged_dot` is dense on a TPU."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # half a second

    return gmm(x_SD, w_EDF, sizes_E, x_SD.dtype, _tiles, interpret=interpret)


def _gmm_back(interpret, saved, g_SF):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    x_SD, w_EDF, sizes_E = saved
    dx_SD = gmm(g_SF, w_EDF, sizes_E, x_SD.dtype, _tiles, transpose_rhs=True, interpret=interpret)
    return dx_SD, tgmm(x_SD.T, g_SF, sizes_E, w_EDF.dtype, _tiles, interpret=interpret), None


_gmm.defvjp(lambda x, w, sizes, interpret: (_gmm(x, w, sizes, interpret), (x, w, sizes)), _gmm_back)


def _tiles(S: int, D: int, F: int) -> tuple[int, int, int]:
    return min(S, TILE), min(D, 1024), min(F, 1024)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _carry(how: tuple, x_RD: jax.Array, out: tuple, back: tuple) -> jax.Array:
    """`move`, a `lax.ragged_all_to_all`, of rows into S places along `axes`, where `how` is (move, axes, S, R). `out` are its offsets and sizes,
    `back` those of the way back."""
    move, axes, S, _ = how
    return move(x_RD, jnp.zeros((S, x_RD.shape[1]), x_RD.dtype), *out, axis_name=axes)


def _carry_back(how, saved, g_SD):
    move, axes, S, R = how
    return _carry((move, axes, R, S), g_SD, *saved[::-1]), None, None


_carry.defvjp(lambda how, x_RD, *ways: (_carry(how, x_RD, *ways), ways), _carry_back)


def _ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` for the CPU, which has none: everybody sees everything, and takes what is its own."""
    me, n, at = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name), jnp.arange(output.shape[0])[:, None]
    everyone = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    mine = lambda x_K: everyone(x_K).reshape(n, n, -1)[:, me]
    rows, *slices = (everyone(operand), *map(mine, (input_offsets, send_sizes, output_offsets)))
    for row_RD, start_k, size_k, place_k in zip(rows, *slices, strict=True):
        hit = (at >= place_k) & (at < place_k + size_k)
        found_SD = row_RD[jnp.sum(jnp.where(hit, start_k + at - place_k, 0), 1)]
        output = jnp.where(jnp.any(hit, 1, keepdims=True), found_SD, output)
    return output
