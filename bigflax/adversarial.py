"""Adversarial training: functions from a loss to a loss, which sees its worst neighbours within a small ball instead of the batch itself.

    robust = pgd(loss_fn, on="embed/tokens", eps=0.5, steps=3)          robust(params, batch, rng) -> (Mean, metrics[, updates]), as loss_fn

What is perturbed is `on`: a key of the batch (`pixel_values`), or the name of a table of embeddings, for text, which has no gradient itself. There
a typed weight stands in the table's place, `Perturbed(base, delta [B, T, D])`, whose rows are looked up with delta added (weights.py, `ops.take`):
no model knows of it, a tied head multiplies by the table alone, and padding (`attention_mask` or `segment_ids` 0) is never perturbed. With L the
loss, each step goes up its gradient and back into the ball, `l2` or `linf`, of each row of the batch alone (documents packed into a row share one):

    delta_k+1 = project(delta_k + step_size g / |g|, eps)    or, for linf, clip(delta_k + step_size sign g, -eps, eps),    g = dL(delta_k) / d delta

    fgsm      (L(0) + L(delta_1)) / 2, one step of size eps        Goodfellow et al. 2015 (arXiv 1412.6572), section 6
    pgd       L(delta_K)                                           Madry et al. 2018 (1706.06083), equation 2
    freelb    (L(delta_0) + ... + L(delta_K-1)) / K                Zhu et al. 2020 (1909.11764), algorithm 1
    smart     L(0) + weight max_delta KL(p(0), p(delta)), KL in both directions: Jiang et al. 2020 (1911.03437), equation 2
    attacked  L(0), and among its metrics what the attack makes of them: `attacked_accuracy`, `attacked_loss`

The gradient never goes through the ascent: delta is a constant. Where a pass that climbs counts in the loss too (fgsm, freelb), its gradient of the
weights is taken in that same pass, so that K passes cost K, not 2 K - 1: that is what is free in FreeLB. All passes of a step share one
dropout mask. `clean_loss` is among the metrics, which are those of the batch itself, the first pass; running statistics are those of the last one,
which the weights learn from.

A network that starts under attack may stay where it gives the same to all: of 8,000 of MNIST's digits a small CNN learned nothing in 300 steps with
one of three seeds (Adam, 3e-3, pgd, linf, eps 0.1). Warm the rate up, or let the clean loss count (fgsm, freelb).

Left out on purpose: SMART's proximal point (a second penalty that ties the model to an average of its own weights: `optim.make(ema=...)` keeps
such an average), ascents that reuse the gradient of an earlier batch, and attacks on words, which have no gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigflax import losses, trees
from bigflax.metrics import Mean
from bigflax.nn import Model
from bigflax.sharding import constrain
from bigflax.train import split_loss
from bigflax.weights import Perturbed, is_typed, named_weights, shape

LossFn = Callable[..., tuple[Any, ...]]
NORMS = ("l2", "linf")
TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """How far, how often and on what: every function below takes these fields as keywords. `bounds` (lowest, highest: numbers, or arrays that
    broadcast) hold an attacked input within what there can be; `random` starts anywhere in the ball, where there is a key, not at its centre."""

    on: str
    eps: float
    steps: int = 3
    step_size: float | None = None  # 2.5 eps / steps, as Madry et al. have it: the edge can be reached, and walked along
    norm: str = "l2"
    random: bool = False
    bounds: tuple[Any, Any] | None = None

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"there is no ball of norm {self.norm!r}; there are {', '.join(map(repr, NORMS))}")
        if self.eps < 0 or self.steps < 1:
            raise ValueError(f"an attack has eps of at least 0 and steps of at least 1, not {self.eps} and {self.steps}")

    def place(self, params: Any, batch: Any) -> "Place":
        """Where in these the perturbation goes. Raises ValueError where there is no `on`, or nothing that has neighbours."""
        if self.on in batch:
            x = batch[self.on]
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{self.on!r} are {x.dtype}, which have no neighbours; perturb what is embedded, on='embed/tokens'")
            wide = x.astype(jnp.float32)
            put = lambda params, delta: (params, {**batch, self.on: (wide + delta).astype(x.dtype)})
            return Place(put, ("batch", *[None] * (x.ndim - 1)), jnp.zeros(x.shape), jnp.ones((1,) * x.ndim), wide)
        tables = dict(named_weights(params))
        if self.on not in tables or "input_ids" not in batch:
            known = trees.did_you_mean(self.on, [*batch, *tables])
            raise ValueError(f"there is no {self.on!r} to perturb, neither a key of the batch nor a table for its input_ids; {known}")
        if self.bounds is not None:
            raise ValueError(f"bounds hold an input within what there can be, and {self.on!r} is a weight; leave them out")
        instead = lambda delta: lambda name, w: Perturbed(w, delta) if name == self.on else w
        put = lambda params, delta: (trees.map_named(instead(delta), params, is_leaf=is_typed), batch)
        shape_BTD = (*batch["input_ids"].shape, shape(tables[self.on])[-1])
        real_BT = batch.get("segment_ids", batch.get("attention_mask", jnp.ones(shape_BTD[:2], jnp.int32)))
        return Place(put, ("batch", "seq", None), jnp.zeros(shape_BTD), (real_BT > 0)[..., None].astype(jnp.float32))

    def start(self, place: "Place", rng: jax.Array | None) -> jax.Array:
        """The centre of the ball, or with `random` a point of it: each entry uniform, and for l2 over the root of their number (Zhu et al.)."""
        if not self.random or rng is None:
            return place.zero
        delta = jax.random.uniform(_own(rng), place.zero.shape, minval=-self.eps, maxval=self.eps)
        entries = _sums(jnp.broadcast_to(place.real, delta.shape)) if self.norm == "l2" else 1
        return self.held(delta / jnp.sqrt(jnp.maximum(entries, 1)), place)

    def climb(self, delta: jax.Array, g: jax.Array, place: "Place") -> jax.Array:
        """One step up the gradient g, and back into the ball."""
        size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        g = g * place.real
        if self.norm == "linf":
            return self.held(delta + size * jnp.sign(g), place)
        largest = jnp.max(jnp.abs(g), tuple(range(1, g.ndim)), keepdims=True)
        g = g / jnp.maximum(largest, TINY)  # the squares of a small gradient are 0 in float32
        return self.held(delta + size * g / jnp.maximum(jnp.sqrt(_sums(g * g)), TINY), place)

    def held(self, delta: jax.Array, place: "Place") -> jax.Array:
        """The nearest point of the ball, then of what is within bounds; nothing on padding."""
        delta = delta * place.real
        if self.norm == "linf":
            delta = jnp.clip(delta, -self.eps, self.eps)
        else:
            delta = delta * jnp.minimum(1, self.eps / jnp.maximum(jnp.sqrt(_sums(delta * delta)), TINY))
        if self.bounds is not None:
            delta = jnp.clip(place.inside + delta, *self.bounds) - place.inside
        return constrain(delta, *place.names)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a perturbation goes: `put(params, delta) -> (params, batch)`; the names of its axes, its zero, 1 where it may be and 0 on padding, and
    the input that it is added to."""

    put: Callable[[Any, jax.Array], tuple[Any, Any]]
    names: tuple[str | None, ...]
    zero: jax.Array
    real: jax.Array
    inside: Any = None


