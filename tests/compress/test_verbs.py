"""quantize, prune and factorize over whole models: what they reach, what they cost, and that chains of them hold wherever arrays do."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import bench_calibration

from bigflax import compress, models, optim, peft, sharding, tasks, train, trees, weights
from bigflax.checkpoint import Checkpoints
from bigflax.compress import qat

KEY = jax.random.key(0)
EVERY = "blocks.*/(q|k|v|out|up|gate|down)"


def decoder(**more):
    fields = (
        dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1) | more
    )
    model = models.create("llama", **fields)
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, model.init(KEY))
    ids = np.random.default_rng(0).integers(0, 64, (16, 32)).astype(np.int32)
    return model, params, lambda params, batch: model.apply(params, **batch), [{"input_ids": ids[:8]}, {"input_ids": ids[8:]}]


def off(forward, params, small, batch):
    """How far the logits are, as a share."""
    want, got = (jax.jit(forward)(p, batch)["logits"] for p in (params, small))
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.fixture(scope="module")
def case():
    return decoder()


@pytest.mark.slow
def test_looking_at_what_goes_in_pays_on_a_whole_model(case):
    """Each line errs less than the one before it on the logits: the ratios that were measured, with a third to spare."""
    model, params, forward, batches = case
    made = lambda verb, to, method, **more: off(
        forward, params, verb(model, params, [(EVERY, to)], method=method, forward=forward, batches=batches, **more), batches[0]
    )
    assert made(compress.quantize, "int4:32", "gptq") < 0.8 * made(compress.quantize, "int4:32", "rtn")
    assert made(compress.quantize, "int4:32", "awq") < made(compress.quantize, "int4:32", "rtn")
    plain, seen, moved = (made(compress.prune, "50%", method) for method in ("magnitude", "wanda", "sparsegpt"))
    assert moved < 0.9 * seen < 0.9 * plain
    assert made(compress.factorize, 0.5, "whitened") < 0.75 * made(compress.factorize, 0.5, "svd")
    for verb, to, method in (
        (compress.quantize, "int4:32", "awq"),
        (compress.prune, "50%", "wanda"),
        (compress.factorize, 0.5, "whitened"),
    ):
        assert made(verb, to, method, correct=True) < 0.8 * made(verb, to, method)


def half_and_codes(case):
    model, params, _, _ = case
    small = compress.packed(compress.prune(model, params, [(EVERY, "2:4")], method="magnitude"), model.axes)
    return compress.quantize(model, small, [(EVERY, "int8")])


CHAINS = {
    "LoRA over int4": lambda case: peft.lora(
        compress.quantize(case[0], case[1], [(EVERY, "int4:32")]), [(EVERY, 4)], axes=case[0].axes, rng=KEY
    ),
    "2:4 and int8": half_and_codes,
    "low rank and int8": lambda case: compress.quantize(
        case[0], compress.factorize(case[0], case[1], [(EVERY, 0.5)], method="svd"), [(EVERY, "int8")]
    ),
    "masked": lambda case: compress.prune(case[0], case[1], [(EVERY, "50%")], method="magnitude"),
    "learned int4": lambda case: qat.learned(case[0], case[1], [(EVERY, "int4:32")], method="gptq", forward=case[2], batches=case[3]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_chains_train_save_and_restore_on_another_mesh(name, case, tmp_path):
    model, _, _, batches = case
    small = CHAINS[name](case)
    loss_fn, tx = tasks.create("causal_lm", model), optim.make(lr=1e-3, steps=10, axes=model.axes)
    batch = {"input_ids": batches[0]["input_ids"], "labels": np.roll(batches[0]["input_ids"], -1, 1)}
    state = train.init_state(small, tx, mesh=sharding.make_mesh(fsdp=4, tensor=2), axes=model.axes)
    step, losses = train.train_step(loss_fn, tx, state), []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].value))
    assert losses[2] < losses[0]
    codes = [name for name, leaf in trees.named_leaves(state.params) if not jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert not codes  # they are frozen
    other = train.state_like(small, tx, mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2), axes=model.axes)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        restored = checkpoints.restore(other).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.weights), jax.device_get(restored.weights))
    again, metrics = train.train_step(loss_fn, tx, restored)(restored, batch)
    here, want = step(state, batch)
    assert float(metrics["loss"].value) == pytest.approx(float(want["loss"].value), rel=1e-5)
    zeros = lambda tree: sum(
        int(jnp.sum(weights.dense(w) == 0)) for n, w in weights.named_weights(tree) if isinstance(w, weights.Masked | weights.Sparse)
    )
    assert zeros(again.weights) == zeros(here.weights) == zeros(small)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of a process's memory is Linux's")
def test_calibration_never_holds_two_float_copies():
    """What 28 layers take more at the peak than 4, of what they weigh more: their codes, a byte each, and not a second time themselves. What a compiler
    takes, and one layer's statistics and copies, are the same for both."""
    sizes = dict(heads=8, tokens=128, width=1024, mlp=1024, dtype="float32", method="smoothquant", form="int8")
    (small, light, *_), (large, heavy, *_) = (bench_calibration.grown(layers, **sizes) for layers in (4, 28))
    assert 0.1 < (large - small) / (heavy - light) < 0.4


