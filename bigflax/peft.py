"""Parameter-efficient fine-tuning: functions from params to params, after which little trains and the rest is frozen.

    params = lora(params, [("blocks/attention/(q|v)", 8)], axes=model.axes, rng=key)             typed weights in the place of arrays (weights.py)
    tuned = create("lora", model, params, rng=key, rules=[("blocks/attention/(q|v)", 8)])        the same by its name, and what it freezes
    state = init_state(tuned.params, tx, mesh=mesh, axes=tuned.model.axes, freeze=tuned.freeze)  gradients and moments of what trains alone

    METHOD        what trains                                                 source
    lora, dora    a b beside a matrix, DoRA its length too                    Hu et al. 2021, 2106.09685; Liu et al. 2024, 2402.09353
      base=       the same over int8, int4 or nf4 weights: QLoRA              Dettmers et al. 2023, 2305.14314
    ia3           a factor for each key, value and mlp channel                Liu et al. 2022, 2205.05638
    adapters      a bottleneck behind each branch of a layer                  Houlsby et al. 2019, 1902.00751; Pfeiffer et al. 2020, 2005.00247
    prompt        rows in front of the text's                                 Lester et al. 2021, 2104.08691
    prefix        keys and values before the text's, in each layer            Li and Liang 2021, 2101.00190
    bitfit        biases                                                      Ben Zaken et al. 2021, 2106.10199
    last_layers   the last k layers                                           Lee et al. 2019, 1911.03090
    head_only     the head

Rules are ordered (regex, value) over the names of weights, first match wins, None is for nothing; one that reaches no matrix raises. Nothing in a
model changes: it multiplies by what stands in a weight's place, and `prompt` and `prefix` wrap its `apply`.

What is trained is an adapter, {name: weight without its base}: `split` takes it off, `attach` puts it upon another copy of its base, so that a dict of
adapters over one base is switched by name; `combine` adds adapters of LoRA up, and `merge` makes arrays of all of it.

Left out on purpose: the network that makes a prefix while it trains (Li and Liang, section 4.3; `words` begins with what real words leave instead),
adapters inside of a branch, and rank schedules. Legend: B batch, T time, P tokens of a prompt, K kv heads, H head width, L layers.
"""

import copy
import dataclasses
import inspect
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigflax import nn, ops, trees, weights
from bigflax.nn import Model
from bigflax.weights import IA3, Adapted, Adapter, DoRA, LoRA, Prompted, Weight, is_typed, named_weights, parse_axes, shape

Array = jax.Array
Adapters = Mapping[str, Any]  # {name of a leaf: its typed weight with None for a base, or what else trained}

# -- typed weights by rules ------------------------------------------------------------------------------------------------


def lora(
    params: Any, rules: trees.Rules, *, axes: Any, rng: Array, alpha: float | None = None, rs: bool = False,
    base: str | trees.Rules | None = None, group: int = 64,
) -> Any:  # fmt: skip
    """LoRA over the matrices that the rules match, of the rank that they say, or (rank, alpha); it begins as what it stands upon.

    `alpha` is that of the other rules, by default their rank; with `rs` the update's scale is alpha / sqrt(rank) (rsLoRA). `base` "int8", "int4"
    or "nf4" quantizes those matrices, rules the ones that they match, in groups of `group` inputs or what of it divides them.
    """
    return _low_rank(weights.lora, params, rules, axes, rng, alpha, rs, base, group)


def dora(
    params: Any, rules: trees.Rules, *, axes: Any, rng: Array, alpha: float | None = None, rs: bool = False,
    base: str | trees.Rules | None = None, group: int = 64,
) -> Any:  # fmt: skip
    """DoRA, as `lora`; it begins as what it stands upon but for the rounding of |w| / |w|."""
    return _low_rank(weights.dora, params, rules, axes, rng, alpha, rs, base, group)


