"""Plans: memory by hand, collectives by what layouts promise, time by the roofline; of any jitted step, for any topology, with libtpu and without."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from running import child_python, needs_libtpu
from test_custom_step import MODELS

import bigflax
from bigflax import models, planner, sharding, tasks, topology, train
from bigflax.planner import compiled, roofline

V5E, V5P = topology.parse("v5e:2x4"), topology.parse("v5p:4x4x4")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(topology, "has_compiler", lambda: False)


def plain(mesh):
    """state, batch and jitted step of w <- w - mean(x w) as anyone may write it."""
    state = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))}
    batch = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    step = jax.jit(lambda state, x: {"w": state["w"] - jax.grad(lambda w: jnp.sum(jnp.square(x @ w)))(state["w"])}, donate_argnums=0)
    return step, state, batch


def test_any_jitted_step(no_compiler):
    found = bigflax.plan(*plain(sharding.make_mesh(fsdp=8)), topology="v5e:2x4", steps=100)
    assert (found.chips, found.source, found.mesh) == (8, "CPU compiler, whose memory is an estimate", {"fsdp": 8})
    assert (found.memory["weights"], found.memory["batch"]) == (64 * 128 * 4 / 8, 16 * 64 * 4 / 8)
    assert found.program_flops == found.model_flops == 2 * 2 * 16 * 64 * 128  # x w, and its gradient for w
    assert [(t.kind, t.axes) for t in found.traffic] and all(t.axes == ("fsdp",) for t in found.traffic)
    assert found.fits and found.dollars == pytest.approx(100 * found.step_seconds / 3600 * 8 * 1.2)
    assert planner.Plan.read(found.json()) == found
    assert json.loads(found.json())["fits"] is True


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_steps_of_researchers(no_compiler, name, mesh):
    """A plain function and an NNX model (tests/test_custom_step.py), laid out by hand on no table at all."""
    init, loss_fn = MODELS[name]
    tx, laid = optax.adamw(1e-3), sharding.make_mesh(**mesh)
    state = bigflax.state_like(init, tx, mesh=laid)
    ids = jax.ShapeDtypeStruct((16, 32), jnp.int32, sharding=sharding.batch_sharding(laid))
    found = bigflax.plan(bigflax.train_step(loss_fn, tx, state), state, {"input_ids": ids, "labels": ids}, topology="v5e:2x4")
    size = sum(math.prod(w.shape) for w in jax.tree.leaves(state.params)) * 4
    split = mesh.get("fsdp", 1)
    assert found.memory["weights"] == pytest.approx(size / split, rel=0.02)  # biases are whole
    assert found.memory["optimizer"] == pytest.approx(2 * size / split, rel=0.02)
    assert found.tokens == 16 * 32
    assert {axis for t in found.traffic for axis in t.axes} == set(mesh)


def test_what_cannot_be_planned(no_compiler):
    step, state, batch = plain(sharding.make_mesh(fsdp=8))
    with pytest.raises(ValueError, match=r"the mesh has 8 devices and v5e:4x4 has 16; make it of topology.devices\('v5e:4x4'\)"):
        bigflax.plan(step, state, batch, topology="v5e:4x4")
    with pytest.raises(ValueError, match="the mesh lies on 'cpu', which no chip is known of; pass topology="):
        bigflax.plan(step, state, batch)
    with pytest.raises(ValueError, match="no leaf of state or batch has a NamedSharding"):
        bigflax.plan(step, {"w": jnp.ones(3)}, jnp.ones(3), topology="v5e:2x4")


def test_the_optimizer_of_any_state_is_told_by_its_names():
    mesh = sharding.make_mesh(data=8)
    leaf = lambda n: jax.ShapeDtypeStruct((n,), jnp.float32, sharding=NamedSharding(mesh, P()))
    assert compiled.split({"params": {"mu_head": leaf(5)}, "opt_state": (leaf(7), {"nu": leaf(5)})}) == (20, 48)


# -- the roofline ----------------------------------------------------------------------------------------------------------

RING = {"data": 2, "fsdp": 8, "tensor": 4}  # on v5p:4x4x4
COLLECTIVES = {  # kind, bytes of the result, axes -> seconds
    "gather over a line and a half": ("all-gather", 8e9, ("tensor",), 8e9 * 3 / 4 / (2 * 90e9)),
    "reduce is two of them": ("all-reduce", 8e9, ("tensor",), 2 * 8e9 * 3 / 4 / (2 * 90e9)),
    "scatter counts the whole": ("reduce-scatter", 2e9, ("tensor",), 8e9 * 3 / 4 / (2 * 90e9)),
    "all to all": ("all-to-all", 8e9, ("tensor",), 8e9 / 4 / (2 * 90e9)),
    "permute goes both ways": ("collective-permute", 9e9, ("tensor",), 0.05),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective(name):
    kind, size, axes, want = COLLECTIVES[name]
    mesh = sharding.make_mesh(devices=V5P.stand_ins(), **RING)
    assert roofline.collective_seconds(kind, size, axes, mesh, V5P) == pytest.approx(want)


def test_links():
    mesh = sharding.make_mesh(devices=V5P.stand_ins(), fsdp=16, tensor=4)
    assert roofline.links(("fsdp",), mesh, V5P) == 2 * roofline.links(("tensor",), mesh, V5P)  # two dimensions of the grid against one
    flat = sharding.make_mesh(devices=V5E.stand_ins(), fsdp=8)
    assert roofline.links(("fsdp",), flat, V5E) == 2 * 45e9  # two dimensions whose ends are not joined
    two = topology.parse("v5p:2x2x2", 2)
    assert roofline.links(("slice", "fsdp"), sharding.make_mesh(devices=two.stand_ins(), slice=2, fsdp=8), two) == 6.25e9


def test_the_longest_term_is_the_step():
    traffic = [planner.Traffic("all-gather", ("fsdp",), 1, 1.0, 0.5), planner.Traffic("all-reduce", ("slice",), 1, 1.0, 2.0)]
    found = roofline.seconds(3e12, 0.82e12, traffic, 1e12, V5E)
    assert found == {"compute": 3.0, "hbm": 1.0, "ici": 0.5, "dcn": 2.0}


def test_report(tmp_path):
    memory = {"weights": 8 * 2**30, "optimizer": 9 * 2**30, "batch": 0, "temporaries": 0, "code": 0}
    found = planner.Plan(
        topology="v5e:2x4", chips=8, devices=8, mesh={"data": 1, "fsdp": 8}, source="estimate", memory=memory, capacity=compiled.capacity(V5E),
        model_flops=1e12, program_flops=2e12, peak=1e12, seconds={"compute": 2.0, "ici": 4.0}, tokens=8000, steps=900,
    )  # fmt: skip
    assert (found.fits, found.bound_by, found.mfu, found.hours, found.chip_hours, found.dollars) == (False, "ici", 0.25, 1.0, 8.0, None)
    for said in (
        "v5e:2x4, fsdp=8",
        "17.00 GiB   DOES NOT FIT in 15.75",
        "bound by ici",
        "MFU at most 25%, 2K tokens/s",
        "8 chip-hours",
        "--price",
    ):
        assert said in found.table(), said
    for ending, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        found.picture(tmp_path / f"plan{ending}")
        assert (tmp_path / f"plan{ending}").read_bytes().startswith(magic)
    with pytest.raises(ValueError, match=r"ends in .svg or .png, not '.pdf'"):
        found.picture("plan.pdf")


# -- FLOPs and the estimate ------------------------------------------------------------------------------------------------

SIZES = {  # family, size, T -> weights that every token meets (embedding rows apart, a tied table once), layers, width of all heads
    "gpt2 124m": ("gpt2", "124m", 1024, 12 * 12 * 768**2 + 50257 * 768, 12, 768),
    "llama3 8b": ("llama", "llama3-8b", 4096, 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336) + 128256 * 4096, 32, 4096),
    "qwen3 30b a3b": (
        "qwen3_moe",
        "30b-a3b",
        4096,
        48 * (2048 * (4096 + 2 * 512 + 4096) + 128 * 2048 + 8 * 3 * 2048 * 768) + 151936 * 2048,
        48,
        4096,
    ),
    "llama3 70b": ("llama", "llama3-70b", 4096, 80 * (8192 * (8192 + 2 * 1024 + 8192) + 3 * 8192 * 28672) + 128256 * 8192, 80, 8192),
}


@pytest.mark.parametrize("name", SIZES)
def test_model_flops_are_6nd_and_attention(name):
    """6 N D, and 12 L T D' a token for attention that sees everything: half of it where it is causal. Blocks along the diagonal are computed
    whole, so the count lies between: within 2% of the causal formula."""
    family, size, T, N, layers, width = SIZES[name]
    model = models.create(family, size=size, dtype="bfloat16")
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    counted = train.model_flops(tasks.token_loss(model), model.shapes(), {"input_ids": ids, "labels": ids})
    assert counted == pytest.approx(T * (6 * N + 6 * layers * T * width), rel=0.02)


def lm(mesh, *, remat="full", batch=32, length=512, **config):
    """(step, state, batch, loss_fn) of a small decoder."""
    model = models.create("llama", size="tiny", dtype="bfloat16", remat=remat, **config)
    tx, loss_fn = optax.adamw(1e-3), tasks.token_loss(model)
    state = train.state_like(model.init, tx, mesh=mesh, axes=model.axes)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding.batch_sharding(mesh))
    fed = {name: ids for name in ("input_ids", "labels", "segment_ids", "position_ids")}
    return train.train_step(loss_fn, tx, state), state, fed, loss_fn


def estimated(mesh, **options):
    _, state, fed, loss_fn = lm(mesh, **options)
    rows = fed["labels"].shape[0] // mesh.size
    return planner.estimate(planner.trace(loss_fn, state.weights, fed, V5E, rows=rows), state, fed, V5E)


def test_estimates_rank_as_they_should():
    fsdp = sharding.make_mesh(devices=V5E.stand_ins(), fsdp=8)
    data = sharding.make_mesh(devices=V5E.stand_ins(), data=8)
    full, none = estimated(fsdp), estimated(fsdp, remat="none")
    assert full.total < none.total and full.program_flops > none.program_flops and full.model_flops == none.model_flops
    whole = estimated(data)
    assert whole.memory["weights"] == pytest.approx(8 * full.memory["weights"], rel=0.02)
    assert {(t.kind, t.axes) for t in whole.traffic} == {("all-reduce", ("data",))}
    assert {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))} <= {(t.kind, t.axes) for t in full.traffic}


def test_search_covers_the_meshes():
    found = list(planner.search.meshes(8, 1, ("data", "fsdp", "tensor")))
    assert len(found) == 10 and all(math.prod(mesh.values()) == 8 and "data" in mesh for mesh in found)
    assert next(planner.search.meshes(8, 2, ("data", "fsdp"))) == {"slice": 2, "data": 1, "fsdp": 4}


CHILD = """
import sys
sys.path[:0] = ["tests", "."]
import jax
from bigflax import sharding, topology
import test_planner
from bigflax import planner
mesh = sharding.make_mesh(devices=topology.devices("v5e:2x4"), fsdp=8)
config = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=8192, num_attention_heads=4, num_key_value_heads=2)
step, state, fed, _ = test_planner.lm(mesh, length=1024, batch=64, **config)
print(planner.plan(step, state, fed).json())
jax.config.update("jax_optimization_level", "O0")  # a seventh of the time, where memory is not compared
print(planner.plan(*test_planner.plain(mesh)).json())
step, state, fed, _ = test_planner.lm(mesh, remat="none", length=4096, batch=2048, **config)
print(planner.plan(step, state, fed).json())
"""


@needs_libtpu
@pytest.mark.slow
def test_the_tpu_compiler_speaks():
    real, plain_one, large = map(planner.Plan.read, child_python(CHILD).splitlines())
    assert real.source == plain_one.source == "TPU compiler"
    assert real.fits and not large.fits and large.memory["temporaries"] > large.capacity
    config = dict(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=8192, num_attention_heads=4, num_key_value_heads=2
    )
    guess = estimated(sharding.make_mesh(devices=V5E.stand_ins(), fsdp=8), length=1024, batch=64, **config)
    assert guess.memory["weights"] == real.memory["weights"] and guess.memory["optimizer"] == real.memory["optimizer"]
    assert 0.4 < guess.memory["temporaries"] / real.memory["temporaries"] < 2.5
    gathered = {t.axes for t in real.traffic if t.kind in ("all-gather", "collective-permute")}
    assert gathered == {("fsdp",)}
    assert np.isclose(guess.program_flops, real.program_flops, rtol=0.1)
