"""One budget for all matrices together: bits and ranks go where they are missed most.

    rules = formats(model, params, [("blocks/.*/(q|k|v|out|up|down)", ["int3:32", "int4:32", "int8"])], "4.5 bits", forward=forward, batches=batches)
    small = quantize(model, params, rules, method="gptq", forward=forward, batches=batches)          [("blocks/mlp/up", "int3:32"), ...], any method
    rules = ranks(model, params, [("blocks/.*", 0.8)], method="whitened", forward=forward, batches=batches)
    small = factorize(model, params, rules, method="whitened", forward=forward, batches=batches)     [("blocks/mlp/up", 53), ("blocks/attention/q", None) ...]

Formats. The harm of a format to a matrix is measured: KL of the model's outputs from what they were, with this matrix alone rounded to nearest, on the batches
given. To second order KL is d^T F d / 2 of the errors d, F the Fisher information, whose blocks between matrices drop out on average, for rounding errors are
independent and near zero in the mean; so harms add up (HAWQ-V2, Dong et al. 2019, arXiv 1911.03852, section 3.1, with F measured and not by its trace). What
is chosen is the least sum that fits into the bytes: a multiple-choice knapsack, solved exactly (Sinha and Zoltners 1979).

Ranks. Of what a method cuts (of `whitened` the matrix times its inputs' root) the squares of the singular values that go are what is lost (SVD-LLM, Wang et
al. 2024, 2403.07378, theorem 3.2), as a share of all of that matrix; the ranks that lose least in sum, of as many numbers as the rules would leave. A matrix
may stay dense, which is much for little where low rank would save next to nothing. A rule's share is among what is compared, so never is more lost. Whether
the model's outputs are nearer is another question: MiniLM-L6, error of its last states (CONTRIBUTING.md's log), 0.46 with a share of 0.8 for all and 0.43 with
ranks spread, 0.66 and 0.72 with 0.5; by squares that are not shares it was worse at both.

Left out on purpose: a choice for each layer, for the layers of a stack are one array, computed by one scan: formats must be alike, and ranks that differ
would be filled up with zeros that are stored. So the harm of a name is that of all of its layers rounded together, its loss the sum over them. And harms by
the method that will round: one rounding to nearest stands for all, for a method's own takes all batches through all layers for each pair.
Legend: K inputs, N outputs, R rank.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import compress as small
from bigflax import nn, trees
from bigflax.compress import FACTORIZE, Forward, are_shapes, checked_batches, factoring, quantize
from bigflax.compress.quantizing import Format, read_format
from bigflax.losses import IGNORE, kl_divergence
from bigflax.weights import Masked, Quantized, Sparse, Weight, dense, is_typed, named_weights, parse_axes, shape

UNITS = {"bytes": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
NOTHING = 1e-8  # nats a position: so far apart may be the outputs of one model in float32, compiled twice
STATES = 2**16  # beyond so many sums that none beats in both size and harm, near ones are taken for one


# -- formats ---------------------------------------------------------------------------------------------------------------


def read_budget(text: Any) -> tuple[float, str]:
    """Reads "4.5 bits", the mean of a number, or "12 MiB": the amount and "bits", or bytes and "bytes". Raises ValueError for anything else."""
    said = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-zA-Z]+)", text) if isinstance(text, str) else None
    unit = said[2].lower() if said else ""
    if said is None or float(said[1]) <= 0 or unit not in ("bits", *UNITS):
        raise ValueError(f"{text!r} is no budget: give bits of a number on average, '4.5 bits', or a size such as '12 MiB'")
    return (float(said[1]), "bits") if unit == "bits" else (float(said[1]) * UNITS[unit], "bytes")


def formats(
    model: nn.Model, params: Any, rules: trees.Rules, within: str, *, forward: Forward, batches: Iterable[Any], method: str = "rtn",
    **options: Any,
) -> list[tuple[str, str]]:  # fmt: skip
    """Rules for `quantize` that give each matrix one of the formats that these rules list for it, so that together they take no more than `within`, "4.5 bits"
    a number or "12 MiB", as they are stored, scales counted, and the sum of their harms is least. A rule of one format takes part in the budget.

    `forward(params, batch)` gives the model's outputs: logits, or a dict that has them, or any arrays, of which the squared change is taken. `method` and
    its options are those of `quantize`, for what it adds to the size. Of a tree of shapes it gives the smallest format of each matrix, and looks at no data.
    Raises ValueError before any work for formats that do not fit, a budget below the smallest of them, and a forward that gives no outputs."""
    leaves, held = dict(named_weights(params)), checked_batches(model, params, batches)
    amount, unit = read_budget(within)
    trees.apply_rules(rules, params, is_leaf=is_typed)
    said = {name: trees.match(trees.checked(rules), name) for name in leaves}
    among = {name: [*value] if isinstance(value, list | tuple) else [value] for name, value in said.items() if value is not None}
    if not among or not all(among.values()):
        raise ValueError("there is nothing to choose from; give rules of several formats, [('blocks/.*', ['int4:32', 'int8'])]")
    shapes = jax.eval_shape(lambda params: params, params)
    made = lambda name, text: dict(named_weights(quantize(model, shapes, [(re.escape(name), text)], method=method, **options)))[name]
    sizes = {name: [stored(made(name, text), read_format(text)) for text in texts] for name, texts in among.items()}
    numbers = sum(_numbers(leaves[name]) for name in among)
    most, least = int(amount * numbers / 8 if unit == "bits" else amount), sum(map(min, sizes.values()))
    if least > most:
        asked = f"{8 * least / numbers:.2f} bits" if unit == "bits" else f"{least} bytes"
        raise ValueError(f"{within!r} is too little for {len(among)} matrices: their smallest formats take {asked}; allow more, or add one")
    try:
        jax.eval_shape(lambda params, batch: _apart(forward(params, batch), forward(params, batch), batch), shapes, held[0])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"formats are chosen by a model's outputs, which these batches do not give ({error}); say the format of each by rules"
        ) from error
    if are_shapes(params):
        return [(re.escape(name), texts[int(np.argmin(sizes[name]))]) for name, texts in among.items()]
    harm = harms(model, params, among, forward=forward, batches=held)
    picked = choose([harm[name] for name in among], [sizes[name] for name in among], most)
    return [(re.escape(name), among[name][i]) for name, i in zip(among, picked, strict=True)]


def harms(
    model: nn.Model, params: Any, among: Mapping[str, Sequence[str]], *, forward: Forward, batches: Sequence[Any]
) -> dict[str, list[float]]:
    """Of each named matrix and each of its formats how far the outputs go when it alone is rounded to nearest, in nats a position."""

    one = jax.jit(lambda now, before, batch: _apart(forward(now, batch), forward(before, batch), batch))

    def of(name, text):
        rounded = quantize(model, params, [(re.escape(name), text)])
        # an array where codes would stand, so that all names and formats are one program
        now = trees.map_named(lambda other, w: dense(w) if other == name else w, rounded, is_leaf=is_typed)
        sums = [one(now, params, batch) for batch in batches]
        found = float(sum(total for total, _ in sums)) / max(float(sum(count for _, count in sums)), 1.0)
        return math.inf if not math.isfinite(found) else found if found > NOTHING else 0.0

    return {name: [of(name, text) if len(texts) > 1 else 0.0 for text in texts] for name, texts in among.items()}


def _apart(now: Any, before: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """(the sum of how far outputs are from what they were, over how many positions): KL of logits, else the squares of all changes as a share."""
    logits: Any = lambda out: out["logits"] if isinstance(out, Mapping) and "logits" in out else out
    p, q = logits(before), logits(now)
    if getattr(p, "ndim", 0) >= 2 and p.shape[-1] > 1:
        each = kl_divergence(q, p)
        real = next((mask for mask in _masks(batch) if mask.shape == each.shape), jnp.ones(each.shape))
        return jnp.sum(each * real), jnp.sum(real)
    pairs = [(a, b) for a, b in zip(*map(jax.tree.leaves, (q, p)), strict=True) if b.ndim and jnp.issubdtype(b.dtype, jnp.floating)]
    if not pairs:
        raise ValueError("a forward that gives a loss alone; give the model's own call")
    real = next((mask for mask in _masks(batch) if mask.ndim == 2), jnp.zeros((0, 0)))
    there = lambda x: real.reshape(*real.shape, *(1,) * (x.ndim - 2)) if x.shape[:2] == real.shape else 1.0
    square = lambda x: jnp.sum(there(x) * jnp.square(x.astype(jnp.float32)))
    return sum((square(a - b) / (square(b) + 1e-20) for a, b in pairs), jnp.zeros(())), jnp.ones(())


def _masks(batch: Any) -> list[jax.Array]:
    """What says which positions are real, the surest first."""
    fields = batch if isinstance(batch, Mapping) else {}
    labels = [fields["labels"] != IGNORE] if fields.get("labels") is not None else []
    return [*labels, *(fields[name] > 0 for name in ("attention_mask", "segment_ids") if fields.get(name) is not None)]


def stored(w: Weight, fmt: Format) -> int:
    """Bytes of a weight of this format as it is written to disk: codes and zero points of so many bits each, in rows of whole bytes along the last axis, and
    what else it has; of a Sparse its values alone, for its places stay as they are. Shapes are enough."""
    part = lambda a, bits: 0 if a is None else math.prod(a.shape[:-1]) * -(-a.shape[-1] * bits // 8)
    leaves = jax.tree.leaves(w.values if isinstance(w, Sparse) else w, is_leaf=lambda x: isinstance(x, Quantized))
    codes = lambda q: part(q.qvalue, fmt.bits) + part(q.zero_point, fmt.bits) + trees.nbytes(q.scale)
    return sum(codes(leaf) if isinstance(leaf, Quantized) else trees.nbytes(leaf) for leaf in leaves)


def _numbers(w: Weight) -> int:
    """How many numbers are to be rounded."""
    return trees.count(w.w if isinstance(w, Masked) else w.values if isinstance(w, Sparse) else w)


def choose(harm: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], most: int) -> list[int]:
    """Which choice of each item makes the sum of harms least while their sizes sum to `most` at the most; of equals the smallest. Exact as long as no more
    than STATES partial sums are such that no other is both smaller and less harmful. Raises ValueError where nothing fits."""
    total, lost, ways = np.zeros(1, np.int64), np.zeros(1), []
    rest = sum(map(min, sizes))
    for its, size in zip(harm, sizes, strict=True):
        rest -= min(size)
        total, lost = ((sums[:, None] + np.asarray(more)).reshape(-1) for sums, more in ((total, size), (lost, its)))
        order = np.lexsort((lost, total))
        order = order[total[order] + rest <= most]
        if not len(order):
            raise ValueError(f"nothing fits into {most}; the smallest choices are {sum(map(min, sizes))}")
        best = np.minimum.accumulate(lost[order])
        order = order[np.r_[True, best[1:] < best[:-1]]]
        if len(order) > STATES:  # of each cell of a grid of sizes the least harmful, which is the last
            cell = total[order] * STATES // (most + 1)
            order = order[np.r_[cell[1:] != cell[:-1], True]]
        ways.append((order, len(size)))
        total, lost = total[order], lost[order]
    at, picked = len(lost) - 1, []
    for order, many in reversed(ways):
        at, choice = divmod(int(order[at]), many)
        picked.append(choice)
    return picked[::-1]


# -- ranks -----------------------------------------------------------------------------------------------------------------


def ranks(
    model: nn.Model, params: Any, rules: trees.Rules, *, method: str = "whitened", forward: Forward | None = None,
    batches: Iterable[Any] | None = None, rows: int = 8, **options: Any,
) -> list[tuple[str, int | None]]:  # fmt: skip
    """Rules for `factorize` that give each matrix the rank by which, with as many numbers in all as these rules would leave, the least is lost; None where it
    stays dense. `method` with its options says what is lost, and is the one to factorize by. Of a tree of shapes it gives the ranks that the rules say.
    Raises ValueError as `factorize` does."""
    _, wants, inverts = small.method_of(FACTORIZE, method, options)
    texts, leaves = dict(trees.named_leaves(model.axes)), dict(named_weights(params))
    trees.apply_rules(rules, params, is_leaf=is_typed)
    said = {name: value for name in leaves if (value := trees.match(trees.checked(rules), name)) is not None}
    found: dict[str, Any] = {}
    for name in said:
        if is_typed(leaves[name]) or not parse_axes(texts[name]).contracted:
            raise ValueError(f"{name} is no array with inputs, of which ranks could be; leave it out of the rules")
    sides = {name: _sides(leaves[name], texts[name]) for name in said}
    even = {name: factoring.rank_within(factoring.read_share(value), *sides[name][1:]) for name, value in said.items()}
    if are_shapes(params) or not said:
        return [(re.escape(name), rank) for name, rank in even.items()]

    def add(name, w, seen):
        spectrum = lambda w, *, axes, seen: factoring.spectrum(w, axes=axes, seen=seen, method=method, **options)
        squares = np.asarray(small.each(w, small.inner(texts[name]), seen, spectrum, jnp.stack), np.float64)
        squares = squares.reshape(-1, squares.shape[-1])
        found[name] = found.get(name, 0) + (squares / np.maximum(squares.sum(-1, keepdims=True), 1e-30)).sum(0)
        return w

    if wants:
        if forward is None or batches is None:
            raise ValueError(f"{method} looks at what goes into the matrices: give forward and batches, or take a method that needs none")
        held = checked_batches(model, params, batches)
        if inverts:
            small.seen_enough(model, params, {name: leaves[name] for name in said}, method=method, forward=forward, batches=held)
        small.layer_by_layer(forward, params, held, add, list(said), axes=model.axes, wants=wants, rows=rows)
    else:
        for name in said:
            for w in small.layers_of(leaves[name], texts[name]):
                add(name, w, None)
    chosen = spread([found[name] for name in said], [sides[name] for name in said], [even[name] for name in said])
    return [(re.escape(name), rank) for name, rank in zip(said, chosen, strict=True)]


def _sides(w: Weight, axes: str) -> tuple[int, int, int]:
    """(how many matrices, K, N)."""
    ax, full = parse_axes(axes), shape(w)
    many, K = math.prod(full[: len(ax.stack)]), math.prod(full[i] for i in ax.contracted)
    return many, K, math.prod(full) // many // K


def spread(squares: Sequence[np.ndarray], sides: Sequence[tuple[int, int, int]], even: Sequence[int], grid: int = 64) -> list[int | None]:
    """The rank of each matrix, None for dense, that loses least: `squares` is what each singular value is worth, the largest first, `sides` how many such
    matrices there are, K and N, `even` the ranks whose numbers are there to be spread. About `grid` ranks of each are compared, and `even`; what is left
    goes to one rank after the other, where it brings most."""
    most = sum(many * rank * (K + N) for (many, K, N), rank in zip(sides, even, strict=True))
    lost = [np.r_[np.cumsum(its[::-1])[::-1], 0.0] for its in squares]  # of each rank
    tops = [(K * N - 1) // (K + N) for _, K, N in sides]
    grids = [sorted({*range(top, 0, -max(1, top // grid)), rank, 1}) for top, rank in zip(tops, even, strict=True)]
    harm = [[*(float(tail[rank]) for rank in its), 0.0] for tail, its in zip(lost, grids, strict=True)]
    sizes = [[*(many * rank * (K + N) for rank in its), many * K * N] for (many, K, N), its in zip(sides, grids, strict=True)]
    picked = choose(harm, sizes, most)
    left = most - sum(size[i] for size, i in zip(sizes, picked, strict=True))
    chosen = [its[i] if i < len(its) else None for its, i in zip(grids, picked, strict=True)]
    while True:
        gains = [
            (-1.0 if rank is None or rank >= top or many * (K + N) > left else float(tail[rank] - tail[rank + 1]) / (many * (K + N)), i)
            for i, (rank, top, tail, (many, K, N)) in enumerate(zip(chosen, tops, lost, sides, strict=True))
        ]
        gain, i = max(gains)
        if gain <= 0:
            return chosen
        left -= sides[i][0] * sum(sides[i][1:])
        chosen[i] = (chosen[i] or 0) + 1
