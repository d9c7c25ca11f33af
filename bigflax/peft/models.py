"""Methods that change what a model is made of, or train some of its leaves as they are: functions from a model and its params to both."""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigflax import nn, ops, trees, weights
from bigflax.nn import Model
from bigflax.peft.matrices import key_of
from bigflax.weights import shape

Array = jax.Array


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
    """The model with `tokens` learned rows in front of every text, that of the encoder in a pair; they begin as the table's rows of `words`, ids [P], or of
    random ones.

    The rows are ids V to V + P - 1 of a longer table, so the model computes as if they were text: positions begin with them, and a head that looks at
    the first position looks at the first of them. Their places do not appear in what comes out. A cache is one that began with them (Model.begin), as
    `generate` makes it. Packed rows (segment_ids) are refused.
    """
    reader = _text(model, params, "a prompt", pair=True)
    pair = reader is not model.module
    V = shape(params["embed"]["tokens"])[0]
    chosen = jax.random.randint(rng, (tokens,), 0, V) if words is None else _words(words, tokens, V)

    def add(params):
        made = weights.prompted(params["embed"]["tokens"], ops.take(params["embed"]["tokens"], chosen, jnp.float32))
        return {**params, "embed": {**params["embed"], "tokens": made}}

    tokens_of = lambda params: V + jnp.arange(weights.rows(params["embed"]["tokens"]) - V)

    def begin(params, batch, length, dtype=None):
        ids_P = tokens_of(params)
        _fits(reader, "a prompt", len(ids_P), length)
        assert model.begin is not None
        cache = model.begin(params, batch, len(ids_P) + length, dtype)
        ids = jnp.broadcast_to(ids_P, (batch, len(ids_P)))
        return model.apply(params, input_ids=ids, attention_mask=jnp.ones_like(ids), cache=cache)["cache"]

    def apply(params, *, rng=None, **inputs):
        _refuse(inputs, "a prompt")
        if pair and inputs.get("input_ids") is None:  # what was made of the text is in the cache
            return model.apply(params, rng=rng, **inputs)
        if not pair and inputs.get("cache") is not None:
            return model.apply(params, rng=rng, **_moved(inputs, len(tokens_of(params))))
        given = {name: inputs.pop(name) for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids") if name in inputs}
        given = {name: x for name, x in given.items() if x is not None}
        ids_P = tokens_of(params)
        at_P = ids_P - V
        front = {"input_ids": ids_P, "attention_mask": at_P * 0 + 1, "token_type_ids": at_P * 0, "position_ids": at_P}
        given = _moved(given, len(at_P))
        join = lambda x, row_P: jnp.concatenate([jnp.broadcast_to(row_P, (len(x), len(row_P))).astype(x.dtype), x], axis=1)
        out = model.apply(params, rng=rng, **{name: join(jnp.asarray(x), front[name]) for name, x in given.items()}, **inputs)
        own = pair and inputs.get("decoder_input_ids") is not None  # else the decoder reads what the encoder reads
        return _behind(out, len(at_P), own)

    return Tuned(_wrapped(model, add, apply, model.axes, model.begin if pair else begin), add(params), (r"embed/tokens/prompt",))


def _fits(reader: Any, what: str, tokens: int, length: int) -> None:
    """Raises ValueError where a text behind so many tokens has no positions."""
    limit = getattr(reader.embed, "positions", 0)
    if limit and tokens + length > limit:
        raise ValueError(f"{length} tokens behind {what} of {tokens} are more than the {limit} learned positions; cut the sequences")


def _moved(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The inputs with positions, where they are given, that begin behind so many tokens."""
    given = inputs.get("position_ids")
    return inputs if given is None else {**inputs, "position_ids": given + tokens}


def _behind(out: dict[str, Any], tokens: int, own: bool) -> dict[str, Any]:
    """The outputs without the places of the first tokens; with `own`, a decoder reads a text of its own, and they are the encoder's alone."""
    cut = lambda x: x[:, tokens:]
    mine = lambda name: name.startswith("encoder_") or not own
    timed = ("last_hidden_state", "start_logits", "end_logits", "encoder_last_hidden_state", "logits")
    found = {name: cut(out[name]) for name in timed if name in out and mine(name) and (name != "logits" or out[name].ndim == 3)}
    layers = {"hidden_states": cut, "attentions": lambda x: x[:, :, tokens:], "qkv": lambda parts: jax.tree.map(cut, parts)}
    for kind, of_layer in layers.items():  # what looks, not what is looked at: a map keeps the columns of the first tokens
        names = (kind, *(f"{side}_{kind}" for side in ("encoder", "decoder", "cross")))
        found |= {name: tuple(map(of_layer, out[name])) for name in names if name in out and mine(name)}
    if "head" in out and not own:
        found["head"] = {**out["head"], "x_BTD": cut(out["head"]["x_BTD"])}
    return {**out, **found}


def prefix(model: Model, params: Any, tokens: int, *, rng: Array, words: Any = None) -> Tuned:
    """The model with `tokens` learned keys and values before the text's in every layer: leaves `prefix/k` and `prefix/v` [L, P, K, H].

    They begin near zero, or as what the `words`, ids [P], leave in the layers. The wrapped `apply` hands them to the model as a cache, so that the text's
    positions begin at P, `position_ids` that are given are moved by as many, and `attention_mask` speaks of the text alone; an encoder sees them from
    everywhere. A cache is one that began with them (Model.begin), as `generate` makes it. Packed rows (segment_ids) and stages of a pipeline are refused.
    """
    _text(model, params, "a prefix")
    blocks = [block for group in model.module.groups for block in group.blocks]
    kinds = {(block.attention.kv_heads or block.attention.heads, block.attention.head_dim) for block in blocks}
    if len(kinds) > 1 or any(block.cross is not None for block in blocks):
        raise ValueError("a prefix has keys of one shape for all layers, and this model's layers differ or look at another sequence too")
    L, (K, H), dtype = sum(group.layers for group in model.module.groups), kinds.pop(), model.module.embed.dtype

    def cache_of(k_LPKH, v_LPKH, B, T, kind=None):
        P = k_LPKH.shape[1]
        longer = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, T), *((0, 0),) * (x.ndim - 3)))
        grow = lambda x: jax.tree.map(longer, nn.held(jnp.broadcast_to(x[:, None].astype(dtype), (L, B, P, K, H)), kind or dtype))
        segments = longer(jnp.ones((L, B, P), jnp.int32))
        return {"k": grow(k_LPKH), "v": grow(v_LPKH), "segments": segments, "index": jnp.full(L, P, jnp.int32)}

    if words is None:
        draw = lambda name: 0.02 * jax.random.normal(key_of(rng, name), (L, tokens, K, H))
        made = {"k": draw("prefix/k"), "v": draw("prefix/v")}
    else:
        none = jnp.zeros((L, 0, K, H))
        seen = model.apply(
            params, input_ids=_words(words, tokens, weights.rows(params["embed"]["tokens"]))[None], cache=cache_of(none, none, 1, tokens)
        )
        made = {name: seen["cache"][name][:, 0].astype(jnp.float32) for name in ("k", "v")}

    def begin(params, batch, length, dtype=None):
        k_LPKH, v_LPKH = params["prefix"]["k"], params["prefix"]["v"]
        P = k_LPKH.shape[1]
        if k_LPKH.shape != (L, P, K, H):
            raise ValueError(f"a prefix {k_LPKH.shape} is for another model: this one has {L} layers with {K} heads of {H} for keys")
        _fits(model.module, "a prefix", P, length)
        return cache_of(k_LPKH, v_LPKH, batch, length, dtype)

    def apply(params, *, rng=None, **inputs):
        _refuse(inputs, "a prefix")
        cache = inputs.pop("cache", None)
        own = {name: leaf for name, leaf in params.items() if name != "prefix"}
        inside = begin(params, *inputs["input_ids"].shape) if cache is None else cache
        out = model.apply(own, rng=rng, cache=inside, **_moved(inputs, params["prefix"]["k"].shape[1]))
        return {name: x for name, x in out.items() if name != "cache" or cache is not None}

    axes = {**model.axes, "prefix": dict.fromkeys(made, "layers | _ kv_heads head_dim")}
    add = lambda params: {**params, "prefix": made}
    return Tuned(_wrapped(model, add, apply, axes, begin), add(params), (r"prefix/[kv]",))


