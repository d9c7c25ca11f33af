"""A chain: a run's model made small in ordered steps, each measured, saved, and where it is there already read instead of made again.

    chain = [dict(do="prune", to="2:4", method="wanda"), dict(do="recover", steps=200), dict(do="quantize", to="int8")]
    report = compress(run, weights, chain=chain, max_loss=0.01)

What a step can do, and with which options, is said in steps.py. Each leaves `run.work`/compress/NAME/1-prune ..., a folder that `bigflax.load` reads, and the
whole chain report.json, report.txt, quality.png and error.png beside it. A step is read again where the same weights went the same way before.

A step that makes the run's watched metric worse by more than `max_loss`, a share of what it was, ends the chain, and the step before it is what is kept; one
that `recover` follows is judged after that.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from bigflax import hub, nn, sharding, trees
from bigflax.compress.report import Report, Row, divergence, measure
from bigflax.steps import BY_NAME, STEPS, Link, check, foresee, learn, recover
from bigflax.stored import blocks_of, own_checksums
from bigflax.weights import is_typed


def read_loss(text: str) -> float:
    """Reads "1%" or "0.01". Raises ValueError for what is no share."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no share such as 1%, by which a metric may become worse") from None


def name_of(at: int, said: Mapping[str, Any]) -> str:
    """The folder of a step: "2-quantize-int4-128-gptq"."""
    value = said.get("to") if said.get("to") is not None or said.get("rules") else said.get("tables")
    words = (said.get("within") or value, "spread" if said.get("spread") else None, said.get("method"))
    words = [said["do"], *(str(word) for word in words if word is not None)]
    return f"{at}-" + re.sub(r"[^\w.]+", "-", "-".join(words)).strip("-").lower()


def compress(
    run: Any, weights: Any, *, chain: Sequence[Mapping[str, Any]], name: str = "chain", batches: int = 8, max_loss: float | None = None,
    turns: int = 15, labels: Sequence[str] = (), say: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Takes the weights through the chain of this `name` and reports; `batches` of the run's training data are what is looked at on the way.

    Raises ValueError for a chain that `check` or `foresee` refuses, and for rules that match no weight, before any work."""
    check(chain)
    chain = [dict(said) for said in chain]
    for said in chain:
        trees.apply_rules(said.get("rules") or () if said["do"] in BY_NAME else (), weights, is_leaf=is_typed)
    folder, metric, mode = (
        os.path.join(run.work, "compress", name),
        run.config.watch.metric,
        "max" if run.config.watch.mode == "max" else "min",
    )
    with run.loader("train") as loader:
        held = [next(loader) for _ in range(batches)]
    link = Link(run, weights, held, (run.model, weights))
    foresee(link, chain)
    identity = own_checksums({leaf: blocks_of(jax.numpy.asarray(part)) for leaf, part in trees.named_leaves(weights)})
    rows = [_row("start", link, None)]
    if metric not in rows[0].metrics:
        raise ValueError(f"no metric {metric!r} to judge by; {trees.did_you_mean(metric, rows[0].metrics, 'the evaluation has')}")
    say(Report(tuple(rows), metric, mode).table())
    good = "the start"
    for at, said in enumerate(chain, 1):
        place = os.path.join(folder, name_of(at, said))
        link, row = _made(link, {"chain": chain[:at], "batches": batches, "weights": identity}, place, turns, labels, say)
        rows.append(row)
        report = Report(tuple(rows), metric, mode)
        report.write(folder)
        say(report.table().splitlines()[-1])
        recovers = at < len(chain) and chain[at]["do"] == "recover"
        if max_loss is not None and not recovers and report.loss(row) > max_loss:
            say(f"{row.step} is worse by {report.loss(row):.2%}, more than {max_loss:.2%}: the chain ends, {good} is kept")
            break
        if not recovers:
            good = place
    report = Report(tuple(rows), metric, mode)
    say(f"\n{report.table()}\n\nkept: {good}; report.json, quality.png and error.png are in {folder}")
    return report


def _made(link: Link, way: dict[str, Any], place: str, turns: int, labels: Sequence[str], say: Any) -> tuple[Link, Row]:
    """The link behind the last step of a chain and its row, read where the same `way` was gone already."""
    record, said = os.path.join(place, "step.json"), dict(way["chain"][-1])
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open(record) as file:
            found = json.load(file)
        if found["way"] == json.loads(json.dumps(way)):
            model, params = hub.load(place, mesh=link.run.mesh, table=link.run.table)
            say(f"{os.path.basename(place)} is there already")
            return dataclasses.replace(link, run=link.run.of(model), params=params), Row.read(found["row"])
    step = STEPS[said.pop("do")]
    link = step(dataclasses.replace(link, chosen={}), **said, **({"say": say} if step in (recover, learn) else {}))
    for name, value in link.chosen.items():
        say(f"  {name}  {'dense' if value is None else value}")
    where = sharding.shardings(link.params, link.model.axes, link.run.mesh, link.run.table)
    link = dataclasses.replace(link, params=jax.device_put(link.params, where))
    shutil.rmtree(place, ignore_errors=True)
    tokenizer = link.run.tokenizer if link.run.kind.tokenized else None
    hub.save(link.model, link.params, place, tokenizer=tokenizer, labels=labels)
    disk = sum(os.path.getsize(os.path.join(place, name)) for name in os.listdir(place) if name.endswith(".safetensors"))
    row = dataclasses.replace(_row(os.path.basename(place), link, disk, turns), chosen=dict(link.chosen))
    with open(record, "w") as file:
        json.dump({"way": way, "row": dataclasses.asdict(row)}, file, indent=1)
    return link, row


def _row(name: str, link: Link, disk: int | None, turns: int = 15) -> Row:
    run, (model, params) = link.run, link.start
    start = (dataclasses.replace(link, run=run.of(model)).forward, params)
    metrics = run.evaluator()(link.params)
    if name == "start":
        return measure(name, link.forward, link.params, link.batches[0], metrics=metrics, disk=trees.nbytes(params), turns=turns)
    kl = _kl(link, model, params)
    return measure(name, link.forward, link.params, link.batches[0], metrics=metrics, start=start, kl=kl, disk=disk, turns=turns)


def _kl(link: Link, model: nn.Model, params: Any) -> float | None:
    """Over the first batches that the model is held out; None where its task asks it for something else than logits of its inputs."""
    given = lambda batch: {name: x for name, x in batch.items() if name != "labels"}
    logits = lambda of: lambda params, batch: of.apply(params, **given(batch))["logits"]
    with link.run.loader("validation") as loader:
        batches = [batch for batch, _ in zip(loader, range(4), strict=False)]
    try:
        jax.eval_shape(logits(model), params, batches[0])
    except (KeyError, TypeError, ValueError):
        return None
    return divergence(logits(link.model), logits(model), link.params, params, batches)