MISTAKES = {
    "a method": (lambda m, p, f, b: compress.quantize(m, p, [(EVERY, "int4")], method="gptk"), "'gptk'.*'gptq'"),
    "nothing to correct by": (
        lambda m, p, f, b: compress.quantize(m, p, [(EVERY, "int4")], correct=True), "leave out correct, or take gptq, awq, hadamard"
    ),
    "no batches": (lambda m, p, f, b: compress.quantize(m, p, [(EVERY, "int4")], method="gptq"), "give forward and batches"),
    "a group": (lambda m, p, f, b: compress.quantize(m, p, [(EVERY, "int4:48")]), "a group of 48 does not divide 64 inputs; nearest is 16"),
    "a rule": (lambda m, p, f, b: compress.prune(m, p, [("layers/.*", "2:4")], method="magnitude"), "matches no weight"),
    "codes": (
        lambda m, p, f, b: compress.prune(m, compress.quantize(m, p, [(EVERY, "int8")]), [(EVERY, "2:4")], method="magnitude"),
        "a QArray cannot be pruned",
    ),
    "twice": (lambda m, p, f, b: compress.quantize(m, compress.quantize(m, p, [(EVERY, "int8")]), [(EVERY, "int4")]), "a QArray cannot be quantized"),
    "too little to correct by": (
        lambda m, p, f, b: compress.prune(
            m, p, [(EVERY, "2:4")], method="wanda", forward=f, batches=[{"input_ids": np.ones((2, 8), np.int32)}], correct=True
        ),
        "wanda, corrected, needs as many positions as a matrix has inputs, 128 of blocks/mlp/down, and is given 16",
    ),
    "another vocabulary": (
        lambda m, p, f, b: compress.quantize(m, p, [(EVERY, "int4")], method="gptq", forward=f, batches=[{"input_ids": np.full((2, 8), 99)}]),
        "token id 99 is outside of the vocabulary",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, message, case):
    with pytest.raises(ValueError, match=message):
        call(*case)


def test_a_mixtures_experts_are_rounded_each_by_itself():
    model = models.create("mixtral", size="tiny")
    params = model.init(KEY)
    small = compress.quantize(model, params, [("blocks/mlp/(up|gate|down)", "int8")])
    w, q = params["blocks"]["mlp"]["up"], small["blocks"]["mlp"]["up"]
    assert weights.shape(q) == w.shape
    np.testing.assert_allclose(weights.dense(q), w, atol=float(jnp.abs(w).max()) / 254)


EXPERTS = "blocks/mlp/(up|gate|down)"


def experts():
    """A mixture of one layer, whose inputs are as unequal as activations are."""
    model = models.create(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4,
    )  # fmt: skip
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, model.init(KEY))
    params["blocks"]["norm2"]["scale"] *= jnp.exp(jax.random.normal(KEY, (32,)))
    ids = np.random.default_rng(0).integers(0, 64, (16, 32)).astype(np.int32)
    return model, params, lambda params, batch: model.apply(params, **batch), [{"input_ids": ids[:8]}, {"input_ids": ids[8:]}]


def product_errors(w, made, seen):
    """Of each expert's matrix the error of its products with what was sent to it, as a share."""
    h, was, off = (np.asarray(x, np.float64) for x in (seen.hessian[0], weights.dense(w)[0], (weights.dense(made) - weights.dense(w))[0]))
    return np.array([np.trace(o.T @ x @ o) / np.trace(a.T @ x @ a) for x, a, o in zip(h, was, off, strict=True)])


