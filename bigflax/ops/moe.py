"""Mixtures of experts: a router chooses C of E small networks for each token, and their outputs are added, weighted by its gates.

    p = softmax(x r),    y = sum over the C largest p_e of gate_e f_e(x),    gate_e = p_e, or p_e / (their sum) where `normalize` says so

A softmax over the C largest logits alone (top-k first) is the normalized one: exp(l_e) / sum of the chosen exp(l). So there is one way.

    reference   every expert computes every token: E f-products a token, plain einsums, lies on any mesh
    ragged      tokens sorted by expert, one `lax.ragged_dot` a weight, sorted back: C f-products a token, none dropped

On a mesh the ragged path runs below `shard_map`: each device sorts its own tokens, multiplies those that its own experts were chosen for by its own
columns, and the sums go over the axes of `experts` and `mlp`. On a CPU `ragged_dot` is itself a dense product over E copies of the rows, C times
the reference's work; there the reference is what runs by default.

The load-balance loss of Switch Transformers (Fedus et al. 2021, arXiv 2101.03961, equations 4-6), over all layers at once as transformers has it:
E sum_e (choices of e / tokens) (mean p_e). It is C where all experts are chosen alike, and grows to E C where C experts take all.

Left out on purpose: dispatch by capacity and all-to-all, where each token travels to the device of its expert: an issue of its own.

Shapes: B batch, T time, D width, F an expert's width, E experts, C choices a token, M = B T tokens, R = M C rows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigflax.ops.matmul import einsum
from bigflax.sharding import axes_of, constrain, current_layout, platform, spec
from bigflax.weights import LoRA, Weight, dense, parse_axes, part_axes, shape

Product = Callable[[jax.Array, Weight], jax.Array]
Params = Mapping[str, Weight]
IMPLEMENTATIONS = ("reference", "ragged")


def route(logits_BTE: jax.Array, choices: int, *, normalize: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(probabilities [B, T, E] in float32, gates [B, T, C] in float32, the experts chosen [B, T, C]), the likeliest first."""
    if not 1 <= choices <= logits_BTE.shape[-1]:
        raise ValueError(f"{choices} experts a token cannot be chosen from {logits_BTE.shape[-1]}")
    probs_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32))
    gates_BTC, chosen_BTC = jax.lax.top_k(probs_BTE, choices)
    return probs_BTE, gates_BTC / jnp.sum(gates_BTC, -1, keepdims=True) if normalize else gates_BTC, chosen_BTC


def mixture(
    expert: Callable[[jax.Array, Params, Product], jax.Array], x_BTD: jax.Array, gates_BTC: jax.Array, chosen_BTC: jax.Array, params: Params,
    axes: Mapping[str, str], *, implementation: str | None = None,
) -> jax.Array:  # fmt: skip
    """sum_c gates[..., c] f_{chosen[..., c]}(x), [B, T, D] in x's dtype, where f_e(x) is `expert(x, params, product)`.

    `product(x, w)` multiplies each row by its own expert's matrix of w [E, in, out], which may be typed; `axes` are those weights' axis
    strings. A LoRA goes through its rank on both paths; a Quantized is multiplied as it is by the reference and made dense for the ragged one.
    """
    if implementation is None:
        implementation = "reference" if platform() == "cpu" else "ragged"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"a mixture has no implementation {implementation!r}; take one of {', '.join(IMPLEMENTATIONS)}, or None to choose")
    function = _reference if implementation == "reference" else _ragged
    return function(expert, x_BTD, gates_BTC.astype(x_BTD.dtype), chosen_BTC, params, axes)


def router_sums(probs_BTE: jax.Array, chosen_BTC: jax.Array, real_BT: jax.Array | None) -> dict[str, jax.Array]:
    """What one layer adds to the load-balance loss: how often each expert was chosen [E], its probabilities' sum [E], how many tokens []."""
    E = probs_BTE.shape[-1]
    real_BT1 = jnp.ones((*probs_BTE.shape[:2], 1)) if real_BT is None else real_BT[..., None].astype(jnp.float32)
    times_BTE = jnp.sum(jax.nn.one_hot(chosen_BTC, E), axis=2)
    return {"chosen": jnp.sum(times_BTE * real_BT1, (0, 1)), "probs": jnp.sum(probs_BTE * real_BT1, (0, 1)), "tokens": jnp.sum(real_BT1)}


