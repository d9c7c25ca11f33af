"""`bigflax VERB`: flags and a recipe, and the calls they stand for.

    bigflax train [--config=quickstart] [--config.key=value ...]      train, or continue what the work folder holds
    bigflax config show [--diff]                                      the resolved recipe, or what it changes of the defaults
    bigflax plan --topology=v5e:4x4 [--config=RECIPE]                 memory, time and money of a step on chips that are not here
    bigflax generate --work=runs/quickstart --prompt="def "           continue a prompt with a trained model
    bigflax convert SOURCE FOLDER [--dtype=bfloat16] [--adapter]      a run, or a folder or hub id, written as a Hugging Face folder
    bigflax convert SOURCE FILE.gguf [--dtype=q8_0]                   the same, as one file for llama.cpp
    bigflax compress --work=RUN --recipe=int4-gptq [--max-loss=1%]    a trained model made small, step by step, with a report
    bigflax parity FOLDER                                             the same model here and in PyTorch, compared

What a person did wrong ends in one sentence and exit code 2; a stop signal in exit code 75, everything saved; a host that fell silent ends
the others in exit code 134 (hosts.py).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from bigflax import __version__


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", default="quickstart", metavar="RECIPE", help="a recipe's name or file, with :variant if it has any")
    devices = argparse.ArgumentParser(add_help=False)
    devices.add_argument("--fake-devices", type=int, metavar="N", help="run on N fake CPU devices")
    devices.add_argument("--cache", default=None, metavar="DIR", help='compilation cache; "" for none (default: under ~/.cache)')
    hosts = argparse.ArgumentParser(add_help=False)
    hosts.add_argument("--hosts", type=int, metavar="N", help="processes in all; 0 finds them (Cloud TPU, GKE, Slurm)")
    hosts.add_argument("--host", type=int, metavar="I", help="index of this process")
    hosts.add_argument("--coordinator", metavar="ADDRESS:PORT", help="where process 0 listens")
    hosts.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="how long to wait for the other processes at the start")

    top = argparse.ArgumentParser(
        prog="bigflax",
        description="Train large models with JAX, and make them small.",
        epilog="--config.key=value overrides any key of a recipe.",
    )
    top.add_argument("--version", action="version", version=f"bigflax {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", parents=[common, devices, hosts], help="train, or continue what the work folder holds")
    train.add_argument("--seeds", type=int, metavar="N", help="train N times, with seeds of their own, and say mean and deviation")
    train.add_argument("--allow-changes", action="store_true", help="continue a run although the recipe has changed")
    config = verbs.add_parser("config", help="look at recipes").add_subparsers(dest="action", required=True)
    show = config.add_parser("show", parents=[common], help="print the resolved recipe")
    show.add_argument("--diff", action="store_true", help="only what differs from the defaults")
    plan = verbs.add_parser("plan", parents=[common], help="memory, time and money of a recipe's step on chips that are not here")
    plan.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="what would be rented: v5e:4x4, v5p:4x4x4, v6e:16x16 ...")
    plan.add_argument("--slices", type=int, default=1, metavar="N", help="slices of that shape, joined by the data centre's network")
    plan.add_argument("--fast", action="store_true", help="the estimate alone, without a compiler")
    plan.add_argument("--search", action="store_true", help="rank meshes, remat policies and micro-batches, and compile the best few")
    plan.add_argument("--best", type=int, default=3, metavar="N", help="how many of them --search compiles")
    plan.add_argument("--price", type=float, metavar="DOLLARS", help="of a chip and hour, instead of the list price")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON, and nothing else")
    plan.add_argument("--picture", metavar="FILE", help="write the split of memory and time as .svg or .png")
    plan.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    generate = verbs.add_parser("generate", parents=[devices], help="continue a prompt with a trained model")
    generate.add_argument("--work", required=True, metavar="DIR", help="the work folder of a run")
    generate.add_argument("--prompt", required=True)
    convert = verbs.add_parser("convert", parents=[devices], help="write a run, or a Hugging Face folder or hub id, as such a folder")
    convert.add_argument("source", help="the work folder of a run, a folder of weights, or a hub id: owner/name")
    convert.add_argument("--adapter", action="store_true", help="of a run that trained few weights, those alone, as PEFT has them")
    convert.add_argument("target", help="the folder to write, or FILE.gguf, which llama.cpp reads")
    kinds = ("float32", "bfloat16", "float16", "q8_0", "q4_0")
    convert.add_argument("--dtype", default=None, choices=kinds, help="of the weights, the last two of a .gguf; by default as stored")
    compress = verbs.add_parser("compress", parents=[devices], help="make a trained model small, step by step, with a report")
    compress.add_argument("--work", metavar="DIR", help="the work folder of the run that trained it")
    compress.add_argument(
        "--config", metavar="RECIPE", help="or a recipe, with the weights of its model.source or of the run in its work folder"
    )
    compress.add_argument(
        "--recipe", metavar="CHAIN", help="a chain of configs/compress.py by its name; by default the recipe's own compress.chain"
    )
    compress.add_argument("--max-loss", metavar="SHARE", help="by how much its metric may become worse: 1%%")
    parity = verbs.add_parser("parity", parents=[devices], help="compare a folder's model with transformers and PyTorch")
    parity.add_argument("source", help="a folder, or a hub id: owner/name")
    parity.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest relative difference that passes; beyond it the exit code is 1"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    args, rest = parser().parse_known_args(argv)
    overrides = [text.removeprefix("--config.") for text in rest if text.startswith("--config.")]
    strange = [text for text in rest if not text.startswith("--config.")]
    try:
        if strange:
            raise ValueError(f"unknown argument {strange[0]!r}; a recipe's keys are written --config.key=value")
        return VERBS[args.verb](args, overrides)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("BIGFLAX_TRACEBACK"):
            raise
        print(f"bigflax: {sentence(error)}", file=sys.stderr)
        if getattr(args, "hosts", None) is not None:
            _leave_hosts()
        return 2


def _leave_hosts() -> None:
    """Ends the process with exit code 2 where it has joined others: JAX would wait at exit for hosts that wait for this one in a collective."""
    import jax

    if jax.distributed.is_initialized():
        print(f"bigflax: process {jax.process_index()} ends; if another one ended before it, that one's output says why", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def sentence(error: Exception) -> str:
    """One line for what went wrong; what the system said of a file names the file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename!r}"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}" if isinstance(error, RuntimeError) and type(error) is not RuntimeError else text


