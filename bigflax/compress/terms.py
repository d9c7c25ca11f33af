"""Terms of distillation: what is compared of the outputs that a student and its teacher give for the same inputs.

    soft_labels   a divergence (losses.kl_divergence) of what they say: of `logits` [B, C], of each token's over a vocabulary, of the first and last
                  token of answers; of embeddings, of who is near whom in the batch. Of a teacher's likeliest k alone where no more is there.
    hidden        squared error of layers, through a learned matrix where widths differ: TinyBERT, Jiao et al. 2020 (arXiv 1909.10351), equation 8
    attentions    who looks at whom: divergence of a layer's maps, MiniLM, Wang et al. 2020 (2002.10957), section 3.1, or their squared distance,
                  TinyBERT's equation 7, but of probabilities where the paper takes logits
    relations     how the vectors of a layer relate to one another, where numbers of layers, heads and widths may differ (losses.relation_divergence): its
                  states, or its queries, keys and values, MiniLMv2, Wang et al. 2020 (2012.15828), section 3

A token's value counts where there is a label (without labels, where the attention mask is 1), a row's where it has a token, and is there no mask, a label;
what is taken of layers counts where a token is real, and a loader's padding rows never. Logits of a vocabulary are held for one piece of the tokens at a
time, 2^24 numbers a device and model, and made again in the backward pass, one more product with each table; the task's own loss head comes on top. XLA
keeps five float32 arrays of a piece's size for "forward" and eight for "js". Pieces of tokens, where ops.linear_cross_entropy takes pieces of the
vocabulary: a divergence needs both sums of exponentials before its first term. The price is a gradient of the student's table that every piece adds to.
Logits that a model gives whole, as an `ensemble` does, are held whole.

Attention maps and relations hold [B, heads, T, T] of both models, in float32.

Left out on purpose: packed documents apart in relations, where those between two of them count as well.

Legend: B batch, T time, D width, V vocabulary, C classes, N rows as the model gets them.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigflax import losses, ops, trees
from bigflax.metrics import Mean
from bigflax.nn import Model
from bigflax.sharding import axes_of, constrain, current_layout
from bigflax.weights import shape

PIECE_LOGITS = 2**24  # 64 MiB of float32 a device and model
OF_LAYERS = ("hidden_states", "attentions", "qkv")  # what a model is asked for, and how the names of what it then gives end
TINY = float(jnp.finfo(jnp.float32).tiny)


class Both(NamedTuple):
    """What both models were given and gave: the inputs, the outputs of the student and of the teacher, the projections, and `labels` of the batch."""

    inputs: Mapping[str, Any]
    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    projections: Mapping[str, Any]
    labels: Any


class Term(NamedTuple):
    """`of(seen)` gives Means, of which the first is what is learned; both models are asked for what `asks` names, of OF_LAYERS."""

    name: str
    of: Callable[[Both], dict[str, Mean]]
    asks: tuple[str, ...] = ()


# -- terms -----------------------------------------------------------------------------------------------------------------


def soft_labels(
    *, temperature: float = 2.0, divergence: str = "forward", skew: float = 0.1, beta: float = 0.5, binary: bool = False,
    chunk: int | None = None,
) -> Term:  # fmt: skip
    """What the teacher finds likely, softened by the temperature: `divergence`, `skew` and `beta` are those of `losses.kl_divergence`.

    `binary`: each score is a class or none for itself, as `multi_label` has them. A single score [B, 1] is compared by its square. `chunk` is how
    many tokens of each row a piece has (None chooses). Embeddings are compared by their products with one another, times `logit_scale` or 20.
    """
    if divergence not in losses.DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}; {trees.did_you_mean(divergence, losses.DIVERGENCES, 'there are')}")
    options: dict[str, Any] = dict(temperature=temperature, kind=divergence, skew=skew, beta=beta)
    apart = partial(losses.kl_divergence, **options)

    def scores(s, t):
        """([...] apart, [...] whether they agree) of [..., C]."""
        if s.shape[-1] != t.shape[-1]:
            raise ValueError(
                f"the student scores {s.shape[-1]} classes and the teacher {t.shape[-1]}; both must have the same, in one order"
            )
        if s.shape[-1] == 1:
            return losses.mse(s, t)[..., 0], (s > 0)[..., 0] == (t > 0)[..., 0]
        if binary:
            of_two = lambda x: jnp.stack([x.astype(jnp.float32), jnp.zeros(x.shape)], -1)
            return apart(of_two(s), of_two(t)).mean(-1), jnp.all((s > 0) == (t > 0), -1)
        return apart(s, t), jnp.argmax(s, -1) == jnp.argmax(t, -1)

    def likeliest(s, values, ids):
        return losses.top_k_divergence(s, values, ids, **options), jnp.argmax(s, -1) == ids[..., 0]

    def compared(seen: Both):
        """(values, agreement, which are real), of [N] or [N, T]."""
        s, t = seen.student, seen.teacher
        if {"values", "ids"} <= t.keys():
            x, of = _logits(s, "student")
            values, agree = _pieces(lambda x, *top: likeliest(of(x), *top), chunk, s, x, t["values"], t["ids"])
            return values, agree, _real(seen, values)
        if _scored(s) and _scored(t):
            (x, of), (y, its) = _logits(s, "student"), _logits(t, "teacher")
            if x.shape[:-1] != y.shape[:-1]:
                raise ValueError(
                    f"the student's scores are of {x.shape[:-1]} places and the teacher's of {y.shape[:-1]}; they must read alike"
                )
            values, agree = _pieces(lambda x, y: scores(of(x), its(y)), chunk, (s, t), x, y)
            return values, agree, _real(seen, values)
        if {"start_logits", "end_logits"} <= s.keys() & t.keys():
            there = seen.inputs["attention_mask"] > 0
            first, last = (
                scores(*(jnp.where(there, out[name], losses.NEVER) for out in (s, t))) for name in ("start_logits", "end_logits")
            )
            return (first[0] + last[0]) / 2, first[1] & last[1], _real(seen, first[0])
        embeds = [n for n in ("text_embeds", "image_embeds", "sentence_embedding") if n in s and n in t]
        if not embeds:
            raise ValueError(
                f"soft labels need outputs that both models have; the student gives {', '.join(s)} and the teacher {', '.join(t)}"
            )
        near = lambda out: out.get("logit_scale", 20.0) * jnp.matmul(out[embeds[0]], constrain(out[embeds[-1]], None, None).T)
        a, b = near(s), near(t)
        real_N = _real(seen, a[:, 0])
        real_NN = real_N & real_N[:, None]
        if len(embeds) == 1:  # how near a row is to itself says nothing
            real_NN &= ~jnp.eye(len(a), dtype=bool)
        best = lambda x: jnp.argmax(jnp.where(real_NN, x, losses.NEVER), -1)
        return losses.affinity_divergence(a, b, real=real_NN, **options), best(a) == best(b), real_N

    def of(seen: Both) -> dict[str, Mean]:
        values, agree, real = compared(seen)
        return {"distillation": Mean.of(values, real), "agreement": Mean.of(agree, real)}

    return Term("soft_labels", of)


def hidden(layers: Mapping[int, int] | None = None, *, of: str = "hidden_states", kind: str = "mse", project: str | None = None) -> Term:
    """Layers of the student beside layers of the teacher, {1: 2, 2: 4}, 0 what is embedded; None spreads the student's evenly over the teacher's.

    "mse" is the squared error, the mean over the width, "cosine" 1 - cos (DistilBERT: Sanh et al. 2019, arXiv 1910.01108). Where widths differ all go
    through one matrix that `taught(project=...)` makes under the name `project`, by default that of the outputs, `of`.
    """
    if kind not in ("mse", "cosine"):
        raise ValueError(f"hidden states have no kind {kind!r}; there are 'mse' and 'cosine'")

    def term(seen: Both) -> dict[str, Mean]:
        found = []
        for i, j, *both in _layers(seen, of, layers):
            x, y = map(_vectors, both)
            w = seen.projections.get(project or of)
            if w is not None:
                x = ops.einsum("...d,df->...f", x, w)
            if x.shape != y.shape:
                hint = "; their widths meet by taught(project=...)" if x.shape[:-1] == y.shape[:-1] else "; they must read alike"
                raise ValueError(f"layer {i} of the student is {x.shape} and layer {j} of the teacher {y.shape}{hint}")
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
            unit = lambda x: x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))
            found.append(losses.mse(x, y).mean(-1) if kind == "mse" else 1 - jnp.sum(unit(x) * unit(y), -1))
        values = jnp.mean(jnp.stack(found), 0)
        return {name: Mean.of(values, _real(seen, values, of))}

    name = "hidden" if (project or of) == OF_LAYERS[0] else f"hidden_{project or of}"
    return Term(name, term, ("hidden_states",))


def attentions(
    layers: Mapping[int, int] | None = None, *, heads: Mapping[int, int] | None = None, of: str = "attentions", kind: str = "kl"
) -> Term:
    """Attention maps of layers of the student beside those of the teacher, {1: 2, 2: 4} as in `hidden`, 1 the first; None spreads them evenly.

    "kl" is the divergence of the student's distribution over the keys from the teacher's, "mse" their squared distance, summed over the keys, for padding
    is among them; both are means over heads and over the tokens that look. Where the numbers of heads differ, `heads` says which of the student's is beside
    which of the teacher's, {0: 0, 1: 3}. `of` may be that of a pair or a tower, "cross_attentions" too.
    """
    if kind not in ("kl", "mse"):
        raise ValueError(f"attention maps have no kind {kind!r}; there are 'kl' and 'mse'")
    logs = lambda x: jnp.log(jnp.maximum(x, TINY))  # what nobody may see has a probability of 0

    def term(seen: Both) -> dict[str, Mean]:
        found = []
        for i, j, x, y in _layers(seen, of, layers):
            own, other = x.shape[1], y.shape[1]
            pairs = {n: n for n in range(max(own, other))} if heads is None else heads
            if not (0 <= min(pairs) and max(pairs) < own and 0 <= min(pairs.values()) and max(pairs.values()) < other):
                raise ValueError(
                    f"layer {i} of the student has heads 0 to {own - 1} and layer {j} of the teacher 0 to {other - 1}; say which are beside which, "
                    f"heads={{0: 0, 1: 3}}, or take relations(heads=..., of='qkv'), where they need not match"
                )
            x, y = x[:, jnp.array([*pairs])], y[:, jnp.array([*pairs.values()])]
            if x.shape != y.shape:
                raise ValueError(f"the student's maps are of {x.shape[2:]} places and the teacher's of {y.shape[2:]}; they must read alike")
            found.append((losses.kl_divergence(logs(x), logs(y)) if kind == "kl" else jnp.sum(jnp.square(x - y), -1)).mean(1))
        values = jnp.mean(jnp.stack(found), 0)
        return {of: Mean.of(values, _real(seen, values, of))}

    return Term(of, term, ("attentions",))


def relations(layers: Mapping[int, int] | None = None, *, heads: int = 1, of: str = "hidden_states", divergence: str = "forward") -> Term:
    """Relations among the tokens of a layer, by default of the last of each, in `heads` parts (losses.relation_divergence).

    Of "qkv" they are three, of queries with queries, keys with keys and values with values, and added up: all heads' vectors are joined and cut anew into
    `heads` relation heads, so that teacher and student may have other heads and other widths, grouped ones too. Layers are numbered as in `hidden`.
    """
    vectors = lambda x: [_vectors(x[name].reshape(*x[name].shape[:2], -1)) for name in "qkv"] if isinstance(x, Mapping) else [_vectors(x)]

    def term(seen: Both) -> dict[str, Mean]:
        last = {_number(seen.student.get(of, ()), of): _number(seen.teacher.get(of, ()), of)}
        found = []
        for *_, s, t in _layers(seen, of, layers or last):
            parts = []
            for x, y in zip(vectors(s), vectors(t), strict=True):
                if x.shape[:2] != y.shape[:2]:
                    raise ValueError(f"relations of {x.shape[1]} vectors cannot be compared with those of {y.shape[1]}")
                parts.append(losses.relation_divergence(x, y, heads=heads, real=_real(seen, x[..., 0], of), kind=divergence))
            found.append(sum(parts[1:], parts[0]))
        values = jnp.mean(jnp.stack(found), 0)
        return {name: Mean.of(values, _real(seen, values, of))}

    name = "relations" if of == OF_LAYERS[0] else f"relations_{of}"
    return Term(name, term, ("qkv" if of.endswith("qkv") else "hidden_states",))


# -- what there is to compare ----------------------------------------------------------------------------------------------


def _layers(seen: Both, of: str, layers: Mapping[int, int] | None) -> list[tuple[int, int, Any, Any]]:
    """(layer, its teacher's, what is of the one, what is of the other) of each pair."""
    for who, out in (("student", seen.student), ("teacher", seen.teacher)):
        if of not in out:
            raise ValueError(
                f"the {who} gives no {of!r}; {trees.did_you_mean(of, [n for n in out if n.endswith(OF_LAYERS)], 'its states are')}"
            )
    s, t, first = seen.student[of], seen.teacher[of], _first(of)
    few, many = _number(s, of), _number(t, of)
    pairs = dict([*enumerate(evenly(few, many))][first:]) if layers is None else dict(layers)
    if far := [f"{i}: {j}" for i, j in pairs.items() if not (first <= i <= few and first <= j <= many)]:
        raise ValueError(f"there are no layers {far[0]}: the student's are {first} to {few}, the teacher's {first} to {many}")
    return [(i, j, s[i - first], t[j - first]) for i, j in pairs.items()]


def _first(of: str) -> int:
    """The number of the first layer that is there: of hidden states 0, what is embedded."""
    return 0 if of.endswith(OF_LAYERS[0]) else 1


def _number(states: Any, of: str) -> int:
    """The number of the last layer."""
    return len(states) - 1 + _first(of)


def _vectors(x: jax.Array) -> jax.Array:
    """[N, T, D]: of a network over images, [N, C, H, W], a place after the other."""
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2) if x.ndim == 4 else x


