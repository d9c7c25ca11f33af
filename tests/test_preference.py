"""Losses of pairs against their definition over whole logits in float64, the reference by what a pair says, and that a few steps teach the order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import data, losses, make_mesh, models, nn, preference, sharding, train, weights
from bigflax.optim import make as make_optimizer

LENGTH = 24
TOKENIZER = data.byte_tokenizer()
WORDS = ["yes", "no", "perhaps so", "never", "tomorrow", "a cat", "seven", "blue"]
RECORDS = [
    {"prompt": f"{WORDS[i]}?", "chosen": f" {WORDS[(3 * i + 1) % 8]}.", "rejected": f" {WORDS[(5 * i + 2) % 8]}!"}
    for i in range(len(WORDS))
]
SMALL = dict(size="tiny", vocab_size=TOKENIZER.vocab_size, n_embd=32, n_layer=1, n_head=2, embd_pdrop=0.0, resid_pdrop=0.0)


def batch_of(records):
    examples = [preference.read_pair(record, TOKENIZER, LENGTH) for record in records]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


@functools.cache
def policy():
    """(model, weights that pairs are preferred by, reference weights)."""
    model = models.create("gpt2", **SMALL)
    draw = lambda seed: jax.tree.map(
        lambda s: jnp.asarray(np.random.default_rng(seed).normal(size=s.shape) * 0.2, jnp.float32), model.shapes()
    )
    return model, draw(0), draw(1)


@functools.cache
def log_probs(which):
    """log p of each answer by whole logits in float64, chosen [B] and rejected [B]."""
    model, batch, out = policy()[0], batch_of(RECORDS), []
    for side in preference.SIDES:
        apply = jax.jit(lambda p, ids, mask: model.apply(p, input_ids=ids, attention_mask=mask)["logits"])
        logits = np.asarray(apply(policy()[1 + which], batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"]), float)
        log_p, labels = logits - np.log(np.exp(logits).sum(-1, keepdims=True)), batch[f"{side}_labels"]
        picked = np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0]
        out.append(np.where(labels == -100, 0, picked).sum(-1))
    return out


def test_a_pair_is_read():
    """Inputs and labels spell prompt and answer; one before the answer's first token is the first that has a label."""
    example = preference.read_pair(RECORDS[0], TOKENIZER, LENGTH)
    for side in preference.SIDES:
        ids, labels, mask = (example[f"{side}_{name}"] for name in ("input_ids", "labels", "attention_mask"))
        assert {x.shape for x in (ids, labels, mask)} == {(LENGTH,)} and {x.dtype for x in (ids, labels, mask)} == {np.dtype("int32")}
        assert ids[0] == TOKENIZER.bos_id and TOKENIZER.decode(ids[: mask.sum()]) == RECORDS[0]["prompt"] + RECORDS[0][side]
        assert TOKENIZER.decode(labels[labels != -100]) == RECORDS[0][side] and labels[mask.sum() - 1] == TOKENIZER.eos_id
        np.testing.assert_array_equal(
            ids[1 : mask.sum()][labels[: mask.sum() - 1] != -100], labels[: mask.sum() - 1][labels[: mask.sum() - 1] != -100]
        )
        assert not mask[mask.sum() :].any() and (labels[mask == 0] == -100).all()


CUTS = {  # prompt, chosen, rejected -> what is left of them within 8 tokens
    "the prompt loses its beginning on both sides": (("123456789", "abc", "abcde"), ("789", "abc", "abcde")),
    "an answer its end": (("123", "abcdefghijkl", "a"), ("3", "abcdefgh", "a")),
    "nothing": (("", "a", "b"), ("", "a", "b")),
}


@pytest.mark.parametrize("texts, left", CUTS.values(), ids=CUTS)
def test_what_is_too_long_is_cut(texts, left):
    example = preference.read_pair(dict(zip(("prompt", *preference.SIDES), texts, strict=True)), TOKENIZER, 8)
    for side, answer in zip(preference.SIDES, left[1:], strict=True):
        ids, labels = example[f"{side}_input_ids"], example[f"{side}_labels"]
        first = int(np.argmax(labels != -100))
        assert (TOKENIZER.decode(ids[: first + 1]), TOKENIZER.decode(labels[labels != -100])) == (left[0], answer)


LOSSES = {f"{kind}, {smoothing}": dict(kind=kind, smoothing=smoothing) for kind in losses.PREFERENCES for smoothing in (0.0, 0.2)}


