"""The steps of a chain (chains.py): functions from a link to a link, by their names.

    do           what                                                                                 further options
    quantize     `to` a format, "int4:128"                                                            those of compress.quantize and its method
    prune        `to` a pattern, "50%" or "2:4"                                                       those of compress.prune
    factorize    `to` a share of the numbers, 0.8, or a rank                                          those of compress.factorize
    layers       leaves `keep` layers, a number or a share, of each stack: `by` "influence", "run" or "every" (evenly)   rules
    narrow       leaves `keep` of an `axis`, "mlp", "heads" or "kv_heads": `by` "taylor" or "magnitude"                rules
    recover      trains what can train, with the model at the start as a teacher                      steps, lr, weight, temperature, and of optim.make
    qat          `to` a format of whole numbers: begins as `method`, gptq, quantizes, trains as       steps, method, its `options`, scale_rate, and
                 recover does, weights and their scales, through the rounding (compress/qat.py)       those of recover
    pack         zeros and their places leave the memory (compress.packed)

`correct=True` of quantize, prune and factorize: a method that looks at what goes into a matrix first makes good there what was lost before it.

A budget for all matrices together: quantize takes several formats, `to=["int3:32", "int4:32", "int8"]`, and `within="4.5 bits"` or "12 MiB"; factorize with
`spread=True` has the numbers that it leaves where they lose least (compress/budget.py). What was chosen is said, and stands in the row of the report.

`rules` of a step are pairs of a regex over names of weights and what `to` says; without them `to` is for every matrix of the layers, and `tables` for those of
words, which nothing goes into: by the plainest method. `tables` alone, without `to` and `rules`, is by the step's own method, and the layers stay.

Before any step works the shapes of the weights go through the chain (`foresee`), so that a group that does not divide what steps before it leave, or too few
batches for the last step, are errors at once.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bigflax import compress as small
from bigflax import models, nn, optim, train, trees
from bigflax.compress import budget, distill, factoring, pruning, qat, quantizing, structure
from bigflax.weights import Masked, Sparse, input_axis, is_typed, named_weights, parse_axes


@dataclasses.dataclass(frozen=True)
class Link:
    """A model on its way: the run that it is of, its weights or their shapes, the batches that it is fitted to, the model that the chain began with, and what
    the step chose for each matrix out of a budget."""

    run: Any
    params: Any
    batches: Sequence[Any]
    start: tuple[nn.Model, Any]
    chosen: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> nn.Model:
        return self.run.model

    @property
    def forward(self) -> Callable[[Any, Any], Any]:
        """The loss of a batch, without an attack."""
        loss_fn = self.run.loss_of(attack=None)
        return lambda params, batch: train.split_loss(loss_fn(params, batch, None))[0].total

    @property
    def outputs(self) -> Callable[[Any, Any], Any]:
        """The model's own call, labels left out."""
        return lambda params, batch: self.model.apply(params, **{name: x for name, x in batch.items() if name != "labels"})

    @property
    def ahead(self) -> bool:
        """Whether these are shapes, sent ahead of the weights to see whether all steps fit."""
        return small.are_shapes(self.params)


def matrices(model: nn.Model, to: Any) -> trees.Rules:
    """Rules that say `to` of every matrix of the layers: of all that multiplies there, but for routers and filters."""
    found = []
    for name, text in trees.named_leaves(model.axes):
        ax = parse_axes(text)
        if "layers" in ax.stack and ax.first and "_" not in ax.names:
            found.append((re.escape(name), to))
    if not found:
        raise ValueError("this model has no stacked layers whose matrices could be taken for all; say which by rules")
    return found


def tables_of(model: nn.Model, to: Any) -> trees.Rules:
    """Rules that say `to` of every table of words: of all whose rows are a vocabulary's."""
    texts = [(name, parse_axes(text)) for name, text in trees.named_leaves(model.axes)]
    return [(re.escape(name), to) for name, ax in texts if ax.outputs_first and ax.first == ("vocab",)]


