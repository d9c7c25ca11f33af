"""Flags and the compilation cache: every name is one that the compiler knows, and what was compiled is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import for_tpu, needs_libtpu

from bigflax import sharding, xla
from bigflax.main import parser, prepare

MESHES = {"dense": {"fsdp": -1}, "moe": {"fsdp": 2, "expert": -1}, "slices": {"slice": 2, "fsdp": -1}}


class Device:
    """As much of a device as a mesh that is only planned with needs."""

    def __init__(self, platform):
        self.platform = platform


def mesh_of(platform, **sizes):
    mesh = sharding.make_mesh(**sizes)
    return jax.sharding.Mesh(np.vectorize(lambda _: Device(platform))(np.arange(mesh.size)).reshape(mesh.devices.shape), mesh.axis_names)


@pytest.mark.parametrize("kind", MESHES)
def test_the_mesh_chooses_the_row(kind, monkeypatch):
    for platform, rows in xla.FLAGS.items():
        want = {flag.name: flag.value for flag in rows[kind]}
        mesh = mesh_of(platform, **MESHES[kind])
        assert xla.options(mesh) == xla.options(mesh, kind) == want
        assert xla.options(mesh, "none") == {}
        for i, name in enumerate(want):  # what the user says stays
            monkeypatch.setenv(("XLA_FLAGS", "LIBTPU_INIT_ARGS")[i % 2], f"--other=1 --{name}=false")
            assert name not in xla.options(mesh) and len(xla.options(mesh)) >= len(want) - 2
    assert xla.options(sharding.make_mesh(**MESHES[kind])) == {}  # a CPU
    assert xla.options(jax.sharding.Mesh([Device("gpu")], "data")) == {}  # nothing to overlap with
    with pytest.raises(ValueError, match="unknown kind of flags 'dence'; there are 'dense'"):
        xla.options(mesh, "dence")


@pytest.mark.parametrize("flag", sorted({flag for rows in xla.FLAGS["gpu"].values() for flag in rows}), ids=lambda flag: flag.name)
def test_the_compiler_knows_the_flags_of_a_gpu(flag):
    """They are options of every XLA that jaxlib brings, the CPU's too; it refuses a name that it does not know."""
    one = jnp.ones(())
    assert jax.jit(lambda x: x + 1, compiler_options={flag.name: flag.value})(one) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={flag.name + "_": flag.value})(one)


TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from bigflax import sharding, xla
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
where = sharding.batch_sharding(sharding.make_mesh(devices=devices))
lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=where))
for flag in {flag for rows in xla.FLAGS["tpu"].values() for flag in rows}:
    lowered.compile(compiler_options={flag.name: flag.value})
try:
    lowered.compile(compiler_options={"xla_tpu_no_such_flag": True})
except jax.errors.JaxRuntimeError as error:
    print("refused", error)
"""


@pytest.mark.slow
@needs_libtpu
def test_the_compiler_knows_the_flags_of_a_tpu():
    assert "No such compile option: 'xla_tpu_no_such_flag'" in for_tpu(TPU)


@pytest.fixture
def folder(tmp_path):
    """A compilation cache of this test alone, in which every program is kept."""
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path / "xla"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled(function, *args):
    told = []
    call = xla.announced(function, told.append)
    assert [float(call(*args)) for _ in range(2)] == [float(function(*args))] * 2
    assert len(told) == 1
    return told[0]


def test_a_miss_then_a_hit(folder):
    x = jnp.arange(64.0)
    make = lambda: jax.jit(lambda x: (jnp.sin(x) @ jnp.cos(x)) ** 2)
    first, second = compiled(make(), x), compiled(make(), x)
    assert (first.cache, second.cache) == ("miss", "hit")
    assert first.seconds > 0 and second.seconds > 0
    again = make()
    again(x)
    assert compiled(again, x).seconds == 0  # compiled before: nothing to tell
    jax.config.update("jax_compilation_cache_dir", None)
    assert compiled(make(), x).cache == "off"


def test_the_cache_is_on_by_default(folder, tmp_path, monkeypatch):
    """In the folder that JAX was told, else in one of the user's own; "" is none. tests/test_main.py reads what a run says of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def prepared(cache, told):
        jax.config.update("jax_compilation_cache_dir", told)
        prepare(parser().parse_args(["train", *([] if cache is None else [f"--cache={cache}"])]))
        return jax.config.jax_compilation_cache_dir

    assert prepared(None, None) == str(tmp_path / "bigflax" / "xla")
    assert prepared(None, "/shared") == "/shared"
    assert prepared("gs://bucket/xla", "/shared") == "gs://bucket/xla"
    assert prepared("", None) is None