def _sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, tuple(range(1, x.ndim)), keepdims=True)


def _own(rng: jax.Array) -> jax.Array:
    """A key that no model draws."""
    return jax.random.fold_in(rng, 2**31 - 1)


def fgsm(loss_fn: LossFn, *, clean: float = 0.5, norm: str = "linf", **attack: Any) -> LossFn:
    """`clean` times the loss, and the rest of one step to the edge of the ball: two passes (`Attack` has the other keywords, but steps)."""
    made = Attack(**{"step_size": attack.get("eps"), **attack}, norm=norm, steps=1)
    return _along(loss_fn, made, climbs=1, share=clean)


def pgd(loss_fn: LossFn, **attack: Any) -> LossFn:
    """The loss where `steps` steps lead to (`Attack` has the keywords): `steps` + 1 passes, one more from a `random` start, for the metrics."""
    made = Attack(**attack)
    return _along(loss_fn, made, climbs=made.steps, share=0.0)


def freelb(loss_fn: LossFn, **attack: Any) -> LossFn:
    """The mean of the losses on the way up, the first of them where it starts (`Attack` has the keywords): `steps` passes, one more from a
    `random` start, for the metrics."""
    made = Attack(**attack)
    return _along(loss_fn, made, climbs=made.steps - 1, share=1 / made.steps)


def _along(loss_fn: LossFn, attack: Attack, *, climbs: int, share: float) -> LossFn:
    """`share` times the loss of each of `climbs` passes that climb, and the rest of one where they lead to."""

    def passes(params, batch, rng, learns):
        """The loss with its metrics and updates, and its gradient by those of the params that learn, which no one asks for in an evaluation."""
        live, rest = trees.partition(params, learns)
        place, both = attack.place(params, batch), bool(share and jax.tree.leaves(live))

        def at(delta, live):
            loss, metrics, updates = split_loss(loss_fn(*place.put(trees.combine(live, rest), delta), rng))
            return loss.total, (loss, metrics, updates)

        def climb(delta_grads, _):
            delta, grads = delta_grads
            (_, seen), (g, *more) = jax.value_and_grad(at, (0, 1) if both else (0,), has_aux=True)(delta, live)
            return (attack.climb(delta, g, place), jax.tree.map(jnp.add, grads, *more) if both else grads), seen

        delta, grads = attack.start(place, rng), jax.tree.map(jnp.zeros_like, live) if both else None
        if climbs:
            (delta, grads), seen = jax.lax.scan(climb, (delta, grads), length=climbs)
        (total, last), g = jax.value_and_grad(at, 1, has_aux=True)(delta, live)
        clean = at(place.zero, live)[1] if attack.random and rng is not None else jax.tree.map(lambda x: x[0], seen) if climbs else last
        if share and climbs:
            total += share * jnp.sum(seen[0].total - total)
            g = jax.tree.map(lambda g, more: (1 - climbs * share) * g + share * more, g, grads) if both else g
        loss, metrics, _ = clean
        return (Mean(total, loss.count), {**metrics, "clean_loss": loss}, last[2]), g

    @jax.custom_vjp
    def robust(params, batch, rng):
        return passes(params, batch, rng, jax.tree.map(lambda _: False, params))[0]

    def forward(params, batch, rng):
        learns = jax.tree.map(lambda leaf: leaf.perturbed, params)
        params, batch, rng = jax.tree.map(lambda leaf: leaf.value, (params, batch, rng))
        return passes(params, batch, rng, learns)

    def backward(grads, cotangents):
        scale = cotangents[0].total
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), None, None

    robust.defvjp(forward, backward, symbolic_zeros=True)

    def robust_loss(params, batch, rng=None):
        return robust(params, batch, rng)

    return robust_loss


