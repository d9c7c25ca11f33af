"""Eight fake CPU devices for every test; set before JAX starts, because it reads them once."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of a test's time is LLVM optimizing a program that runs once: without it, compiling takes a third to a half of the time.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("NPROC", "16")  # two threads a device: with one, a step with convolutions may wait for ever (main.prepare)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a defect

import pytest


@pytest.fixture
def cache(tmp_path_factory):
    """A folder of compiled programs that tests and the processes they start share, so that each program is compiled once."""
    import jax

    before = jax.config.jax_compilation_cache_dir
    yield tmp_path_factory.getbasetemp().parent / "bigflax-xla"
    jax.config.update("jax_compilation_cache_dir", before)  # `bigflax train` sets it


@pytest.fixture
def one_device(monkeypatch):
    """`main` in this process runs on the first of the eight devices, as a process started with --fake-devices=1 does."""
    import functools

    import jax

    from bigflax import sharding

    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
