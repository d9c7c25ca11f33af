"""Running virtual shards: in this process, in worker processes, and ahead of time in a thread.

A worker is `python -m bigflax.data.rows`: it reads its task (cloudpickle) from stdin and writes frames to stdout until the pipe closes.
So a script needs no `if __name__ == "__main__"` for its sake, nothing is forked from a process with threads and devices, and a worker
cannot outlive its parent. Left out on purpose: shared memory between processes (a pipe moves about 1 GB/s; a worker's decoding is far
slower).
"""

import contextlib
import dataclasses
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any, Protocol

import numpy as np

from bigflax.data.packing import IGNORED


@dataclasses.dataclass
class Frame:
    """One step of some shards: their rows (dict of arrays [<= B/S, ...], None when ended), the positions after them, and all bad records
    so far.
    """

    rows: dict[int, dict[str, np.ndarray] | None]
    positions: dict[str, Any]
    bad: dict[str, str]


class Rows:
    """Steps through `shards` side by side, `rows` examples of each a step."""

    def __init__(self, local: list[int], make_shard, shards: int, rows: int, positions: dict[str, Any], quality=None):
        self._rows, self._quality = rows, quality
        self._iterators = {shard: iter(make_shard(shard, shards)) for shard in local}
        for shard, iterator in self._iterators.items():
            if str(shard) in positions:
                iterator.set_state(positions[str(shard)])

    def step(self) -> Frame:
        found = {shard: self._take(iterator) for shard, iterator in self._iterators.items()}
        positions = {str(shard): iterator.get_state() for shard, iterator in self._iterators.items()}
        return Frame(found, positions, dict(self._quality.bad) if self._quality is not None else {})

    def _take(self, iterator) -> dict[str, np.ndarray] | None:
        examples = []
        for _ in range(self._rows):
            try:
                examples.append(next(iterator))
            except StopIteration:
                break
        if not examples:
            return None
        try:
            return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        except (ValueError, KeyError) as error:
            shapes = [{key: np.shape(value) for key, value in example.items()} for example in examples]
            raise ValueError(f"examples of a batch must have the same keys and shapes, not {shapes[:3]}") from error

    def interrupt(self) -> None:
        """Nothing to wake: a step here ends by itself."""

    def close(self) -> None:
        self._iterators.clear()


def join(frames: list[Frame]) -> Frame:
    merged = Frame({}, {}, {})
    for frame in frames:
        merged.rows.update(frame.rows)
        merged.positions.update(frame.positions)
        merged.bad.update(frame.bad)
    return merged


def describe(frame: Frame) -> dict[str, tuple] | None:
    """Shape and dtype of one row, by key; None where the frame holds no row."""
    rows = next((rows for rows in frame.rows.values() if rows), None)
    return None if rows is None else {key: (value.shape[1:], value.dtype) for key, value in rows.items()}


def blank(spec: dict[str, tuple], rows: int) -> dict[str, np.ndarray]:
    """Rows of padding: labels, of whatever side, -100, everything else 0."""
    return {key: np.full((rows, *shape), IGNORED if key.endswith("labels") else 0, dtype) for key, (shape, dtype) in spec.items()}


class WorkerRows:
    """`Rows` in a process of its own."""

    def __init__(self, *task):
        import cloudpickle

        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # the CPU alone: a worker must never take the accelerator that its parent holds
        environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("XLA_FLAGS", None)
        command = [sys.executable, "-m", "bigflax.data.rows"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(cloudpickle.dumps(task))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died; step() says so

    def step(self) -> Frame:
        assert self._process.stdout is not None
        try:
            result = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError, ValueError) as error:
            raise RuntimeError(f"a data worker (process {self._process.pid}) ended unexpectedly; its own message is above") from error
        if isinstance(result, Frame):
            return result
        error, trace = result
        error.add_note(f"in a data worker:\n{trace}")
        raise error

    def interrupt(self) -> None:
        """Wakes whoever waits in step(), from another thread."""
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def work() -> None:
    """The worker's main: frames to what was stdout, everything that prints to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # both go to the whole group; the parent decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        import cloudpickle

        rows = Rows(*cloudpickle.loads(sys.stdin.buffer.read()))
        while True:
            pickle.dump(rows.step(), out, protocol=5)
            out.flush()
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump((error, trace), out)
        out.flush()


class Producer(Protocol):
    def __call__(self) -> Any: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class Ahead:
    """Runs `produce()` in a thread, at most `depth` results ahead; `get()` gives them in order and raises what it raised."""

    def __init__(self, produce: Producer, depth: int):
        self._produce, self._queue, self._stopping = produce, queue.Queue(depth), threading.Event()
        self._thread = threading.Thread(target=self._run, name="bigflax-data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                result = (self._produce(), None)
            except BaseException as error:
                result = (None, error)
            while not self._stopping.is_set():
                try:
                    self._queue.put(result, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if result[1] is not None:
                return

    def get(self) -> Any:
        result, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # asked again, the same answer
            raise error
        return result

    def stop(self) -> None:
        """Ends the thread; returns when it has ended, so that nothing of it runs while the interpreter shuts down."""
        self._stopping.set()
        self._produce.interrupt()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()  # makes room, so that a thread waiting for it wakes at once
        self._thread.join()
        self._produce.close()


if __name__ == "__main__":
    # as the imported module, not as __main__: the parent must find the class of what it unpickles
    from bigflax.data import rows

    rows.work()
