"""Fewer MLP channels and heads: where they are, and a model without some of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import nn, trees
from bigflax.compress.structure.fields import Scores, changed_fields, field_of, has_field, matching, module_of, read_axis, texts_of
from bigflax.weights import is_typed


class Place(NamedTuple):
    """Where an axis is: the leaves of one module that have it or, of heads, their kv heads; sizes by the names of axes."""

    leaves: tuple[str, ...]
    stack: tuple[int, ...]
    sizes: dict[str, int]


def places(model: nn.Model, axis: str) -> dict[str, Place]:
    """The places of "mlp", "heads" or "kv_heads", by the name of the matrix that reads it. Raises ValueError where there is none."""
    if axis not in ("mlp", "heads", "kv_heads"):
        raise ValueError(f"the axis {axis!r} cannot be narrowed; 'mlp', 'heads' and 'kv_heads' can, and layers left out")
    read, sides = read_axis(axis), {"mlp"} if axis == "mlp" else {"heads", "kv_heads"}
    texts, sizes = texts_of(model), {name: leaf.shape for name, leaf in trees.named_leaves(model.shapes())}
    found = {}
    for name, ax in texts.items():
        if read in [ax.names[i] for i in ax.contracted]:
            beside = tuple(other for other, its in texts.items() if module_of(other) == module_of(name) and sides & {*its.names})
            known = {side: size for other in beside for side, size in zip(texts[other].names, sizes[other], strict=True)}
            found[name] = Place(beside, sizes[name][: len(ax.stack)], known)
    if not found:
        raise ValueError(f"this model has no matrix that reads an axis {read!r}, so that there is nothing to narrow")
    return found


def narrow(model: nn.Model, params: Any, axis: str, rules: trees.Rules, scores: Scores) -> tuple[Any, dict[str, Any]]:
    """(params with fewer channels or heads, those of the highest scores in each layer; the fields of the config that change with them).

    "mlp": channels. "heads": query heads, as many in each group of those that share a kv head. "kv_heads": such groups whole. A head keeps its width. Where
    a leaf of heads serves all layers (T5's relative positions), all layers keep the same ones. Raises ValueError where the config cannot say the result.
    """
    there, rules, texts = places(model, axis), trees.checked(rules), texts_of(model)
    matching(rules, there, "place")
    cuts, fields, said = {}, {}, {}
    beside = {name for place in there.values() for name in place.leaves}
    loose = [name for name, ax in texts.items() if axis != "mlp" and "heads" in ax.names and name not in beside]
    towers = {name: [at for at in there if at.startswith(module_of(module_of(name)))] for name in loose}
    for at, place in there.items():
        many = _kept(trees.match(rules, at), place.sizes, axis, at)
        for path, number in _fields_of(model, axis, at, place.sizes, many).items():
            if said.setdefault(path, (number, at))[0] != number:
                raise ValueError(
                    f"{'.'.join(path)} says the size of {said[path][1]} and of {at}: give both the same, not {said[path][0]} and {number}"
                )
            fields[path] = number
        if many == place.sizes[axis]:
            continue
        if at not in scores:
            raise ValueError(f"there are no scores of {at}; {trees.did_you_mean(at, scores, 'there are those of')}")
        alike = next((its for its in towers.values() if at in its), None)
        cuts[at] = _chosen(scores, at, there, axis, many, alike)
    plan = {name: kept for at, kept in cuts.items() for name in there[at].leaves}
    plan |= {
        name: {axis: x.reshape(-1, x.shape[-1])[0] for axis, x in cuts[its[0]].items()} for name, its in towers.items() if its[0] in cuts
    }

    def cut(name, w):
        for side, kept in plan.get(name, {}).items():
            if side in texts[name].names:
                if is_typed(w):
                    raise ValueError(f"{name} is a {type(w).__name__}; narrow arrays, and make typed weights of what is left")
                w = _take(w, kept, texts[name].names.index(side))
        return w

    return trees.map_named(cut, params, is_leaf=is_typed), changed_fields(model, fields)


def _kept(value: Any, sizes: Mapping[str, int], axis: str, at: str) -> int:
    """How many of the axis the rule's value keeps. Raises ValueError for what cannot be."""
    size, step = sizes[axis], 1
    if axis == "heads" and sizes["kv_heads"] < size:
        step = sizes["kv_heads"]
    many = size if value is None else round(value * size) if isinstance(value, float) else value
    if not isinstance(many, int) or not 0 < many <= size or many % step:
        groups = f" in multiples of its {step} groups" if step > 1 else ""
        raise ValueError(f"{at} has {size} of {axis!r}, of which {value!r} cannot be kept; keep 1 to {size}{groups}, or a share")
    return many


def _chosen(
    scores: Scores, at: str, there: Mapping[str, Place], axis: str, many: int, alike: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Which are kept of each axis of a place: {"mlp": [*stack, many]}, or {"heads": ..., "kv_heads": ...}."""
    sizes, stack = there[at].sizes, there[at].stack
    read = read_axis(axis)

    def of(at):
        found = np.asarray(scores[at], np.float64)
        if found.shape != (*there[at].stack, there[at].sizes[read]):
            raise ValueError(f"the scores of {at} have shape {found.shape}, not {(*there[at].stack, there[at].sizes[read])}")
        return found

    if alike:  # one choice for all their layers
        total = sum(of(at).reshape(-1, sizes[read]).sum(0) for at in alike)
        scored = np.broadcast_to(total, (*stack, sizes[read]))
    else:
        scored = of(at)
    if axis == "mlp":
        return {"mlp": _top(scored, many)}
    N, K = sizes["heads"], sizes["kv_heads"]
    grouped, G = scored.reshape(*stack, K, N // K), N // K
    if axis == "kv_heads" or G == 1:
        kv = _top(grouped.sum(-1), many)
        return {"heads": (kv[..., None] * G + np.arange(G)).reshape(*stack, -1), "kv_heads": kv}
    within = _top(grouped, many // K)
    return {"heads": (within + G * np.arange(K)[:, None]).reshape(*stack, -1)}


def _fields_of(model: nn.Model, axis: str, at: str, sizes: Mapping[str, int], many: int) -> dict[tuple[str, ...], int]:
    """The fields of the config and their values, where this place keeps so many. Raises ValueError where heads cannot keep their width."""
    if axis == "mlp":
        return {field_of(model, at, "mlp", sizes["mlp"]): many}
    N, K = sizes["heads"], sizes["kv_heads"]
    heads = many * (N // K) if axis == "kv_heads" else many
    kv = many if axis == "kv_heads" or N == K else K
    fields = {field_of(model, at, "heads", N): heads}
    if heads == N:
        return fields
    try:
        fields[field_of(model, at, "head_dim", sizes["head_dim"])] = sizes["head_dim"]
    except ValueError:
        why = "the width of a head follows from hidden size and heads in its config"
        raise ValueError(f"heads of {model.family} cannot be left out, for {why}; narrow 'mlp', or leave layers out") from None
    return {**fields, field_of(model, at, "kv_heads", K): kv} if N != K or has_field(model, at, "kv_heads") else fields


def _top(scores: np.ndarray, many: int) -> np.ndarray:
    """The places of the `many` highest along the last axis, in order; of equals the first."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :many], axis=-1)


def _take(w: Any, kept: np.ndarray, at: int) -> jax.Array:
    """What is kept along axis `at`, another choice for each of the leading stack."""
    stack = kept.ndim - 1
    index = kept.reshape(*kept.shape[:-1], *(1,) * (at - stack), kept.shape[-1], *(1,) * (w.ndim - at - 1))
    return jnp.take_along_axis(jnp.asarray(w), jnp.asarray(index), axis=at)
