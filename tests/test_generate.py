"""Decoding with a cache gives what the model gives without one, for every family that decodes; sampling follows the distribution it names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import models, sharding, trees
from bigflax.generate import choose, generate

LOCAL = ["sliding_attention", "full_attention"]
FAMILIES = {
    "gpt2": ("gpt2", dict(n_embd=32, n_positions=24)),
    "llama with grouped queries": ("llama", dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)),
    "mixtral": ("mixtral", dict(hidden_size=32, intermediate_size=24)),
    "qwen2 with windows and a rest": (
        "qwen2", dict(num_hidden_layers=5, use_sliding_window=True, sliding_window=3, layer_types=[*LOCAL, *LOCAL, LOCAL[0]]),
    ),
}  # fmt: skip
# encoder-decoders; numbers of layers and heads that no other number is taken for
PAIRS = {
    "t5": ("t5", dict(d_model=32, num_layers=3, num_decoder_layers=2, relative_attention_max_distance=6, relative_attention_num_buckets=8)),
    "bart": ("bart", dict(d_model=32, encoder_layers=3, max_position_embeddings=24, pad_token_id=0)),
    "whisper": ("whisper", dict(d_model=32, encoder_layers=3, max_target_positions=24, max_source_positions=9, decoder_start_token_id=1)),
}
each_family = pytest.mark.parametrize("name", FAMILIES)
each_pair = pytest.mark.parametrize("name", PAIRS)
VOCAB, T, NEW = 40, 5, 8


@functools.cache
def made(name):
    """A model whose matrices are large enough that its continuations wander, and one compiled apply."""
    family, config = (FAMILIES | PAIRS)[name]
    model = models.create(family, size="tiny", vocab_size=VOCAB, **config)
    rng = np.random.default_rng(5 if name in PAIRS else 3)
    draw = lambda axes, s: rng.normal(size=s.shape) * (0.5 if "embed" in axes else 0.1) + (axes.endswith("norm") and 1)
    if name in PAIRS:  # small rows, or what was read last is written next, whatever the encoder says
        size = lambda leaf, axes: 4.0 if leaf.endswith("relative/w") else 0.7 if "embed" in axes and leaf != "embed/tokens" else 0.1
        one = lambda leaf, s, axes: jnp.asarray(rng.normal(size=s.shape) * size(leaf, axes) + leaf.endswith("scale"), jnp.float32)
        return model, trees.map_named(one, model.shapes(), model.axes), jax.jit(model.apply)
    params = jax.tree.map(lambda axes, s: jnp.asarray(draw(axes, s), jnp.float32), model.axes, model.shapes())
    return model, params, jax.jit(model.apply)


def prompts(rows=3):
    return np.random.default_rng(1).integers(0, VOCAB, (rows, T)).astype(np.int32)


def recomputed(name, ids):
    """Greedy by running the whole text anew for each token; what is not written yet lies behind, where a causal model does not look."""
    _, params, apply = made(name)
    length = ids.shape[1]
    ids = np.concatenate([ids, np.zeros((len(ids), T + NEW - length), np.int32)], axis=1)
    for at in range(length, length + NEW):
        ids[:, at] = np.asarray(apply(params, input_ids=ids)["logits"])[:, at - 1].argmax(-1)
    return ids[:, length : length + NEW]


def read(name):
    """What the encoder is given: rows padded on the right and on the left, or sounds."""
    rng = np.random.default_rng(7)
    if name == "whisper":
        return {"input_features": rng.normal(size=(3, 16, 18)).astype(np.float32)}
    real = np.array([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5], np.int32)
    return {"input_ids": rng.integers(3, VOCAB, (3, 7)).astype(np.int32) * real, "attention_mask": real}


def rewritten(name, prompt, rows=slice(None)):
    """Greedy by running encoder and decoder anew for each token."""
    _, params, apply = made(name)
    given, length = {key: x[rows] for key, x in read(name).items()}, prompt.shape[1]
    ids = np.concatenate([prompt, np.zeros((len(prompt), T + NEW - length), np.int32)], axis=1)
    for at in range(length, length + NEW):
        ids[:, at] = np.asarray(apply(params, **given, decoder_input_ids=ids)["logits"])[:, at - 1].argmax(-1)
    return ids[:, length : length + NEW]


@functools.cache
def greedy(name):
    model, params, _ = made(name)
    return np.asarray(generate(model, params, prompts(), max_new_tokens=NEW, temperature=0))


@each_family
def test_greedy_with_the_cache_is_greedy_without(name):
    want = recomputed(name, prompts())
    np.testing.assert_array_equal(greedy(name), want)
    assert len({tuple(row) for row in want}) == 3  # no constant answer, which any cache would give
    assert all(len(set(row)) > 1 for row in want)


@each_family
def test_padding_on_the_left_changes_nothing(name):
    """Row i has lost its first i tokens to padding; beside others it goes on as that shorter prompt does by recomputation."""
    model, params, _ = made(name)
    padded, mask = prompts(), np.ones((3, T), np.int32)
    for i in range(3):
        padded[i, :i], mask[i, :i] = 7, 0
    got = np.asarray(generate(model, params, padded, attention_mask=mask, max_new_tokens=NEW, temperature=0))
    for i in range(3):
        np.testing.assert_array_equal(got[i], recomputed(name, np.tile(padded[i : i + 1, i:], (3, 1)))[0])


@each_pair
def test_an_encoder_decoder_with_the_cache_writes_what_it_writes_without(name):
    """From its start token, and from prompts of which row i has lost its first i tokens to padding."""
    model, params, _ = made(name)
    want = rewritten(name, np.full((3, 1), model.module.start, np.int32))
    got = generate(model, params, **read(name), max_new_tokens=NEW, temperature=0)
    np.testing.assert_array_equal(got, want)
    assert len({tuple(row) for row in want}) == 3 and any(len(set(row)) > 1 for row in want)
    padded, mask = prompts(), np.ones((3, T), np.int32)
    for i in range(3):
        padded[i, :i], mask[i, :i] = 7, 0
    got = generate(model, params, **read(name), decoder_input_ids=padded, decoder_attention_mask=mask, max_new_tokens=NEW, temperature=0)
    for i in range(3):
        np.testing.assert_array_equal(got[i], rewritten(name, np.tile(padded[i : i + 1, i:], (3, 1)), [i] * 3)[0])


def test_the_encoder_runs_once():
    """In the program the scan over tokens holds the decoder's two scans over layers alone, and one product with its cache a layer."""
    model, params, _ = made("t5")
    jaxpr = jax.make_jaxpr(functools.partial(generate, model, max_new_tokens=NEW, temperature=0, **read("t5")))(params)
    outer, loops = str(jaxpr), lambda text, length: text.count(f"length={length}")
    assert loops(outer, NEW) == 1 and loops(outer, 3) == 1 and loops(outer, 2) == 2  # tokens; encoder; decoder at first and in the loop


