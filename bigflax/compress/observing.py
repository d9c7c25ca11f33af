"""What goes into each matrix, seen while a model computes; and a model's layers, changed one after the other.

    seen = observe(model.apply, params, batches, ["head/w"], wants=("hessian",))            {name: Seen}, one pass of the model a batch
    params = layer_by_layer(model.apply, params, batches, change, names, wants=("hessian",))
    change(name, w, seen) -> weight                                                         of one layer's matrix, without the axis of layers

An observer is a typed weight: `Observed(base, seen)` multiplies as its base does, and the "gradient" of `seen` is defined as the statistics of what it
was multiplied with. So they come out of scans, vmaps, shardings and mixtures as gradients do, summed over every use of a weight, and no model knows.

`layer_by_layer` streams all batches through the first layer, changes its matrices by what went into them, streams the batches through the changed layer,
and goes on with what comes out: each layer is fitted to inputs as the compressed layers before it give them (Frantar et al. 2022, arXiv 2210.17323,
section 4). What is held is the model once, one layer's statistics, the changed weights, and the states between two layers for all batches, on the host.
It needs layers that are stacked by `nn.stack`; weights elsewhere (embeddings, heads, convolutions' own loops) are what `observe` is for.

Left out on purpose: statistics of outputs, and matrices of mixtures under ragged products, which refuse an Observed.
Legend: K inputs of a matrix, flat, N outputs, L layers.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import nn, trees
from bigflax.ops.matmul import lettered, lookup, operands, product
from bigflax.weights import Weight, can_train, dense, is_typed, named_weights, parse_axes, part_axes, shape, typed, write_axes

Array = jax.Array
WANTS = ("hessian", "size", "peak")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """Statistics of what a matrix was multiplied with, float32, K its inputs in their order: the sum of x x^T [K, K], of |x| [K], the largest |x| [K], and how
    many x there were. Those that nobody wants are None. A stack of matrices has its axes in front."""

    count: Array
    hessian: Any = None
    size: Any = None
    peak: Any = None

    def __add__(self, other: "Seen") -> "Seen":
        both = lambda fn, a, b: None if a is None else fn(a, b)
        return Seen(
            self.count + other.count, both(jnp.add, self.hessian, other.hessian), both(jnp.add, self.size, other.size),
            both(jnp.maximum, self.peak, other.peak),
        )  # fmt: skip

    @property
    def squares(self) -> Array:
        """The sum of x^2 for each input."""
        return jnp.diagonal(self.hessian, axis1=-2, axis2=-1)


@typed("base", "seen")
@dataclasses.dataclass(frozen=True)
class Observed:
    """A weight whose `seen`, zeros, has for a gradient the statistics of what it is multiplied with."""

    base: Weight
    seen: Seen


@shape.register
def _(w: Observed):
    return shape(w.base)


@dense.register
def _(w: Observed):
    return dense(w.base)


@part_axes.register
def _(w: Observed, axes: str):
    ax = parse_axes(axes)
    return Observed(part_axes(w.base, axes), jax.tree.map(lambda part: " ".join((*ax.stack, *"_" * (part.ndim - len(ax.stack)))), w.seen))


@can_train.register
def _(w: Observed, axes: str = ""):
    return jax.tree.map(lambda _: False, w)


@lookup.register
def _(w_VD: Observed, ids, dtype=None, axes=("vocab", "embed")) -> jax.Array:
    return lookup(w_VD.base, ids, dtype, axes)


@product.register
def _(w: Observed, spec, x, precision=None) -> Array:
    spec = lettered(spec, x.ndim)
    inputs, weight, output = operands(spec)
    stack = "".join(c for c in weight if c in inputs and c in output)
    summed = "".join(c for c in weight if c in inputs and c not in output)
    rows = "".join(c for c in inputs if c not in stack + summed)
    flat_SRK = jnp.einsum(f"{inputs}->{stack}{rows}{summed}", jax.lax.stop_gradient(x)).reshape(
        *(x.shape[inputs.index(c)] for c in stack), -1, int(np.prod([x.shape[inputs.index(c)] for c in summed]))
    )
    real = _real.get()
    there = jnp.ones(flat_SRK.shape[-2], jnp.float32)
    if real is not None and real.shape == x.shape[:2] and inputs[:2] == rows[:2]:
        there = jnp.broadcast_to(real.reshape(*real.shape, *(1,) * (len(rows) - 2)), [x.shape[inputs.index(c)] for c in rows]).reshape(-1)
    return _watch(product(w.base, spec, x, precision), flat_SRK, there.astype(jnp.float32), w.seen)


@jax.custom_vjp
def _watch(y, x_SRK, there_R, seen):
    return y


def _statistics(saved, g):
    x_SRK, there_R, seen = saved
    x_SRK = x_SRK.astype(jnp.float32) * there_R[:, None]
    found = Seen(
        jnp.full(seen.count.shape, there_R.sum()),
        None if seen.hessian is None else jnp.einsum("...rk,...rj->...kj", x_SRK, x_SRK),
        None if seen.size is None else jnp.abs(x_SRK).sum(-2),
        None if seen.peak is None else jnp.abs(x_SRK).max(-2),
    )
    return g, jnp.zeros_like(saved[0]), jnp.zeros_like(there_R), found


_watch.defvjp(lambda y, x, there, seen: (y, (x, there, seen)), _statistics)


_real: contextvars.ContextVar[Array | None] = contextvars.ContextVar("bigflax_real", default=None)


@contextlib.contextmanager
def _reading(real_BT: Array | None):
    """While a model is traced inside, rows of [B, T, ..] count where this is not 0: padding teaches nothing."""
    token = _real.set(None if real_BT is None else (real_BT > 0).astype(jnp.float32))
    try:
        yield
    finally:
        _real.reset(token)


def blank(w: Weight, axes: str, wants: Sequence[str]) -> Seen:
    """The `Seen` of nothing. Raises ValueError for what is no matrix."""
    ax, full = parse_axes(axes), shape(w)
    if not ax.contracted:
        raise ValueError(f"a weight with axes {axes!r} has no inputs to observe; compress matrices, not biases and norms")
    stack, K = full[: len(ax.stack)], int(np.prod([full[i] for i in ax.contracted]))
    sizes = {"hessian": (K, K), "size": (K,), "peak": (K,)}
    return Seen(jnp.zeros(stack), **{name: jnp.zeros((*stack, *sizes[name])) for name in wants})


def _sum(out: Any) -> Array:
    """What all floats of an output depend on."""
    leaves = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves), jnp.zeros(()))


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
            with _reading(_mask(batch)):
                return _sum(forward(_put(params, seen), batch))

        return jax.grad(total)(none)

    found = none
    for batch in batches:
        new = look(params, batch)
        found = {name: found[name] + new[name] for name in names}
    return {name: _checked(name, seen) for name, seen in found.items()}


def _mask(batch: Any) -> Array | None:
    fields = batch if isinstance(batch, Mapping) else {}
    return next((fields[name] for name in ("attention_mask", "segment_ids") if fields.get(name) is not None), None)


def _checked(name: str, seen: Seen) -> Seen:
    if not bool(jnp.any(seen.count > 0)):
        raise ValueError(f"nothing went into {name} while it was observed; give batches, and a forward that uses it as a matrix")
    return seen


class _Enough(Exception):
    """Every matrix that was asked for is changed; what the model does after them is of no interest."""


def layer_by_layer(
    forward: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], change: Callable[[str, Weight, Seen], Weight],
    names: Sequence[str], *, axes: Any, wants: Sequence[str] = ("hessian",), rows: int = 8,
) -> Any:  # fmt: skip
    """The params with the named matrices changed, layer after layer, each by what goes into it once those before it are changed; then the matrices of no
    stack of layers, together. `rows` of the batches pass through a layer at once.

    `change(name, w, seen)` gets one layer's matrix: its axes are those of the weight without the first. The weights of a stack must come out alike; parts
    that differ in size (a rank, a number of values) are filled up with zeros."""
    held, texts = [*batches], dict(trees.named_leaves(axes))
    if not held:
        raise ValueError("there are no batches to observe; give some")
    whole = jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *held)
    left, made = set(names), {}

    def walk(path, layer, weights, x, shared, layers, tied):
        inside = {} if tied else {name: name.removeprefix(f"{path}/") for name in names if name.startswith(f"{path}/")}
        fixed = {name: part for name, part in shared.items() if not hasattr(part, "shape")}
        cut = lambda part, i: part[i : i + rows] if part.ndim and len(part) == len(x) else part
        pieces = [({name: cut(part, i) for name, part in shared.items() if name not in fixed}) for i in range(0, len(x), rows)]
        run = jax.jit(lambda weights, x, given: layer(weights, x, {**fixed, **given}))
        xs, said, changed = [np.asarray(x[i : i + rows]) for i in range(0, len(x), rows)], [], []

        @jax.jit
        def look(weights, none, x, given):
            def everything(seen):
                with _reading(given.get("kv_segments")):
                    return _sum(layer(_put(weights, seen), x, {**fixed, **given}))

            return jax.grad(everything)(none)

        for i in range(layers or 1):
            here = weights if layers is None or tied else jax.tree.map(lambda part, i=i: part[i], weights)
            if inside:
                leaves = dict(named_weights(here))
                none = {rel: blank(leaves[rel], _one(texts[name], layers), wants) for name, rel in inside.items()}
                found = (look(here, none, x, given) for x, given in zip(xs, pieces, strict=True))
                seen = functools.reduce(lambda a, b: {rel: a[rel] + b[rel] for rel in a}, found)
                changed.append({rel: change(name, leaves[rel], _checked(name, seen[rel])) for name, rel in inside.items()})
                here = trees.map_named(lambda rel, w: changed[-1].get(rel, w), here, is_leaf=is_typed)
            outs = [run(here, x, given) for x, given in zip(xs, pieces, strict=True)]
            xs = [np.asarray(x) for x, _ in outs]
            said.append(jax.tree.map(lambda *parts: sum(parts), *[seen for _, seen in outs]))
        for name, rel in inside.items():
            made[name] = changed[0][rel] if layers is None else stacked([new[rel] for new in changed])
        left.difference_update(inside)
        if not any("layers" in parse_axes(texts[name]).stack for name in left):
            raise _Enough
        return jnp.concatenate(xs), said[0] if layers is None else jax.tree.map(lambda *parts: jnp.stack(parts), *said)

    with nn.walking(walk), contextlib.suppress(_Enough):
        forward(params, whole)
    params = trees.map_named(lambda name, w: made.get(name, w), params, is_leaf=is_typed)
    if left:
        seen = observe(forward, params, held, sorted(left), axes=axes, wants=wants)
        params = trees.map_named(lambda name, w: change(name, w, seen[name]) if name in left else w, params, is_leaf=is_typed)
    return params


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