def _low_rank(make, params, rules, axes, rng, alpha, rs, base, group):
    if base is not None:
        kinds = [(pattern, None if value is None else base) for pattern, value in rules] if isinstance(base, str) else base
        params = quantized(params, kinds, axes=axes, group=group)

    def one(name, w, text, value):
        rank, its = value if isinstance(value, Sequence) else (value, alpha)
        return make(w, rank, axes=text, rng=_key(rng, name), alpha=its, rs=rs)

    return _adapted(one, params, rules, axes)


def quantized(params: Any, rules: trees.Rules, *, axes: Any, group: int = 64) -> Any:
    """The matrices that the rules match, rounded to "int8", "int4" or "nf4": one scale for each output and `group` inputs of the last input axis, or
    what of it divides that."""

    def one(name, w, text, kind):
        if kind not in ("int8", "int4", "nf4"):
            raise ValueError(f"a base cannot be quantized to {kind!r}; there are 'int8', 'int4' and 'nf4'")
        if is_typed(w):
            raise ValueError(f"{name} is a {type(w).__name__} already; quantize the arrays of a model before they are adapted")
        return weights.quantize(w, kind, axes=text, group=math.gcd(group, shape(w)[parse_axes(text).contracted[-1]]))

    return _adapted(one, params, rules, axes)


IA3_RULES = ((".*/(attention|cross)/(k|v)", "outputs"), (".*/mlp/down", "inputs"))


def ia3(params: Any, rules: trees.Rules = IA3_RULES, *, axes: Any) -> Any:
    """IA3 over the matrices that the rules match, of their "outputs" or their "inputs"; it begins as what it stands upon.

    What scales outputs scales the bias that the module adds to them too, by a copy of it that does not train: let not both train.
    """

    def one(name, w, text, which):
        if which not in ("outputs", "inputs"):
            raise ValueError(f"IA3 scales the 'outputs' or the 'inputs' of a matrix, not {which!r}")
        return weights.ia3(w, axes=text, inputs=which == "inputs", bias=_bias(name, w, text, leaves))

    leaves = dict(named_weights(params))
    return _adapted(one, params, rules, axes)


ADAPTER_RULES = ((".*/(attention/out|mlp/down)", 64),)


def adapters(params: Any, rules: trees.Rules = ADAPTER_RULES, *, axes: Any, rng: Array, act: str = "relu") -> Any:
    """Bottleneck adapters, of the sizes that the rules say, behind the matrices that end a branch; they do nothing at the start.

    After the attention and the mlp as Houlsby et al. have it; after the mlp alone, [(".*/mlp/down", 64)], as Pfeiffer et al. do.
    """
    if act not in nn.ACTIVATIONS or not hasattr(jax.nn, act):
        known = sorted(name for name in nn.ACTIVATIONS if hasattr(jax.nn, name))
        raise ValueError(f"an adapter has no activation {act!r}; {trees.did_you_mean(act, known, 'there are')}")
    leaves = dict(named_weights(params))

    def one(name, w, text, size):
        return weights.adapter(w, size, axes=text, rng=_key(rng, name), act=act, bias=_bias(name, w, text, leaves))

    return _adapted(one, params, rules, axes)


def _adapted(make: Callable[..., Weight], params: Any, rules: trees.Rules, axes: Any) -> Any:
    """The tree with `make(name, w, axes, value)` in the place of each matrix for which the rules have a value."""
    matrices = [name for name, text in trees.named_leaves(axes) if parse_axes(text).first]
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, name) for name in matrices):
            raise ValueError(
                f"rule {pattern!r} matches no matrix; {trees.did_you_mean(pattern, matrices, 'those that can be adapted are')}"
            )

    def one(name, w, text):
        value = trees.match(rules, name) if parse_axes(text).first else None
        return w if value is None else make(name, w, text, value)

    return trees.map_named(one, params, axes, is_leaf=is_typed)


def _bias(name: str, w: Weight, axes: str, leaves: Mapping[str, Any]) -> Array | None:
    """What the module adds to the outputs of this matrix."""
    contracted, bias = parse_axes(axes).contracted, leaves.get(_bias_name(name))
    outputs = tuple(size for i, size in enumerate(shape(w)) if i not in contracted)
    return bias if bias is not None and shape(bias) == outputs else None


