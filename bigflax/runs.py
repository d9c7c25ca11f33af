"""A run: what a resolved recipe stands for, put together and trained; the calls are those that a script of your own would make.

`Run` builds tokenizer, loaders, model, optimizer and loss from a config; `train_run` starts or resumes it in its work folder, which holds

    checkpoints/  tokenizer/  metrics.jsonl  tensorboard/  quarantine.jsonl  reference.npz  loss.png  summary.json
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigflax import chips, data, hub, models, optim, peft, preference, recipes, sharding, summaries, tasks, train, trees, xla
from bigflax.checkpoint import Checkpoints
from bigflax.data.quality import Quality
from bigflax.generate import check as check_generate
from bigflax.generate import generate
from bigflax.hosts import StopSignal
from bigflax.metrics import Meter
from bigflax.scores import scored
from bigflax.stored import open_path
from bigflax.weights import is_typed, named_weights
from bigflax.writers import open_writers

Config = Any  # a resolved ConfigDict, whose attributes no type checker knows


def _options(section: Config, *without: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in without}


def opened(said: Any) -> list[tuple[data.Source, float]]:
    """The sources that a recipe names and their weights: one section, or a sequence of them each with a `weight`."""
    sections: list[Any] = [said] if isinstance(said, ConfigDict | dict) else list(said)
    return [(data.open_source(**_options(s, "weight")), float(s.get("weight", 1.0))) for s in sections]


class Run:
    """The parts of a run, each made on first use from `config` (a resolved recipe), its files under `config.work`."""

    def __init__(self, config: Config):
        self.config, self.work, self.kind = config, config.work, recipes.data_kind(config.model.name, config.task.name)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(**self.config.mesh)

    @functools.cached_property
    def table(self) -> sharding.Table:
        return {**sharding.TABLE, **self.config.table}

    @functools.cached_property
    def quality(self) -> Quality:
        c = self.config.data
        quarantine = os.path.join(self.work, "quarantine.jsonl") if self.work else None
        line, field = (c.max_line, c.field) if self.kind.prose else (0, None)
        return Quality(c.bad_records, c.max_bad, quarantine, line, field)

    @functools.cached_property
    def sources(self) -> list[tuple[data.Source, float]]:
        return opened(self.config.data.source)

    @functools.cached_property
    def held_out(self) -> tuple[list[tuple[data.Source, float]], float]:
        """The sources of the validation split, and which part of them it is: those of `data.validation_source` whole, or the hash's part of the others."""
        c = self.config.data
        return (self.sources, c.validation_fraction) if c.validation_source is None else (opened(c.validation_source), 1.0)

    def split(self, name: str) -> tuple[list[tuple[data.Source, float]], float]:
        """The sources of a split, and the part of them that is for validation."""
        whole = name == "train" and self.config.data.validation_source is not None
        return (self.sources, 0.0) if whole else self.held_out

    def check(self) -> None:
        """Raises now what would otherwise come up after minutes of work: a mesh, batch, schedule or source that cannot be."""
        sharding.check_batch(self.config.data.batch_size, self.mesh)
        if self.config.data.get("unlabelled") and "teacher" not in self.config:
            raise ValueError(
                "what a text without a label is, only a teacher says: leave out data.unlabelled, or give the recipe a section teacher"
            )
        assert [self.split(name) for name in ("train", "validation")]
        optim.make(**self.config.optimizer, steps=self.steps, axes={})

    def records(self, split: str) -> list[data.Records]:
        sources, part = self.split(split)
        return [data.Records(source, self.quality, split, part, self.config.data.split_by) for source, _ in sources]

    @functools.cached_property
    def steps(self) -> int:
        """Those of `fit.steps`, or as many as `fit.epochs` passes over the records of the train split take."""
        epochs, batch = self.config.fit.epochs, self.config.data.batch_size
        if epochs is None:
            return self.config.fit.steps
        if self.config.fit.steps is not None:
            raise ValueError(
                f"fit.epochs {epochs} and fit.steps {self.config.fit.steps} both say how long to train; set one of them to None"
            )
        if self.kind.packed or self.config.data.split_by == "content":
            raise ValueError(
                "how many rows an epoch has is not known before packed text is packed, or split by content; set fit.steps instead of fit.epochs"
            )
        rows = sum(records.chosen(i) for records in self.records("train") for i in range(len(records.source)))
        return max(1, round(epochs * rows / batch))

    @functools.cached_property
    def classes(self) -> Any:
        """The names of the data's classes, or how many there are; None where there are none."""
        held_out = self.held_out[0] if self.config.data.validation_source is not None else []
        return self.kind.classes and self.kind.classes([source for source, _ in [*self.sources, *held_out]], self.config.data)

    @functools.cached_property
    def tokenizer(self) -> data.Tokenizer:
        """That of the work folder where there is one, so that a resumed run never trains another."""
        c, kept = self.config.tokenizer, os.path.join(self.work, "tokenizer")
        if self.work and (open_path(kept) / "tokenizer.json").exists():
            return data.load_tokenizer(kept)
        if c.kind == "bpe":
            texts = (text for records in self.records("train") for text in data.sample_texts(records, seed=self.config.seed))
            made = data.train_bpe(texts, c.vocab_size, max_bytes=c.max_bytes, mask=c.mask)
        elif c.kind == "file" and not c.path:
            raise ValueError("tokenizer.kind 'file' needs tokenizer.path: a tokenizer.json, or a folder with one")
        elif c.kind in ("bytes", "file"):
            weights = self.config.model.source, (self.config.get("teacher") or {}).get("source")  # a hub id is known by what it names alone
            path = "bytes" if c.kind == "bytes" else hub.fetch(str(c.path)) if c.path in weights else c.path
            made = data.load_tokenizer(path, **({"mask": c.mask} if c.mask else {}))
        else:
            raise ValueError(f"unknown tokenizer kind {c.kind!r}; {trees.did_you_mean(c.kind, ('bpe', 'bytes', 'file'), 'there are')}")
        if self.work and jax.process_index() == 0:
            made.save(kept)
        return made

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch to train on, known without a source."""
        takes = inspect.signature(self.kind.shapes).parameters
        return self.kind.shapes(**{name: self.tuned is None if name == "reference" else self.config.data[name] for name in takes})

    def loader(self, split: str, *, once: bool = False) -> data.Loader:
        """Endless for "train", unless `once`, when the reference is made; one pass over "validation"."""
        # one pass packs its rows best as one shard, which is its default
        here = ("workers", "shards") if self.kind.packed and split != "train" else ()
        sources, part = self.split(split)
        options = _options(
            self.config.data, "source", "validation_source", "validation_fraction", "bad_records", "max_bad", "max_line", "field", *here
        )
        words = {"tokenizer": self.tokenizer} if self.kind.tokenized else {}
        given: dict[str, Any] = words
        if self.kind.reader is not None:
            packed = {"packed": options["length"]} if self.kind.packed else {}
            takes = inspect.signature(self.kind.reader).parameters
            mine = {name: options.pop(name) for name in takes if name in options}
            mine |= {"classes": self.classes} if "classes" in takes else {}
            mine |= {"num_labels": self.fields.get("num_labels")} if "num_labels" in takes else {}
            identity = mine | {name: tokenizer.fingerprint for name, tokenizer in words.items()}
            asked = {"reference": self.reference} if "reference" in takes and not once else {}
            given = {"read": self.kind.reader(**words, **mine, **asked), "identity": identity, **packed}
        return self.kind.batches(
            sources,
            **given,
            validation_fraction=part,
            split=split,
            seed=self.config.seed,
            repeat=split == "train" and not once,
            mesh=self.mesh,
            quality=self.quality,
            **options,
        )

    @functools.cached_property
    def reference(self) -> dict[str, np.ndarray] | None:
        """What the weights that training begins with say of all pairs (preference.py), kept in the work folder; None where adapters leave these
        weights as they are."""
        if self.tuned is not None:
            return None
        kept = open_path(os.path.join(self.work, "reference.npz")) if self.work else None
        if kept is not None and kept.exists():
            with kept.open("rb") as file:
                return dict(np.load(file))
        loaders = [self.loader(split, once=True) for split in ("train", "validation")]
        with contextlib.ExitStack() as stack:
            batches = itertools.chain(*[stack.enter_context(loader) for loader in loaders])
            found = preference.reference_log_probs(
                self.model, self.init_state().weights, batches, mesh=self.mesh, table=self.table, chunk=self.config.task.chunk
            )
        if kept is not None and jax.process_index() == 0:
            kept.parent.mkdir(parents=True, exist_ok=True)
            half = kept.parent / f"{kept.name}.tmp"  # a run that is killed here begins anew
            with half.open("wb") as file:
                np.savez(file, allow_pickle=False, **found)
            half.replace(kept)
        return found

    @functools.cached_property
    def base(self) -> models.nn.Model:
        """The model before it is adapted."""
        return self._model()

    @functools.cached_property
    def model(self) -> models.nn.Model:
        return self.base if self.tuned is None else self.tuned.model

    @functools.cached_property
    def tuned(self) -> peft.Tuned | None:
        """What the recipe's method of fine-tuning makes of the model, its params as shapes; None where all weights train."""
        if self.config.peft.name is None:
            return None
        found = []
        shapes = jax.eval_shape(lambda params: found.append(self.adapt(params)) or found[0].params, self.base.shapes())
        return found[0]._replace(params=shapes)

    @functools.cached_property
    def shapes(self) -> Any:
        """The weights that a state begins with, as ShapeDtypeStructs."""
        return self.model.shapes() if self.tuned is None else self.tuned.params

    def adapt(self, params: Any) -> peft.Tuned:
        """The recipe's method of fine-tuning over these weights."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)  # 0 is the model's own
        return peft.create(model=self.base, params=params, rng=key, **_options(self.config.peft, "dropout"))

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """Those of the model's fields that follow from the data. Set them to make a model without tokenizer and sources."""
        words = {"vocab_size": self.tokenizer.vocab_size, "eos_token_id": self.tokenizer.eos_id} if self.kind.tokenized else {}
        return recipes.model_fields(self.config, self.kind, words, self.classes)

    def _model(self, **more: Any) -> models.nn.Model:
        made = models.create(**{**_options(self.config.model, "source"), "size": None, **self.fields, **more})
        source = self.config.model.source
        with contextlib.suppress(FileNotFoundError):  # it may be gone once a run has weights of its own; `begin` says so where it is needed
            return made if source is None else dataclasses.replace(made, source=hub.fetch(source))
        return made

    @functools.cached_property
    def writer(self) -> models.nn.Model:
        """The model that generates: its layers one at a time, for it compiles twice, for a prompt and for a token."""
        return self._model(unroll=1) if self.tuned is None or self.tuned.model is self.base else self.tuned.model

    @functools.cached_property
    def tx(self):
        return optim.make(**self.config.optimizer, steps=self.steps, axes=self.model.axes)

    def loss_of(self, model: models.nn.Model | None = None, **changes: Any) -> tasks.LossFn:
        """The recipe's loss of a model, by default its own, with changes of its task's options."""
        text: dict[str, Any] = {"token_bytes": self.tokenizer.token_bytes()} if self.kind.prose else {}
        if "classes" in inspect.signature(tasks.find(self.config.task.name).loss).parameters:
            text["classes"] = self.classes
        return tasks.create(**{**self.config.task, **changes}, model=model or self.model, **text)

    @functools.cached_property
    def loss_fn(self) -> tasks.LossFn:
        loss_fn = self.loss_of()
        return peft.dropout(loss_fn, rate) if (rate := self.config.peft.get("dropout", 0.0)) else loss_fn

    def of(self, model: models.nn.Model) -> "Run":
        """The same run of another model, all of whose weights train: the data are not opened again."""
        made, own = Run(self.config), ("base", "model", "tuned", "shapes", "writer", "tx", "loss_fn")
        made.__dict__ |= {name: part for name, part in self.__dict__.items() if name not in own}
        made.base = made.writer = made.model = model
        made.tuned = None
        return made

    def state_like(self) -> train.State:
        begin, freeze = (self.model.init, ()) if self.tuned is None else (self.tuned.params, self.tuned.freeze)
        return train.state_like(begin, self.tx, mesh=self.mesh, axes=self.model.axes, freeze=freeze, table=self.table)

    def begin(self) -> Any:
        """What the weights of `base` begin as: a function from a key to them, or those of `model.source`."""
        c = self.config.model
        if c.source is None:
            return self.base.init
        found = hub.load(c.source, mesh=self.mesh, table=self.table, **{**_options(c, "name", "size", "source"), **self.fields})[1]
        if typed := next((name for name, w in named_weights(found) if is_typed(w)), None):
            raise ValueError(
                f"{c.source!r} holds typed weights ({typed}), which a recipe does not begin with: `bigflax convert` writes arrays of them, peft.base rounds"
            )
        return found

    def init_state(self) -> train.State:
        """New, of what `begin` gives, adapted where the recipe says how."""
        begin, freeze = self.begin(), ()
        if self.tuned is not None:
            make, freeze = begin, self.tuned.freeze
            begin = (lambda key: self.adapt(make(key)).params) if callable(make) else self.adapt(make).params
        seed = self.config.seed
        return train.init_state(begin, self.tx, mesh=self.mesh, axes=self.model.axes, seed=seed, freeze=freeze, table=self.table)

    def step(self, state: train.State) -> train.Step:
        """The compiled step of the recipe over such a state."""
        if "teacher" in self.config:
            raise ValueError("this recipe has a teacher, which a plain Run does not ask; make a taught.Taught of it")
        return train.train_step(self.loss_fn, self.tx, state, seed=self.config.seed, table=self.table, **self.config.step)

    def evaluator(self) -> Callable[[Any], Mapping[str, float]]:
        """`weights -> metrics` over the whole validation split, and the scores of `generate` over the first of its records."""
        step, loader = train.eval_step(self.loss_fn, self.mesh, self.table), self.loader("validation")
        return lambda weights: {**train.evaluate(step, weights, loader), **self.scores(weights)}

    def scores(self, params: Any) -> dict[str, float]:
        """`generate.scores` of what the model writes for the first `generate.records` of the validation split."""
        asks, c = tasks.find(self.config.task.name).asks, self.config.get("generate")
        if c is None or not c.scores:
            return {}
        assert asks is not None  # else there is no such section
        said, true = [], []
        with self.loader("validation") as batches:
            for batch in batches:
                with sharding.tracing_on(self.mesh, self.table):
                    key = jax.random.fold_in(jax.random.key(self.config.seed), len(said))
                    options = {**_options(c, "scores", "records"), "eos_id": self.tokenizer.eos_id, "rng": key}
                    written = generate(self.writer, params, **asks(self.writer, batch), **options)
                for tokens, labels in zip(sharding.whole(written), sharding.whole(batch["labels"]), strict=True):
                    if (labels != tasks.IGNORED).any():  # else the loader's padding
                        said.append(self.text(tokens))
                        true.append(self.text(labels[labels != tasks.IGNORED]))
                if len(said) >= c.records:
                    break
        return scored(c.scores, said[: c.records], true[: c.records])

    def text(self, tokens: np.ndarray) -> str:
        """What the tokens say up to the first that ends it."""
        (ends,) = np.nonzero(tokens == self.tokenizer.eos_id)
        return self.tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)

    def fit_options(self) -> dict[str, Any]:
        """Those of `train.fit`; with `fit.epochs`, an evaluation after each unless the recipe says when."""
        c = self.config.fit
        every = c.eval_every or (None if c.epochs is None else max(1, round(self.steps / max(1, c.epochs))))
        return {**_options(c, "epochs"), "steps": self.steps, "eval_every": every}

    def check_end(self, loader: data.Loader, watch: train.Watch) -> None:
        """Raises now what would otherwise come up at the first evaluation, a metric to watch that there is not, or after the last step, a
        sample that the model cannot write."""
        if self.fit_options()["eval_every"]:
            measure = lambda params, batch: train.split_loss(self.loss_fn(params, batch, None))[1]
            asked = self.config.get("generate", {}).get("scores", ())
            watch.check(["loss", *jax.eval_shape(measure, self.shapes, loader.spec), *scored(asked, ["a"], ["a"])])
            if asked:
                check_generate(self.model, 1, **_options(self.config.generate, "scores", "records"))
        if (ids := self.prompt()) is not None:
            check_generate(self.model, ids.shape[1], **_options(self.config.sample, "prompt"))

    def prompt(self) -> np.ndarray | None:
        """The recipe's prompt as token ids [1, T], or None where it has none or the model learns something else than to continue."""
        if self.kind.prompt is None or not (text := self.config.sample.prompt):
            return None
        ids = self.kind.prompt(self.tokenizer, self.config.data, text)
        return ids if ids is None else ids[None]

    def sample(self, params: Any) -> str | None:
        """The prompt and its continuation; None where there is no prompt."""
        if (ids := self.prompt()) is None:
            return None
        c = self.config.sample
        with sharding.tracing_on(self.mesh, self.table):
            tokens = generate(
                self.writer,
                params,
                jnp.asarray(ids),
                **_options(c, "prompt"),
                eos_id=self.tokenizer.eos_id,
                rng=jax.random.key(self.config.seed),
            )
        return c.prompt + ("" if self.kind.prose else "\n") + self.text(np.asarray(tokens)[0])