def load_balance(sums: Mapping[str, jax.Array]) -> jax.Array:
    """The load-balance loss of all layers, whose `router_sums` have a leading layer axis; its gradient goes through the probabilities."""
    tokens = jnp.maximum(jnp.sum(sums["tokens"]), 1)
    return sums["probs"].shape[-1] * jnp.sum(jnp.sum(sums["chosen"], 0) / tokens * (jnp.sum(sums["probs"], 0) / tokens))


def _reference(expert, x_BTD, gates_BTC, chosen_BTC, params, axes):
    def product(x, w):
        y_EBTF = einsum("btd,edf->ebtf" if x.ndim == 3 else "ebtd,edf->ebtf", x, w)
        return constrain(y_EBTF, "experts", "batch", "seq", None)

    y_EBTD = expert(x_BTD, params, product)
    share_BTE = jnp.einsum("btce,btc->bte", jax.nn.one_hot(chosen_BTC, y_EBTD.shape[0], dtype=x_BTD.dtype), gates_BTC)
    return jnp.einsum("ebtd,bte->btd", y_EBTD, share_BTE)


def _ragged(expert, x_BTD, gates_BTC, chosen_BTC, params, axes):
    params = {name: _arrays(w, x_BTD.dtype) for name, w in params.items()}
    layout = current_layout()
    if layout is None or math.prod(layout[0].shape.values()) == 1:
        return _sorted(expert, x_BTD, gates_BTC, chosen_BTC, params, 0)
    mesh, table, *_ = layout
    rows = spec(("batch", "seq", None), x_BTD.shape, mesh, table)
    taken = [axis for part in rows if part is not None for axis in ((part,) if isinstance(part, str) else part)]
    sizes = {name: size for key, text in axes.items() for name, size in zip(parse_axes(text).names, shape(params[key]), strict=True)}
    # Whole in their width, as FSDP gathers any weight; by experts and columns where no token lies by the same axis.
    inner = {name: axes_of(name, sizes[name], mesh, table, taken) for name in ("experts", "mlp")}
    of_part = lambda part, text: spec(parse_axes(text).names, part.shape, mesh, inner)
    where = {name: jax.tree.map(of_part, w, part_axes(w, axes[name])) for name, w in params.items()}

    def local(x_BTD, gates_BTC, chosen_BTC, params):
        first = jax.lax.axis_index(inner["experts"]) * shape(next(iter(params.values())))[0] if inner["experts"] else 0
        # Said aloud, for a gather whose indices vary over an axis where its operand does not loses the sum over it on the way back.
        x_BTD = jax.lax.pcast(x_BTD, inner["experts"], to="varying") if inner["experts"] else x_BTD
        return jax.lax.psum(_sorted(expert, x_BTD, gates_BTC, chosen_BTC, params, first), (*inner["experts"], *inner["mlp"]))

    spread = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, where), out_specs=rows)
    return spread(x_BTD, gates_BTC, chosen_BTC, params)


def _sorted(expert, x_BTD, gates_BTC, chosen_BTC, params, first):
    """What the experts from number `first` on, those whose weights are in `params`, add to each token."""
    E, C = shape(next(iter(params.values())))[0], chosen_BTC.shape[-1]
    mine_R = chosen_BTC.reshape(-1) - first
    mine_R = jnp.where((mine_R >= 0) & (mine_R < E), mine_R, E)  # E: another device's, sorted behind all of ours
    order_R = jnp.argsort(mine_R, stable=True)
    sizes_E = jnp.sum(mine_R[:, None] == jnp.arange(E), 0, dtype=jnp.int32)
    ours_R1 = (jnp.arange(mine_R.size) < jnp.sum(sizes_E))[:, None]

    def product(x_RD, w):
        if isinstance(w, LoRA):
            return product(x_RD, w.base) + product(product(x_RD, w.a), w.b) * w.scale
        # Rows of no group are whatever the backend leaves there, forward and backward.
        return jnp.where(ours_R1, jax.lax.ragged_dot(jnp.where(ours_R1, x_RD, 0), w.astype(x_RD.dtype), sizes_E), 0)

    y_RD = expert(x_BTD.reshape(-1, x_BTD.shape[-1])[order_R // C], params, product)
    y_BTCD = y_RD[jnp.argsort(order_R)].reshape(*chosen_BTC.shape, -1)
    return jnp.einsum("btcd,btc->btd", y_BTCD, gates_BTC)


def _arrays(w: Weight, dtype: Any) -> Any:
    """The weight without integers in it: an array, or a LoRA over one."""
    if isinstance(w, LoRA):
        return dataclasses.replace(w, base=_arrays(w.base, dtype))
    return dense(w).astype(dtype)
