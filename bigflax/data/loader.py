"""From virtual shards to global batches: the same batches on any number of hosts, devices and worker processes, resumable to the batch.

A stream is S virtual shards; shard v gives the rows [v B/S, (v+1) B/S) of every global batch of B rows. S belongs to the stream, not to
the machine. A process runs the shards whose rows its devices hold (rows.py, here or in worker processes), a thread assembles batches
ahead and puts them on the devices, and the position that `state()` returns is the one after the last batch handed out, shard by shard,
so any other layout can take over. A finite stream ends when its last shard does; until then rows that are missing are padding: labels
-100, everything else 0. Left out on purpose: exchanging records between hosts (none is needed) and dropping the last, partial batch
(evaluation counts every token once).

Legend: B batch, S virtual shards.
"""

import dataclasses
import functools
import json
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigflax.data.rows import Ahead, Frame, Rows, WorkerRows, blank, describe, join
from bigflax.sharding import batch_sharding, check_batch

MAX_SHARDS = 64
Batch = dict[str, jax.Array]


def virtual_shards(batch_size: int, most: int = MAX_SHARDS) -> int:
    """The largest divisor of the batch size that is at most `most`."""
    return max(d for d in range(1, min(batch_size, most) + 1) if batch_size % d == 0)


class Loader:
    """Iterates over global batches, dicts of jax.Array with a leading axis B.

    make_shard(shard, shards) -> grain.IterDataset of examples of fixed shape (dicts of arrays). `finite`: the stream ends (hosts then agree
    on the end, one small exchange a batch). `workers`: processes that run the shards of this host; the batches do not depend on it.
    `prefetch`: batches made ahead. `identity`: what describes the stream (JSON); a state with another one is refused.
    `stall`: seconds that next() has waited so far. `batches`: how many were handed out.
    """

    def __init__(
        self,
        make_shard: Callable[[int, int], grain.IterDataset],
        *,
        batch_size: int,
        mesh: Mesh | None = None,
        shards: int | None = None,
        finite: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        quality=None,
        identity: dict[str, Any] | None = None,
    ):
        if batch_size < 1 or prefetch < 1 or workers < 0:
            raise ValueError(f"batch_size {batch_size} and prefetch {prefetch} must be at least 1, workers {workers} at least 0")
        if mesh is not None:
            check_batch(batch_size, mesh)
        self.batch_size, self.shards = batch_size, shards or virtual_shards(batch_size)
        if batch_size % self.shards:
            nearest = virtual_shards(batch_size, self.shards)
            raise ValueError(f"batch {batch_size} does not divide over {self.shards} virtual shards; shards={nearest} does")
        self._make_shard, self._finite, self._workers, self._prefetch = make_shard, finite, workers, prefetch
        self._quality, self._identity = quality, json.loads(json.dumps(identity))
        self._sharding = None if mesh is None else batch_sharding(mesh)
        self._local = self._local_shards()
        self._positions: dict[str, Any] = {}
        self._ahead: Ahead | None = None
        self._ended = False
        self.batches, self.stall = 0, 0.0

    @property
    def rows_per_shard(self) -> int:
        return self.batch_size // self.shards

    def _local_shards(self) -> list[int]:
        if self._sharding is None:
            return list(range(self.shards))
        held = self._sharding.addressable_devices_indices_map((self.batch_size,)).values()
        spans = {index[0].indices(self.batch_size)[:2] for index in held}  # pyright: ignore[reportOptionalSubscript]
        return sorted({v for start, stop in spans for v in range(start // self.rows_per_shard, -(-stop // self.rows_per_shard))})

    # -- iteration --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Continues where it stands; after the end of a finite stream, starts again."""
        if self._ended:
            self._reset({}, 0)
        return self

    def start(self) -> None:
        """Begins to read ahead; next() does it too. Worth calling before a long compilation."""
        if self._ahead is None:
            self._ahead = Ahead(self._assembly(), self._prefetch)
            self._finalizer = weakref.finalize(self, self._ahead.stop)  # when collected, and before the interpreter ends

    def __next__(self) -> Batch:
        if self._ended:
            raise StopIteration
        self.start()
        assert self._ahead is not None
        began = time.perf_counter()
        batch, positions, ended = self._ahead.get()
        self.stall += time.perf_counter() - began
        if self._agree(ended):
            self._ended = True
            self._stop()
            raise StopIteration
        self._positions, self.batches = positions, self.batches + 1
        return batch

    def _agree(self, ended: bool) -> bool:
        """Whether the shards of all hosts have ended. In the main thread, where every host makes its collectives in one order."""
        if not self._finite or self._sharding is None or jax.process_count() == 1:
            if ended and jax.process_count() > 1 and self._sharding is not None:
                raise RuntimeError("a stream declared endless (finite=False) has ended on this host; pass finite=True")
            return ended
        from jax.experimental import multihost_utils

        return bool(np.all(multihost_utils.process_allgather(np.asarray(ended))))

    def _assembly(self) -> "Assembly":
        options = (self._make_shard, self.shards, self.rows_per_shard, self._positions, self._quality)
        if self._workers:
            sources = [WorkerRows(part, *options) for w in range(self._workers) if (part := self._local[w :: self._workers])]
        else:
            sources = [Rows(self._local, *options)]
        layout = Layout(self._local, self.rows_per_shard, self.batch_size, self._sharding)
        return Assembly(
            sources, layout, dict(self._positions), self._quality, lambda make=self._make_shard, n=self.shards: describe_any(make, n)
        )

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able position after the last batch handed out, of all shards on all hosts. With several hosts, all must call it together."""
        positions = self._positions
        if self._sharding is not None and jax.process_count() > 1:
            positions = {k: v for part in gather(positions) for k, v in part.items()}
        ordered = {k: positions[k] for k in sorted(positions, key=int)}
        return {"version": 1, "batches": self.batches, "shards": self.shards, "identity": self._identity, "positions": ordered}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`, exactly; the mesh, the number of hosts and of workers may differ from those that saved it."""
        if state["shards"] != self.shards:
            raise ValueError(
                f"the saved data position has {state['shards']} virtual shards, this loader {self.shards} (batch size {self.batch_size}); "
                f"pass shards={state['shards']} to continue, or start the data anew"
            )
        saved, here = state["identity"] or {}, self._identity or {}
        changed = [key for key in {**saved, **here} if saved.get(key) != here.get(key)]
        if changed:
            changes = ", ".join(f"{key} ({_short(saved.get(key))} -> {_short(here.get(key))})" for key in changed)
            raise ValueError(f"the data stream is not the one that was saved; changed: {changes}")
        self._reset({k: v for k, v in state["positions"].items() if int(k) in set(self._local)}, state["batches"])

    def _reset(self, positions: dict[str, Any], batches: int) -> None:
        self._stop()
        self._positions, self.batches, self._ended = positions, batches, False

    def _stop(self) -> None:
        if self._ahead is not None:
            self._finalizer()
            self._ahead = None

    @functools.cached_property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a global batch."""
        found = describe_any(self._make_shard, self.shards)
        return {key: jax.ShapeDtypeStruct((self.batch_size, *shape), dtype) for key, (shape, dtype) in found.items()}

    @property
    def bad(self) -> int:
        """Different bad records met so far by this process."""
        return 0 if self._quality is None else len(self._quality.bad)

    def close(self) -> None:
        """Ends the thread and the workers; a closed loader starts again when asked for a batch."""
        self._stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the rows of the local shards lie in the global batch."""

    local: list[int]
    rows: int
    batch_size: int
    sharding: NamedSharding | None

    def fill(self, frame: Frame, spec: dict[str, tuple]) -> dict[str, np.ndarray]:
        """The rows of the local shards, one after another; padding where a shard has ended."""
        host = blank(spec, len(self.local) * self.rows)
        for at, shard in enumerate(self.local):
            for key, value in (frame.rows.get(shard) or {}).items():
                host[key][at * self.rows : at * self.rows + len(value)] = value
        return host

    def place(self, host: dict[str, np.ndarray]) -> Batch:
        """Global arrays over the mesh."""
        if self.sharding is None:
            return jax.device_put(host)
        shape = {key: (self.batch_size, *value.shape[1:]) for key, value in host.items()}
        return {key: jax.make_array_from_callback(shape[key], self.sharding, functools.partial(self._piece, host[key])) for key in host}

    def _piece(self, value: np.ndarray, index) -> np.ndarray:
        start, stop, _ = index[0].indices(self.batch_size) if index else (0, self.batch_size, 1)
        offset = (
            self.local.index(start // self.rows) * self.rows + start % self.rows
        )  # shards between start and stop are local too, and adjacent
        return value[offset : offset + stop - start]


class Assembly:
    """What the thread runs: one call, one (batch, positions after it, whether all local shards have ended). Must not hold the Loader: it
    would never be collected.
    """

    def __init__(self, sources, layout: Layout, positions: dict[str, Any], quality, describe_empty):
        self._sources, self._layout, self._positions, self._quality, self._describe_empty = (
            sources,
            layout,
            positions,
            quality,
            describe_empty,
        )
        self._spec: dict[str, tuple] | None = None

    def __call__(self) -> tuple[Batch, dict[str, Any], bool]:
        frame = join([source.step() for source in self._sources])
        self._positions.update(frame.positions)
        if self._quality is not None and frame.bad:
            self._quality.bad.update(frame.bad)
            self._quality.check_limit()  # the workers' together
        self._spec = self._spec or describe(frame) or self._describe_empty()
        return self._layout.place(self._layout.fill(frame, self._spec)), dict(self._positions), not any(frame.rows.values())

    def interrupt(self) -> None:
        for source in self._sources:
            source.interrupt()

    def close(self) -> None:
        for source in self._sources:
            source.close()


def describe_any(make_shard, shards: int) -> dict[str, tuple]:
    """Shapes and dtypes of an example from whichever shard has one: all of this host's may be empty."""
    for shard in range(shards):
        for example in make_shard(shard, shards):
            return {key: (np.shape(value), np.asarray(value).dtype) for key, value in example.items()}
    raise ValueError("the stream holds no example: all records are bad, or none is left in this split")


def gather(value: Any) -> list[Any]:
    """`value` (JSON) of every process, in order."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray(len(data))))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    every = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:20] + "..."