def evenly(few: int, many: int) -> list[int]:
    """Which of `many` layers are beside 0, 1 ... `few`, both ends included: evenly(2, 6) is [0, 3, 6]."""
    return [round(i * many / few) for i in range(few + 1)]


def _scored(out: Mapping[str, Any]) -> bool:
    return bool({"head", "logits", "distillation_logits"} & out.keys())


def _logits(out: Mapping[str, Any], who: str) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """(what is cut into pieces, the logits of a piece of it): a language model's last states, or logits themselves."""
    if "head" in out:
        rest = {name: part for name, part in out["head"].items() if name != "x_BTD"}
        return out["head"]["x_BTD"], lambda x: constrain(ops.vocab_logits(x, **rest), "batch", "seq", "vocab")
    if not _scored(out):
        raise ValueError(f"the {who} gives no logits; there are {', '.join(out)}")
    return out.get("distillation_logits", out.get("logits")), lambda x: x


def classes_of(model: Model, params: Any, inputs: Mapping[str, Any], fn: Callable[[jax.Array], Any], chunk: int | None = None) -> Any:
    """`fn` of the logits that a model gives these inputs, of a vocabulary a piece of the tokens at a time."""
    out = model.apply(params, **inputs, **({"logits": False} if "logits" in takes(model) else {}))
    x, of = _logits(out, "teacher")
    return _pieces(lambda x: fn(of(x)), chunk, out, x)


