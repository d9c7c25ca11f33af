"""A run whose model learns from a teacher too: what the section `teacher` of a recipe says.

    teacher=dict(source="runs/finetune-full", every=2, weight=0.5, temperature=2.0)

`source` is the work folder of a run, a folder of weights or a hub id; the other keys are those of `distill.lesson`. The student is the recipe's model. It
begins with every k-th of the teacher's layers where `every` says k (DistilBERT: Sanh et al. 2019, arXiv 1910.01108, section 3), else as `model.source` says
or from nothing; its tokenizer is the teacher's, unless the recipe names another.

Texts need no labels to be learned from: with `data.unlabelled` those without one are what the teacher finds, and `weight=1` looks at no label. What is
evaluated on has labels, and the classes are those of all sources.

The student alone is trained, saved, evaluated by its task's own loss, and exported. The teacher's weights lie frozen beside it during a step, and nowhere else:
a run that goes on opens them again. Evaluation is that of any run; `distillation` and `agreement` are among the metrics of training.

Left out on purpose: attacks, projections between widths (`distill.taught(project=...)` in a step of your own), an average of the student as its teacher, and
teachers' answers written down (teachers.py).
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bigflax import data, exports, hub, peft, runs, sharding, train, trees
from bigflax.compress import distill, students
from bigflax.nn import Model
from bigflax.weights import dense, is_typed


class Teacher(NamedTuple):
    """A model and its weights, on the student's mesh; its tokenizer and the names of its classes, where it has any."""

    model: Model
    params: Any
    tokenizer: data.Tokenizer | None
    labels: tuple[str, ...]


def open_teacher(source: str, *, mesh: jax.sharding.Mesh, table: sharding.Table) -> Teacher:
    """That of a run's work folder, of a folder of weights or of a hub id. Raises FileNotFoundError or ValueError, in one sentence."""
    if os.path.isdir(os.path.join(source, "checkpoints")):
        found = exports.trained(source, [f"mesh.{axis}={size}" for axis, size in mesh.shape.items()])
        run, params = found.run, found.weights if found.run.tuned is None else peft.merge(found.weights)
        model, tokenizer, labels = run.base, run.tokenizer if run.kind.tokenized else None, found.labels
    else:
        model, params = hub.load(source, mesh=mesh, table=table)
        assert model.source is not None
        tokenizer = data.load_tokenizer(model.source) if os.path.exists(os.path.join(model.source, "tokenizer.json")) else None
        said = hub.read_config(model.source).get("id2label") or {}
        labels = tuple(said[key] for key in sorted(said, key=int))
        labels = () if labels == tuple(f"LABEL_{i}" for i in range(len(labels))) else labels  # which are no names
    return Teacher(model, jax.device_put(params, sharding.shardings(params, model.axes, mesh, table)), tokenizer, labels)