def smart(loss_fn: LossFn, model: Model, *, weight: float = 1.0, noise: float = 0.1, **attack: Any) -> LossFn:
    """The loss, and `weight` times how far the model's classes can be moved: KL(p | q) + KL(q | p) of its `logits` [..., C] with and without the
    perturbation, one number a label, for a single output the squared difference (`Attack` has the other keywords).

    The climb starts from `noise` eps times normal numbers, for at its centre the divergence is 0 and so is its gradient. Metrics: `smoothness`, the
    divergence. Besides `loss_fn` this needs `steps` + 2 passes, and holds all logits: a loss for heads of classes, not for vocabularies.
    """
    made = Attack(**{"norm": "linf", "steps": 1, **attack})

    def smooth_loss(params, batch, rng=None):
        loss, metrics, updates = split_loss(loss_fn(params, batch, rng))
        place = made.place(params, batch)

        def logits(params, delta):
            params, there = place.put(params, delta)
            return model.apply(params, rng=rng, **{name: x for name, x in there.items() if name != "labels"})["logits"].astype(jnp.float32)

        def apart(p, q):
            if p.shape[-1] == 1:
                return jnp.square(p - q)[..., 0]
            return losses.kl_divergence(p, q) + losses.kl_divergence(q, p)

        p, fixed = logits(params, place.zero), jax.lax.stop_gradient(params)
        real = batch["labels"] != losses.IGNORE
        climbed = jax.grad(lambda delta: jnp.sum(jnp.where(real, apart(logits(fixed, delta), jax.lax.stop_gradient(p)), 0)))
        key = jax.random.key(0) if rng is None else _own(rng)
        delta = made.held(noise * made.eps * jax.random.normal(key, place.zero.shape), place)
        delta, _ = jax.lax.scan(lambda delta, _: (made.climb(delta, climbed(delta), place), None), delta, length=made.steps)
        far = Mean.of(apart(logits(params, delta), p), real)
        return Mean(loss.total + weight * far.total, loss.count), {**metrics, "clean_loss": loss, "smoothness": far}, updates

    return smooth_loss


def attacked(loss_fn: LossFn, **attack: Any) -> LossFn:
    """The loss itself, and beside its metrics those of the batch under this attack, "attacked_" before their names: for evaluation, or to watch in
    training, for the attack moves no weight. Without a key it is the same for the same weights and batch (`Attack` has the keywords)."""
    made = Attack(**attack)

    def watched(params, batch, rng=None):
        loss, metrics, updates = split_loss(loss_fn(params, batch, rng))
        place, fixed = made.place(params, batch), jax.lax.stop_gradient(params)
        at = lambda delta: split_loss(loss_fn(*place.put(fixed, delta), rng))
        up = jax.grad(lambda delta: at(delta)[0].total)
        climb = lambda delta, _: (made.climb(delta, up(delta), place), None)
        worst, there, _ = at(jax.lax.scan(climb, made.start(place, rng), length=made.steps)[0])
        return loss, {**metrics, **{f"attacked_{name}": value for name, value in {"loss": worst, **there}.items()}}, updates

    return watched


METHODS: dict[str, Callable[..., LossFn]] = {"fgsm": fgsm, "pgd": pgd, "freelb": freelb, "smart": smart, "attacked": attacked}


def create(name: str, loss_fn: LossFn, model: Model, **options: Any) -> LossFn:
    """The method of a recipe by its name: its loss in training, where there is a key, and in evaluation the plain loss with its metrics under the same
    attack. By `attacked` training is that without an attack, to compare with. Raises ValueError that lists the methods."""
    if name not in METHODS:
        raise ValueError(f"there is no attack {name!r}; {trees.did_you_mean(name, METHODS, 'there are')}")
    known = {field.name for field in dataclasses.fields(Attack)}
    given = {"model": model} if name == "smart" else {}
    try:
        robust = METHODS[name](loss_fn, **given, **options)
        watched = attacked(loss_fn, **{key: value for key, value in options.items() if key in known})
    except TypeError as error:
        raise ValueError(f"{name} {str(error).partition(' ')[2]}; an attack has {', '.join(sorted(known))}") from None
    robust = loss_fn if name == "attacked" else robust
    return lambda params, batch, rng=None: watched(params, batch) if rng is None else robust(params, batch, rng)
