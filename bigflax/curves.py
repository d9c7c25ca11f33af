"""The loss curve of a run, for a file and for the terminal.

Both read the records of a history (`writers.read_jsonl`). Left out on purpose: every other chart; the history is one JSON object a line.
"""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from bigflax.stored import open_path

DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # Unicode braille: the bit of each dot of a 4 x 2 cell


def points(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records that have a finite `key`."""
    found = [(r["step"], r[key]) for r in history if math.isfinite(r.get(key, math.nan))]
    return [s for s, _ in found], [v for _, v in found]


def plot_curves(history: Sequence[Mapping[str, float]], path: str | os.PathLike, *, key: str = "loss", title: str = "") -> None:
    """Writes a PNG of `key` over steps: training as a line, `eval/<key>` as points. Touches no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps, values = points(history, key)
    axes.plot(steps, values, color="#4878a8", linewidth=1.4, label=f"training {key}")
    eval_steps, eval_values = points(history, f"eval/{key}")
    if eval_steps:
        axes.plot(eval_steps, eval_values, "o-", color="#c05a2c", markersize=4, linewidth=0.8, label=f"held-out {key}")
        axes.annotate(f"{eval_values[-1]:.3f}", (eval_steps[-1], eval_values[-1]), xytext=(0, 7), textcoords="offset points", ha="right")
    if not steps and not eval_steps:
        axes.text(0.5, 0.5, f"no finite {key} was recorded", ha="center", transform=axes.transAxes)
    elif values and 0 < min(values) and max(values) > 20 * np.median(values):  # a blow-up must not flatten all the rest
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=key.replace("_", " "), title=title or f"{key.replace('_', ' ').capitalize()} over the run")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if steps or eval_steps:
        axes.legend(frameon=False)
    with open_path(path).open("wb") as file:  # gs:// too
        FigureCanvasAgg(figure).print_png(file)


def terminal_curve(steps: Sequence[float], values: Sequence[float], width: int = 72, height: int = 12) -> str:
    """A curve in braille dots, `width` columns by `height` lines with its axes.

    Highest and lowest value stand at the left, first and last step below. Non-finite values are left out; of several values in one dot
    column the mean is drawn.
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(y):
        return "(no finite values to draw)"
    low, high = float(y.min()), float(y.max())
    labels = [f"{high:.4g}", f"{low:.4g}"]
    margin = max(map(len, labels))
    columns, rows = max(2, width - margin - 2), max(2, height - 2)
    dots = _rasterize(x, y, 2 * columns, 4 * rows)
    codes = (dots.reshape(rows, 4, columns, 2) * DOTS[None, :, None, :]).sum((1, 3))
    left = [labels[0], *[""] * (rows - 2), labels[1]]
    body = [f"{label:>{margin}} ┤" + "".join(chr(0x2800 + c) for c in row) for label, row in zip(left, codes, strict=True)]
    first, last = f"{x.min():g}", f"{x.max():g}"
    scale = " " * (margin + 2) + first + last.rjust(columns - len(first))
    return "\n".join([*(row.rstrip("\u2800") for row in body), " " * (margin + 1) + "└" + "─" * columns, scale])


def _rasterize(x: np.ndarray, y: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """Dots (rows, columns) of a connected line through the mean of each column's values."""
    at = np.round((x - x.min()) / max(float(np.ptp(x)), 1e-12) * (columns - 1)).astype(int)
    filled, which = np.unique(at, return_inverse=True)
    means = np.bincount(which, weights=y) / np.bincount(which)
    curve = np.interp(np.arange(filled[0], filled[-1] + 1), filled, means)
    span = max(float(np.ptp(y)), 1e-12)
    level = np.round((y.max() - curve) / span * (rows - 1)).astype(int)
    dots = np.zeros((rows, columns), int)
    for column, (here, before) in enumerate(zip(level, [level[0], *level[:-1]], strict=True), filled[0]):
        dots[min(here, before) : max(here, before) + 1, column] = 1
    return dots
