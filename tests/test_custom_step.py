"""A researcher's own program through the public functions: his model, his loss, his loop, and at last his own step.

The part between the README marks is what the README shows. What enters the library is `init`, a function from a key to a tree of arrays,
and a loss; so a plain function and a Flax NNX module go the same way, and both obey the same laws on every mesh.
"""

import hashlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from running import make_text

from bigflax.data.loader import Loader
from bigflax.trees import named_leaves

# isort: split

# -- begin README
import jax
import jax.numpy as jnp
import optax

import bigflax
from bigflax import data, losses


def init(key):  # a model is a function from a key to a tree of arrays ...
    shapes = {"embed": (264, 64), "up": (512, 256), "down": (256, 264)}
    return {name: 0.05 * jax.random.normal(k, shapes[name]) for name, k in zip(shapes, jax.random.split(key, 3), strict=True)}


def loss_fn(params, batch, rng):  # ... and a loss: here the next byte from the last eight
    x_BTD = jnp.pad(params["embed"][batch["input_ids"]], ((0, 0), (7, 0), (0, 0)))
    x_BTC = jnp.concatenate([x_BTD[:, i : x_BTD.shape[1] - 7 + i] for i in range(8)], axis=-1)
    logits_BTV = jax.nn.gelu(x_BTC @ params["up"]) @ params["down"]
    losses_BT = losses.cross_entropy(logits_BTV, batch["labels"])
    return bigflax.Mean.of(losses_BT, batch["labels"] >= 0)  # a sum and a count: every byte weighs the same, however they are batched


def train(source, folder, *, steps, init=init, loss_fn=loss_fn, save_every=100, **axes):
    mesh, tx, tokenizer = bigflax.make_mesh(**axes), optax.adamw(3e-3), data.byte_tokenizer()
    batches = data.text_batches(source, tokenizer, length=64, batch_size=16, mesh=mesh)
    state = bigflax.init_state(init, tx, mesh=mesh)  # born sharded
    step = bigflax.train_step(loss_fn, tx, state)
    with bigflax.Checkpoints(folder) as checkpoints, batches:
        if checkpoints.latest() is not None:  # killed? then on from there, to the bit
            _, state, position, *_ = checkpoints.restore(state)
            batches.restore(position)
        for at in range(int(state.step) + 1, steps + 1):
            state, metrics = step(state, next(batches))
            if at % save_every == 0:
                print(f"step {at}: loss {metrics['loss'].value:.3f}")
                checkpoints.save(at, state, data=batches.state())
    held_out = data.text_batches(source, tokenizer, length=64, batch_size=16, mesh=mesh, split="validation", repeat=False)
    return state, bigflax.evaluate(bigflax.eval_step(loss_fn, mesh), state.weights, held_out)


# train(data.open_source("python"), "runs/mine", steps=500, data=-1)
# -- end README


# -- begin NNX
class Bytes(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(264, 64, rngs=rngs)
        self.mix = nnx.Conv(64, 256, kernel_size=(8,), padding="CAUSAL", rngs=rngs)
        self.down = nnx.Linear(256, 264, rngs=rngs)

    def __call__(self, ids_BT):
        return self.down(jax.nn.gelu(self.mix(self.embed(ids_BT))))


graph, _ = nnx.split(nnx.eval_shape(lambda: Bytes(rngs=nnx.Rngs(0))))  # the module without its arrays


def nnx_init(key):
    return nnx.to_pure_dict(nnx.split(Bytes(rngs=nnx.Rngs(key)))[1])


def nnx_loss_fn(params, batch, rng):
    losses_BT = losses.cross_entropy(nnx.merge(graph, params)(batch["input_ids"]), batch["labels"])
    return bigflax.Mean.of(losses_BT, batch["labels"] >= 0)


# train(data.open_source("python"), "runs/nnx", steps=500, init=nnx_init, loss_fn=nnx_loss_fn, data=-1)
# -- end NNX


# The whole step by hand: of the library only the loss, the data and the checkpoints are left.


def train_by_hand(source, folder, *, steps, init, loss_fn, save_every):
    tx, batches = optax.adamw(3e-3), data.text_batches(source, data.byte_tokenizer(), length=64, batch_size=16)
    params = init(jax.random.key(0))
    state = {"step": jnp.int32(0), "params": params, "opt": tx.init(params)}

    @jax.jit
    def step(state, batch):
        grads = jax.grad(lambda params: loss_fn(params, batch, None).value)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"step": state["step"] + 1, "params": optax.apply_updates(state["params"], updates), "opt": opt}

    with bigflax.Checkpoints(folder) as checkpoints, batches:
        if checkpoints.latest() is not None:
            _, state, position, *_ = checkpoints.restore(state)
            batches.restore(position)
        for at in range(int(state["step"]) + 1, steps + 1):
            state = step(state, next(batches))
            if at % save_every == 0:
                checkpoints.save(at, state, data=batches.state())
    return state


