"""Distillation: from a task, a student and a teacher to a loss, which any step trains.

    both = taught(params, student.axes, teacher_params, teacher.axes)           one tree; what is below "teacher" is frozen, the rest named as before
    loss_fn = distill(tasks.token_loss, student, teacher, weight=0.5, temperature=2.0)
    state = init_state(both.params, tx, mesh=mesh, axes=both.axes, freeze=both.freeze)
    step = train_step(loss_fn, tx, state)                                       no gradient, no moments of the teacher, and it is not donated

    loss = (1 - weight) task + weight soft_labels + sum_i weight_i term_i

A task is a function from a model to a loss, as those of tasks.py are. The model that it gets is the student; what it asks of it, the teacher is asked
too: the same windows, the same mixed images, whatever the task makes of its batch. Then each term (terms.py) compares what the two gave. No module knows
of it, and neither do tasks; an attack goes around it, `adversarial.pgd(distill(...))`.

`lesson` is the same by plain values: the section `teacher` of a recipe (taught.py).

A teacher is a Model (quantized weights stand in its tree as in any other, an `ensemble` is a Model too), any function `(params, **inputs)` ->
outputs, or None: then its outputs come with the batch under "teacher_" and their name (teachers.py writes them down once). With `ema` it is the student
itself, as an average of its weights has it: Mean Teacher, Tarvainen and Valpola 2017 (1703.01780). That average is among the frozen weights; the one that
`optim.make(ema=...)` keeps is in the optimizer's state, which no loss sees (`state.averaged` is what a next generation learns from).

Each term is a mean over what it counts, and so is the task; where those differ (real tokens, tokens with a label, texts without one), each micro-batch is
weighed by the count of the soft labels, or without them by the task's.

Left out on purpose: hard labels of the teacher, which are a data set (teachers.py), and a teacher's weights left out of checkpoints: a run continues
with all that it had.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigflax import trees
from bigflax.compress.terms import Both, Term, hidden, relations, soft_labels, takes
from bigflax.metrics import Mean, split_loss
from bigflax.nn import Model
from bigflax.weights import is_typed, shape

LossFn = Callable[..., tuple[Any, ...]]
TEACHER, PROJECTIONS = "teacher", "projections"


class Taught(NamedTuple):
    """The student's params with its teacher's below "teacher" and what a term learns below "projections"; their axes, and rules for what is frozen."""

    params: Any
    axes: Any
    freeze: tuple[tuple[str, Any], ...]


def taught(
    params: Mapping[str, Any], axes: Any, teacher_params: Any = None, teacher_axes: Any = None, *,
    project: Mapping[str, tuple[int, int]] | None = None, rng: jax.Array | None = None,
) -> Taught:  # fmt: skip
    """`project` {"hidden_states": (student width, teacher width)} makes the matrices of `hidden` of these names, from `rng`.

    Without axes a teacher's weights are whole on every device. For `ema` give the student's own weights, in float32, as those of the teacher: copies,
    for an average in fewer digits stands still. Raises ValueError for params that are no dict, or that have such names already.
    """
    if not isinstance(params, Mapping) or (used := [name for name in (TEACHER, PROJECTIONS) if name in params]):
        what = f"have {used[0]!r} already" if isinstance(params, Mapping) else f"are a {type(params).__name__}, no dict of weights"
        raise ValueError(f"a teacher's weights are put beside the student's, and these {what}")
    more, places = {}, {}
    unnamed = lambda tree: jax.tree.map(lambda w: " ".join("_" * len(shape(w))), tree, is_leaf=is_typed)
    if teacher_params is not None:
        more[TEACHER], places[TEACHER] = teacher_params, unnamed(teacher_params) if teacher_axes is None else teacher_axes
    if project:
        if rng is None:
            raise ValueError(f"projections of {', '.join(project)} are drawn: give rng, a key")
        keys = dict(zip(sorted(project), jax.random.split(rng, len(project)), strict=True))
        more[PROJECTIONS] = {name: jax.random.normal(keys[name], size) / math.sqrt(size[0]) for name, size in project.items()}
        places[PROJECTIONS] = dict.fromkeys(project, "embed -> _")
    return Taught({**params, **more}, axes and {**axes, **places}, ((f"{TEACHER}/.*", True),) if teacher_params is not None else ())


def untaught(params: Any) -> Any:
    """The student's params alone: to save, to serve."""
    return {name: w for name, w in params.items() if name not in (TEACHER, PROJECTIONS)} if isinstance(params, Mapping) else params


# -- the loss --------------------------------------------------------------------------------------------------------------


