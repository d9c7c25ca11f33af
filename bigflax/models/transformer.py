"""Transformers by composition: an embedding, one kind of block stacked and scanned, a final norm, a head.

    decoder   Transformer(Embed(...), Block(Attention(causal=True), Mlp(...), Norm()), norm=Norm(), head=LmHead())
    encoder   Transformer(Embed(types=2, norm=Norm()), Block(Attention(causal=False), ..., order="post"), head=MlmHead(...))

The heads are in heads.py. Inputs and outputs bear the names of the transformers library: `input_ids`, `attention_mask`, `token_type_ids`, `position_ids`, and
`segment_ids` for packed documents (0 is padding); out comes a dict of `last_hidden_state`, `logits`, and on request `hidden_states` and
`cache`. With `logits=False` the last product is left undone and `head` holds its factors, `{"x_BTD", "w_VD", ["bias"]}`, for
`ops.linear_cross_entropy`, which never holds [B, T, V] whole.

Left out on purpose: what no family here needs yet (parallel and sandwich order, mixture of experts, cross-attention).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from bigflax import ops
from bigflax.models.heads import Head
from bigflax.nn import NORMAL, Attention, Initializer, Mlp, Norm, dropout, stack, weight
from bigflax.sharding import constrain


class Embed(nn.Module):
    """Token rows, plus learned positions and token types where they are asked for; sets the dtype of computation."""

    vocab: int
    features: int
    positions: int = 0
    types: int = 0
    norm: Norm | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, input_ids, position_ids=None, token_type_ids=None):
        if not isinstance(input_ids, jax.core.Tracer) and (worst := int(np.asarray(input_ids).max(initial=0))) >= self.vocab:
            raise ValueError(f"token id {worst} is outside of the vocabulary of {self.vocab}; is it the tokenizer of another model?")
        w_VD = weight(self, "tokens", (self.vocab, self.features), "vocab <- embed", self.init)
        # Rows are looked up in a table that is whole in its width: XLA cannot shard the lookup's output by batch and by width at once.
        x_BTD = ops.take(whole_rows(w_VD, "vocab"), input_ids, self.dtype)
        if self.positions:
            if position_ids is None and input_ids.shape[1] > self.positions:
                raise ValueError(f"{input_ids.shape[1]} tokens are more than the {self.positions} learned positions; cut the sequences")
            at = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
            x_BTD += ops.take(
                whole_rows(weight(self, "positions", (self.positions, self.features), "positions <- embed", self.init)), at, self.dtype
            )
        if self.types:
            kinds = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x_BTD += ops.take(
                whole_rows(weight(self, "types", (self.types, self.features), "types <- embed", self.init)), kinds, self.dtype
            )
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return constrain(dropout(self, x_BTD, self.dropout), "batch", "seq", None), w_VD


def whole_rows(w_VD: Any, rows: str | None = None) -> Any:
    """The table gathered over the axis that shards its width (once a pass, as FSDP gathers any weight); `rows` stay as they lie."""
    return constrain(w_VD, rows, None) if isinstance(w_VD, jax.Array) else w_VD


class Block(nn.Module):
    """One layer. "pre": x += f(norm(x)); "post": x = norm(x + f(x)), for f the attention and then the mlp."""

    attention: Attention
    mlp: Mlp
    norm: Norm
    order: str = "pre"

    @nn.compact
    def __call__(self, x_BTD, cache=None, *, keep=False, **where):
        norm1, norm2 = self.norm.clone(parent=self, name="norm1"), self.norm.clone(parent=self, name="norm2")
        if self.order == "pre":
            y_BTD, cache = self.attention(norm1(x_BTD), cache, **where)
            x_BTD = x_BTD + y_BTD
            x_BTD = x_BTD + self.mlp(norm2(x_BTD))
        else:
            y_BTD, cache = self.attention(x_BTD, cache, **where)
            x_BTD = norm1(x_BTD + y_BTD)
            x_BTD = norm2(x_BTD + self.mlp(x_BTD))
        x_BTD = constrain(x_BTD, "batch", "seq", None)
        return x_BTD, (x_BTD if keep else None, cache)


class Transformer(nn.Module):
    """An encoder or a decoder, which differ only in what it is composed of."""

    embed: Embed
    blocks: Block
    layers: int
    norm: Norm | None = None
    head: Head | None = None
    remat: str = "none"
    unroll: int | bool = 1

    @nn.compact
    def __call__(
        self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, segment_ids=None, *,
        cache=None, logits=True, hidden_states=False,
    ):  # fmt: skip
        if cache is not None and position_ids is None:
            position_ids = cache["index"][0] + jnp.arange(input_ids.shape[1])[None]
        x0_BTD, embed_VD = self.embed(input_ids, position_ids, token_type_ids)
        where = {"positions": position_ids, **visibility(input_ids, attention_mask, segment_ids, cached=cache is not None)}
        x_BTD, (seen, cache) = stack(
            self.blocks, self.layers, x0_BTD, cache, remat=self.remat, unroll=self.unroll, keep=hidden_states, **where
        )
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        out: dict[str, Any] = {"last_hidden_state": x_BTD}
        if hidden_states:
            # The last of the tuple is after the final norm, as in transformers.
            out["hidden_states"] = (x0_BTD, *(seen[i] for i in range(self.layers - 1)), x_BTD)
        if cache is not None:
            out["cache"] = cache
        if self.head is not None:
            real_BT = attention_mask if segment_ids is None else segment_ids
            found: dict[str, Any] = self.head(x_BTD, embed_VD, None if real_BT is None else real_BT > 0)
            out |= found if "w_VD" not in found else {"logits": unembed(**found)} if logits else {"head": found}
        return out


def visibility(input_ids, attention_mask, segment_ids, *, cached: bool) -> dict[str, Any]:
    """Who sees whom: packed documents see themselves; everyone sees what `attention_mask` calls real (1), nobody its padding (0)."""
    if segment_ids is not None and attention_mask is not None:
        raise ValueError("give attention_mask (1 real, 0 padding) or segment_ids (documents packed into a row), not both")
    if segment_ids is not None:
        return {"q_segments": segment_ids, "kv_segments": segment_ids}
    if attention_mask is None and not cached:
        return {"q_segments": None, "kv_segments": None}
    mask = None if attention_mask is None else attention_mask.astype(jnp.int32)
    return {"q_segments": jnp.ones_like(input_ids), "kv_segments": mask}


def unembed(x_BTD: jax.Array, w_VD: Any, bias: jax.Array | None = None, softcap: float | None = None) -> jax.Array:
    """logits = x w^T (+ bias), soft-capped where asked: [B, T, V] in x's dtype."""
    logits = constrain(ops.einsum("btd,vd->btv", x_BTD, w_VD), "batch", "seq", "vocab")
    if bias is not None:
        logits += bias.astype(logits.dtype)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def empty_cache(module: Transformer, batch: int, length: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """A key-value cache for `length` tokens in all, with the leading layer axis that `stack` slices."""
    attention = module.blocks.attention
    kv = (module.layers, batch, length, attention.kv_heads or attention.heads, attention.head_dim)
    return {
        "k": jnp.zeros(kv, dtype), "v": jnp.zeros(kv, dtype),
        "segments": jnp.zeros(kv[:3], jnp.int32), "index": jnp.zeros(kv[:1], jnp.int32),
    }  # fmt: skip
