"""What the TPU compiler makes of a small llama's train step on a v5e: less memory for each remat policy that keeps less, products of 8 bits
where they were asked for."""

import json

import pytest
from running import for_tpu, needs_libtpu

pytestmark = [pytest.mark.slow, needs_libtpu]
STEP = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from bigflax import models, optim, sharding, tasks, train

mesh = sharding.make_mesh(devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:1])
for remat, matmul in json.loads(sys.argv[1]):
    model = models.create("llama", size="tiny", vocab_size=1024, hidden_size=512, intermediate_size=1536, num_attention_heads=8,
                          num_hidden_layers=3, dtype="bfloat16", remat=remat)
    tx = optim.make(lr=1e-3, steps=10, axes=model.axes)
    state = train.state_like(model.init, tx, mesh=mesh, axes=model.axes)
    ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=sharding.batch_sharding(mesh))
    step = train.train_step(tasks.create("causal_lm", model, matmul=matmul), tx, state).compiled
    compiled = step.lower(state._replace(frozen=None), state.frozen, {"input_ids": ids, "labels": ids}).compile()
    # what a product is to the chip: the types of its result
    products = re.findall(r"= (\\w+)\\[[^=]*? (?:convolution|dot)\\(", compiled.as_text())
    print(json.dumps({"bytes": compiled.memory_analysis().temp_size_in_bytes, "s32": products.count("s32"), "all": len(products)}))
"""


@pytest.fixture(scope="module")
def compiled():
    """What the compiler says of each (remat, matmul)."""
    cases = [("none", None), ("dots", None), ("full", None), ("offload", None), ("full", "int8")]
    found = for_tpu(STEP, json.dumps(cases)).splitlines()
    return dict(zip(cases, [json.loads(line) for line in found if line.startswith("{")], strict=True))


def test_what_keeps_less_takes_less_memory(compiled):
    # "minimal" is left out: at this size what it computes again lies beside what it saves
    sizes = [compiled[remat, None]["bytes"] for remat in ("none", "dots", "full", "offload")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_products_of_eight_bits_are_the_chips_own(compiled):
    """Seven products a layer forward and seven for dx, and what remat does again; those for dw, the attention's and the head's are none of them."""
    floats, narrow = compiled["full", None], compiled["full", "int8"]
    assert floats["s32"] == 0
    assert narrow["s32"] >= 14
    assert narrow["all"] > narrow["s32"]
