"""What a run says of itself: a line at its beginning, and at its end the curve, held-out figures beside the yardsticks, a sample; summary.json."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from bigflax import data, trees, yardsticks
from bigflax.curves import plot_curves, points, terminal_curve
from bigflax.stored import open_path
from bigflax.writers import read_jsonl


def summarized(work: str) -> int | None:
    """The step of the last summary, which is the last thing that a run writes; None where there is none."""
    try:
        return json.loads((open_path(work) / "summary.json").read_text())["steps"]
    except (OSError, ValueError, KeyError):
        return None


def describe(run: Any) -> str:
    """One line: the model's size, the mesh, the batch."""
    c, shapes = run.config, run.model.shapes()
    mesh = " x ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items() if size > 1) or "one device"
    if run.kind.tokenized:
        labels = f"{run.fields['num_labels']} classes; " if run.fields.get("num_labels") else ""
        row = f"{c.data.seconds:g} s of sound" if "seconds" in c.data else f"{c.data.length} tokens"
        amount = f"vocabulary {run.tokenizer.vocab_size}; {labels}batch {c.data.batch_size} x {row}"
    else:
        amount = f"{run.fields.get('num_labels')} classes; batch {c.data.batch_size} images of {c.data.size} x {c.data.size}"
    return (
        f"{c.model.name}: {trees.human(trees.count(shapes))} parameters ({trees.human(trees.nbytes(shapes), 'B', 1024)}), "
        f"{amount}; {jax.devices()[0].device_kind}, {mesh}{f'; taught by {c.teacher.source}' if 'teacher' in c else ''}"
    )


def summarize(run: Any, step: int, text: str | None, seconds: float, cost: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """The end of a run: the curve as PNG and in the terminal, held-out figures beside the yardsticks, a sample; all in summary.json, with `cost`."""
    config, history = run.config, read_jsonl(os.path.join(run.work, "metrics.jsonl"))
    plot_curves(history, os.path.join(run.work, "loss.png"))
    say("\n" + terminal_curve(*points(history, "loss")) + "\n")
    final: dict[str, Any] = {}
    for record in history:
        final |= {name: value for name, value in record.items() if name != "step"}
    summary = {"steps": step, "seconds": round(seconds, 1), **{name: final[name] for name in final if name.startswith("eval/")}}
    if run.kind.prose and config.yardsticks:
        summary |= measure_yardsticks(run)
    for name, value in summary.items():
        say(f"{name.replace('eval/', 'held-out ').replace('_', ' '):<28} {value:,.4g}")
    if text is not None:
        say(f"\n{'sample':-^72}\n{text}\n{'':-^72}")
    say(f"\ncheckpoints, metrics and loss.png are in {run.work}")
    (open_path(run.work) / "summary.json").write_text(json.dumps({**summary, **cost, "sample": text}, indent=1))


def measure_yardsticks(run: Any) -> dict[str, float]:
    """What gzip, xz and a counting 3-gram model need for the held-out text, in bits per byte."""
    read = lambda split: "".join(text for records in run.records(split) for text in data.sample_texts(records)).encode()
    held_out = read("validation")
    return {
        "held_out_bytes": len(held_out),
        "gzip_-9_bits_per_byte": yardsticks.gzip_bits_per_byte(held_out),
        "xz_-9_bits_per_byte": yardsticks.xz_bits_per_byte(held_out),
        "3-gram_bits_per_byte": yardsticks.ngram_bits_per_byte(read("train"), held_out),
    }
