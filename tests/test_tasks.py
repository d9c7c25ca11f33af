"""What a task counts, and that its loss is the cross-entropy of the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import data, make_mesh, models, nn, ops, optim, sharding, tasks, train, trees, weights

# Five tokens and a head that is the identity, so that x is the logits: two rows, of which three positions have a label.
LOGITS = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32) * 3
LABELS = np.array([[1, 4, -100, -100], [-100, -100, -100, 0]])
BYTES = np.array([1, 7, 0, 2, 3])
PLAIN = nn.Model(lambda rng: {}, lambda params, *, rng=None, logits=True, x_BTD: {"head": {"x_BTD": x_BTD, "w_VD": jnp.eye(5)}}, {})


def by_hand():
    """-log p of each label, and whether it is the likeliest token."""
    rows = [(LOGITS[b, t].astype(np.float64), LABELS[b, t]) for b, t in zip(*np.nonzero(LABELS != -100), strict=True)]
    return np.array([np.log(np.exp(l).sum()) - l[y] for l, y in rows]), np.array([l.argmax() == y for l, y in rows])


def test_only_labelled_tokens_count():
    loss, metrics = tasks.token_loss(PLAIN)({}, {"x_BTD": jnp.asarray(LOGITS), "labels": jnp.asarray(LABELS)})
    nll, correct = by_hand()
    assert (int(loss.count), int(metrics["accuracy"].count)) == (3, 3)
    assert float(loss.total) == pytest.approx(nll.sum(), rel=1e-6)
    assert float(metrics["accuracy"].total) == correct.sum()
    assert set(metrics) == {"accuracy"}


def test_accuracy_is_not_zero_for_a_label_that_is_likeliest():
    labels = np.where(LABELS == -100, -100, LOGITS.argmax(-1))
    metrics = tasks.token_loss(PLAIN)({}, {"x_BTD": jnp.asarray(LOGITS), "labels": jnp.asarray(labels)})[1]
    assert float(metrics["accuracy"].value) == 1.0


def test_bits_per_byte():
    """Bits of all labelled tokens over the bytes that they stand for; token 2 stands for none."""
    metrics = tasks.token_loss(PLAIN, token_bytes=BYTES)({}, {"x_BTD": jnp.asarray(LOGITS), "labels": jnp.asarray(LABELS)})[1]
    assert int(metrics["bits_per_byte"].count) == BYTES[1] + BYTES[4] + BYTES[0]
    assert float(metrics["bits_per_byte"].value) == pytest.approx(by_hand()[0].sum() / np.log(2) / (7 + 3 + 1), rel=1e-6)


def test_a_batch_without_labels_is_no_loss_of_no_tokens():
    loss, metrics = tasks.token_loss(PLAIN, token_bytes=BYTES)({}, {"x_BTD": jnp.asarray(LOGITS), "labels": jnp.full((2, 4), -100)})
    for mean in (loss, *metrics.values()):
        assert (float(mean.total), int(mean.count)) == (0.0, 0)


FAMILIES = {"gpt2": (dict(n_embd=32), None), "llama": (dict(hidden_size=32), 8), "bert": (dict(hidden_size=32), 8)}  # config, chunk


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_is_the_cross_entropy_of_the_logits(name):
    config, chunk = FAMILIES[name]
    model = models.create(name, size="tiny", vocab_size=50, **config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, jnp.float32), model.shapes())  # biases too are not zero
    ids, labels = rng.integers(0, 50, (2, 2, 8))
    labels[:, 5:] = -100
    loss_fn = tasks.create("masked_lm" if name == "bert" else "causal_lm", model, chunk=chunk)

    @jax.jit
    def both(params):
        loss, metrics = loss_fn(params, {"input_ids": ids, "labels": labels})
        logits = model.apply(params, input_ids=ids)["logits"]
        return loss.value, metrics["accuracy"].value, optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(labels, 0)), logits

    loss, accuracy, want_BT, logits = map(np.asarray, both(params))
    np.testing.assert_allclose(loss, want_BT[labels != -100].mean(), rtol=1e-5)  # the same sums in another order
    np.testing.assert_allclose(accuracy, (logits.argmax(-1) == labels)[labels != -100].mean())


def test_the_load_balance_loss_is_weighed_by_the_config_and_counted_by_tokens():
    apply = lambda params, **inputs: PLAIN.apply(params, **inputs) | {"aux_loss": jnp.asarray(2.5)}
    model = nn.Model(PLAIN.init, apply, {}, config={"router_aux_loss_coef": 0.1})
    loss, metrics = tasks.token_loss(model)({}, {"x_BTD": jnp.asarray(LOGITS), "labels": jnp.asarray(LABELS)})
    assert float(loss.value) == pytest.approx(by_hand()[0].mean() + 0.1 * 2.5, rel=1e-6)
    assert (float(metrics["aux_loss"].value), int(metrics["aux_loss"].count)) == (2.5, 3)


def test_the_load_balance_loss_pushes_a_router_towards_balance():
    """A channel that all tokens share draws them to two of eight experts (a loss above 5, where 2 is balance): weighed in, the loss undoes it."""
    size = dict(vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_local_experts=8)
    ids = np.random.default_rng(0).integers(0, 50, (8, 16))

    def trained(coefficient):
        """The loss of balance before and after forty steps of the router alone."""
        model = models.create("mixtral", size="tiny", router_aux_loss_coef=coefficient, **size)
        params, loss_fn = model.init(jax.random.key(0)), tasks.token_loss(model)
        params["embed"]["tokens"] = params["embed"]["tokens"].at[:, 0].set(0.1)
        moe = params["blocks"]["mlp"]

        @jax.jit
        def both(w):
            tree = {**params, "blocks": {**params["blocks"], "mlp": {**moe, "router": {"w": w}}}}
            loss, metrics = loss_fn(tree, {"input_ids": ids, "labels": ids})
            return loss.value, metrics["aux_loss"].value

        step = jax.jit(jax.value_and_grad(both, has_aux=True))
        w, seen = moe["router"]["w"].at[:, 0, :2].set(0.5), []
        for _ in range(40):
            (_, aux), g = step(w)
            w, seen = w - 0.03 * g, [*seen, float(aux)]
        return seen[0], seen[-1]

    (first, with_it), (_, without) = trained(1.0), trained(0.0)
    assert min(first, without) > 5 and with_it < 2.2


# -- rows and pairs --------------------------------------------------------------------------------------------------------

ROWS = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
CLASSES = np.array([3, 0, -100, 1, 2])
GIVES = lambda **outputs: nn.Model(lambda rng: {}, lambda params, *, rng=None, logits=True, **inputs: {**outputs, "asked": logits}, {})


def test_classification():
    """Cross-entropy and accuracy over the rows that have a label."""
    loss, metrics = tasks.create("classification", GIVES(logits=ROWS))({}, {"pixel_values": ROWS, "labels": jnp.asarray(CLASSES)})
    rows = [(ROWS[i].astype(np.float64), c) for i, c in enumerate(CLASSES) if c != -100]
    assert float(loss.value) == pytest.approx(np.mean([np.log(np.exp(x).sum()) - x[c] for x, c in rows]), rel=1e-6)
    assert float(metrics["accuracy"].value) == np.mean([x.argmax() == c for x, c in rows])
    assert int(loss.count) == int(metrics["accuracy"].count) == 4
    right = np.where(CLASSES == -100, -100, ROWS.argmax(-1))
    assert float(tasks.classification(GIVES(logits=ROWS))({}, {"labels": jnp.asarray(right)})[1]["accuracy"].value) == 1.0
    smooth = tasks.classification(GIVES(logits=ROWS), smoothing=0.1)({}, {"labels": jnp.asarray(CLASSES)})[0]
    assert float(smooth.value) == pytest.approx(np.mean([np.log(np.exp(x).sum()) - 0.9 * x[c] - 0.1 * x.mean() for x, c in rows]), rel=1e-6)


@pytest.mark.parametrize("bias", [None, -2.0], ids=["softmax", "sigmoid"])
def test_contrastive(bias):
    """Of a model with a bias the loss is SigLIP's, of one without CLIP's; how often the nearest is the right one, either way."""
    texts, images = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ROWS, ROWS + ROWS[0]))
    pair = {"text_embeds": jnp.asarray(texts), "image_embeds": jnp.asarray(images), "logit_scale": jnp.float32(5.0)}
    loss, metrics = tasks.create("contrastive", GIVES(**pair, **({} if bias is None else {"logit_bias": bias})))({}, {"input_ids": ROWS})
    z = 5.0 * texts.astype(np.float64) @ images.T + (bias or 0)
    if bias is None:
        log_p = lambda z: z - np.log(np.exp(z).sum(1, keepdims=True))
        want = -np.mean([(log_p(z)[i, i] + log_p(z.T)[i, i]) / 2 for i in range(5)])
    else:
        want = np.mean([sum(np.log1p(np.exp(-z[i, j] if i == j else z[i, j])) for j in range(5)) for i in range(5)])
    assert float(loss.value) == pytest.approx(want, rel=1e-5)
    found = [z[i].argmax() == i for i in range(5)] + [z[:, i].argmax() == i for i in range(5)]
    assert sum(found[:5]) == 4 and sum(found[5:]) == 1 and float(metrics["accuracy"].value) == pytest.approx(np.mean(found))
    recalls = [float(metrics[f"{name}_recall_at_1"].value) for name in ("image", "text")]
    assert recalls == pytest.approx([0.8, 0.2])


def test_recall_is_among_the_real_rows_of_a_batch():
    """By sorting; rows of padding, which would be nearest to all, neither count nor stand before others; what is all alike is not found."""
    rng, N = np.random.default_rng(0), 40
    texts, noise = rng.normal(size=(2, N, 3)).astype(np.float32)
    pair = {"text_embeds": texts, "image_embeds": texts + 0.7 * noise, "logit_scale": jnp.float32(1)}
    rank = lambda similar: np.array([np.argsort(-row).tolist().index(i) for i, row in enumerate(similar)])
    similar = texts @ pair["image_embeds"].T
    padded = {name: jnp.pad(x, ((0, 8), (0, 0)), constant_values=9.0) if jnp.ndim(x) else x for name, x in pair.items()}
    batch = {"attention_mask": jnp.asarray(np.arange(N + 8)[:, None] < N, jnp.int32)}
    seen = lambda pair, batch: jax.jit(tasks.contrastive(GIVES(**pair)))({}, batch)
    (want, _), (loss, metrics) = seen(pair, {}), seen(padded, batch)
    assert float(loss.value) == pytest.approx(float(want.value), rel=1e-6)
    for name, ranks in {"image": rank(similar), "text": rank(similar.T)}.items():
        for k in (1, 10):
            share = np.mean(ranks < k)
            assert 0 < share < 1 and float(metrics[f"{name}_recall_at_{k}"].value) == pytest.approx(share)
    alike = seen({**pair, "text_embeds": jnp.ones((N, 3)), "image_embeds": jnp.ones((N, 3))}, {})[1]
    assert {float(metric.value) for metric in alike.values()} == {0.0}


def test_token_classification_counts_the_tokens_with_a_label():
    logits, classes = np.concatenate([LOGITS, LOGITS[..., :1]], -1)[..., :5], ("O", "B-a", "I-a", "B-b", "I-b")
    batch = {"input_ids": LABELS, "labels": jnp.asarray(LABELS)}
    loss, metrics = tasks.create("token_classification", GIVES(logits=jnp.asarray(logits)), classes=classes)({}, batch)
    nll, correct = by_hand()
    assert (float(loss.value), float(metrics["accuracy"].value)) == pytest.approx((nll.mean(), correct.mean()), rel=1e-6)
    assert {*metrics} == {"accuracy", "span_f1"} and int(metrics["span_f1"].true) == 2
    for others in (None, ("NOUN", "VERB", "B-x", "O", "I-x")):
        assert {*tasks.token_classification(GIVES(logits=jnp.asarray(logits)), classes=others)({}, batch)[1]} == {"accuracy"}


@pytest.mark.parametrize("W", [1, 3])
def test_question_answering(W):
    """Questions with an answer in one window or more, without, and of padding, of windows too; the likeliest span by going through all of them."""
    rng, N = np.random.default_rng(0), 40
    start, end = rng.normal(size=(2, N, W, 9)).astype(np.float32) * 3
    start[3:20, :, 0] = end[3:20, :, 0] = -3  # else no window is ever surer of a span than that there is none
    mask = np.arange(9) < rng.integers(4, 10, (N, W))[..., None]
    labels = np.sort(rng.integers(1, 4, (N, W, 2)), axis=-1)
    labels[rng.random((N, W)) < 0.4] = 0
    labels[0], labels[1:, 1:][rng.random((N - 1, W - 1)) < 0.3], labels[-1] = 0, -100, -100
    mask &= labels[..., :1] >= 0
    flat = lambda x: jnp.asarray(x).reshape(N * W, 9)
    model = GIVES(start_logits=flat(start), end_logits=flat(end))
    batch = {"input_ids": mask, "attention_mask": np.asarray(mask, np.int32), "labels": labels}
    batch = {name: jnp.asarray(x if W > 1 else x[:, 0]) for name, x in batch.items()}
    for longest in (1, 3, 30):
        loss, metrics = tasks.create("question_answering", model, longest=longest)({}, batch)
        losses, exact, f1 = [], [], []
        for s, e, real, true in zip(start[:-1].astype(float), end[:-1].astype(float), mask, labels, strict=False):
            spans, none = {}, []
            for w in range(W):
                if (n := real[w].sum()) == 0:
                    continue
                losses.append(np.mean([np.log(np.exp(x[w, :n]).sum()) - x[w, y] for x, y in zip((s, e), true[w], strict=True)]))
                spans |= {(w, i, j): s[w, i] + e[w, j] for i in range(1, n) for j in range(i, min(n, i + longest))}
                none.append(s[w, 0] + e[w, 0])
            w, i, j = max(spans, key=spans.__getitem__)
            answers = {w: {*range(a, b + 1)} for w, (a, b) in enumerate(true) if b > 0}
            if min(none) >= spans[w, i, j]:
                found = (not answers, not answers)
            else:
                said, right = {*range(i, j + 1)}, answers.get(w, set())
                found = (said == right, 2 * len(said & right) / (len(said) + len(right)))
            exact.append(found[0])
            f1.append(found[1])
        assert float(loss.value) == pytest.approx(np.mean(losses), rel=1e-5) and int(loss.count) == len(losses)
        got = float(metrics["exact_match"].value), float(metrics["f1"].value)
        assert got == pytest.approx((np.mean(exact), np.mean(f1)), rel=1e-6) and 0 < got[0] < got[1] < 1
    sure = GIVES(**{name: 100.0 * jax.nn.one_hot(labels[..., i].reshape(-1), 9) for i, name in enumerate(("start_logits", "end_logits"))})
    assert all(float(metric.value) == 1 for metric in tasks.question_answering(sure)({}, batch)[1].values())


@pytest.mark.parametrize("texts", [2, 3])
def test_sentence_embedding(texts):
    """The first of each row is found among the second (and third) ones of all rows but padding, and the second among the first."""
    rng = np.random.default_rng(0)
    units = rng.normal(size=(6, texts, 4))
    units[:, 1] += units[:, 0]
    units /= np.linalg.norm(units, axis=-1, keepdims=True)
    model = GIVES(sentence_embedding=jnp.asarray(units.reshape(6 * texts, 4), jnp.float32))
    mask = np.ones((6, texts, 3), int)
    mask[5] = 0
    batch = {"input_ids": jnp.asarray(mask), "attention_mask": jnp.asarray(mask)}
    loss, metrics = tasks.create("sentence_embedding", model, temperature=0.5)({}, batch)
    first, other = units[:5, 0], np.concatenate([units[:5, k] for k in range(1, texts)])
    z = first @ other.T / 0.5
    nll = lambda z: np.array([np.log(np.exp(z[i]).sum()) - z[i, i] for i in range(5)])
    assert float(loss.value) == pytest.approx(((nll(z) + nll(z[:, :5].T)) / 2).mean(), rel=1e-5)
    assert float(metrics["accuracy"].value) == pytest.approx(np.mean(z.argmax(1) == np.arange(5))) and int(loss.count) == 5


def test_an_encoder_decoder_is_given_what_it_wrote_before():
    """Decoder inputs begin with the model's start token and follow the labels, padding where there are none; the loss is that of tokens."""
    seen = {}
    model = models.create("t5", size="tiny", decoder_start_token_id=3, pad_token_id=2)
    model = dataclasses.replace(
        model, apply=lambda params, **inputs: seen.update(inputs) or {"head": {"x_BTD": LOGITS, "w_VD": jnp.eye(5)}}
    )
    batch = {"input_ids": jnp.ones((2, 6), int), "attention_mask": jnp.ones((2, 6), int), "labels": jnp.asarray(LABELS)}
    loss, metrics = tasks.create("seq2seq", model)({}, batch)
    np.testing.assert_array_equal(seen.pop("decoder_input_ids"), [[3, 1, 4, 2], [3, 2, 2, 2]])
    assert float(loss.value) == pytest.approx(by_hand()[0].mean(), rel=1e-6) and {*metrics} == {"accuracy"}
    assert tasks.find("seq2seq").asks(model, batch).keys() == {"input_ids", "attention_mask"} == seen.keys() - {"rng", "logits"}


