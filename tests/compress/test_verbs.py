"""quantize, prune and factorize over whole models: what they reach, what they cost, and that chains of them hold wherever arrays do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import compress, models, optim, peft, sharding, tasks, train, trees, weights
from bigflax.checkpoint import Checkpoints

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
    made = lambda verb, to, method: off(
        forward, params, verb(model, params, [(EVERY, to)], method=method, forward=forward, batches=batches), batches[0]
    )
    assert made(compress.quantize, "int4:32", "gptq") < 0.8 * made(compress.quantize, "int4:32", "rtn")
    assert made(compress.quantize, "int4:32", "awq") < made(compress.quantize, "int4:32", "rtn")
    plain, seen, moved = (made(compress.prune, "50%", method) for method in ("magnitude", "wanda", "sparsegpt"))
    assert moved < 0.9 * seen < 0.9 * plain
    assert made(compress.factorize, 0.5, "whitened") < 0.75 * made(compress.factorize, 0.5, "svd")


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
def test_calibration_never_holds_two_float_copies():
    """The peak of live arrays while a stack is quantized layer by layer: the model once, its codes, and one layer's work."""
    import subprocess
    import sys

    code = """
import resource, sys, jax, numpy as np
from bigflax import compress, models, trees
model = models.create("llama", vocab_size=64, hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8)
params = model.init(jax.random.key(0))
ids = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)
forward, every = lambda p, b: model.apply(p, **b), "blocks.*/(q|k|v|out|up|gate|down)"
one = jax.tree.map(lambda x: x[:1] if x.ndim > 2 else x, params)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jax.block_until_ready(jax.jit(forward)(params, {"input_ids": ids}))
before = peak()
small = compress.quantize(model, params, [(every, "int4:128")], method="gptq", forward=forward, batches=[{"input_ids": ids}])
jax.block_until_ready(small)
print((peak() - before) / trees.nbytes(params))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # codes are a byte each here, a quarter of the model; one layer's statistics and copies are the rest
    assert float(done.stdout.split()[-1]) < 0.8, done.stdout


MISTAKES = {
    "a method": (lambda m, p, f, b: compress.quantize(m, p, [(EVERY, "int4")], method="gptk"), "'gptk'.*'gptq'"),
    "no batches": (lambda m, p, f, b: compress.quantize(m, p, [(EVERY, "int4")], method="gptq"), "give forward and batches"),
    "a group": (lambda m, p, f, b: compress.quantize(m, p, [(EVERY, "int4:48")]), "a group of 48 does not divide 64 inputs; nearest is 16"),
    "a rule": (lambda m, p, f, b: compress.prune(m, p, [("layers/.*", "2:4")], method="magnitude"), "matches no weight"),
    "codes": (
        lambda m, p, f, b: compress.prune(m, compress.quantize(m, p, [(EVERY, "int8")]), [(EVERY, "2:4")], method="magnitude"),
        "a QArray cannot be pruned",
    ),
    "twice": (lambda m, p, f, b: compress.quantize(m, compress.quantize(m, p, [(EVERY, "int8")]), [(EVERY, "int4")]), "a QArray cannot be quantized"),
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
