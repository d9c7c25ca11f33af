"""Checkpoints: everything that a killed run needs to continue bit for bit, on the same mesh or on another.

    with Checkpoints("runs/a/checkpoints", keep=3, best=("bits_per_byte", "min")) as checkpoints:
        checkpoints.save(step, state, data=position, meta={"config": ...}, metrics={"bits_per_byte": 1.9})   # returns at once
        found = checkpoints.restore(target_like(state))                       # arrays come back on the shardings of the target

A step is one folder, written under another name and renamed when complete, so an interrupted save is never loaded. It holds the
params, the rest of the state, and a record (stored.py says how). A checksum of every array is taken in the background of the save
and again when it is restored, so damaged files are an error and never silently wrong weights. A state is any pytree of `jax.Array`s,
typed weights and PRNG keys among them.

The arrays' files, the processes' meetings and the background threads are Orbax's (github.com/google/orbax).
Left out on purpose: casting or reshaping while restoring (a mismatch is an error), and repairing a damaged checkpoint.
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from bigflax import stored, trees
from bigflax.stored import versions as versions  # part of what this module offers

_PATIENCE = 1200  # seconds for one process to wait for another


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives back: `state` shaped like its target, the rest as it was passed to `save`."""

    step: int
    state: Any
    data: Any
    meta: dict
    metrics: dict