def _bias_name(name: str) -> str:
    """`q_bias` beside `q`, `b` beside `w`."""
    return f"{name[:-1]}b" if name.endswith("/w") else f"{name}_bias"


def _key(rng: Array, name: str) -> Array:
    """The randomness of this leaf, whatever other leaves there are."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def dropout(loss_fn: Callable[..., Any], rate: float) -> Callable[..., Any]:
    """The loss with dropout in front of every LoRA's and DoRA's `a`, where it is given an rng: entries of their inputs are zero with probability `rate`,
    for each layer others. The experts of a mixture and rows that are looked up have none."""
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout of {rate} is no probability below 1")

    def dropped(params, batch, rng=None):
        def one(name, w):
            if rng is None or not isinstance(w, LoRA | DoRA):
                return w
            return dataclasses.replace(w, key=jax.random.split(_key(rng, name), w.a.shape[: w.stacked]), rate=rate)

        return loss_fn(trees.map_named(one, params, is_leaf=is_typed), batch, rng)

    return dropped


# -- models ----------------------------------------------------------------------------------------------------------------


class Tuned(NamedTuple):
    """A model, its params, and regexes of the leaves that train."""

    model: Model
    params: Any
    trained: tuple[str, ...]

    @property
    def freeze(self) -> trees.Rules:
        """The rules for `init_state`."""
        return [*((pattern, False) for pattern in self.trained), (".*", True)]

    def summary(self, tx: optax.GradientTransformation) -> str:
        """What trains, what does not, and the optimizer's memory for it, in a line."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.params)
        kept, rest = trees.partition(shapes, weights.trains(shapes, self.freeze, self.model.axes))
        trained, size = trees.count(kept), lambda tree: trees.human(trees.nbytes(tree), "B", 1024)
        share = f"{100 * trained / (trained + trees.count(rest)):.2g}%"
        return (
            f"{trained:,} parameters ({share}, {size(kept)}) train, {trees.count(rest):,} ({size(rest)}) are frozen; "
            f"the optimizer holds {size(jax.eval_shape(tx.init, kept))}"
        )