def _pieces(fn: Callable[..., Any], chunk: int | None, outs: Any, *fields: jax.Array) -> Any:
    """`fn` over [B, T, ...], a piece of T at a time where a head makes logits of it, which the backward pass makes again."""
    heads = [out["head"] for out in (outs if isinstance(outs, tuple) else (outs,)) if "head" in out]
    if not heads or fields[0].ndim != 3:
        return fn(*fields)
    B, T = fields[0].shape[:2]
    layout = current_layout()
    parts = lambda name, n: math.prod(layout.mesh.shape[a] for a in axes_of(name, n, layout.mesh, layout.table)) if layout else 1
    along, V = parts("seq", T), max(shape(head["w_VD"])[0] for head in heads)
    each = T // along  # each device cuts its own part of the time
    size = min(each, chunk or max(1, PIECE_LOGITS // (B // parts("batch", B) * V // parts("vocab", V) or 1)))
    count = -(-each // size)
    if count == 1:
        return fn(*fields)

    def cut(x):
        x = x.reshape(B, along, each, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, count * size - each), *((0, 0),) * (x.ndim - 3)))
        return jnp.moveaxis(x.reshape(B, along, count, size, *x.shape[3:]), 2, 0).reshape(count, B, along * size, *x.shape[3:])

    def join(x):
        x = jnp.moveaxis(x.reshape(count, B, along, size, *x.shape[3:]), 0, 2)
        return x.reshape(B, along, count * size, *x.shape[4:])[:, :, :each].reshape(B, T, *x.shape[4:])

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(lambda x: fn(*x)), tuple(map(cut, fields))))


