"""Preferences: two answers to one prompt, of which one is better; losses that learn it, and how such a pair is read.

    example = read_pair(record, tokenizer, length=512)                   {"prompt", "chosen", "rejected"} -> rows of one shape
    reference = reference_log_probs(model, params, batches)              once, with the weights that training starts from
    batch = with_reference(batch, reference)                             its two numbers a pair: no second model is in memory
    loss_fn = dpo(model, beta=0.1)                                       loss_fn(params, batch, rng) -> (Mean, metrics), as a task
                                                                         or, of adapters: the weights beneath are the reference

    sigmoid   -log sigmoid(beta h)           DPO: Rafailov et al. 2023 (arXiv 2305.18290), equation 7
    ipo       (h - 1 / (2 beta))^2           Azar et al. 2023 (2310.12036), equation 17
    hinge     max(0, 1 - beta h)             SLiC: Zhao et al. 2023 (2305.10425), as Liu et al. 2023 (2309.06657) compare it
    reward    -log sigmoid(r_c - r_r)        a model of scores instead: Bradley and Terry 1952; Ouyang et al. 2022 (2203.02155), equation 1

with h = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)), each the sum over the answer's tokens. A batch has, for each
side, `chosen_input_ids`, `chosen_attention_mask` [B, T] and what else the model takes, and `chosen_labels`, aligned with the positions and -100
on the prompt; both sides pass the model as one batch of 2 B rows, side by side so that each device keeps its own. [B, T, V] is never held whole
(`ops.linear_cross_entropy`). A pair counts where both of its sides have a real token.

Left out on purpose: answers that are sampled while training (PPO, online DPO), lengths taken out of the sums, the load-balance loss of mixtures, and
chat templates: a prompt is text, rendered by whoever knows its template.

Shapes: B pairs, T time.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import losses, ops, trees
from bigflax.metrics import Mean
from bigflax.nn import Model
from bigflax.sharding import TABLE, Table, constrain, replicated, tracing_on
from bigflax.weights import Adapted, is_typed, named_weights

LossFn = Callable[..., tuple[Any, ...]]
SIDES = ("chosen", "rejected")


# -- pairs -----------------------------------------------------------------------------------------------------------------


def read_pair(
    record: Mapping[str, Any], tokenizer: Any, length: int, prompt: str = "prompt", chosen: str = "chosen", rejected: str = "rejected"
) -> dict[str, np.ndarray]:
    """A record's three texts, by the names of their fields, as rows of `length`: for each side `input_ids`, `labels` and `attention_mask`, int32.

    A side is [bos] + prompt + answer + [eos], inputs all but the last of it and labels all but the first, -100 on the prompt and on padding, which
    is behind. What is too long loses the beginning of the prompt, the same of it on both sides, and an answer that is too long alone its end.
    `record`, int32 [2], names the pair by what these rows say. Raises ValueError for a record without these fields.
    """
    if missing := [name for name in (prompt, chosen, rejected) if not isinstance(record.get(name), str)]:
        raise ValueError(f"the record has no text {missing[0]!r}; {trees.did_you_mean(missing[0], record, 'it has')}")
    asked = np.concatenate([[tokenizer.bos_id], tokenizer.encode(record[prompt])])
    answers = [np.concatenate([tokenizer.encode(record[name]), [tokenizer.eos_id]])[:length] for name in (chosen, rejected)]
    asked = asked[-max(1, length + 1 - max(map(len, answers))) :]
    out = {}
    for side, answer in zip(SIDES, answers, strict=True):
        ids, at = np.concatenate([asked, answer]), np.arange(length)
        pad = lambda row, value: np.pad(row, (0, length - len(row)), constant_values=value).astype(np.int32)
        out[f"{side}_input_ids"] = pad(ids[:-1], tokenizer.pad_id)
        out[f"{side}_labels"] = np.where(at < len(asked) - 1, losses.IGNORE, pad(ids[1:], losses.IGNORE)).astype(np.int32)
        out[f"{side}_attention_mask"] = (at < len(ids) - 1).astype(np.int32)
    said = hashlib.blake2b(b"".join(out[f"{side}_{name}"].tobytes() for side in SIDES for name in ("input_ids", "labels")), digest_size=8)
    return {**out, "record": np.frombuffer(said.digest(), np.int32)}


def pairs(tokenizer: Any, *, length: int, prompt: str = "prompt", chosen: str = "chosen", rejected: str = "rejected") -> Any:
    """`read_pair` of these fields, as a reader of a recipe (data/examples.py)."""
    return lambda record, rng=None: read_pair(record, tokenizer, length, prompt, chosen, rejected)


def pair_shapes(*, length: int, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of `pairs`, known without a source."""
    rows = {f"{side}_{name}": length for side in SIDES for name in ("input_ids", "labels", "attention_mask")}
    return {name: jax.ShapeDtypeStruct((batch_size, n), np.int32) for name, n in {**rows, "record": 2}.items()}


