"""Trees of weights: leaf names, ordered rules over them, partition and combination, sizes and a summary table.

A leaf's name is its path joined by "/": `blocks/mlp/up`, and below a typed weight the names of its parts: `blocks/mlp/up/a`.
A rule is `(regex, value)`; a list of rules is read in order, and the first whose regex matches the *whole* name wins. The same
mechanism serves freezing, weight decay, adapters, quantizing and pruning.

Left out on purpose: globs, negations and priorities. An ordered list of regular expressions says all of them.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

Rules = Sequence[tuple[str, Any]]


def leaf_name(path: tuple) -> str:
    """The "/"-joined name of a key path as `jax.tree_util` gives it."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """All `(name, leaf)` of a tree, in JAX's order."""
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`jax.tree.map` whose function receives the leaf's name first."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(leaf_name(path), *leaves), tree, *rest, is_leaf=is_leaf)


def match(rules: Rules, name: str, default: Any = None) -> Any:
    """The value of the first rule whose regex matches the whole of `name`, else `default`."""
    return next((value for pattern, value in rules if re.fullmatch(pattern, name)), default)


def checked(rules: Any) -> list[tuple[str, Any]]:
    """The rules as a list. Raises ValueError for what is no sequence of pairs of a regex and a value."""
    try:
        found = [(pattern, value) for pattern, value in ([rules] if isinstance(rules, str) else rules)]
        for pattern, _ in found:
            re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"rules are pairs of a regex and a value, [('blocks/.*', 8)], not {rules!r} ({error})") from None
    return found


def apply_rules(rules: Rules, tree: Any, *, default: Any = None, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """A tree of the matched values, shaped like `tree`.

    Raises ValueError for a rule that matches no leaf at all (a typing mistake would otherwise train or freeze the wrong weights),
    except the catch-all `.*`.
    """
    names, rules = [name for name, _ in named_leaves(tree, is_leaf)], checked(rules)
    for pattern, _ in rules:
        if pattern != ".*" and not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"rule {pattern!r} matches no weight; {did_you_mean(pattern, names)}")
    return map_named(lambda name, _: match(rules, name, default), tree, is_leaf=is_leaf)


def did_you_mean(word: str, known: Iterable[str], label: str = "the nearest names are") -> str:
    """The end of an error sentence: the known words nearest to `word`, or all of them where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or known[:12]
    return f"{label} {', '.join(map(repr, near))}" if near else "there are none"


def partition(tree: Any, keep: Any) -> tuple[Any, Any]:
    """Splits `tree` by a same-shaped tree of booleans: `(kept, rest)`, each with None where the other holds the leaf.

    None is an empty subtree in JAX, so gradients and optimizer state of `kept` cost nothing for what `rest` holds.
    """
    kept = jax.tree.map(lambda leaf, k: leaf if k else None, tree, keep)
    rest = jax.tree.map(lambda leaf, k: None if k else leaf, tree, keep)
    return kept, rest


def combine(kept: Any, rest: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, kept, rest, is_leaf=lambda x: x is None)


def count(tree: Any) -> int:
    """How many numbers the arrays (or ShapeDtypeStructs) of a tree hold."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of a tree's arrays (or ShapeDtypeStructs) as stored in full, not per device."""
    return sum(math.ceil(math.prod(leaf.shape) * itemsize(leaf.dtype)) for leaf in jax.tree.leaves(tree))


def itemsize(dtype: Any) -> float:
    """Bytes of one element; half a byte for int4 and uint4, whatever the backend makes of them."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 8.0
    dtype = jax.numpy.dtype(dtype)
    bits = re.search(r"(int|float)(2|4)(_|e|$)|int(2|4)$", dtype.name)
    return int(bits.group(2) or bits.group(4)) / 8 if bits else float(dtype.itemsize)


def human(number: float, unit: str = "", base: int = 1000) -> str:
    """1234567 -> "1.23M"; with base 1024 and unit "B", bytes: "1.18MiB"."""
    marks = ["", "K", "M", "G", "T", "P", "E"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
    power = 0
    while abs(number) >= base and power < len(marks) - 1:
        number, power = number / base, power + 1
    digits = f"{number:.0f}" if power == 0 and float(number).is_integer() else f"{number:.3g}"
    return f"{digits}{marks[power]}{unit}"


def summary(tree: Any, axes: Any = None) -> str:
    """A table, one line a weight: name, shape, dtype, axes (a tree of strings like `tree`), parameters, bytes; the last line has the totals."""
    names = {} if axes is None else dict(named_leaves(axes))
    rows = [("name", "shape", "dtype", "axes", "parameters", "bytes")]
    for name, leaf in named_leaves(tree):
        rows.append(
            (
                name,
                "x".join(map(str, leaf.shape)) or "-",
                str(leaf.dtype),
                names.get(name, ""),
                f"{count(leaf):,}",
                human(nbytes(leaf), "B", 1024),
            )
        )
    rows.append(("total", "", "", "", f"{count(tree):,}", human(nbytes(tree), "B", 1024)))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i >= 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
