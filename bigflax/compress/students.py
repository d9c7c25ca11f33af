"""Where a student begins: some of its teacher's layers, a part of its width, or nothing.

    student = models.create("bert", num_hidden_layers=3, ...)
    params = every_layer(teacher_params, teacher.axes, 2)                           layers 0, 2, 4 of six: DistilBERT, Sanh et al. 2019 (1910.01108)
    params = sliced(teacher_params, teacher.axes, {"embed": 192, "mlp": 768, "heads": 3})
    params = student.init(key)                                                      random

Both go by the names of axes, so that they hold for every family, and compose. The student is a model of the smaller config, whose shapes these are;
what has no part in the teacher, a new head say, is taken from its `init`.

Left out on purpose: which layers, heads and channels matter (structure/), and layers that are averages of several.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigflax import trees
from bigflax.weights import is_typed, parse_axes, part_axes

UNNAMED = ("norm", "_")  # of vectors that lie beside a named axis, and of outputs that nothing else reads


def every_layer(params: Any, axes: Any, keep: int | Sequence[int], *, of: str = ".*") -> Any:
    """Of each stack of layers those that `keep` lists, in its order, or every k-th from the first: all leaves whose name `of`, a regex, matches and that
    have an axis "layers", typed weights included.

    Where kinds of layer take turns ("blocks/0", "blocks/1"), `keep` counts the turns. Raises ValueError for a layer that is not there, and where nothing
    is a stack.
    """
    cut = 0

    def one(name: str, leaf: Any, text: str) -> Any:
        nonlocal cut
        names = parse_axes(text).names
        if "layers" not in names or not re.fullmatch(of, name):
            return leaf
        at = names.index("layers")
        chosen = list(range(0, leaf.shape[at], max(1, keep))) if isinstance(keep, int) else list(keep)
        if not chosen or (isinstance(keep, int) and keep < 1) or not all(0 <= i < leaf.shape[at] for i in chosen):
            raise ValueError(f"of {name!r} the layers {keep} cannot be kept; it has 0 to {leaf.shape[at] - 1}")
        cut += 1
        return leaf.take(np.array(chosen), axis=at)

    taken = _map_parts(one, params, axes)
    if not cut:
        raise ValueError(
            f"no weight that {of!r} matches is a stack of layers; {trees.did_you_mean(of, _stacks(params, axes), 'stacks are')}"
        )
    return taken


def sliced(params: Any, axes: Any, sizes: Mapping[str, int | Sequence[int]], *, rng: jax.Array | None = None) -> Any:
    """Each axis of these names cut to its first entries, to those listed, or with `rng` to as many at random, in order; the same everywhere.

    An axis without a name of its own ("norm", "_") that is as long as a cut one goes with it, with the first in `sizes` where two are so long: norms
    and biases beside "embed". Of grouped queries cut "heads" and "kv_heads" by one factor. Raises ValueError for a name that no weight has, more than
    there is, one name with two lengths, and typed weights, which have groups (make them `dense`).
    """
    if typed := next((name for name, w in trees.named_leaves(params, is_leaf=is_typed) if is_typed(w)), None):
        raise ValueError(f"{typed!r} is a typed weight, which cannot be cut along its width; slice arrays, then compress")
    lengths: dict[str, set[int]] = {}
    for (_, w), text in zip(trees.named_leaves(params), jax.tree.leaves(axes), strict=True):
        for axis, n in zip(parse_axes(text).names, w.shape, strict=True):
            lengths.setdefault(axis, set()).add(n)
    keys = dict(zip(sorted(sizes), jax.random.split(rng, len(sizes)), strict=True)) if rng is not None and sizes else {}
    kept: dict[str, np.ndarray] = {}
    for axis, wanted in sizes.items():
        if axis not in lengths or axis in UNNAMED:
            raise ValueError(
                f"no weight has an axis {axis!r} to cut; {trees.did_you_mean(axis, set(lengths) - set(UNNAMED), 'the axes are')}"
            )
        if len(lengths[axis]) > 1:
            raise ValueError(f"axis {axis!r} is {' and '.join(map(str, sorted(lengths[axis])))} long; cut the towers one by one")
        (n,) = lengths[axis]
        if not isinstance(wanted, int):
            chosen = np.asarray(wanted)
        elif 0 < wanted <= n and axis in keys:
            chosen = np.sort(np.asarray(jax.random.permutation(keys[axis], n)[:wanted]))
        else:
            chosen = np.arange(wanted)
        if not len(chosen) or chosen.min() < 0 or chosen.max() >= n:
            raise ValueError(f"axis {axis!r} has {n} entries, 0 to {n - 1}; {wanted} of it cannot be kept")
        kept[axis] = chosen
    beside = {n: axis for axis in reversed(kept) for n in lengths[axis]}

    def one(name: str, leaf: Any, text: str) -> Any:
        for at, axis in enumerate(parse_axes(text).names):
            axis = beside.get(leaf.shape[at]) if axis in UNNAMED else axis
            leaf = leaf.take(kept[axis], axis=at) if axis in kept else leaf
        return leaf

    return _map_parts(one, params, axes)


def _map_parts(fn: Any, params: Any, axes: Any) -> Any:
    """`fn(name, array, its axes)` over arrays and the parts of typed weights."""
    texts = jax.tree.map(part_axes, params, axes, is_leaf=is_typed)
    return trees.map_named(fn, params, texts)


def _stacks(params: Any, axes: Any) -> list[str]:
    found: list[str] = []
    _map_parts(lambda name, leaf, text: found.append(name) if "layers" in parse_axes(text).names else None, params, axes)
    return found
