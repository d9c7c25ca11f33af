"""What to try: layouts, remat policies and micro-batches of one step on one topology, ranked by the estimate.

All meshes over the axes that the model can use are tried, each with all policies and numbers of micro-batches. What the estimate says does not
fit comes last; of the others the shortest step comes first, at equal times the one that needs less memory.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from bigflax.planner.report import GIB, Plan

POLICIES = ("none", "minimal", "full")
MICRO_BATCHES = (1, 2, 4, 8)
TENSOR = 16  # beyond it every product is a sliver


@dataclasses.dataclass(frozen=True)
class Choice:
    """One thing to try, and its Plan: estimated, or compiled where the best few were."""

    mesh: Mapping[str, int]
    remat: str
    accumulate: int
    plan: Plan

    def flags(self) -> str:
        """The command line's."""
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]
        return " ".join([*mesh, f"--config.model.remat={self.remat}", f"--config.step.accumulate={self.accumulate}"])


def meshes(devices: int, slices: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Every way to lay that many devices over these axes, `slice` apart; `data` is always said, for its default takes the rest."""
    for sizes in _products(devices // slices, len(axes)):
        mesh = dict(zip(axes, sizes, strict=True))
        if mesh.get("tensor", 1) <= TENSOR:
            kept = {axis: size for axis, size in mesh.items() if size > 1 or axis == "data"}
            yield {**({"slice": slices} if slices > 1 else {}), **kept}


def _products(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    if factors == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in _products(number // first, factors - 1))


def ranked(choices: Iterable[Choice]) -> list[Choice]:
    return sorted(choices, key=lambda c: (not c.plan.fits, c.plan.total if not c.plan.fits else c.plan.step_seconds, c.plan.total))


def tried(
    estimate: Callable[[Mapping[str, int], str, int], Plan], devices: int, slices: int, axes: Sequence[str], batch: int
) -> list[Choice]:
    """All choices that can be, ranked: `estimate(mesh, remat, accumulate)` raises ValueError for one that cannot."""
    found = []
    for mesh in meshes(devices, slices, axes):
        rows = batch // math.prod(size for axis, size in mesh.items() if axis in ("slice", "data", "fsdp", "expert"))
        for remat in POLICIES:
            for accumulate in (n for n in MICRO_BATCHES if rows % n == 0 and n <= rows):
                try:
                    found.append(Choice(mesh, remat, accumulate, estimate(mesh, remat, accumulate)))
                except ValueError:
                    continue
    return ranked(found)


def table(choices: Sequence[Choice]) -> str:
    """One line each, the best first."""
    head = f"{'ms':>9} {'MFU':>5} {'GiB':>7} {'':<8} {'bound':<8} {'by':<13} flags"
    rows = [
        f"{1e3 * c.plan.step_seconds:>9,.1f} {100 * c.plan.mfu:>4.0f}% {c.plan.total / GIB:>7.2f} {'fits' if c.plan.fits else 'too large':<9}"
        f"{c.plan.bound_by:<8} {c.plan.source:<13} {c.flags()}"
        for c in choices
    ]
    return "\n".join([head, *rows])
