"""Structured pruning: fewer layers, MLP channels and heads; what is left is a smaller dense model of the same family.

    scores = taylor(model, params, "mlp", loss_fn, batches)                   {"blocks/mlp/down": [L, F]}, how much each channel matters
    small, changes = narrow(model, params, "mlp", [(".*", 0.5)], scores)      half of the channels of each layer, {"intermediate_size": 512}
    apart = distances(model, params, batches)                                 {"blocks": [L + 1, L + 1]}, between the states that layers leave
    kept = best_layers(model, influence(apart), [("blocks", 8)])              [("blocks", [0, 1, 4, ...])]
    small, changes = layers(model, params, kept)
    model = models.resized(model, small, changes)                             the model of the changed config, which has those weights

Everything goes by the names of axes, so that it holds for encoders, decoders, pairs and towers alike. The matrix that reads an axis ("mlp -> embed",
"heads head_dim -> embed") names the place, and every leaf beside it that has the axis is cut with it. Rules are ordered (regex, value) over these names, or
for layers over the names of stacks ("blocks", "encoder/blocks"); a value is how many are kept, or what share of them, None leaves all.

    magnitude    |w_read| |w_write| of a channel, of a head those of its values                        Han et al. 2015 (1506.02626)
    activation   |h| |w_read|, h what a channel holds over all tokens: the norm of what it adds        after Wanda, Sun et al. 2024 (2306.11695)
    taylor       |dL/dz| summed over batches, z = 1 a factor of the channel, head or layer             Michel et al. 2019 (1905.10650), eq. 2;
                 and that is |g . w_read|, for z could stand before w_read                               Molchanov et al. 2019 (1906.10771)
    influence    1 - cos(h_l, h_l+1), the mean over real tokens: of layers                             ShortGPT, Men et al. 2024 (2403.03853), eq. 1
    best_run     the n layers in a row that turn the states least, arccos(h_l . h_l+n) / pi,           Gromov et al. 2024 (2403.17887), section 3
                 over all real tokens too, where the paper looks at the last

Left out on purpose: the width of embeddings, which no score of a trained model makes cheap (distill into a narrower student instead); different sizes in
different layers, which no config can say; recovery, which is any training: with the large model as a teacher, or of LoRA.
Legend: B batch, T time, D width, F mlp width, N heads, K kv heads, G = N / K, H head width, L layers.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import nn, trees
from bigflax.sharding import whole
from bigflax.weights import can_train, is_typed, named_weights, parse_axes

Scores = Mapping[str, Any]  # {place: array [*stack, size]}, or of layers {stack: [L]}

# axis -> what a config may call its size, whose {side} is where the leaf lies: "encoder", "text" ...
FIELDS = {
    "layers": "{side}_layers num_{side}_layers num_hidden_layers n_layer n_layers num_layers",
    "mlp": "{side}_ffn_dim moe_intermediate_size shared_expert_intermediate_size intermediate_size d_ff n_inner ffn_dim hidden_dim",
    "heads": "{side}_attention_heads num_attention_heads n_head n_heads num_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim d_kv",
}


# -- channels and heads ----------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an axis is: the leaves of one module that have it or, of heads, their kv heads; sizes by the names of axes."""

    leaves: tuple[str, ...]
    stack: tuple[int, ...]
    sizes: dict[str, int]


