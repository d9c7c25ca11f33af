"""Laws of checkpoints over a table of states: restoring what was saved is the identity, to the bit, on any mesh; kept is what was asked."""

import json
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bigflax import stored, trees, weights
from bigflax.checkpoint import Checkpoints, restore_params, target_like
from bigflax.checksum import MIX, STEP, checksum
from bigflax.metrics import Mean


class State(NamedTuple):
    step: Any
    params: Any
    opt: Any
    frozen: Any = None


def mesh(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def sharded(tree, on, axis):
    """Every leaf split over `axis` along its first dimension where that divides, else replicated."""
    spec = lambda x: P(axis) if x.ndim and x.shape[0] % on.shape[axis] == 0 and x.size else P()
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(on, spec(x))), tree)


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(sum(shape)), shape).astype(dtype)


def adam():
    params = {"embed": normal(16, 8), "blocks": {"up": normal(3, 8, 32), "norm": normal(3, 8)}}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0, 1, 10)))
    return State(jnp.int32(7), params, tx.init(params))


def qlora():
    base = weights.quantize(normal(2, 16, 8), "int4", axes="layers | embed -> mlp", group=8)
    leaf = weights.lora(base, 2, axes="layers | embed -> mlp", rng=jax.random.key(0))
    kept, rest = trees.partition({"up": leaf, "bias": normal(8)}, weights.trainable({"up": leaf, "bias": normal(8)}))
    return State(jnp.int32(7), kept, optax.adam(1.0).init(kept), rest)


def compressed():
    w, axes = normal(2, 16, 8), "layers | embed -> mlp"
    q = weights.quantize(w, axes=axes)
    return {
        "low rank": weights.LowRank(normal(2, 16, 3), normal(2, 3, 8)), "masked": weights.Masked(w, w > 0),
        "sparse": weights.sparse(w, w > 0, axes=axes), "scaled": weights.Scaled(q, weights.ia3(w, axes=axes, inputs=True).scale),
        "rotated": weights.rotated(w, jax.random.key(0), axes=axes), "w8a8": weights.W8A8(q), "w8a8 of one scale": weights.W8A8(q, jnp.ones(2)),
    }  # fmt: skip


def random_keys():
    return {"one": jax.random.key(3), "many": jax.random.split(jax.random.key(4, impl="rbg"), 8), "old": jax.random.PRNGKey(5)}


def odd_shapes():
    return {
        "scalar": jnp.float32(0.1),
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "long": normal(70_001),
        "a": [(jnp.ones(1), {"b": jnp.zeros(2)})],
    }


def low_precision():
    names = ["int4", "uint4", "int2", "int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "bfloat16", "float16"]
    bits = jnp.arange(256, dtype=jnp.uint8)
    special = {"nan": jnp.array([jnp.nan, -jnp.nan, jnp.inf, -0.0, 1e-45]), "bool": bits > 99, "complex": normal(8).astype(jnp.complex64)}
    return {name: jax.lax.bitcast_convert_type(bits.astype(f"uint{w}"), name) for name in names if (w := width(name)) <= 8} | special


def width(name):
    return round(8 * trees.itemsize(jnp.dtype(name)))


STATES = {f.__name__: f for f in (adam, qlora, compressed, random_keys, odd_shapes, low_precision)}


def bits(x):
    """An array's shape, dtype and bytes."""
    kind = str(x.dtype)
    x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return tuple(x.shape), kind, np.asarray(x).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (name, x), y in zip(trees.named_leaves(a), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y), name


@pytest.mark.parametrize("name", STATES)
def test_restore_is_the_identity_to_the_bit(name, tmp_path):
    state, metrics = sharded(STATES[name](), mesh(fsdp=8), "fsdp"), {"loss": jnp.float32(2.5), "mean": Mean(6, 4)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, data={"position": [1, 2]}, meta={"config": {"lr": 0.1}}, metrics=metrics)
        found = checkpoints.restore(target_like(state))
    assert_same(state, found.state)
    assert [x.sharding for x in jax.tree.leaves(found.state)] == [x.sharding for x in jax.tree.leaves(state)]
    assert (found.step, found.data, found.metrics) == (7, {"position": [1, 2]}, {"loss": 2.5, "mean": 1.5})
    assert found.meta["config"] == {"lr": 0.1}
    assert found.meta["versions"] == stored.versions()
    assert found.meta["mesh"] == {"axes": {"fsdp": 8}, "devices": 8, "processes": 1, "platform": "cpu"}


def test_the_mesh_may_change(tmp_path):
    meshes = {"fsdp8": mesh(fsdp=8), "fsdp1": mesh(fsdp=1), "data2fsdp4": mesh(data=2, fsdp=4), "fsdp4": mesh(fsdp=4)}
    state = sharded(adam(), meshes["fsdp8"], "fsdp")
    for at, onto in enumerate(meshes.values()):
        with Checkpoints(tmp_path / str(at)) as checkpoints:
            checkpoints.save(1, state)
            target = sharded(jax.tree.map(jnp.zeros_like, state), onto, "fsdp")
            again = checkpoints.restore(target).state
        assert_same(state, again)
        assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(target), strict=True))
        state = again


