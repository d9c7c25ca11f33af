"""Tasks: functions from a model to a loss, `loss_fn(params, batch, rng) -> (Mean, metrics)`.

A batch carries `labels` already aligned with the positions (no shift here), -100 where there is nothing to learn. Losses and metrics are
`Mean(total, count)` over real tokens, so that accumulation, hosts and evaluation weigh every token alike.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from bigflax import ops, trees
from bigflax.metrics import Mean
from bigflax.nn import Model

LossFn = Callable[..., tuple[Any, dict[str, Any]]]

IGNORED = -100


def token_loss(model: Model, *, z_loss: float = 0.0, chunk: int | None = None, token_bytes: np.ndarray | None = None) -> LossFn:
    """Cross-entropy over the tokens with a label: the loss of causal and of masked language models and of encoder-decoders alike, whose
    batches differ (models/seq2seq.py makes `decoder_input_ids` of labels).

    Metrics: `accuracy`, and with `token_bytes` (bytes of text that each token id stands for) `bits_per_byte`. `chunk` and `z_loss` are
    those of `ops.linear_cross_entropy`.
    """

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
        if token_bytes is not None:
            sizes = jnp.where(labels_BT == IGNORED, 0, jnp.asarray(token_bytes)[jnp.maximum(labels_BT, 0)])
            metrics["bits_per_byte"] = Mean(jnp.sum(losses_BT) / jnp.log(2.0), jnp.sum(sizes))
        return loss, metrics

    return loss_fn


TASKS = {"causal_lm": token_loss, "masked_lm": token_loss}


def create(name: str, model: Model, **options: Any) -> LossFn:
    """The task of a recipe by its name. Raises ValueError that lists the tasks."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; {trees.did_you_mean(name, TASKS, 'the tasks are')}")
    return TASKS[name](model, **options)