def train_seeds(
    config: Config, seeds: int, *, make: Callable[[Config], Run] = Run, allow_changes: bool = False, say: Callable[[str], None] = print
) -> int:
    """Trains the run once for each of so many seeds, from the recipe's on, in folders of their own, and says the mean and deviation of what is held
    out; the exit code of the first run that did not end, else 0."""
    summaries, home = [], config.work
    for seed in range(config.seed, config.seed + seeds):
        one = config.copy_and_resolve_references()
        with one.unlocked():
            one.seed, one.work = seed, os.path.join(home, f"seed{seed}")
        if code := train_run(one, make=make, allow_changes=allow_changes, say=say):
            return code
        summaries.append(json.loads((open_path(one.work) / "summary.json").read_text()))
    spread = {
        name: {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)) if seeds > 1 else 0.0, "values": values}
        for name in summaries[0]
        if name.startswith("eval/") and (values := [summary[name] for summary in summaries])
    }
    if jax.process_index() == 0:
        say(f"\n{seeds} seeds")
        for name, found in spread.items():
            values = ", ".join(f"{value:.4g}" for value in found["values"])
            say(f"{name.replace('eval/', 'held-out ').replace('_', ' '):<28} {found['mean']:.4g} +- {found['deviation']:.2g}   ({values})")
        (open_path(home) / "seeds.json").write_text(json.dumps(spread, indent=1))
    return 0


