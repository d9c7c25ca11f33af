"""`bigflax plan` as a whole process: its time, whether the recipes fit their slices, and their temporaries beside MaxText's.

    python tests/benchmarks/bench_plan.py [NAME ...]      some of the rows below; needs libtpu (extra plan) and two quiet cores

MaxText 0.2.5 (jax 0.12.0.1, libtpu 0.0.50) was compiled ahead of time for the same model, mesh, batch, length, full remat, float32 weights and
Adam; its temporaries are the compiler's account, as ours are, from another version of the compiler.
"""

import json
import subprocess
import sys
import time

from report import table

GIB = 2**30
JOBS = {  # recipe and flags, topology, seconds wanted, MaxText's temporaries in GiB
    "gpt2-124m": (["gpt2_124m", "--config.data.batch_size=64"], "v5e:2x2", 60, None),
    "llama3-8b": (["llama3:8b"], "v5e:4x4", 75, 6.14),
    "llama3-8b-tensor": (
        ["llama3:8b", "--config.mesh.fsdp=4", "--config.mesh.tensor=4", "--config.data.batch_size=4"],
        "v5e:4x4",
        None,
        4.15,
    ),
    "llama3-8b-tensor, cut between": (
        [
            "llama3:8b",
            "--config.mesh.fsdp=4",
            "--config.mesh.tensor=4",
            "--config.data.batch_size=4",
            '--config.table.between=("context", "tensor")',
        ],
        "v5e:4x4",
        None,
        4.15,
    ),
    "llama3-70b": (["llama3:70b"], "v5p:4x4x4", 90, 23.15),
    "qwen3-30b-a3b": (["qwen3_30b_a3b"], "v5p:4x4x4", None, None),
}


def main(names: list[str]) -> None:
    rows = []
    for name in names or JOBS:
        (recipe, *flags), topology, wanted, theirs = JOBS[name]
        command = [sys.executable, "-m", "bigflax.main", "plan", f"--config={recipe}", f"--topology={topology}", "--json", *flags]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if not done.stdout.strip():
            raise SystemExit(done.stderr)
        plan = json.loads(done.stdout.splitlines()[-1])
        temporaries = plan["memory"]["temporaries"] / GIB
        rows.append((
            f"{name}, {topology}", f"{seconds:.0f} s", f"{wanted} s" if wanted else "", f"{plan['total'] / GIB:.2f} of {plan['capacity'] / GIB:.2f} GiB",
            "fits" if plan["fits"] else "does not fit", f"{temporaries:.2f} GiB", f"{temporaries / theirs:.2f}" if theirs else "",
            f"{1e3 * plan['step_seconds']:,.0f} ms by {plan['bound_by']}", f"{100 * plan['mfu']:.0f}%",
        ))  # fmt: skip
        print(*rows[-1], sep=" | ", flush=True)
    head = ("job", "whole process", "wanted", "a device", "", "temporaries", "of MaxText's", "a step, at least", "MFU at most")
    table("bigflax plan", head, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