@functools.cache
def measured():
    """What each of LOSSES says of the pairs and of one of zeros, which fills up a batch and does not count; in one program."""
    model, params, before = policy()
    batch = preference.with_reference(batch_of(RECORDS), preference.reference_log_probs(model, before, [batch_of(RECORDS)]))
    batch = {name: np.concatenate([x, np.zeros_like(x[:1])]) for name, x in batch.items()}
    made = {name: preference.dpo(model, beta=0.3, **options) for name, options in LOSSES.items()}
    return jax.jit(lambda params, batch: {name: loss_fn(params, batch) for name, loss_fn in made.items()})(params, batch)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_metrics_are_their_definitions(name):
    loss, metrics = measured()[name]
    (chosen, rejected), (ref_chosen, ref_rejected) = log_probs(0), log_probs(1)
    h, smoothing = (chosen - ref_chosen) - (rejected - ref_rejected), LOSSES[name]["smoothing"]
    of = {
        "sigmoid": lambda h: np.log1p(np.exp(-0.3 * h)),
        "ipo": lambda h: (h - 1 / 0.6) ** 2,
        "hinge": lambda h: np.maximum(0, 1 - 0.3 * h),
    }
    of = of[LOSSES[name]["kind"]]
    want = {
        "loss": np.mean((1 - smoothing) * of(h) + smoothing * of(-h)), "accuracy": np.mean(h > 0), "margin": np.mean(0.3 * h),
        "chosen_reward": np.mean(0.3 * (chosen - ref_chosen)), "rejected_reward": np.mean(0.3 * (rejected - ref_rejected)),
    }  # fmt: skip
    assert int(loss.count) == 8 and 0 < want["accuracy"] < 1
    got = {"loss": float(loss.value), **{name: float(m.value) for name, m in metrics.items()}}
    assert got == pytest.approx(want, rel=1e-4, abs=1e-4)  # sums of a dozen float32 log probabilities of about -5


def test_the_reference_is_found_by_what_a_pair_says():
    """Computed over eight devices in batches of another order, some pairs twice; the same numbers."""
    model, _, before = policy()
    mesh = make_mesh(data=8)
    put = lambda records: jax.device_put(batch_of(records), sharding.batch_sharding(mesh))
    reference = preference.reference_log_probs(model, before, [put(RECORDS[::-1]), put(RECORDS)], mesh=mesh)
    assert (np.diff(reference["record"]) > 0).all() and len(reference["record"]) == 8
    found = [preference.with_reference(preference.read_pair(record, TOKENIZER, LENGTH), reference) for record in RECORDS]
    for side, want in zip(preference.SIDES, log_probs(1), strict=True):
        np.testing.assert_allclose([one[f"reference_{side}"] for one in found], want, rtol=1e-5)
    stranger = preference.read_pair({**RECORDS[0], "chosen": "else"}, TOKENIZER, LENGTH)
    with pytest.raises(ValueError, match="the reference lacks 1 of 1 pairs; compute it over these records"):
        preference.with_reference(stranger, reference)


def test_beneath_adapters_is_the_reference():
    """At the start h is 0 and the loss log 2; the gradient reaches the adapters and nothing of the reference."""
    model, params, _ = policy()
    mlp, axes = params["blocks"]["mlp"], model.axes["blocks"]["mlp"]["up"]
    lora = weights.lora(weights.quantize(mlp["up"], axes=axes), 2, axes=axes, rng=jax.random.key(0))
    assert preference.bare({"up": lora})["up"] is lora.base

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def graded(b):
        adapted = {**params, "blocks": {**params["blocks"], "mlp": {**mlp, "up": dataclasses.replace(lora, b=b)}}}
        loss, metrics = preference.dpo(model, reference=preference.bare)(adapted, batch_of(RECORDS))
        return loss.value, metrics

    (loss, metrics), grad = graded(lora.b)
    assert float(loss) == pytest.approx(np.log(2), abs=1e-6) and float(metrics["margin"].value) == pytest.approx(0, abs=1e-5)
    assert float(jnp.abs(grad).max()) > 0
    (loss, metrics), _ = graded(lora.b - 0.1 * grad / jnp.linalg.norm(grad))
    assert float(loss) < np.log(2) and float(metrics["margin"].value) > 0


LEARNERS = {"one device": ({"data": 1}, 1), "four devices": ({"data": 2, "fsdp": 2}, 2)}


