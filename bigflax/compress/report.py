"""What each step of a chain cost and gained: one row a step, measured beside the model that the chain began with.

    loss, accuracy ...   of what is held out, as the run's own evaluation has them
    kl                   of the outputs' distributions from those of the model at the start, the mean over what is real, in nats
    disk, memory         bytes of the weights as they are stored, and as arrays
    numbers              how many there are, codes and scales alike
    flops                of a forward pass of one batch (flops.py)
    ms, speed            the median time of a forward pass of one batch, and how many times faster than at the start, measured in turns with it
    error                for each matrix and layer that changed, |w' - w| / |w|
    chosen               for each matrix the format or rank that it got out of a budget for all (budget.py); None is dense

Left out on purpose: energy, and times on machines other than the one that measures.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import trees
from bigflax.flops import count_flops
from bigflax.losses import IGNORE
from bigflax.weights import dense, named_weights, shape

Forward = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one step; sizes in bytes, times in milliseconds."""

    step: str
    metrics: Mapping[str, float]
    kl: float | None = None
    disk: int | None = None
    memory: int
    numbers: int
    flops: int
    ms: float
    speed: float = 1.0
    error: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    chosen: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> "Row":
        return cls(**said)


def measure(
    step: str, forward: Forward, params: Any, batch: Any, *, metrics: Mapping[str, float], start: tuple[Forward, Any] | None = None,
    kl: float | None = None, disk: int | None = None, turns: int = 15,
) -> Row:  # fmt: skip
    """The row of these weights; `start` is what the chain began with, `forward(params, batch)` what is timed and counted."""
    times = in_turns([*([] if start is None else [start]), (forward, params)], batch, turns)
    return Row(
        step=step, metrics=dict(metrics), kl=kl, disk=disk, memory=trees.nbytes(params), numbers=trees.count(params),
        flops=count_flops(forward, params, batch), ms=1e3 * float(np.median(times[-1])), speed=float(np.median(times[0] / times[-1])),
        error={} if start is None else weight_errors(start[1], params),
    )  # fmt: skip


def in_turns(models: Sequence[tuple[Forward, Any]], batch: Any, turns: int) -> np.ndarray:
    """Seconds of each forward pass [models, turns], one model after the other and over again."""
    calls = [(jax.jit(forward), params) for forward, params in models]
    seconds = np.zeros((len(calls), turns + 1))
    for turn in range(turns + 1):  # the first compiles
        for i, (call, params) in enumerate(calls):
            began = time.perf_counter()
            jax.block_until_ready(call(params, batch))
            seconds[i, turn] = time.perf_counter() - began
    return seconds[:, 1:]


def weight_errors(before: Any, now: Any) -> dict[str, list[float]]:
    """|w' - w| / |w| of each weight that is not as it was, for each layer of a stack; weights of another shape are others and left out."""
    old, found = dict(named_weights(before)), {}
    for name, w in named_weights(now):
        if name not in old or w is old[name] or shape(w) != shape(old[name]):
            continue
        was, made = np.asarray(dense(old[name]), np.float32), np.asarray(dense(w), np.float32)
        rows = (lambda a: a.reshape(len(a), -1)) if name.startswith("blocks") or "/blocks" in name else (lambda a: a.reshape(1, -1))
        off = np.linalg.norm(rows(made - was), axis=1) / np.maximum(np.linalg.norm(rows(was), axis=1), 1e-20)
        if off.any():
            found[name] = [float(x) for x in off]
    return found