class Checkpoints:
    """The checkpoints of one run in `folder`, local or gs://. All processes of a run call the same methods in the same order.

    Keeps the newest `keep` steps and, with `best=("name", "min" or "max")`, also the `keep_best` best by that metric.
    A save that fails is an OSError, a damaged or unfitting checkpoint a ValueError, each with one sentence that says what to do.
    """

    def __init__(
        self,
        folder: Any,
        *,
        keep: int = 3,
        best: tuple[str, Literal["min", "max"]] | None = None,
        keep_best: int = 1,
        asynchronous: bool = True,
    ) -> None:
        if keep < 1 or (best is not None and best[1] not in ("min", "max")):
            raise ValueError(f'keep must be at least 1 and best ("metric", "min" or "max"), not keep={keep} and best={best!r}')
        self.folder = stored.open_path(folder)
        self._keep, self._best, self._keep_best, self._asynchronous = keep, best, keep_best, asynchronous
        self._saver: Any = None
        self._running: tuple[int, concurrent.futures.Future] | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        if torn := self.torn():
            state = "unfinished saves, which are never loaded (a run was interrupted, or is saving now)"
            warnings.warn(f"{self.folder} holds {state}: {', '.join(torn)}", stacklevel=2)

    def save(self, step: int, state: Any, *, data: Any = None, meta: dict | None = None, metrics: dict | None = None) -> None:
        """Saves `state` (a pytree of arrays) and JSON values under `step`; the caller may donate the state as soon as this returns.

        With `asynchronous`, files are written in the background and a failure is raised by the next call of any method.
        """
        step, latest = int(step), self.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"{self.folder} already holds step {latest}, so {step} cannot follow: choose another folder or delete later steps"
            )
        leaves = stored.encode_all(state)
        meta = {**(meta or {}), "versions": stored.versions(), "mesh": stored.mesh_of(state)}
        metrics = {name: float(getattr(value, "value", value)) for name, value in (metrics or {}).items()}
        record = {"step": step, "data": data, "meta": meta, "metrics": metrics, "leaves": stored.describe(state)}
        stored.require_json(record)
        arguments = _save_arguments(leaves, record)
        try:
            saver = self._open()
            stored.require_room(self.folder, leaves)
            saver.save(self.folder / str(step), args=arguments)
        except Exception as error:
            raise self._failure(step, error) from error
        self._running = step, self._background.submit(self._finish, step)
        if not self._asynchronous:
            self.wait()

    def restore(self, target: Any, *, step: int | None = None) -> Restored:
        """The newest checkpoint, or that of `step`, as arrays on the shardings of `target` (arrays, or `target_like(state)`)."""
        step = self._find(step)
        record = self._record(step)
        state = self._checked(step, lambda: _load(self.folder / str(step), record, target))
        return Restored(step, state, record["data"], record["meta"], record["metrics"])

    def restore_params(self, target: Any = None, *, step: int | None = None) -> Any:
        """The weights alone: see the function `restore_params`."""
        step = self._find(step)
        record, place = self._record(step), self.folder / str(step)
        if not any(map(stored.is_param, record["leaves"])):
            raise ValueError(f"checkpoint {step} in {self.folder} has no leaves under 'params'; restore the whole state instead")
        if target is None:
            return self._checked(step, lambda: _load_numpy(place, record))
        return self._checked(step, lambda: _load(place, record, {"params": target}, only_params=True)["params"])

    def meta(self, step: int | None = None) -> dict:
        """What was passed as `meta` (the config), with `versions` and `mesh` added; reads one small file and no array."""
        return self._record(self._find(step))["meta"]

    def all_steps(self) -> list[int]:
        """The steps that can be restored, oldest first, once a running save is finished."""
        self.wait()
        return stored.steps(self.folder)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.all_steps(), default=None)

    def best(self) -> int | None:
        """The step with the best finite value of the metric named in the constructor, the newest of equals, or None."""
        return (self._ranked(self.all_steps()) or [None])[-1]

    def torn(self) -> list[str]:
        """Names in the folder of what an interrupted save left. They are never loaded; the next `save` removes temporary ones."""
        whole = set(map(str, self.all_steps()))
        return [name for name in stored.names(self.folder) if name not in whole and (stored.TEMPORARY in name or name.isdigit())]

    def wait(self) -> None:
        """Returns when everything saved so far is on disk."""
        if self._running is not None:
            step, future = self._running
            try:
                future.result()
            except Exception as error:
                raise self._failure(step, error) from error
            self._running = None

    def close(self) -> None:
        """Waits, then ends all background threads. Closing twice is harmless."""
        try:
            self.wait()
        finally:
            self._close_saver()
            self._background.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.close()
        except OSError as failure:
            if kind is None:
                raise
            warnings.warn(str(failure), stacklevel=2)  # the error that ended the block is the one to see

    def _open(self) -> Any:
        """What saves, made at the first save: reading needs none, and works in a read-only folder."""
        if self._saver is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_temporary()
            self._saver = _saver()
        return self._saver

    def _finish(self, step: int) -> None:
        """In the background: waits until the step has its name, then deletes those that are no longer kept."""
        self._saver.wait_until_finished()
        if jax.process_index() == 0:
            steps = stored.steps(self.folder)
            kept = {*steps[-self._keep :], *(self._ranked(steps)[-self._keep_best :] if self._keep_best else ())}
            for old in sorted(set(steps) - kept):
                try:
                    stored.discard(self.folder / str(old))
                except OSError as error:  # the save itself has succeeded
                    warnings.warn(f"{self.folder / str(old)} could not be deleted: {error}", stacklevel=1)
        meet = _orbax().multihost.get_barrier_sync_fn()  # so that all processes list the same steps from here on
        meet(key=f"bigflax checkpoint {step}", timeout_ms=_PATIENCE * 1000)

    def _ranked(self, steps: list[int]) -> list[int]:
        """Those of `steps` with a finite value of the metric, worst first, equals by age."""
        if self._best is None:
            return []
        name, mode = self._best
        values = []
        for step in steps:
            try:
                values.append((stored.read_record(self.folder / str(step))["metrics"].get(name, math.nan), step))
            except (OSError, ValueError):
                continue  # damaged: it has no rank, and `restore` says so
        return [step for _, step in sorted((value if mode == "max" else -value, step) for value, step in values if math.isfinite(value))]

    def _close_saver(self) -> None:
        saver, self._saver = self._saver, None
        if saver is not None:
            saver.close()

    def _remove_temporary(self) -> None:
        """Only one run may write to a folder, so whatever is temporary while it is not saving belongs to a dead one."""
        for name in stored.names(self.folder) if jax.process_index() == 0 else []:
            if stored.TEMPORARY in name:
                with contextlib.suppress(OSError):  # after a failed save a last thread may still be writing: then the next save removes it
                    (self.folder / name).rmtree()

    def _failure(self, step: int, error: Exception) -> OSError:
        """The sentence for a failed save; afterwards the next save starts afresh."""
        self._running = None
        number, reason = stored.reason(error)
        with contextlib.suppress(Exception):  # its only news is the error at hand
            self._close_saver()
        self._remove_temporary()
        complete = ", ".join(map(str, stored.steps(self.folder))) or "none"
        failure = OSError(f"checkpoint {step} could not be saved in {self.folder}: {reason}; complete checkpoints: {complete}")
        failure.errno = number
        return failure

    def _find(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"there is no checkpoint in {self.folder}")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"there is no checkpoint of step {step} in {self.folder}; there are {steps}")
        return steps[-1] if step is None else step

    def _record(self, step: int) -> dict:
        return self._checked(step, lambda: stored.read_record(self.folder / str(step)))

    def _checked(self, step: int, read: Callable[[], Any]) -> Any:
        """`read()`, whose failure becomes a sentence that names the step and the one to fall back to."""
        try:
            return read()
        except stored.Mismatch as error:
            raise ValueError(f"checkpoint {step} in {self.folder} does not fit: {error}") from None
        except Exception as error:
            earlier = max((s for s in stored.steps(self.folder) if s < step), default=None)
            remedy = "there is no earlier one" if earlier is None else f"delete that folder to continue from step {earlier}"
            raise ValueError(f"checkpoint {self.folder / str(step)} is damaged ({stored.reason(error)[1]}); {remedy}") from error


