"""Published weights' names: one table a family, read in both directions.

    NAMES = {
        "wte.weight": ("embed/tokens", "V D"),
        "h.{l}.mlp.c_fc.weight": ("blocks/mlp/up", "D F"),
        "h.{l}.attn.c_attn.weight": ("blocks/attention/q blocks/attention/k blocks/attention/v", "D (S N H) -> S D N H"),
    }

On the left a tensor of the published file; each `{field}` counts along one leading, stacked axis of our leaf. On the right our leaf and how
its inner dimensions, a letter each, come out of the tensor's: permuted, or taken from a dimension that holds several, outermost first.
Where a tensor holds several leaves of one shape, S numbers them; leaves of different shapes follow one another along its first dimension.
A dimension of size one that our leaf does not have is written 1.
So reading any slice of a leaf reads just the part of the tensors that holds it, and writing is the same table backwards.

Left out on purpose: sums, scales and other arithmetic; the tables only move numbers, and what goes out is bit for bit what came in.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigflax.tensors import empty

THREADS = min(8, os.cpu_count() or 1)

Table = Mapping[str, tuple[str, str]]
Shapes = Mapping[str, tuple[int, ...]]  # leaf name -> its shape, stacked axes included


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table."""

    template: str
    leaves: tuple[str, ...]
    pattern: str
    first: int = 0  # what the outermost field counts from, and by
    step: int = 1

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """The names of the stacked axes, outermost first."""
        return tuple(re.findall(r"{(\w+)}", self.template))

    @functools.cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The letters of each dimension of the tensor, outermost first."""
        theirs = self.pattern.partition("->")[0]
        return tuple(tuple(part.strip("()").split()) for part in re.findall(r"\([^)]*\)|\S+", theirs))

    @functools.cached_property
    def letters(self) -> tuple[str, ...]:
        """The letters of our leaf's inner dimensions, S in front where there is one."""
        ours = self.pattern.partition("->")[2].split()
        return tuple(ours) or self._order

    @property
    def _order(self) -> tuple[str, ...]:
        """The letters of the tensor one by one, outermost first."""
        return tuple(letter for letter in itertools.chain(*self.groups) if letter != "1")

    def _sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        inner = [letter for letter in self.letters if letter != "S"]
        if len(shape) != len(self.fields) + len(inner):
            raise ValueError(f"{self.template}: {self.pattern!r} does not fit a leaf of shape {shape}")
        return {**dict(zip(inner, shape[len(self.fields) :], strict=True)), "S": len(self.leaves), "1": 1}

    def _extent(self, group: tuple[str, ...], shape: tuple[int, ...]) -> int:
        sizes = self._sizes(shape)
        return math.prod(sizes[letter] for letter in group)

    @property
    def _stacked(self) -> bool:
        return "S" in self.letters

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """The tensor's shape."""
        sizes = [self._extent(group, shapes[self.leaves[0]]) for group in self.groups]
        if len(self.leaves) > 1 and not self._stacked:
            sizes[0] = sum(self._extent(self.groups[0], shapes[leaf]) for leaf in self.leaves)
        return tuple(sizes)

    def names(self, shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor of this line and its place along the stacked axes."""
        stack = shapes[self.leaves[0]][: len(self.fields)]
        for at in itertools.product(*map(range, stack)):
            yield self._name(at), at

    def read(
        self, leaf: str, index: tuple[slice, ...], shapes: Shapes, tensor: Callable[[str], Any], dtype: Any, done: Callable[[str], Any] = id
    ) -> np.ndarray:
        """`leaf[index]` in `dtype`; `tensor(name)` is anything that gives an array when it is sliced, best a view of a mapped file, and
        `done(name)` is told when nothing more of it is needed here."""
        shape = shapes[leaf]
        spans = [range(n)[s] for n, s in zip(shape, index, strict=True)]
        out = empty([len(span) for span in spans], dtype)
        k = len(self.fields)

        def one(place: tuple[tuple[int, int], ...]) -> None:
            name = self._name(tuple(i for _, i in place))
            _copy(out[(*(at for at, _ in place), ...)], self._part(leaf, spans[k:], shapes, tensor(name)))
            done(name)

        places = itertools.product(*(enumerate(span) for span in spans[:k]))
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, places))
        return out

    def _name(self, at: tuple[int, ...]) -> str:
        counted = (self.first + self.step * at[0], *at[1:]) if at else at
        return self.template.format(**dict(zip(self.fields, counted, strict=True)))

    def _part(self, leaf: str, spans: list[range], shapes: Shapes, tensor: Any) -> np.ndarray:
        sizes, number = self._sizes(shapes[leaf]), self.leaves.index(leaf)
        inner = [letter for letter in self.letters if letter != "S"]
        want = {letter: slice(span.start, span.stop) for letter, span in zip(inner, spans, strict=True)}
        want |= {"S": slice(number, number + 1), "1": slice(0, 1)}
        begin = 0 if self._stacked else sum(self._extent(self.groups[0], shapes[other]) for other in self.leaves[:number])
        cuts, loaded, remaining = [], [], []
        for i, (outer, *others) in enumerate(self.groups):
            step, offset = math.prod(sizes[letter] for letter in others), begin if i == 0 else 0
            cuts.append(slice(offset + want[outer].start * step, offset + want[outer].stop * step))
            if outer != "1":
                loaded += [want[outer].stop - want[outer].start, *(sizes[letter] for letter in others)]
                remaining += [slice(None), *(want[letter] for letter in others)]
        a = np.asarray(tensor[tuple(cuts)]).reshape(loaded)[tuple(remaining)]
        a = a.transpose([self._order.index(letter) for letter in self.letters])
        return a[0] if self._stacked else a

    def write(self, at: tuple[int, ...], leaf: Callable[[str], np.ndarray]) -> np.ndarray:
        """The tensor at one place along the stacked axes; `leaf(name)` is a whole leaf of ours."""
        parts = [leaf(name)[at] for name in self.leaves]
        if self._stacked:
            parts = [np.stack(parts)]
        tensors = []
        for part in parts:
            sizes = {**dict(zip(self.letters, part.shape, strict=True)), "1": 1}
            flat = [math.prod(sizes[letter] for letter in group) for group in self.groups]
            tensors.append(part.transpose([self.letters.index(letter) for letter in self._order]).reshape(flat))
        return np.asarray(tensors[0] if len(tensors) == 1 else np.concatenate(tensors), order="C")  # a number stays one


def _copy(out: np.ndarray, part: np.ndarray) -> None:
    """out[...] = part, where rows of one are columns of the other by strips of a cache line: seven to nine times as fast (4096 x 1024)."""
    if part.strides[-1:] in ((), (part.itemsize,)):
        out[...] = part
        return
    width, part = 64 // out.itemsize, part.astype(out.dtype, copy=False)  # cast as it lies, which is half of the work at once
    for j in range(0, out.shape[-1], width):
        out[..., j : j + width] = part[..., j : j + width]


# Of a group of layers: the name of its leaves, its first layer, its period, how often it repeats; 0 is one layer without an axis of layers.
Place = tuple[str, int, int, int]
Places = Mapping[str, Sequence[Place]]  # stem of the leaves in the table -> the groups that its layers are in


def below(name: str, places: Places) -> Places:
    """The places of a part that is itself called `name`."""
    return {
        f"{name}/{stem}": [(f"{name}/{group}", first, period, repeats) for group, first, period, repeats in groups]
        for stem, groups in places.items()
    }


def entries(table: Table, places: Places = {"blocks": (("blocks", 0, 1, 1),)}) -> list[Entry]:  # noqa: B006 (never changed)
    """The lines of a table. A line of layers, whose leaves it writes below a stem of `places`, becomes one for each kind of layer there is."""
    out = []
    for template, (leaves, pattern) in table.items():
        stem = next((stem for stem in places if leaves.startswith(f"{stem}/")), None)
        for name, first, period, repeats in [("", 0, 1, 1)] if stem is None else places[stem]:
            for kind in range(period):
                where = f"{name}/" if period == 1 else f"{name}/{kind}/"
                mine = tuple(where + leaf.removeprefix(f"{stem}/") if stem else leaf for leaf in leaves.split())
                theirs = template if repeats else re.sub(r"{\w+}", str(first), template, count=1)
                out.append(Entry(theirs, mine, pattern, first + kind, period))
    return out