def test_speech_is_heard_as_a_spectrogram():
    seen = {}
    model = models.create("whisper", size="tiny")
    model = dataclasses.replace(
        model, apply=lambda params, **inputs: seen.update(inputs) or {"head": {"x_BTD": LOGITS, "w_VD": jnp.eye(5)}}
    )
    batch = {"waveform": jnp.asarray(np.random.default_rng(0).normal(size=(2, 3200)), jnp.float32), "labels": jnp.asarray(LABELS)}
    loss, _ = tasks.create("speech", model)({}, batch)
    np.testing.assert_array_equal(seen["input_features"], ops.log_mel(batch["waveform"], 16, seconds=0.2))
    assert float(loss.value) == pytest.approx(by_hand()[0].mean(), rel=1e-6) and "waveform" not in seen
    assert tasks.find("speech").asks(model, batch).keys() == {"input_features"}


def test_speech_is_written_behind_its_marks():
    """Those that the rows are given before there is something to write, a padding row too; the loss reads them as they are."""
    seen = {}
    model = models.create("whisper", size="tiny")
    model = dataclasses.replace(
        model, apply=lambda params, **inputs: seen.update(inputs) or {"head": {"x_BTD": LOGITS, "w_VD": jnp.eye(5)}}
    )
    ids, labels = np.array([[8, 9, 3, 4], [0, 0, 0, 0]]), np.array([[-100, 3, 4, 0], [-100] * 4])
    batch = {"waveform": jnp.zeros((2, 3200)), "labels": jnp.asarray(labels), "decoder_input_ids": jnp.asarray(ids)}
    loss, _ = tasks.create("speech", model)({}, batch)
    np.testing.assert_array_equal(seen["decoder_input_ids"], ids)
    np.testing.assert_array_equal(tasks.find("speech").asks(model, batch)["decoder_input_ids"], [[8, 9], [8, 9]])
    assert int(loss.count) == 3


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "t5", "bart"])
def test_a_question_is_put_to_every_kind_of_encoder(name):
    """Whether or not it tells the texts of a pair apart by their types."""
    model = models.create(name, size="tiny", head="question_answering")
    ids = {key: jax.ShapeDtypeStruct((2, 8), jnp.int32) for key in ("input_ids", "attention_mask", "token_type_ids")}
    loss, _ = jax.eval_shape(
        tasks.create("question_answering", model), model.shapes(), ids | {"labels": jax.ShapeDtypeStruct((2, 2), jnp.int32)}
    )
    assert loss.total.shape == ()


