"""What a step says about itself: means that know their counts, and the rates of an interval.

A metric is a scalar or `Sums`: arrays that add with those of other rows, and a `value` made of them in the end. So micro-batches, hosts and
evaluation batches are weighed by what they count (tokens, examples), not equally, and what is no mean of rows comes out as over all of them:

    Mean           total / count
    F1             2 hit / (said + true) of classes, or of spans, by their counts; van Rijsbergen 1979
    Matthews       the correlation of predicted and true classes, by the same counts; Gorodkin 2004, equation 8
    Correlation    Pearson's, of two numbers a row, by their sums and squares

An interval of training becomes one flat record, `{"loss": 2.31, "tokens_per_second": 21400.0, ...}`, which writers.py writes down.

MFU = model FLOPs a second / peak FLOP/s of all devices (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): recomputation does not count.
`data_stall` is the share of wall time in which the step waited for its batch.
Left out on purpose: a registry of metrics and running averages. A metric is what the loss returns; smoothing belongs to who looks. And what needs
all rows at once: ranks (Spearman, areas under curves) and scores of corpora of text.
"""

import abc
import dataclasses
import functools
import itertools
import operator
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax.losses import IGNORE
from bigflax.sharding import constrain


class Sums(abc.ABC):
    """A metric in the making: a registered dataclass whose arrays are sums over rows, so that two add leaf by leaf, and whose `value` is a scalar.

    A loss may return any among its metrics; the loss itself is a Mean. A class of your own needs no more than its fields and a `value` that
    computes on the host as on the device (`_floats`).
    """

    def __add__(self, other: Any) -> Any:
        return jax.tree.map(operator.add, self, other)

    @property
    @abc.abstractmethod
    def value(self) -> Any:
        """The scalar that the sums make."""


def _floats(*sums: Any) -> tuple[Any, ...]:
    """NumPy or jax.numpy, whichever the arrays are of, and the arrays: in float64 on the host, float32 on the device, where counts may be integers
    whose squares are too large for one."""
    xp = jnp if any(isinstance(x, jax.Array) for x in sums) else np
    return xp, *(xp.asarray(x, float) for x in sums)


def _ratio(xp: Any, over: Any, under: Any, empty: float = np.nan) -> Any:
    """over / under; `empty` where under is 0, without a warning and without a nan in the gradient."""
    return xp.where(under == 0, empty, over / xp.where(under == 0, 1, under))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean(Sums):
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

    @property
    def value(self) -> Any:
        """total / count; nan where nothing was counted, without a warning and without a nan in the gradient."""
        xp = jnp if isinstance(self.total, jax.Array) or isinstance(self.count, jax.Array) else np
        return _ratio(xp, self.total, self.count)


@dataclasses.dataclass(frozen=True)
class Counts(Sums):
    """How often each of C classes was predicted and right, predicted (`said`), and there (`true`): [C] each, or scalars for a class alone.

    Of what is no single class a row (several labels, spans of text) count them yourself: `F1((said & true).sum(0), said.sum(0), true.sum(0))`.
    """

    hit: Any
    said: Any
    true: Any

    @classmethod
    def of(cls, predicted: jax.Array, labels: jax.Array, classes: int, mask: jax.Array | None = None, **options: Any) -> Any:
        """Of class numbers of any equal shapes. Label -100 does not count, nor does what `mask` calls False; predictions beyond the classes are wrong."""
        real = (labels != IGNORE) if mask is None else (labels != IGNORE) & (mask != 0)
        rows = lambda which, real: (which[..., None] == jnp.arange(classes)) & real[..., None]
        # whole on every host, which reads it
        counted = lambda which, real: constrain(jnp.sum(rows(which, real).reshape(-1, classes), 0), None)
        return cls(counted(labels, real & (predicted == labels)), counted(predicted, real), counted(labels, real), **options)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hit", "said", "true"], meta_fields=["average"])
