"""Training: a state, a step made from your loss, and a short loop that you may paste instead.

    state = init_state(model.init, tx, mesh=mesh, axes=model.axes)       born sharded: no device ever holds a whole copy
    step = train_step(loss_fn, tx, state, accumulate=4)                  one compiled program, its input donated
    for batch in loader:
        state, metrics = step(state, batch)

`loss_fn(params, batch, rng)` returns a loss, `(loss, metrics)`, or `(loss, metrics, updates)`. Loss and metrics are scalars or
`Mean(total, count)`, metrics any `Sums` (metrics.py); with a Mean, the gradient is that of sum(total) / sum(count) over all micro-batches and
hosts, however unevenly tokens fall on them. The state's randomness is a function of (seed, step), so a resumed run needs no key. Nothing here
knows of Flax: `init` is any function from a key to a tree of arrays, or such a tree.

What trains and what is frozen are two trees: `state.params` is differentiated and optimized; `state.frozen` rides beside it with None where
the other has a weight. Integer leaves, quantized weights, and with `axes` what these call a "statistic", are always frozen. `updates`, {leaf
name: new value}, is how a loss moves such statistics on (batch norm's running means: models/convnet.py): the step puts them in the place of
frozen leaves, averaged over micro-batches (booleans: true where any is), and leaves the old ones where it is skipped; evaluation ignores them.
Any frozen leaf may be updated.

Left out on purpose: a Trainer class, callbacks, and the gradient of anything that is not `params`.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigflax import optim, pipeline, trees, xla
from bigflax.flops import count_flops
from bigflax.hosts import StopSignal
from bigflax.metrics import Mean, Meter, as_floats, combine, non_empty, split_loss
from bigflax.sharding import NOWHERE, TABLE, Table, make_mesh, replicated, shardings, tracing_on
from bigflax.topology import StandIn
from bigflax.weights import trains


class State(NamedTuple):
    """All that training changes. `skipped` counts the steps whose loss or gradient was not finite and which changed nothing."""

    step: jax.Array
    params: Any
    frozen: Any
    opt: Any
    skipped: jax.Array

    @property
    def weights(self) -> Any:
        """The whole tree, frozen weights included: what `apply` takes."""
        return trees.combine(self.params, self.frozen)

    @property
    def averaged(self) -> Any:
        """The whole tree with the average of the weights, which `optim.make(ema=...)` keeps; without it, `weights`. To evaluate, to save."""
        return trees.combine(optim.averaged(self.opt, self.params), self.frozen)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.step.sharding.mesh  # type: ignore[attr-defined]


# -- the state -------------------------------------------------------------------------------------------------------------


def state_like(
    init: Any,
    tx: optax.GradientTransformation,
    *,
    mesh: jax.sharding.Mesh,
    axes: Any = None,
    freeze: trees.Rules = (),
    table: Table = TABLE,
) -> State:
    """The State that `init_state` would make, as ShapeDtypeStructs with shardings: to restore into, or to plan with."""
    return _born(init, tx, mesh, axes, 0, freeze, table)[0]


def init_state(
    init: Any, tx: optax.GradientTransformation, *, mesh: jax.sharding.Mesh, axes: Any = None, seed: int = 0,
    freeze: trees.Rules = (), table: Table = TABLE,
) -> State:  # fmt: skip
    """A sharded State: weights by `axes` and the table (None: the largest dimension over fsdp), moments as their weights.

    `init` is a function from a key to params, run on the mesh so that every device makes its own part, or a tree of weights, which is
    copied. `freeze` are rules over leaf names: `[("blocks/.*", True)]`. Raises ValueError where nothing is left to train.
    """
    like, make, source = _born(init, tx, mesh, axes, seed, freeze, table)
    return jax.jit(make, out_shardings=jax.tree.map(lambda s: s.sharding, like))(source)


def _born(init, tx, mesh, axes, seed, freeze, table):
    # jit hands an input that it returns unchanged back as the same buffer, which the step would then donate: hence the copy.
    weights = init if callable(init) else lambda params: jax.tree.map(jnp.copy, params)
    source = jax.random.key(seed) if callable(init) else init
    shapes = jax.eval_shape(weights, source)
    kept = trains(shapes, freeze, axes)
    if not any(jax.tree.leaves(kept)):
        raise ValueError("nothing trains: the freeze rules and the weights' types leave no weight; freeze less")

    def make(source: Any) -> State:
        params, rest = trees.partition(weights(source), kept)
        return State(jnp.zeros((), jnp.int32), params, rest, tx.init(params), jnp.zeros((), jnp.int32))

    params, rest = trees.partition(shardings(shapes, axes, mesh, table), kept)
    like = jax.eval_shape(make, source)
    place = lambda tree, where: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)
    like = like._replace(params=place(like.params, params), frozen=place(like.frozen, rest))
    whole = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))
    like = like._replace(
        step=whole(like.step), skipped=whole(like.skipped), opt=place(like.opt, opt_shardings(like.opt, like.params, mesh))
    )
    return like, make, source


def opt_shardings(opt: Any, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Optimizer state lies as its weights: a leaf whose name ends in a weight's name and has its shape takes its sharding; the rest is whole."""
    weights = {tuple(name.split("/")): leaf for name, leaf in trees.named_leaves(params)}

    def one(name, leaf):
        path = tuple(name.split("/"))
        owner = next((weights[path[i:]] for i in range(len(path)) if path[i:] in weights), None)
        return owner.sharding if owner is not None and owner.shape == leaf.shape else replicated(mesh)

    return trees.map_named(one, opt)


