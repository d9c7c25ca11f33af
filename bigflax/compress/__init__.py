"""Making a model small: functions from params to params, of which any chain may be put together.

    small = quantize(model, params, [("blocks/.*/(q|k|v|out|up|gate|down)", "int4:128")])                            rounded to nearest
    small = quantize(model, params, rules, method="gptq", forward=forward, batches=batches)                          by what goes into each matrix
    small = prune(model, params, [("blocks/mlp/.*", "2:4")], method="wanda", forward=forward, batches=batches)       zeros
    small = factorize(model, params, [("blocks/mlp/.*", 0.8)], method="whitened", forward=forward, batches=batches)  two narrow matrices for one

`forward(params, batch)` is a call of the model or a loss, `batches` what is streamed through it (observing.py says how). Rules are ordered (regex, value)
over the names of weights, first match wins, None leaves a weight as it is. A method is a function of one matrix, and a row of a table.
A method that looks at what goes into the matrices may first `correct` each for what was lost before it (observing.py).
A mixture's experts are matrices like others, each by the tokens that are sent to it (observing.py says what of those that were sent few).
Of params that are shapes (jax.ShapeDtypeStruct) each verb gives the shapes of what it would make, with all checks and without data. Values for each matrix
out of one budget for all: budget.py.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bigflax import nn, trees
from bigflax.compress import factoring, pruning, quantizing
from bigflax.compress.observing import Seen, blank, layer_by_layer, layers_of, observe, pooled, positions, stacked
from bigflax.compress.pruning import packed
from bigflax.weights import LowRank, Masked, Sparse, Weight, dense, is_typed, named_weights, parse_axes, shape, write_axes

__all__ = [
    "FACTORIZE", "PRUNE", "QUANTIZE", "Method", "Seen", "factorize", "layer_by_layer", "method_of", "observe", "packed", "prune", "quantize", "seen_enough",
]  # fmt: skip

Forward = Callable[[Any, Any], Any]


class Method(NamedTuple):
    """`make(w, value, axes=, seen=, **options) -> weight` of one matrix, which statistics of its inputs it wants (none: it looks at no data), and whether it
    inverts the hessian, so that there must be as many inputs as a matrix is wide."""

    make: Callable[..., Weight]
    wants: tuple[str, ...] = ()
    inverts: bool = False


QUANTIZE: Mapping[str, Method] = {
    "rtn": Method(quantizing.rtn), "gptq": Method(quantizing.gptq, ("hessian",), True), "awq": Method(quantizing.awq, ("hessian", "size")),
    "w8a8": Method(quantizing.w8a8), "smoothquant": Method(quantizing.smoothquant, ("peak",)), "hadamard": Method(quantizing.turned, ("hessian",), True),
}  # fmt: skip
PRUNE: Mapping[str, Method] = {
    "magnitude": Method(pruning.magnitude), "wanda": Method(pruning.wanda, ("hessian",)), "sparsegpt": Method(pruning.sparsegpt, ("hessian",), True),
    "alps": Method(pruning.alps, ("hessian",), True),
}  # fmt: skip
FACTORIZE: Mapping[str, Method] = {
    "svd": Method(factoring.svd), "asvd": Method(factoring.asvd, ("size",)), "whitened": Method(factoring.whitened, ("hessian",), True),
    "frequency": Method(factoring.frequency, ("often",)),
}  # fmt: skip


def quantize(
    model: nn.Model, params: Any, rules: trees.Rules, *, method: str = "rtn", forward: Forward | None = None,
    batches: Iterable[Any] | None = None, rows: int = 8, correct: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """The params with what the rules match in the format that they say, "int4:128" (quantizing.py), by a method of QUANTIZE with its options.

    The factors of a LowRank, the values of a Sparse, and a Masked, whose zeros stay, are rounded to nearest, each by itself. Raises ValueError before any
    work for rules that match nothing, formats that do not fit, options that the method does not have, and a method that looks at data and got none, too
    little (`seen_enough`) or tokens that the model does not have."""

    def over(make, w, value, *, axes, seen, **options):
        if isinstance(w, LowRank):
            a, b = w.factor_axes(axes)
            return LowRank(quantizing.rtn(w.a, value, axes=a), quantizing.rtn(w.b, value, axes=b), w.split)
        if isinstance(w, Sparse):
            return Sparse(quantizing.rtn(w.values, value, axes=axes), w.bits, w.axis)
        if isinstance(w, Masked):
            return quantizing.rtn(dense(w), value, axes=axes)
        if is_typed(w):
            raise ValueError(f"a {type(w).__name__} cannot be quantized; arrays, LowRank, Sparse and Masked can")
        return make(w, value, axes=axes, seen=seen, **options)

    return matrixwise(QUANTIZE, over, quantizing.read_format, model, params, rules, method, forward, batches, rows, options, correct)


def _arrays(what: str) -> Callable[..., Weight]:
    def over(make, w, value, *, axes, seen):
        if is_typed(w):
            raise ValueError(f"a {type(w).__name__} cannot be {what}; that comes before other steps, on arrays")
        return make(w, value, axes=axes, seen=seen)

    return over


def prune(
    model: nn.Model, params: Any, rules: trees.Rules, *, method: str = "wanda", forward: Forward | None = None,
    batches: Iterable[Any] | None = None, rows: int = 8, correct: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """The params with a Masked in the place of each matrix that the rules match, of the pattern that they say, "50%" or "2:4" (pruning.py), by a method of
    PRUNE. Raises as `quantize` does."""
    return matrixwise(
        PRUNE, _arrays("pruned"), pruning.read_pattern, model, params, rules, method, forward, batches, rows, options, correct
    )


def factorize(
    model: nn.Model, params: Any, rules: trees.Rules, *, method: str = "whitened", forward: Forward | None = None,
    batches: Iterable[Any] | None = None, rows: int = 8, correct: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """The params with a LowRank in the place of each matrix that the rules match, of the share of numbers or the rank that they say (factoring.py), by a method
    of FACTORIZE. Raises as `quantize` does."""
    read = factoring.read_share
    return matrixwise(FACTORIZE, _arrays("factorized"), read, model, params, rules, method, forward, batches, rows, options, correct)


def matrixwise(
    methods: Mapping[str, Method], over: Callable[..., Weight], read: Callable[[Any], Any], model: nn.Model, params: Any, rules: trees.Rules,
    method: str, forward: Forward | None, batches: Iterable[Any] | None, rows: int, options: Mapping[str, Any], correct: bool = False,
) -> Any:  # fmt: skip
    """A method of a table over each matrix that the rules match, layer by layer where it looks at what goes into them."""
    make, wants, inverts = method_of(methods, method, options, correct)
    if wants and not are_shapes(params) and (forward is None or batches is None):
        raise ValueError(f"{method} looks at what goes into the matrices: give forward and batches, or take a method that needs none")
    texts, leaves = dict(trees.named_leaves(model.axes)), dict(named_weights(params))
    trees.apply_rules(rules, params, is_leaf=is_typed)
    said = {name: trees.match(trees.checked(rules), name) for name in leaves}
    values = {name: read(value) for name, value in said.items() if value is not None}
    made = functools.partial(over, functools.partial(make, **options))
    change = lambda name, w, seen: each(w, inner(texts[name]), seen, functools.partial(made, value=values[name]))
    shapes = {}
    for name in values:  # what does not fit is said before any work
        if not parse_axes(texts[name]).contracted:
            raise ValueError(f"the rules match {name}, which has no inputs; compress matrices, not biases, norms and statistics")
        like = jax.eval_shape(lambda w, name=name: layers_of(w, texts[name])[0], leaves[name])
        one = jax.eval_shape(lambda w, name=name: change(name, w, blank(w, inner(texts[name]), wants) if wants else None), like)
        layers = shape(leaves[name])[:1] if "layers" in parse_axes(texts[name]).stack else ()
        shapes[name] = jax.tree.map(lambda part, layers=layers: jax.ShapeDtypeStruct((*layers, *part.shape), part.dtype), one)
    if are_shapes(params):
        return trees.map_named(lambda name, w: shapes.get(name, w), params, is_leaf=is_typed)
    if wants:
        assert forward is not None and batches is not None
        held = checked_batches(model, params, batches)
        if inverts or correct:
            meant = {name: leaves[name] for name in values}
            seen_enough(model, params, meant, method=f"{method}, corrected," if correct else method, forward=forward, batches=held)
        return layer_by_layer(forward, params, held, change, list(values), axes=model.axes, wants=wants, rows=rows, correct=correct)

    def all_layers(name, w):
        layers = [change(name, layer, None) for layer in layers_of(w, texts[name])]
        return stacked(layers) if "layers" in parse_axes(texts[name]).stack else layers[0]

    return trees.map_named(lambda name, w: all_layers(name, w) if name in values else w, params, is_leaf=is_typed)


def method_of(methods: Mapping[str, Method], name: str, options: Mapping[str, Any], correct: bool = False) -> Method:
    """The method of this name. Raises ValueError where there is none, it does not take these options, or its matrices cannot be corrected."""
    if name not in methods:
        raise ValueError(f"unknown method {name!r}; {trees.did_you_mean(name, methods, 'there are')}")
    taken = [option for option in inspect.signature(methods[name].make).parameters if option not in ("seen", "axes")][2:]
    if unknown := sorted(options.keys() - {*taken}):
        raise ValueError(f"{name} takes no {unknown[0]!r}; {trees.did_you_mean(unknown[0], taken, 'its options are')}")
    if correct not in (True, False):
        raise ValueError(f"correct is true or false, not {correct!r}")
    if correct and "hessian" not in methods[name].wants:
        others = ", ".join(name for name, method in methods.items() if "hessian" in method.wants)
        raise ValueError(f"{name} does not see what its matrices could be corrected by; leave out correct, or take {others}")
    return methods[name]


def inner(axes: str) -> str:
    """The axes of one layer of a weight."""
    ax = parse_axes(axes)
    return write_axes(ax._replace(stack=tuple(name for name in ax.stack if name != "layers")))


def are_shapes(params: Any) -> bool:
    """Whether a tree has jax.ShapeDtypeStruct where arrays would be."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def checked_batches(model: nn.Model, params: Any, batches: Iterable[Any]) -> list[Any]:
    """The batches as a list. Raises ValueError where there are none, or one has token ids beyond the model's vocabulary."""
    held, texts = [*batches], dict(trees.named_leaves(model.axes))
    if not held:
        raise ValueError("there are no batches to observe; give some")
    tables = [shape(w)[0] for name, w in named_weights(params) if (ax := parse_axes(texts[name])).outputs_first and ax.first == ("vocab",)]
    ids = [x for batch in held if isinstance(batch, Mapping) for name, x in batch.items() if name.endswith("input_ids")]
    if tables and (worst := max((int(np.asarray(x).max(initial=0)) for x in ids), default=0)) >= max(tables):
        raise ValueError(f"token id {worst} is outside of the vocabulary of {max(tables)}; is it the tokenizer of another model?")
    return held


