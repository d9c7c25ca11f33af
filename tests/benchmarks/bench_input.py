"""Input: how fast text becomes batches, and how long a training step waits for it.

    python tests/benchmarks/bench_input.py [--steps 60]

The corpus is the Python standard library's source text, the tokenizer a byte-level BPE of 8192 tokens trained on it. First the loader alone
(tokenizing, packing and assembling, one thread), then under `fit` with the step of bench_step.py, with the loader's thread on the same
cores. `stall` is what `fit` reports: waiting for a batch while the device has nothing to do. `waiting` is all time inside next(loader).
"""

import argparse
import statistics
import time

import jax
from report import cpu_seconds, table

from bigflax import data, fit, init_state, make_mesh, models, optim, tasks, train_step

BATCH, LENGTH = 2, 256


def alone(loader: data.Loader, batches: int = 1000) -> tuple[float, float, float]:
    """(tokens a second, tokens a CPU second, share of positions that hold a token) of the loader alone, after its first 50 batches."""
    for _ in range(50):
        next(loader)
    began, busy = time.perf_counter(), cpu_seconds()
    full = sum(int((next(loader)["labels"] >= 0).sum()) for _ in range(batches))
    return full / (time.perf_counter() - began), full / (cpu_seconds() - busy), full / (batches * BATCH * LENGTH)


def training(loader: data.Loader, steps: int) -> list[dict[str, float]]:
    """What `fit` reports of each fifth of the steps, the first fifth (compilation) left out."""
    model = models.create("gpt2", n_layer=3, resid_pdrop=0.0, embd_pdrop=0.0)
    tx = optim.make(lr=3e-4, steps=steps, axes=model.axes)
    state = init_state(model.init, tx, mesh=make_mesh(devices=jax.devices()[:1]), axes=model.axes)
    records = []

    def write(step, record):
        records.append({**record, "waited": loader.stall, "time": time.perf_counter()})

    fit(state, train_step(tasks.token_loss(model), tx, state), loader, steps=steps, log_every=steps // 5, write=write)
    return records


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    source = data.open_source("python")
    records = data.Records(source, data.Quality(), "train")
    began = time.perf_counter()
    tokenizer = data.train_bpe(data.sample_texts(records), 8192, max_bytes=2_000_000)
    trained = time.perf_counter() - began
    began = time.perf_counter()
    with data.text_batches(source, tokenizer, length=LENGTH, batch_size=BATCH) as loader:
        next(loader)
        first = time.perf_counter() - began
        rate, cpu_rate, full = alone(loader)
    with data.text_batches(source, tokenizer, length=LENGTH, batch_size=BATCH) as loader:
        seen = training(loader, args.steps)
    speed, stall = (statistics.median(r[name] for r in seen[1:]) for name in ("tokens_per_second", "data_stall"))
    waiting = (seen[-1]["waited"] - seen[0]["waited"]) / (seen[-1]["time"] - seen[0]["time"])
    rows = [
        ("training the tokenizer on 2 MB", f"{trained:.1f} s"),
        ("first batch", f"{first:.2f} s"),
        ("loader alone, tokens/s", f"{rate:,.0f}"),
        ("loader alone, tokens/CPU s", f"{cpu_rate:,.0f}"),
        ("positions that hold a token", f"{full:.1%}"),
        ("training, tokens/s", f"{speed:,.0f}"),
        ("input stall, share of time", f"{stall:.2%}"),
        ("waiting in next(), share of time", f"{waiting:.2%}"),
        ("input's share of the two cores' time", f"{speed / cpu_rate / 2:.2%}"),
    ]
    table(f"Input: {len(source)} files of the standard library, batches of {BATCH} x {LENGTH}", ("", "figure"), rows)


if __name__ == "__main__":
    main()
