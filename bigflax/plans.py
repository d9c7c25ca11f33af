"""The plan of a recipe: its step, state and batch as they would be on a topology, estimated here and compiled in a child process.

A child, because libtpu is loaded for good, asks for its environment before that, and may end a process in its own way; it also leaves this
process free to answer with the estimate at once. It speaks in lines: {"say": "compiling"} ..., and at last {"plan": ...} or {"error": ...}.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from bigflax import data, models, planner, recipes, runs, sharding, tasks, topology, train, trees
from bigflax.topology import Topology

Config = Any


class Parts(NamedTuple):
    """What a plan is made from, all of it shapes."""

    step: Any
    state: train.State
    batch: dict[str, jax.ShapeDtypeStruct]
    loss_fn: Any
    axes: Any


def parts(config: Config, mesh: jax.sharding.Mesh) -> Parts:
    """The step of a resolved recipe on `mesh`; neither its data nor its tokenizer is read, but for a `tokenizer.path`'s size."""
    if "teacher" in config:
        raise ValueError(
            "a plan knows of no teacher: plan its recipe without the section 'teacher', and leave room for the teacher's weights and pass"
        )
    run = runs.Run(config)
    run.mesh, run.fields, run.steps = mesh, fields(config), config.fit.steps or 1  # of epochs only the data know how long they are
    sharding.check_batch(config.data.batch_size, mesh)
    loss_fn = tasks.create(**config.task, model=run.model)
    state = run.state_like()
    where = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for name, x in run.batch_shapes().items()}
    step = train.train_step(loss_fn, run.tx, state, seed=config.seed, table=run.table, **config.step)
    return Parts(step, state, batch, loss_fn, run.model.axes)


def fields(config: Config) -> dict[str, Any]:
    """Those of the model's fields that follow from the data, without the data."""
    kind = recipes.data_kind(config.model.name, config.task.name)
    words = {"vocab_size": vocab_size(config), "eos_token_id": 0} if kind.tokenized else {}  # which id ends a text changes no plan
    return recipes.model_fields(config, kind, words, None)


def vocab_size(config: Config) -> int:
    """The model's, or what its tokenizer will have."""
    c = config.tokenizer
    if said := config.model.get("vocab_size"):
        return said
    return c.vocab_size if c.kind == "bpe" else data.load_tokenizer("bytes" if c.kind == "bytes" else c.path).vocab_size


def mesh_on(config: Config, devices: Any, slices: int) -> jax.sharding.Mesh:
    """The recipe's mesh on these devices; where it says nothing of slices, they are the outermost axis."""
    sizes = dict(config.mesh)
    if slices > 1 and sizes["slice"] == 1:
        sizes["slice"] = slices
    return sharding.make_mesh(devices=devices, **sizes)


def estimated(
    config: Config, place: Topology, *, price: float | None = None, made: Parts | None = None, traced: planner.Trace | None = None
) -> planner.Plan:
    """The estimate, without a compiler; what was made or traced already may be given."""
    made = made or parts(config, mesh_on(config, place.stand_ins(), place.slices))
    traced = traced or trace(config, made, place)
    width = 2 if config.model.get("dtype") in ("bfloat16", "float16") else 4
    return planner.estimate(
        traced, made.state, made.batch, place, axes=made.axes, accumulate=config.step.accumulate,
        choices=config.model.get("num_experts_per_tok") or 1, dtype_bytes=width, steps=config.fit.steps, price=price,
    )  # fmt: skip


