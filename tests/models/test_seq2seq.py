"""Encoder-decoders: who sees whom, what a task is given, what their files say; their arithmetic is compared in test_parity.py."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bigflax
from bigflax import models, nn, tasks, trees
from bigflax.models.seq2seq import shift_right
from bigflax.models.speech import Conv, MelEmbed, sinusoids

VOCAB, S, T = 40, 7, 5
FAMILIES = {
    "t5": dict(d_model=32, num_decoder_layers=3, relative_attention_num_buckets=8, relative_attention_max_distance=6),
    "bart": dict(d_model=32, decoder_layers=3, max_position_embeddings=16, pad_token_id=0),
    "whisper": dict(
        d_model=32, decoder_layers=3, max_source_positions=8, max_target_positions=16, decoder_start_token_id=1, pad_token_id=0
    ),
}
each_family = pytest.mark.parametrize("name", FAMILIES)
READERS = pytest.mark.parametrize("name", ["t5", "bart"])
CLOSE = dict(rtol=0, atol=1e-4)  # float32: the same sums in another order, for logits of size 1 to 10


@functools.cache
def made(name, **more):
    """A model, weights of which none is zero or one, and its compiled apply."""
    model, rng = models.create(name, size="tiny", vocab_size=VOCAB, **FAMILIES[name], **dict(more)), np.random.default_rng(0)
    size = lambda axes: 0.3 if "embed" in axes else 0.1
    draw = lambda leaf, s, axes: jnp.asarray(rng.normal(size=s.shape) * size(axes) + leaf.endswith("scale"), jnp.float32)
    return model, trees.map_named(draw, model.shapes(), model.axes), jax.jit(model.apply, static_argnames=("logits", "hidden_states"))


def ids(rows, length, seed=1):
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, length)).astype(np.int32)


def source(name, rows, seed=1):
    if name == "whisper":
        return {"input_features": np.random.default_rng(seed).normal(size=(rows, 16, 2 * S)).astype(np.float32)}
    return {"input_ids": ids(rows, S, seed)}


def logits_of(name, **inputs):
    _, params, apply = made(name)
    return np.asarray(apply(params, **inputs)["logits"])


@each_family
def test_a_target_sees_the_whole_source_and_its_own_past(name):
    """Row 1 + t differs from row 0 in the decoder's token t, the last row in the source's last part."""
    given = {key: np.repeat(x, T + 2, axis=0) for key, x in source(name, 1).items()}
    (read,) = given.values()
    read[-1, ..., -1] += 1 if name == "whisper" else -2
    targets = np.repeat(ids(1, T, 2), T + 2, axis=0)
    targets[np.arange(1, T + 1), np.arange(T)] -= 1
    logits = logits_of(name, **given, decoder_input_ids=targets)
    differs = np.abs(logits[1:] - logits[:1]).max(-1) > CLOSE["atol"]
    np.testing.assert_array_equal(differs, np.concatenate([np.triu(np.ones((T, T), bool)), np.ones((1, T), bool)]))


@READERS
def test_packed_pairs_do_not_see_each_other(name):
    """Two pairs in a row, padding behind: each target has the logits that it has alone with its source."""
    sources, targets = [ids(1, 4, 3), ids(1, 2, 4)], [ids(1, 2, 5), ids(1, 3, 6)]
    behind = lambda rows, end: np.concatenate([*rows, np.full((1, end), 7)], axis=1).astype(np.int32)
    number = lambda rows, end: behind([np.full_like(row, i + 1) for i, row in enumerate(rows)] + [np.zeros((1, end))], 0).astype(np.int32)
    count = lambda rows, end: behind([np.arange(row.shape[1])[None] for row in rows] + [np.zeros((1, end))], 0).astype(np.int32)
    logits = logits_of(
        name, input_ids=behind(sources, 2), segment_ids=number(sources, 2), position_ids=count(sources, 2),
        decoder_input_ids=behind(targets, 1), decoder_segment_ids=number(targets, 1), decoder_position_ids=count(targets, 1),
    )  # fmt: skip
    for own, target, at in zip(sources, targets, (slice(0, 2), slice(2, 5)), strict=True):
        np.testing.assert_allclose(logits[:, at], logits_of(name, input_ids=own, decoder_input_ids=target), **CLOSE)


@READERS
def test_padding_of_the_source_changes_nothing(name):
    short = ids(1, 4)
    padded = np.concatenate([short, np.full((1, 3), 9, np.int32)], axis=1)
    logits = logits_of(name, input_ids=padded, attention_mask=np.array([[1] * 4 + [0] * 3]), decoder_input_ids=ids(1, T, 2))
    np.testing.assert_allclose(logits, logits_of(name, input_ids=short, decoder_input_ids=ids(1, T, 2)), **CLOSE)


@each_family
def test_what_comes_out(name):
    """States of both stacks by transformers' names, each layer another, and the loss of a task unchanged: that of the logits by optax."""
    model, params, apply = made(name)
    labels = ids(2, T, 2)
    labels[0, 3:] = -100
    batch = {**source(name, 2), "decoder_input_ids": np.asarray(shift_right(labels, start=1, pad=0))}
    out = apply(params, **batch, hidden_states=True)
    assert len(out["encoder_hidden_states"]) == 3 and len(out["decoder_hidden_states"]) == 4
    np.testing.assert_array_equal(out["encoder_hidden_states"][-1], out["encoder_last_hidden_state"])
    np.testing.assert_array_equal(out["decoder_hidden_states"][-1], out["last_hidden_state"])
    assert len({float(jnp.abs(x).sum()) for side in ("encoder", "decoder") for x in out[f"{side}_hidden_states"]}) == 7
    more = jax.jit(functools.partial(model.apply, attentions=True, qkv=True))(params, **batch)
    np.testing.assert_allclose(more["logits"], out["logits"], **CLOSE)
    N = model.module.decoder.groups[0].blocks[0].attention.heads
    S = out["encoder_last_hidden_state"].shape[1]
    shapes = {name: {x.shape for x in more[f"{name}_attentions"]} for name in ("encoder", "decoder", "cross")}
    assert shapes == {"encoder": {(2, N, S, S)}, "decoder": {(2, N, T, T)}, "cross": {(2, N, T, S)}}
    layers = {name: len(x) for name, x in more.items() if name.endswith(("attentions", "qkv"))}
    assert layers == {"encoder_attentions": 2, "encoder_qkv": 2, "decoder_attentions": 3, "decoder_qkv": 3, "cross_attentions": 3}
    assert "logits" not in apply(params, **batch, logits=False)
    loss, _ = jax.jit(tasks.token_loss(model))(params, {**batch, "labels": labels})
    want = optax.softmax_cross_entropy_with_integer_labels(out["logits"], np.maximum(labels, 0))
    assert int(loss.count) == 8
    np.testing.assert_allclose(loss.total, np.where(labels == -100, 0, want).sum(), rtol=1e-5)


