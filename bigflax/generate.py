"""Decoding with a key-value cache: one compiled prefill, one compiled scan of single-token steps.

    tokens = generate(model, params, prompt_BT, max_new_tokens=100, temperature=0.8, top_k=50, rng=key)
    tokens = generate(model, params, input_features=log_mel(sound), decoder_input_ids=prompt_BT, max_new_tokens=100, temperature=0)

An encoder runs once; what the decoder's layers make of its states is kept beside their own keys and values. Runs wherever the weights lie
(`tracing_on(mesh)` around the call lays out activations too). Temperature 0 is greedy. With `cache_dtype="int8"` keys and values are kept as codes
(nn/attention.py): of heads of 64 numbers in 1.06 bytes each, where float32 takes 4 and bfloat16 2.
Left out on purpose: beam search, speculative decoding, continuous batching: serving is another program's work.
"""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from bigflax import sharding
from bigflax.models.heads import LmHead
from bigflax.models.seq2seq import Seq2Seq
from bigflax.models.transformer import Block, Embed, Transformer
from bigflax.nn import CACHES, Model, pick


def generate(
    model: Model, params: Any, input_ids: jax.Array | None = None, *, max_new_tokens: int, attention_mask: jax.Array | None = None,
    input_features: jax.Array | None = None, decoder_input_ids: jax.Array | None = None, decoder_attention_mask: jax.Array | None = None,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, eos_id: int | None = None, rng: jax.Array | None = None,
    cache_dtype: str | None = None,
) -> jax.Array:  # fmt: skip
    """Continues each prompt: input_ids [B, T] -> new tokens [B, max_new_tokens].

    Prompts of different lengths are padded on the left, `attention_mask` 0 there. After `eos_id` a row repeats it. `rng` is needed
    unless temperature is 0. `top_k` keeps the k likeliest tokens, `top_p` the likeliest whose probability reaches p. `cache_dtype` is one of
    nn.CACHES, by default that of the activations. Raises ValueError for what cannot be: padding on the right, more tokens than learned positions,
    an encoder.

    Of an encoder-decoder the encoder reads `input_ids` (padded on either side) or `input_features`, and the prompt is `decoder_input_ids`,
    by default the model's start token alone.
    """
    encoder, prompt, mask = {}, input_ids, attention_mask
    if isinstance(model.module, Seq2Seq):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "input_features": input_features}
        encoder = {name: x for name, x in given.items() if x is not None}
        if len(encoder.keys() - {"attention_mask"}) != 1:
            raise ValueError("an encoder-decoder reads input_ids or input_features, one of them; its own prompt is decoder_input_ids")
        prompt, mask = decoder_input_ids, decoder_attention_mask
        if prompt is None:
            rows = next(len(x) for name, x in encoder.items() if name != "attention_mask")
            prompt = jnp.full((rows, 1), model.module.start, jnp.int32)
    elif any(x is not None for x in (input_features, decoder_input_ids, decoder_attention_mask)) or prompt is None:
        raise ValueError("a decoder alone continues input_ids; input_features and decoder_input_ids are for models with an encoder")
    check(
        model, prompt.shape[1], max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, cache_dtype=cache_dtype
    )  # fmt: skip
    if mask is not None and not isinstance(mask, jax.core.Tracer) and not bool((mask[:, -1] != 0).all()):
        raise ValueError("the last token of a prompt is padding by attention_mask; pad prompts on the left, so that all end together")
    if temperature > 0 and rng is None:
        raise ValueError("sampling needs rng; give a key, or temperature=0 for the likeliest token each time")
    mask = jnp.ones_like(prompt) if mask is None else mask
    rng = jax.random.key(0) if rng is None else rng
    layout = sharding.current_layout()
    how = (max_new_tokens, temperature, top_k, top_p, eos_id, cache_dtype)
    return _decode(model, params, encoder, prompt, mask, rng, *how, layout and layout[0])


def check(
    model: Model, length: int, *, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    cache_dtype: str | None = None,
) -> None:  # fmt: skip
    """Raises the ValueErrors of `generate` that a prompt's length and the options decide: before a long training, say."""
    decoder, new = _decoder(model), max_new_tokens
    if new < 1 or temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        said = f"max_new_tokens {new}, temperature {temperature}, top_k {top_k} and top_p {top_p}"
        raise ValueError(f"{said} are to be at least 1, at least 0, at least 1 (or None), and above 0 up to 1 (or None)")
    if cache_dtype is not None:
        pick(CACHES, cache_dtype, "cache dtype")
    if decoder.embed.positions and length + new > decoder.embed.positions:
        raise ValueError(
            f"{length} tokens and {new} new ones do not fit into the model's {decoder.embed.positions} positions; ask for fewer"
        )


def _decoder(model: Model) -> Transformer:
    """The stack that writes. Raises ValueError where none does."""
    module = model.module.decoder if isinstance(model.module, Seq2Seq) else model.module
    if isinstance(module, Transformer) and isinstance(module.embed, Embed) and isinstance(model.module.head, LmHead):
        block = module.groups[0].blocks[0]
        if isinstance(block, Block) and block.attention.causal:
            return module
    raise ValueError("only a causal decoder continues text, and this model is not one; take a family such as gpt2, llama or t5")


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "temperature", "top_k", "top_p", "eos_id", "cache_dtype", "mesh"))
def _decode(model, params, encoder, prompt, mask, rng, max_new_tokens, temperature, top_k, top_p, eos_id, cache_dtype, mesh):
    # `mesh` is there for jit's cache alone, which would not notice that `constrain` now speaks of another one.
    B, T = prompt.shape
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    its = "decoder_" if isinstance(model.module, Seq2Seq) else ""
    run = lambda tokens_BT, **more: model.apply(params, **{f"{its}input_ids": tokens_BT, **more})
    cache = model.begin(params, B, T + max_new_tokens, cache_dtype)
    out = run(prompt, **encoder, **{f"{its}attention_mask": mask, f"{its}position_ids": positions}, cache=cache)
    draw = functools.partial(choose, temperature=temperature, top_k=top_k, top_p=top_p)

    def step(carry, i):
        cache, logits_BV, done_B = carry
        token_B = draw(logits_BV, rng=jax.random.fold_in(rng, i))
        if eos_id is not None:
            token_B = jnp.where(done_B, eos_id, token_B)
            done_B |= token_B == eos_id
        out = run(token_B[:, None], **{f"{its}position_ids": positions[:, -1:] + 1 + i}, cache=cache)
        return (out["cache"], out["logits"][:, -1], done_B), token_B

    start = (out["cache"], out["logits"][:, -1], jnp.zeros(B, bool))
    _, tokens_NB = jax.lax.scan(step, start, jnp.arange(max_new_tokens))
    return tokens_NB.T


def choose(logits_BV: jax.Array, *, temperature: float, top_k: int | None = None, top_p: float | None = None, rng: jax.Array) -> jax.Array:
    """One token a row: the likeliest at temperature 0, else drawn from softmax(logits / temperature) cut to top_k and top_p (nucleus,
    Holtzman et al. 2020, arXiv 1904.09751)."""
    logits_BV = logits_BV.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits_BV, -1)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p is not None:
        sorted_BV = jnp.sort(logits_BV, -1, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), -1) - jax.nn.softmax(sorted_BV)
        least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), -1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(rng, logits_BV)
