"""Terms of distillation: what is compared of the outputs that a student and its teacher give for the same inputs.

    soft_labels   a divergence (losses.kl_divergence) of what they say: of `logits` [B, C], of each token's over a vocabulary, of the first and last
                  token of answers; of embeddings, of who is near whom in the batch. Of a teacher's likeliest k alone where no more is there.
    hidden        squared error of layers, through a learned matrix where widths differ: TinyBERT, Jiao et al. 2020 (arXiv 1909.10351), equation 8
    relations     how the vectors of a layer relate to one another, where numbers of layers and widths may differ (losses.relation_divergence)

A value counts where there is a label (without labels, where the attention mask is 1), hidden states and relations where a token is real; a loader's
padding rows never. Logits of a vocabulary are held for one piece of the tokens at a time, 2^24 numbers a device and model, and made again in the backward
pass, one more product with each table; the task's own loss head comes on top. XLA keeps five float32 arrays of a piece's size for "forward" and eight for
"js". Pieces of tokens, where ops.linear_cross_entropy takes pieces of the vocabulary: a divergence needs both sums of exponentials before its first term.
The price is a gradient of the student's table that every piece adds to. Logits that a model gives whole, as an `ensemble` does, are held whole.

Left out on purpose: attention maps and MiniLM's relations of queries, keys and values. Fused attention never holds the first, and no module returns the
others; relations of hidden states are a weaker thing.

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
STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states", "text_hidden_states", "vision_hidden_states")


class Both(NamedTuple):
    """What both models were given and gave: the inputs, the outputs of the student and of the teacher, the projections, and `labels` of the batch."""

    inputs: Mapping[str, Any]
    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    projections: Mapping[str, Any]
    labels: Any


class Term(NamedTuple):
    """`of(seen)` gives Means, of which the first is what is learned; `states`: both models are asked for hidden states."""

    name: str
    of: Callable[[Both], dict[str, Mean]]
    states: bool = False


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
        for i, j, x, y in _layers(seen, of, layers):
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

    name = "hidden" if (project or of) == STATES[0] else f"hidden_{project or of}"
    return Term(name, term, states=True)


def relations(layers: Mapping[int, int] | None = None, *, heads: int = 1, of: str = "hidden_states", divergence: str = "forward") -> Term:
    """Relations among the tokens of a layer, by default of the last of each, in `heads` parts (losses.relation_divergence); holds [B, heads, T, T] of
    both."""

    def term(seen: Both) -> dict[str, Mean]:
        last = {len(seen.student.get(of, ())) - 1: len(seen.teacher.get(of, ())) - 1}
        found = []
        for _, _, x, y in _layers(seen, of, layers or last):
            if x.shape[:2] != y.shape[:2]:
                raise ValueError(f"relations of {x.shape[1]} vectors cannot be compared with those of {y.shape[1]}")
            real = _real(seen, x[..., 0], of)
            found.append(losses.relation_divergence(x, y, heads=heads, real=real, kind=divergence))
        values = jnp.mean(jnp.stack(found), 0)
        return {"relations": Mean.of(values, _real(seen, values, of))}

    return Term("relations", term, states=True)


# -- what there is to compare ----------------------------------------------------------------------------------------------


def _layers(seen: Both, of: str, layers: Mapping[int, int] | None) -> list[tuple[int, int, jax.Array, jax.Array]]:
    """(layer, its teacher's, [N, T, D], [N, T, D']) of each pair."""
    for who, out in (("student", seen.student), ("teacher", seen.teacher)):
        if of not in out:
            raise ValueError(f"the {who} gives no {of!r}; {trees.did_you_mean(of, [n for n in STATES if n in out], 'its states are')}")
    s, t = seen.student[of], seen.teacher[of]
    pairs = dict(zip(range(len(s)), evenly(len(s) - 1, len(t) - 1), strict=True)) if layers is None else dict(layers)
    if far := [f"{i}: {j}" for i, j in pairs.items() if not (0 <= i < len(s) and 0 <= j < len(t))]:
        raise ValueError(f"there are no layers {far[0]}: the student's are 0 to {len(s) - 1}, the teacher's 0 to {len(t) - 1}")
    flat = lambda x: x.reshape(*x.shape[:2], -1).swapaxes(1, 2) if x.ndim == 4 else x  # a network's over images, [B, C, H, W]
    return [(i, j, flat(s[i]), flat(t[j])) for i, j in pairs.items()]


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
    """Which of `values` [N] or [N, T] count: those with a label; of states by this name, those that are seen; where neither says, all.

    A loader's padding rows have label -100 throughout, or where there are no labels an attention mask of 0."""
    N, T = values.shape[0], values.shape[1] if values.ndim == 2 else 0
    given = lambda *names: next((both.inputs[n].reshape(N, -1) > 0 for n in names if n in both.inputs), None)
    seen, labelled = given("segment_ids", "attention_mask"), None
    rows_N = jnp.ones(N, bool) if seen is None else seen.any(-1)
    if both.labels is not None:
        labelled = both.labels.reshape(N, -1) != losses.IGNORE
        rows_N = labelled.any(-1)
    if of == "vision_hidden_states":
        found = [None]
    elif of == "decoder_hidden_states":
        found = [given("decoder_segment_ids", "decoder_attention_mask"), labelled]
    else:
        found = [seen, labelled][:: 1 if of else -1]
    there = next((mask for mask in found if T and mask is not None and mask.shape[1] == T), None)
    rows = rows_N[:, None] if T else rows_N
    return jnp.broadcast_to(rows, values.shape) if there is None else there & rows


def takes(model: Model) -> Mapping[str, Any]:
    """The parameters of its `apply`."""
    return inspect.signature(type(model.module).__call__ if model.module is not None else model.apply).parameters
