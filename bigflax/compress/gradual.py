"""Pruning while training: masks that move, ever fewer weights that count.

    params = moving(params, [("blocks/.*/(q|k|v|out|up|gate|down)", "movement")], axes=model.axes)    nothing is masked yet
    loss_fn = gradual(loss_fn, cubic(0.9, steps=8000, begin=1000), every=10)
    state = ...                                                       any optimizer, any loop: train_step(loss_fn, tx, state)
    params = sparsified(state.weights)                                arrays with zeros, or Masked, or Sparse

A `Moving` weight (weights/compressed.py) knows how many steps it has seen and which of its entries count, and both are frozen leaves. So `gradual` is a
function from loss to loss: it gives the step their new values as updates, as batch norm does with its means, and a checkpoint holds all there is to know.
The mask of a matrix, of each layer and expert by itself, leaves out as many entries as the schedule says, to one, those of the lowest score:

    magnitude    |w|. A masked weight keeps its value, and comes back where others have become smaller    Zhu and Gupta 2017 (1710.01878)
    movement     S, learned: dL/dS = dL/dW' w, as if the mask were S itself (straight through). It        Sanh et al. 2020 (2005.07683), section 4
                 falls where training moves w towards zero, however large it is: for fine-tuning

    s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / n)^3, from t_0 to t_0 + n                                   Zhu and Gupta, eq. 1

Scores begin at zero and only their order counts, so with Adam the size of their rate does not matter, its course does; optim.make lets them not decay.

Left out on purpose: one ranking over all matrices, soft movement pruning (a threshold and a penalty), and N:M patterns, for which prune once and train Masked.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigflax import trees, weights
from bigflax.compress.matrices import highest
from bigflax.metrics import Mean
from bigflax.weights import Masked, Moving, is_typed, named_weights, parse_axes

METHODS = ("magnitude", "movement")
KINDS = ("array", "masked", "sparse")


def cubic(final: float, *, steps: int, begin: int = 0, initial: float = 0.0) -> Callable[[Any], jax.Array]:
    """The share of entries that are left out at each step: `initial` until `begin`, `final` from `steps` later on, fast at first in between."""
    if not 0 <= initial <= final < 1 or steps < 1 or begin < 0:
        raise ValueError(
            f"a schedule rises from initial to final, shares below 1, in at least one step, not from {initial} to {final} in {steps}"
        )
    return lambda step: final + (initial - final) * (1 - jnp.clip((step - begin) / steps, 0, 1)) ** 3


def moving(params: Any, rules: trees.Rules, *, axes: Any) -> Any:
    """The params with a Moving in the place of each matrix for which the rules say "magnitude" or "movement"; as yet all of it counts."""
    texts = dict(trees.named_leaves(axes))
    said = dict(trees.named_leaves(trees.apply_rules(rules, params, is_leaf=is_typed)))
    if strange := [method for method in said.values() if method not in METHODS]:
        raise ValueError(f"there is no pruning by {strange[0]!r}; {trees.did_you_mean(str(strange[0]), METHODS, 'there are')}")

    def one(name, w):
        ax = parse_axes(texts[name])
        if name not in said or not ax.first:
            return w
        if is_typed(w):
            raise ValueError(f"{name} is a {type(w).__name__} already; masks move over arrays, before anything stands upon them")
        step = jnp.zeros(w.shape[: len(ax.stack)], jnp.int32)
        return Moving(w, jnp.ones(w.shape, bool), step, jnp.zeros(w.shape, w.dtype) if said[name] == "movement" else None)

    made = trees.map_named(one, params, is_leaf=is_typed)
    if not any(isinstance(w, Moving) for _, w in named_weights(made)):
        raise ValueError(f"the rules {list(rules)!r} match no matrix; biases and norms are not pruned")
    return made


def gradual(loss_fn: Callable[..., Any], schedule: Callable[[Any], Any], *, every: int = 1) -> Callable[..., tuple[Any, ...]]:
    """The loss, which in training moves the masks on: after a number of steps that `every` divides, the share that `schedule` says for it is left out.

    Metric: `sparsity`, the share of Moving entries that were left out."""
    if every < 1:
        raise ValueError(f"masks move every so many steps, at least one, not {every}")

    def moved(params, batch, rng=None):
        result = loss_fn(params, batch, rng)
        loss, metrics, updates = (*result, {}, {})[:3] if isinstance(result, tuple) else (result, {}, {})
        found = {name: w for name, w in named_weights(params) if isinstance(w, Moving)}
        if not found:
            raise ValueError("there is no mask to move: put Moving weights into the params first, with compress.gradual.moving")
        new = {}
        for name, w in found.items():
            step, scores = w.step + 1, jax.lax.stop_gradient(jnp.abs(w.w) if w.scores is None else w.scores)
            now = step.reshape(-1)[0]  # that of all layers
            own = tuple(range(w.step.ndim, w.mask.ndim))  # of one matrix of a stack
            zeros = jnp.round(schedule(now) * math.prod(w.mask.shape[axis] for axis in own)).astype(jnp.int32)
            remake = lambda scores=scores, zeros=zeros, own=own: highest(scores, zeros, own)
            new |= {f"{name}/step": step, f"{name}/mask": jax.lax.cond(now % every == 0, remake, lambda w=w: w.mask)}
        out = sum(jnp.sum(~w.mask, dtype=jnp.float32) for w in found.values())
        sparsity = Mean(out, jnp.float32(sum(w.mask.size for w in found.values())))
        return loss, {**metrics, "sparsity": sparsity}, {**updates, **new}

    return moved


def sparsified(params: Any, kind: str = "array", *, axes: Any = None) -> Any:
    """The params with what each Moving has become: an "array" with zeros, "masked", an array of zeros that go on being zeros, or "sparse", which stores what
    is left and needs `axes`."""
    if kind not in KINDS:
        raise ValueError(f"a mask does not end as {kind!r}; {trees.did_you_mean(kind, KINDS, 'there are')}")
    if kind == "sparse" and axes is None:
        raise ValueError("a sparse weight lies along its inputs, which the axes name: pass axes=model.axes")
    texts = {} if axes is None else dict(trees.named_leaves(axes))

    def one(name, w):
        if not isinstance(w, Moving):
            return w
        if kind == "sparse":
            return weights.sparse(w.w, w.mask, axes=texts[name])
        return Masked(w.w, w.mask) if kind == "masked" else weights.dense(w)

    return trees.map_named(one, params, is_leaf=is_typed)