def test_zero_shot():
    """A class is the mean of its prompts, scaled to length 1; a row belongs to the nearest."""
    tokenizer = data.byte_tokenizer()
    letters = lambda params, *, rng=None, logits=True, input_ids, **_: {"text_embeds": jax.nn.one_hot(input_ids[:, 0] - 97, 4)}
    model = nn.Model(lambda rng: {}, letters, {})
    class_CD = tasks.zero_shot(model, {}, tokenizer, ["a", "b"], ["{}", "c {}", "d {}."], length=4)
    np.testing.assert_allclose(class_CD, np.array([[1, 0, 1, 1], [0, 1, 1, 1]]) / np.sqrt(3), rtol=1e-6)
    images = nn.Model(lambda rng: {}, lambda params, *, rng=None, pixel_values: {"image_embeds": pixel_values}, {})
    rows = jnp.array([[1, 0.1, 0, 0], [0.1, 1, 0, 0], [1, 0.2, 0, 0]])
    found = train.eval_step(tasks.nearest(images, class_CD))({}, {"pixel_values": rows, "labels": jnp.array([0, 1, 1])})
    assert float(found["accuracy"].value) == pytest.approx(2 / 3)
    ends = models.create("clip", size="tiny", text_config=dict(eos_token_id=tokenizer.eos_id))
    ends = dataclasses.replace(ends, apply=lambda params, *, logits, input_ids, **_: {"text_embeds": jax.nn.one_hot(input_ids[:, 1], 300)})
    assert tasks.zero_shot(ends, {}, tokenizer, ["a"], ["{}"], length=4)[0, tokenizer.eos_id] == 1  # where CLIP reads it
    with pytest.raises(ValueError, match=r"templates hold {}, where the name of a class is to stand; 'a photo' does not"):
        tasks.zero_shot(model, {}, tokenizer, ["a"], ["{}", "a photo"], length=4)
    with pytest.raises(ValueError, match="zero-shot classification needs a model of embeddings; this one gives logits"):
        tasks.nearest(GIVES(logits=ROWS), class_CD)({}, {"labels": jnp.array([0])})