@pytest.mark.slow
def test_each_expert_is_fitted_to_the_tokens_that_are_sent_to_it():
    model, params, forward, batches = experts()
    names = [f"blocks/mlp/{name}" for name in ("gate", "up", "down")]
    seen = compress.observe(forward, params, batches, names, axes=model.axes)
    looked, plain = (
        dict(
            weights.named_weights(compress.quantize(model, params, [(EXPERTS, "int4:32")], method=method, forward=forward, batches=batches))
        )
        for method in ("gptq", "rtn")
    )
    before = dict(weights.named_weights(params))
    for name in names:
        assert float(seen[name].count.min()) > 64  # enough for each to be judged by its own
        errors = [product_errors(before[name], made[name], seen[name]) for made in (looked, plain)]
        assert np.all(errors[0] < 0.9 * errors[1]), (name, errors)
        # another expert's tokens are not one's own
        swapped = product_errors(before[name], looked[name], jax.tree.map(lambda x: x[:, ::-1], seen[name]))
        assert errors[0].mean() < swapped.mean()


LOOKING = {  # verb, what it makes of each matrix
    "gptq": (compress.quantize, "int4:32"), "awq": (compress.quantize, "int4:32"), "smoothquant": (compress.quantize, "int8"),
    "hadamard": (compress.quantize, "int4:32"), "wanda": (compress.prune, "2:4"), "sparsegpt": (compress.prune, "2:4"),
    "alps": (compress.prune, "2:4"), "asvd": (compress.factorize, 0.5), "whitened": (compress.factorize, 0.5),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", LOOKING)
def test_experts_that_saw_nothing_stay_whole(method):
    """One token, repeated, is sent to two of four experts. What is made of the others errs on it no more than twice as much as theirs."""
    model, params, forward, _ = experts()
    verb, to = LOOKING[method]
    batch = {"input_ids": np.full((2, 32), 5, np.int32)}
    seen = compress.observe(forward, params, [batch], ["blocks/mlp/up"], axes=model.axes)["blocks/mlp/up"]
    assert sorted(np.asarray(seen.count[0])) == [0, 0, 64, 64]
    small = verb(model, params, [(EXPERTS, to)], method=method, forward=forward, batches=[batch])
    w, made = params["blocks"]["mlp"]["up"], small["blocks"]["mlp"]["up"]
    made = made if not isinstance(made, weights.Scaled | weights.Rotated) else weights.dense(made)
    there = np.isfinite(np.asarray(weights.dense(made)))
    assert there.all()
    token = jax.tree.map(lambda x: jnp.broadcast_to(x.sum(1, keepdims=True), x.shape), seen)
    errors = product_errors(w, made, token)
    met = np.asarray(seen.count[0]) > 0
    assert errors[~met].max() < 2 * errors[met].max() + 1e-6, errors


@pytest.mark.parametrize("family, head", [("bert", "masked_lm"), ("llama", "causal_lm")])
def test_tables_are_factorized_by_how_often_words_come(family, head):
    """A head that is the same table says what it did with a dense one, and the words that come err less than by plain SVD."""
    more = dict(tie_word_embeddings=True) if family == "llama" else {}
    model = models.create(family, size="tiny", vocab_size=96, head=head, **more)
    params, forward = model.init(KEY), lambda params, batch: model.apply(params, **batch)
    ids = np.minimum(np.random.default_rng(0).geometric(0.2, (8, 8)), 95).astype(np.int32)
    rules, often = [("embed/tokens", 0.5)], np.bincount(ids.ravel(), minlength=96)
    made = {
        method: compress.factorize(model, params, rules, method=method, forward=forward, batches=[{"input_ids": ids}])
        for method in ("frequency", "svd")
    }
    table = params["embed"]["tokens"]
    error = lambda small: float(often @ np.square(np.asarray(weights.dense(small["embed"]["tokens"]) - table)).sum(1))
    assert error(made["frequency"]) < 0.8 * error(made["svd"])
    small = made["frequency"]
    arrays = {**small, "embed": {**small["embed"], "tokens": weights.dense(small["embed"]["tokens"])}}
    got, want = (jax.jit(forward)(p, {"input_ids": ids})["logits"] for p in (small, arrays))
    np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))