class Budget(NamedTuple):
    """An option of what all matrices have together: its name, the rules that it makes of those said, `rules(link, params, said, limit, options)`, and which
    values of single matrices stand in what was said, `values(said, limit)`, which raises ValueError for a limit that does not go with them."""

    option: str
    rules: Callable[..., trees.Rules]
    values: Callable[[Sequence[Any], Any], Sequence[Any]]


def _one_of_several(said: Sequence[Any], limit: Any) -> list[Any]:
    several = [value for value in said if isinstance(value, list | tuple)]
    if bool(several) != (limit is not None):
        raise ValueError("several formats, to=['int3:32', 'int8'], and a budget for all matrices, within='4.5 bits', go together")
    if limit is not None:
        budget.read_budget(limit)
    return [text for value in said for text in (value if isinstance(value, list | tuple) else [value])]


def _spread_or_not(said: Sequence[Any], limit: Any) -> Sequence[Any]:
    if limit not in (None, True, False):
        raise ValueError(f"spread is true or false, not {limit!r}")
    return said


WITHIN = Budget(
    "within",
    lambda link, params, said, limit, options: budget.formats(
        link.model, params, said, limit, forward=link.outputs, batches=link.batches, **options
    ),
    _one_of_several,
)
SPREAD = Budget(
    "spread",
    lambda link, params, said, limit, options: budget.ranks(
        link.model, params, said, forward=link.forward, batches=link.batches, **options
    ),
    _spread_or_not,
)


class Verb(NamedTuple):
    """A function of bigflax.compress, its methods, how a value of its rules is read, the method for tables, and an option that is a budget for all."""

    call: Callable[..., Any]
    methods: Mapping[str, small.Method]
    read: Callable[[Any], Any]
    plain: str
    budget: Budget | None = None

    def __call__(self, link: Link, *, to: Any = None, tables: Any = None, rules: trees.Rules | None = None, **options: Any) -> Link:
        params, data = link.params, {"forward": link.forward, "batches": link.batches}
        limit = None if self.budget is None else options.pop(self.budget.option, None)
        alone = to is None and rules is None
        if tables is not None:
            words = tables_of(link.model, tables)
            if alone and not words:
                raise ValueError("this model has no table of words; say `to` or `rules` of what it has")
            params = self.call(link.model, params, words, **data, **{"method": self.plain, **(options if alone else {})})
        if alone:
            return dataclasses.replace(link, params=params)
        said = matrices(link.model, to) if rules is None else rules
        method = options.setdefault("method", self.method)
        if self.budget is not None and limit:
            said = self.budget.rules(link, params, said, limit, {name: value for name, value in options.items() if name != "correct"})
        made = self.call(link.model, params, said, **data, **options)
        if link.ahead and (self.methods[method].inverts or options.get("correct")):
            (model, began), names = link.start, {name for name, _ in named_weights(link.start[1])}
            meant = {name: w for name, w in named_weights(params) if name in names and trees.match(said, name) is not None}
            forward = dataclasses.replace(link, run=link.run.of(model)).forward
            small.seen_enough(model, began, meant, method=method, forward=forward, batches=link.batches)
        names = [name for name, _ in named_weights(params) if limit]
        chosen = {name: value for name in names for pattern, value in said if re.fullmatch(pattern, name)}
        return dataclasses.replace(link, params=made, chosen=chosen)

    @property
    def method(self) -> str:
        return inspect.signature(self.call).parameters["method"].default

    def check(
        self, to: Any = None, tables: Any = None, rules: trees.Rules | None = None, method: str | None = None, **options: Any
    ) -> None:
        """Raises ValueError for what can be told without a model to be wrong."""
        if (to is None) == (rules is None) and (to is not None or tables is None):
            raise ValueError("a step says what of each matrix: `to`, for all of them, or `rules`, one of the two, or `tables` alone")
        said: Sequence[Any] = [to, *(value for _, value in trees.checked(rules or ()))]
        if self.budget is not None:
            said = self.budget.values(said, options.pop(self.budget.option, None))
        for value in [*said, tables]:
            if value is not None:
                self.read(value)
        correct = options.pop("correct", False)
        small.method_of(self.methods, method or self.method, {name: value for name, value in options.items() if name != "rows"}, correct)


