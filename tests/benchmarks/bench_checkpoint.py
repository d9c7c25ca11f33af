"""Checkpoints: how long an asynchronous save holds up training, beside a synchronous one of the same state.

    python tests/benchmarks/bench_checkpoint.py [--million 100] [--turns 3] [--folder DIR]

The state has 100 million float32 weights and Adam's two moments, 1.2 GB, in arrays of a model's sizes. `blocking` is the time inside `save`,
with nothing else running; the step after it donates the state, as training does, and is timed beside the same step without a save, because
what `save` leaves to be copied would appear there. The turns alternate between the two kinds; each save is waited for before the next.
"""

import argparse
import contextlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import optax
from report import spread, table

from bigflax import Checkpoints, init_state, make_mesh, train_step

WIDTH = 1000


def make(million: int):
    """A state of `million` matrices 1000 x 1000 (stacked by tens, as layers are), and a step that touches every one of them."""
    stacks, rest = divmod(million, 10)
    sizes = [10] * stacks + [rest] * bool(rest)
    init = lambda rng: {f"w{i}": jax.random.normal(jax.random.fold_in(rng, i), (n, WIDTH, WIDTH)) for i, n in enumerate(sizes)}
    tx = optax.adam(1e-3)
    state = init_state(init, tx, mesh=make_mesh(devices=jax.devices()[:1]))
    loss = lambda params, batch, rng: sum(jnp.sum(jnp.square(w)) for w in params.values()) / WIDTH**2
    return state, train_step(loss, tx, state)


def timed(function) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


class Measured:
    """Trains and saves, in turns, and keeps the times by name."""

    def __init__(self, million: int, folder: str):
        self.state, self.step = make(million)
        self.kinds = {
            kind: Checkpoints(f"{folder}/{kind}", keep=1, asynchronous=kind == "asynchronous") for kind in ("asynchronous", "synchronous")
        }
        self.times: dict[str, list[float]] = {}
        self.train("compiling")
        for checkpoints in self.kinds.values():  # the first save of a process imports Orbax and starts its threads
            checkpoints.save(0, {"params": jnp.zeros(8)})
            checkpoints.wait()

    def keep(self, name: str, seconds: float) -> None:
        self.times.setdefault(name, []).append(seconds)

    def train(self, name: str) -> None:
        def one():
            self.state, _ = self.step(self.state, None)
            return self.state

        self.keep(name, timed(one))

    def turn(self, number: int) -> None:
        for kind, checkpoints in self.kinds.items():
            self.train("step alone")
            self.keep(kind, timed(lambda checkpoints=checkpoints: checkpoints.save(number, self.state)))
            self.train(f"step after {kind}")
            self.keep(f"{kind}, written", timed(checkpoints.wait))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--million", type=int, default=100)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        measured = Measured(args.million, stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
        for checkpoints in measured.kinds.values():
            stack.enter_context(checkpoints)
        for turn in range(1, args.turns + 1):
            measured.turn(turn)
    times = measured.times
    share = [a / s for a, s in zip(times["asynchronous"], times["synchronous"], strict=True)]
    later = statistics.median(times["step after asynchronous"]) - statistics.median(times["step alone"])
    rows = [
        ("synchronous save, s", spread(times["synchronous"])),
        ("asynchronous save, blocking, s", spread(times["asynchronous"])),
        ("share of the synchronous save", f"{statistics.median(share):.1%}"),
        ("step alone, s", spread(times["step alone"])),
        ("step after an asynchronous save, s", spread(times["step after asynchronous"])),
        (
            "blocking and slower step together, share",
            f"{(statistics.median(times['asynchronous']) + later) / statistics.median(times['synchronous']):.1%}",
        ),
    ]
    table(
        f"Checkpoints: {args.million} million float32 weights with Adam, {0.012 * args.million:.1f} GB, {args.turns} turns",
        ("", "figure"),
        rows,
    )


if __name__ == "__main__":
    main()
