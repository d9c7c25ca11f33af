"""Eight fake CPU devices and one folder of compiled programs for every test; set before JAX starts, because it reads them once."""

import gc
import importlib.metadata
import os
import pathlib
import threading

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of a test's time is LLVM optimizing a program that runs once: without it, compiling takes a third to a half of the time.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # 0.12 knows no other way, and aborts at the name
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # compiles in half of the time
# The rest is compiling what another test, process or run of the tests has compiled before: three quarters of the time of a second run.
# `pytest --cache-clear` empties it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "d" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("NPROC", "16")  # two threads a device: with one, a step with convolutions may wait for ever (main.prepare)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a defect

import pytest

if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):  # later ones do so by themselves
    # JAX makes an MLIR context for each program that it lowers, 4 ms of processor time, and tests lower small ones by the thousand: ten share one.
    import itertools

    from jax._src.interpreters import mlir

    make_context, made, kept = mlir.make_ir_context, itertools.count(), threading.local()

    def shared_context():
        if next(made) % 10 == 0 or not hasattr(kept, "context"):
            kept.context = make_context()
        return kept.context

    mlir.make_ir_context = shared_context

# Tracing makes small objects by the million: a tenth of the time was spent looking for cycles among them.
gc.set_threshold(100_000, 50, 100)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what was imported stays


@pytest.fixture
def one_device(monkeypatch):
    """`main` in this process runs on the first of the eight devices, as a process started with --fake-devices=1 does."""
    import functools

    import jax

    from bigflax import sharding

    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