# -- the step --------------------------------------------------------------------------------------------------------------

Step = Callable[[State, Any], tuple[State, dict[str, Any]]]


def train_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, state: State, *, accumulate: int = 1, micro_batches: int | None = None,
    repeats: int = 1, flags: str = "auto", seed: int = 0, table: Table = TABLE,
) -> Step:  # fmt: skip
    """The compiled step `(state, batch) -> (state, metrics)`: the state is donated and comes back as it lay, so it compiles once.

    `accumulate` splits the batch into that many micro-batches, weighed by their counts. On a mesh with `stage` the layers of a model run as a
    pipeline (pipeline.py): of `micro_batches`, a multiple of the stages (None: as many as stages), each of which passes every stage `repeats`
    times. `flags`: which row of `xla.FLAGS` it is compiled with, "auto" by its mesh. A step whose loss or gradient norm is not finite changes
    neither weights nor optimizer, and is counted in `state.skipped`. Metrics: `loss`, `grad_norm`, and the loss's own. Raises ValueError, when
    first called, for an update of what is not frozen or has another shape, and where the mesh has stages and the loss no pipeline.
    """
    same = jax.tree.map(lambda x: x.sharding, state)
    mesh = state.mesh

    def step(state: State, batch: Any) -> tuple[State, dict[str, Any], dict[str, jax.Array]]:
        with tracing_on(mesh, table, micro_batches=micro_batches, repeats=repeats):
            rng = jax.random.fold_in(jax.random.key(seed), state.step)
            grads, loss, metrics, moved = gradients(loss_fn, state.params, state.frozen, batch, rng, accumulate)
            pipeline.check()
            moved = _as_frozen(moved, state, same.frozen)
            norm = optim.global_norm(grads)
            updates, opt = tx.update(grads, state.opt, state.params)
            good = jnp.isfinite(loss.total) & jnp.isfinite(norm)
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
            params = keep(optax.apply_updates(state.params, updates), state.params)
            moved = {name: jnp.where(good, new, old) for name, (new, old) in moved.items()}
            state = State(state.step + 1, params, state.frozen, keep(opt, state.opt), state.skipped + ~good)
        return state, {"loss": loss, **metrics, "grad_norm": norm}, moved

    # The frozen tree is passed apart from what is donated, so that it may be shared between states; only what is updated comes back.
    @jax.jit(donate_argnums=0, out_shardings=(same._replace(frozen=None), None, None), compiler_options=xla.options(mesh, flags))
    def compiled(changing, frozen, batch):
        new, metrics, moved = step(changing._replace(frozen=frozen), batch)
        return new._replace(frozen=None), metrics, moved

    def call(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        new, metrics, moved = compiled(state._replace(frozen=None), state.frozen, batch)
        frozen = trees.map_named(lambda name, old: moved.get(name, old), state.frozen) if moved else state.frozen
        return new._replace(frozen=frozen), metrics

    call.compiled = compiled  # type: ignore[attr-defined]  # for whoever wants its text, cost or cache size
    # For who plans with a step: traced as jit's own `trace` does, made anew for a state that lies elsewhere, and what it computes.
    call.trace = lambda state, batch: compiled.trace(state._replace(frozen=None), state.frozen, batch)  # type: ignore[attr-defined]
    options = dict(accumulate=accumulate, micro_batches=micro_batches, repeats=repeats, flags=flags, seed=seed, table=table)
    call.on = lambda state: train_step(loss_fn, tx, state, **options)  # type: ignore[attr-defined]
    call.loss_fn = loss_fn  # type: ignore[attr-defined]
    return call


def _as_frozen(updates: Mapping[str, jax.Array], state: State, where: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(new, old) of each leaf, the new one of the old one's dtype and laid out as `where` has it."""
    frozen, places, found = dict(trees.named_leaves(state.frozen)), dict(trees.named_leaves(where)), {}
    for name, new in updates.items():
        if name not in frozen:
            trains = any(name == other for other, _ in trees.named_leaves(state.params))
            hint = "it trains: pass axes=model.axes to init_state" if trains else trees.did_you_mean(name, frozen, "frozen are")
            raise ValueError(f"the loss updates {name!r}, which is no frozen leaf; {hint}")
        old = frozen[name]
        if jnp.shape(new) != old.shape:
            raise ValueError(f"the loss updates {name!r} of shape {old.shape} with an array of shape {jnp.shape(new)}")
        found[name] = jax.lax.with_sharding_constraint(jnp.asarray(new, old.dtype), places[name]), old
    return found


def gradients(loss_fn, params, frozen, batch, rng, accumulate: int = 1) -> tuple[Any, Mean, dict[str, Any], dict[str, jax.Array]]:
    """Gradient of the mean loss over the whole batch, the loss, its metrics, and updates; micro-batch i holds the rows i, i + accumulate, ..."""

    def total(params, batch, rng):
        loss, metrics, updates = split_loss(loss_fn(trees.combine(params, frozen), batch, rng))
        return loss.total, (loss, metrics, updates)

    def one(batch, rng):
        (_, rest), grads = jax.value_and_grad(total, has_aux=True)(params, batch, rng)
        return grads, *rest

    if accumulate == 1:
        sums = one(batch, rng)
    else:
        micro = jax.tree.map(lambda x: _micro_batches(x, accumulate), batch)
        add = lambda sums, new: jax.tree.map(jnp.add, sums, new)
        body = lambda sums, i_batch: (add(sums, one(i_batch[1], jax.random.fold_in(rng, i_batch[0]))), None)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro), rng))
        sums, _ = jax.lax.scan(body, start, (jnp.arange(accumulate), micro))
    grads, loss, metrics, updates = sums
    if accumulate > 1:
        mean = lambda x: x if x.dtype == bool else x / accumulate if jnp.issubdtype(x.dtype, jnp.inexact) else x // accumulate
        updates = {name: mean(x) for name, x in updates.items()}
    # A batch without a single real token has nothing to teach: gradient 0, not NaN.
    scale = 1.0 / jnp.maximum(loss.count, 1).astype(jnp.float32)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), loss, metrics, updates