@each_family
def test_every_weight_learns(name):
    """But what is stored and not learned: a row added to logits, sines and cosines; and a bias of k moves all of a row's scores alike."""
    model, params, _ = made(name)
    labels = ids(2, T, 2)
    batch = {**source(name, 2), "decoder_input_ids": shift_right(labels, start=1, pad=0), "labels": labels}
    grads = jax.jit(jax.grad(lambda params: tasks.token_loss(model)(params, batch)[0].total))(params)
    still = {"head/bias"} if name == "bart" else {"encoder/embed/positions"} if name == "whisper" else set()
    for leaf, g in trees.named_leaves(jax.device_get(grads)):
        assert np.isfinite(g).all() and ((np.abs(g).max() == 0) == (leaf in still) or leaf.endswith("k_bias")), leaf
        assert not leaf.startswith(("encoder/blocks", "decoder/blocks")) or np.abs(g).max(tuple(range(1, g.ndim))).min() > 0, leaf


def test_a_fresh_model_knows_nothing():
    for name in FAMILIES:
        model = made(name)[0]
        logits = np.asarray(
            jax.jit(model.apply)(jax.jit(model.init)(jax.random.key(0)), **source(name, 4), decoder_input_ids=ids(4, T))["logits"]
        )
        # T5's rows are of size 1 and its head is tied: a token read is likelier to be written, as in its paper's own start
        bound = 1.0 if name == "t5" else 0.1
        assert abs(np.log(np.exp(logits).sum(-1)).mean() - np.log(VOCAB)) < bound, name


def test_fresh_weights_of_t5():
    """Of deviation 1 / sqrt(inputs), but q, which is not scaled later: 1 / sqrt(D H); rows 1. To five deviations of the estimate."""
    model = models.create("t5", size="tiny", d_kv=8, d_ff=96)
    params = dict(trees.named_leaves(jax.device_get(jax.jit(model.init)(jax.random.key(0)))))
    want = {"attention/q": 64 * 8, "attention/k": 64, "cross/v": 64, "cross/out": 4 * 8, "mlp/up": 64, "mlp/down": 96}
    want = {f"decoder/blocks/{leaf}": size for leaf, size in want.items()} | {"embed/tokens": 1, "encoder/relative/w": 64}
    for leaf, size in want.items():
        assert abs(params[leaf].std() * size**0.5 - 1) < 5 / (2 * params[leaf].size) ** 0.5, leaf