class Taught(runs.Run):
    """A Run of a recipe with a section `teacher`."""

    @functools.cached_property
    def teacher(self) -> Teacher:
        return open_teacher(self.config.teacher.source, mesh=self.mesh, table=self.table)

    @functools.cached_property
    def lesson(self) -> Callable[..., Any]:
        """The loss that is learned, over the params of both (distill.py)."""
        said = {name: value for name, value in self.config.teacher.items() if name not in ("source", "every")}
        made = distill.lesson(self.loss_of, self.model, self.teacher.model, **said)
        return peft.dropout(made, rate) if (rate := self.config.peft.get("dropout", 0.0)) else made

    def check(self) -> None:
        """Raises also for a teacher that reads something else than the student, by another vocabulary, or knows other classes."""
        c, source = self.config, self.config.teacher.source
        if c.task.attack is not None:
            raise ValueError("a student is not attacked while it is taught; leave out task.attack, or teacher")
        if c.teacher.every is not None and c.model.source is not None:
            raise ValueError(
                f"the student begins with the teacher's layers (teacher.every) or as {c.model.source!r}; leave out one of the two"
            )
        super().check()
        teacher, takes = self.teacher, lambda model: [*model.module.example()]
        if takes(teacher.model) != takes(self.base):
            raise ValueError(
                f"the teacher {source!r}, a {teacher.model.family}, reads {', '.join(takes(teacher.model))}, and the student, a {self.base.family}, "
                f"{', '.join(takes(self.base))}; both must read the same batches"
            )
        if self.kind.tokenized:
            self._check_words(teacher)
        classes = self.classes if isinstance(self.classes, tuple | list) else ()
        if classes and teacher.labels and [*classes] != [*teacher.labels]:
            raise ValueError(
                f"the teacher {source!r} tells apart {_some(teacher.labels)}, and the data have {_some(classes)}; both must have the same "
                "classes in one order"
            )

    def _check_words(self, teacher: Teacher) -> None:
        source, ours = self.config.teacher.source, self.tokenizer
        if teacher.tokenizer is not None:
            if teacher.tokenizer.inner.get_vocab() != ours.inner.get_vocab():
                raise ValueError(
                    f"the teacher {source!r} has a vocabulary of its own, of {teacher.tokenizer.vocab_size} words where the student's has "
                    f"{ours.vocab_size}; give the student the teacher's tokenizer (leave out the section tokenizer)"
                )
        elif (size := teacher.model.config.get("vocab_size")) is not None and size < ours.vocab_size:
            raise ValueError(
                f"the teacher {source!r} knows {size} words, and the student's tokenizer has {ours.vocab_size}; both must have one"
            )

    def check_end(self, loader: data.Loader, watch: train.Watch) -> None:
        """Raises also where what the two say cannot be compared."""
        super().check_end(loader, watch)
        both = lambda own, guide, batch: self.lesson({**own, distill.TEACHER: guide}, batch, None)[:2]
        try:
            jax.eval_shape(both, self.shapes, self.teacher.params, loader.spec)
        except (TypeError, ValueError) as error:  # an input that only one of the two has
            raise ValueError(f"the teacher {self.config.teacher.source!r} cannot be asked as the student is: {error}") from error

    def begin(self) -> Any:
        """With `every`, that many of the teacher's layers; what it has no weights for, a head say, is new."""
        every, model = self.config.teacher.every, self.teacher.model
        if every is None:
            return super().begin()
        arrays = jax.tree.map(dense, self.teacher.params, is_leaf=is_typed)
        taken = dict(trees.named_leaves(students.every_layer(arrays, model.axes, every)))
        wanted = trees.named_leaves(self.base.shapes())
        if unlike := [(name, like) for name, like in wanted if name in taken and taken[name].shape != like.shape]:
            name, like = unlike[0]
            raise ValueError(
                f"the student cannot begin with every {every}. of the teacher's layers: {name} would be {taken[name].shape}, and the student's is "
                f"{like.shape}; give it the teacher's sizes and so many layers, or leave out teacher.every"
            )
        new = {} if all(name in taken for name, _ in wanted) else dict(trees.named_leaves(self.base.init(jax.random.key(self.config.seed))))
        return trees.map_named(lambda name, like: taken[name].astype(like.dtype) if name in taken else new[name], self.base.shapes())

    def step(self, state: train.State) -> train.Step:
        """Of the student's state: the teacher is put beside it for the step and taken away again, so that no optimizer and no checkpoint holds it."""
        guide, own, tx = self.teacher.params, distill.untaught, self.tx
        nothing = jax.tree.map(lambda _: None, guide)

        def update(grads, opt, params=None):
            moved, opt = tx.update(own(grads), opt, own(params))
            return {**own(moved), distill.TEACHER: nothing}, opt

        def beside(state: train.State) -> train.State:
            return state._replace(params={**state.params, distill.TEACHER: nothing}, frozen={**state.frozen, distill.TEACHER: guide})

        both = tx._replace(init=lambda params: tx.init(own(params)), update=update)
        taught = train.train_step(self.lesson, both, beside(state), seed=self.config.seed, table=self.table, **self.config.step)

        def step(state: train.State, batch: Any) -> tuple[train.State, dict[str, Any]]:
            new, metrics = taught(beside(state), batch)
            return new._replace(params=own(new.params), frozen=own(new.frozen)), metrics

        return step


def _some(names: Any) -> str:
    """The first of them."""
    return ", ".join([*map(str, names[:4]), *(["..."] if len(names) > 4 else [])])