def prompt(model: Model, params: Any, tokens: int, *, rng: Array, words: Any = None) -> Tuned:
    """The model with `tokens` learned rows in front of every text; they begin as the table's rows of `words`, ids [P], or of random ones.

    The rows are ids V to V + P - 1 of a longer table, so the model computes as if they were text: positions begin with them, and a head that looks at
    the first position looks at the first of them. Their places do not appear in what comes out. To generate, put these ids in front of the
    text and use the model that was given here. Packed rows (segment_ids) and caches are refused.
    """
    _text(model, params, "a prompt")
    V = shape(params["embed"]["tokens"])[0]
    chosen = jax.random.randint(rng, (tokens,), 0, V) if words is None else _words(words, tokens, V)

    def add(params):
        made = weights.prompted(params["embed"]["tokens"], ops.take(params["embed"]["tokens"], chosen, jnp.float32))
        return {**params, "embed": {**params["embed"], "tokens": made}}

    def apply(params, *, rng=None, **inputs):
        _refuse(inputs, "a prompt")
        given = {name: inputs.pop(name) for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids") if name in inputs}
        given = {name: x for name, x in given.items() if x is not None}
        at_P = jnp.arange(weights.rows(params["embed"]["tokens"]) - V)
        front = {"input_ids": V + at_P, "attention_mask": at_P * 0 + 1, "token_type_ids": at_P * 0, "position_ids": at_P}
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"] + len(at_P)
        join = lambda x, row_P: jnp.concatenate([jnp.broadcast_to(row_P, (len(x), len(row_P))).astype(x.dtype), x], axis=1)
        out = model.apply(params, rng=rng, **{name: join(jnp.asarray(x), front[name]) for name, x in given.items()}, **inputs)
        return _behind(out, len(at_P))

    return Tuned(_wrapped(model, add, apply, model.axes), add(params), (r"embed/tokens/prompt",))


def _behind(out: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The outputs without the places of the first tokens."""
    cut = lambda x: x[:, tokens:]
    timed = {name: cut(x) for name, x in out.items() if name in ("last_hidden_state", "start_logits", "end_logits")}
    if "hidden_states" in out:
        timed["hidden_states"] = tuple(map(cut, out["hidden_states"]))
    if "head" in out:
        timed["head"] = {**out["head"], "x_BTD": cut(out["head"]["x_BTD"])}
    if getattr(out.get("logits"), "ndim", 0) == 3:
        timed["logits"] = cut(out["logits"])
    return {**out, **timed}


def prefix(model: Model, params: Any, tokens: int, *, rng: Array, words: Any = None) -> Tuned:
    """The model with `tokens` learned keys and values before the text's in every layer: leaves `prefix/k` and `prefix/v` [L, P, K, H].

    They begin near zero, or as what the `words`, ids [P], leave in the layers. The wrapped `apply` hands them to the model as a cache, so that the text's
    positions begin at P, `position_ids` that are given are moved by as many, and `attention_mask` speaks of the text alone; an encoder sees them from
    everywhere. Packed rows (segment_ids), caches, which generation needs, and stages of a pipeline are refused.
    """
    _text(model, params, "a prefix")
    blocks = [block for group in model.module.groups for block in group.blocks]
    kinds = {(block.attention.kv_heads or block.attention.heads, block.attention.head_dim) for block in blocks}
    if len(kinds) > 1 or any(block.cross is not None for block in blocks):
        raise ValueError("a prefix has keys of one shape for all layers, and this model's layers differ or look at another sequence too")
    L, (K, H), dtype = sum(group.layers for group in model.module.groups), kinds.pop(), model.module.embed.dtype

    def cache_of(k_LPKH, v_LPKH, B, T):
        P = k_LPKH.shape[1]
        longer = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, T), *((0, 0),) * (x.ndim - 3)))
        grow = lambda x: longer(jnp.broadcast_to(x[:, None].astype(dtype), (L, B, P, K, H)))
        segments = longer(jnp.ones((L, B, P), jnp.int32))
        return {"k": grow(k_LPKH), "v": grow(v_LPKH), "segments": segments, "index": jnp.full(L, P, jnp.int32)}

    if words is None:
        draw = lambda name: 0.02 * jax.random.normal(_key(rng, name), (L, tokens, K, H))
        made = {"k": draw("prefix/k"), "v": draw("prefix/v")}
    else:
        none = jnp.zeros((L, 0, K, H))
        seen = model.apply(
            params, input_ids=_words(words, tokens, weights.rows(params["embed"]["tokens"]))[None], cache=cache_of(none, none, 1, tokens)
        )
        made = {name: seen["cache"][name][:, 0].astype(jnp.float32) for name in ("k", "v")}
    limit = getattr(model.module.embed, "positions", 0)

    def apply(params, *, rng=None, **inputs):
        _refuse(inputs, "a prefix")
        k_LPKH, v_LPKH, (B, T) = params["prefix"]["k"], params["prefix"]["v"], inputs["input_ids"].shape
        P = k_LPKH.shape[1]
        if k_LPKH.shape != (L, P, K, H):
            raise ValueError(f"a prefix {k_LPKH.shape} is for another model: this one has {L} layers with {K} heads of {H} for keys")
        if limit and P + T > limit:
            raise ValueError(f"{T} tokens behind a prefix of {P} are more than the {limit} learned positions; cut the sequences")
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + P
        own = {name: leaf for name, leaf in params.items() if name != "prefix"}
        out = model.apply(own, rng=rng, cache=cache_of(k_LPKH, v_LPKH, B, T), **inputs)
        return {name: x for name, x in out.items() if name != "cache"}

    axes = {**model.axes, "prefix": dict.fromkeys(made, "layers | _ kv_heads head_dim")}
    add = lambda params: {**params, "prefix": made}
    return Tuned(_wrapped(model, add, apply, axes), add(params), (r"prefix/[kv]",))


def _text(model: Model, params: Any, what: str) -> None:
    """Raises ValueError where the model does not read one text."""
    embed = getattr(model.module, "embed", None)
    if getattr(embed, "takes", None) != "input_ids" or not hasattr(model.module, "groups") or "tokens" not in params.get("embed", {}):
        raise ValueError(f"{what} stands before the text of a model that reads one text, an encoder or a decoder alone; this is none")


def _words(words: Any, tokens: int, V: int) -> Array:
    ids = jnp.asarray(words)
    if ids.shape != (tokens,) or int(ids.max()) >= V:
        raise ValueError(f"words of shape {ids.shape} up to id {int(ids.max())} are not {tokens} ids below {V}")
    return ids


def _refuse(inputs: Mapping[str, Any], what: str) -> None:
    for name in ("segment_ids", "cache"):
        if inputs.get(name) is not None:
            raise ValueError(f"{what} stands before one text a row and makes no cache: {name} cannot be given with it")


def _wrapped(model: Model, add: Callable[[Any], Any], apply: Callable[..., Any], axes: Any) -> Model:
    init = lambda rng: add(model.init(rng))
    return dataclasses.replace(model, init=init, apply=apply, axes=axes, shaped=jax.eval_shape(add, model.shapes()))


def bitfit(model: Model, params: Any) -> Tuned:
    """The model as it is; its biases train, those of norms too. Raises ValueError where it has none."""
    biases = [
        name for name, text in trees.named_leaves(model.axes) if re.fullmatch(r"(.*/)?(\w+_bias|bias|b)", name) and "statistic" not in text
    ]
    if not biases:
        raise ValueError("bitfit trains biases, and this model has none; take 'lora' or 'ia3'")
    return Tuned(model, params, tuple(map(re.escape, biases)))


def head_only(model: Model, params: Any) -> Tuned:
    """The model as it is; its head trains. Raises ValueError where that has no weights of its own."""
    if "head" not in params:
        raise ValueError("head_only trains the head's own weights, and this model's head has none")
    return Tuned(model, params, ("head/.*",))


def last_layers(model: Model, params: Any, layers: int) -> Tuned:
    """The model with its last layers in groups of their own, which train: what is before them has neither gradients nor a backward pass.

    Files of published weights hold the same as before (hub.py): names follow the groups. Raises ValueError where a stack cannot be cut there.
    """
    groups = getattr(model.module, "groups", None)
    if groups is None:
        raise ValueError("last_layers cuts a model that is one stack of layers, and this one is more, or none")
    total = sum(group.layers for group in groups)
    if not 0 < layers <= total:
        raise ValueError(f"the last {layers} layers cannot be had of a model of {total}; give 1 to {total}")
    made, first, start = [], 0, 0  # made: (a group, the name that its leaves have, which of their repeats are its); trains from `first` on
    for (name, *_), group in zip(model.module.places()["blocks"], groups, strict=True):
        inside, start = total - layers - start, start + group.layers  # how many of its layers are before the cut
        if not 0 < inside < group.layers:
            made.append((group, name, slice(None)))
            first = len(made) if inside > 0 else first
            continue
        at, odd = divmod(inside, len(group.blocks))
        if group.tied or odd:
            why = "share one set of weights" if group.tied else f"are stacked in periods of {len(group.blocks)}; take {layers + odd}"
            raise ValueError(f"the last {layers} layers cannot be cut off, for the layers there {why}")
        made.append((dataclasses.replace(group, repeats=at), name, slice(at)))
        first = len(made)
        blocks = copy.deepcopy(group.blocks)  # modules that two groups share would share their weights
        made.append((dataclasses.replace(group, blocks=blocks, repeats=group.repeats - at), name, slice(at, None)))
    module = model.module.clone(groups=tuple(group for group, _, _ in made))
    names = [name for name, *_ in module.places()["blocks"]]
    piece = lambda tree, part: tree if part == slice(None) else jax.tree.map(lambda x: x[part], tree)
    whole = {name: leaf for name, leaf in params.items() if name not in {old for _, old, _ in made}}
    params = {**whole, **{new: piece(params[old], part) for new, (_, old, part) in zip(names, made, strict=True)}}
    new = nn.model(module, **module.example())
    new = dataclasses.replace(new, family=model.family, config=model.config, source=model.source)
    return Tuned(new, params, tuple(f"{name}/.*" for name in names[first:]))


METHODS: dict[str, Callable[..., Any]] = {
    "lora": lora, "dora": dora, "ia3": ia3, "adapters": adapters, "prompt": prompt, "prefix": prefix, "bitfit": bitfit, "head_only": head_only,
    "last_layers": last_layers,
}  # fmt: skip


def create(name: str, model: Model, params: Any, *, rng: Array, also: Sequence[str] | None = None, **options: Any) -> Tuned:
    """The method of a recipe by its name, over a model and its params. Raises ValueError that lists the methods.

    `also` are regexes of further leaves that train: by default those of a head that gives scores, which is new for every task, and none of another.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {trees.did_you_mean(name, METHODS, 'the methods are')}")
    method, taken = METHODS[name], inspect.signature(METHODS[name]).parameters
    given = {key: value for key, value in {"model": model, "axes": model.axes, "rng": rng}.items() if key in taken}
    made = method(params=params, **given, **options)
    if not isinstance(made, Tuned):
        before = dict(named_weights(params))
        own = {leaf: w for leaf, w in named_weights(made) if isinstance(w, Adapted) and before.get(leaf) is not w}
        parts = lambda w: "|".join(part for part in weights.parts(w) if part != "bias")
        made = Tuned(model, made, tuple(f"{re.escape(leaf)}/({parts(w)})" for leaf, w in own.items()))
    scores = ("head/.*",) if "scores" in made.params.get("head", {}) and name != "head_only" else ()
    return made._replace(trained=(*made.trained, *(scores if also is None else also)))


# -- adapters --------------------------------------------------------------------------------------------------------------


def split(params: Any, also: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """`(base, adapter)`: the tree as it was before it was adapted, and by name what was put upon it, a prefix, and copies of the leaves that match
    `also`, such as "head/.*"."""
    adapter = {}

    def one(name, w):
        if isinstance(w, Adapted):
            w, adapter[name] = _off(w)
        elif any(re.fullmatch(pattern, name) for pattern in also):
            adapter[name] = w
        return w

    base = trees.map_named(one, {name: leaf for name, leaf in params.items() if name != "prefix"}, is_leaf=is_typed)
    adapter |= {f"prefix/{name}": leaf for name, leaf in params.get("prefix", {}).items()}
    unused = [pattern for pattern in also if not any(re.fullmatch(pattern, name) for name in adapter)]
    if unused:
        raise ValueError(f"{unused[0]!r} matches no weight; {trees.did_you_mean(unused[0], [name for name, _ in named_weights(params)])}")
    return base, adapter


def attach(base: Any, adapter: Adapters) -> Any:
    """The inverse of `split`. Raises ValueError that names the first leaf that does not fit, as of an adapter for another base."""
    leaves = dict(named_weights(base))
    for name, part in adapter.items():
        if name.startswith("prefix/"):
            continue
        if name not in leaves:
            raise ValueError(f"the adapter has {name!r}, which this base has not; {trees.did_you_mean(name, leaves)}")
        made = _upon(part, leaves[name]) if isinstance(part, Adapted) else part
        if not _fits(made) or (made is part and shape(part) != shape(leaves[name])):
            raise ValueError(f"the adapter's {name!r} is not for {shape(leaves[name])}, the shape of this base's; it was made for another")
    made = trees.map_named(lambda name, w: _upon(adapter[name], w) if name in adapter else w, base, is_leaf=is_typed)
    found = {name.removeprefix("prefix/"): part for name, part in adapter.items() if name.startswith("prefix/")}
    return {**made, "prefix": found} if found else made


def _off(w: Weight) -> tuple[Weight, Any]:
    """(what is at the bottom of adapted weights, what stands upon it)."""
    if not isinstance(w, Adapted):
        return w, None
    base, rest = _off(w.base)
    return base, dataclasses.replace(w, base=rest)


def _upon(part: Any, base: Weight) -> Weight:
    """The inverse of `_off`; what is no adapted weight takes the place of the base."""
    if not isinstance(part, Adapted):
        return base if part is None else part
    return dataclasses.replace(part, base=_upon(part.base, base))


def _fits(w: Weight) -> bool:
    """Whether the parts of an adapted weight have the shapes that its base asks for."""
    if not isinstance(w, Adapted):
        return True
    full = shape(w.base)
    if isinstance(w, LoRA | DoRA):
        stacked = w.a.ndim + w.b.ndim - 2 - len(full)
        good = (
            stacked >= 0
            and w.a.shape[:-1] + w.b.shape[stacked + 1 :] == full
            and w.b.shape[: stacked + 1] == (*full[:stacked], w.a.shape[-1])
        )
    elif isinstance(w, Adapter):
        stack, outputs = w.down_bias.shape[:-1], w.up_bias.shape[w.down_bias.ndim - 1 :]
        inner = full[len(stack) :]
        good = full[: len(stack)] == stack and outputs in (inner[: len(outputs)], inner[-len(outputs) :])
    elif isinstance(w, Prompted):
        good = w.prompt.shape[1:] == full[1:]
    else:
        good = True
    along = next((part for name, part in weights.parts(w).items() if name in ("magnitude", "scale")), None)
    good &= along is None or (along.ndim == len(full) and all(size in (1, n) for size, n in zip(along.shape, full, strict=True)))
    return good and _fits(w.base)


def merge(params: Any) -> Any:
    """The tree with the array that it stands for in the place of each adapted weight; an IA3's factor goes into its module's bias too. Quantized weights
    that nothing stands upon stay. Raises ValueError for what no array can stand for: adapters, prompts and prefixes."""
    leaves = dict(named_weights(params))
    if any(name.startswith("prefix/") for name in leaves):
        raise ValueError("a prefix is keys and values of its own, and no weight that they could be merged into; keep it")
    factors = {}
    for name, w in leaves.items():
        if isinstance(w, Prompted):
            raise ValueError(f"{name} has a prompt, rows before a text, which no array of its shape can hold; keep it, or split it off")
        if isinstance(w, IA3) and w.bias is not None:
            factors[_bias_name(name)] = w.scale

    def one(name, w):
        if name in factors:
            return w * factors[name].reshape(w.shape).astype(w.dtype)
        return weights.dense(dataclasses.replace(w, bias=None) if isinstance(w, IA3) else w) if isinstance(w, Adapted) else w

    return trees.map_named(one, params, is_leaf=is_typed)


def combine(weighted: Iterable[tuple[Adapters, float]], *, axes: Any) -> dict[str, Any]:
    """The adapter whose update is the sum of the weighted updates, exactly: their ranks side by side. Raises ValueError for what is no LoRA."""
    texts, found = dict(trees.named_leaves(axes)), {}
    for adapter, weight in weighted:
        for name, part in adapter.items():
            if not isinstance(part, LoRA) or part.base is not None:
                raise ValueError(
                    f"{name} is no LoRA alone, and only updates that are sums can be added up; switch between such adapters instead"
                )
            found.setdefault(name, []).append((part.a, part.b * (weight * part.scale)))

    def beside(name, parts):
        a, b = zip(*parts, strict=True)
        a, b = jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=len(parse_axes(texts[name]).stack))
        return LoRA(None, a, b, float(a.shape[-1]))

    return {name: beside(name, parts) for name, parts in found.items()}
