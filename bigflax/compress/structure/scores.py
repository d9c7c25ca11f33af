"""What matters: scores of channels, heads and layers, and distances between the states that layers leave."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import nn, trees
from bigflax.compress.structure.depth import Unit, stacks
from bigflax.compress.structure.fields import Scores, read_axis, texts_of
from bigflax.compress.structure.width import Place, places
from bigflax.sharding import whole
from bigflax.weights import can_train, is_typed, named_weights


def magnitude(model: nn.Model, params: Any, axis: str) -> dict[str, np.ndarray]:
    """Of each channel, or query head, the norm of what reads it times the norms of what writes it, biases included."""
    there, texts, leaves = places(model, axis), texts_of(model), dict(named_weights(params))
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
    there, texts, leaves, found = places(model, axis), texts_of(model), dict(named_weights(params)), {}
    for at, place in there.items():
        w, ax = _array(leaves, at).astype(jnp.float32), texts[at]
        if at not in squares:
            raise ValueError(f"there are no sums of squares of the inputs of {at}; {trees.did_you_mean(at, squares, 'there are those of')}")
        ins = [size for i, size in enumerate(w.shape) if i < len(ax.stack) or i in ax.contracted]
        outs = tuple(i for i in range(len(ax.stack), w.ndim) if i not in ax.contracted)
        added = jnp.reshape(jnp.asarray(squares[at]), ins) * jnp.square(w).sum(outs)
        found[at] = np.sqrt(np.asarray(whole(added.reshape(*place.stack, place.sizes[read_axis(axis)], -1).sum(-1)), np.float64))
    return found


def taylor(model: nn.Model, params: Any, axis: str, loss_fn: Callable[..., Any], batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """|dL/dz| of a factor z = 1 of each channel or query head, summed over the batches; for "layers" of each weight of a layer, summed over those too.

    `loss_fn(params, batch, rng)` is any loss (train.py), of which the sum is taken and not the mean. Signs cancel within a batch and not between batches:
    of smaller ones it is the better score.
    """
    texts, axes = texts_of(model), dict(trees.named_leaves(model.axes))
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
