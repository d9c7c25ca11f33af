"""Adapters as values of their own: taken off, put upon another copy of their base, added up, merged."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from bigflax import trees, weights
from bigflax.peft.matrices import bias_name
from bigflax.weights import IA3, Adapted, Adapter, DoRA, LoRA, Prompted, Weight, is_typed, named_weights, parse_axes, shape

Adapters = Mapping[str, Any]  # {name of a leaf: its typed weight with None for a base, or what else trained}


def split(params: Any, also: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """`(base, adapter)`: the tree as it was before it was adapted, and by name what was put upon it, a prefix, and copies of the leaves that match
    `also`, such as "head/.*"."""
    adapter = {}

    def one(name, w):
        if isinstance(w, Adapted):
            w, adapter[name] = _off(w)
        elif any(re.fullmatch(pattern, name) for pattern in also):
            adapter[name] = w
        return w

    base = trees.map_named(one, {name: leaf for name, leaf in params.items() if name != "prefix"}, is_leaf=is_typed)
    adapter |= {f"prefix/{name}": leaf for name, leaf in params.get("prefix", {}).items()}
    unused = [pattern for pattern in also if not any(re.fullmatch(pattern, name) for name in adapter)]
    if unused:
        raise ValueError(f"{unused[0]!r} matches no weight; {trees.did_you_mean(unused[0], [name for name, _ in named_weights(params)])}")
    return base, adapter


def attach(base: Any, adapter: Adapters) -> Any:
    """The inverse of `split`. Raises ValueError that names the first leaf that does not fit, as of an adapter for another base."""
    leaves = dict(named_weights(base))
    for name, part in adapter.items():
        if name.startswith("prefix/"):
            continue
        if name not in leaves:
            raise ValueError(f"the adapter has {name!r}, which this base has not; {trees.did_you_mean(name, leaves)}")
        made = _upon(part, leaves[name]) if isinstance(part, Adapted) else part
        if not _fits(made) or (made is part and shape(part) != shape(leaves[name])):
            raise ValueError(f"the adapter's {name!r} is not for {shape(leaves[name])}, the shape of this base's; it was made for another")
    made = trees.map_named(lambda name, w: _upon(adapter[name], w) if name in adapter else w, base, is_leaf=is_typed)
    found = {name.removeprefix("prefix/"): part for name, part in adapter.items() if name.startswith("prefix/")}
    return {**made, "prefix": found} if found else made


def _off(w: Weight) -> tuple[Weight, Any]:
    """(what is at the bottom of adapted weights, what stands upon it)."""
    if not isinstance(w, Adapted):
        return w, None
    base, rest = _off(w.base)
    return base, dataclasses.replace(w, base=rest)


def _upon(part: Any, base: Weight) -> Weight:
    """The inverse of `_off`; what is no adapted weight takes the place of the base."""
    if not isinstance(part, Adapted):
        return base if part is None else part
    return dataclasses.replace(part, base=_upon(part.base, base))


def _fits(w: Weight) -> bool:
    """Whether the parts of an adapted weight have the shapes that its base asks for."""
    if not isinstance(w, Adapted):
        return True
    full = shape(w.base)
    if isinstance(w, LoRA | DoRA):
        stacked = w.a.ndim + w.b.ndim - 2 - len(full)
        good = (
            stacked >= 0
            and w.a.shape[:-1] + w.b.shape[stacked + 1 :] == full
            and w.b.shape[: stacked + 1] == (*full[:stacked], w.a.shape[-1])
        )
    elif isinstance(w, Adapter):
        stack, outputs = w.down_bias.shape[:-1], w.up_bias.shape[w.down_bias.ndim - 1 :]
        inner = full[len(stack) :]
        good = full[: len(stack)] == stack and outputs in (inner[: len(outputs)], inner[-len(outputs) :])
    elif isinstance(w, Prompted):
        good = w.prompt.shape[1:] == full[1:]
    else:
        good = True
    along = next((part for name, part in weights.parts(w).items() if name in ("magnitude", "scale")), None)
    good &= along is None or (along.ndim == len(full) and all(size in (1, n) for size, n in zip(along.shape, full, strict=True)))
    return good and _fits(w.base)


def merge(params: Any) -> Any:
    """The tree with the array that it stands for in the place of each adapted weight; an IA3's factor goes into its module's bias too. Quantized weights
    that nothing stands upon stay. Raises ValueError for what no array can stand for: adapters, prompts and prefixes."""
    leaves = dict(named_weights(params))
    if any(name.startswith("prefix/") for name in leaves):
        raise ValueError("a prefix is keys and values of its own, and no weight that they could be merged into; keep it")
    factors = {}
    for name, w in leaves.items():
        if isinstance(w, Prompted):
            raise ValueError(f"{name} has a prompt, rows before a text, which no array of its shape can hold; keep it, or split it off")
        if isinstance(w, IA3) and w.bias is not None:
            factors[bias_name(name)] = w.scale

    def one(name, w):
        if name in factors:
            return w * factors[name].reshape(w.shape).astype(w.dtype)
        return weights.dense(dataclasses.replace(w, bias=None) if isinstance(w, IA3) else w) if isinstance(w, Adapted) else w

    return trees.map_named(one, params, is_leaf=is_typed)


def combine(weighted: Iterable[tuple[Adapters, float]], *, axes: Any) -> dict[str, Any]:
    """The adapter whose update is the sum of the weighted updates, exactly: their ranks side by side. Raises ValueError for what is no LoRA."""
    texts, found = dict(trees.named_leaves(axes)), {}
    for adapter, weight in weighted:
        for name, part in adapter.items():
            if not isinstance(part, LoRA) or part.base is not None:
                raise ValueError(
                    f"{name} is no LoRA alone, and only updates that are sums can be added up; switch between such adapters instead"
                )
            found.setdefault(name, []).append((part.a, part.b * (weight * part.scale)))

    def beside(name, parts):
        a, b = zip(*parts, strict=True)
        a, b = jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=len(parse_axes(texts[name]).stack))
        return LoRA(None, a, b, float(a.shape[-1]))

    return {name: beside(name, parts) for name, parts in found.items()}
