"""A Plan: the figures of a step on a topology, for reading, as JSON, and as a picture."""

import dataclasses
import json
import os
from collections.abc import Mapping

from bigflax import trees

GIB = 2**30
PARTS = {"weights": "#4878a8", "optimizer": "#8fb0d0", "batch": "#b8b8b8", "temporaries": "#c05a2c", "code": "#e0b080"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over the same mesh axes: executions a step, bytes of their results on one device, and their time."""

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step needs of one device, and the least time that it takes. Sizes in bytes, times in seconds, FLOPs of all devices together.

    `source` says who speaks: the TPU compiler, a CPU's, or the estimate.
    """

    topology: str
    chips: int
    devices: int
    mesh: Mapping[str, int]
    source: str
    memory: Mapping[str, float]  # weights, optimizer, batch, temporaries, code
    capacity: float
    model_flops: float
    program_flops: float
    peak: float
    traffic: tuple[Traffic, ...] = ()
    seconds: Mapping[str, float]  # compute, hbm, ici, dcn
    tokens: int = 0
    steps: int | None = None
    price: float | None = None  # dollars a chip and hour
    compiled_in: float | None = None
    advice: str = ""

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def mfu(self) -> float:
        """An upper bound: model FLOPs over what the chips could do in the time that the step takes at least."""
        return self.model_flops / self.step_seconds / self.peak

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def hours(self) -> float | None:
        return None if self.steps is None else self.steps * self.step_seconds / 3600

    @property
    def chip_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.chips

    @property
    def dollars(self) -> float | None:
        return None if self.price is None or self.chip_hours is None else self.chip_hours * self.price

    def json(self) -> str:
        said = ("total", "fits", "step_seconds", "bound_by", "mfu", "tokens_per_second", "hours", "chip_hours", "dollars")
        return json.dumps({**dataclasses.asdict(self), **{name: getattr(self, name) for name in said}})

    @classmethod
    def read(cls, text: str) -> "Plan":
        """The inverse of `json`."""
        found = json.loads(text)
        kept = {field.name: found[field.name] for field in dataclasses.fields(cls)}
        traffic = tuple(Traffic(**{**t, "axes": tuple(t["axes"])}) for t in kept["traffic"])
        return cls(**{**kept, "traffic": traffic})

    def table(self) -> str:
        """For reading."""
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        took = "" if self.compiled_in is None else f", {self.compiled_in:.0f} s"
        gib = lambda size: f"{size / GIB:9.2f} GiB"
        lines = [f"{self.topology}, {mesh} ({self.source}{took})"]
        lines += [f"  {name:<28}{gib(size)}" for name, size in self.memory.items()]
        verdict = f"fits in {self.capacity / GIB:.2f}" if self.fits else f"DOES NOT FIT in {self.capacity / GIB:.2f}"
        lines += [f"  {'a device':<28}{gib(self.total)}   {verdict}"]
        for t in self.traffic:
            lines += [f"  {t.kind + ', ' + '+'.join(t.axes):<28}{gib(t.bytes)}   {t.count:,} times, {1e3 * t.seconds:,.1f} ms"]
        times = ", ".join(f"{name} {1e3 * value:,.1f}" for name, value in self.seconds.items() if value)
        lines += [f"  a step takes at least {1e3 * self.step_seconds:,.1f} ms, bound by {self.bound_by} (ms: {times})"]
        rate = f", {trees.human(self.tokens_per_second)} tokens/s" if self.tokens else ""
        lines += [f"  {self.model_flops:.4g} model FLOPs, {self.program_flops:.4g} executed: MFU at most {100 * self.mfu:.0f}%{rate}"]
        if self.steps is not None and self.hours is not None and self.chip_hours is not None:
            cost = (
                "; what a chip costs is not in the table: --price"
                if self.price is None
                else f", {self.dollars:,.0f} dollars at {self.price} an hour"
            )
            lines += [f"  {self.steps:,} steps take {self.hours:,.1f} hours, {self.chip_hours:,.0f} chip-hours{cost}"]
        return "\n".join([*lines, *([f"  {self.advice}"] if self.advice else [])])

    def picture(self, path: str | os.PathLike) -> None:
        """Writes the split of a device's memory, and the terms of the step's time, as SVG or PNG by the ending of `path`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        canvas = {".svg": FigureCanvasSVG, ".png": FigureCanvasAgg}.get(ending := os.path.splitext(path)[1])
        if canvas is None:
            raise ValueError(f"a picture ends in .svg or .png, not {ending or 'nothing'!r}")
        figure = Figure(figsize=(8, 3), dpi=150, layout="constrained")
        canvas(figure)
        memory, times = figure.subplots(2, 1, height_ratios=(2, 2))
        left = 0.0
        for name, size in self.memory.items():
            memory.barh(0, size / GIB, left=left, color=PARTS.get(name, "#888888"), label=f"{name} {size / GIB:.2f}")
            left += size / GIB
        memory.axvline(self.capacity / GIB, color="black", linewidth=1.2)
        memory.set(yticks=[], xlabel="GiB of a device; the line is what it has", title=f"{self.topology}: {self.source}")
        memory.legend(ncols=5, fontsize=7, loc="upper center", frameon=False)
        memory.set_ylim(-0.5, 1.1)
        times.barh(list(self.seconds), [1e3 * value for value in self.seconds.values()], color="#4878a8")
        times.set(xlabel="ms a step, at least")
        times.invert_yaxis()
        figure.savefig(path)