def _micro_batches(x: jax.Array, parts: int) -> jax.Array:
    if x.shape[0] % parts:
        raise ValueError(
            f"batch {x.shape[0]} does not divide into accumulate={parts} micro-batches; nearest is {x.shape[0] - x.shape[0] % parts}"
        )
    # Rows i, i + parts, ...: every device keeps its own rows, where contiguous pieces would move them all.
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def model_flops(loss_fn: Callable[..., Any], weights: Any, batch: Any) -> int:
    """FLOPs that a training step of this batch needs, recomputation left out: three times those of the forward pass (flops.py).

    Counted where no fast path hides or adds any: a mixture's chosen experts alone, of causal attention the blocks that are not all masked.
    `weights` and `batch` are arrays or shapes, whole.
    """
    return 3 * forward_flops(loss_fn, weights, batch, make_mesh(devices=[StandIn(0, (0, 0, 0), 0, 0, NOWHERE, platform=NOWHERE)]))


def forward_flops(loss_fn: Callable[..., Any], weights: Any, batch: Any, mesh: jax.sharding.Mesh, table: Table = TABLE) -> int:
    """FLOPs of the loss alone, of all devices together, as it is traced on this mesh."""
    whole = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    loss = lambda weights, batch: split_loss(loss_fn(weights, batch, None))[0].total
    with tracing_on(mesh, table):
        return count_flops(loss, whole(weights), whole(batch))