def test_params_are_read_without_the_optimizer(tmp_path):
    state = sharded(qlora(), mesh(fsdp=8), "fsdp")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    (tmp_path / "1" / "rest").rename(tmp_path / "elsewhere")  # whoever reads it fails
    assert_same(state.params, restore_params(tmp_path, target_like(state.params)))
    plain = restore_params(tmp_path)
    assert sorted(plain) == ["bias", "up"]
    assert sorted(plain["up"]) == ["a", "b"]
    assert isinstance(plain["bias"], np.ndarray)
    assert dict(trees.named_leaves(plain)).keys() == dict(trees.named_leaves(state.params)).keys()
    assert all(bits(x) == bits(dict(trees.named_leaves(plain))[name]) for name, x in trees.named_leaves(state.params))


def test_params_without_target_keep_low_precision(tmp_path):
    state = {"params": low_precision() | {"empty": jnp.zeros((0, 2))}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    plain = restore_params(tmp_path)
    assert all(bits(x) == bits(plain[name]) for name, x in state["params"].items())


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The next step overwrites the very buffers that are being saved; repeated, because a race does not show every time."""
    onto = mesh(fsdp=8)
    state = sharded({"params": {"w": normal(512, 512), "b": normal(512)}, "step": jnp.int32(0)}, onto, "fsdp")
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0, out_shardings=shardings)
    saved = {}
    with Checkpoints(tmp_path, keep=100) as checkpoints:
        for i in range(20):
            saved[i] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpoints.save(i, state)
            for _ in range(5):
                state = step(state)
        for i, want in saved.items():
            assert_same(want, jax.device_get(checkpoints.restore(state, step=i).state))


KEEP = {
    "newest": (dict(keep=2), [5, 4, 3, 2, 1], [4, 5], None),
    "min": (dict(keep=2, best=("loss", "min")), [3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5], 2),
    "max": (dict(keep=1, best=("loss", "max"), keep_best=2), [3.0, 1.0, 2.0, 4.0, 0.0], [1, 4, 5], 4),
    "of equals the newest": (dict(keep=1, best=("loss", "min")), [1.0, 2.0, 1.0, 2.0, 3.0], [3, 5], 3),
    "nan is never best": (dict(keep=1, best=("loss", "max")), [float("nan"), 1.0, float("inf"), float("nan"), float("nan")], [2, 5], 2),
    "another metric": (dict(keep=2, best=("accuracy", "max")), [1.0, 2.0, 3.0, 4.0, 5.0], [4, 5], None),
    "none": (dict(keep=1, best=("loss", "min"), keep_best=0), [1.0, 2.0, 3.0, 4.0, 5.0], [5], 5),
}


@pytest.mark.parametrize("case", KEEP)
def test_what_is_kept(case, tmp_path):
    options, losses, kept, best = KEEP[case]
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step, loss in enumerate(losses, 1):
            checkpoints.save(step, {"x": jnp.float32(step)}, metrics={"loss": loss})
        assert (checkpoints.all_steps(), checkpoints.best(), checkpoints.latest()) == (kept, best, 5)
        assert [float(checkpoints.restore({"x": jnp.float32(0)}, step=s).state["x"]) for s in kept] == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, kept))


def test_meta_is_read_before_any_model(tmp_path):
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(3, {"x": jnp.ones(2)}, meta={"config": {"width": (1, 2)}})
        assert json.loads((tmp_path / "3" / "record" / "record.json").read_text())["step"] == 3  # synchronous: already there
    code = f"""import sys
from bigflax.checkpoint import Checkpoints
checkpoints = Checkpoints({str(tmp_path)!r})
print(checkpoints.latest(), checkpoints.meta()["config"])
assert "orbax" not in sys.modules and not __import__("jax")._src.xla_bridge.backends_are_initialized()"""
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "3 {'width': [1, 2]}"


def test_closing_ends_the_threads(tmp_path):
    before = set(threading.enumerate())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)})
    checkpoints.close()
    ours = lambda: [t.name for t in set(threading.enumerate()) - before if not t.daemon]
    until = time.monotonic() + 20  # a thread told to end needs a moment, more of them where other tests run beside
    while ours() and time.monotonic() < until:
        time.sleep(0.05)
    assert ours() == []


# -- the checksum ----------------------------------------------------------------------------------------------------

BLOCKS = {
    "vector": ((200_003,), np.float32),
    "rows": ((7, 5, 12), np.float32),
    "two bytes": ((6, 64), ml_dtypes.bfloat16),
    "one byte": ((4, 3, 10), np.int8),
    "eight bytes": ((4, 6), np.complex64),
    "scalar": ((), np.float32),
    "empty": ((0, 3), np.float32),
}


def reference(x):
    """The formula in Python's own integers."""
    size = min(x.dtype.itemsize, 4)
    mix = lambda b: (m := b * MIX % 2**32) ^ (m >> 15)
    return sum(mix(int(b)) * (STEP * i + 1) for i, b in enumerate(np.ascontiguousarray(x).reshape(-1).view(f"u{size}"))) % 2**32


@pytest.mark.parametrize("case", BLOCKS)
def test_checksum_is_the_formula_however_the_array_is_cut(case):
    shape, dtype = BLOCKS[case]
    x = np.random.default_rng(0).normal(0, 30, shape).astype(dtype)
    want = reference(x)
    assert checksum(x) == want
    for axis in range(x.ndim):
        at = x.shape[axis] // 3
        head, tail = np.split(x, [at], axis)
        starts = tuple(at if i == axis else 0 for i in range(x.ndim))
        assert (checksum(head, (0,) * x.ndim, x.shape) + checksum(tail, starts, x.shape)) % 2**32 == want


def test_checksum_sees_every_changed_bit():
    x = np.zeros((3, 5), np.float32)
    for word in range(15):
        for bit in range(32):
            y = x.copy()
            y.view(np.uint32).reshape(-1)[word] ^= np.uint32(1) << np.uint32(bit)
            assert checksum(y) != checksum(x)


# -- mistakes ----------------------------------------------------------------------------------------------------------

GOOD = {"params": {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}, "step": jnp.int32(1)}
UNFIT = {
    "shape": (
        {**GOOD, "params": {"w": jnp.ones((4, 3)), "b": jnp.zeros(2)}},
        r"params/w is float32\[4, 2\] there and float32\[4, 3\] in the target",
    ),
    "dtype": ({**GOOD, "step": jnp.float32(1)}, r"step is int32\[\] there and float32\[\] in the target"),
    "missing": ({**GOOD, "new": jnp.ones(1)}, r"new is absent there"),
    "surplus": ({"params": GOOD["params"]}, r"step is int32\[\] there and absent in the target"),
}
SAVES = {
    "a step again": (5, GOOD, {}, "already holds step 5"),
    "an earlier step": (4, GOOD, {}, "already holds step 5"),
    "a number": (6, {"x": 1.0}, {}, "leaf 'x' of the state is a float"),
    "a string": (6, {"x": "adam"}, {}, "leaf 'x' of the state is a str"),
    "NumPy": (6, {"x": np.ones(2)}, {}, "leaf 'x' of the state is a ndarray"),
    "equal names": (6, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {}, "two leaves of the state are named 'a/b'"),
    "data": (6, GOOD, {"data": {"seen": {1, 2}}}, "data of a checkpoint must be JSON"),
    "meta": (6, GOOD, {"meta": {"dtype": jnp.float32}}, "meta of a checkpoint must be JSON"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(5, GOOD)
    return folder


@pytest.mark.parametrize("case", UNFIT)
def test_a_target_that_does_not_fit(case, saved):
    target, sentence = UNFIT[case]
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=f"checkpoint 5 in .* does not fit: {sentence}"):
        checkpoints.restore(target)


@pytest.mark.parametrize("case", SAVES)
def test_a_save_that_is_refused(case, saved):
    step, state, more, sentence = SAVES[case]
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=sentence):
        checkpoints.save(step, state, **more)
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.all_steps() == [5]
        assert_same(GOOD, checkpoints.restore(GOOD).state)


def test_other_refusals(saved, tmp_path):
    with Checkpoints(tmp_path / "new") as empty:
        assert (empty.all_steps(), empty.latest(), empty.best(), empty.torn()) == ([], None, None, [])
        with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
            empty.restore(GOOD)
    assert not (tmp_path / "new").exists()  # reading creates nothing
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4 in .*; there are \[5\]"):
        restore_params(saved, step=4)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)})
    with pytest.raises(ValueError, match="no leaves under 'params'"):
        restore_params(tmp_path)