def seen_enough(
    model: nn.Model, params: Any, matrices: Mapping[str, Weight], *, method: str, forward: Forward, batches: Sequence[Any]
) -> None:
    """Raises ValueError where fewer inputs than a matrix is wide would be seen: the hessian of what goes into it has no full rank then, and what was not seen
    is changed at no cost (with less than half as many GPTQ was worse than rounding, CONTRIBUTING.md's log). `matrices` are those that it is meant for, by name,
    arrays or shapes; typed weights among them are rounded without a look."""
    texts = dict(trees.named_leaves(model.axes))
    widths = {name: math.prod(w.shape[i] for i in parse_axes(texts[name]).contracted) for name, w in matrices.items() if not is_typed(w)}
    if not widths:
        return
    many = positions(forward, params, batches, list(widths), axes=model.axes)
    name = max(widths, key=lambda name: widths[name] / max(many[name], 1))
    if many[name] < widths[name]:
        need = -(-widths[name] * len(batches) // max(many[name], 1))
        raise ValueError(
            f"{method} needs as many positions as a matrix has inputs, {widths[name]} of {name}, and is given {many[name]}, padding left out; take {need} "
            f"batches like the {len(batches)} here, or leave that matrix to a method that inverts nothing"
        )


def each(w: Weight, axes: str, seen: Seen | None, make: Callable[..., Any], together: Callable[..., Any] = stacked) -> Any:
    """What is made of a matrix, or together of each of a stack of them (a mixture's experts)."""
    ax = parse_axes(axes)
    if not ax.stack:
        return make(w, axes=axes, seen=seen)
    seen = pooled(seen) if seen is not None and ax.stack[0] == "experts" else seen
    at = lambda tree, i: None if tree is None else jax.tree.map(lambda part: part[i], tree)
    rest = write_axes(ax._replace(stack=ax.stack[1:]))
    return together([each(at(w, i), rest, at(seen, i), make, together) for i in range(shape(w)[0])])