def test_an_encoder_decoder_on_a_mesh():
    model, params, _ = made("t5")
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    laid = jax.device_put(params, sharding.shardings(model.shapes(), model.axes, mesh))
    given = {key: np.concatenate([x, x[:1]]) for key, x in read("t5").items()}
    with sharding.tracing_on(mesh):
        got = generate(model, laid, **given, max_new_tokens=NEW, temperature=0)
    np.testing.assert_array_equal(got[:3], rewritten("t5", np.zeros((3, 1), np.int32)))


def test_an_encoder_decoder_draws_by_its_key():
    model, params, _ = made("whisper")
    draw = lambda seed: np.asarray(
        generate(model, params, **read("whisper"), max_new_tokens=NEW, temperature=1e6, rng=jax.random.key(seed))
    )
    one, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


INT8 = ["gpt2", "llama with grouped queries", "t5"]
# what rounding keys and values to 8 bits may do: measured 0.003, 0.011 and 0.011 of the logits' deviation, and 24, 22 and 23 of 24 tokens
APART, AGREE = 0.03, 0.75


@pytest.mark.parametrize("name", [name if name not in PAIRS else pytest.param(name, marks=pytest.mark.slow) for name in INT8])
def test_a_cache_in_int8(name):
    """Logits of five tokens, one after the other, beside those with a cache of floats; and what is written. Logits of T5's attention are not scaled: its q
    and k are made smaller here, or it would flip between single keys."""
    model, params, apply = made(name)
    params = trees.map_named(lambda leaf, w: 0.3 * w if name == "t5" and leaf.endswith(("/q", "/k")) else w, params)
    its, given = ("decoder_", read(name)) if name in PAIRS else ("", {})
    ids, found = prompts(), {}
    for dtype in (None, "int8"):
        cache, logits, more = model.begin(params, 3, T, dtype=dtype), [], given
        for i in range(T):
            out = apply(params, **{f"{its}input_ids": ids[:, i : i + 1], **more}, cache=cache)
            cache, more = out["cache"], {}
            logits.append(np.asarray(out["logits"]))
        found[dtype] = np.concatenate(logits, 1)
        assert (jnp.dtype("int8") in {leaf.dtype for leaf in jax.tree.leaves(cache)}) == (dtype == "int8")
    apart = np.sqrt(np.mean(np.square(found["int8"] - found[None])))
    assert 0 < apart < APART * found[None].std()
    start = given if name in PAIRS else {"input_ids": prompts()}
    written = [
        np.asarray(generate(model, params, **start, max_new_tokens=NEW, temperature=0, cache_dtype=dtype)) for dtype in (None, "int8")
    ]
    assert (written[0] == written[1]).mean() >= AGREE


