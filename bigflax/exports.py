"""What a run leaves: its trained model, read from the work folder, and written for others to read."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bigflax import adapters, gguf, hub, peft, recipes
from bigflax.checkpoint import Checkpoints
from bigflax.nn import Model
from bigflax.runs import Run


class Trained(NamedTuple):
    """A run, the step of its best checkpoint, or of its newest where none is best, and the weights there."""

    run: Run
    step: int
    weights: Any

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of its classes, where they have any."""
        return tuple(self.run.classes) if isinstance(self.run.classes, tuple | list) else ()


def trained(work: str, overrides: Iterable[str] = ()) -> Trained:
    """What the work folder of a run holds, its recipe with these changes; its data need not be here any more."""
    with Checkpoints(os.path.join(work, "checkpoints")) as checkpoints:
        meta = checkpoints.meta()
        said = recipes.unflatten(meta["config"])
        watch = said.watch if said.fit.eval_every or said.fit.epochs else None
    best = None if watch is None else (watch.metric, watch.mode)
    with Checkpoints(os.path.join(work, "checkpoints"), best=best) as checkpoints:
        said.work = work
        for path, value in map(recipes.parse_override, overrides):
            recipes.set_key(said, path, value)
        run, step = Run(said), checkpoints.best() or checkpoints.latest()
        run.classes, run.steps = meta["classes"], meta["steps"]
        return Trained(run, step, checkpoints.restore(run.state_like(), step=step).state.averaged)  # type: ignore[arg-type]


def begun(config: Any) -> Trained:
    """What a recipe begins with: the run of its work folder where there is one, else the weights of its `model.source`."""
    if os.path.isdir(os.path.join(config.work, "checkpoints")):
        found = trained(config.work)
        found.run.config = config
        return found
    if config.model.source is None:
        raise ValueError(
            f"{config.work!r} holds no run, and the recipe names no model.source: there are no weights; train it, or name some"
        )
    run = Run(config)
    return Trained(run, 0, run.init_state().averaged)


def export(work: str, target: str, *, adapter: bool = False, dtype: Any = None, say: Callable[[str], None] = print) -> None:
    """Writes the weights of a run's best checkpoint, or of its newest where none is best, as `write` does, with tokenizer and names of classes;
    adapted ones merged, or with `adapter` what was trained upon them alone, as PEFT has it."""
    if adapter and dtype is not None:
        raise ValueError("an adapter is written in the dtype that it was trained in; leave out --dtype, or --adapter")
    found = trained(work)
    run, weights = found.run, found.weights
    if adapter:
        adapters.save_adapter(run.model, weights, target)
    else:
        tokenizer = run.tokenizer if run.kind.tokenized else None
        write(
            run.model, weights if run.tuned is None else peft.merge(weights), target, dtype=dtype, tokenizer=tokenizer, labels=found.labels
        )
    say(f"the weights of step {found.step} are in {target}")


def write(model: Model, params: Any, target: str, *, dtype: str | None = None, tokenizer: Any = None, labels: Sequence[str] = ()) -> None:
    """Writes weights, typed ones merged, as a Hugging Face folder, or as one file for llama.cpp where the target is called `.gguf`."""
    if target.endswith(".gguf"):
        gguf.save(model, params, target, dtype=dtype, tokenizer=tokenizer)
    elif dtype in gguf.CODES:
        raise ValueError(f"{dtype} is a type of GGUF files; call the target {target}.gguf, or give it another dtype")
    else:
        hub.save(model, params, target, dtype=dtype, merge=True, tokenizer=tokenizer, labels=labels)
