"""A researcher's own program through the public functions: his model, his loss, his loop, and at last his own step.

The part between the README marks is what the README shows. What enters the library is `init`, a function from a key to a tree of arrays,
and a loss; so a plain function and a Flax NNX module go the same way, and both obey the same laws on every mesh.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from running import make_text

from bigflax.data.loader import Loader
from bigflax.train import opt_shardings
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


MODELS = {"plain": (init, loss_fn), "nnx": (nnx_init, nnx_loss_fn)}
MESHES = {"data=8": {"data": 8}, "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2}}
MATRICES = {  # which axis carries each dimension on fsdp=4: the largest one of a weight, and it is 1 on data=8
    "plain": {"embed": ("fsdp",), "up": ("fsdp",), "down": (None, "fsdp")},
    "nnx": {"embed/embedding": ("fsdp",), "mix/kernel": (None, None, "fsdp"), "down/kernel": (None, "fsdp")},
}
STEPS, SAVE_EVERY, KILLED_AT = 12, 2, 7  # six steps done: saving 4 ended before saving 6 began, which may be cut off


class Killed(Exception):
    pass


def die_at(batch: int, how) -> list[int]:
    """From now on the loader's reading of batch number `batch` calls `how`; returns a list that gets the number of every one read."""
    read, numbers, seen = Loader.__next__, itertools.count(1), []

    def read_or_die(self):
        number = next(numbers)
        if number == batch:
            how()
        seen.append(number)
        return read(self)

    Loader.__next__ = read_or_die
    return seen


@pytest.fixture(autouse=True)
def the_loader_recovers(monkeypatch):
    monkeypatch.setattr(Loader, "__next__", Loader.__next__)  # so that what `die_at` puts there goes with the test


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return data.open_source("text", path=str(make_text(tmp_path_factory.mktemp("custom") / "text", files=60)))


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """(model, mesh, steps) -> final state and held-out metrics of a run that nothing interrupted."""
    done = {}

    def get(model, mesh, steps=STEPS):
        if (model, mesh, steps) not in done:
            done[model, mesh, steps] = run(source, tmp_path_factory.mktemp("whole"), model, mesh, steps)
        return done[model, mesh, steps]

    return get


def run(source, folder, model, mesh, steps=STEPS):
    made, loss = MODELS[model]
    return train(source, folder, steps=steps, init=made, loss_fn=loss, save_every=SAVE_EVERY, **MESHES[mesh])


def sha256(tree) -> str:
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


every = lambda test: pytest.mark.parametrize("model", MODELS)(pytest.mark.parametrize("mesh", MESHES)(test))


@every
def test_it_learns(trained, model, mesh):
    """From nothing but the even chance, log 264, to below what the frequencies of letters alone give on this text (about 2.8 nats)."""
    _, before = trained(model, mesh, 0)
    state, after = trained(model, mesh, 60)
    assert before["loss"] == pytest.approx(np.log(264), rel=0.1)
    assert after["loss"] < 2.8 and int(state.skipped) == 0


@every
def test_weights_and_moments_lie_as_the_mesh_says(trained, model, mesh):
    state, _ = trained(model, mesh)
    found = {name: tuple(leaf.sharding.spec) for name, leaf in named_leaves(state.params) if leaf.ndim > 1}
    assert found == (MATRICES[model] if "fsdp" in MESHES[mesh] else dict.fromkeys(MATRICES[model], ()))
    assert {name: tuple(leaf.sharding.spec) for name, leaf in named_leaves(state.opt[0].mu) if leaf.ndim > 1} == found


@every
def test_a_killed_run_ends_as_one_that_was_not(trained, source, tmp_path, model, mesh):
    def how():
        raise Killed

    die_at(KILLED_AT, how)
    with pytest.raises(Killed):
        run(source, tmp_path, model, mesh)
    read = die_at(-1, how)
    state, held_out = run(source, tmp_path, model, mesh)
    assert len([n for n in read if n]) >= STEPS - KILLED_AT + 1
    whole, expected = trained(model, mesh)
    assert (sha256(state), held_out) == (sha256(whole), expected)
