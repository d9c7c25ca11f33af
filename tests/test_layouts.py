"""No layout leaves XLA at a loss: it says "Involuntary full rematerialization" where it must collect an array whole to lay it out again.

The message is written by C++ to standard error, so each compilation runs in a child whose standard error is read.
"""

import os
import subprocess
import sys

import pytest

from bigflax.models import FAMILIES

pytestmark = pytest.mark.slow
MESSAGE = "Involuntary full rematerialization"
MESHES = {
    "fsdp=8": {"fsdp": 8},
    "data=2 fsdp=4": {"data": 2, "fsdp": 4},
    "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}
ALL = MESHES["data=2 fsdp=2 tensor=2"]
APART = {"fsdp": 2, "expert": 2, "tensor": 2}
SEQUENCE = {"fsdp": 2, "context": 2, "tensor": 2}
FOUNDATIONS = ("bert", "gpt2", "llama")  # what the others are composed like: these on every mesh
PIPED = {"stage": 2, "data": 2, "fsdp": 2}
# family, config, mesh, packed, chunk of the head, options of the step
STEPS = {f"{family}, {mesh}": (family, {}, sizes, family != "bert", None) for family in FOUNDATIONS for mesh, sizes in MESHES.items()} | {
    "gpt2, a head of its own": ("gpt2", {"tie_word_embeddings": False}, ALL, True, None),
    "gpt2, a vocabulary that does not divide": ("gpt2", {"vocab_size": 257}, ALL, True, None),
    "llama tied, full remat": ("llama", {"tie_word_embeddings": True, "remat": "full"}, ALL, True, None),
    "bert, a head in chunks": ("bert", {}, ALL, False, 48),
    "gpt2, a head in chunks": ("gpt2", {}, ALL, True, 48),
    "llama, a head in chunks": ("llama", {}, {"fsdp": 8}, True, 48),
    **{f"mixtral, {way}": ("mixtral", {"dispatch": way}, APART, True, None) for way in ("reference", "ragged", "exchange", "capacity")},
    "llama, an expert axis without experts": ("llama", {}, APART, True, None),
    "qwen2_moe, a shared expert": ("qwen2_moe", {"dispatch": "exchange", "remat": "full"}, {"data": 2, "expert": 4}, True, None),
    "qwen3_moe, experts that do not divide": ("qwen3_moe", {"dispatch": "exchange"}, {"expert": 8}, True, None),
    **{
        f"{family}, a sequence over devices": (family, {}, SEQUENCE, family in ("gpt2", "llama"), None)
        for family in ("bert", "gpt2", "llama", "gemma2", "mixtral", "t5", "whisper", "vit")
    },
    "llama, a sequence over eight": ("llama", {"remat": "full"}, {"context": 8}, True, None),
    "llama, a sequence over devices, a head in chunks": ("llama", {}, SEQUENCE, True, 48),
    **{family: (family, {}, ALL, False, None) for family in FAMILIES if family not in FOUNDATIONS},
    "llama in stages": ("llama", {"num_hidden_layers": 4, "remat": "full"}, PIPED, True, None, {"micro_batches": 4, "repeats": 2}),
    "llama in stages, tensor=2": ("llama", {}, {"stage": 2, "fsdp": 2, "tensor": 2}, True, None, {"micro_batches": 4}),
    "bert in stages": ("bert", {}, PIPED, False, None),
    "mixtral in stages": ("mixtral", {}, PIPED, True, None),
    "t5 in stages": ("t5", {}, PIPED, False, None),
    "vit in stages": ("vit", {}, PIPED, False, None),
}
TOGETHER = 8  # cases a process: starting one takes as long as compiling two of them

BAD = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from bigflax import sharding
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
@jax.jit
def lookup(table, ids):  # rows of a table whose width is sharded, wanted by batch: the two do not go together
    x = jax.lax.with_sharding_constraint(table[ids], jax.NamedSharding(mesh, P(("data", "fsdp"))))
    return x @ table.T
lookup(put(jnp.ones((64, 32)), "tensor", "fsdp"), put(jnp.ones((8, 16), jnp.int32), ("data", "fsdp")))
"""

STEP = """
import inspect, sys
import jax, jax.numpy as jnp
from bigflax import models, optim, sharding, tasks, train

def step(family, config, sizes, packed, chunk, options={}):
    mesh = sharding.make_mesh(**sizes)
    model = models.create(family, size="tiny", **config)
    tx = optim.make(lr=1e-3, steps=10, axes=model.axes)
    state = train.state_like(model.init, tx, mesh=mesh, axes=model.axes)
    of = lambda shape, dtype: jax.ShapeDtypeStruct((16, *shape), dtype, sharding=sharding.batch_sharding(mesh))
    batch = {name: of((64,) if x.dtype == jnp.int32 else x.shape[1:], x.dtype) for name, x in model.module.example().items()}
    tokens = "logits" in inspect.signature(type(model.module).__call__).parameters
    if tokens and "head" in jax.eval_shape(lambda params, batch: model.apply(params, logits=False, **batch), model.shapes(), batch):
        loss = tasks.token_loss(model, chunk=chunk)
        batch["labels"] = of((64,), jnp.int32)
        batch |= {"position_ids": batch["labels"], "segment_ids": batch["labels"]} if packed else {}
    else:
        squares = lambda out: sum(jnp.mean(jnp.square(x)) for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating))
        def loss(params, batch, rng):
            out = dict(model.apply(params, rng=rng, **batch))
            updates = out.pop("updates", {})
            return squares(out), {}, updates
    train.train_step(loss, tx, state, **options).compiled.lower(state._replace(frozen=None), state.frozen, batch).compile()