def compared(
    tokenizer: Any, reference: Mapping[str, np.ndarray] | None = None, *, length: int, prompt: str = "prompt", chosen: str = "chosen",
    rejected: str = "rejected",
) -> Any:  # fmt: skip
    """`pairs`, each `with_reference` where there is one to be asked before training: the reader of `dpo`."""
    read = pairs(tokenizer, length=length, prompt=prompt, chosen=chosen, rejected=rejected)
    return read if reference is None else lambda record, rng=None: with_reference(read(record), reference)


def compared_shapes(*, length: int, batch_size: int, reference: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Those of `compared`, with a reference or without."""
    said = {f"reference_{side}": jax.ShapeDtypeStruct((batch_size,), np.float32) for side in SIDES if reference}
    return pair_shapes(length=length, batch_size=batch_size) | said


def _both(batch: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array | None, jax.Array]:
    """(the model's inputs, 2 B rows, chosen and rejected by turns; their labels, if there are any; whether a pair is real [B])."""
    names = [name.partition("_")[2] for name in batch if name.startswith("chosen_")]
    if "input_ids" not in names or any(f"rejected_{name}" not in batch for name in names):
        raise ValueError(
            f"a batch of pairs has chosen_input_ids, rejected_input_ids and what else of both; this one has {', '.join(batch)}"
        )
    sides = {name: [batch[f"{side}_{name}"] for side in SIDES] for name in names}
    rows = {name: jnp.stack(both, 1).reshape(-1, *both[0].shape[1:]) for name, both in sides.items()}
    rows = {name: constrain(x, "batch", *[None] * (x.ndim - 1)) for name, x in rows.items()}
    labels, real = rows.pop("labels", None), rows.get("attention_mask", jnp.ones(rows["input_ids"].shape)) > 0
    if labels is not None:  # where a batch is filled up with rows of zeros, the labels are zeros too
        labels = jnp.where(real, labels, losses.IGNORE)
        real = labels != losses.IGNORE
    return rows, labels, real.any(-1).reshape(-1, 2).all(-1)


# -- the policy and its reference ------------------------------------------------------------------------------------------


def _log_probs(model: Model, params: Any, batch: Any, rng: jax.Array | None, chunk: int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log p of the answers: chosen [B], rejected [B], float32; and whether a pair is real [B]."""
    inputs, labels, real_B = _both(batch)
    if labels is None:
        raise ValueError(
            "answers have a probability where there are chosen_labels and rejected_labels, -100 on the prompt; read_pair makes them"
        )
    out = model.apply(params, rng=rng, logits=False, **inputs)
    if "head" not in out:
        raise ValueError(f"answers have a probability in a model with a language-model head, and this one gives {', '.join(out)}")
    losses_RT, _ = ops.linear_cross_entropy(labels_BT=labels, chunk=chunk, **out["head"])
    logp_R = -losses_RT.sum(-1)
    return logp_R[0::2], logp_R[1::2], real_B


def dpo(
    model: Model, *, beta: float = 0.1, kind: str = "sigmoid", smoothing: float = 0.0, chunk: int | None = None,
    reference: Callable[[Any], Any] | None = None,
) -> LossFn:  # fmt: skip
    """The loss of preferred answers against a reference, of the `kind` above; `smoothing` is the chance that a pair's order is wrong.

    The reference's log probabilities are `reference_chosen` and `reference_rejected` [B] of the batch (`with_reference`), or are computed in the
    same step, without dropout or gradient and in one more forward pass, from `reference(params)`, by default the weights beneath adapters (`bare`).
    Metrics: `accuracy`, how often h > 0; `margin`, beta h,
    and the two rewards whose difference it is, `chosen_reward` and `rejected_reward`. `chunk` is that of `ops.linear_cross_entropy`.
    """

    def loss_fn(params, batch, rng=None):
        chosen, rejected, real_B = _log_probs(model, params, batch, rng, chunk)
        if reference is None and "reference_chosen" in batch and "reference_rejected" in batch:
            before = batch["reference_chosen"], batch["reference_rejected"]
        else:
            if reference is None and not any(isinstance(w, Adapted) for _, w in named_weights(params)):
                raise ValueError(
                    "preferences are learned against a reference: fine-tune adapters (peft.name='lora'), beneath which it lies, give dpo a reference, "
                    "or put its log probabilities into the batches (reference_log_probs, with_reference)"
                )
            beneath = jax.lax.stop_gradient((reference or bare)(params))
            before = _log_probs(model, beneath, batch, None, chunk)[:2]
        loss_B = losses.dpo(chosen, rejected, *before, beta, kind=kind, smoothing=smoothing)
        return Mean.of(loss_B, real_B), _metrics(beta * (chosen - before[0]), beta * (rejected - before[1]), real_B)

    return loss_fn


def reward(model: Model) -> LossFn:
    """The Bradley-Terry loss of a model that gives a sequence one number (a `sequence_classification` head with `num_labels` 1), its reward.
    Metrics: `accuracy`, how often the chosen one's is larger, `margin`, `chosen_reward` and `rejected_reward`."""

    def loss_fn(params, batch, rng=None):
        inputs, _, real_B = _both(batch)
        out = model.apply(params, rng=rng, **inputs)
        if out.get("logits", jnp.zeros(0)).shape != (2 * len(real_B), 1):
            raise ValueError("a model of rewards gives one number a sequence: take head='sequence_classification' and num_labels=1")
        chosen, rejected = out["logits"][0::2, 0], out["logits"][1::2, 0]
        return Mean.of(losses.bradley_terry(chosen, rejected), real_B), _metrics(chosen, rejected, real_B)

    return loss_fn


def _metrics(chosen: jax.Array, rejected: jax.Array, real_B: jax.Array) -> dict[str, Mean]:
    found = {"accuracy": chosen > rejected, "margin": chosen - rejected, "chosen_reward": chosen, "rejected_reward": rejected}
    return {name: Mean.of(x, real_B) for name, x in found.items()}


def bare(params: Any) -> Any:
    """The weights beneath all adapters: what an adapted model was before its adapters trained, and so its reference."""

    def beneath(w):
        while isinstance(w, Adapted):
            w = w.base
        return w

    return jax.tree.map(beneath, params, is_leaf=is_typed)


def reference_log_probs(
    model: Model, params: Any, batches: Iterable[Any], *, mesh: jax.sharding.Mesh | None = None, table: Table = TABLE,
    chunk: int | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """{"record": int64 [N] in ascending order, "chosen", "rejected": float32 [N]}, of every pair of the batches once: arrays to keep (`np.savez`),
    whose pairs are found by what they say, in whatever order and batches they come."""

    def step(params, batch):
        with tracing_on(mesh, table):
            return batch["record"], *_log_probs(model, params, batch, None, chunk)

    compiled = jax.jit(step, out_shardings=None if mesh is None else replicated(mesh))
    seen = [jax.device_get(compiled(params, batch)) for batch in batches]
    record, chosen, rejected, real = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    keys, first = np.unique(_keys(record[real]), return_index=True)
    return {"record": keys, "chosen": chosen[real][first], "rejected": rejected[real][first]}


def with_reference(pairs: Mapping[str, Any], reference: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An example, or a batch that is still on the host, with its `reference_chosen` and `reference_rejected`. Raises ValueError for a pair that the
    reference does not know."""
    keys = _keys(np.asarray(pairs["record"]))
    at = np.minimum(np.searchsorted(reference["record"], keys), len(reference["record"]) - 1)
    if strange := int(np.sum((reference["record"][at] != keys) & (keys != 0))):  # 0: rows that fill up a batch
        raise ValueError(
            f"the reference lacks {strange} of {keys.size} pairs; compute it over these records, read with the same tokenizer and length"
        )
    return {**pairs, "reference_chosen": reference["chosen"][at], "reference_rejected": reference["rejected"][at]}


def _keys(record: np.ndarray) -> np.ndarray:
    """int32 [..., 2] -> int64 [...], which no device keeps."""
    return np.ascontiguousarray(record).view(np.int64)[..., 0]