@dataclasses.dataclass(frozen=True)
class F1(Counts):
    """2 hit / (said + true), the harmonic mean of precision and recall: "macro" of each class, averaged over those that were said or true;
    "micro" of all classes' counts together, which is the accuracy where each row has one class. nan where there is none."""

    average: str = "macro"

    def __post_init__(self):
        if self.average not in ("macro", "micro"):
            raise ValueError(f"F1 has no average {self.average!r}; there are 'macro' and 'micro'")

    @property
    def value(self) -> Any:
        xp, hit, said, true = _floats(self.hit, self.said, self.true)
        if self.average == "micro":
            return _ratio(xp, 2 * hit.sum(), (said + true).sum())
        return _ratio(xp, _ratio(xp, 2 * hit, said + true, 0.0).sum(), (said + true > 0).sum())


def split_loss(result: Any) -> tuple[Mean, dict[str, Any], dict[str, jax.Array]]:
    """`loss`, `(loss, metrics)` or `(loss, metrics, updates)` as the last of these, each scalar of the first two made a Mean of count 1."""
    loss, metrics, updates = (*result, {})[:3] if isinstance(result, tuple) else (result, {}, {})
    mean: Any = lambda x: x if isinstance(x, Sums) else Mean(jnp.asarray(x), jnp.ones((), jnp.int32))
    return mean(loss), {name: mean(value) for name, value in metrics.items()}, updates


def span_f1(said_BT: jax.Array, true_BT: jax.Array, classes: Sequence[str]) -> F1:
    """F1 of the spans that classes "B-name", "I-name" and "O" mark in rows: a hit has the same bounds and name. Label -100 is passed over.

    A span begins at a B, and at an I that does not follow its own name, as conlleval counts (Tjong Kim Sang and De Meulder 2003, cs/0306050).
    """
    O, I = 0, 2
    mark_C = jnp.array([*("OBI".index(name[0]) for name in classes), O])  # the last class is that of nothing
    names = sorted({name[2:] for name in classes})
    name_C = jnp.array([*(names.index(name[2:]) for name in classes), -1])
    order_BT = jnp.argsort(true_BT == IGNORE, axis=1, stable=True)  # words first, one beside the other
    at_T = jnp.arange(true_BT.shape[1])

    def spans(tags_BT):
        tags_BT = jnp.take_along_axis(jnp.where(true_BT == IGNORE, len(classes), tags_BT), order_BT, axis=1)
        mark_BT, name_BT = (jnp.sum(jnp.where(tags_BT[..., None] == jnp.arange(len(classes) + 1), x_C, 0), -1) for x_C in (mark_C, name_C))
        before = lambda x_BT, first: jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)), constant_values=first)
        goes_on_BT = (mark_BT == I) & (before(mark_BT, O) != O) & (before(name_BT, -1) == name_BT)
        # the first place from here that goes not on
        stops_BT = jax.lax.cummin(jnp.where(goes_on_BT, len(at_T), at_T), axis=1, reverse=True)
        ends_BT = jnp.pad(stops_BT[:, 1:], ((0, 0), (0, 1)), constant_values=len(at_T))
        return (mark_BT != O) & ~goes_on_BT, ends_BT, name_BT

    (begins, ends, name), (true_begins, true_ends, true_name) = spans(said_BT), spans(true_BT)
    hit_BT = begins & true_begins & (ends == true_ends) & (name == true_name)
    return F1(*(jnp.sum(x, dtype=jnp.float32) for x in (hit_BT, begins, true_begins)), average="micro")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matthews(Counts):
    """(n right - sum_c said_c true_c) / sqrt((n^2 - sum_c said_c^2) (n^2 - sum_c true_c^2)), from -1 to 1; 0 where all rows are of one class or
    said to be, nan where there are none."""

    @property
    def value(self) -> Any:
        xp, hit, said, true = _floats(self.hit, self.said, self.true)
        n = true.sum()
        share = lambda counts: _ratio(xp, counts, n)  # of one: squares of counts leave float32's digits
        spread = lambda p: xp.maximum(1 - (p**2).sum(), 0)
        said, true = share(said), share(true)
        return _ratio(xp, share(hit).sum() - (said * true).sum(), xp.sqrt(spread(said) * spread(true)), 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Correlation(Sums):
    """Pearson's correlation of x and y by six sums. nan where one of them does not vary."""

    count: Any
    x: Any
    y: Any
    xx: Any
    yy: Any
    xy: Any

    @classmethod
    def of(cls, x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> "Correlation":
        """Of numbers of any equal shapes, those that `mask` calls False left out. A batch's sums are float32: numbers whose mean is m times their
        deviation lose m^2 2^-24 of them, so subtract a constant from what is far from zero."""
        real = jnp.ones(x.shape, bool) if mask is None else mask != 0
        x, y = (jnp.where(real, v.astype(jnp.float32), 0) for v in (x, y))
        return cls(jnp.sum(real), *(jnp.sum(v) for v in (x, y, x * x, y * y, x * y)))

    @property
    def value(self) -> Any:
        xp, n, x, y, xx, yy, xy = _floats(self.count, self.x, self.y, self.xx, self.yy, self.xy)
        spread = lambda v, vv: xp.maximum(n * vv - v * v, 0)
        return _ratio(xp, n * xy - x * y, xp.sqrt(spread(x, xx) * spread(y, yy)))


Metrics = Mapping[str, Any]


def combine(metrics: Iterable[Metrics]) -> dict[str, Any]:
    """The Sums of several steps as one, on the host and in float64; a scalar counts once a step, as a Mean.

    A key that only some steps have is made of those. Of a generator of steps one runs ahead, no more: the device is never idle,
    and batches do not pile up in its memory.
    """
    out: dict[str, Any] = {}
    before: Metrics = {}
    for one in itertools.chain(metrics, [{}]):
        for key, value in jax.device_get(dict(before)).items():
            sums = value if isinstance(value, Sums) else Mean(value, 1)
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64)[()], sums)
            out[key] = out[key] + sums if key in out else sums
        before = one
    return out


