"""Transformers by composition: an embedding, one kind of block stacked and scanned, a final norm, a head.

    decoder   Transformer(Embed(...), (Group((Block(Attention(causal=True), Mlp(...), Norm()),), 12),), norm=Norm(), head=LmHead())
    encoder   Transformer(Embed(types=2, norm=Norm()), (Group((Block(Attention(causal=False), ..., order="post"),), 12),), head=MlmHead(...))

The heads are in heads.py. Inputs and outputs bear the names of the transformers library: `input_ids`, `attention_mask`, `token_type_ids`,
`position_ids`, and `segment_ids` for packed documents (0 is padding); out comes a dict of `last_hidden_state`, `logits`, and the `cache` of one that
was given; a model of mixtures adds `aux_loss`, the load-balance loss, and where experts have a capacity `dropped`, the share of choices that found
no room. On request there are tuples of layers: `hidden_states`, the embedding before them; `attentions`, maps [B, N, T, S] in float32, and
`cross_attentions` of a memory; `qkv`, queries, keys and values before they are rotated. With `logits=False` the last product is left undone and
`head` holds its factors, `{"x_BTD", "w_VD", ["bias"]}`, for `ops.linear_cross_entropy`, which never holds [B, T, V] whole.

What is embedded need not be tokens: an embedding names its input (`takes`), and a Transformer over `pixel_values` or `input_features` differs in
nothing else. With `memory`, the states of another sequence, blocks that have a `cross` attention see those too (seq2seq.py).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from bigflax import ops
from bigflax.nn import NORMAL, Attention, Initializer, Linear, Mlp, Moe, Norm, RelativeBias, dropout, empty, stack, weight
from bigflax.sharding import constrain
from bigflax.weights import rows

Inputs = dict[str, jax.ShapeDtypeStruct]


class Embed(nn.Module):
    """Token rows, plus learned positions and token types where they are asked for; sets the dtype of computation."""

    vocab: int
    features: int
    positions: int = 0
    first_position: int = 0  # rows of the table before that of position 0
    scale: float | None = None
    types: int = 0
    norm: Norm | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    init: Initializer = NORMAL

    takes = "input_ids"

    def example(self) -> Inputs:
        return {"input_ids": jax.ShapeDtypeStruct((1, 8), jnp.int32)}

    @nn.compact
    def __call__(self, input_ids, position_ids=None, token_type_ids=None, table=None):
        """(x_BTD, the table of tokens): `table` where two models share one, else its own weight."""
        w_VD = weight(self, "tokens", (self.vocab, self.features), "vocab <- embed", self.init) if table is None else table
        if not isinstance(input_ids, jax.core.Tracer) and (worst := int(np.asarray(input_ids).max(initial=0))) >= rows(w_VD):
            raise ValueError(f"token id {worst} is outside of the vocabulary of {self.vocab}; is it the tokenizer of another model?")
        x_BTD = ops.take(w_VD, input_ids, self.dtype)
        if self.scale is not None:  # rounded to the activations' dtype first, as the models that have it were trained
            x_BTD *= jnp.asarray(self.scale, x_BTD.dtype)
        if self.positions:
            if position_ids is None and input_ids.shape[1] > self.positions:
                raise ValueError(f"{input_ids.shape[1]} tokens are more than the {self.positions} learned positions; cut the sequences")
            at = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
            w_PD = weight(self, "positions", (self.positions + self.first_position, self.features), "positions <- embed", self.init)
            x_BTD += ops.take(w_PD, at + self.first_position, self.dtype, axes=("positions", "embed"))
        if self.types:
            kinds = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            w_KD = weight(self, "types", (self.types, self.features), "types <- embed", self.init)
            x_BTD += ops.take(w_KD, kinds, self.dtype, axes=("types", "embed"))
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return constrain(dropout(self, x_BTD, self.dropout), "batch", "between", None), w_VD


class Block(nn.Module):
    """One layer; f is the attention, then the attention to `memory` where there is a `cross`, and then the mlp.

    pre        x += f(norm(x))                              GPT-2, Llama, T5
    post       x = norm(x + f(x))                           the first transformer, BERT, BART
    output     x += norm(f(x))                              OLMo 2
    sandwich   x += norm'(f(norm(x)))                       Gemma 2 and 3
    parallel   x += attention(norm(x)) + mlp(norm'(x))      GPT-NeoX

    A `layer_scale` multiplies each f by a learned vector that begins so (CaiT: Touvron et al. 2021, 2103.17239); `drop_path` is the chance
    that an f is left out for a whole row in training.

    Returns x and what the layer has to say beside it: the "cache" of one that was given, "router" of a mixture, and what `keep` names: "hidden",
    "attentions" and "cross_attentions", "qkv" (of its own attention).
    """

    attention: Attention
    mlp: Mlp | Moe
    norm: Norm
    order: str = "pre"
    cross: Attention | None = None
    without: tuple[str, ...] = ()  # norms that it does not have: "norm1" of ModernBERT's first layer, behind the embedding's own
    layer_scale: float | None = None
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x_BTD, cache=None, *, keep=(), memory=None, memory_segments=None, **where):
        seen: dict[str, Any] = {}
        own, other = (cache, None) if cache is None or self.cross is None else (cache["own"], cache["cross"])

        def attend(x_BTD):
            y_BTD, found = self.attention(x_BTD, own, keep=keep, **where)
            seen.update(found)
            return y_BTD

        def look(cross, x_BTD):
            y_BTD, found = cross(x_BTD, other, memory=memory, q_segments=where.get("q_segments"), kv_segments=memory_segments, keep=keep)
            seen["cache"] = None if cache is None else {"own": seen["cache"], "cross": found["cache"]}
            seen.update({"cross_attentions": found["attentions"]} if "attentions" in found else {})
            return y_BTD

        def think(x_BTD):
            if not isinstance(self.mlp, Moe):
                return self.mlp(x_BTD)
            real = where.get("kv_segments")
            y_BTD, seen["router"] = self.mlp(x_BTD, None if real is None else real > 0)
            return y_BTD

        def branch(name, part, x_BTD):
            y_BTD = constrain(part(constrain(x_BTD, "batch", "seq", None)), "batch", "between", None)
            if self.layer_scale is not None:
                begin = nn.initializers.constant(self.layer_scale)
                y_BTD *= weight(self, name.replace("norm", "scale"), y_BTD.shape[-1:], "norm", begin).astype(y_BTD.dtype)
            return dropout(self, y_BTD, self.drop_path, rows=True)

        norm = lambda name, x_BTD: x_BTD if name in self.without else self.norm.clone(parent=self, name=name)(x_BTD)
        parts = {"norm1": attend, **({} if self.cross is None else {"norm_cross": functools.partial(look, self.cross)}), "norm2": think}
        parts = {name: functools.partial(branch, name, part) for name, part in parts.items()}
        if self.order == "parallel":
            x_BTD = x_BTD + sum(part(norm(name, x_BTD)) for name, part in parts.items())
        else:
            for name, part in parts.items():
                if self.order == "pre":
                    x_BTD = x_BTD + part(norm(name, x_BTD))
                elif self.order == "post":
                    x_BTD = norm(name, x_BTD + part(x_BTD))
                elif self.order == "output":
                    x_BTD = x_BTD + norm(name, part(x_BTD))
                elif self.order == "sandwich":
                    x_BTD = x_BTD + norm(f"{name}_out", part(norm(name, x_BTD)))
                else:
                    raise ValueError(f"unknown order of norms {self.order!r}; there are pre, post, output, sandwich and parallel")
        x_BTD = constrain(x_BTD, "batch", "between", None)
        return x_BTD, {**seen, "hidden": x_BTD if "hidden" in keep else None}


@dataclasses.dataclass(frozen=True)
class Group:
    """`repeats` times the kinds of layer `blocks`, one after the other: (local, local, global) x 7; 0 for one layer that is not stacked, because
    what comes out has another shape than what goes in.

    No tuple: Linen would find the modules in it and name them before the Transformer does.
    """

    blocks: tuple[Any, ...]
    repeats: int
    tied: bool = False  # one set of weights for all repeats (ALBERT)

    @property
    def layers(self) -> int:
        return len(self.blocks) * (self.repeats or 1)


class Period(nn.Module):
    """Layers of several kinds in turn, as one step of a scan."""

    kinds: Group

    @nn.compact
    def __call__(self, x_BTD, cache=None, *, keep=(), **where):
        seen = []
        for i, block in enumerate(self.kinds.blocks):
            mine = None if cache is None else jax.tree.map(lambda part, i=i: part[i], cache)
            x_BTD, out = block.clone(parent=self, name=str(i))(x_BTD, mine, keep=keep, **where)
            seen.append(out)
        return x_BTD, jax.tree.map(lambda *parts: jnp.stack(parts), *seen)


def alternating(kinds: Sequence[Any], make: Callable[[Any], Block]) -> tuple[Group, ...]:
    """The groups of layers whose kinds are listed one by one, by their shortest period, what is left of one in a group of its own."""
    kinds = list(kinds)
    period = next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
    repeats, rest = divmod(len(kinds), period)
    blocks = tuple(map(make, kinds[:period]))
    return (Group(blocks, repeats), *([Group(blocks[:rest], 1)] if rest else []))


def attention_kinds(listed: Sequence[str] | None, layers: int, default: Callable[[int], str]) -> list[str]:
    """ "full_attention" or "sliding_attention" of each layer: as `listed` in a config (`layer_types`), else by `default`.

    Raises ValueError for a list of another length, or with a kind that we do not compute.
    """
    kinds = [default(i) for i in range(layers)] if listed is None else list(listed)
    if strange := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types has {min(strange)!r}; supported are 'full_attention' and 'sliding_attention'")
    if len(kinds) != layers:
        raise ValueError(f"layer_types lists {len(kinds)} layers, but the model has {layers}")
    return kinds


class Transformer(nn.Module):
    """An encoder or a decoder, which differ only in what it is composed of.

    The leaves of a single kind of layer are below "blocks", with the number of layers as their first axis; those of several kinds below
    "blocks/0", "blocks/1" ...; those of several groups below "blocks_0", "blocks_1" ...
    """

    embed: Any  # Embed, or what takes another input (vision.PatchEmbed)
    groups: tuple[Group, ...]
    project: Linear | None = None  # from an embedding of another width
    relative: RelativeBias | None = None  # of all layers' attention
    norm: Norm | None = None
    norm_states: bool = True  # the last of `hidden_states` is after the final norm: whichever transformers has in the family
    head: nn.Module | None = None  # heads.py, vision.py
    remat: str = "none"
    unroll: int | bool = 1

    def example(self) -> Inputs:
        """The inputs of a small call, as ShapeDtypeStructs by name."""
        return self.embed.example()

    def empty_cache(self, batch: int, length: int, dtype: str | None = None) -> dict[str, Any]:
        """Keys and values for `length` tokens in all, in a `dtype` of nn.CACHES, by default the activations', with the leading layer axis that `stack`
        slices. What is made of a memory, where the layers look at one, is empty until the first call is given it."""
        block, layers = self.groups[0].blocks[0], sum(group.layers for group in self.groups)
        kept: str = self.embed.dtype if dtype is None else dtype

        def keys(attention: Attention, length: int) -> dict[str, Any]:
            kv = (layers, batch, length, attention.kv_heads or attention.heads, attention.head_dim)
            return {"k": empty(kv, kept), "v": empty(kv, kept), "segments": jnp.zeros(kv[:3], jnp.int32)}

        own = {**keys(block.attention, length), "index": jnp.zeros(layers, jnp.int32)}
        return own if block.cross is None else {"own": own, "cross": keys(block.cross, 0)}

    @nn.compact
    def __call__(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, segment_ids=None, *, pixel_values=None,
        input_features=None, memory=None, memory_segments=None, table=None, cache=None, logits=True, hidden_states=False, attentions=False, qkv=False,
    ):  # fmt: skip
        given = self._given(input_ids=input_ids, pixel_values=pixel_values, input_features=input_features)
        if cache is not None and position_ids is None:
            position_ids = cache_index(cache)[0] + jnp.arange(given.shape[1])[None]
        x0_BTD, table = self.embed(given, position_ids, token_type_ids, table)
        x0_BTD = x0_BTD if self.project is None else self.project(x0_BTD)
        where = {"positions": position_ids, **visibility(x0_BTD, attention_mask, segment_ids, cached=cache is not None)}
        if self.relative is not None:
            T, start, S = x0_BTD.shape[1], 0, x0_BTD.shape[1]
            if cache is not None:
                start, S = cache_index(cache)[0], cache.get("own", cache)["k"].shape[2]
            where["bias"] = self.relative(T, S, start)
        asked = {"hidden": hidden_states, "attentions": attentions, "qkv": qkv}
        keep = tuple(name for name, wanted in asked.items() if wanted)
        x_BTD, seen = self._run(x0_BTD, cache, keep=keep, memory=memory, memory_segments=memory_segments, **where)
        bare_BTD = x_BTD
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        out: dict[str, Any] = {"last_hidden_state": x_BTD}
        if hidden_states:
            last_BTD = x_BTD if self.norm_states else bare_BTD
            out["hidden_states"] = (x0_BTD, *(seen["hidden"][i] for i in range(len(seen["hidden"]) - 1)), last_BTD)
        if absent := [name for name in keep if name not in seen]:
            raise ValueError(f"layers of this model have no {absent[0]} to give, for no attention is in them")
        for name in ("attentions", "cross_attentions", "qkv"):
            if name in seen:
                out[name] = tuple(jax.tree.map(lambda x, i=i: x[i], seen[name]) for i in range(sum(group.layers for group in self.groups)))
        if cache is not None:
            out["cache"] = seen["cache"]
        if "router" in seen:
            out |= {"aux_loss": ops.load_balance(seen["router"]), **ops.dropped_share(seen["router"])}
        if self.head is not None:
            real_BT = attention_mask if segment_ids is None else segment_ids
            out |= finish(self.head(x_BTD, table, None if real_BT is None else real_BT > 0), logits=logits)
        return out

    def _given(self, **inputs):
        """The one input that the embedding takes. Raises ValueError where another was given, or none."""
        given = {name: x for name, x in inputs.items() if x is not None}
        if [*given] != [self.embed.takes]:
            raise ValueError(f"this model takes {self.embed.takes}, not {', '.join(given) or 'nothing'}")
        return given[self.embed.takes]

    def _run(self, x_BTD, cache, **options):
        """All groups in turn; what they return beside x, and the cache, have one leading axis of layers."""
        seen, unroll = [], 1 if self.is_initializing() else self.unroll  # fresh weights are drawn once: compiling costs more than copying
        for (name, first, period, repeats), group in zip(self.places()["blocks"], self.groups, strict=True):
            block = group.blocks[0] if period == 1 else Period(group)
            fold = lambda part, at=first, n=group.layers, p=period, r=repeats: part[at : at + n].reshape(
                (*(r,)[: r > 0], *(p,)[: p > 1], *part.shape[1:])
            )
            mine = cache if cache is None or len(self.groups) == period == 1 else jax.tree.map(fold, cache)
            options |= dict(remat=self.remat, unroll=unroll, tied=group.tied)
            x_BTD, out = stack(block.clone(parent=self, name=name), repeats or None, x_BTD, mine, **options)
            out = out if repeats else jax.tree.map(lambda part: part[None], out)
            seen.append(out if period == 1 else jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), out))
        return x_BTD, seen[0] if len(seen) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)

    def places(self) -> dict[str, list[tuple[str, int, int, int]]]:
        """Where names.py finds the layers: of each group, the name of its leaves, its first layer, its period, how often it repeats."""
        starts = itertools.accumulate((group.layers for group in self.groups), initial=0)
        names = ["blocks"] if len(self.groups) == 1 else [f"blocks_{i}" for i in range(len(self.groups))]
        groups = zip(names, starts, self.groups, strict=False)
        return {"blocks": [(name, start, len(group.blocks), group.repeats) for name, start, group in groups]}


def visibility(x_BTD, attention_mask, segment_ids, *, cached: bool) -> dict[str, Any]:
    """Who sees whom: packed documents see themselves; everyone sees what `attention_mask` calls real (1), nobody its padding (0)."""
    if segment_ids is not None and attention_mask is not None:
        raise ValueError("give attention_mask (1 real, 0 padding) or segment_ids (documents packed into a row), not both")
    if segment_ids is not None:
        return {"q_segments": segment_ids, "kv_segments": segment_ids}
    if attention_mask is None and not cached:
        return {"q_segments": None, "kv_segments": None}
    mask = None if attention_mask is None else attention_mask.astype(jnp.int32)
    return {"q_segments": jnp.ones(x_BTD.shape[:2], jnp.int32), "kv_segments": mask}


def finish(found: dict[str, Any], *, logits: bool) -> dict[str, Any]:
    """A head's outputs; those of a language model as `logits`, or as their factors, `head`."""
    return found if "w_VD" not in found else {"logits": unembed(**found)} if logits else {"head": found}


def unembed(x_BTD: jax.Array, w_VD: Any, bias: jax.Array | None = None, softcap: float | None = None) -> jax.Array:
    """logits = x w^T (+ bias), soft-capped where asked: [B, T, V] in x's dtype."""
    logits = constrain(ops.einsum("btd,vd->btv", x_BTD, w_VD), "batch", "seq", "vocab")
    if bias is not None:
        logits += bias.astype(logits.dtype)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def cache_index(cache: Any) -> jax.Array:
    """How many tokens each layer's cache holds: [L]."""
    return cache.get("own", cache)["index"]
