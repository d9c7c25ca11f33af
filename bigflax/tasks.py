"""Tasks: a loss and its metrics, and how to read a record where the model's input alone does not say it.

A loss is a function from a model to `loss_fn(params, batch, rng) -> (Mean, metrics)`. Yours is the same kind of function in a file of your own,
named in the recipe, `task = dict(name="mine.py:my_task")`; where records must be read differently too, it is a `Task`:

    my_task = Task(my_loss, {"input_ids": data.reading(my_reader, my_shapes)}, head="sequence_classification")

A batch carries `labels` already aligned with the positions (no shift here), -100 where there is nothing to learn; pairs need none. Losses
and metrics are `Mean(total, count)` over real tokens or rows, so that accumulation, hosts and evaluation weigh every one alike.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import data, losses, ops, trees
from bigflax.metrics import F1, Correlation, Mean
from bigflax.nn import Model
from bigflax.weights import rounded

LossFn = Callable[..., tuple[Any, ...]]

IGNORED = -100


def token_loss(model: Model, *, z_loss: float = 0.0, chunk: int | None = None, token_bytes: np.ndarray | None = None) -> LossFn:
    """Cross-entropy over the tokens with a label: the loss of causal and of masked language models and of encoder-decoders alike, whose
    batches differ (models/seq2seq.py makes `decoder_input_ids` of labels).

    Metrics: `accuracy`, and with `token_bytes` (bytes of text that each token id stands for) `bits_per_byte`. `chunk` and `z_loss` are
    those of `ops.linear_cross_entropy`. A model of mixtures adds its config's `router_aux_loss_coef` times `aux_loss`, which is a metric too: each
    batch's own, so that it is balanced in every piece of an accumulated one; where experts have a capacity, `dropped` is the share of
    choices that found no room.
    """
    coefficient = model.config.get("router_aux_loss_coef", 0.0)

    def loss_fn(params, batch, rng=None):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels_BT = batch["labels"]
        out = model.apply(params, rng=rng, logits=False, **inputs)
        if "head" not in out:
            raise ValueError(f"a loss of tokens needs a model with a language-model head, and this one gives {', '.join(out)}")
        head = out["head"]
        losses_BT, correct_BT = ops.linear_cross_entropy(labels_BT=labels_BT, z_loss=z_loss, chunk=chunk, **head)
        count = jnp.sum(labels_BT != IGNORED)
        loss = Mean(jnp.sum(losses_BT), count)
        metrics = {"accuracy": Mean(jnp.sum(correct_BT & (labels_BT != IGNORED)), count)}
        if "aux_loss" in out:
            metrics["aux_loss"] = Mean(out["aux_loss"] * count, count)
            loss = Mean(loss.total + coefficient * out["aux_loss"] * count, count)
        if "dropped" in out:
            metrics["dropped"] = Mean(out["dropped"] * count, count)
        if token_bytes is not None:
            sizes = jnp.where(labels_BT == IGNORED, 0, jnp.asarray(token_bytes)[jnp.maximum(labels_BT, 0)])
            metrics["bits_per_byte"] = Mean(jnp.sum(losses_BT) / jnp.log(2.0), jnp.sum(sizes))
        return loss, metrics

    return loss_fn


def classification(model: Model, *, smoothing: float = 0.0) -> LossFn:
    """Cross-entropy of `logits` [B, C] over `labels` [B]: of texts, images, whatever the model takes. Metrics: `accuracy`, `macro_f1`.

    Running statistics that the model gives back (convnet.py) go on to the step.
    """

    def loss_fn(params, batch, rng=None):
        labels_B, (logits, out) = batch["labels"], _scores(model, params, batch, rng)
        real_B, chosen_B = labels_B != IGNORED, jnp.argmax(logits, -1)
        loss = Mean(jnp.sum(losses.cross_entropy(logits, labels_B, smoothing=smoothing)), jnp.sum(real_B))
        metrics = {
            "accuracy": Mean.of(chosen_B == labels_B, real_B),
            "macro_f1": F1.of(chosen_B, labels_B, logits.shape[-1], real_B),
        }
        return (loss, metrics, out["updates"]) if "updates" in out else (loss, metrics)

    return loss_fn


def multi_label(model: Model, *, threshold: float = 0.5) -> LossFn:
    """Binary cross-entropy of each score of `logits` [B, C] with `labels` [B, C] of zeros and ones, the mean over classes. Metrics, of what
    has a chance above `threshold`: `micro_f1`, `macro_f1`, and `accuracy`, how often a row is right in all classes."""

    def loss_fn(params, batch, rng=None):
        labels_BC, (logits, _) = batch["labels"], _scores(model, params, batch, rng)
        real_B = labels_BC[:, 0] != IGNORED
        said_BC, true_BC = (jax.nn.sigmoid(logits.astype(jnp.float32)) > threshold) & real_B[:, None], labels_BC == 1
        loss = Mean.of(losses.binary_cross_entropy(logits, jnp.maximum(labels_BC, 0)).mean(-1), real_B)
        sums = [jnp.sum(x, 0, dtype=jnp.float32) for x in (said_BC & true_BC, said_BC, true_BC)]
        f1 = {f"{average}_f1": F1(*sums, average=average) for average in ("micro", "macro")}
        return loss, {**f1, "accuracy": Mean.of(jnp.all(said_BC == true_BC, -1), real_B)}

    return loss_fn


def regression(model: Model) -> LossFn:
    """Squared error of the one score of `logits` [B, 1] against `labels` [B]. Metrics: `mae`, and `pearson`, the correlation of the two."""

    def loss_fn(params, batch, rng=None):
        labels_B, (logits, _) = batch["labels"], _scores(model, params, batch, rng)
        score_B, real_B = logits[:, 0].astype(jnp.float32), labels_B != IGNORED
        metrics = {"mae": Mean.of(jnp.abs(score_B - labels_B), real_B), "pearson": Correlation.of(score_B, labels_B, real_B)}
        return Mean.of(losses.mse(score_B, labels_B), real_B), metrics

    return loss_fn


def _scores(model: Model, params: Any, batch: Any, rng: Any) -> tuple[Any, dict[str, Any]]:
    """(logits [B, C], all outputs). Raises ValueError where the model gives no such scores."""
    out = model.apply(params, rng=rng, **{name: value for name, value in batch.items() if name != "labels"})
    if getattr(out.get("logits"), "ndim", 0) != 2:
        raise ValueError(f"classification needs a model with a head for it, logits [B, C]; this one gives {', '.join(out)}")
    return out["logits"], out


def contrastive(model: Model) -> LossFn:
    """The loss of pairs, row i of one input beside row i of the other: CLIP's softmax, or SigLIP's sigmoid where the model has a `logit_bias`.

    Every other row of the batch is a negative, over all devices; with accumulation, those of the same micro-batch. Metric: `accuracy`, how
    often a text is nearest to its image and an image to its text.
    """

    def loss_fn(params, batch, rng=None):
        out = model.apply(params, rng=rng, logits=False, **batch)
        if not {"text_embeds", "image_embeds"} <= out.keys():
            raise ValueError(
                f"a contrastive loss needs text_embeds and image_embeds; the model gives {', '.join(out)} for {', '.join(batch)}"
            )
        texts, images, scale = out["text_embeds"], out["image_embeds"], out["logit_scale"]
        if "logit_bias" in out:
            losses_B = losses.sigmoid_contrastive(texts, images, scale, out["logit_bias"])
        else:
            losses_B = losses.contrastive(texts, images, scale)
        similar, right_B = texts @ images.T, jnp.arange(len(texts))
        found = jnp.sum(jnp.argmax(similar, 1) == right_B) + jnp.sum(jnp.argmax(similar, 0) == right_B)
        return Mean(jnp.sum(losses_B), len(losses_B)), {"accuracy": Mean(found, 2 * len(losses_B))}

    return loss_fn


def low_precision(loss_fn: LossFn, rules: trees.Rules, axes: Any) -> LossFn:
    """The loss with the products of the matching weights in 8 bits, forward and backward: `[("blocks/.*", "int8")]`, or "fp8" (ops/matmul.py says
    which products). The weights stay the floats that they are, outside of the loss: state, optimizer and checkpoints see no difference.

    `weights.rounded` says which weights the rules may reach. Evaluation of this loss rounds too; that of `loss_fn` does not.
    """

    def rounded_loss(params, batch, rng=None):
        return loss_fn(rounded(params, rules, axes), batch, rng)

    return rounded_loss


class Task(NamedTuple):
    """`loss(model, **options)`; `kinds` of data by the model's input, where it is not the usual one (data.KINDS); the `head` that the model gets
    where the recipe names none."""

    loss: Callable[..., LossFn]
    kinds: Mapping[str, data.Kind] = {}
    head: str | None = None


SCORES = "sequence_classification"
TASKS = {
    "causal_lm": Task(token_loss),
    "masked_lm": Task(token_loss),
    "classification": Task(classification, {"input_ids": data.reading(data.labelled, data.labelled_shapes)}, SCORES),
    "multi_label": Task(multi_label, {"input_ids": data.reading(data.many_labelled, data.many_labelled_shapes)}, SCORES),
    "regression": Task(regression, {"input_ids": data.reading(data.scored, data.scored_shapes, classes=1)}, SCORES),
    "contrastive": Task(contrastive),
    "chat": Task(token_loss, {"input_ids": data.reading(data.chat, data.chat_shapes, packed=True)}, "causal_lm"),
}


def find(name: str) -> Task:
    """The task of this name, or that of a file: "mine.py:my_task", a Task or a function that makes a loss. Raises ValueError that lists the tasks."""
    path, _, own = name.rpartition(":")
    if path.endswith(".py"):
        if not os.path.exists(path):
            raise ValueError(f"there is no file {path!r} to take the task {own!r} from")
        spec = importlib.util.spec_from_file_location(f"tasks_{os.path.basename(path)[:-3]}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made: Any = getattr(module, own, None)
        if not callable(made) and not isinstance(made, Task):
            known = [key for key, value in vars(module).items() if callable(value) or isinstance(value, Task)]
            raise ValueError(f"{path} has no task {own!r}; {trees.did_you_mean(own, known, 'it has')}")
        return made if isinstance(made, Task) else Task(made)
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; {trees.did_you_mean(name, TASKS, 'the tasks are')}")
    return TASKS[name]


def create(name: str, model: Model, *, matmul: str | trees.Rules | None = None, **options: Any) -> LossFn:
    """The loss of a task of a recipe by its name (`find`).

    `matmul` "int8" or "fp8" computes the layers' products in 8 bits, rules those of the weights that they match (`low_precision`).
    """
    loss_fn = find(name).loss(model, **options)
    rules = [(".*", matmul)] if isinstance(matmul, str) else [(pattern, kind) for pattern, kind in matmul or ()]
    return low_precision(loss_fn, rules, model.axes) if rules else loss_fn