# -- evaluation ------------------------------------------------------------------------------------------------------------


def eval_step(
    loss_fn: Callable[..., Any], mesh: jax.sharding.Mesh | None = None, table: Table = TABLE
) -> Callable[[Any, Any], dict[str, Any]]:
    """The compiled `(weights, batch) -> {"loss": Mean, ...}`, without randomness."""

    @jax.jit
    def step(params, batch):
        with tracing_on(mesh, table):
            loss, metrics, _ = split_loss(loss_fn(params, batch, None))
        return {"loss": loss, **metrics}

    return step


def evaluate(
    step: Callable[[Any, Any], dict[str, Any]], params: Any, batches: Iterable[Any], *, limit: int | None = None
) -> dict[str, float]:
    """The metrics of `step` over all batches (or the first `limit`), every token or example weighing the same."""
    return as_floats(combine(step(params, batch) for batch in itertools.islice(batches, limit)))


# -- the loop --------------------------------------------------------------------------------------------------------------


class Watch:
    """Follows one metric over evaluations: which was best, and whether `patience` of them in a row brought nothing better."""

    def __init__(self, metric: str, mode: str = "min", patience: int | None = None):
        self.metric, self.mode, self.patience = metric, mode, patience
        self.best, self.idle = None, 0

    def see(self, values: Mapping[str, float]) -> bool:
        """Takes in an evaluation; True where training should end. Raises ValueError as `check` does."""
        self.check(values)
        value = values[self.metric]
        better = self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        self.best, self.idle = (value, 0) if better else (self.best, self.idle + 1)
        return self.ended

    def check(self, names: Iterable[str]) -> None:
        """Raises ValueError where the metric is not among an evaluation's names."""
        if self.metric not in (names := list(names)):
            raise ValueError(f"no metric {self.metric!r} to watch; {trees.did_you_mean(self.metric, names, 'the evaluation has')}")

    @property
    def ended(self) -> bool:
        return self.patience is not None and self.idle >= self.patience


class Interval:
    """The steps since the last record: their metrics, not yet waited for, and their time, less what `pause` took out."""

    def __init__(self, meter: Meter):
        self.meter, self.metrics, self.stall, self.began = meter, [], 0.0, time.perf_counter()

    def fetch(self, batches: Iterator[Any]) -> Any:
        """The next batch or None. The wait counts as stall only if the device stood still: if its last step had ended when the batch came."""
        asked = time.perf_counter()
        batch = next(batches, None)
        if not self.metrics or self.metrics[-1]["loss"].total.is_ready():
            self.stall += time.perf_counter() - asked
        return batch

    def add(self, metrics: Mapping[str, Any]) -> None:
        self.metrics.append(metrics)
        if len(self.metrics) > 1:  # one step ahead of the device, no more: batches would pile up in its memory
            jax.block_until_ready(self.metrics[-2]["grad_norm"])

    def record(self, at: int) -> dict[str, float]:
        """Means and rates of the interval, the loss first; begins the next."""
        sums, now = combine(self.metrics), time.perf_counter()
        steps, counted = len(self.metrics), sums["loss"].count
        rates = self.meter.record(steps, now - self.began, self.stall, step=at, counted=counted if counted > steps else None)
        self.metrics, self.stall, self.began = [], 0.0, now
        return {"loss": sums["loss"].value, **as_floats(non_empty(sums)), **rates}

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused


class Trace:
    """A profile of steps 6 to 10 of this session, for TensorBoard or Perfetto, in `folder` (None: nothing)."""

    def __init__(self, folder: str | None, first: int):
        self.folder, self.start, self.end, self.running = folder, first + 5, first + 10, False

    def see(self, at: int, result: Any) -> None:
        """Call after each step with its number and something to wait for."""
        if self.folder and at in (self.start, self.end):
            jax.block_until_ready(result)
            (jax.profiler.stop_trace if self.running else functools.partial(jax.profiler.start_trace, self.folder))()
            self.running = not self.running

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()


def fit(
    state: State, step: Step, loader: Any, *, steps: int, log_every: int = 10, eval_every: int | None = None, save_every: int | None = None,
    save_minutes: float = 10.0, profile: str | None = None, evaluate: Callable[[State], Mapping[str, float]] | None = None,
    checkpoints: Any = None, meta: Mapping[str, Any] | None = None, write: Callable[[int, Mapping[str, float]], None] | None = None,
    meter: Meter | None = None, watch: Watch | None = None, stop: StopSignal | None = None,
) -> State:  # fmt: skip
    """Trains until `steps`, the end of the data, an early stop, or a stop signal; saves at the end whatever the reason.

    Every `log_every` steps `write(step, record)` gets the interval's metrics and rates; every `eval_every` what `evaluate(state)` returns,
    its names behind "eval/". `checkpoints` (a `checkpoint.Checkpoints`) gets the state, the loader's position and `meta` every `save_every`
    steps, every `save_minutes`, and after each evaluation that `watch` finds best. `profile` names a folder for a trace of five steps.
    """
    if log_every < 1:
        raise ValueError(f"log_every {log_every} must be at least 1; a large number logs the last step only")
    write = write or (lambda step, record: None)
    at, batches, interval = int(state.step), iter(loader), Interval(meter or Meter(total_steps=steps))
    trace, done = Trace(profile, at), watch is not None and watch.ended
    saved_at, saved_time, evaluated = at, time.perf_counter(), None

    while at < steps and not done:
        batch = interval.fetch(batches)
        if batch is None:
            break
        state, metrics = step(state, batch)
        at += 1
        interval.add(metrics)
        trace.see(at, metrics)
        logs = at % log_every == 0 or at == steps
        if logs:
            skipped = {"skipped": n} if (n := int(state.skipped)) else {}
            write(at, {**interval.record(at), **skipped})
        with interval.pause():
            evaluated, best = None, False
            if evaluate is not None and eval_every and (at % eval_every == 0 or at == steps):
                evaluated = {name: float(value) for name, value in evaluate(state).items()}
                write(at, {f"eval/{name}": value for name, value in evaluated.items()})
                done = watch is not None and watch.see(evaluated)
                best = watch is not None and watch.idle == 0
            done = done or (stop is not None and stop.agreed())
            if checkpoints is not None and (done or best or (save_every and at % save_every == 0) or _due(saved_time, save_minutes, logs)):
                _save(checkpoints, at, state, loader, meta, watch, evaluated)
                saved_at, saved_time = at, time.perf_counter()
    trace.close()
    if checkpoints is not None and saved_at != at:
        _save(checkpoints, at, state, loader, meta, watch, evaluated)
    return state


def _save(checkpoints, at, state, loader, meta, watch, evaluated) -> None:
    watched = {} if watch is None else {"watch": {"best": watch.best, "idle": watch.idle}}
    checkpoints.save(at, state, data=loader.state(), meta={**(meta or {}), **watched}, metrics=evaluated)


def _due(since: float, minutes: float, agreed_moment: bool) -> bool:
    """Whether it is time to save. Hosts' clocks differ, so several hosts ask the first one, at the moments all of them ask."""
    if jax.process_count() == 1:
        return time.perf_counter() - since > 60 * minutes
    if not agreed_moment:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(jnp.int32(time.perf_counter() - since > 60 * minutes)))