MODELS = {"plain": (init, loss_fn), "nnx": (nnx_init, nnx_loss_fn)}
MESHES = {"data=8": {"data": 8}, "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2}}
LAYOUT = {  # which mesh axis carries each dimension of the matrices where there is an axis fsdp: it takes the largest
    "plain": {"embed": ("fsdp",), "up": ("fsdp",), "down": (None, "fsdp")},
    "nnx": {"embed/embedding": ("fsdp",), "mix/kernel": (None, None, "fsdp"), "down/kernel": (None, "fsdp")},
}
STEPS, SAVE_EVERY, KILLED_AT = 8, 2, 7  # killed while reading batch 7: the save of step 4 ended before that of step 6 began


class Killed(Exception):
    pass


def stop():
    raise Killed


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def counting(batch=0, how=stop):
    """From now on reading the batch of that number calls `how`; returns the list of the numbers read."""
    read, numbers, done = Loader.__next__, itertools.count(1), []

    def read_or_die(self):
        if (number := next(numbers)) == batch:
            how()
        done.append(number)
        return read(self)

    Loader.__next__ = read_or_die
    return done


@pytest.fixture(autouse=True)
def loader_recovers(monkeypatch):
    monkeypatch.setattr(Loader, "__next__", Loader.__next__)  # what `counting` puts there goes with the test


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(make_text(tmp_path_factory.mktemp("custom") / "text", files=60))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """(model, mesh) -> final state, held-out metrics and number of batches read of a run that nothing interrupted."""
    done = {}

    def get(model, mesh):
        if (model, mesh) not in done:
            read = counting()
            done[model, mesh] = (*run(text, tmp_path_factory.mktemp("whole"), model, mesh), len(read))
        return done[model, mesh]

    return get


def run(text, folder, model, mesh, steps=STEPS, save_every=SAVE_EVERY):
    made, loss = MODELS[model]
    source = data.open_source("text", path=text)
    if mesh == "by hand":
        return train_by_hand(source, folder, steps=steps, init=made, loss_fn=loss, save_every=save_every), {}
    return train(source, folder, steps=steps, init=made, loss_fn=loss, save_every=save_every, **MESHES[mesh])


def sha256(tree):
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


models = pytest.mark.parametrize("model", MODELS)
meshes = pytest.mark.parametrize("mesh", MESHES)
ways = pytest.mark.parametrize("mesh", [*MESHES, "by hand"])


@models
def test_it_learns(text, tmp_path, model):
    """From even chance (log 264, 5.6 nats) to below the frequencies of this text's letters, 2.85."""
    state, held_out = run(text, tmp_path, model, "data=8", steps=40, save_every=1000)
    assert held_out["loss"] < 2.8
    assert int(state.skipped) == 0


@models
@meshes
def test_weights_and_moments_lie_as_the_mesh_says(whole, model, mesh):
    state = whole(model, mesh)[0]
    specs = lambda tree: {name: tuple(leaf.sharding.spec) for name, leaf in named_leaves(tree) if leaf.ndim > 1}
    assert specs(state.params) == (LAYOUT[model] if "fsdp" in MESHES[mesh] else dict.fromkeys(LAYOUT[model], ()))
    assert specs(state.opt[0].mu) == specs(state.opt[0].nu) == specs(state.params)


@pytest.mark.slow
@models
@ways
def test_a_killed_run_ends_as_one_that_was_not(whole, text, tmp_path, model, mesh):
    expected, expected_held_out, batches = whole(model, mesh)
    counting(KILLED_AT, stop)
    with pytest.raises(Killed):
        run(text, tmp_path, model, mesh)
    read = counting()
    state, held_out = run(text, tmp_path, model, mesh)
    assert (sha256(state), held_out) == (sha256(expected), expected_held_out)
    assert len(read) == batches - 6  # it went on from step 6 and did not begin anew


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*unfinished saves")
def test_kill_9(whole, text, tmp_path):
    code = f"import test_custom_step as t; t.counting({KILLED_AT}, t.kill); t.run({text!r}, {str(tmp_path)!r}, 'plain', 'data=8')"
    child = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=600)
    assert child.returncode == -signal.SIGKILL, child.stderr
    with bigflax.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() in (4, 6)
    state, held_out = run(text, tmp_path, "plain", "data=8")
    expected, expected_held_out, _ = whole("plain", "data=8")
    assert (sha256(state), held_out) == (sha256(expected), expected_held_out)


@models
@meshes
def test_the_librarys_step_is_the_one_by_hand(whole, model, mesh):
    """Adam divides by the gradient's size, so where a gradient is all rounding its update is not: up to 1e-3 of the 3e-3 a step."""
    state, by_hand = whole(model, mesh)[0], whole(model, "by hand")[0]
    moved = optax.tree.norm(optax.tree.sub(by_hand["params"], MODELS[model][0](jax.random.key(0))))
    apart = optax.tree.norm(optax.tree.sub(jax.device_get(state.params), by_hand["params"]))
    assert apart < 1e-3 * moved