def test_a_classifier_looks_where_eos_was_read():
    """And reads the source again, shifted; tokens behind the last eos change nothing."""
    _, params, apply = made("bart", head="sequence_classification", num_labels=4)
    rows = ids(2, S)
    rows[0, 4] = rows[1, 2] = rows[1, 5] = 2
    mask = np.array([[1] * 5 + [0] * 2, [1] * 6 + [0]])
    given = {"input_ids": rows, "attention_mask": mask}
    logits = apply(params, **given)["logits"]
    assert logits.shape == (2, 4)
    again = apply(params, **given, decoder_input_ids=shift_right(rows, start=2, pad=0))["logits"]
    np.testing.assert_array_equal(logits, again)
    cut = apply(params, input_ids=rows[:1, :5])["logits"]
    np.testing.assert_allclose(logits[:1], cut, **CLOSE)


def test_shift_right():
    labels = np.array([[5, 6, 7, -100, 8]])
    np.testing.assert_array_equal(shift_right(labels, start=1, pad=0), [[1, 5, 6, 7, 0]])
    packed = shift_right(labels, start=1, pad=0, segments_BT=np.array([[1, 1, 2, 2, 0]]))
    np.testing.assert_array_equal(packed, [[1, 5, 1, 7, 1]])


# -- speech ----------------------------------------------------------------------------------------------------------------


def conv_by_hand(x, w, b, stride):
    """PyTorch's Conv1d with padding 1: y[t] = b + sum_j x[stride t + j - 1] w[j], zeros beyond the ends."""
    y = np.zeros((x.shape[0], -(-x.shape[1] // stride), w.shape[2]))
    for t, j in np.ndindex(y.shape[1], 3):
        if 0 <= stride * t + j - 1 < x.shape[1]:
            y[:, t] += x[:, stride * t + j - 1] @ w[j]
    return y + b


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("length", [6, 7])
def test_conv(stride, length):
    rng = np.random.default_rng(0)
    x, w, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, length, 3), (3, 3, 4), (4,)))
    got = Conv(4, stride=stride).apply({"params": {"w": w, "b": b}}, x)
    np.testing.assert_allclose(got, conv_by_hand(x, w, b, stride), rtol=1e-5, atol=1e-5)


def test_positions_are_sines_and_cosines():
    at = np.asarray(sinusoids(jax.random.key(0), (9, 6)))
    for t, i in np.ndindex(9, 3):
        angle = t * 10000 ** (-i / 2)  # wavelengths from 2 pi to 10000 * 2 pi over D/2 = 3 of them
        np.testing.assert_allclose(at[t, [i, 3 + i]], [np.sin(angle), np.cos(angle)], atol=1e-6)


# -- folders ---------------------------------------------------------------------------------------------------------------