def train_run(
    config: Config, *, make: Callable[[Config], Run] = Run, allow_changes: bool = False, say: Callable[[str], None] = print
) -> int:
    """Trains, or continues, the run of `config.work` that `make` puts together (taught.py has another); returns the exit code: 0, or StopSignal.CODE
    where a signal ended it early."""
    began = time.perf_counter()
    run = make(config)
    first = jax.process_index() == 0
    say = say if first else lambda text: None
    watch, cost = train.Watch(**config.watch), {}
    mode = "max" if config.watch.mode == "max" else "min"
    best = (config.watch.metric, mode) if config.fit.eval_every or config.fit.epochs else None
    with Checkpoints(os.path.join(config.work, "checkpoints"), best=best, **config.checkpoint) as checkpoints, StopSignal() as stop:
        at = checkpoints.latest()
        if at is not None:
            meta = checkpoints.meta(at)
            check_same(meta["config"], config, allow_changes, say)
            watch.best, watch.idle = (meta.get("watch") or {"best": None, "idle": 0}).values()
            if (at >= run.steps or watch.ended) and summaries.summarized(config.work) == at:
                say(f"{config.work} holds the finished run of {at} steps; for another one use another --config.work")
                return 0
        run.check()
        loader = run.loader("train")
        loader.start()  # reads ahead while the model compiles
        run.check_end(loader, watch)
        say(summaries.describe(run))
        if run.tuned is not None:
            say(f"{config.peft.name}: {run.tuned.summary(run.tx)}")
        if at is None:
            state = run.init_state()
        else:
            restored = checkpoints.restore(run.state_like())
            state = restored.state
            loader.restore(restored.data)
            say(f"resumed from step {at} of {checkpoints.folder}")
        if flags := xla.options(run.mesh, config.step.flags):
            say(f"XLA flags: {', '.join(f'{name}={value}' for name, value in flags.items())}")
        step = run.step(state)

        def announce(compiled: xla.Compiled) -> None:
            cost.update(compile_seconds=round(compiled.seconds, 1), compile_cache=compiled.cache)
            say(f"compiled the step in {compiled.seconds:.1f} s (cache {compiled.cache})")

        meter = Meter(
            # an attack's passes are no work of the model
            flops_per_step=train.model_flops(run.loss_of(attack=None), run.shapes, loader.spec),
            peak_flops=chips.peak_flops(),
            total_steps=run.steps,
            counts=tasks.find(config.task.name).counts,
        )
        measure = run.evaluator()
        writers = open_writers(config.work, total_steps=run.steps, step=at or 0, enabled=first)
        try:
            state = train.fit(
                state, xla.announced(step, announce), loader, **run.fit_options(), evaluate=lambda state: measure(state.averaged), checkpoints=checkpoints,
                meta={"config": recipes.flat(config), "classes": run.classes, "steps": run.steps}, write=writers.write, meter=meter, watch=watch, stop=stop,
            )  # fmt: skip
        finally:
            writers.close()
            loader.close()
    if stop.stopped and int(state.step) < run.steps:
        by = "a signal to one of the hosts" if jax.process_count() > 1 else stop.received
        say(f"stopped by {by} at step {int(state.step)}; everything is saved, the same command continues")
        return stop.CODE
    text = run.sample(state.averaged)
    if first:
        summaries.summarize(run, int(state.step), text, time.perf_counter() - began, cost, say)
    return 0


def check_same(saved: Mapping[str, Any], config: Config, allow_changes: bool, say: Callable[[str], None]) -> None:
    """Compares the recipe of a run with that of its continuation. Raises ValueError, unless allowed, where they would learn differently."""
    changes = recipes.diff(saved, recipes.flat(config), ignore=(*recipes.HARMLESS, "mesh"))
    if changes and not allow_changes:
        raise ValueError(
            f"{config.work} holds a run of another recipe ({'; '.join(changes)}); use another --config.work, or --allow-changes to continue it with this one"
        )
    for change in changes:
        say(f"changed: {change}")
