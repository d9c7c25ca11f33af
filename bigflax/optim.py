"""Optimizers: an optax chain from plain values.

    tx = optim.make(lr=3e-4, steps=10_000, warmup_steps=500)      clip -> optimizer -> decay -> schedule -> factors of layers -> average

Weight decay reaches what `decay` names; by default the matrices, not biases, norms and scales, whatever they are called. The learning rate
is a schedule of the step alone, so that a resumed run needs nothing but the step.

Sources: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101); Lion, Chen et al. 2023 (2302.06675); Adafactor, Shazeer & Stern 2018
(1804.04235); Muon, Jordan et al. 2024; WSD schedule, Hu et al. 2024 (2404.06395); rates that
fall layer by layer, Clark et al. 2020 (ELECTRA, 2003.10555) and Bao et al. 2021 (BEiT, 2106.08254); averages of weights, Polyak and Juditsky 1992.
Left out on purpose: gradient accumulation, which belongs to the step (train.py), and freezing: what is frozen is not in the tree.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigflax import trees
from bigflax.weights import VECTORS, parse_axes

SCHEDULES = ("cosine", "linear", "wsd", "constant")
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "sgd")


def schedule(
    *, lr: float, steps: int, kind: str = "cosine", warmup_steps: int = 0, final: float = 0.1, decay_steps: int | None = None
) -> optax.Schedule:
    """Learning rate at each step: linear warmup from lr / warmup_steps, then `kind` down to `final * lr` at `steps`.

    "wsd" stays at lr and falls linearly over the last `decay_steps` (a fifth of the run by default).
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}; {trees.did_you_mean(kind, SCHEDULES, 'there are')}")
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(f"warmup_steps {warmup_steps} must be at least 0 and below the {steps} steps of the run")
    rest = steps - warmup_steps
    if kind == "cosine":
        main = optax.cosine_decay_schedule(lr, rest, alpha=final)
    elif kind == "linear":
        main = optax.linear_schedule(lr, final * lr, rest)
    elif kind == "wsd":
        fall = min(rest, decay_steps or max(1, steps // 5))
        main = optax.join_schedules([optax.constant_schedule(lr), optax.linear_schedule(lr, final * lr, fall)], [rest - fall])
    else:
        main = optax.constant_schedule(lr)
    if not warmup_steps:
        return main
    return optax.join_schedules([optax.linear_schedule(lr / warmup_steps, lr, warmup_steps), main], [warmup_steps])


def make(
    *,
    lr: float,
    steps: int,
    name: str = "adamw",
    kind: str = "cosine",
    warmup_steps: int = 0,
    final: float = 0.1,
    decay_steps: int | None = None,
    weight_decay: float = 0.1,
    decay: trees.Rules | None = None,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    layer_decay: float = 1.0,
    ema: float | None = None,
    axes: Any = None,
) -> optax.GradientTransformation:
    """The chain: clip by global norm, `name`'s update, weight decay, schedule, the layers' factors, the average of weights.

    `decay` are rules (regex over leaf names -> True or False); without them every leaf decays that has at least two axes besides its
    stacks (told by `axes`, the tree of axis strings; where that is None, by its number of dimensions). "muon" orthogonalizes the
    matrices between input and output and leaves embeddings, heads and vectors to AdamW; it needs `axes`.
    `layer_decay` (0.65 to 0.95 is usual) is that of `by_layer`, which needs them too; `ema` that of `average`, which `averaged` finds.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; {trees.did_you_mean(name, OPTIMIZERS, 'there are')}")
    rate = schedule(lr=lr, steps=steps, kind=kind, warmup_steps=warmup_steps, final=final, decay_steps=decay_steps)
    if decay is not None:
        mask: Any = lambda params: trees.apply_rules(decay, params, default=False)
    else:
        mask = lambda params: _matrices(params, axes)
    if name == "adamw":
        inner = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    elif name == "lion":
        inner = optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)
    elif name == "adafactor":
        inner = _decayed(optax.adafactor(), rate, weight_decay, mask)
    elif name == "sgd":
        inner = _decayed(optax.sgd(1.0, momentum=b1 or None), rate, weight_decay, mask)
    else:
        inner = _decayed(_muon(axes, b1=b1, b2=b2, eps=eps), rate, weight_decay, mask)
    parts = [inner] if clip is None else [optax.clip_by_global_norm(clip), inner]
    parts += [] if layer_decay == 1 else [by_layer(layer_decay, axes)]
    parts += [] if ema is None else [average(ema)]
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _matrices(params: Any, axes: Any) -> Any:
    if axes is None:
        return jax.tree.map(lambda w: w.ndim >= 2, params)
    # `axes` is the whole model's tree; `params` may lack what is frozen and hold parts of typed weights, so look names up.
    texts = dict(trees.named_leaves(axes))
    matrix = lambda name, w: w.ndim >= 2 and name.rpartition("/")[2] not in VECTORS
    return trees.map_named(lambda name, w: bool(parse_axes(texts[name]).first) if name in texts else matrix(name, w), params)


def _decayed(descent: optax.GradientTransformation, rate: optax.Schedule, weight_decay: float, mask: Any) -> optax.GradientTransformation:
    """`descent` (of learning rate 1) with AdamW's decay: w -= rate * weight_decay * w. What optax builds in does otherwise: adafactor
    takes 10% of the weights at each step whatever the rate, muon decays biases and norms, sgd lets momentum amplify it."""
    return optax.chain(descent, optax.add_decayed_weights(-weight_decay, mask), optax.scale_by_schedule(rate))


def _muon(axes, *, b1, b2, eps) -> optax.GradientTransformation:
    if axes is None:
        raise ValueError("muon orthogonalizes matrices between inputs and outputs and needs to know them: pass axes=model.axes")
    from optax import contrib

    texts = dict(trees.named_leaves(axes))

    def dims(params):
        """For each weight its input and output dimensions, or None: embeddings, heads and vectors go to AdamW."""

        def one(name, w):
            ax = parse_axes(texts.get(name, ""))
            if not ax.first or "vocab" in ax.names or "positions" in ax.names:
                return None
            start = len(ax.stack)
            ins, outs = tuple(range(start, start + len(ax.first))), tuple(range(start + len(ax.first), w.ndim))
            return contrib.MuonDimensionNumbers(reduction_axis=ins, output_axis=outs)

        return trees.map_named(one, params)

    return contrib.muon(1.0, adam_b1=b1, adam_b2=b2, eps=eps, muon_weight_dimension_numbers=dims, consistent_rms=0.2)


# -- layers, from the bottom to the top ------------------------------------------------------------------------------------

_BLOCKS = re.compile(r"(?P<tower>(?:.*?/)??)(?P<group>(?:(?:blocks|stages)(?:_\d+)?/)+)(?:(?P<turn>\d+)/)?")
_BOTTOM = re.compile(r"(?:.*/)?(?:embed|project|stem|relative)/.*")


def by_layer(decay: float, axes: Any) -> optax.GradientTransformation:
    """Updates times decay^(how far below the top a weight is): 1 for heads and final norms, decay for the last layer, decay^layers for the first, and
    decay^(layers + 1) for what is embedded. A stack of layers gets a vector of factors along its axis; each tower of a model counts its own layers."""
    if axes is None:
        raise ValueError("layer_decay has to know which weights are stacks of layers: pass axes=model.axes")
    texts = dict(trees.named_leaves(axes))

    def stacked(name: str, w: Any) -> int:
        while name and name not in texts:  # a part of a typed weight, which carries its layers too
            name = name.rpartition("/")[0]
        return w.shape[0] if parse_axes(texts.get(name, "")).stack[:1] == ("layers",) else 1

    def order(group: str) -> list[int]:
        return [int(part.partition("_")[2] or -1) for part in group.split("/")[:-1]]

    def factors(updates: Any) -> Any:
        found = {name: (match, stacked(name, w)) for name, w in trees.named_leaves(updates) if (match := _BLOCKS.match(name))}
        groups: dict[str, dict[str, tuple[int, int]]] = {}  # tower -> group -> (how many kinds of layer take turns in it, how often)
        for match, repeats in found.values():
            inside = groups.setdefault(match["tower"], {})
            turns = max(inside.get(match["group"], (0, 0))[0], int(match["turn"] or 0) + 1)
            inside[match["group"]] = turns, repeats
        depth = {tower: sum(turns * repeats for turns, repeats in inside.values()) for tower, inside in groups.items()}

        def below(name: str, w: Any) -> Any:
            if name in found:
                match, repeats = found[name]
                inside, group = groups[match["tower"]], match["group"]
                lower = sum(turns * repeats for other, (turns, repeats) in inside.items() if order(other) < order(group))
                at = depth[match["tower"]] - lower - int(match["turn"] or 0) - inside[group][0] * np.arange(repeats)
                return at.reshape(-1, *[1] * (w.ndim - 1)) if repeats > 1 else at[0]
            own = [layers for tower, layers in depth.items() if name.startswith(tower)]
            return 1 + max(own or depth.values(), default=0) if _BOTTOM.fullmatch(name) else 0

        return trees.map_named(lambda name, w: w * jnp.asarray(decay ** below(name, w), w.dtype), updates)

    return optax.stateless(lambda updates, params: factors(updates))


# -- the average of weights ------------------------------------------------------------------------------------------------


class Average(NamedTuple):
    """State of `average`: how many updates it has seen, and the average itself, in float32 and named as the weights, beside which it lies."""

    count: jax.Array
    average: Any


def average(decay: float) -> optax.GradientTransformation:
    """Keeps average = d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) after n updates, so that it forgets where it began. It changes
    no update and stands at the end of a chain. `averaged` finds it."""
    wide = lambda tree: jax.tree.map(lambda w: jnp.array(w, jnp.float32), tree)

    def update(updates: Any, state: Average, params: Any = None) -> tuple[Any, Average]:
        new, n = optax.apply_updates(params, updates), state.count.astype(jnp.float32)
        d = jnp.minimum(decay, (1 + n) / (10 + n))
        mixed = jax.tree.map(lambda a, w: d * a + (1 - d) * w.astype(jnp.float32), state.average, new)
        return updates, Average(state.count + 1, mixed)

    return optax.GradientTransformation(lambda params: Average(jnp.zeros((), jnp.int32), wide(params)), update)  # type: ignore[arg-type]


def averaged(opt: Any, params: Any) -> Any:
    """The average of the weights that the optimizer's state keeps, in the dtypes of `params`; where it keeps none, `params`."""
    kept = [x for x in jax.tree.leaves(opt, is_leaf=lambda x: isinstance(x, Average)) if isinstance(x, Average)]
    return jax.tree.map(lambda a, w: a.astype(w.dtype), kept[0].average, params) if kept else params


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, in float32."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
