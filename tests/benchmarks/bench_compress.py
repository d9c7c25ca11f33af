"""A trained model made small by every method: what each leaves of the gap that the plainest one of its kind leaves.

    bigflax train --config=preference:base                                                      a decoder; configs/preference.py says what it takes
    python tests/benchmarks/bench_compress.py --work runs/preference-base [--only int4 half]     or a run of your own: an encoder, a network for images

Each row is a chain of `bigflax compress` over the run's weights, judged by what the run holds out: its metric (of a language model the perplexity), and
the KL divergence from the model at the start. "of the gap" and "of its KL" are shares of what the first row of the table loses. What looks at data sees
`--batches` of the training data. Students of half the layers are trained with each of `--seeds`, with a teacher and without.
Finished steps are read again when the command is repeated; the run's folder holds them, under compress/bench.
"""

import argparse
import math
import statistics

from report import table

from bigflax import chains, exports, peft

TABLES = ("int8", "int4", "50%", "2:4", "low rank", "half")


def tables(args: argparse.Namespace) -> dict[str, dict[str, list[dict]]]:
    """Chains by the name of their table, the plainest first."""
    recover = dict(do="recover", steps=args.steps, lr=args.lr, weight=args.weight)
    quantize = lambda to, method, **more: [dict(do="quantize", to=to, method=method, **more)]
    prune = lambda to, method, **more: [dict(do="prune", to=to, method=method, **more)]
    factorize = lambda method, **more: [dict(do="factorize", to=args.share, method=method, **more)]
    zeros = lambda to: {
        **{method: prune(to, method) for method in ("magnitude", "wanda", "sparsegpt", "alps")},
        **{f"{method}, corrected": prune(to, method, correct=True) for method in ("wanda", "sparsegpt", "alps")},
        "alps, corrected, recovered": [*prune(to, "alps", correct=True), recover],
    }
    half = [dict(do="layers", keep=0.5, by=args.by)]
    student = dict(do="recover", steps=args.student_steps, lr=args.student_lr, temperature=args.temperature)
    return {
        "int8": {"weights": quantize("int8", "rtn"), "products too": quantize("int8", "w8a8"), "smoothquant": quantize("int8", "smoothquant")},
        "int4": {
            "to the largest": quantize(args.int4, "rtn", clip=False),
            **{method: quantize(args.int4, method) for method in ("rtn", "awq", "hadamard", "gptq")},
            **{f"{method}, corrected": quantize(args.int4, method, correct=True) for method in ("awq", "hadamard", "gptq")},
            "qat": [dict(do="qat", to=args.int4, steps=args.steps)],
        },
        "50%": zeros("50%"),
        "2:4": zeros("2:4"),
        "low rank": {
            **{method: factorize(method) for method in ("svd", "asvd", "whitened")},
            "whitened, corrected": factorize("whitened", correct=True),
            "whitened, corrected, recovered": [*factorize("whitened", correct=True), recover],
        },
        "half": {"cut": half, "alone": [*half, dict(student, weight=0.0)], "taught": [*half, dict(student, weight=args.weight)]},
    }  # fmt: skip


def score(report: chains.Report, row: chains.Row) -> float:
    """The metric that the report judges by; of a loss its exponential, the perplexity."""
    return math.exp(row.metrics["loss"]) if report.metric == "loss" else row.metrics[report.metric]


def taken(found: exports.Trained, chain: list[dict], name: str, args: argparse.Namespace, seed: int | None = None) -> chains.Report:
    run = found.run.of(found.run.model)
    if seed is not None:
        run.config = run.config.copy_and_resolve_references()
        with run.config.unlocked():
            run.config.seed = seed
    name = "bench/" + "".join(c if c.isalnum() else "-" for c in name)
    return chains.compress(run, found.weights, chain=chain, name=name, batches=args.batches, say=lambda text: None)


def compare(title: str, rows: dict[str, list[dict]], found: exports.Trained, args: argparse.Namespace) -> None:
    made, plain = [], None
    for label, chain in rows.items():
        seeds = range(args.seeds) if chain[-1]["do"] in ("recover", "qat") else [None]
        reports = [taken(found, chain, f"{title}-{label}-{seed or 0}", args, seed) for seed in seeds]
        first, last = reports[0].rows[0], [report.rows[-1] for report in reports]
        start, scores = score(reports[0], first), [score(report, report.rows[-1]) for report in reports]
        mean, kl = statistics.mean(scores), statistics.mean(row.kl or 0.0 for row in last)
        gap = (mean - start) if reports[0].mode == "min" else (start - mean)
        plain = plain or (gap, kl)
        share = lambda value, of: f"{value / of:.1%}" if of > 0 else "-"
        deviation = f" +- {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        made.append(
            (label, f"{mean:.4f}{deviation}", f"{gap / start:.2%}", f"{kl:.5f}", share(gap, plain[0]), share(kl, plain[1]),
             f"{(last[0].disk or 0) / 2**20:.2f}", f"{statistics.median(row.speed for row in last):.2f}")
        )  # fmt: skip
        print(*made[-1], sep=" | ", flush=True)
    what = "perplexity" if reports[0].metric == "loss" else reports[0].metric
    head = (title, what, "worse by", "KL", "of the gap", "of its KL", "MiB", "speed")
    table(f"{title}: {what} {start:.4f} at the start", head, made)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True, help="the work folder of a run")
    parser.add_argument("--only", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--int4", default="int4:128")
    parser.add_argument("--share", type=float, default=0.8, help="of the numbers that low rank leaves")
    parser.add_argument("--steps", type=int, default=200, help="of recovery")
    parser.add_argument("--lr", type=float, default=1e-3, help="of recovery")
    parser.add_argument("--weight", type=float, default=0.9, help="of the teacher, in recovery and for students")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--by", default="influence", help="how the half of the layers is chosen")
    parser.add_argument("--student-steps", type=int, default=1000)
    parser.add_argument("--student-lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3, help="of all that trains")
    args = parser.parse_args()
    found = exports.trained(args.work)
    if found.run.tuned is not None:
        found = found._replace(run=found.run.of(found.run.base), weights=peft.merge(found.weights))
    made = tables(args)
    for title in args.only:
        compare(title, made[title], found, args)


if __name__ == "__main__":
    main()