@pytest.mark.parametrize(
    "task, outputs, message",
    [
        (
            "classification",
            {"last_hidden_state": 0},
            r"needs a model with a head for it, logits \[B, C\]; this one gives last_hidden_state",
        ),
        ("classification", {"logits": LOGITS}, r"logits \[B, C\]; this one gives logits"),  # of tokens
        ("token_classification", {"logits": ROWS}, r"logits \[B, T, C\]; this one gives logits"),  # of rows
        ("question_answering", {"logits": ROWS}, "question answering needs start_logits and end_logits; this model gives logits"),
        ("sentence_embedding", {"pooler_output": 0}, "need a model with the head 'embedding'; this one gives pooler_output"),
        ("seq2seq", {"logits": LOGITS}, "seq2seq needs an encoder-decoder, a family such as t5"),
        ("contrastive", {"text_embeds": 0}, "needs text_embeds and image_embeds; the model gives text_embeds, asked for pixel_values"),
    ],
)
def test_models_of_another_kind(task, outputs, message):
    ids = (
        {"input_ids": np.ones((5, 2, 3))} if task == "sentence_embedding" else {"labels": np.zeros((5, 2))} if task != "contrastive" else {}
    )
    with pytest.raises(ValueError, match=message):
        tasks.create(task, GIVES(**outputs))({}, {"pixel_values": np.zeros((5, 2, 3)), **ids})