def divergence(outputs: Forward, before: Forward, now_params: Any, before_params: Any, batches: Iterable[Any]) -> float:
    """The mean over what is real of sum_v p(v) log (p(v) / q(v)), p of the model before and q of the one now, both functions from params and a batch to
    logits [.., V]; positions that have a label count, or all."""

    @jax.jit
    def one(now_params, before_params, batch):
        p = jax.nn.log_softmax(before(before_params, batch).astype(jnp.float32))
        q = jax.nn.log_softmax(outputs(now_params, batch).astype(jnp.float32))
        each = jnp.sum(jnp.exp(p) * (p - q), -1)
        labels = batch.get("labels")
        real = jnp.ones(each.shape) if labels is None or labels.shape != each.shape else labels != IGNORE
        return jnp.sum(each * real), jnp.sum(real)

    sums = [one(now_params, before_params, batch) for batch in batches]
    return float(sum(total for total, _ in sums) / max(sum(count for _, count in sums), 1))


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of a chain, the start first; `metric` is the one that it is judged by, the larger the better or, with "min", the smaller."""

    rows: tuple[Row, ...]
    metric: str
    mode: str = "min"

    def loss(self, row: Row) -> float:
        """How much worse than the start, as a share of the start: 0.01 is one percent."""
        first, now = self.rows[0].metrics[self.metric], row.metrics[self.metric]
        return ((now - first) if self.mode == "min" else (first - now)) / max(abs(first), 1e-20)

    def table(self) -> str:
        """For reading."""
        first = self.rows[0]
        size = lambda n: "-" if n is None else trees.human(n, "B", 1024)
        head = ("step", self.metric, "worse by", "KL", "on disk", "in memory", "numbers", "FLOPs", "ms", "speed")
        body = [
            (
                row.step, f"{row.metrics[self.metric]:.4f}", "" if row is first else f"{self.loss(row):.2%}", "" if row.kl is None else f"{row.kl:.4f}",
                size(row.disk), size(row.memory), trees.human(row.numbers), trees.human(row.flops), f"{row.ms:.1f}", f"{row.speed:.2f}",
            )
            for row in self.rows
        ]  # fmt: skip
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            for line in [head, *body]
        ]
        return "\n".join(line.rstrip() for line in lines)

    def write(self, folder: str) -> None:
        """report.json, report.txt, and two pictures: quality.png, error.png."""
        os.makedirs(folder, exist_ok=True)
        said = {"metric": self.metric, "mode": self.mode, "rows": [dataclasses.asdict(row) for row in self.rows]}
        for name, text in {"report.json": json.dumps(said, indent=1), "report.txt": self.table() + "\n"}.items():
            with open(os.path.join(folder, name), "w") as file:
                file.write(text)
        self.quality_picture(os.path.join(folder, "quality.png"))
        self.error_picture(os.path.join(folder, "error.png"))

    @classmethod
    def read(cls, folder: str) -> "Report":
        """The inverse of `write`."""
        with open(os.path.join(folder, "report.json")) as file:
            said = json.load(file)
        return cls(tuple(map(Row.read, said["rows"])), said["metric"], said["mode"])

    def quality_picture(self, path: str) -> None:
        """Quality against bytes, a point a step."""
        axes, canvas = _figure()
        sizes = [(row.disk or row.memory) / 2**20 for row in self.rows]
        values = [row.metrics[self.metric] for row in self.rows]
        axes.plot(sizes, values, "o-", color="#4878a8", linewidth=0.8)
        for size, value, row in zip(sizes, values, self.rows, strict=True):
            axes.annotate(row.step, (size, value), xytext=(4, 5), textcoords="offset points", fontsize=8)
        axes.set(xlabel="MiB of weights", ylabel=self.metric.replace("_", " "), xscale="log", title="Quality against size")
        with open(path, "wb") as file:
            canvas.print_png(file)

    def error_picture(self, path: str) -> None:
        """The error of the last step's weights, a line a matrix over the layers."""
        axes, canvas = _figure()
        for name, errors in self.rows[-1].error.items():
            axes.plot(range(len(errors)), errors, "o-", markersize=3, linewidth=0.8, label=name)
        if self.rows[-1].error:
            axes.legend(fontsize=6, frameon=False, ncols=2)
        axes.set(xlabel="layer", ylabel="|w' - w| / |w|", title=f"Error of the weights, {self.rows[-1].step}")
        with open(path, "wb") as file:
            canvas.print_png(file)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes, FigureCanvasAgg(figure)
