"""Tasks: a loss and its metrics, and how to read a record where the model's input alone does not say it.

A loss is a function from a model to `loss_fn(params, batch, rng) -> (Mean, metrics)`. Yours is the same kind of function in a file of your own,
named in the recipe, `task = dict(name="mine.py:my_task")`; where records must be read differently too, it is a `Task`:

    my_task = Task(my_loss, {"input_ids": data.reading(my_reader, my_shapes)}, head="sequence_classification")

A batch carries `labels` already aligned with the positions (no shift here), -100 where there is nothing to learn; pairs need none. Losses
and metrics are `Mean(total, count)` over real tokens or rows, so that accumulation, hosts and evaluation weigh every one alike.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import adversarial, data, losses, ops, preference, sharding, trees
from bigflax.metrics import F1, Correlation, Mean, span_f1
from bigflax.models.seq2seq import Seq2Seq, shift_right
from bigflax.models.two_tower import TwoTower
from bigflax.nn import Model
from bigflax.ops.mel import RATE
from bigflax.ops.mixing import mixed
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


def seq2seq(model: Model, *, z_loss: float = 0.0, chunk: int | None = None) -> LossFn:
    """`token_loss` of an encoder-decoder that is to write `labels` [B, T], given each but the last of them, or its own `decoder_input_ids`."""
    loss_fn = token_loss(model, z_loss=z_loss, chunk=chunk)

    def shifted(params, batch, rng=None):
        if not isinstance(model.module, Seq2Seq):
            raise ValueError("seq2seq needs an encoder-decoder, a family such as t5, bart or whisper")
        before_BT = shift_right(batch["labels"], start=model.module.start, pad=model.module.pad)
        return loss_fn(params, {"decoder_input_ids": before_BT, **batch}, rng)

    return shifted


def read(model: Model, batch: Any) -> dict[str, Any]:
    """What an encoder reads."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def speech(model: Model, *, z_loss: float = 0.0, chunk: int | None = None) -> LossFn:
    """`seq2seq` of what is said in `waveform` [B, samples] at 16 kHz, of which the model hears the spectrogram."""
    loss_fn = seq2seq(model, z_loss=z_loss, chunk=chunk)

    def listening(params, batch, rng=None):
        return loss_fn(params, {**heard(model, batch), **{name: x for name, x in batch.items() if name != "waveform"}}, rng)

    return listening


def heard(model: Model, batch: Any) -> dict[str, Any]:
    """What an encoder hears."""
    sound = batch["waveform"]
    return {"input_features": ops.log_mel(sound, model.config["num_mel_bins"], seconds=sound.shape[1] / RATE)}


def begun(model: Model, batch: Any) -> dict[str, Any]:
    """What an encoder hears, and the marks that the decoder is given: those of `decoder_input_ids` up to where there is something to write."""
    if "decoder_input_ids" not in batch:
        return heard(model, batch)
    labels_BT, ids_BT = sharding.whole(batch["labels"]), sharding.whole(batch["decoder_input_ids"])
    marks = int(np.argmax((labels_BT != IGNORED).any(0))) + 1
    first_BT = np.tile(ids_BT[:1, :marks], (len(ids_BT), 1))  # a loader's padding rows have none of their own
    return {**heard(model, batch), "decoder_input_ids": first_BT}


