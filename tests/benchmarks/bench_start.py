"""Start-up: `import bigflax`, and from `bigflax train` to its first logged step, cold and warm.

    python tests/benchmarks/bench_start.py [--turns 5]

Cold has an empty compilation cache and an empty work folder (the tokenizer is trained too); warm has the cache only; resumed has both, and a
checkpoint to continue from. The recipe is the default one, quickstart, logging each step; the time ends when metrics.jsonl holds that step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from report import spread, table

IMPORTS = {
    "import bigflax": "import bigflax",
    "its train_step, with JAX": "from bigflax import train_step",
    "import jax, for comparison": "import jax",
    "its command line (bigflax.main)": "import bigflax.main",
}


def import_time(statement: str) -> tuple[float, float]:
    """Seconds and CPU seconds for the statement in a fresh interpreter, without those that the interpreter itself takes."""
    clock = "time.perf_counter(), time.process_time()"
    code = f"import time; a, b = {clock}; {statement}; c, d = {clock}; print(c - a, d - b)"
    wall, cpu = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return float(wall), float(cpu)


def start(work: Path, cache: Path, until: Callable[[Path], bool]) -> float:
    """Seconds from the start of `bigflax train` until `until(work)`; then the process is killed."""
    options = ["--config.fit.log_every=1", "--config.fit.save_every=1", "--config.yardsticks=false"]
    command = [sys.executable, "-m", "bigflax.main", "train", f"--config.work={work}", f"--cache={cache}", *options]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        while not until(work):
            if child.poll() is not None:
                raise RuntimeError(
                    f"bigflax train has ended with code {child.returncode}: {child.stderr.read()[-500:] if child.stderr else ''}"
                )
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        child.kill()
    return seconds


def logged(work: Path) -> int:
    file = work / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saved(work: Path) -> bool:
    return (work / "checkpoints" / "1").exists()


def starts(folder: Path) -> dict[str, float]:
    cold = start(folder / "a", folder / "cache", logged)
    warm = start(folder / "b", folder / "cache", logged)
    start(folder / "b", folder / "cache", saved)
    before = logged(folder / "b")
    resumed = start(folder / "b", folder / "cache", lambda work: logged(work) > before)
    return {"cold": cold, "warm": warm, "resumed": resumed}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=5, help="of the imports; `train` starts in three ways, once each")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPORTS}
    for _ in range(args.turns):
        for name, statement in IMPORTS.items():
            times[name].append(import_time(statement))
    table("Imports", ("", "seconds", "CPU seconds"), [(name, *map(spread, zip(*pairs, strict=True))) for name, pairs in times.items()])
    with tempfile.TemporaryDirectory() as folder:
        found = starts(Path(folder))
    table("`bigflax train` to its first step", ("", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in found.items()])


if __name__ == "__main__":
    main()