def restore_params(folder: Any, target: Any = None, *, step: int | None = None) -> Any:
    """The weights alone, without reading the optimizer: for fine-tuning, distillation, export.

    `target` is shaped like the params and says where the arrays go. Without it they come as NumPy arrays in nested dicts, by leaf
    name, so a typed weight is the dict of its parts.
    """
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_params(target, step=step)


def target_like(state: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct` with shardings: what `restore` needs to know of a state, without its memory."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


# -- Orbax ------------------------------------------------------------------------------------------------------------------


@functools.cache
def _orbax() -> Any:
    """The library, loaded when first needed (half a second), what it says on the side dropped: every failure is raised in our words."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    usual, printed = sys.unraisablehook, sys.excepthook
    # What TensorStore's threads hand to the loop of a read that has failed and ended comes to nothing, after our sentence was printed
    late = lambda error: isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def hook(unraisable: Any) -> None:
        """Where one read fails, those that are given up with it raise again as they are thrown away."""
        code = getattr(unraisable.object, "cr_code", None)
        if not late(unraisable.exc_value) and (code is None or "orbax" not in code.co_filename):
            usual(unraisable)

    sys.unraisablehook = hook
    sys.excepthook = lambda kind, error, trace: None if late(error) else printed(kind, error, trace)
    return ocp


@functools.cache
def _record_item() -> tuple[type, type]:
    """The classes by which Orbax writes a record as one more item of a checkpoint: its handler and the arguments of that."""
    ocp = _orbax()

    class Handler(ocp.AsyncCheckpointHandler):
        async def async_save(self, directory, args):
            blocks = {name: stored.blocks_of(leaf) for name, leaf in args.leaves.items()}  # before the caller may donate
            return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args.record, blocks), name="record")]

        async def _write(self, directory, record, blocks):
            process = jax.process_index()
            (directory / f"checksums.{process}.json").write_text(json.dumps(stored.own_checksums(blocks), indent=1))
            if process == 0:
                stored.write_record(directory, record)

        def save(self, directory, args):
            # Orbax's base class wants the method; its AsyncCheckpointer, the only one that gets this handler, calls async_save instead.
            raise NotImplementedError("only async_save is called")

        def restore(self, directory, args=None):
            return stored.read_record(directory.parent)

    @ocp.args.register_with_handler(Handler, for_save=True)
    class Arguments(ocp.args.CheckpointArgs):
        def __init__(self, record, leaves):
            self.record, self.leaves = record, leaves

    return Handler, Arguments


def _saver() -> Any:
    """Saves the three items of a step, asynchronously and atomically."""
    ocp = _orbax()
    handler, arguments = _record_item()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ("params", "rest"):
        # no compression: zstd takes 7% off float32 weights and twice the time
        registry.add(item, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
    registry.add("record", arguments, handler())
    # folders are made before `save` returns: where that fails in the background, Orbax's other threads wait for them for minutes
    options = ocp.options.AsyncOptions(timeout_secs=_PATIENCE, create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(handler_registry=registry), async_options=options)


def _save_arguments(leaves: dict[str, jax.Array], record: dict) -> Any:
    ocp = _orbax()
    items = {"record": _record_item()[1](record, leaves)}
    for item, is_in in _ITEMS.items():
        if tree := {name: leaf for name, leaf in leaves.items() if is_in(name)}:
            items[item] = ocp.args.PyTreeSave(tree)
    return ocp.args.Composite(**items)


_ITEMS: dict[str, Callable[[str], bool]] = {"params": stored.is_param, "rest": lambda name: not stored.is_param(name)}


def _read(place: Any, wanted: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """Name -> array, from those items that hold the `wanted`."""
    ocp, found = _orbax(), {}
    for item, is_in in _ITEMS.items():
        if tree := {name: leaf for name, leaf in wanted.items() if is_in(name)}:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                args = ocp.args.PyTreeRestore(tree, restore_args={name: how[name] for name in tree})
                found |= reader.restore(place / item, args=args)
    return found


def _load(place: Any, record: dict, target: Any, only_params: bool = False) -> Any:
    """The checkpoint in `place` as a tree shaped and sharded like `target`."""
    described = {name: leaf for name, leaf in record["leaves"].items() if stored.is_param(name) or not only_params}
    likes = {name: stored.placed(leaf) for name, leaf in trees.named_leaves(target)}
    stored.require_fit(described, likes)
    wanted = {name: stored.stored_like(like) for name, like in likes.items()}
    full = {name: leaf for name, leaf in wanted.items() if leaf.size}
    found = _read(place, full, _orbax().checkpoint_utils.construct_restore_args(full))
    _verify(place, record, found)
    found |= {name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) for name, leaf in wanted.items() if name not in full}
    state = [stored.decode(found[name], like, described[name].get("impl")) for name, like in likes.items()]
    return jax.tree.unflatten(jax.tree.structure(target), state)


def _load_numpy(place: Any, record: dict) -> dict:
    """The params in `place` as nested dicts of NumPy arrays."""
    leaves = {name: leaf for name, leaf in record["leaves"].items() if stored.is_param(name)}
    likes = {name: stored.placed(jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])) for name, leaf in leaves.items()}
    full = {name: like for name, like in likes.items() if like.size}
    found = _read(place, full, dict.fromkeys(full, _orbax().RestoreArgs(restore_type=np.ndarray)))
    _verify(place, record, found)
    params: dict = {}
    for name, like in likes.items():
        *parents, last = name.split("/")
        inside = functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, params)
        array = found.get(name, np.zeros(like.shape, like.dtype))
        inside[last] = np.asarray(stored.decode(array, like, None)) if name in found else array
    return params["params"]


def _verify(place: Any, record: dict, found: dict[str, Any]) -> None:
    """Raises unless every array has the checksum that it had when it was saved."""
    files = [place / "record" / f"checksums.{i}.json" for i in range(record["meta"]["mesh"]["processes"])]
    shares = [json.loads(file.read_text()) for file in files]
    own = stored.own_checksums({name: stored.blocks_of(x) if isinstance(x, jax.Array) else [(x,)] for name, x in found.items()})
    sums = np.array(list(own.values()), np.uint32)
    if jax.process_count() > 1 and any(isinstance(x, jax.Array) for x in found.values()):
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    wrong = [name for name, value in zip(own, sums, strict=True) if value != sum(share.get(name, 0) for share in shares) % 2**32]
    if wrong:
        raise ValueError(f"the checksums of {len(wrong)} arrays differ, the first is {wrong[0]}")