def classification(
    model: Model, *, smoothing: float = 0.0, gamma: float = 0.0, class_weights: Sequence[float] | None = None, mixup: float = 0.0,
    cutmix: float = 0.0,
) -> LossFn:  # fmt: skip
    """Cross-entropy of `logits` [B, C] over `labels` [B], or soft ones [B, C]: of texts, images, whatever the model takes. Metrics: `accuracy`, `macro_f1`,
    for soft labels of their largest.

    `gamma` is that of the focal loss, `class_weights` [C] multiply the losses of rows of these classes, whose mean is over rows all the same.
    `mixup` and `cutmix` are alphas: in training, which is where there is a `rng`, images are mixed in pairs (ops/mixing.py). Running statistics that
    the model gives back (convnet.py) go on to the step.
    """
    weights = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)

    def loss_fn(params, batch, rng=None):
        if rng is not None and (mixup or cutmix):
            rng, key = jax.random.split(rng)
            batch = mixed(batch, key, classes=model.config["num_labels"], mixup=mixup, cutmix=cutmix)
        labels, (logits, out) = batch["labels"], _scores(model, params, batch, rng)
        if weights is not None and len(weights) != logits.shape[-1]:
            raise ValueError(f"{len(weights)} class_weights are not for {logits.shape[-1]} classes; give one for each, in their order")
        labels_B = labels if labels.ndim == 1 else jnp.where(labels[:, 0] == IGNORED, IGNORED, jnp.argmax(labels, -1))
        real_B, chosen_B = labels_B != IGNORED, jnp.argmax(logits, -1)
        loss = Mean(jnp.sum(losses.cross_entropy(logits, labels, smoothing=smoothing, gamma=gamma, weights=weights)), jnp.sum(real_B))
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


def _outputs(model: Model, params: Any, batch: Any, rng: Any) -> dict[str, Any]:
    # an encoder-decoder tells two texts apart by the marks between them alone
    left_out = {"labels", "token_type_ids"} if isinstance(model.module, Seq2Seq) else {"labels"}
    return model.apply(params, rng=rng, **{name: value for name, value in batch.items() if name not in left_out})


def _scores(model: Model, params: Any, batch: Any, rng: Any, shape: str = "BC") -> tuple[Any, dict[str, Any]]:
    """(logits of this shape, all outputs). Raises ValueError where the model gives no such scores."""
    out = _outputs(model, params, batch, rng)
    if getattr(out.get("logits"), "ndim", 0) != len(shape):
        raise ValueError(f"classification needs a model with a head for it, logits [{', '.join(shape)}]; this one gives {', '.join(out)}")
    return out["logits"], out


def token_classification(model: Model, *, classes: Sequence[str] | None = None) -> LossFn:
    """Cross-entropy of `logits` [B, T, C] over the tokens with a label. Metrics: `accuracy`, and where the `classes` are "O", "B-name" and "I-name"
    `span_f1`, of whole spans."""
    bio = classes if classes and all(re.fullmatch("O|[BI]-.+", name) for name in classes) else None

    def loss_fn(params, batch, rng=None):
        labels_BT, (logits, _) = batch["labels"], _scores(model, params, batch, rng, "BTC")
        real_BT, chosen_BT = labels_BT != IGNORED, jnp.argmax(logits, -1)
        metrics: dict[str, Any] = {"accuracy": Mean.of(chosen_BT == labels_BT, real_BT)}
        if bio:
            metrics["span_f1"] = span_f1(chosen_BT, labels_BT, bio)
        return Mean.of(losses.cross_entropy(logits, labels_BT), real_BT), metrics

    return loss_fn