def test_what_a_folder_holds_beside_weights_is_carried_over(tmp_path):
    model, params, _ = made("whisper")
    bigflax.save(model, params, str(tmp_path / "a"))
    for name in ("generation_config", "preprocessor_config", "tokenizer_config", "other"):
        (tmp_path / "a" / f"{name}.json").write_text(f'{{"it": "{name}"}}')
    bigflax.save(*bigflax.load(str(tmp_path / "a")), str(tmp_path / "b"))
    carried = {file.name for file in (tmp_path / "b").iterdir()} - {"config.json", "model.safetensors"}
    assert carried == {"generation_config.json", "preprocessor_config.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"it": "generation_config"}


def test_two_labels_are_written_where_three_are_taken_for_granted(tmp_path):
    model = models.create("bart", size="tiny", **FAMILIES["bart"], head="sequence_classification", num_labels=2)
    bigflax.save(model, jax.jit(model.init)(jax.random.key(0)), str(tmp_path))
    assert bigflax.load(str(tmp_path))[0].config["num_labels"] == 2


def test_an_encoder_of_a_pair(tmp_path):
    """Of T5's folder the encoder alone is read, and a folder of it is written and read; without the name of the head it is whole again."""
    model, params, apply = made("t5")
    bigflax.save(model, params, str(tmp_path / "pair"))
    encoder, its = bigflax.load(str(tmp_path / "pair"), head="embedding")
    assert {leaf.split("/")[0] for leaf, _ in trees.named_leaves(its)} == {"embed", "encoder"}
    out = encoder.apply(its, input_ids=ids(2, S))
    want = apply(params, input_ids=ids(2, S), decoder_input_ids=ids(2, T))["encoder_last_hidden_state"]
    np.testing.assert_allclose(out["last_hidden_state"], want, **CLOSE)
    assert out["sentence_embedding"].shape == (2, 32)
    bigflax.save(encoder, its, str(tmp_path / "alone"))
    said = json.loads((tmp_path / "alone" / "config.json").read_text())
    (tmp_path / "alone" / "config.json").write_text(json.dumps({**said, "is_encoder_decoder": False}))  # as transformers says of it
    again, same = bigflax.load(str(tmp_path / "alone"))
    assert again.config["head"] == "embedding"
    jax.tree.map(np.testing.assert_array_equal, same, its)


HEADS_OF_THEIR_OWN = {  # what the config says beside a second table in the file -> whether states are scaled
    "version 1.1": (dict(tie_word_embeddings=False), False),
    "as transformers 5 writes version 1.1": (dict(tie_word_embeddings=True, scale_decoder_outputs=False), False),
    "one that says it is tied": (dict(tie_word_embeddings=True), True),
}


@pytest.mark.parametrize("said, scaled", HEADS_OF_THEIR_OWN.values(), ids=HEADS_OF_THEIR_OWN)
def test_a_head_of_its_own_is_told_by_the_file(said, scaled, tmp_path):
    config = FAMILIES["t5"] | dict(vocab_size=VOCAB, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = models.create("t5", size="tiny", **config)
    params = jax.jit(model.init)(jax.random.key(0))
    bigflax.save(model, params, str(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    written = {key: x for key, x in written.items() if key not in ("tie_word_embeddings", "scale_decoder_outputs")} | said
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded, same = bigflax.load(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    run = lambda model: model.apply(params, input_ids=ids(1, S), decoder_input_ids=ids(1, T))["logits"]
    np.testing.assert_allclose(run(loaded), run(model) * (32**-0.5 if scaled else 1), **CLOSE)
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = theirs(input_ids=torch.from_numpy(ids(1, S)).long(), decoder_input_ids=torch.from_numpy(ids(1, T)).long()).logits
    np.testing.assert_allclose(run(loaded), want.numpy(), **CLOSE)


# -- mistakes --------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no decoder_input_ids": ("t5", dict(input_ids=ids(1, S)), r"a decoder needs decoder_input_ids; .* shift_right\(labels\)"),
    "nothing to read": ("bart", dict(decoder_input_ids=ids(1, T)), "this model takes input_ids, not nothing"),
    "tokens for ears": ("whisper", dict(input_ids=ids(1, S), decoder_input_ids=ids(1, T)), "takes input_features, not input_ids"),
    "a mask of sounds": (
        "whisper", dict(**source("whisper", 1), attention_mask=np.ones((1, S)), decoder_input_ids=ids(1, T)), "go without attention_mask",
    ),
    "too long a sound": (
        "whisper", dict(input_features=np.zeros((1, 16, 18)), decoder_input_ids=ids(1, T)), r"16 mels, up to 16 frames\], not \[1, 16, 18\]",
    ),
    "another number of mels": (
        "whisper", dict(input_features=np.zeros((1, 80, 16)), decoder_input_ids=ids(1, T)), r"\[B, 16 mels, .* not \[1, 80, 16\]; see ops.log_mel",
    ),
    "half a packed pair": (
        "t5", dict(input_ids=ids(1, S), segment_ids=np.ones((1, S), int), decoder_input_ids=ids(1, T)), "need decoder_segment_ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, inputs, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(name, inputs, message):
    model, params, _ = made(name)
    with pytest.raises(ValueError, match=message):
        model.apply(params, **inputs)


def test_mistakes_of_configs():
    with pytest.raises(ValueError, match="feed_forward_proj 'gatd-gelu' is neither an activation nor 'gated-' and one"):
        models.create("t5", size="tiny", feed_forward_proj="gatd-gelu")
    with pytest.raises(ValueError, match=r"unknown head 'causal_lm'; .*'seq2seq_lm'"):
        models.create("bart", size="tiny", head="causal_lm")


def test_a_mel_embedding_fits_the_fence():
    module = MelEmbed(16, 8, 4)
    assert nn.model(module, **module.example()).axes["conv1"]["w"] == "taps _ -> embed"