def trace(config: Config, made: Parts, place: Topology) -> planner.Trace:
    """The trace of as many rows as a device has at a time."""
    spread = math.prod(made.state.mesh.shape[axis] for axis in sharding.batch_axes(made.state.mesh))
    rows = max(1, config.data.batch_size // spread // config.step.accumulate)
    return planner.trace(made.loss_fn, made.state.weights, made.batch, place, rows=rows)


def choices(config: Config, place: Topology, *, price: float | None = None) -> list[planner.Choice]:
    """What the recipe could be on this topology, by the estimate, the best first. A state is laid out once a mesh, a loss traced once a policy."""

    @functools.cache
    def made(mesh: tuple, remat: str) -> Parts:
        return parts(changed(mesh, remat, 1), sharding.make_mesh(devices=place.stand_ins(), **dict(mesh)))

    traces: dict[str, planner.Trace] = {}

    def traced(mesh: tuple, remat: str) -> planner.Trace:
        if remat not in traces:
            traces[remat] = trace(config, made(mesh, remat), place)
        return traces[remat]

    def changed(mesh: tuple, remat: str, accumulate: int) -> Config:
        new = config.copy_and_resolve_references()
        with new.unlocked():
            new.mesh.update({axis: dict(mesh).get(axis, 1) for axis in sharding.MESH_AXES})
            new.model.remat, new.step.accumulate = remat, accumulate
        return new

    def one(mesh: Any, remat: str, accumulate: int) -> planner.Plan:
        mesh = tuple(mesh.items())
        whole = made(mesh, "none")
        return estimated(changed(mesh, remat, accumulate), place, price=price, made=whole, traced=traced(mesh, remat))

    module = models.create(**{**{k: v for k, v in config.model.items() if k != "source"}, "size": None, **fields(config)})
    experts = any("router" in name for name, _ in trees.named_leaves(module.shapes()))
    return planner.tried(
        one, place.devices, place.slices, ("data", "fsdp", *(("expert",) if experts else ()), "tensor"), config.data.batch_size
    )


def compiled(config: Config, place: Topology, *, price: float | None = None, say: Callable[[str], None]) -> planner.Plan:
    """By the TPU compiler, or without libtpu by that of as many fake CPU devices. Runs in the child."""
    devices = topology.devices(place.name, place.slices) if topology.has_compiler() else jax.devices("cpu")
    made = parts(config, mesh_on(config, devices, place.slices))
    return planner.plan(
        made.step, made.state, made.batch, topology=place.name, slices=place.slices, steps=config.fit.steps, price=price, say=say
    )


def run(args: Any, overrides: list[str]) -> int:
    """The verb: 0 where the step fits, 1 where it does not, whoever says so."""
    place = topology.parse(args.topology, args.slices)
    if args.child:
        return _child(args, overrides, place)
    if args.picture and not args.picture.endswith((".svg", ".png")):
        raise ValueError(f"--picture={args.picture} must end in .svg or .png")
    config = recipes.resolve(recipes.load(args.config), overrides)
    child = None if args.fast or args.search else Child(_argv(args, overrides), place)  # it starts while the estimate is made
    say = (lambda text: None) if args.json else print
    try:
        if args.search:
            found = search(config, place, args, overrides, say)
        else:
            found = estimated(config, place, price=args.price)
            say(found.table())
        if child is not None:
            found = _wait(child, quiet=args.json)
            say("\n" + found.table())
    finally:
        if child is not None:
            child.close()
    if not found.fits:
        found = dataclasses.replace(found, advice=advice(config, place))
        say(f"\n{found.advice}")
    if args.json:
        print(found.json())
    if args.picture:
        found.picture(args.picture)
    return int(not found.fits)


def search(config: Config, place: Topology, args: Any, overrides: list[str], say: Callable[[str], None]) -> planner.Plan:
    """Ranks by the estimate, compiles the best few, and says the flags of the best."""
    found = choices(config, place, price=args.price)
    if not found:
        raise ValueError(f"no mesh of {place} can carry this recipe: batch {config.data.batch_size} divides over none")
    say(f"\n{len(found)} layouts by the estimate, the best of them:\n{planner.table(found[:10])}")
    best = [] if args.fast else found[: args.best]
    done = []
    for number, choice in enumerate(best, 1):
        child = Child(_argv(args, [*overrides, *(flag.removeprefix("--config.") for flag in choice.flags().split())]), place)
        try:
            plan = _wait(child, quiet=args.json, of=f"{number} of {len(best)}: ")
        finally:
            child.close()
        done.append(dataclasses.replace(choice, plan=plan))
        say(f"compiled {number} of {len(best)}: {1e3 * plan.step_seconds:,.1f} ms, {plan.total / planner.GIB:.2f} GiB")
    ranked = planner.ranked(done or found)
    say(f"\n{planner.table(done and ranked)}\n" if done else "")
    say(f"the best: {ranked[0].flags()}\n\n{ranked[0].plan.table()}")
    return ranked[0].plan


def advice(config: Config, place: Topology) -> str:
    """What to change where a recipe does not fit: the best that the estimate knows on this topology, or more chips."""
    fitting = [choice for choice in choices(config, place) if choice.plan.fits]
    if fitting:
        return f"by the estimate it fits with {fitting[0].flags()}"
    larger = next((t for t in _larger(place) if any(choice.plan.fits for choice in choices(config, t))), None)
    hint = "a smaller batch or model" if larger is None else f"--topology={larger.name}"
    return f"by the estimate no mesh, remat policy or number of micro-batches fits on {place}; take {hint}"


def _larger(place: Topology) -> Iterator[Topology]:
    """The same chips, up to eight times as many."""
    shape = list(place.shape)
    for _ in range(3):
        shape[shape.index(min(shape))] *= 2
        yield dataclasses.replace(place, shape=tuple(shape))


def _child(args: Any, overrides: list[str], place: Topology) -> int:
    tell = lambda **said: print(json.dumps(said), flush=True)
    try:
        config = recipes.resolve(recipes.load(args.config), overrides)
        tell(plan=compiled(config, place, price=args.price, say=lambda text: tell(say=text)).json())
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        tell(error=str(error))
    return 0


def _argv(args: Any, overrides: list[str]) -> list[str]:
    price = [] if args.price is None else [f"--price={args.price}"]
    said = [f"--config={args.config}", f"--topology={args.topology}", f"--slices={args.slices}", *price]
    return ["plan", *said, *(f"--config.{text}" for text in overrides)]


def _wait(child: "Child", *, quiet: bool, of: str = "") -> planner.Plan:
    """The child's plan; meanwhile the terminal shows what it is at, and for how long."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=quiet), transient=True) as progress:
        task = progress.add_task(f"{of}starting the compiler")
        for said in child:
            progress.update(task, description=of + said)
    assert child.result is not None
    return child.result


class Child:
    """`bigflax plan` in another process: iterate over what it says, then `result`."""

    def __init__(self, argv: list[str], place: Topology):
        env = {**os.environ, **topology.ALONE, "JAX_PLATFORMS": "cpu"}
        if not topology.has_compiler():
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={place.devices}"
        command = [sys.executable, "-m", "bigflax.main", *argv, "--child"]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.result: planner.Plan | None = None

    def __iter__(self) -> Iterator[str]:
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            said = json.loads(line) if line.startswith("{") else {}
            if "error" in said:
                raise ValueError(said["error"])
            if "plan" in said:
                self.result = planner.Plan.read(said["plan"])
            elif "say" in said:
                yield said["say"]
        errors = self.process.stderr.read()
        if self.process.wait() or self.result is None:
            last = [line for line in errors.splitlines() if line.strip()][-1:] or ["it said nothing"]
            raise RuntimeError(f"the compiler's process ended with code {self.process.returncode}: {last[0][:300]}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
