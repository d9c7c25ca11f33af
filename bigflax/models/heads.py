"""Heads: what a model's last hidden states are turned into.

A language-model head returns the factors of its logits, {"x_BTD", "w_VD", ...}, so that a loss need not hold them (ops.linear_cross_entropy);
the others return the outputs themselves, under the names of the transformers library.

    HEAD                      outputs
    causal_lm, masked_lm      logits [B, T, V], and seq2seq_lm
    sequence_classification   logits [B, C]
    token_classification      logits [B, T, C]
    question_answering        start_logits, end_logits [B, T]
    embedding                 sentence_embedding [B, D]: the mean over real tokens, of length 1
    image_classification      logits [B, C]; with a teacher cls_logits and distillation_logits too (vision.py)
    None                      nothing, or an encoder's pooler_output [B, D]

Left out on purpose: losses (tasks.py). Shapes: B batch, T time, D width, V vocabulary, C labels.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigflax.nn import ACTIVATIONS, NORMAL, Initializer, Linear, Norm, dropout, pick, weight, zeros
from bigflax.weights import shape


class LmHead(nn.Module):
    """Logits by the embedding table (`tied`) or by a table of its own, of states multiplied by `scale`; a `bias` is added but not learned."""

    vocab: int
    tied: bool = True
    softcap: float | None = None
    init: Initializer = NORMAL
    scale: float | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x_BTD, embed_VD, real_BT=None):
        w_VD = embed_VD if self.tied else weight(self, "w", (self.vocab, x_BTD.shape[-1]), "vocab <- embed", self.init)
        found = {"x_BTD": x_BTD if self.scale is None else x_BTD * self.scale, "w_VD": w_VD}
        if self.bias:  # one row, as BART stores it
            found["bias"] = jax.lax.stop_gradient(weight(self, "bias", (1, self.vocab), "_ vocab", zeros)[0])
        return found | ({} if self.softcap is None else {"softcap": self.softcap})


class MlmHead(nn.Module):
    """BERT's: a layer to the embedding's width, an activation, a norm, then logits by the embedding table and a bias."""

    vocab: int
    act: str
    norm: Norm
    dense_bias: bool = True
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTD, embed_VD, real_BT=None):
        h_BTD = between(self, x_BTD, shape(embed_VD)[-1])
        return {"x_BTD": h_BTD, "w_VD": embed_VD, "bias": weight(self, "bias", (self.vocab,), "vocab", zeros)}


class SequenceHead(nn.Module):
    """One row of scores a sequence: from its first token, its last real one, or the mean of the real ones; `act` names that of a layer
    between, None for no layer, and a `norm` follows. With `labels` 0, what there is before scores is the output, `pooler_output`."""

    labels: int
    pool: str = "first"
    act: str | None = None
    norm: Norm | None = None
    dense_bias: bool = True
    bias: bool = True
    dropout: float = 0.0
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTD, embed_VD=None, real_BT=None):
        x_BD = pick(POOLS, self.pool, "pooling")(x_BTD, jnp.ones(x_BTD.shape[:2], bool) if real_BT is None else real_BT)
        x_BD = between(self, x_BD, x_BD.shape[-1])
        if not self.labels:
            return {"pooler_output": x_BD}
        x_BD = dropout(self, x_BD, self.dropout)
        return {"logits": Linear(self.labels, "embed -> _", bias=self.bias, init=self.init, name="scores")(x_BD)}


class TokenHead(nn.Module):
    """A row of scores a token; `outputs` names them where each is an output [B, T] of its own; `act` names that of a layer before, or None, and
    `norm` follows it."""

    labels: int
    outputs: tuple[str, ...] = ()
    act: str | None = None
    norm: Norm | None = None
    dense_bias: bool = True
    dropout: float = 0.0
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTD, embed_VD=None, real_BT=None):
        x_BTD = between(self, x_BTD, x_BTD.shape[-1])
        scores_BTC = Linear(self.labels, "embed -> _", init=self.init, name="scores")(dropout(self, x_BTD, self.dropout))
        return {name: scores_BTC[..., i] for i, name in enumerate(self.outputs)} if self.outputs else {"logits": scores_BTC}


class EmbeddingHead(nn.Module):
    """The mean of the real tokens' states, scaled to length 1: no weights (sentence-transformers; Reimers & Gurevych 2019, 1908.10084)."""

    @nn.compact
    def __call__(self, x_BTD, embed_VD=None, real_BT=None):
        mean_BD = _mean(x_BTD, jnp.ones(x_BTD.shape[:2], bool) if real_BT is None else real_BT).astype(jnp.float32)
        return {"sentence_embedding": mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)}


Head = LmHead | MlmHead | SequenceHead | TokenHead | EmbeddingHead


def between(head: Any, x: jax.Array, width: int) -> jax.Array:
    """What a head does before its scores: a layer of its own, the activation that it names, its norm; nothing where it names none."""
    if head.act is not None:
        x = pick(ACTIVATIONS, head.act, "activation")(Linear(width, "embed -> _", bias=head.dense_bias, init=head.init, name="dense")(x))
    return x if head.norm is None else head.norm(x)


def _last(x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    """The last real token's, whichever side the padding is on."""
    at_B = jnp.max(jnp.where(real_BT, jnp.arange(x_BTD.shape[1]), 0), axis=1)
    return jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)[:, 0]


def _mean(x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    real_BT1 = real_BT[..., None].astype(x_BTD.dtype)
    return jnp.sum(x_BTD * real_BT1, axis=1) / jnp.maximum(jnp.sum(real_BT1, axis=1), 1)


POOLS = {"first": lambda x_BTD, real_BT: x_BTD[:, 0], "last": _last, "mean": _mean}


def encoder_head(
    head: str | None, *, vocab: int, norm: Callable[[], Norm], labels: int, init: Initializer, dropout: float = 0.0, mlm_act: str = "gelu",
    act: str = "tanh", pooler: bool = True, first: Head | None = None,
) -> Head | None:  # fmt: skip
    """The heads of an encoder by name; `first` is what its own pre-training adds, as "discriminator". Raises ValueError that lists them."""
    made: dict[Any, Any] = {
        None: SequenceHead(0, act="tanh", init=init) if pooler else None,
        "embedding": EmbeddingHead(),
        "masked_lm": MlmHead(vocab, mlm_act, norm(), init=init),
        "sequence_classification": SequenceHead(labels, act=act, dropout=dropout, init=init),
        "token_classification": TokenHead(labels, dropout=dropout, init=init),
        "question_answering": TokenHead(2, ("start_logits", "end_logits"), init=init),
    }
    return pick(made | ({} if first is None else {"discriminator": first}), head, "head")


def decoder_head(head: str | None, *, vocab: int, tied: bool, labels: int, init: Initializer, softcap: float | None = None) -> Head | None:
    """The heads of a decoder by name. Raises ValueError that lists them."""
    made: dict[Any, Any] = {
        "causal_lm": LmHead(vocab, tied, softcap, init),
        "sequence_classification": SequenceHead(labels, "last", bias=False, init=init),
        None: None,
    }
    return pick(made, head, "head")
