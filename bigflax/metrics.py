"""What a step says about itself: means that know their counts, and the rates of an interval.

A metric is a scalar or a `Mean(total, count)`. Means add, so micro-batches, hosts and evaluation batches are weighed by what they count
(tokens, examples), not equally. An interval of training becomes one flat record, `{"loss": 2.31, "tokens_per_second": 21400.0, ...}`,
which writers.py writes down.

MFU = model FLOPs a second / peak FLOP/s of all devices (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): recomputation does not count.
`data_stall` is the share of wall time in which the step waited for its batch.
Left out on purpose: a registry of metrics and running averages. A metric is what the loss returns; smoothing belongs to who looks.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean in the making: `total / count`. Both are scalars (or equal shapes, under vmap and scan)."""

    total: Any
    count: Any

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array | None = None) -> "Mean":
        """The mean of `values` weighed by `weights` (a mask will do; None counts every value once).

        A value of weight 0 does not enter at all, be it infinite. Sums are float32: in bfloat16 a sum over 4k terms loses its digits.
        """
        values = jnp.asarray(values).astype(jnp.float32)
        if weights is None:
            return cls(values.sum(), jnp.asarray(values.size, jnp.float32))
        weights = jnp.broadcast_to(jnp.asarray(weights).astype(jnp.float32), values.shape)
        return cls(jnp.sum(jnp.where(weights == 0, 0, values) * weights), jnp.sum(weights))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Any:
        """total / count; nan where nothing was counted, without a warning and without a nan in the gradient."""
        xp = jnp if isinstance(self.total, jax.Array) or isinstance(self.count, jax.Array) else np
        empty = self.count == 0
        return xp.where(empty, xp.nan, self.total / xp.where(empty, 1, self.count))


Metrics = Mapping[str, Any]


def combine(metrics: Iterable[Metrics]) -> dict[str, Mean]:
    """The Means of several steps as one, on the host and in float64; a scalar counts once a step.

    A key that only some steps have is the mean over those. Of a generator of steps one runs ahead, no more: the device is never idle,
    and batches do not pile up in its memory.
    """
    out: dict[str, Mean] = {}
    before: Metrics = {}
    for one in itertools.chain(metrics, [{}]):
        for key, value in jax.device_get(dict(before)).items():
            mean = value if isinstance(value, Mean) else Mean(value, 1)
            mean = Mean(float(mean.total), float(mean.count))
            out[key] = out[key] + mean if key in out else mean
        before = one
    return out


def as_floats(metrics: Metrics) -> dict[str, float]:
    """Python floats of scalars and Means; all values leave the device together."""
    return {key: float(v.value if isinstance(v, Mean) else v) for key, v in jax.device_get(dict(metrics)).items()}


def memory_bytes(devices: Sequence[Any] | None = None) -> int:
    """Bytes in use on the fullest of these devices (default: this process's); where they do not tell (CPU), this process's resident set."""
    told = [d.memory_stats() or {} for d in (jax.local_devices() if devices is None else devices)]
    used = [stats["bytes_in_use"] for stats in told if "bytes_in_use" in stats]
    if used:
        return max(used)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on the BSDs
        return peak if sys.platform == "darwin" else peak * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meter:
    """Turns the clock of an interval into rates.

    `flops_per_step` and `tokens_per_step` are those of the global batch, `peak_flops` of all devices together, `total_steps` the end of
    the run. What is not given is not reported.
    """

    tokens_per_step: float | None = None
    flops_per_step: float | None = None
    peak_flops: float | None = None
    total_steps: int | None = None

    def record(
        self, steps: int, seconds: float, stall: float = 0.0, *, step: int | None = None, tokens: float | None = None
    ) -> dict[str, float]:
        """The rates of `steps` steps that took `seconds`, of which `stall` were spent waiting for data.

        `tokens` counted in the interval go before `tokens_per_step`; `step`, the number of the last one, gives the time left.
        """
        seconds = max(seconds, 1e-9)
        out = {"step_time": seconds / max(steps, 1)}
        if tokens is None and self.tokens_per_step is not None:
            tokens = self.tokens_per_step * steps
        if tokens is not None:
            out["tokens_per_second"] = tokens / seconds
        if self.flops_per_step and self.peak_flops:
            out["mfu"] = self.flops_per_step * steps / seconds / self.peak_flops
        out["data_stall"] = min(1.0, stall / seconds)
        out["memory"] = float(memory_bytes())
        if self.total_steps is not None and step is not None:
            out["eta"] = max(0, self.total_steps - step) * out["step_time"]
        return out