@functools.cache
def learned(where):
    sizes, accumulate = LEARNERS[where]
    model, _, params = policy()
    mesh = make_mesh(**sizes, devices=jax.devices()[: sizes["data"] * sizes.get("fsdp", 1)])
    reference = preference.reference_log_probs(model, params, [batch_of(RECORDS)])
    batch = jax.device_put(preference.with_reference(batch_of(RECORDS), reference), sharding.batch_sharding(mesh))
    tx = make_optimizer(lr=5e-3, steps=6, kind="constant", axes=model.axes)
    state = train.init_state(params, tx, mesh=mesh, axes=model.axes)
    step, seen = train.train_step(preference.dpo(model, beta=0.3), tx, state, accumulate=accumulate), []
    for _ in range(6):
        state, metrics = step(state, batch)
        seen.append({name: float(m.value) for name, m in metrics.items() if name != "grad_norm"})
    return seen


def test_a_few_steps_teach_the_order():
    first, *_, last = learned("one device")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4) and abs(first["margin"]) < 1e-3
    assert last["margin"] > 0.5 and last["accuracy"] == 1.0 and last["loss"] < 0.5
    assert last["chosen_reward"] > last["rejected_reward"]


@pytest.mark.slow
def test_four_devices_and_accumulation_learn_as_one():
    drop = lambda seen: {name: x for name, x in seen.items() if name != "accuracy"}  # at first the two sides are equal but for a rounding
    for one, four in zip(*map(learned, LEARNERS), strict=True):
        assert drop(four) == pytest.approx(drop(one), rel=1e-3, abs=1e-3)  # six steps of Adam, which divides small gradients by their size


def test_rewards_are_those_of_bradley_and_terry():
    """A model that counts the vowels of what it reads is right where the chosen answer has more."""
    scores = lambda ids: jnp.isin(ids, jnp.asarray([TOKENIZER.encode(c)[0] for c in "aeiou"])).sum(-1)[:, None].astype(jnp.float32)
    model = nn.Model(lambda rng: {}, lambda params, *, rng=None, input_ids, attention_mask: {"logits": scores(input_ids)}, {})
    batch = batch_of(RECORDS)
    loss, metrics = preference.reward(model)({}, {name: jnp.asarray(x) for name, x in batch.items() if not name.endswith("labels")})
    count = lambda text: sum(c in "aeiou" for c in text)
    gap = np.array([count(r["chosen"]) - count(r["rejected"]) for r in RECORDS], float)
    assert float(loss.value) == pytest.approx(np.log1p(np.exp(-gap)).mean(), rel=1e-6) and int(loss.count) == 8
    assert float(metrics["accuracy"].value) == np.mean(gap > 0) and float(metrics["margin"].value) == pytest.approx(gap.mean())


@pytest.mark.slow
def test_a_reward_model_learns():
    model = models.create("gpt2", head="sequence_classification", num_labels=1, **SMALL)
    loss_fn, batch, tx = preference.reward(model), batch_of(RECORDS), optax.adam(1e-3)

    @jax.jit
    def step(params, opt):
        (_, metrics), grads = jax.value_and_grad(lambda p: (lambda loss, m: (loss.value, m))(*loss_fn(p, batch)), has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, metrics["accuracy"].value

    params = jax.jit(model.init)(jax.random.key(0))
    opt = tx.init(params)
    for _ in range(15):
        params, opt, accuracy = step(params, opt)
    assert float(accuracy) == 1.0


PAIR = batch_of(RECORDS[:2])


def of_shapes(loss_fn, model, batch):
    return lambda: jax.eval_shape(loss_fn, model.shapes(), batch)


POLICY, HEADLESS = models.create("gpt2", **SMALL), models.create("gpt2", head=None, **SMALL)
DPO = preference.dpo(POLICY)
UNLABELLED = {name: x for name, x in PAIR.items() if not name.endswith("labels")}
MISTAKES = {
    "a field": (
        lambda: preference.read_pair({"prompt": "a", "choosen": "b", "rejected": "c"}, TOKENIZER, 8),
        "no text 'chosen'.*'choosen'",
    ),
    "half a pair": (of_shapes(DPO, POLICY, {"chosen_input_ids": PAIR["chosen_input_ids"]}), "rejected_input_ids and what else of both"),
    "no labels": (of_shapes(DPO, POLICY, UNLABELLED), "chosen_labels and rejected_labels, -100 on the prompt"),
    "no reference": (of_shapes(DPO, POLICY, PAIR), "learned against a reference: .* or put its log probabilities into the batches"),
    "a kind": (
        of_shapes(preference.dpo(POLICY, kind="kto", reference=preference.bare), POLICY, PAIR),
        "no kind 'kto'; take one of sigmoid",
    ),
    "no head": (of_shapes(preference.dpo(HEADLESS, reference=preference.bare), HEADLESS, PAIR), "a model with a language-model head"),
    "two numbers": (of_shapes(preference.reward(POLICY), POLICY, PAIR), "take head='sequence_classification' and num_labels=1"),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
