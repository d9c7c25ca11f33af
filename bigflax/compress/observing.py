"""What goes into each matrix, seen while a model computes; and a model's layers, changed one after the other.

    seen = observe(model.apply, params, batches, ["head/w"], wants=("hessian",))            {name: Seen}, one pass of the model a batch
    params = layer_by_layer(model.apply, params, batches, change, names, wants=("hessian",))
    change(name, w, seen) -> weight                                                         of one layer's matrix, without the axis of layers

An observer is a typed weight: `Observed(base, seen)` multiplies as its base does, and the "gradient" of `seen` is defined as the statistics of what it
was multiplied with (ops/observed.py). So they come out of scans, vmaps and shardings as gradients do, summed over every use of a weight, and no model knows.

An expert of a mixture sees the tokens that were sent to it, [E, K, K] of them all, by whichever way they go; padding chooses none while they are seen. One
that was sent fewer than it has inputs, K, cannot be judged by them alone: `pooled` fills up to K what it saw with what all experts saw on average, so that
one that saw nothing is fitted to the mean token, and one that saw enough to its own alone.

`layer_by_layer` streams all batches through the first layer, changes its matrices by what went into them, streams the batches through the changed layer,
and goes on with what comes out: each layer is fitted to inputs as the compressed layers before it give them (Frantar et al. 2022, arXiv 2210.17323,
section 4). What is held is the model once, one layer's statistics, the changed weights, and the states between two layers for all batches, on the host.
It needs layers that are stacked by `nn.stack`; weights elsewhere (embeddings, heads, convolutions' own loops) are what `observe` is for.

`correct` goes further. Each batch passes twice, side by side: through the model as it was and as it is by now (weights.Paired). A layer's matrices are changed
in the order in which it multiplies by them, and each is first moved to where its products with what goes in now are those of the old model
(matrices.corrected): what was lost before is made good, as far as a matrix can, and no method knows of it. Li et al. 2025 (2504.02692) have the model's two
streams for GPTQ; here they serve every method, and each matrix in its turn. Two to four times the work.

Left out on purpose: statistics of outputs, and a mixture's own layout on a mesh: while it is observed, XLA lays out its products, and a capacity is that of
all tokens together.
Legend: K inputs of a matrix, flat, N outputs, L layers, E experts.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import nn, trees
from bigflax.compress.matrices import as_matrix, as_weight, corrected
from bigflax.ops.observed import Use, counting, reading
from bigflax.weights import Observed, Paired, Seen, Weight, is_typed, named_weights, parse_axes, shape, write_axes

Array = jax.Array
WANTS = ("hessian", "size", "peak", "often")


def blank(w: Weight, axes: str, wants: Sequence[str]) -> Seen:
    """The `Seen` of nothing. Raises ValueError for what is no matrix."""
    ax, full = parse_axes(axes), shape(w)
    if not ax.contracted:
        raise ValueError(f"a weight with axes {axes!r} has no inputs to observe; compress matrices, not biases and norms")
    stack, K = full[: len(ax.stack)], int(np.prod([full[i] for i in ax.contracted]))
    sizes = {"hessian": (K, K), "cross": (K, K), "size": (K,), "peak": (K,), "often": (int(np.prod(full[len(stack) :])) // K,)}
    return Seen(jnp.zeros(stack), **{name: jnp.zeros((*stack, *sizes[name])) for name in wants})


def pooled(seen: Seen) -> Seen:
    """What each expert of a stack [E, ..] saw, and where that was fewer rows than it has inputs, K, as many more as it lacks of the mean row of all
    experts; its peak is then at least the mean of those that saw any."""
    wanted = [part for part in (seen.size, seen.peak, seen.hessian) if part is not None]
    K = wanted[0].shape[-1] if wanted else 0
    lacks, all_rows = jnp.maximum(K - seen.count, 0), jnp.maximum(seen.count.sum(), 1)
    beside = lambda each, part: each.reshape(-1, *(1,) * (part.ndim - 1))
    filled = lambda part: None if part is None else part + beside(lacks, part) * part.sum(0) / all_rows
    peak = seen.peak
    if peak is not None:
        mean = peak.sum(0) / jnp.maximum((seen.count > 0).sum(), 1)
        peak = jnp.where(beside(lacks, peak) > 0, jnp.maximum(peak, mean), peak)
    return dataclasses.replace(seen, count=seen.count + lacks, hessian=filled(seen.hessian), size=filled(seen.size), peak=peak)


def _sum(out: Any) -> Array:
    """What all floats of an output depend on."""
    leaves = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves), jnp.zeros(()))


def _with(params: Any, new: Mapping[str, Weight]) -> Any:
    return trees.map_named(lambda name, w: new.get(name, w), params, is_leaf=is_typed)


def _put(params: Any, seen: Mapping[str, Seen]) -> Any:
    return trees.map_named(lambda name, w: Observed(w, seen[name]) if name in seen else w, params, is_leaf=is_typed)


def observe(
    forward: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], names: Sequence[str], *, axes: Any,
    wants: Sequence[str] = ("hessian",),
) -> dict[str, Seen]:  # fmt: skip
    """Statistics of the inputs of the named matrices over all batches, in one pass each: `forward(params, batch)` is a model's call or a loss, anything
    whose numbers depend on them. Raises ValueError where nothing was seen: no batches, or a matrix that does not multiply."""
    texts, leaves = dict(trees.named_leaves(axes)), dict(named_weights(params))
    none = {name: blank(leaves[name], texts[name], wants) for name in names}

    @jax.jit
    def look(params, batch):
        def total(seen):
            with reading(_mask(batch)):
                return _sum(forward(_put(params, seen), batch))

        return jax.grad(total)(none)

    found = none
    for batch in batches:
        new = look(params, batch)
        found = {name: found[name] + new[name] for name in names}
    return {name: _checked(name, seen) for name, seen in found.items()}


def positions(
    forward: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], names: Sequence[str], *, axes: Any
) -> dict[str, int]:  # fmt: skip
    """How many inputs each of the named matrices has over all batches, padding left out; of one that is used several times those of one use, of a mixture's
    experts those of all together. The forward is traced for each shape of a batch, and neither compiled nor run. Raises ValueError for a matrix that does not
    multiply."""
    texts, leaves, found = dict(trees.named_leaves(axes)), dict(named_weights(params)), dict.fromkeys(names, 0.0)
    told: dict[str, Mapping[Any, Use]] = {}
    for batch in batches:
        mask, like = _mask(batch), str(jax.tree.map(lambda x: (np.shape(x), str(getattr(x, "dtype", ""))), batch))
        if like not in told:
            mark = object()  # a new one, so that no trace of before is taken for this one
            watched = {name: Observed(leaves[name], blank(leaves[name], texts[name], ()), (name, mark)) for name in names}
            instead = lambda name, w, watched=watched: watched.get(name, w)

            def traced(params, batch, instead=instead):
                with reading(_mask(batch)):
                    return _sum(forward(trees.map_named(instead, params, is_leaf=is_typed), batch))

            with counting() as told[like]:
                jax.eval_shape(traced, params, batch)
        share = 1.0 if mask is None else float(np.mean(np.asarray(mask) > 0))
        for (name, _), use in told[like].items():
            found[name] += use.rows * (share if use.masked else 1.0)
    if unseen := sorted(name for name in names if not found[name]):
        raise ValueError(f"nothing went into {unseen[0]} while it was observed; give batches, and a forward that uses it as a matrix")
    return {name: round(many) for name, many in found.items()}


def _mask(batch: Any) -> Array | None:
    fields = batch if isinstance(batch, Mapping) else {}
    return next((fields[name] for name in ("attention_mask", "segment_ids") if fields.get(name) is not None), None)


def _checked(name: str, seen: Seen) -> Seen:
    if not bool(jnp.any(seen.count > 0)) and (seen.often is None or not bool(jnp.any(seen.often > 0))):
        raise ValueError(f"nothing went into {name} while it was observed; give batches, and a forward that uses it as a matrix")
    return seen


class _Enough(Exception):
    """Every matrix that was asked for is changed; what the model does after them is of no interest."""


def layer_by_layer(
    forward: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], change: Callable[[str, Weight, Seen], Weight],
    names: Sequence[str], *, axes: Any, wants: Sequence[str] = ("hessian",), rows: int = 8, correct: bool = False,
) -> Any:  # fmt: skip
    """The params with the named matrices changed, layer after layer, each by what goes into it once those before it are changed; then the matrices of no
    stack of layers, together. `rows` of the batches pass through a layer at once.

    `change(name, w, seen)` gets one layer's matrix: its axes are those of the weight without the first. The weights of a stack must come out alike; parts
    that differ in size (a rank, a number of values) are filled up with zeros. With `correct` the arrays among the matrices of layers that have weights of their
    own are corrected before they are changed, which wants the hessian, but for a mixture's experts, who are not sent the same rows twice."""
    held, texts = [*batches], dict(trees.named_leaves(axes))
    if not held:
        raise ValueError("there are no batches to observe; give some")
    whole = jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts] * (1 + correct)), *held)
    left, made = set(names), {}

    def walk(path, layer, weights, x, shared, layers, tied):
        of_layer = {} if tied else {name.removeprefix(f"{path}/"): name for name in names if name.startswith(f"{path}/")}
        streams = _Streams(x, shared, models=1 + correct, rows=rows)
        each = _Layer(path, layer, streams.fixed, {rel: _one(texts[name], layers) for rel, name in of_layer.items()}, wants)
        said, changed = [], []
        for i in range(layers or 1):
            here = weights if layers is None or tied else jax.tree.map(lambda part, i=i: part[i], weights)
            changed.append(new := each.changed(here, streams, change))
            said.append(streams.go_through(each.run, *(here, _with(here, new))[-1 - correct :]))
        for rel, name in of_layer.items():
            made[name] = changed[0][rel] if layers is None else stacked([new.pop(rel) for new in changed])  # each is held twice alone
        left.difference_update(of_layer.values())
        if not any("layers" in parse_axes(texts[name]).stack for name in left):
            raise _Enough
        return streams.whole(), said[0] if layers is None else jax.tree.map(lambda *parts: jnp.stack(parts), *said)

    with nn.walking(walk), contextlib.suppress(_Enough):
        forward(params, whole)
    params = _with(params, made)
    if left:
        seen = observe(forward, params, held, sorted(left), axes=axes, wants=wants)
        params = trees.map_named(lambda name, w: change(name, w, seen[name]) if name in left else w, params, is_leaf=is_typed)
    return params