def distill(
    task: Callable[[Model], LossFn] | None, student: Model, teacher: Model | Callable[..., Any] | None = None, *, weight: float = 0.5,
    also: Sequence[tuple[float, Term]] = (), ema: float | None = None, **soft: Any,
) -> LossFn:  # fmt: skip
    """`loss_fn(params, batch, rng) -> (Mean, metrics)` over the params of `taught`: `weight` of soft labels, which take the other keywords, and the rest of
    the task; `also` are further (weight, term). With weight 0 there are no soft labels, and without a task nothing but terms.

    Metrics are the task's, `task_loss`, a Mean for each term, and `agreement`: how often student and teacher find the same likeliest. The student
    alone has dropout. With `ema` the teacher's weights move by teacher = ema teacher + (1 - ema) student in each step (`updates` of train_step).
    Raises ValueError for outputs that cannot be compared, when first called.
    """
    if ema is not None and teacher is not None:
        raise ValueError("with ema the teacher is an average of the student; give no other")
    if not (0 <= weight <= 1) or not (ema is None or 0 <= ema < 1):
        raise ValueError(f"weight {weight} is to be from 0 to 1, and ema {ema} from 0 to below 1 (or None)")
    if ema is not None:
        teacher = student
    if task is not None:
        task(student)  # what is wrong with its options is said now
    terms = [*([(weight, soft_labels(**soft))] if weight else []), *also]
    if not terms:
        raise ValueError("nothing is learned from the teacher: weight is 0, and also names no term")
    asks = {name: True for _, term in terms for name in term.asks}

    def loss_fn(params, batch, rng=None):
        seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
        beside = params if isinstance(params, Mapping) else {}
        own, guide = untaught(params), beside.get(TEACHER, {})
        if ema is not None and jax.tree.structure(guide) != jax.tree.structure(own):
            raise ValueError("with ema the average begins as the student's own weights: taught(params, axes, params, axes)")

        def apply(params, *, rng=None, **inputs):
            inputs |= asks
            out = student.apply(params, rng=rng, **inputs)
            seen.append((inputs, out))
            # DeiT: the class token learns from labels, the distillation token from the teacher (Touvron et al. 2021, 2012.12877, section 3)
            return {**out, "logits": out["cls_logits"]} if "distillation_logits" in out else out

        given = {name: x for name, x in batch.items() if not name.startswith("teacher_")}
        if task is None:
            bare = {"logits": False} if "logits" in takes(student) else {}
            apply(own, rng=rng, **{name: x for name, x in given.items() if name != "labels"}, **bare)
            loss, metrics, updates = None, {}, {}
        else:
            loss, metrics, updates = split_loss(task(dataclasses.replace(student, apply=apply))(own, given, rng))
        if len(seen) != 1:
            raise ValueError(
                f"a task that is distilled asks its model once a batch, and this one asks {len(seen)} times; attack from outside"
            )
        inputs, out = seen[0]
        told = _ask(teacher, guide, inputs) if teacher is not None else {k[8:]: x for k, x in batch.items() if k.startswith("teacher_")}
        if not told:
            raise ValueError(
                "there is no teacher: give one, or batches with its outputs, teacher_values and teacher_ids, or teacher_logits"
            )
        both = Both(inputs, out, jax.lax.stop_gradient(told), beside.get(PROJECTIONS, {}), batch.get("labels"))
        found = [(share, term.of(both)) for share, term in terms]
        learned = [(share, next(iter(means.values()))) for share, means in found]
        task_loss = {} if loss is None else {"task_loss": loss}
        count = loss.count if loss is not None and not weight else learned[0][1].count
        of_all = lambda mean: mean.total / jnp.maximum(mean.count, 1) * count
        total = (0.0 if loss is None else (1 - weight) * of_all(loss)) + sum(share * of_all(mean) for share, mean in learned)
        if ema is not None:
            mix = lambda old, new, d=ema: d * old.astype(jnp.float32) + (1 - d) * jax.lax.stop_gradient(new).astype(jnp.float32)
            pairs = [(name, old, new) for (name, old), new in zip(trees.named_leaves(guide), jax.tree.leaves(own), strict=True)]
            moved = {f"{TEACHER}/{name}": mix(old, new) for name, old, new in pairs if jnp.issubdtype(old.dtype, jnp.inexact)}
            updates = {**updates, **moved}
        return Mean(total, count), {**metrics, **task_loss, **{k: m for _, means in found for k, m in means.items()}}, updates

    return loss_fn


def lesson(
    task: Callable[[Model], LossFn], student: Model, teacher: Model, *, weight: float = 0.5, temperature: float = 2.0, divergence: str = "forward",
    binary: bool = False, chunk: int | None = None, states: float = 0.0, related: float = 0.0, heads: int = 1,
) -> LossFn:  # fmt: skip
    """`distill` by plain values, as a recipe has them: `states` is the weight of hidden states, whose widths must be one, layers spread evenly over the
    teacher's; `related` that of the relations in the last layers, in `heads` parts. With `weight` 1 nothing is learned from labels.
    """
    also = [(share, term) for share, term in ((states, hidden()), (related, relations(heads=heads))) if share]
    soft: dict[str, Any] = dict(temperature=temperature, divergence=divergence, binary=binary, chunk=chunk)
    return distill(task, student, teacher, weight=weight, also=also, **soft)


def _ask(teacher: Model | Callable[..., Any], params: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the teacher makes of the same inputs; a plain function is given the arrays alone."""
    if isinstance(teacher, Model):
        return teacher.apply(params, **inputs)
    return teacher(params, **{name: x for name, x in inputs.items() if not isinstance(x, bool)})


def ensemble(models: Sequence[Model]) -> Model:
    """The mean of what several models of the same classes find likely, as one Model: `logits`, the log of the mean of their probabilities (Hinton et al.
    2015, section 1). Its params are {"0": params of the first, "1": ...}."""
    if not models:
        raise ValueError("an ensemble is of one model or more")
    numbered = {str(i): model for i, model in enumerate(models)}

    def apply(params, *, rng=None, **inputs):
        inputs.pop("logits", None)
        outs = [model.apply(params[i], rng=rng, **inputs) for i, model in numbered.items()]
        if any("logits" not in out for out in outs):
            raise ValueError(f"an ensemble is of models with logits; one gives {', '.join(next(o for o in outs if 'logits' not in o))}")
        each = jnp.stack([jax.nn.log_softmax(out["logits"].astype(jnp.float32)) for out in outs])
        return {"logits": jax.nn.logsumexp(each, axis=0) - math.log(len(outs))}

    init = lambda rng: {i: model.init(jax.random.fold_in(rng, int(i))) for i, model in numbered.items()}
    return Model(init, apply, {i: model.axes for i, model in numbered.items()})
