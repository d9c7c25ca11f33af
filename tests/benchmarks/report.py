"""What the benchmarks share: one plain table, a line about the machine, and the CPU time of a process. They report; tests assert."""

import os
import platform
import resource
import statistics
from collections.abc import Sequence


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints the table: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for first, *rest in cells:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]).rstrip())
    print(machine(), flush=True)


def machine() -> str:
    """Cores and load, without which a time on a shared machine says nothing."""
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"({os.cpu_count()} cores, {platform.machine()}, load {load})"


def spread(values: Sequence[float]) -> str:
    """The median and, of three values or more, the quartiles: "1.21 (1.15 to 1.30)"."""
    middle = statistics.median(values)
    if len(values) < 3:
        return f"{middle:.3g}"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def cpu_seconds() -> float:
    """User and system time of this process so far, over all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
