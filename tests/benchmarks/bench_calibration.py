"""What calibrating a model takes beside its weights, in layers of a 7B Llama: their codes, and never a second time their floats.

    python tests/benchmarks/bench_calibration.py [--layers 2 8] [--method smoothquant] [--format int8] [--dtype bfloat16]

Each number of layers is a process of its own: it makes the model, notes its memory, and compresses it by what goes into its matrices. What
more layers take more at the peak, over what they weigh more, is what each byte of a large model costs; all else (a compiler, one layer's statistics, its
float32 copies) is the same for both. A CPU keeps a code of 4 bits in a byte. Linux only.
"""

import argparse
import os
import subprocess
import sys

GROWN = r"""
import re, sys, time
import jax, numpy as np
from bigflax import compress, models, trees
layers, heads, tokens = map(int, sys.argv[1:4])
width, mlp = map(int, sys.argv[4:6])
dtype, method, form = sys.argv[6:]
model = models.create("llama", vocab_size=256, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads, dtype=dtype)
params = jax.jit(lambda key: jax.tree.map(lambda w: w.astype(dtype), model.init(key)))(jax.random.key(0))
ids = np.random.default_rng(0).integers(0, 256, (2, tokens // 2)).astype(np.int32)
forward = lambda params, batch: model.apply(params, **batch)
jax.block_until_ready(params)
time.sleep(2)  # until what making them took is given back
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, began = peak(), time.perf_counter()
rules = [("blocks/.*/(q|k|v|out|up|gate|down)", form)]
small = compress.quantize(model, params, rules, method=method, forward=forward, batches=[{"input_ids": ids}])
jax.block_until_ready(small)
print(peak() - before, trees.nbytes(params), trees.nbytes(small), time.perf_counter() - began)
"""


def grown(layers: int, *, heads: int, tokens: int, width: int, mlp: int, dtype: str, method: str, form: str) -> tuple[float, ...]:
    """(bytes that the peak grew by, bytes of the weights, bytes of what became of them, seconds)."""
    # what is freed goes back to the system at once: left to itself, glibc keeps it for the next array
    told = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1", "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    said = [*map(str, (layers, heads, tokens, width, mlp)), dtype, method, form]
    done = subprocess.run([sys.executable, "-c", GROWN, *said], capture_output=True, text=True, env=told)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return tuple(map(float, done.stdout.split()[-4:]))


def main() -> None:
    from report import table

    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 8])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--method", default="smoothquant")
    parser.add_argument("--format", default="int8")
    args = parser.parse_args()
    rows, sizes = [], dict(heads=args.heads, tokens=args.tokens, width=args.width, mlp=args.mlp, dtype=args.dtype)
    found = [grown(layers, **sizes, method=args.method, form=args.format) for layers in args.layers]
    for layers, (peak, weights, small, seconds) in zip(args.layers, found, strict=True):
        rows.append((layers, f"{weights / 2**30:.2f}", f"{small / 2**30:.2f}", f"{peak / 2**30:.2f}", f"{seconds:.0f}"))
    (less, light, *_), (more, heavy, *_) = found
    rows.append(
        (
            f"for each byte of {args.layers[1] - args.layers[0]} more",
            "1",
            f"{(found[1][2] - found[0][2]) / (heavy - light):.3f}",
            f"{(more - less) / (heavy - light):.3f}",
            "",
        )
    )
    table(
        f"{args.method} to {args.format}, width {args.width}, GiB",
        ("layers", f"weights, {args.dtype}", "afterwards", "peak's growth", "s"),
        rows,
    )


if __name__ == "__main__":
    main()