def test_a_cache_in_int8_on_a_mesh():
    """Codes of a number that lies between two may differ, and so, here and there, a token after it and what follows."""
    name = "llama with grouped queries"
    model, params, _ = made(name)
    want = generate(model, params, prompts(4), max_new_tokens=NEW, temperature=0, cache_dtype="int8")
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    laid = jax.device_put(params, sharding.shardings(model.shapes(), model.axes, mesh))
    with sharding.tracing_on(mesh):
        got = generate(model, laid, prompts(4), max_new_tokens=NEW, temperature=0, cache_dtype="int8")
    assert np.mean(np.asarray(got) == want) >= AGREE


def test_bytes_of_a_cache():
    """Of heads of 64: 68 bytes a token and head, where float32 has 256 and bfloat16 128; and a segment each token, an index each layer."""
    model = models.create("llama", size="tiny", num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    size = lambda dtype: trees.nbytes(jax.eval_shape(functools.partial(model.begin, {}, 4, 100, dtype=dtype)))
    assert {dtype: size(dtype) for dtype in ("int8", "bfloat16", "float32")} == {
        dtype: 3 * (4 * 100 * (2 * 2 * head + 4) + 4) for dtype, head in (("int8", 68), ("bfloat16", 128), ("float32", 256))
    }
    assert size("float32") > 3.7 * size("int8")


def test_after_eos_a_row_repeats_it():
    name = "gpt2"
    model, params, _ = made(name)
    want = greedy(name).copy()
    eos = int(want[0, 3])
    for row in want:
        ends = np.nonzero(row == eos)[0]
        row[ends[0] if len(ends) else NEW :] = eos
    got = generate(model, params, prompts(), max_new_tokens=NEW, temperature=0, eos_id=eos)
    np.testing.assert_array_equal(got, want)


SAME_AS_GREEDY = {"top_k=1": dict(temperature=1.7, top_k=1), "a tiny top_p": dict(top_p=1e-6), "nearly cold": dict(temperature=1e-6)}


@pytest.mark.parametrize("options", SAME_AS_GREEDY.values(), ids=SAME_AS_GREEDY)
def test_same_as_greedy(options):
    logits = np.random.default_rng(0).normal(size=(200, 9)).astype(np.float32)
    got = choose(jnp.asarray(logits), rng=jax.random.key(0), **{"temperature": 1.0, **options})
    np.testing.assert_array_equal(got, logits.argmax(-1))


PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
# options -> the distribution by hand, from PROBABILITIES
DISTRIBUTIONS = {
    "as it is": ({}, PROBABILITIES),
    "temperature 2": (dict(temperature=2.0), PROBABILITIES**0.5),
    "top_k=2": (dict(top_k=2), PROBABILITIES * [1, 1, 0, 0, 0]),
    "top_k beyond the vocabulary": (dict(top_k=50), PROBABILITIES),
    "top_p=0.8": (dict(top_p=0.8), PROBABILITIES * [1, 1, 1, 0, 0]),  # 0.4 + 0.3 is not yet 0.8: the third is needed
    "top_p=0.65": (dict(top_p=0.65), PROBABILITIES * [1, 1, 0, 0, 0]),
    "top_k, then top_p of what it left": (dict(top_k=3, top_p=0.8), PROBABILITIES * [1, 1, 0, 0, 0]),  # 0.7 of 0.85 is 0.82
}


@pytest.mark.parametrize("options, want", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_frequencies(options, want):
    """Chi-square of 20,000 draws; with at most 4 degrees of freedom 28.5 is passed once in 100,000 keys, and this key is fixed."""
    order = np.array([3, 0, 4, 1, 2])  # the likeliest need not come first
    logits, want = np.log(PROBABILITIES)[order] + 3.0, (want / want.sum())[order]
    drawn = choose(jnp.tile(jnp.asarray(logits, jnp.float32), (20_000, 1)), rng=jax.random.key(5), **{"temperature": 1.0, **options})
    seen = np.bincount(drawn, minlength=5)
    assert (seen[want == 0] == 0).all()
    expected = 20_000 * want[want > 0]
    assert ((seen[want > 0] - expected) ** 2 / expected).sum() < 28.5


def test_sampling_is_a_function_of_the_key():
    model, params, _ = made("gpt2")
    draw = lambda seed: np.asarray(generate(model, params, prompts(), max_new_tokens=NEW, temperature=1e6, rng=jax.random.key(seed)))
    one, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    # So hot, all tokens are alike to it: a key used twice would draw the same token twice, in every row.
    assert all((a != b).any() for a, b in zip(one.T[1:], one.T, strict=False))


def test_every_mesh_gets_its_own_program():
    """What `constrain` says is read while tracing: a program traced for no mesh must not serve the call on one."""
    model, params, _ = made("gpt2")
    run = lambda: jax.make_jaxpr(functools.partial(generate, model, max_new_tokens=NEW, temperature=0))(params, prompts())
    assert "sharding_constraint" not in str(run())
    with sharding.tracing_on(sharding.make_mesh(data=4, tensor=2)):
        assert "sharding_constraint" in str(run())


MISTAKES = {
    "no rng": (dict(temperature=1.0), "sampling needs rng"),
    "longer than the learned positions": (dict(temperature=0, max_new_tokens=20), "5 tokens and 20 new ones .* 24 positions"),
    "padding on the right": (dict(temperature=0, attention_mask=np.array([[1, 1, 1, 1, 0]] * 3)), "pad prompts on the left"),
    "nothing asked for": (dict(temperature=0, max_new_tokens=0), "max_new_tokens"),
    "temperature below 0": (dict(temperature=-1.0, rng=jax.random.key), "temperature"),
    "top_k of nothing": (dict(rng=jax.random.key, top_k=0), "top_k"),
    "a cache of no such dtype": (dict(temperature=0, cache_dtype="int9"), "unknown cache dtype 'int9'; there are 'int8'"),
    "top_p of nothing": (dict(rng=jax.random.key, top_p=0.0), "top_p"),
}


@pytest.mark.parametrize("options, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options, message):
    model, params, _ = made("gpt2")
    options = {"max_new_tokens": NEW, **options, **({"rng": jax.random.key(0)} if "rng" in options else {})}
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompts(), **options)


SOUND = np.zeros((1, 16, 18), np.float32)
PAIRED_MISTAKES = {
    "nothing to read": ("t5", dict(decoder_input_ids=prompts()), "reads input_ids or input_features, one of them"),
    "two things to read": ("t5", dict(input_ids=prompts(), input_features=SOUND), "reads input_ids or input_features, one of them"),
    "tokens for ears": ("whisper", dict(input_ids=prompts()), "this model takes input_features, not input_ids"),
    "sounds for eyes": ("t5", dict(input_features=SOUND), "this model takes input_ids, not input_features"),
    "too long": ("bart", dict(input_ids=prompts(), decoder_input_ids=np.zeros((3, 20), int)), "20 tokens and 8 new ones .* 24 positions"),
    "a prompt padded on the right": (
        "t5", dict(input_ids=prompts(), decoder_input_ids=prompts(), decoder_attention_mask=np.array([[1, 1, 1, 1, 0]] * 3)), "on the left",
    ),
    "a decoder's prompt for a decoder": ("gpt2", dict(input_ids=prompts(), decoder_input_ids=prompts()), "a decoder alone continues input_ids"),
    "nothing to continue": ("gpt2", {}, "a decoder alone continues input_ids"),
}  # fmt: skip


@pytest.mark.parametrize("name, inputs, message", PAIRED_MISTAKES.values(), ids=PAIRED_MISTAKES)
def test_mistakes_of_pairs(name, inputs, message):
    model, params, _ = made(name)
    with pytest.raises(ValueError, match=message):
        generate(model, params, **inputs, max_new_tokens=NEW, temperature=0)


@pytest.mark.parametrize(
    "family, options", [("bert", {}), ("t5", dict(head="embedding")), ("t5", dict(head=None)), ("bart", dict(head="question_answering"))]
)
def test_what_does_not_write(family, options):
    model = models.create(family, size="tiny", **options)
    with pytest.raises(ValueError, match="only a causal decoder continues text"):
        generate(model, {}, prompts(), max_new_tokens=1, temperature=0)
