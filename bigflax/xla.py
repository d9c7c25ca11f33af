"""XLA: the flags a step is compiled with, in one table with the reason of each, and what its compilation cost.

The flags go with the one program that they are for, as options of its compilation, not into XLA_FLAGS: so they hold for a TPU that is only
planned for, change no other program, are part of the cache's key, and one that a later compiler has dropped is a Python error that names
it, where an unknown name in XLA_FLAGS or LIBTPU_INIT_ARGS aborts the process. What a user set there stays as it is.

Source of what a flag does: https://openxla.org/xla/flags_guidance and /gpu_optimization_levels. Left out on purpose: what is the default of
the compiler already (the latency-hiding scheduler and asynchronous all-gathers on TPU), and thresholds that want tuning for one model
on one machine (combine thresholds, scoped vmem): set those in the environment. So are the flags that pipeline collectives on GPU, which
jaxlib 0.10 and 0.12 take in two forms (openxla/xla#45836).
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bigflax import trees


class Flag(NamedTuple):
    name: str
    value: bool | int | str
    reason: str


# -- flags -----------------------------------------------------------------------------------------------------------------

GPU = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler", True, "collectives start early and end late, and products run in between; off by default"
    ),
    Flag("xla_gpu_enable_while_loop_double_buffering", True, "two layers an iteration: overlap beyond the loop's barrier, fewer copies"),
)
ALL_TO_ALL = Flag("xla_tpu_enable_async_all_to_all", True, "tokens travel to their experts while others are multiplied; off by default")
SLICES = (
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt", True, "sums of gradients over the data-centre network overlap with the backward pass"
    ),
    Flag("xla_tpu_data_parallel_opt_different_sized_ops", True, "the same for stacked layers whose gradients differ in size"),
)
FLAGS: dict[str, dict[str, tuple[Flag, ...]]] = {  # platform -> kind of work -> flags
    "tpu": {"dense": (), "moe": (ALL_TO_ALL,), "slices": (*SLICES, ALL_TO_ALL)},
    "gpu": {"dense": GPU, "moe": GPU, "slices": GPU},
}  # a CPU has none


def kind_of(mesh: Mesh) -> str:
    """The kind of work that a mesh is laid out for."""
    size = lambda axis: mesh.shape.get(axis, 1)
    return "slices" if size("slice") > 1 else "moe" if size("expert") > 1 else "dense"


def options(mesh: Mesh, kind: str = "auto") -> dict[str, bool | int | str]:
    """The compiler options of a step on this mesh; none on one device, and none that the environment says. "none": none at all."""
    kinds = ("auto", "none", *FLAGS["tpu"])
    if kind not in kinds:
        raise ValueError(f"unknown kind of flags {kind!r}; {trees.did_you_mean(kind, kinds, 'there are')}")
    if kind == "none" or mesh.size == 1:
        return {}
    platform = mesh.devices.flat[0].platform
    flags = FLAGS.get("gpu" if platform in ("cuda", "rocm") else platform, {}).get(kind_of(mesh) if kind == "auto" else kind, ())
    said = {text.split("=")[0] for key in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") for text in os.environ.get(key, "").split()}
    return {flag.name: flag.value for flag in flags if f"--{flag.name}" not in said}


# -- compilation -----------------------------------------------------------------------------------------------------------


class Compiled:
    """What was compiled: `seconds` until the last program was ready, `requests` of the persistent cache and its `hits`."""

    def __init__(self) -> None:
        self.seconds, self.requests, self.hits = 0.0, 0, 0

    @property
    def cache(self) -> str:
        """What the cache did: "hit", "miss", or "off"."""
        used = jax.config.jax_compilation_cache_dir and self.requests  # pyright: ignore[reportAttributeAccessIssue]
        return "off" if not used else "hit" if self.hits == self.requests else "miss"


@contextlib.contextmanager
def compiling() -> Iterator[Compiled]:
    """While it is open, listens to what JAX compiles."""
    found, began = Compiled(), time.perf_counter()

    def count(event: str, **_: Any) -> None:
        found.requests += event == "/jax/compilation_cache/compile_requests_use_cache"
        found.hits += event == "/jax/compilation_cache/cache_hits"

    def ready(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.seconds = time.perf_counter() - began

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(ready)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(count)
        jax.monitoring.unregister_event_duration_listener(ready)


def announced(step: Callable[..., Any], done: Callable[[Compiled], None]) -> Callable[..., Any]:
    """The same function; `done` gets to know what its first call, which compiles it, has compiled."""
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            return step(*args)
        with compiling() as compiled:
            result = step(*args)
        done(compiled)
        return result

    return call