def places(model: nn.Model, axis: str) -> dict[str, Place]:
    """The places of "mlp", "heads" or "kv_heads", by the name of the matrix that reads it. Raises ValueError where there is none."""
    if axis not in ("mlp", "heads", "kv_heads"):
        raise ValueError(f"the axis {axis!r} cannot be narrowed; 'mlp', 'heads' and 'kv_heads' can, and layers left out")
    read, sides = _read(axis), {"mlp"} if axis == "mlp" else {"heads", "kv_heads"}
    texts, sizes = _texts(model), {name: leaf.shape for name, leaf in trees.named_leaves(model.shapes())}
    found = {}
    for name, ax in texts.items():
        if read in [ax.names[i] for i in ax.contracted]:
            beside = tuple(other for other, its in texts.items() if _module(other) == _module(name) and sides & {*its.names})
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
    there, rules, texts = places(model, axis), trees.checked(rules), _texts(model)
    _matching(rules, there, "place")
    cuts, fields, said = {}, {}, {}
    beside = {name for place in there.values() for name in place.leaves}
    loose = [name for name, ax in texts.items() if axis != "mlp" and "heads" in ax.names and name not in beside]
    towers = {name: [at for at in there if at.startswith(_module(_module(name)))] for name in loose}
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

    return trees.map_named(cut, params, is_leaf=is_typed), _changes(model, fields)


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
    read = _read(axis)

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
        return {_field(model, at, "mlp", sizes["mlp"]): many}
    N, K = sizes["heads"], sizes["kv_heads"]
    heads = many * (N // K) if axis == "kv_heads" else many
    kv = many if axis == "kv_heads" or N == K else K
    fields = {_field(model, at, "heads", N): heads}
    if heads == N:
        return fields
    try:
        fields[_field(model, at, "head_dim", sizes["head_dim"])] = sizes["head_dim"]
    except ValueError:
        why = "the width of a head follows from hidden size and heads in its config"
        raise ValueError(f"heads of {model.family} cannot be left out, for {why}; narrow 'mlp', or leave layers out") from None
    return {**fields, _field(model, at, "kv_heads", K): kv} if N != K or _has(model, at, "kv_heads") else fields


def _top(scores: np.ndarray, many: int) -> np.ndarray:
    """The places of the `many` highest along the last axis, in order; of equals the first."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :many], axis=-1)


def _take(w: Any, kept: np.ndarray, at: int) -> jax.Array:
    """What is kept along axis `at`, another choice for each of the leading stack."""
    stack = kept.ndim - 1
    index = kept.reshape(*kept.shape[:-1], *(1,) * (at - stack), kept.shape[-1], *(1,) * (w.ndim - at - 1))
    return jnp.take_along_axis(jnp.asarray(w), jnp.asarray(index), axis=at)


# -- layers ----------------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """Layers that stay or go together, a period of a group: the name of its leaves, which of its repeats (None: not stacked), their numbers."""

    group: str
    repeat: int | None
    layers: range


def stacks(model: nn.Model) -> dict[str, list[Unit]]:
    """The stacks of layers, by the name of their leaves. Raises ValueError where there are none."""
    found = getattr(model.module, "places", dict)()
    if not found:
        raise ValueError("this model has no stack of layers, so that none can be left out")
    units = lambda name, first, period, repeats: [
        Unit(name, i if repeats else None, range(first + i * period, first + (i + 1) * period)) for i in range(repeats or 1)
    ]
    return {stack: [unit for group in groups for unit in units(*group)] for stack, groups in found.items()}


def layers(model: nn.Model, params: Any, rules: trees.Rules) -> tuple[Any, dict[str, Any]]:
    """(params with the layers of each stack that its rule lists, in their order; the fields of the config that change with them).

    Any weights: the axis of layers leads all their parts. Raises ValueError for layers that there are not, and where kinds of layer alternate for less than
    whole periods, or for nothing of a group.
    """
    there, texts, rules = stacks(model), _texts(model), trees.checked(rules)
    _matching(rules, there, "stack")
    repeats, fields, lists = {}, {}, {}
    for stack, units in there.items():
        every = [i for unit in units for i in unit.layers]
        listed = trees.match(rules, stack)
        kept = every if listed is None else [i for i in every if isinstance(listed, Iterable) and i in {*listed}]
        if listed is not None and (not isinstance(listed, Iterable) or not kept or len(kept) < len({*listed})):
            raise ValueError(
                f"{stack} has layers 0 to {every[-1]}, and {listed!r} is no list of some of them; best_layers makes one of a number"
            )
        for unit in units:
            inside = {*unit.layers} & {*kept}
            if inside and len(inside) < len(unit.layers):
                raise ValueError(
                    f"layers {unit.layers[0]} to {unit.layers[-1]} of {stack} are a period of several kinds; keep or leave out all of them"
                )
            repeats.setdefault(unit.group, []).extend([unit.repeat] if inside else [])
        for group in {unit.group for unit in units}:
            if not repeats[group]:
                raise ValueError(f"no layer would be left of {group}, and its kind is not that of the others; keep one")
        path = _field(model, stack, "layers", len(every))
        fields[path] = len(kept)
        config = _config(model, path)
        lists |= {
            (*path[:-1], name): [value[i] for i in kept]
            for name, value in config.items() if "layer" in name and isinstance(value, list | tuple) and len(value) == len(every)
        }  # fmt: skip

    def cut(name, w):
        group = next((group for group in repeats if name.startswith(f"{group}/")), None)
        if group is None or repeats[group] == [None] or "layers" not in texts[name].stack:
            return w
        return jax.tree.map(lambda part: part[np.array(repeats[group])], w)

    return trees.map_named(cut, params, is_leaf=is_typed), _changes(model, {**fields, **lists})


def best_layers(model: nn.Model, scores: Scores, rules: trees.Rules) -> list[tuple[str, list[int]]]:
    """The rules for `layers` that keep as many layers of each stack as these rules say, or such a share: those of the highest scores [L], by periods where
    kinds of layer alternate."""

    def choose(stack, units, drop):
        if stack not in scores:
            raise ValueError(f"there are no scores of {stack}; {trees.did_you_mean(stack, scores, 'there are those of')}")
        value = lambda unit: sum(float(scores[stack][i]) for i in unit.layers)
        gone: list[Unit] = []
        for unit in sorted((unit for unit in units if unit.repeat is not None), key=value):
            size = sum(len(other.layers) for other in gone)
            alone = all(other.group != unit.group or other in gone for other in units if other is not unit)
            if not alone and size + len(unit.layers) <= drop:
                gone.append(unit)
        return gone

    return _choose(model, rules, choose)


def best_run(model: nn.Model, distances: Scores, rules: trees.Rules) -> list[tuple[str, list[int]]]:
    """As `best_layers`, but what goes is one run of layers, that between whose ends the distance is least."""

    def choose(stack, units, drop):
        if stack not in distances:
            raise ValueError(f"there are no distances of {stack}; {trees.did_you_mean(stack, distances, 'there are those of')}")
        runs = []
        for i in range(len(units)):
            for j in range(i + 1, len(units) + 1):
                run = units[i:j]
                group = [unit for unit in units if unit.group == run[0].group]
                if {unit.group for unit in run} == {run[0].group} and run[0].repeat is not None and len(run) < len(group):
                    runs.append(run)
        fitting = [run for run in runs if sum(len(unit.layers) for unit in run) == drop]
        return min(fitting, key=lambda run: float(distances[stack][run[0].layers[0]][run[-1].layers[-1] + 1]), default=[])

    return _choose(model, rules, choose)


def _choose(model, rules, choose) -> list[tuple[str, list[int]]]:
    there, rules, made = stacks(model), trees.checked(rules), []
    _matching(rules, there, "stack")
    for stack, units in there.items():
        L, value = sum(len(unit.layers) for unit in units), trees.match(rules, stack)
        if value is None:
            continue
        many = round(value * L) if isinstance(value, float) else value
        gone = choose(stack, units, L - many) if isinstance(many, int) and 0 < many <= L else []
        kept = [i for unit in units if unit not in gone for i in unit.layers]
        if len(kept) != many:
            sizes = {len(unit.layers) for unit in units}
            why = f"periods of {max(sizes)}" if max(sizes) > 1 else "its groups"
            raise ValueError(f"of the {L} layers of {stack}, {value!r} cannot be kept; keep at least one and no part of {why}")
        made.append((re.escape(stack), kept))
    return made


# -- what matters ----------------------------------------------------------------------------------------------------------


def magnitude(model: nn.Model, params: Any, axis: str) -> dict[str, np.ndarray]:
    """Of each channel, or query head, the norm of what reads it times the norms of what writes it, biases included."""
    there, texts, leaves = places(model, axis), _texts(model), dict(named_weights(params))
    found = {}
    for at, place in there.items():
        squares: dict[str, Any] = {}
        for name in place.leaves:
            last = name.rpartition("/")[2].removesuffix("_bias")
            if axis == "mlp" or name == at or last == "v":  # what q and k do to a head is no question of size
                squares[last] = squares.get(last, 0) + _rows(jnp.square(_array(leaves, name).astype(jnp.float32)), texts[name], place)
        found[at] = np.sqrt(np.prod([np.asarray(whole(x), np.float64) for x in squares.values()], axis=0))
    return found


def activation(model: nn.Model, params: Any, axis: str, squares: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Of each channel, or query head, the norm over all tokens of what it adds to the output: `squares` are the sums of squares of the inputs of the matrices
    that read it, {"blocks/mlp/down": [L, F], "blocks/attention/out": [L, N H]}, for a head as if its H did not go together."""
    there, texts, leaves, found = places(model, axis), _texts(model), dict(named_weights(params)), {}
    for at, place in there.items():
        w, ax = _array(leaves, at).astype(jnp.float32), texts[at]
        if at not in squares:
            raise ValueError(f"there are no sums of squares of the inputs of {at}; {trees.did_you_mean(at, squares, 'there are those of')}")
        ins = [size for i, size in enumerate(w.shape) if i < len(ax.stack) or i in ax.contracted]
        outs = tuple(i for i in range(len(ax.stack), w.ndim) if i not in ax.contracted)
        added = jnp.reshape(jnp.asarray(squares[at]), ins) * jnp.square(w).sum(outs)
        found[at] = np.sqrt(np.asarray(whole(added.reshape(*place.stack, place.sizes[_read(axis)], -1).sum(-1)), np.float64))
    return found


def taylor(model: nn.Model, params: Any, axis: str, loss_fn: Callable[..., Any], batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """|dL/dz| of a factor z = 1 of each channel or query head, summed over the batches; for "layers" of each weight of a layer, summed over those too.

    `loss_fn(params, batch, rng)` is any loss (train.py), of which the sum is taken and not the mean. Signs cancel within a batch and not between batches:
    of smaller ones it is the better score.
    """
    texts, axes = _texts(model), dict(trees.named_leaves(model.axes))
    for name, w in named_weights(params):
        if is_typed(w):
            raise ValueError(f"{name} is a {type(w).__name__}; score arrays, and make typed weights of what is left")
    if axis == "layers":
        wanted = {name: None for name, w in named_weights(params) if "layers" in texts[name].stack and can_train(w, axes[name])}
    else:
        wanted = places(model, axis)

    @jax.jit
    def one(kept, rest, batch):
        def total(kept):
            loss = loss_fn(trees.combine(kept, rest), batch, None)
            loss = loss[0] if isinstance(loss, tuple) else loss
            return jnp.sum(getattr(loss, "total", loss))

        by_weight = jax.tree.map(lambda w, g: w.astype(jnp.float32) * g.astype(jnp.float32), kept, jax.grad(total)(kept))
        return {name: jnp.abs(_rows(x, texts[name], wanted[name])) for name, x in trees.named_leaves(by_weight)}

    kept, rest = trees.partition(params, trees.map_named(lambda name, _: name in wanted, params))
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, x in one(kept, rest, batch).items():
            sums[name] = sums.get(name, 0) + np.asarray(whole(x), np.float64)
    if not sums:
        raise ValueError("there are no batches to take gradients of; give some")
    return sums if axis != "layers" else {stack: _by_layer(units, sums) for stack, units in stacks(model).items()}


def _by_layer(units: Sequence[Unit], sums: Mapping[str, np.ndarray]) -> np.ndarray:
    """Sums of each leaf over its repeats as those of layers [L]; a period has its kinds of layer by number: blocks/0, blocks/1."""
    found = np.zeros(sum(len(unit.layers) for unit in units))
    for unit in units:
        for i, layer in enumerate(unit.layers):
            leaves = f"{unit.group}/{i}/" if len(unit.layers) > 1 else f"{unit.group}/"
            found[layer] += sum(x[unit.repeat] for name, x in sums.items() if name.startswith(leaves))
    return found


def distances(model: nn.Model, params: Any, batches: Iterable[Any], *, angle: bool = False) -> dict[str, np.ndarray]:
    """How far the states between layers are from each other: of each stack [L + 1, L + 1], 1 - cos(h_i, h_j), or with `angle` the angle in half turns, the
    mean over real tokens. States are as layers leave them, before a final norm. `batches` are inputs of the model by name; labels are passed over."""
    bare, there = _bare(model), stacks(model)

    @jax.jit
    def one(params, batch):
        out = bare.apply(params, hidden_states=True, **{name: x for name, x in batch.items() if name != "labels"})
        found = {}
        for stack in there:
            side = stack.rpartition("/")[0]
            states = out.get(f"{side}_hidden_states" if side else "hidden_states")
            if states is None:
                raise ValueError(f"this model gives no hidden states of {stack} for {', '.join(batch)}; give what that reads too")
            h = jnp.stack(states).astype(jnp.float32)
            h /= jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
            cos = jnp.einsum("ibtd,jbtd->ijbt", h, h, precision="highest")
            apart = jnp.arccos(jnp.clip(cos, -1, 1)) / jnp.pi if angle else 1 - cos
            real = _real(side, batch, h.shape[1:3])
            found[stack] = jnp.sum(apart * real, (2, 3)), jnp.sum(real)
        return found

    total: dict[str, list] = {stack: [0.0, 0.0] for stack in there}
    for batch in batches:
        for stack, new in one(params, batch).items():
            total[stack] = [old + np.asarray(whole(x), np.float64) for old, x in zip(total[stack], new, strict=True)]
    if not all(count > 0 for _, count in total.values()):
        raise ValueError("there are no batches with a real token to tell layers apart by; give some")
    return {stack: apart / count for stack, (apart, count) in total.items()}


def influence(distances: Scores) -> dict[str, np.ndarray]:
    """How far each layer takes its states: of each stack [L]."""
    return {stack: np.diagonal(apart, 1) for stack, apart in distances.items()}


def _bare(model: nn.Model) -> nn.Model:
    """The model whose last states are those of its last layer, whatever norm comes after."""

    def bare(module):
        if hasattr(module, "norm_states"):
            return module.clone(norm_states=False)
        inside = {name: part for name in ("encoder", "decoder", "text", "vision") if (part := getattr(module, name, None)) is not None}
        return module.clone(**{name: bare(part) for name, part in inside.items()})

    module = bare(model.module)
    return nn.model(module, **module.example())


def _real(side: str, batch: Mapping[str, Any], shape: tuple[int, ...]) -> jax.Array:
    """1 where a token of this side is real, float32 [B, T]."""
    names = () if side == "vision" else ("attention_mask", "segment_ids")
    given = (batch.get(f"decoder_{name}" if side == "decoder" else name) for name in names)
    mask = next((mask for mask in given if mask is not None and mask.shape == shape), None)
    return jnp.ones(shape) if mask is None else (mask > 0).astype(jnp.float32)


# -- names, sizes and fields -----------------------------------------------------------------------------------------------


def _texts(model: nn.Model) -> dict[str, Any]:
    return {name: parse_axes(text) for name, text in trees.named_leaves(model.axes)}


def _module(name: str) -> str:
    return name.rpartition("/")[0]


def _read(axis: str) -> str:
    """The axis that a matrix sums over where this one ends."""
    return "mlp" if axis == "mlp" else "heads"


def _array(leaves: Mapping[str, Any], name: str) -> jax.Array:
    if is_typed(leaves[name]):
        raise ValueError(f"{name} is a {type(leaves[name]).__name__}; score arrays, and make typed weights of what is left")
    return leaves[name]


def _rows(x: jax.Array, ax: Any, place: Place | None) -> jax.Array:
    """The sum over all but the stack and the axis of the place, kv heads repeated for each of their heads; without a place, over all but the layers."""
    if place is None:
        return x.sum(tuple(range(1, x.ndim)))
    at = next(i for i, name in enumerate(ax.names) if name in ("mlp", "heads", "kv_heads"))
    x = x.sum(tuple(i for i in range(len(ax.stack), x.ndim) if i != at))
    return jnp.repeat(x, place.sizes["heads"] // place.sizes["kv_heads"], -1) if ax.names[at] == "kv_heads" else x


def _matching(rules: list[tuple[str, Any]], names: Iterable[str], what: str) -> None:
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"rule {pattern!r} matches no {what}; {trees.did_you_mean(pattern, names, 'there are')}")


def _config(model: nn.Model, path: tuple[str, ...]) -> Mapping[str, Any]:
    return model.config if len(path) == 1 else model.config[path[0]]


def _has(model: nn.Model, at: str, axis: str) -> bool:
    config, side = _part(model, at)
    return any(name.format(side=side) in config for name in FIELDS[axis].split())


def _part(model: nn.Model, at: str) -> tuple[Mapping[str, Any], str]:
    """(the config, or that inside of it, which says the sizes of this leaf; the leaf's side)."""
    side = at.partition("/")[0]
    return model.config.get(f"{side}_config", model.config), side


def _field(model: nn.Model, at: str, axis: str, size: int) -> tuple[str, ...]:
    """The field of the config that says the size of an axis of this leaf, or would. Raises ValueError where none does."""
    config, side = _part(model, at)
    names = [name.format(side=side) for name in FIELDS[axis].split()]
    found = next((name for name in names if name in config and config[name] in (size, None)), None)
    if found is None:
        raise ValueError(
            f"no field of {model.family or 'this model'}'s config says that {at} has {size} of {axis!r}, so they cannot be fewer"
        )
    return (found,) if config is model.config else (f"{side}_config", found)


def _changes(model: nn.Model, fields: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The fields that are not as they were; those inside of a config with all of it."""
    changes: dict[str, Any] = {}
    for path, value in fields.items():
        if _config(model, path)[path[-1]] != value:
            home = changes if len(path) == 1 else changes.setdefault(path[0], dict(model.config[path[0]]))
            home[path[-1]] = value
    return changes
