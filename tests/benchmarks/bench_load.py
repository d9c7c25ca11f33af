"""Loading a Hugging Face folder: bigflax against transformers in PyTorch, time and peak memory, in turns.

    pip install -e . "torch>=2.5" "transformers>=5"
    python tests/benchmarks/bench_load.py [--turns 7] [--layers 16] [--dtype float32]

The folder is a Llama of 1.1 GB made on the spot (width 1024, 16 layers), in four files. Each turn is a process of its own: it imports its
library, notes the clock and its memory, loads, and reads every weight once (a mapped file is not loaded until it is read). Time is from
there to here; memory is the growth of the process's peak, mapped pages of the file included, over the bytes of the weights. The files are in
the page cache for both.

PyTorch's weights are views of the mapped file, which the system copies page by page when an optimizer first writes to them: the last row
includes that. Ours lie as our products want them, stacked by layers, inputs before outputs: each number is moved once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from report import spread, table

OURS = r"""
import json, re, sys, time
import jax, jax.numpy as jnp, numpy as np
import safetensors
import bigflax
from bigflax import hub
from bigflax.models.families import llama
jax.block_until_ready(jnp.zeros(1))
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before, began = peak(), time.perf_counter()
model, params = bigflax.load(sys.argv[1], dtype=sys.argv[2])
total = sum(int(np.asarray(w).view(f"u{w.dtype.itemsize}").max()) for w in jax.tree.leaves(params))
"""
THEIRS = r"""
import json, re, sys, time
import torch, transformers
from transformers.models.llama import modeling_llama
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before, began = peak(), time.perf_counter()
model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
total = sum(float(w.sum()) for w in model.parameters())
"""
WRITTEN = """
with torch.no_grad():
    for w in model.parameters():
        w.add_(0)
"""
END = "print(json.dumps({'seconds': time.perf_counter() - began, 'memory': peak() - before, 'total': total}))"


def turn(program: str, folder: str, dtype: str) -> dict[str, float]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", program + END, folder, dtype], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def make(folder: str, layers: int) -> int:
    """Writes the folder; returns its bytes."""
    import jax

    import bigflax
    from bigflax import models, trees

    config = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16, vocab_size=8000)
    model = models.create("llama", **config)
    bigflax.save(model, jax.jit(model.init)(jax.random.key(0)), folder, shard_bytes=2**28)
    return trees.nbytes(model.shapes())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    programs = {"bigflax": OURS, "transformers": THEIRS, "transformers, written to once": THEIRS + WRITTEN}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        stored = make(folder, args.layers)
        weights = stored if args.dtype == "float32" else stored // 2
        for number in range(args.turns + 1):
            for name in list(programs)[:: 1 if number % 2 == 0 else -1]:
                times[name].append(turn(programs[name], folder, args.dtype))
    ours = times["bigflax"][1:]  # the first turn brings the files into the page cache
    rows = []
    for name, turns in times.items():
        of = lambda key, turns=turns: [t[key] for t in turns[1:]]
        ratio = lambda key, turns=turns: spread([t[key] / o[key] for t, o in zip(turns[1:], ours, strict=True)])
        share = f"{statistics.median(of('memory')) / weights:.2f}"
        rows.append((name, f"{statistics.median(of('seconds')):.2f}", ratio("seconds"), share, ratio("memory")))
    table(
        f"Loading {stored / 1e9:.2f} GB of float32 weights in files of 0.27 GB as {args.dtype}, {args.turns} turns",
        ("library", "seconds", "time / bigflax's", "peak / weights", "peak / bigflax's"),
        rows,
    )


if __name__ == "__main__":
    main()