def test_a_vision_model_learns_its_classes_and_a_pair_of_towers_its_pairs():
    """Twenty steps on four images bring either loss down to less than a half."""
    images, ids = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32), np.random.default_rng(1).integers(3, 250, (4, 8))
    cases = [
        ("vit", "classification", {"pixel_values": images, "labels": jnp.arange(4)}, {"num_labels": 4}),
        ("siglip", "contrastive", {"pixel_values": images, "input_ids": ids}, {}),
    ]
    for family, task, batch, config in cases:
        model = models.create(family, size="tiny", **config)
        loss_fn, tx = tasks.create(task, model), optax.adam(1e-3)

        @jax.jit
        def step(params, opt, loss_fn=loss_fn, tx=tx, batch=batch):
            loss, grads = jax.value_and_grad(lambda params: loss_fn(params, batch)[0].value)(params)
            updates, opt = tx.update(grads, opt)
            return optax.apply_updates(params, updates), opt, loss

        params = jax.jit(model.init)(jax.random.key(0))
        opt, losses = tx.init(params), []
        for _ in range(20):
            params, opt, loss = step(params, opt)
            losses.append(float(loss))
        assert losses[-1] < losses[0] / 2, (family, losses)


def test_dropout_is_on_when_a_key_is_given():
    """The loss hands its key on: without one (evaluation) it repeats, with one it depends on it."""
    seen = []
    model = nn.Model(
        lambda rng: {}, lambda params, *, rng=None, logits=True, x_BTD: seen.append(rng) or PLAIN.apply(params, x_BTD=x_BTD), {}
    )
    batch = {"x_BTD": jnp.asarray(LOGITS), "labels": jnp.asarray(LABELS)}
    key = jax.random.key(0)
    tasks.token_loss(model)({}, batch)
    tasks.token_loss(model)({}, batch, key)
    assert seen[0] is None
    assert seen[1] is key