def non_empty(metrics: Metrics) -> dict[str, Any]:
    """Those of combined metrics for which something was counted: of texts without labels there is no accuracy."""
    return {key: v for key, v in metrics.items() if not isinstance(v, Sums) or any(np.any(x) for x in jax.tree.leaves(v))}


def as_floats(metrics: Metrics) -> dict[str, float]:
    """Python floats of scalars and Sums; all values leave the device together."""
    return {key: float(v.value if isinstance(v, Sums) else v) for key, v in jax.device_get(dict(metrics)).items()}


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

    `flops_per_step` are those of the global batch, `peak_flops` of all devices together, `total_steps` the end of the run; `counts` says what the loss is a
    mean over. What is not given is not reported.
    """

    counts: str = "tokens"
    flops_per_step: float | None = None
    peak_flops: float | None = None
    total_steps: int | None = None

    def record(
        self, steps: int, seconds: float, stall: float = 0.0, *, step: int | None = None, counted: float | None = None
    ) -> dict[str, float]:
        """The rates of `steps` steps that took `seconds`, of which `stall` were spent waiting for data.

        `counted` are the tokens or examples of all of them; `step`, the number of the last one, gives the time left.
        """
        seconds = max(seconds, 1e-9)
        out = {"step_time": seconds / max(steps, 1)}
        if counted is not None:
            out[f"{self.counts}_per_second"] = counted / seconds
        if self.flops_per_step and self.peak_flops:
            out["mfu"] = self.flops_per_step * steps / seconds / self.peak_flops
        out["data_stall"] = min(1.0, stall / seconds)
        out["memory"] = float(memory_bytes())
        if self.total_steps is not None and step is not None:
            out["eta"] = max(0, self.total_steps - step) * out["step_time"]
        return out