def train(args: argparse.Namespace, overrides: list[str]) -> int:
    prepare(args)
    from bigflax import recipes, runs, taught

    config = recipes.resolve(recipes.load(args.config), overrides)
    if not config.work:
        raise ValueError("the recipe names no work folder; add --config.work=DIR")
    make = taught.Taught if "teacher" in config else runs.Run
    if args.seeds is None:
        return runs.train_run(config, make=make, allow_changes=args.allow_changes)
    if args.seeds < 1:
        raise ValueError(f"--seeds={args.seeds} trains nothing; give 1 or more")
    return runs.train_seeds(config, args.seeds, make=make, allow_changes=args.allow_changes)


def config(args: argparse.Namespace, overrides: list[str]) -> int:
    from bigflax import recipes

    recipe = recipes.load(args.config)
    resolved = recipes.resolve(recipe, overrides)
    if args.diff:
        lines = recipes.diff(recipes.known_keys(resolved), resolved)
    else:
        lines = [f"{key} = {value!r}" for key, value in recipes.flat(resolved).items()]
    print("\n".join(lines))
    return 0


def plan(args: argparse.Namespace, overrides: list[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # with libtpu installed JAX would look for a TPU first
    from bigflax import plans

    return plans.run(args, overrides)


def generate(args: argparse.Namespace, overrides: list[str]) -> int:
    prepare(args)
    from bigflax import recipes, runs
    from bigflax.checkpoint import Checkpoints

    with Checkpoints(os.path.join(args.work, "checkpoints")) as checkpoints:
        config = recipes.unflatten(checkpoints.meta()["config"])
        if "sample" not in config:
            raise ValueError(f"there is nothing to continue: {args.work} holds no model that continues text")
        config.work, config.sample.prompt = args.work, args.prompt
        for path, value in map(recipes.parse_override, overrides):
            recipes.set_key(config, path, value)
        run = runs.Run(config)
        text = run.sample(checkpoints.restore_params(run.state_like().params))
    if text is None:
        raise ValueError(f"there is nothing to continue: the prompt is empty, or {args.work} holds no causal language model")
    print(text)
    return 0


def convert(args: argparse.Namespace, overrides: list[str]) -> int:
    prepare(args)
    from bigflax import exports, gguf, hub, trees

    if os.path.isdir(os.path.join(args.source, "checkpoints")):
        exports.export(args.source, args.target, adapter=args.adapter, dtype=args.dtype)
        return 0
    if args.adapter:
        raise ValueError(f"--adapter is for the work folder of a run, and {args.source!r} is none")
    model, params = hub.load(args.source, dtype=None if args.dtype in gguf.CODES else args.dtype)
    exports.write(model, params, args.target, dtype=args.dtype)
    print(
        f"{model.family}: {trees.human(trees.count(params))} parameters ({trees.human(trees.nbytes(params), 'B', 1024)}) are in {args.target}"
    )
    return 0


def compress(args: argparse.Namespace, overrides: list[str]) -> int:
    if (args.work is None) == (args.config is None):
        raise ValueError("give the run to compress, --work=DIR, or a recipe, --config=RECIPE, one of the two")
    prepare(args)
    from bigflax import chains, exports, peft, recipes

    chain = None if args.recipe is None else recipes.load_chain(args.recipe)
    found = exports.trained(args.work, overrides) if args.work else exports.begun(recipes.resolve(recipes.load(args.config), overrides))
    if "compress" not in found.run.config:
        raise ValueError(f"{args.work} was trained before recipes said how to compress; name its recipe, --config=RECIPE, instead")
    said = found.run.config.compress
    options = {name: said[name] for name in said if name not in ("chain", "max_loss", "name")}
    chains.compress(
        found.run.of(found.run.base),
        found.weights if found.run.tuned is None else peft.merge(found.weights),
        chain=[dict(step) for step in said.chain] if chain is None else chain,
        name=args.recipe or said.name,
        max_loss=said.max_loss if args.max_loss is None else chains.read_loss(args.max_loss),
        labels=found.labels,
        **options,
    )
    return 0


def parity(args: argparse.Namespace, overrides: list[str]) -> int:
    prepare(args)
    from bigflax import parity as comparison

    rows = comparison.compare(args.source, tolerance=args.tolerance)
    print(comparison.table(rows))
    return int(any(not row.relative <= args.tolerance or row.first is not None for row in rows))


VERBS: dict[str, Any] = {
    "train": train,
    "config": config,
    "plan": plan,
    "generate": generate,
    "convert": convert,
    "compress": compress,
    "parity": parity,
}


def prepare(args: argparse.Namespace) -> None:
    """What must be said to JAX before its first use: devices, compilation cache, the other hosts."""
    if getattr(args, "hosts", None) is None and (getattr(args, "host", None) is not None or getattr(args, "coordinator", None)):
        raise ValueError("--host and --coordinator need --hosts=N, the number of processes")
    if args.fake_devices is not None and args.fake_devices < 1:
        raise ValueError(f"--fake-devices={args.fake_devices} is none; give 1 or more, or leave it out for the devices that are there")
    import jax

    if args.fake_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.fake_devices)
        # XLA makes a thread a device. A convolution that ends on one of them starts the sum over devices there and waits in it: with no
        # thread to spare a step may wait for ever, and XLA aborts the process after 40 s.
        os.environ.setdefault("NPROC", str(2 * args.fake_devices))
    cache = jax.config.jax_compilation_cache_dir if args.cache is None else args.cache  # pyright: ignore[reportAttributeAccessIssue]
    if cache is None:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bigflax", "xla")
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if getattr(args, "hosts", None) is not None:
        from bigflax.hosts import start_hosts

        start_hosts(coordinator=args.coordinator, processes=args.hosts or None, index=args.host, timeout=args.timeout)


if __name__ == "__main__":
    sys.exit(main())