def test_unknown_task():
    with pytest.raises(ValueError, match="unknown task 'causal'; the tasks are 'causal_lm'"):
        tasks.create("causal", PLAIN)


SMALL = dict(size="tiny", vocab_size=64, hidden_size=32, intermediate_size=64)


def ids_of(seed):
    return np.random.default_rng(seed).integers(0, 64, (8, 17))


@pytest.mark.slow
@pytest.mark.parametrize("kind", weights.KINDS)
def test_products_in_eight_bits_learn_what_floats_learn(kind):
    """Sixty steps on one batch, through scan and remat, sharded: within 5% of the float loss, whose first value is log 64; the state is one of floats."""
    mesh = make_mesh(fsdp=4, tensor=2)
    batch = jax.device_put({"input_ids": ids_of(0)[:, :-1], "labels": ids_of(0)[:, 1:]}, sharding.batch_sharding(mesh))

    def trained(matmul):
        model = models.create("llama", **SMALL, remat="full")
        tx = optim.make(lr=3e-3, steps=60, kind="constant", axes=model.axes)
        state = train.init_state(model.init, tx, mesh=mesh, axes=model.axes)
        step = train.train_step(tasks.create("causal_lm", model, matmul=matmul), tx, state)
        for _ in range(60):
            state, metrics = jax.block_until_ready(step(state, batch))  # eight devices on few cores: one step at a time
        return float(metrics["loss"].value), state

    want, floats = trained(None)
    got, state = trained(kind)
    assert want < 3.0 and got != want
    assert abs(got - want) < 0.05 * want
    assert jax.tree.map(lambda w: (w.shape, w.dtype), state) == jax.tree.map(lambda w: (w.shape, w.dtype), floats)