def question_answering(model: Model, *, longest: int = 30) -> LossFn:
    """Cross-entropy of `start_logits` and `end_logits` [B, T] over the first and the last token of the answer, `labels` [B, 2]; their mean. A question
    may be put to several windows of its context, rows [B, W, T] with labels [B, W, 2].

    Metrics of the likeliest span of at most `longest` tokens in all windows: `exact_match`, and `f1`, the mean over questions of the overlap with
    the answer (Rajpurkar et al. 2016, 1606.05250, section 6.1; theirs is of words, scores.py's too), within the window that the span is in. There
    is no answer, 0 to 0, where every window says so more than it says any span (Devlin et al. 2018, 1810.04805, section 4.3).
    """

    def loss_fn(params, batch, rng=None):
        W = 1 if batch["labels"].ndim == 2 else batch["labels"].shape[1]
        labels_BW2 = batch["labels"].reshape(-1, W, 2)
        rows = {name: x.reshape(-1, *x.shape[1 if W == 1 else 2 :]) for name, x in batch.items()}
        out = _outputs(model, params, rows, rng)
        if not {"start_logits", "end_logits"} <= out.keys():
            raise ValueError(f"question answering needs start_logits and end_logits; this model gives {', '.join(out)}")
        T = rows["attention_mask"].shape[-1]
        mask_BWT = rows["attention_mask"].reshape(-1, W, T) > 0
        start_BWT, end_BWT = (
            jnp.where(mask_BWT, out[name].astype(jnp.float32).reshape(-1, W, T), -1e30) for name in ("start_logits", "end_logits")
        )
        real_BW = labels_BW2[..., 0] != IGNORED
        losses_BW = (losses.cross_entropy(start_BWT, labels_BW2[..., 0]) + losses.cross_entropy(end_BWT, labels_BW2[..., 1])) / 2
        length_TT = jnp.arange(T) - jnp.arange(T)[:, None]
        spans_TT = (length_TT >= 0) & (length_TT < longest) & (jnp.arange(T)[:, None] > 0)  # 0 to 0 is none
        both = jnp.where(spans_TT, start_BWT[..., None] + end_BWT[..., None, :], -jnp.inf).reshape(len(real_BW), -1)
        window_B, span_B = jnp.divmod(jnp.argmax(both, -1), T * T)
        first_B, last_B = jnp.divmod(span_B, T)
        none_B = jnp.min(jnp.where(real_BW, start_BWT[..., 0] + end_BWT[..., 0], jnp.inf), -1) >= jnp.max(both, -1)
        true_B2 = jnp.take_along_axis(labels_BW2, window_B[:, None, None], axis=1)[
            :, 0
        ]  # 0 to 0, which no span meets, where it is elsewhere
        shared_B = jnp.maximum(jnp.minimum(last_B, true_B2[:, 1]) - jnp.maximum(first_B, true_B2[:, 0]) + 1, 0)
        f1_B = 2 * shared_B / (last_B - first_B + 1 + true_B2[:, 1] - true_B2[:, 0] + 1)
        answerless_B, real_B = jnp.all(labels_BW2[..., 1] <= 0, -1), real_BW.any(-1)
        metrics = {"exact_match": (first_B == true_B2[:, 0]) & (last_B == true_B2[:, 1]), "f1": f1_B}
        return Mean.of(losses_BW, real_BW), {name: Mean.of(jnp.where(none_B, answerless_B, x_B), real_B) for name, x_B in metrics.items()}

    return loss_fn


def sentence_embedding(model: Model, *, temperature: float = 0.05) -> LossFn:
    """Texts that belong together, rows of `input_ids` [B, 2, T], found among those of the batch by their `sentence_embedding`: the loss of CLIP
    (losses.contrastive), in-batch negatives as van den Oord et al. 2018 (InfoNCE, 1807.03748), of SimCSE's temperature (2104.08821).

    A third text of a row, where there is one, is one more that each first must not find. All go through the model at once. With accumulation the
    others are those of the same micro-batch. Metric: `accuracy`, how often the nearest of the second (and third) texts is the right one.
    """

    def loss_fn(params, batch, rng=None):
        B, P, T = batch["input_ids"].shape
        out = model.apply(params, rng=rng, logits=False, **{name: x.reshape(B * P, T) for name, x in batch.items()})
        if "sentence_embedding" not in out:
            raise ValueError(f"embeddings of sentences need a model with the head 'embedding'; this one gives {', '.join(out)}")
        first_BD, *others = jnp.moveaxis(out["sentence_embedding"].reshape(B, P, -1), 1, 0)
        real_B = jnp.any(batch["attention_mask"][:, 0] > 0, -1)  # a loader's padding is nobody's neighbour
        similar = jnp.where(jnp.tile(real_B, P - 1), first_BD @ jnp.concatenate(others).T, -1e30)
        back = jnp.where(real_B, similar[:, :B].T, -1e30)
        own_B = jnp.arange(B)
        losses_B = (losses.cross_entropy(similar / temperature, own_B) + losses.cross_entropy(back / temperature, own_B)) / 2
        return Mean.of(losses_B, real_B), {"accuracy": Mean.of(jnp.argmax(similar, 1) == own_B, real_B)}

    return loss_fn


