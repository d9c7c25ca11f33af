"""A sequence over several devices: loss and every gradient are those of one device, for every kind of attention, and TPU programs send what
ops/context.py promises."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import for_tpu, needs_libtpu

from bigflax import models, optim, sharding, tasks, train, trees

MESHES = {
    "context=8": dict(context=8),
    "data=2 context=4": dict(data=2, context=4),
    "fsdp=2 context=2 tensor=2": dict(fsdp=2, context=2, tensor=2),
}
T = 64
FAMILIES = {  # config, inputs beside the tokens
    "llama": (dict(num_key_value_heads=2), "packed"),
    "gemma2": (dict(sliding_window=20), "packed"),  # window and soft cap
    "bert": (dict(hidden_dropout_prob=0.0), "masked"),
    "t5": (dict(dropout_rate=0.0), "pairs"),  # bias, and a memory
}
LAWS = [(name, "fsdp=2 context=2 tensor=2") for name in FAMILIES] + [("llama", mesh) for mesh in MESHES][:-1] + [("t5", "data=2 context=4")]


def batch_of(kind):
    rng = np.random.default_rng(0)
    ids = lambda: jnp.asarray(rng.integers(1, 200, (4, T)))
    documents = np.sort(rng.integers(1, 4, (4, T)), axis=1)
    documents[:, -5:] = 0
    batch = {"input_ids": ids(), "labels": jnp.where(documents > 0, ids(), -100)}
    if kind == "packed":
        first = np.argmax(documents[:, None] == documents[:, :, None], axis=-1)
        return batch | {"segment_ids": jnp.asarray(documents), "position_ids": jnp.asarray(np.arange(T) - first)}
    batch["attention_mask"] = jnp.asarray(documents > 0, jnp.int32)
    return batch | ({"decoder_input_ids": ids()} if kind == "pairs" else {})


def loss_and_gradients(name, sizes):
    config, kind = FAMILIES[name]
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    model = models.create(name, size="tiny", **config)
    state = train.init_state(model.init, optim.make(lr=1e-3, steps=10, axes=model.axes), mesh=mesh, axes=model.axes)

    def run(params, batch):
        with sharding.tracing_on(mesh):
            return train.gradients(tasks.token_loss(model), params, state.frozen, batch, jax.random.key(0))[:2]

    grads, loss = jax.device_get(jax.jit(run)(state.params, jax.device_put(batch_of(kind), sharding.batch_sharding(mesh))))
    return float(loss.value), grads


@pytest.mark.slow
@pytest.mark.parametrize("name, mesh", LAWS)
def test_every_gradient_is_that_of_one_device(name, mesh):
    loss, grads = loss_and_gradients(name, MESHES[mesh])
    expected, wanted = loss_and_gradients(name, dict(data=1))
    assert loss == pytest.approx(expected, rel=1e-6)  # float32, a mean of 240 sums in another order
    for (leaf, got), (_, want) in zip(trees.named_leaves(grads), trees.named_leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1e-2, np.abs(want).max()), err_msg=leaf)


TPU = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from bigflax import sharding
from bigflax.ops import attention

B, T, N, K, H = 1, 4096, 16, 4, 128
for sizes in json.loads(sys.argv[1]):
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = sharding.make_mesh(devices=chips, **sizes)
    of = lambda names, *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, sharding.spec(names, shape, mesh)))
    q, k = of(("batch", "seq", "heads", None), B, T, N, H), of(("batch", "seq", "kv_heads", None), B, T, K, H)

    def loss(q, k, v, ids):
        with sharding.tracing_on(mesh):
            run = jax.checkpoint(lambda q, k, v: attention(q, k, v, causal=True, q_segments=ids, kv_segments=ids),
                                 policy=jax.checkpoint_policies.save_only_these_names("attention"))
            out = run(q, k, v)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    found = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, of(("batch", None), B, T, dtype=jnp.int32)).compile()
    sent = re.findall(r" = \\(?bf16\\[([0-9,]+)\\].* (all-gather|all-reduce|collective-permute|reduce-scatter|all-to-all)(?:-start)?\\(", found.as_text())
    print(json.dumps({"kernels": found.as_text().count('custom_call_target="tpu_custom_call"'),
                      "temporaries": found.memory_analysis().temp_size_in_bytes, "sent": sorted(kind + " " + shape for shape, kind in sent)}))
"""


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_runs_the_kernel_and_sends_keys_and_halves_alone():
    """On 4 devices: k and v are gathered once a pass and their gradients scattered once; of a device's rows, two halves travel each time."""
    meshes = [dict(tensor=4), dict(context=4)]
    heads, sequence = map(json.loads, for_tpu(TPU, json.dumps(meshes), level="O2").splitlines())
    assert heads["kernels"] == sequence["kernels"] == 3  # forward once, as its output is saved by name; dq; dk and dv
    assert heads["temporaries"] < 4 * 4096 * 4096 * 2 / 16  # a device's heads, T x T in bfloat16: nothing of that size is held
    assert sequence["temporaries"] < 16 * 1024 * 4096 * 2 / 16
    assert heads["sent"] == []
    # Two halves each: of q and the output forward, of q again, as only the output is saved, of the gradients of the output and of q.
    halves = ["collective-permute 1,512,16,128"] * 2 * 5
    assert sequence["sent"] == ["all-gather 1,4096,4,128"] * 2 * 2 + halves + ["reduce-scatter 1,1024,4,128"] * 2
