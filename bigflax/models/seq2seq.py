"""Encoder-decoders: two Transformers, of which the second looks at the states of the first. Vaswani et al. 2017 (arXiv 1706.03762).

    Seq2Seq(Table(V, D), encoder=Transformer(...), decoder=Transformer(..., blocks with a cross attention ...), head=LmHead(V))

Inputs: `input_ids` or `input_features` (speech.py) and `attention_mask` of the encoder; `decoder_input_ids` and `decoder_attention_mask`.
Outputs: `last_hidden_state` of the decoder, `encoder_last_hidden_state`, the head's, and on request `cache`, `encoder_hidden_states` and
`decoder_hidden_states`, `encoder_attentions`, `decoder_attentions` and `cross_attentions`, `encoder_qkv` and `decoder_qkv`. Labels lie beside the
tokens that they follow: `decoder_input_ids` is `shift_right(labels)`.
Pairs packed into rows bear `segment_ids` and `decoder_segment_ids`: a target sees its own source.

Left out on purpose: caches of an encoder's states between calls; decoding (generate.py) keeps the keys and values made of them instead.
Shapes: B batch, T time of the decoder, S time of the encoder, D width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigflax.models import names
from bigflax.models.heads import Head, SequenceHead, TokenHead
from bigflax.models.transformer import Inputs, Transformer, finish
from bigflax.nn import NORMAL, Initializer, weight


class Table(nn.Module):
    """The rows of tokens that encoder, decoder and head share."""

    vocab: int
    features: int
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self) -> Any:
        return weight(self, "tokens", (self.vocab, self.features), "vocab <- embed", self.init)


class Seq2Seq(nn.Module):
    """An encoder and a decoder; without a decoder, an encoder alone under the names it has in the pair.

    A head that scores what was read has the decoder read it again, shifted, where no `decoder_input_ids` are given, and a sequence's
    scores are those at its last `eos` (Lewis et al. 2020, arXiv 1910.13461, section 3).
    """

    embed: Table
    encoder: Transformer
    decoder: Transformer | None = None
    head: Head | None = None
    start: int = 0  # the token that a decoder's rows begin with
    pad: int = 0
    eos: int = 1

    def example(self) -> Inputs:
        """The inputs of a small call, as ShapeDtypeStructs by name."""
        decoder = {} if self.decoder is None else {f"decoder_{name}": x for name, x in self.decoder.example().items()}
        return {**self.encoder.example(), **decoder}

    def places(self) -> names.Places:
        """Where names.py finds the layers of both."""
        decoder = {} if self.decoder is None else names.below("decoder", self.decoder.places())
        return {**names.below("encoder", self.encoder.places()), **decoder}

    def empty_cache(self, batch: int, length: int, dtype: str | None = None) -> dict[str, Any]:
        """The decoder's."""
        assert self.decoder is not None
        return self.decoder.empty_cache(batch, length, dtype)

    @nn.compact
    def __call__(
        self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None, *, input_features=None,
        position_ids=None, segment_ids=None, decoder_position_ids=None, decoder_segment_ids=None, cache=None, logits=True, hidden_states=False,
        attentions=False, qkv=False,
    ):  # fmt: skip
        table, encoded = self.embed(), {}
        asked = {"hidden_states": hidden_states, "attentions": attentions, "qkv": qkv}
        if input_features is not None and attention_mask is not None:
            raise ValueError("input_features go without attention_mask: silence is a part of them, and the encoder hears it")
        if segment_ids is not None and self.decoder is not None and decoder_segment_ids is None:
            raise ValueError("sources packed by segment_ids need decoder_segment_ids, which say whose target is where")
        if input_ids is not None or input_features is not None or cache is None:  # else what was made of it is in the cache
            encoded = self.encoder(
                input_ids, attention_mask, position_ids=position_ids, segment_ids=segment_ids, input_features=input_features, table=table, **asked,
            )  # fmt: skip
        memory, memory_segments = encoded.get("last_hidden_state"), attention_mask if segment_ids is None else segment_ids
        if self.decoder is None:
            return encoded | (
                {} if self.head is None else self.head(memory, table, None if memory_segments is None else memory_segments > 0)
            )
        decoded = self.decoder(
            self._read_again(input_ids) if decoder_input_ids is None else decoder_input_ids, decoder_attention_mask,
            position_ids=decoder_position_ids, segment_ids=decoder_segment_ids, memory=memory,
            memory_segments=memory_segments, table=table, cache=cache, **asked,
        )  # fmt: skip
        out = {f"encoder_{name}": x for name, x in encoded.items()}
        out |= {f"decoder_{name}" if name in asked else name: x for name, x in decoded.items()}
        if self.head is not None:
            real_BT = input_ids == self.eos if isinstance(self.head, SequenceHead) else None
            out |= finish(self.head(decoded["last_hidden_state"], table, real_BT), logits=logits)
        return out

    def _read_again(self, input_ids):
        if input_ids is None or not isinstance(self.head, SequenceHead | TokenHead):
            raise ValueError("a decoder needs decoder_input_ids; to learn labels, shift_right(labels) of models/seq2seq.py makes them")
        return shift_right(input_ids, start=self.start, pad=self.pad)


def shift_right(labels_BT: jax.Array, *, start: int, pad: int, segments_BT: jax.Array | None = None) -> jax.Array:
    """`decoder_input_ids` of labels that lie beside the token they follow: `start`, then all but the last; what is not learned (-100) is `pad`.
    In a packed row each document starts anew."""
    before_BT = jnp.pad(labels_BT[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    if segments_BT is not None:
        before_BT = jnp.where(segments_BT == jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1), before_BT, start)
    return jnp.where(before_BT == -100, pad, before_BT)