def contrastive(model: Model) -> LossFn:
    """The loss of pairs, row i of one input beside row i of the other: CLIP's softmax, or SigLIP's sigmoid where the model has a `logit_bias`.

    Every other row of the batch is a negative, over all devices; with accumulation, those of the same micro-batch. Rows without a text, which are
    a loader's padding, do not count. Metrics: `image_recall_at_1` and `_10`, how often a text's image is the nearest to it, or among the ten nearest,
    of those of its batch (so an evaluation whose batch is all that is held out tells the recall among all of it); `text_recall_at_1` and `_10`, an
    image's text; `accuracy`, the mean of the two at 1. What is as near as the right one stands before it.
    """

    def loss_fn(params, batch, rng=None):
        out = model.apply(params, rng=rng, logits=False, **batch)
        if not {"text_embeds", "image_embeds"} <= out.keys():
            raise ValueError(
                f"a contrastive loss needs text_embeds and image_embeds; the model gives {', '.join(out)} for {', '.join(batch)}"
            )
        texts, images, scale = out["text_embeds"], out["image_embeds"], out["logit_scale"]
        real_B = jnp.any(batch["attention_mask"] > 0, -1) if "attention_mask" in batch else jnp.ones(len(texts), bool)
        if "logit_bias" in out:
            losses_B = losses.sigmoid_contrastive(texts, images, scale, out["logit_bias"], real=real_B)
        else:
            losses_B = losses.contrastive(texts, images, scale, real=real_B)
        similar, own = jnp.where(real_B & real_B[:, None], texts @ images.T, -1e30), jnp.eye(len(texts), dtype=bool)
        right_B = jnp.sum(jnp.where(own, similar, 0), 1)
        before = {"image": similar >= right_B[:, None], "text": similar.T >= right_B[:, None]}
        ranks = {name: jnp.sum(before_BB & ~own, 1) for name, before_BB in before.items()}
        metrics = {f"{name}_recall_at_{k}": Mean.of(rank_B < k, real_B) for name, rank_B in ranks.items() for k in (1, 10)}
        return Mean.of(losses_B, real_B), {"accuracy": Mean.of(jnp.stack([*ranks.values()]) < 1, real_B), **metrics}

    return loss_fn


def zero_shot(
    model: Model, params: Any, tokenizer: data.Tokenizer, classes: Sequence[str], templates: Sequence[str], *, length: int
) -> jax.Array:
    """[C, D] of length 1: for each class the mean of what the model makes of it in every template, "a photo of a {}." Radford et al. 2021 (arXiv
    2103.00020), section 3.1.4. `length` is that of the texts the model was trained on: SigLIP reads the padding too."""
    if missing := [template for template in templates if "{}" not in template] or [] if templates else ["none"]:
        raise ValueError(f"templates hold {{}}, where the name of a class is to stand; {missing[0]!r} does not")
    row = data.ended if isinstance(model.module, TwoTower) else data.Tokenizer.row
    rows = [row(tokenizer, template.format(name), length=length) for name in classes for template in templates]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    found_BD = _embedding(model.apply(params, logits=False, **batch))
    mean_CD = found_BD.reshape(len(classes), len(templates), -1).mean(1)
    return mean_CD / jnp.linalg.norm(mean_CD, axis=-1, keepdims=True)


def nearest(model: Model, class_CD: jax.Array, *, scale: float = 100.0) -> LossFn:
    """`classification` of images, or of texts, by the nearest of the classes that `zero_shot` made: for `train.eval_step`."""
    near = lambda params, **inputs: {"logits": scale * _embedding(model.apply(params, **inputs)) @ class_CD.T}
    return classification(dataclasses.replace(model, apply=near))