def test_products_in_eight_bits_by_rules():
    model = models.create("llama", **SMALL)
    params, batch = model.init(jax.random.key(0)), {"input_ids": ids_of(0)[:, :-1], "labels": ids_of(0)[:, 1:]}
    narrow = lambda matmul: str(
        jax.make_jaxpr(lambda params: tasks.create("causal_lm", model, matmul=matmul)(params, batch)[0])(params)
    ).count("i8[")
    assert narrow(None) == 0 < narrow([("blocks/mlp/.*", "int8")]) < narrow("int8")
    assert narrow([["blocks/mlp/.*", None], [".*", "int8"]]) == narrow("int8") - narrow([("blocks/mlp/.*", "int8")])


@pytest.mark.parametrize("name", [n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in models.FAMILIES])
def test_every_family_computes_in_eight_bits_or_says_that_it_has_nothing_to(name):
    """Whatever `.*` reaches is a weight that the family multiplies through `ops.einsum`."""
    model = models.create(name, size="tiny")
    inputs = {key: jnp.ones(x.shape, x.dtype) for key, x in model.module.example().items()}
    params = model.init(jax.random.key(0))
    if not any("->" in text and "_" not in text.split() for text in jax.tree.leaves(model.axes)):
        with pytest.raises(ValueError, match="round no weight"):
            weights.rounded(params, [(".*", "int8")], model.axes)
        return
    made = weights.rounded(params, [(".*", "int8")], model.axes)
    out, want = (jax.jit(lambda p: model.apply(p, **inputs))(p) for p in (made, params))
    for (leaf, a), (_, b) in zip(trees.named_leaves(out), trees.named_leaves(want), strict=True):
        assert a.dtype == b.dtype and bool(jnp.isfinite(a).all()), leaf