def recover(
    link: Link, *, steps: int, lr: float = 1e-4, weight: float = 0.5, temperature: float = 2.0, say: Callable[[str], None] = print, **optimizer: Any
) -> Link:  # fmt: skip
    """Trains so many steps of the run's own batches by the run's own task, and `weight` of it by what the model at the start says of them: 0 is no teacher."""
    return _trained(link, "recover", say, lambda tx: tx, steps=steps, lr=lr, weight=weight, temperature=temperature, **optimizer)


LEARN = Verb(qat.learned, qat.METHODS, qat.read_whole, "rtn")


def learn(
    link: Link, *, steps: int, to: Any = None, tables: Any = None, rules: trees.Rules | None = None, method: str = "gptq",
    options: Mapping[str, Any] | None = None, scale_rate: float = 1.0, lr: float = 1e-4, weight: float = 0.5, temperature: float = 2.0,
    say: Callable[[str], None] = print, **optimizer: Any,
) -> Link:  # fmt: skip
    """Codes that begin as those of a method and its `options`, and are trained as `recover` trains, they and their scales; `scale_rate` is for these."""
    begun = LEARN(link, to=to, tables=tables, rules=rules, method=method, **(options or {}))
    normed = optimizer.get("name") != "sgd"  # whose steps grow with the gradient, for which the gradient of a scale is made
    slower = lambda tx: qat.paced(tx, scale_rate) if normed else tx
    link = _trained(begun, "qat", say, slower, steps=steps, lr=lr, weight=weight, temperature=temperature, **optimizer)
    return dataclasses.replace(link, params=qat.settled(link.params))


