"""The curve in the terminal has the promised size, ends and slope; the PNG is one, whatever the history holds."""

import math

import numpy as np
import pytest

from bigflax.curves import DOTS, plot_curves, terminal_curve

STEPS = np.arange(1, 201)
CURVES = {  # values over STEPS
    "falling": 3 + 6 * np.exp(-STEPS / 40),
    "rising": STEPS / 10,
    "flat": np.full(200, 2.0),
    "with gaps": np.where(STEPS % 3 == 0, np.nan, 5 - STEPS / 100),
    "with a blow-up": np.where(STEPS == 150, 1e6, 2.0),
    "one point": np.where(STEPS == 7, 1.5, np.inf),
}


def heights(text):
    """Of each dot column of a curve, the mean height of its dots (0 at the bottom), nan where it is empty."""
    rows = [row.split("┤")[1] for row in text.splitlines() if "┤" in row]
    width = max(map(len, rows))
    cells = np.array([[ord(c) - 0x2800 for c in row.ljust(width, "\u2800")] for row in rows])
    dots = ((cells[:, None, :, None] & DOTS[None, :, None, :]) > 0).reshape(4 * len(rows), 2 * width)
    level = np.arange(dots.shape[0])[::-1, None]
    with np.errstate(invalid="ignore"):
        return (dots * level).sum(0) / dots.sum(0)


@pytest.mark.parametrize("size", [(72, 12), (30, 5), (200, 40)])
@pytest.mark.parametrize("name", CURVES)
def test_terminal_curve_has_its_size_and_labels(name, size):
    values = CURVES[name]
    rows = terminal_curve(STEPS, values, *size).splitlines()
    assert len(rows) == size[1]
    assert max(map(len, rows)) <= size[0]
    finite = values[np.isfinite(values)]
    assert float(rows[0].split("┤")[0]) == pytest.approx(finite.max(), rel=1e-3)
    assert float(rows[-3].split("┤")[0]) == pytest.approx(finite.min(), rel=1e-3)


def test_terminal_curve_follows_the_values():
    falling, rising = heights(terminal_curve(STEPS, CURVES["falling"])), heights(terminal_curve(STEPS, CURVES["rising"]))
    assert np.all(np.diff(falling) <= 0)
    assert falling[0] > 30  # of 39, the mean of the first column's dots
    assert np.all(np.diff(rising) >= 0)
    slope = np.polyfit(np.arange(len(rising)), rising, 1)[0] * len(rising)
    assert slope == pytest.approx(39, rel=0.05)


def test_nothing_to_draw_says_so():
    assert "no finite values" in terminal_curve([1, 2], [math.nan, math.inf])
    assert "no finite values" in terminal_curve([], [])


@pytest.mark.parametrize("name", [*CURVES, "empty"])
def test_png(name, tmp_path):
    values = CURVES.get(name, np.array([]))
    history = [{"step": int(s), "loss": float(v)} for s, v in zip(STEPS, values, strict=False)]
    history += [{"step": 100, "eval/loss": 2.5}] if name != "empty" else []
    plot_curves(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_png_shows_the_data(tmp_path):
    for name in ("falling", "rising"):
        plot_curves([{"step": int(s), "loss": float(v)} for s, v in zip(STEPS, CURVES[name], strict=True)], tmp_path / f"{name}.png")
    assert (tmp_path / "falling.png").read_bytes() != (tmp_path / "rising.png").read_bytes()