def _text(model: Model, params: Any, what: str, *, pair: bool = False) -> Any:
    """The stack that reads the text: the model, or with `pair` the encoder of two. Raises ValueError where there is none."""
    reader = getattr(model.module, "encoder", model.module) if pair else model.module
    embed = getattr(reader, "embed", None)
    if getattr(embed, "takes", None) != "input_ids" or not hasattr(reader, "groups") or "tokens" not in params.get("embed", {}):
        alone = "" if pair else ", an encoder or a decoder alone"
        raise ValueError(f"{what} stands before the text of a model that reads one text{alone}; this is none")
    return reader


def _words(words: Any, tokens: int, V: int) -> Array:
    ids = jnp.asarray(words)
    if ids.shape != (tokens,) or int(ids.max()) >= V:
        raise ValueError(f"words of shape {ids.shape} up to id {int(ids.max())} are not {tokens} ids below {V}")
    return ids


def _refuse(inputs: Mapping[str, Any], what: str) -> None:
    if inputs.get("segment_ids") is not None:
        raise ValueError(f"{what} stands before one text a row: segment_ids cannot be given with it")


def _wrapped(model: Model, add: Callable[[Any], Any], apply: Callable[..., Any], axes: Any, begin: Callable[..., Any] | None) -> Model:
    init = lambda rng: add(model.init(rng))
    return dataclasses.replace(model, init=init, apply=apply, axes=axes, shaped=jax.eval_shape(add, model.shapes()), begin=begin)


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