def _trained(
    link: Link, what: str, say: Callable[[str], None], change: Callable[[Any], Any], *, steps: int, lr: float, weight: float, temperature: float,
    **optimizer: Any,
) -> Link:  # fmt: skip
    """What of the link can train, trained, by the optimizer that `change` makes of that of these options."""
    run, (teacher, told) = link.run, link.start
    task = lambda model: run.loss_of(model, attack=None)
    both = distill.taught(link.params, link.model.axes, *((told, teacher.axes) if weight else ()))
    loss_fn = distill.distill(task, link.model, teacher, weight=weight, temperature=temperature) if weight else task(link.model)
    tx = change(optim.make(**{"weight_decay": 0.0, "kind": "linear", "final": 0.0, **optimizer}, lr=lr, steps=steps, axes=both.axes))
    state = train.init_state(both.params, tx, mesh=run.mesh, axes=both.axes, freeze=both.freeze, seed=run.config.seed, table=run.table)
    step = train.train_step(loss_fn, tx, state, seed=run.config.seed, table=run.table)
    with run.loader("train") as loader:
        for at in range(1, steps + 1):
            state, metrics = step(state, next(loader))
            if at in (1, steps) or at % max(1, steps // 5) == 0:
                say(f"  {what} {at}/{steps}  loss {float(metrics['loss'].value):.4f}")
    return dataclasses.replace(link, params=distill.untaught(state.weights))


def layers(link: Link, *, keep: Any, by: str = "influence", rules: trees.Rules | None = None) -> Link:
    """Fewer layers, dense as before; `rules` say other numbers of other stacks."""
    model, said = link.model, [(".*", keep)] if rules is None else rules
    if by == "every":
        listed = lambda units, many: [int(i * len(units) / many) for i in range(many)]
        each = {stack: [i for unit in units for i in unit.layers] for stack, units in structure.stacks(model).items()}
        share = lambda of, value: round(value * len(of)) if isinstance(value, float) else value
        kept = [(re.escape(stack), listed(of, share(of, value))) for stack, of in each.items() if (value := trees.match(said, stack))]
    elif by in ("influence", "run"):
        sides = {stack: 1 + sum(len(unit.layers) for unit in units) for stack, units in structure.stacks(model).items()}
        blank = {stack: np.zeros((side, side)) for stack, side in sides.items()}
        apart = blank if link.ahead else structure.distances(model, link.params, link.batches, angle=by == "run")
        choose = structure.best_run if by == "run" else structure.best_layers
        kept = choose(model, apart if by == "run" else structure.influence(apart), said)
    else:
        raise ValueError(f"layers are chosen by 'influence', 'run' or 'every', not {by!r}")
    return _smaller(link, lambda params: structure.layers(model, params, kept))


def narrow(link: Link, *, axis: str, keep: Any, by: str = "taylor", rules: trees.Rules | None = None) -> Link:
    """Fewer channels or heads in each layer, dense as before."""
    if by not in ("taylor", "magnitude"):
        raise ValueError(f"channels and heads are chosen by 'taylor' or 'magnitude', not {by!r}")
    model, loss_fn = link.model, link.run.loss_of(attack=None)
    if link.ahead:
        of = "mlp" if axis == "mlp" else "heads"
        scores = {at: np.zeros((*place.stack, place.sizes[of])) for at, place in structure.places(model, axis).items()}
    elif by == "magnitude":
        scores = structure.magnitude(model, link.params, axis)
    else:
        scores = structure.taylor(model, link.params, axis, loss_fn, link.batches)
    return _smaller(link, lambda params: structure.narrow(model, params, axis, [(".*", keep)] if rules is None else rules, scores))


def _smaller(link: Link, cut: Callable[[Any], tuple[Any, Mapping[str, Any]]]) -> Link:
    changes: dict[str, Any] = {}

    def made(params):
        params, its = cut(params)
        changes.update(its)
        return params

    params = jax.eval_shape(made, link.params) if link.ahead else made(link.params)
    return dataclasses.replace(link, run=link.run.of(models.resized(link.model, params, changes)), params=params)


def pack(link: Link) -> Link:
    """Sparse in the place of Masked."""
    return dataclasses.replace(link, params=small.packed(link.params, link.model.axes))


STEPS: Mapping[str, Callable[..., Link]] = {
    "quantize": Verb(small.quantize, small.QUANTIZE, quantizing.read_format, "rtn", WITHIN),
    "prune": Verb(small.prune, small.PRUNE, pruning.read_pattern, "magnitude"),
    "factorize": Verb(small.factorize, small.FACTORIZE, factoring.read_share, "svd", SPREAD),
    "layers": layers, "narrow": narrow, "recover": recover, "qat": learn, "pack": pack,
}  # fmt: skip
BY_NAME = ("quantize", "prune", "factorize", "qat")  # the steps whose rules are over names of weights


def check(chain: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a chain that names no step, or one that there is not, or that contradicts itself."""
    if not chain:
        raise ValueError("a chain has at least one step, such as dict(do='quantize', to='int8')")
    codes, changed = "", ""  # the step before that left codes, and that which left no array among the matrices
    for said in chain:
        what = said.get("do", "")
        if what not in STEPS:
            raise ValueError(f"a step does {what!r}; {trees.did_you_mean(str(what), STEPS, 'it can')}")
        if what in ("prune", "factorize", "narrow") and codes:
            raise ValueError(f"{what} behind {codes} has only codes to work on; put it before")
        if what == "qat" and said.get("to") is not None and changed:
            raise ValueError(
                f"qat behind {changed} finds no array left that could learn to be rounded; put it in its place, or give other `rules`"
            )
        step, options = STEPS[what], {name: value for name, value in said.items() if name != "do"}
        if isinstance(step, Verb):
            step.check(**options)
        elif wrong := _wrong(step, options):
            raise ValueError(f"{what} {wrong}")
        elif what == "qat":
            LEARN.check(**_begins(options))
        codes = what if what in ("quantize", "qat") else codes
        changed = what if what in ("quantize", "qat", "prune", "factorize") and said.get("to") is not None else changed


def _begins(options: Mapping[str, Any]) -> dict[str, Any]:
    """What these options of `learn` say to LEARN."""
    said = {name: p.default for name, p in inspect.signature(learn).parameters.items()} | dict(options)
    return {**{name: said[name] for name in ("to", "tables", "rules", "method")}, **(said["options"] or {})}


def foresee(link: Link, chain: Sequence[Mapping[str, Any]]) -> None:
    """Takes the shapes of a link's weights through a checked chain. Raises ValueError for what will not fit when its turn comes. It sees as far as shapes alone
    tell: zeros that are packed end it, unless so many of each few inputs stay."""
    link = dataclasses.replace(link, params=jax.eval_shape(lambda params: params, link.params))
    patterns: dict[str, pruning.Pattern] = {}
    for at, said in enumerate(chain, 1):
        what, options = said["do"], {name: value for name, value in said.items() if name != "do"}
        try:
            if what == "pack":
                masked = {name: w for name, w in named_weights(link.params) if isinstance(w, Masked)}
                if not all(name in patterns and patterns[name].of for name in masked):
                    return
                texts = dict(trees.named_leaves(link.model.axes))
                few = {name: _packed(w, texts[name], patterns[name]) for name, w in masked.items()}
                link = dataclasses.replace(link, params=_with(link.params, few))
            elif what in AHEAD:
                link = STEPS[what](link, **options)
            elif what == "qat":
                link = dataclasses.replace(link, params=jax.eval_shape(qat.settled, LEARN(link, **_begins(options)).params))
            elif what != "recover":  # which leaves all shapes as they are
                return
        except ValueError as error:
            raise ValueError(f"step {at}, {what}: {error}") from error
        if what == "prune":
            rules = matrices(link.model, options["to"]) if options.get("rules") is None else options["rules"]
            values = {name: trees.match(rules, name) for name, w in named_weights(link.params) if isinstance(w, Masked)}
            patterns |= {name: pruning.read_pattern(value) for name, value in values.items() if value is not None}


def _with(params: Any, new: Mapping[str, Any]) -> Any:
    return trees.map_named(lambda name, w: new.get(name, w), params, is_leaf=is_typed)


AHEAD = ("quantize", "prune", "factorize", "layers", "narrow")  # steps that take shapes too


def _packed(w: Masked, axes: str, pattern: pruning.Pattern) -> Any:
    """The shapes of the Sparse that `pack` makes of a Masked of this pattern."""
    at = input_axis(axes)
    if w.w.shape[at] % 8:
        return w
    assert pattern.of
    full, groups = [*w.w.shape], w.w.shape[at] // pattern.of
    sized = lambda n, dtype: jax.ShapeDtypeStruct([*full[:at], n, *full[len(full) + at + 1 :]], dtype)
    made = Sparse(sized(int(groups * (pattern.of - pattern.zeros)), w.w.dtype), sized(full[at] // 8, np.uint8), at)
    return made if trees.nbytes(made) < trees.nbytes(w.w) else w


def _wrong(step: Callable[..., Link], options: Mapping[str, Any]) -> str:
    """What a step lacks, or takes nothing of; "" where all is well."""
    takes = {name: p for name, p in inspect.signature(step).parameters.items() if name not in ("link", "say")}
    if takes.pop("optimizer", None):  # what is left goes to the optimizer
        takes |= {name: p for name, p in inspect.signature(optim.make).parameters.items() if name not in (*takes, "axes")}
    unknown = [name for name in options if name not in takes]
    lacks = [name for name, p in takes.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY and name not in options]
    if unknown:
        return f"takes no {unknown[0]!r}; {trees.did_you_mean(unknown[0], takes, 'its options are')}"
    return f"needs {lacks[0]!r}" if lacks else ""
