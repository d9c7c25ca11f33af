"""What each layout promises to send, held to what the TPU compiler's program of a train step sends: kind, mesh axis and bytes.

    data              each gradient is reduced once
    fsdp              each weight is gathered once a pass and its gradient scattered once; none is reduced whole
    tensor            the activations, six times a layer (rematerialized), and no weight
    slice x fsdp      1 / fsdp of each gradient crosses between the slices
    stage             the activations of a micro-batch, once a tick in each direction

N below are the bytes of the weights in the dtype of computation, bfloat16; gradients travel in it or, where several are added first, in float32.
"""

import json

import pytest
from running import for_tpu, needs_libtpu

pytestmark = [pytest.mark.slow, needs_libtpu]
L, D, F, V, B, T = 4, 512, 1024, 2048, 16, 512
WEIGHTS = L * (4 * D * D + 3 * D * F) + 2 * V * D  # norms aside
N, ACTIVATIONS = 2 * WEIGHTS, 2 * B * T * D
# mesh, topology, slices, options of the step
LAYOUTS = {
    "data": ({"data": 8}, "v5e:2x4", 1, {}),
    "fsdp": ({"fsdp": 8}, "v5e:2x4", 1, {}),
    "tensor": ({"fsdp": 4, "tensor": 2}, "v5e:2x4", 1, {}),
    "slice": ({"slice": 2, "fsdp": 4}, "v5e:2x2", 2, {}),
    "stage": ({"stage": 2, "data": 4}, "v5e:2x4", 1, {"micro_batches": 4}),
    "stage, two rounds": ({"stage": 2, "fsdp": 4}, "v5e:2x4", 1, {"micro_batches": 4, "repeats": 2}),
}
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from bigflax import hlo, models, optim, sharding, tasks, train

def sent(L, D, F, V, B, T, sizes, topology, slices, options):
    more = {"num_slices": slices} if slices > 1 else {}
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    mesh = sharding.make_mesh(devices=chips, **sizes)
    model = models.create("llama", num_hidden_layers=L, hidden_size=D, intermediate_size=F, vocab_size=V, num_attention_heads=8,
                          num_key_value_heads=8, dtype="bfloat16", remat="full")
    tx = optim.make(lr=1e-3, steps=10, axes=model.axes)
    state = train.state_like(model.init, tx, mesh=mesh, axes=model.axes)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=sharding.batch_sharding(mesh))
    step = train.train_step(tasks.token_loss(model), tx, state, **options).compiled
    text = step.lower(state._replace(frozen=None), state.frozen, {"input_ids": ids, "labels": ids}).compile().as_text()
    return [(c.kind, "+".join(hlo.axes_of_groups(c.groups, dict(mesh.shape))), c.bytes * c.count, c.wire * c.count) for c in hlo.collectives(text)]

print(json.dumps({name: sent(*case) for name, case in json.loads(sys.argv[1]).items()}))
"""


@pytest.fixture(scope="module")
def sent():
    """`sent(layout, axes, kind=None, wire=False)`: bytes of results, or those that a device sends, in one step."""
    cases = {name: (L, D, F, V, B, T, *case) for name, case in LAYOUTS.items()}
    found = json.loads(for_tpu(PROGRAM, json.dumps(cases)).splitlines()[-1])

    def count(layout, axes, *kinds, wire=False):
        return sum(row[3 if wire else 2] for row in found[layout] if row[1] == axes and (not kinds or row[0] in kinds))

    return count


def test_data_reduces_each_gradient_once(sent):
    assert N <= sent("data", "data", "all-reduce") <= 2 * N * 1.05
    assert sent("data", "data") == sent("data", "data", "all-reduce")


def test_fsdp_gathers_once_a_pass_and_never_reduces_a_whole_weight(sent):
    promised = 3 * 7 / 8 * N  # forward, backward, gradient; to each of 8 devices what it has not
    assert 0.8 * promised <= sent("fsdp", "fsdp", wire=True) <= 1.5 * promised
    assert sent("fsdp", "fsdp", "all-reduce") <= 0.05 * N  # norms and sums of squares


def test_tensor_sends_activations(sent):
    assert sent("tensor", "tensor", "all-reduce", "all-gather", "reduce-scatter") <= (6 * L + 3) * ACTIVATIONS / 4
    assert sent("tensor", "fsdp", wire=True) <= 1.5 * 3 * 3 / 4 * N / 2  # each device's columns alone


def test_slices_exchange_their_share_alone(sent):
    assert N / 4 <= sent("slice", "slice") <= 2 * N / 4 * 1.05
    assert sent("slice", "slice+fsdp") <= 0.01 * N
    # Within a slice libtpu makes scatters of some of the reductions and leaves others whole, which is twice the traffic of these.
    assert sent("slice", "fsdp", wire=True) <= 1.5 * 3 * 3 / 4 * N


@pytest.mark.parametrize("layout, repeats", [("stage", 1), ("stage, two rounds", 2)])
def test_stages_hand_on_one_micro_batch_a_tick(sent, layout, repeats):
    S, M = 2, 4
    each = ACTIVATIONS / M / 4  # of one device
    assert sent(layout, "stage", "collective-permute") == pytest.approx(2 * (M * repeats + S - 1) * each, rel=0.01)


def test_stages_reduce_gradients_over_data_once(sent):
    """Of the half of the layers that a device has, and of the table and the head, which lie over the stages' devices too."""
    layers, others = 2 * L * (4 * D * D + 3 * D * F) / 2, 2 * 2 * V * D
    assert sent("stage", "data") + sent("stage", "data+stage") <= 2 * 1.05 * (layers + others)
