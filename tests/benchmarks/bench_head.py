"""The loss head against the naive one: memory planned by the TPU compiler, and time on this CPU.

    pip install -e . "libtpu==0.0.42.*"          (what jax[tpu] pins for your JAX; without it the first table is left out)
    python tests/benchmarks/bench_head.py [--turns 9]

Both heads are `loss(x, w, labels)` and its gradients in x and w, of bfloat16 x and float32 w on the TPU and float32 on the CPU. Naive is
optax over logits that are all there, in the precision that ours has (a product of bfloat16 summed in float32), and "narrow" the same over
logits rounded to bfloat16, of which XLA makes a float32 copy too. Temporaries are the compiler's own for one chip of a v5e: the gradients are
outputs and do not count. It compiles in a process of its own, for libtpu looks for a TPU at start. On the CPU the heads take turns, A B A B, in
one process, and the figure is the median over pairs of turns of the ratio of their times.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

from report import spread, table

SHAPES = {"8,192 tokens, V 131,072, D 4096": (2, 4096, 4096, 131072), "8,192 tokens, V 131,072, D 1024": (2, 4096, 1024, 131072)}
ON_CPU = {"512 tokens, V 50,257, D 768": (2, 256, 768, 50257), "1,024 tokens, V 32,000, D 512": (4, 256, 512, 32000)}
TPU = dict(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)  # fmt: skip


def heads():
    """name -> loss(x, w, labels)."""
    import jax.numpy as jnp
    import optax

    from bigflax import ops

    def naive(dtype):
        def loss(x, w, labels):
            logits = jnp.einsum("btd,vd->btv", x, w.astype(x.dtype), preferred_element_type=dtype)
            return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()

        return loss

    ours = lambda x, w, labels: ops.linear_cross_entropy(x, w, labels)[0].mean()
    return {"naive": naive(jnp.float32), "narrow": naive(jnp.bfloat16), "bigflax": ours}


def plan() -> None:
    """Prints the temporaries of each head and shape as JSON."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from bigflax import sharding

    mesh = sharding.make_mesh(devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:1])
    found = {}
    for shape, (B, T, D, V) in SHAPES.items():
        like = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))
        arrays = like(jnp.bfloat16, B, T, D), like(jnp.float32, V, D), like(jnp.int32, B, T)
        for name, loss in heads().items():
            with sharding.tracing_on(mesh):
                step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays)
            found.setdefault(shape, {})[name] = step.compile().memory_analysis().temp_size_in_bytes
    print(json.dumps(found))


def show_plan() -> None:
    if importlib.util.find_spec("libtpu") is None:
        print("\nlibtpu is not installed, so there is no TPU compiler to ask; take the version that jax[tpu] pins")
        return
    child = subprocess.run([sys.executable, os.path.abspath(__file__), "--plan"], env={**os.environ, **TPU}, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(child.stderr[-2000:])
    rows = []
    for shape, found in json.loads(child.stdout.splitlines()[-1]).items():
        share = lambda name, found=found: f"{found['bigflax'] / found[name]:.3f}"
        rows.append((shape, *(f"{found[name] / 2**20:,.0f}" for name in found), share("naive"), share("narrow")))
    table("Temporaries on one chip of a v5e, MiB", ("shape", "naive", "narrow", "bigflax", "bigflax / naive", "bigflax / narrow"), rows)


def show_times(turns: int) -> None:
    import jax
    import numpy as np

    rows = []
    for shape, (B, T, D, V) in ON_CPU.items():
        rng = np.random.default_rng(0)
        arrays = tuple(jax.numpy.asarray(a, "float32") for a in (rng.normal(size=(B, T, D)), rng.normal(size=(V, D)) / D**0.5))
        labels = jax.numpy.asarray(rng.integers(0, V, (B, T)))
        steps = {name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))) for name, loss in heads().items() if name != "narrow"}
        took = {name: [] for name in steps}
        for turn in range(turns + 1):  # the first compiles
            for name in [*steps][:: 1 if turn % 2 == 0 else -1]:
                began = time.perf_counter()
                jax.block_until_ready(steps[name](*arrays, labels))
                took[name].append(time.perf_counter() - began)
        ratios = [ours / theirs for ours, theirs in zip(took["bigflax"][1:], took["naive"][1:], strict=True)]
        rows.append((shape, *(f"{1000 * sorted(times[1:])[turns // 2]:.0f}" for times in took.values()), spread(ratios)))
    table(f"Time on this CPU, float32, {turns} pairs of turns", ("shape", "naive ms", "bigflax ms", "bigflax / naive"), rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--plan", action="store_true", help="only print what the TPU compiler plans, as JSON")
    args = parser.parse_args()
    if args.plan:
        return plan()
    show_plan()
    os.environ["JAX_PLATFORMS"] = "cpu"
    show_times(args.turns)


if __name__ == "__main__":
    main()
