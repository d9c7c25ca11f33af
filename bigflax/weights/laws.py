"""What every weight answers to, dispatched on its type: an array unless a type has registered an answer of its own."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bigflax import trees
from bigflax.weights.axes import parse_axes

Array = jax.Array
Weight = Any  # Array, or a typed weight: what ops.einsum multiplies by

TYPES: list[type] = []


def typed(*parts: str, meta: Sequence[str] = ()) -> Callable[[type], type]:
    """Registers a typed weight, a dataclass, as a pytree of these parts."""

    def register(cls):
        TYPES.append(cls)
        return jax.tree_util.register_dataclass(cls, data_fields=[*parts], meta_fields=[*meta])

    return register


def is_typed(w: Any) -> bool:
    """True for a typed weight, False for an array."""
    return isinstance(w, tuple(TYPES))


@functools.singledispatch
def shape(w: Weight) -> tuple[int, ...]:
    """The logical shape: that of the array in whose place `w` stands, layer axes included."""
    return tuple(w.shape)


@functools.singledispatch
def dense(w: Weight) -> Array:
    """The array that `w` stands for. For reading, tests and export; training multiplies without building it. Raises ValueError where none does."""
    return w


@functools.singledispatch
def part_axes(w: Weight, axes: str) -> Any:
    """The axes of each part of `w`, in `w`'s own structure: a scale keeps the axes along which it varies, LoRA's `a` its base's first ones."""
    return axes


@functools.singledispatch
def can_train(w: Weight, axes: str = "") -> Any:
    """Which parts of `w` can ever train, booleans in `w`'s own structure: no integers, no part of a quantized weight, no running statistics, whose
    axes are named "statistic"."""
    return "statistic" not in parse_axes(axes).names and bool(jnp.issubdtype(w.dtype, jnp.inexact))


def along(part: Any, full: Sequence[int], axes: str) -> str:
    """The axes of a part that has size 1 along those of its weight that it does not vary along, and maybe fewer elements along others."""
    return " ".join(name if size == whole else "_" for name, size, whole in zip(parse_axes(axes).names, part.shape, full, strict=True))


def parts(w: Any) -> dict[str, Array]:
    """What stands upon the base, by name; of an adapted weight's, `bias`, a copy, and `key` do not train."""
    return {f.name: part for f in dataclasses.fields(w) if f.name != "base" and hasattr(part := getattr(w, f.name), "dtype")}


def dimensions(w: Weight, axes: str, what: str, rank: int = 1) -> tuple[tuple[int, ...], ...]:
    """The shape of w in three: stack, first axes, second axes. Raises ValueError where it is no matrix, or for a rank below 1."""
    ax, full = parse_axes(axes), shape(w)
    if not ax.first or rank < 1:
        raise ValueError(f"{what} needs a matrix and a rank of at least 1, not axes {axes!r} and rank {rank}")
    cut = (len(ax.stack), len(ax.stack + ax.first))
    return full[: cut[0]], full[cut[0] : cut[1]], full[cut[1] :]


def trainable(tree: Any, axes: Any = None) -> Any:
    """A same-shaped tree of booleans, `can_train` of each weight; running statistics are known where the tree of `axes` is given."""
    return jax.tree.map(can_train, tree, *([] if axes is None else [axes]), is_leaf=is_typed)


def trains(params: Any, freeze: trees.Rules, axes: Any = None) -> Any:
    """The tree of booleans of what trains: what can (`trainable`) and what no rule of `freeze` holds."""
    frozen = trees.apply_rules(freeze, params, default=False)
    return jax.tree.map(lambda can, no: can and not no, trainable(params, axes), frozen)


def named_weights(params: Any) -> list[tuple[str, Weight]]:
    """`trees.named_leaves` that stops at typed weights."""
    return trees.named_leaves(params, is_leaf=is_typed)