for case in eval(sys.argv[1]):
    step(*case)
    print("compiled", flush=True)
    print("=== next", file=sys.stderr, flush=True)
"""

DECODE = """
import functools, sys
import jax, jax.numpy as jnp
from bigflax import generate, models, sharding
family, sizes = eval(sys.argv[1])
mesh = sharding.make_mesh(**sizes)
model = models.create(family, size="tiny")
place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
params = jax.tree.map(place, model.shapes(), sharding.shardings(model.shapes(), model.axes, mesh))
ids = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=sharding.batch_sharding(mesh))
rng = jax.eval_shape(lambda: jax.random.key(0))
run = lambda params, ids, mask, rng: generate.generate(
    model, params, ids, attention_mask=mask, max_new_tokens=8, temperature=0.8, top_k=5, top_p=0.9, eos_id=1, rng=rng)
with sharding.tracing_on(mesh):
    lowered = jax.jit(run).lower(params, ids, ids, rng)
assert "sharding_constraint" in lowered.as_text()
lowered.compile()
print("compiled")
"""


def child(program, *argv):
    """(output, error output) of a Python program on eight fake devices, with XLA free to speak, which it does when it compiles."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "0"}
    done = subprocess.run([sys.executable, "-c", program, *argv], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_the_message_is_seen_where_a_layout_does_not_hold():
    assert MESSAGE in child(BAD)[1]


@pytest.mark.parametrize("names", [[*STEPS][i : i + TOGETHER] for i in range(0, len(STEPS), TOGETHER)], ids="; ".join)
def test_training_steps_lie_well(names):
    out, err = child(STEP, repr([STEPS[name] for name in names]))
    assert out.split() == ["compiled"] * len(names)
    said = dict(zip(names, err.split("=== next"), strict=False))
    assert not {name: [line[:600] for line in text.splitlines() if MESSAGE in line] for name, text in said.items() if MESSAGE in text}


@pytest.mark.parametrize("family, mesh", [("gpt2", ALL), ("llama", ALL), ("t5", ALL), ("llama", SEQUENCE), ("mixtral", APART)], ids=str)
def test_decoding_lies_well(family, mesh):
    out, err = child(DECODE, repr((family, mesh)))
    assert "compiled" in out
    assert MESSAGE not in err, [line[:600] for line in err.splitlines() if MESSAGE in line]
