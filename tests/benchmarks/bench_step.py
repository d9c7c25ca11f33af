"""One training step of a GPT-2 shape: bigflax against transformers in PyTorch, on the CPU.

    pip install -e . "torch>=2.5" "transformers>=5"          (on a machine without a GPU take PyTorch's CPU wheel)
    python tests/benchmarks/bench_step.py [--turns 12] [--layers 3] [--clip 1.0]

Width 768, 3 layers, 12 heads, vocabulary 50257, batch 2 x 256 tokens, AdamW, float32, no dropout; 60.6 million weights. Each library runs
in a process of its own and they take turns, A B A B, through pipes: who waits sleeps, so each has all cores. What slows the machine slows
both, therefore the figure is the median over pairs of turns of the ratio of their times. PyTorch has its fused kernels: `sdpa` attention and
`AdamW(fused=True)`. Both clip by the global norm, or neither; ours measures the norm and watches for non-finite steps in any case.
CPU seconds are those of all threads, busy waiting included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings

import numpy as np
from report import cpu_seconds, spread, table

SHAPE = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_head=12)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0)
BATCH, LENGTH = 2, 256
ADAM = dict(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], (BATCH, LENGTH + 1))


def jax_step(layers: int, clip: float | None, unroll: bool):
    """A function that trains on one batch and returns the loss."""
    import jax

    from bigflax import init_state, make_mesh, models, optim, tasks, train_step

    model = models.create("gpt2", n_layer=layers, unroll=unroll, **SHAPE, **NO_DROPOUT)
    b1, b2 = ADAM["betas"]
    tx = optim.make(lr=ADAM["lr"], steps=1000, kind="constant", b1=b1, b2=b2, weight_decay=ADAM["weight_decay"], clip=clip, axes=model.axes)
    state = init_state(model.init, tx, mesh=make_mesh(devices=jax.devices()[:1]), axes=model.axes)
    step = train_step(tasks.token_loss(model), tx, state)

    def run(ids):
        nonlocal state
        state, metrics = step(state, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        return float(metrics["loss"].value)

    return run


def torch_step(layers: int, clip: float | None):
    """The same in PyTorch. It gets the last token too, since transformers shifts the labels itself: T - 1 of T positions have one."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(os.cpu_count() or 1)
    config = GPT2Config(n_layer=layers, attn_pdrop=0.0, use_cache=False, **SHAPE, **NO_DROPOUT, attn_implementation="sdpa")
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAM)

    def run(ids):
        ids = torch.from_numpy(ids[:, :-1])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def work(library: str, layers: int, clip: float | None, unroll: bool) -> None:
    """Answers each line of standard input, a number of steps, with the seconds a step, its CPU seconds and the last loss."""
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr
    run = torch_step(layers, clip) if library == "pytorch" else jax_step(layers, clip, unroll)
    batches = [tokens(seed) for seed in range(4)]
    for line in sys.stdin:
        began, busy, n = time.perf_counter(), cpu_seconds(), int(line)
        losses = [run(batches[i % len(batches)]) for i in range(n)]
        took = {"wall": (time.perf_counter() - began) / n, "cpu": (cpu_seconds() - busy) / n, "loss": losses[-1]}
        print(json.dumps(took), file=answers, flush=True)


class Worker:
    """A library in a process of its own."""

    def __init__(self, *arguments: str):
        command = [sys.executable, os.path.abspath(__file__), *arguments]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        self.child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turns: list[dict[str, float]] = []

    def turn(self, steps: int) -> dict[str, float]:
        assert self.child.stdin is not None and self.child.stdout is not None
        print(steps, file=self.child.stdin, flush=True)
        answer = self.child.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(map(str, self.child.args))} has ended; its error is above")
        return json.loads(answer)

    def median(self, key: str) -> float:
        return statistics.median(turn[key] for turn in self.turns)

    def ratios(self, other: "Worker", key: str) -> list[float]:
        """Turn by turn, how many times as long the other took."""
        return [theirs[key] / ours[key] for ours, theirs in zip(self.turns, other.turns, strict=True)]


def compare(workers: dict[str, Worker], turns: int, steps: int) -> None:
    for worker in workers.values():
        worker.turn(2)  # compiles, and touches all memory once
    for turn in range(turns):
        for worker in list(workers.values())[:: 1 if turn % 2 == 0 else -1]:  # A B, then B A: neither always comes second
            worker.turns.append(worker.turn(steps))


def show(workers: dict[str, Worker], title: str) -> None:
    ours = workers["bigflax"]
    row = lambda name, w: (
        name, f"{1000 * w.median('wall'):.0f}", f"{BATCH * LENGTH / w.median('wall'):,.0f}", f"{w.median('cpu'):.2f}",
        spread(ours.ratios(w, "wall")), spread(ours.ratios(w, "cpu")),
    )  # fmt: skip
    head = ("step", "ms", "tokens/s", "CPU s", "time / bigflax's", "CPU time / bigflax's")
    table(title, head, [row(name, worker) for name, worker in workers.items()])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2, help="a turn")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--clip", type=float, default=None)
    parser.add_argument("--unroll", action="store_true")
    parser.add_argument("--worker", choices=("bigflax", "pytorch"))
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.layers, args.clip, args.unroll)
    passed = [f"--layers={args.layers}", *([f"--clip={args.clip}"] if args.clip else []), *(["--unroll"] if args.unroll else [])]
    workers = {name: Worker(f"--worker={name}", *passed) for name in ("bigflax", "pytorch")}
    try:
        compare(workers, args.turns, args.steps)
    finally:
        for worker in workers.values():
            worker.child.kill()
    clip = "no clipping" if args.clip is None else f"clipped at norm {args.clip:g}"
    show(
        workers,
        f"GPT-2 shape, {args.layers} layers, {BATCH} x {LENGTH} tokens, float32, AdamW, {clip}; {args.turns} turns of {args.steps} steps",
    )


if __name__ == "__main__":
    main()