class _Streams:
    """The states between two layers for all batches, on the host, and what each layer is given beside them, some rows at a time: of the model by now alone,
    or of two, of the model as it was before it."""

    def __init__(self, x: Array, shared: Mapping[str, Any], *, models: int, rows: int):
        """`x` [models rows, ...] has one model's rows behind the other's, as has what is `shared` of as many rows; `fixed` is what is no array."""
        self.fixed = {name: part for name, part in shared.items() if not hasattr(part, "shape")}
        many = len(x) // models
        cut = lambda part, at: part[at] if part.ndim and len(part) == len(x) else part
        given = lambda at: {name: cut(part, at) for name, part in shared.items() if name not in self.fixed}
        pieces = [np.arange(i, min(i + rows, many)) for i in range(0, many, rows)]
        self.models = [[(np.asarray(x[at + model * many]), given(at + model * many)) for at in pieces] for model in range(models)]
        self._beside = [given(np.concatenate([at + model * many for model in range(models)])) for at in pieces]

    def together(self) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Pieces with the rows of all models, one's behind the other's."""
        return [
            (np.concatenate([x for x, _ in piece]), given)
            for piece, given in zip(zip(*self.models, strict=True), self._beside, strict=True)
        ]

    def go_through(self, run: Callable[[Any, Any, Any], tuple[Array, Any]], *weights: Any) -> Any:
        """Every model's states become what the layer makes of them with its weights. Returns what the layer said of the newest's beside them, summed up."""
        outs: list[Any] = []
        for pieces, its in zip(self.models, weights, strict=True):
            outs = [run(its, x, given) for x, given in pieces]
            pieces[:] = [(np.asarray(x), given) for (x, _), (_, given) in zip(outs, pieces, strict=True)]
        return jax.tree.map(lambda *parts: sum(parts), *[said for _, said in outs])

    def whole(self) -> Array:
        return jnp.concatenate([x for pieces in self.models for x, _ in pieces])


class _Layer:
    """The layers of a stack, called with the weights of one: what goes into their matrices, by their names within the layer, and the matrices changed."""

    def __init__(self, path: str, layer: Callable[..., Any], fixed: Mapping[str, Any], axes: Mapping[str, str], wants: Sequence[str]):
        self.path, self.axes, self.wants = path, axes, wants
        self.experts = {name for name, text in axes.items() if "experts" in parse_axes(text).stack}
        self.turns: list[list[str]] | None = None

        def look(weights, none, x, given):
            def everything(seen):
                with reading(given.get("kv_segments")):
                    return _sum(layer(_put(weights, seen), x, {**fixed, **given}))

            return jax.grad(everything)(none)

        self.run = jax.jit(lambda weights, x, given: layer(weights, x, {**fixed, **given}))
        self._look = jax.jit(look)

    def changed(self, weights: Any, streams: _Streams, change: Callable[[str, Weight, Seen], Weight]) -> dict[str, Weight]:
        """One layer's matrices, changed all together by what goes into them; where two models are beside each other turn by turn, and each corrected before."""
        if not self.axes:
            return {}
        leaves, new, correct = dict(named_weights(weights)), {}, len(streams.models) > 1
        if self.turns is None:
            self.turns = [[*self.axes]] if not correct else self._in_turn(weights, leaves, streams)
        for turn in self.turns:
            paired = correct and not self.experts & {*turn}
            if paired:  # experts of this layer are of no account to what stands beside them
                now = _with(weights, {name: Paired(leaves[name], w) for name, w in new.items() if name not in self.experts})
            else:
                now = _with(weights, new)
            none = self._blanks(leaves, turn, (*self.wants, "cross") if paired else self.wants)
            fed = streams.together() if paired else streams.models[-1]
            seen = functools.reduce(lambda a, b: {name: a[name] + b[name] for name in a}, (self._look(now, none, *piece) for piece in fed))
            for name in turn:
                w, its, axes = leaves[name], _checked(full := f"{self.path}/{name}", seen[name]), self.axes[name]
                if paired and not is_typed(w):
                    w = as_weight(corrected(as_matrix(w, axes), its.hessian, its.cross), axes, w.shape, w.dtype)
                new[name] = change(full, w, dataclasses.replace(its, cross=None))
        return new

    def _blanks(self, leaves: Mapping[str, Weight], names: Iterable[str], wants: Sequence[str]) -> dict[str, Seen]:
        return {name: blank(leaves[name], self.axes[name], wants) for name in names}

    def _in_turn(self, weights: Any, leaves: Mapping[str, Weight], streams: _Streams) -> list[list[str]]:
        """The matrices in the order in which the layer multiplies by them, those together that are multiplied with the same array."""
        none = self._blanks(leaves, self.axes, ())
        watched = trees.map_named(lambda name, w: Observed(w, none[name], name) if name in none else w, weights, is_leaf=is_typed)
        with counting() as uses:
            jax.eval_shape(lambda weights: self.run(weights, *streams.models[-1][0]), watched)
        found = [[*same] for _, same in itertools.groupby(uses, lambda name: id(uses[name].given))]
        return [*found, *([name] for name in self.axes if name not in uses)]


def _one(axes: str, layers: int | None) -> str:
    """The axes of one layer's weight."""
    ax = parse_axes(axes)
    return axes if layers is None else write_axes(ax._replace(stack=ax.stack[1:]))


def layers_of(w: Weight, axes: str) -> list[Weight]:
    """A weight's layers, or itself alone."""
    return [jax.tree.map(lambda part, i=i: part[i], w) for i in range(shape(w)[0])] if "layers" in parse_axes(axes).stack[:1] else [w]


def stacked(layers: Sequence[Weight]) -> Weight:
    """One weight of those of all layers. Raises ValueError where they are of different types; what is shorter is filled up with zeros."""
    if len({jax.tree.structure(w) for w in layers}) > 1:
        raise ValueError("the layers of a stack became weights of different types; give all of them the same")

    def together(*parts):
        full = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
        fill = lambda part: [(0, size - own) for own, size in zip(part.shape, full, strict=True)]
        return jnp.stack([part if list(part.shape) == full else jnp.pad(part, fill(part)) for part in parts])

    return jax.tree.map(together, *layers)
