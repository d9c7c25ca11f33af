"""Where records go: a writer is anything with `write(step, record)` and `close()`, and `open_writers` gives the usual set.

    console        one line an interval; a progress bar below the lines on a terminal, nothing but the lines elsewhere
    metrics.jsonl  the run's history, one record a line; after a resume it reads as if the run had never stopped
    TensorBoard    event files through tensorboardX, without TensorFlow;  W&B, where it is installed and asked for

A record is a flat dict of floats; keys of evaluation begin with "eval/". Only one process of a run should write (`enabled`).
Left out on purpose: rotating logs, remote dashboards other than W&B, and histograms of weights.
"""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from bigflax.trees import human


class Writer(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def duration(seconds: float) -> str:
    """42.4 -> "42s", 3700 -> "1h01m", 200000 -> "2d07h"; under ten seconds with a digit after the point."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for size, small, mark, below in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= size:
            return f"{whole // size}{mark}{whole % size // small:02d}{below}"
    return f"{whole}s"


FORMATS: dict[str, tuple[str, Callable[[float], str]]] = {  # record key -> its name on the line, its format
    "loss": ("loss", "{:.4f}".format),
    "eval/loss": ("eval loss", "{:.4f}".format),
    "lr": ("lr", "{:.2e}".format),
    "learning_rate": ("lr", "{:.2e}".format),
    "tokens_per_second": ("tokens/s", human),
    "examples_per_second": ("examples/s", human),
    "mfu": ("mfu", "{:.1%}".format),
    "step_time": ("step", lambda s: f"{s * 1e3:.3g}ms" if s < 1 else f"{s:.3g}s"),
    "data_stall": ("stall", "{:.1%}".format),
    "memory": ("mem", lambda b: human(b, "B", 1024)),
    "eta": ("eta", duration),
}
TIMING = ("tokens_per_second", "examples_per_second", "mfu", "step_time", "data_stall", "memory", "eta")  # last on the line, in this order


def line(step: int, values: Mapping[str, float], total_steps: int | None = None) -> str:
    """One record as one line of text: what was learned first, then what it cost."""
    digits = len(str(total_steps or 0))
    head = f"step {step:>{digits}}/{total_steps}" if total_steps else f"step {step}"
    keys = [k for k in values if k not in TIMING] + [k for k in TIMING if k in values]
    shown = ((FORMATS.get(k, (k.replace("eval/", "eval ").replace("_", " "), "{:.4g}".format)), values[k]) for k in keys)
    return "  ".join([head, *(f"{name} {form(value)}" for (name, form), value in shown)])


class Console:
    """One line a record. On a terminal a progress bar stays below the lines; elsewhere (a file, a notebook) there are only the lines."""

    def __init__(self, total_steps: int | None = None, *, step: int = 0, stream: TextIO | None = None):
        self.total_steps, self.stream, self.bar = total_steps, stream or sys.stdout, None
        if self.stream.isatty() and total_steps and os.environ.get("TERM") != "dumb":
            from rich import console, progress

            columns = (
                "[progress.description]{task.description}",
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeRemainingColumn(),
            )
            self.bar = progress.Progress(*columns, console=console.Console(file=self.stream), refresh_per_second=2, transient=True)
            self.task = self.bar.add_task("training", total=total_steps, completed=step)
            self.bar.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.print(line(step, values, self.total_steps))
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def print(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is None:
            print(text, file=self.stream, flush=True)
        else:
            from rich.text import Text  # a str would be read as markup, and "[...]" in a message would vanish

            self.bar.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def read_jsonl(path: str | os.PathLike) -> list[dict[str, float]]:
    """The records of a history file; null reads as nan, a torn last line is left out, a missing file is empty."""
    try:
        with _open(path, "r") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, text in enumerate(lines, 1):
        try:
            records.append({k: math.nan if v is None else v for k, v in json.loads(text).items()})
        except (json.JSONDecodeError, AttributeError):
            if number < len(lines):
                raise ValueError(
                    f"{os.fspath(path)}, line {number}, is not a record of metrics; move the file away to begin a new history"
                ) from None
    return records


def _open(path: str | os.PathLike, mode: str) -> Any:
    if "://" not in os.fspath(path):
        return open(path, mode, encoding="utf-8")
    from etils import epath  # comes with orbax; gs:// needs `pip install "bigflax[gcs]"`

    return epath.Path(path).open(mode)


class Jsonl:
    """Appends records to a file, each written through at once: `{"step": 200, "loss": 2.31, ...}`, a non-finite value as null.

    Opened with the restored `step` it first drops the lines beyond it (0, a new run: all lines), atomically: the file is one clean history.
    An object store cannot append: there the whole history is written each time.
    """

    def __init__(self, path: str | os.PathLike, *, step: int = 0):
        self.path, self.remote = os.fspath(path), "://" in os.fspath(path)
        self.text = "".join(_json_line(r) for r in read_jsonl(path) if step and r.get("step", 0) <= step)
        aside = self.path if self.remote else f"{self.path}.tmp"
        with _open(aside, "w") as file:
            file.write(self.text)
        if not self.remote:
            os.replace(aside, self.path)
        self.file = None if self.remote else open(self.path, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        text = _json_line({"step": step, **values})
        if self.file is not None:
            self.file.write(text)
            self.file.flush()
            return
        self.text += text
        with _open(self.path, "w") as file:
            file.write(self.text)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _json_line(record: Mapping[str, float]) -> str:
    return json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n"


class TensorBoard:
    """Event files in `folder`. TensorBoard itself hides what an earlier life of the run wrote beyond the restored `step`."""

    def __init__(self, folder: str | os.PathLike, *, step: int = 0):
        from tensorboardX import SummaryWriter

        self.events = SummaryWriter(os.fspath(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.events.add_scalar(key, value, step)
        self.events.flush()

    def close(self) -> None:
        self.events.close()


class Wandb:
    """Weights & Biases; the run's name in `folder` lets a resumed run go on in the same chart."""

    def __init__(self, project: str, folder: str | os.PathLike):
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("the recipe asks for W&B, which is not installed: `pip install wandb`, or leave its project empty")
        import wandb

        self.run = wandb.init(
            project=project, dir=os.fspath(folder), id=os.path.basename(os.fspath(folder).rstrip("/")) or None, resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Writers:
    """Several writers as one. With `enabled=False` (every process but the first) all of it does nothing."""

    def __init__(self, *writers: Writer, enabled: bool = True):
        self.writers = writers if enabled else ()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.write(step, values)

    def print(self, text: str) -> None:
        """A line of text for those who watch, not for the record."""
        for writer in self.writers:
            if isinstance(writer, Console):
                writer.print(text)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def open_writers(
    folder: str | os.PathLike,
    *,
    total_steps: int | None = None,
    step: int = 0,
    tensorboard: bool = True,
    wandb: str = "",
    enabled: bool = True,
    stream: TextIO | None = None,
) -> Writers:
    """The usual set for a run in `folder` that stands at `step`: the console, metrics.jsonl, tensorboard/.

    W&B joins them for a project named here, or by WANDB_PROJECT where wandb is installed.
    """
    if not enabled:
        return Writers(enabled=False)
    folder = os.fspath(folder)
    if "://" not in folder:
        os.makedirs(folder, exist_ok=True)
    project = wandb or (os.environ.get("WANDB_PROJECT", "") if importlib.util.find_spec("wandb") else "")
    writers: list[Writer] = [Wandb(project, folder)] if project else []
    writers.append(Jsonl(os.path.join(folder, "metrics.jsonl"), step=step))
    if tensorboard:
        writers.append(TensorBoard(os.path.join(folder, "tensorboard"), step=step))
    return Writers(*writers, Console(total_steps, step=step, stream=stream))