def _real(both: Both, values: jax.Array, of: str | None = None) -> jax.Array:
    """Which of `values` [N] or [N, T] count: tokens with a label, rows with a token; of states by this name, those that are seen; where nothing says, all.

    A loader's padding rows have an attention mask of 0 and label -100 throughout; a text without a label has the last alone."""
    N, T = values.shape[0], values.shape[1] if values.ndim == 2 else 0
    given = lambda *names: next((both.inputs[n].reshape(N, -1) > 0 for n in names if n in both.inputs), None)
    seen, labelled = given("segment_ids", "attention_mask"), None if both.labels is None else both.labels.reshape(N, -1) != losses.IGNORE
    marks = labelled if seen is None else seen
    rows_N = jnp.ones(N, bool) if marks is None else marks.any(-1)
    side = "" if of is None else of.partition("_")[0]
    if side == "vision":
        found = [None]
    elif side in ("decoder", "cross"):
        found = [given("decoder_segment_ids", "decoder_attention_mask"), labelled]
    else:
        found = [seen, labelled][:: 1 if of else -1]
    there = next((mask for mask in found if T and mask is not None and mask.shape[1] == T), None)
    rows = rows_N[:, None] if T else rows_N
    return jnp.broadcast_to(rows, values.shape) if there is None else there & rows


def takes(model: Model) -> Mapping[str, Any]:
    """The parameters of its `apply`."""
    return inspect.signature(type(model.module).__call__ if model.module is not None else model.apply).parameters