def _embedding(out: Mapping[str, Any]) -> Any:
    name = next((name for name in ("image_embeds", "text_embeds", "sentence_embedding") if name in out), None)
    if name is None:
        raise ValueError(f"zero-shot classification needs a model of embeddings; this one gives {', '.join(out)}")
    return out[name]


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
    where the recipe names none; `asks(model, batch)`, what `generate` is given to write what `labels` say, where an evaluation may score it; `counts`, what
    its loss is a mean over, which a run's rate is told in."""

    loss: Callable[..., LossFn]
    kinds: Mapping[str, data.Kind] = {}
    head: str | None = None
    asks: Callable[[Model, Any], dict[str, Any]] | None = None
    counts: str = "examples"


SCORES = "sequence_classification"
TASKS = {
    "causal_lm": Task(token_loss, counts="tokens"),
    "masked_lm": Task(token_loss, counts="tokens"),
    "classification": Task(classification, {"input_ids": data.reading(data.labelled, data.labelled_shapes)}, SCORES),
    "multi_label": Task(multi_label, {"input_ids": data.reading(data.many_labelled, data.many_labelled_shapes)}, SCORES),
    "regression": Task(regression, {"input_ids": data.reading(data.scored, data.scored_shapes, classes=1)}, SCORES),
    "token_classification": Task(
        token_classification,
        {"input_ids": data.reading(data.tagged, data.tagged_shapes, classes=data.find_tags)},
        "token_classification",
        counts="tokens",
    ),
    "question_answering": Task(question_answering, {"input_ids": data.reading(data.answered, data.answered_shapes)}, "question_answering"),
    "sentence_embedding": Task(sentence_embedding, {"input_ids": data.reading(data.paired, data.paired_shapes)}, "embedding"),
    "contrastive": Task(
        contrastive,
        {"input_ids": data.reading(data.captioned, data.captioned_shapes, follows=("eos_token_id", "image_size", "num_channels"))},
    ),
    "seq2seq": Task(seq2seq, {"input_ids": data.reading(data.translated, data.translated_shapes)}, "seq2seq_lm", read, "tokens"),
    "speech": Task(speech, {"input_features": data.reading(data.transcribed, data.transcribed_shapes)}, "seq2seq_lm", begun, "tokens"),
    "chat": Task(
        token_loss, {"input_ids": data.reading(data.chat, data.chat_shapes, packed=True, prompt=data.asked)}, "causal_lm", counts="tokens"
    ),
    "dpo": Task(preference.dpo, {"input_ids": data.reading(preference.compared, preference.compared_shapes)}),
    "reward": Task(preference.reward, {"input_ids": data.reading(preference.pairs, preference.pair_shapes, classes=1)}, SCORES),
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
        made = getattr(module, own, None)
        if not callable(made) and not isinstance(made, Task):
            known = [key for key, value in vars(module).items() if callable(value) or isinstance(value, Task)]
            raise ValueError(f"{path} has no task {own!r}; {trees.did_you_mean(own, known, 'it has')}")
        return made if isinstance(made, Task) else Task(vars(module)[own])
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; {trees.did_you_mean(name, TASKS, 'the tasks are')}")
    return TASKS[name]


def create(
    name: str, model: Model, *, matmul: str | trees.Rules | None = None, attack: Mapping[str, Any] | None = None, **options: Any
) -> LossFn:
    """The loss of a task of a recipe by its name (`find`).

    `matmul` "int8" or "fp8" computes the layers' products in 8 bits, rules those of the weights that they match (`low_precision`). `attack` names a
    way of adversarial training and its options, {"name": "pgd", "on": "embed/tokens", "eps": 0.5} (adversarial.py).
    """
    loss_fn = find(name).loss(model, **options)
    if attack is not None:
        if not hasattr(attack, "keys") or "name" not in attack:
            raise ValueError(
                f"task.attack names a method and its options, {{'name': 'pgd', 'on': 'embed/tokens', 'eps': 0.5}}, not {attack!r}"
            )
        loss_fn = adversarial.create(loss_fn=loss_fn, model=model, **attack)
    rules = [(".*", matmul)] if isinstance(matmul, str) else [(pattern, kind) for pattern, kind in matmul or ()]
    return low_precision(loss_fn, rules, model.axes) if rules else loss_fn
