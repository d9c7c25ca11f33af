"""What each kind of output is compared by, in laws over a table of toy models; that a teacher teaches, is frozen, and may be anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import losses, make_mesh, models, nn, optim, peft, sharding, tasks, train, trees, weights
from bigflax.compress import distill, terms

RNG = np.random.default_rng(0)
N, T, V, C = 8, 5, 13, 3
REAL = np.arange(N) < N - 1  # the last row fills up the batch
VISIBLE = (np.arange(T) < RNG.integers(2, T + 1, (N, 1))) & REAL[:, None]
IDS = RNG.integers(0, V, (N, T))
TEXT = {"input_ids": IDS * VISIBLE, "attention_mask": VISIBLE.astype(np.int32)}
IMAGES = {"pixel_values": RNG.normal(size=(N, 6)) * REAL[:, None]}
PAIRS = RNG.integers(0, V, (N, 2, T))
PAIRED = {"input_ids": PAIRS * VISIBLE[:, None], "attention_mask": np.stack([VISIBLE, VISIBLE], 1).astype(np.int32)}


def looking(x, mask, heads):
    """Queries, keys and values of states [N, T, width], and who looks at whom: at what is real and not ahead."""
    qkv = {name: x.reshape(*x.shape[:2], heads, -1) * size for name, size in (("q", 1.0), ("k", 2.0), ("v", -0.5))}
    seen = jnp.tril(jnp.ones((T, T), bool)) & (mask > 0)[:, None, None]
    return {"qkv": qkv, "attentions": jax.nn.softmax(jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", qkv["q"], qkv["k"]), losses.NEVER))}


def toy(width, outputs, heads=2, **shapes):
    """A Model of a table [V, width], a matrix on pixels, and these further weights; `outputs(params, x [N, T, width] or [N, width])`."""
    shapes = {"table": (V, width), "pixels": (6, width), **shapes}
    init = lambda rng: {
        name: jax.random.normal(k, shapes[name]) for name, k in zip(shapes, jax.random.split(rng, len(shapes)), strict=True)
    }

    def apply(params, *, rng=None, logits=True, hidden_states=False, attentions=False, qkv=False, **inputs):
        out = {}
        for given in [name for name in ("input_ids", "pixel_values") if name in inputs]:
            x = weights.dense(params["table"])[inputs[given]] if given == "input_ids" else inputs[given] @ params["pixels"]
            x = jnp.tanh(jnp.cumsum(x, 1)) if given == "input_ids" else jnp.tanh(x)  # a token sees what is before it
            out |= outputs(params, x, given) if outputs.__code__.co_argcount == 3 else outputs(params, x)
            states = (x, jnp.sin(2 * x), x * x - x)
            out |= {"hidden_states": states} if hidden_states else {}
            for name in [name for name, asked in (("qkv", qkv), ("attentions", attentions)) if asked]:
                out[name] = tuple(looking(h, inputs["attention_mask"], heads)[name] for h in states[1:])
        return out

    return nn.Model(init, apply, {name: " ".join("_" * len(shape)) for name, shape in shapes.items()})


def head(softcap=None):
    return lambda params, x: {"head": {"x_BTD": x, "w_VD": params["table"], **({} if softcap is None else {"softcap": softcap})}}


def unit(x):
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


def meeting(params, x, given):
    embeds = unit((x[:, -1] if given == "input_ids" else x) @ params["out"])
    return {"text_embeds" if given == "input_ids" else "image_embeds": embeds, "logit_scale": jnp.exp(params["scale"])}


def spans(params, x):
    return dict(zip(("start_logits", "end_logits"), jnp.moveaxis(x @ params["out"], -1, 0), strict=True))


CLASSES = lambda width=4: toy(width, lambda params, x: {"logits": x @ params["out"]}, out=(width, C))
SCORE = lambda width=4: toy(width, lambda params, x: {"logits": x @ params["out"]}, out=(width, 1))
WORDS = lambda width=4: toy(width, head())
WHOLE = lambda width=4: toy(width, lambda params, x: {"logits": x @ params["table"].T})
TWO = lambda width=4: toy(width, meeting, out=(width, 3), scale=())
ANSWERS = lambda width=4: toy(width, spans, out=(width, 2))
SENTENCES = lambda width=4: toy(width, lambda params, x: {"sentence_embedding": unit(x.mean(1))})
POOLED = lambda width=4: toy(width, lambda params, x: {"logits": x.mean(1) @ params["out"]}, out=(width, C))
LABELS = np.where(REAL, RNG.integers(0, C, N), -100)
FEW = np.where(np.arange(N) == 0, LABELS, -100)  # the first row has a label, the other real ones have none
TOKENS = np.where(VISIBLE & (RNG.random((N, T)) < 0.8), IDS, -100)
MANY = np.where(REAL[:, None], RNG.integers(0, 2, (N, C)), -100)
FIRST_LAST = np.where(REAL[:, None], [[0, 1]] * N, -100)
STATES = (1.0, terms.hidden({1: 2, 2: 0}))
LM = {**TEXT, "labels": TOKENS}
CASES = {  # student, teacher, task, batch, options of distill
    "classes": (CLASSES(), CLASSES(6), tasks.classification, {**IMAGES, "labels": LABELS}, {}),
    "classes, no task": (CLASSES(), CLASSES(6), None, {**IMAGES, "labels": LABELS}, {}),
    "texts, few with a label": (POOLED(), POOLED(6), tasks.classification, {**TEXT, "labels": FEW}, {}),
    "texts without labels": (POOLED(), POOLED(6), tasks.classification, {**TEXT, "labels": np.full(N, -100)}, dict(weight=1)),
    "one score": (SCORE(), SCORE(6), tasks.regression, {**IMAGES, "labels": np.where(REAL, RNG.normal(size=N), -100.0)}, {}),
    "many labels": (CLASSES(), CLASSES(6), tasks.multi_label, {**IMAGES, "labels": MANY}, dict(binary=True)),
    "answers": (ANSWERS(), ANSWERS(6), tasks.question_answering, {**TEXT, "labels": FIRST_LAST}, {}),
    "words": (WORDS(), WORDS(6), tasks.token_loss, LM, {}),
    "words, in pieces": (WORDS(), toy(6, head(2.0)), tasks.token_loss, LM, dict(chunk=2, divergence="js")),
    "words, no labels": (WORDS(), WORDS(6), None, TEXT, dict(divergence="reverse")),
    "words, a teacher of another kind": (WORDS(), WHOLE(6), tasks.token_loss, LM, dict(divergence="skewed")),
    "pairs": (TWO(), TWO(6), tasks.contrastive, {**TEXT, **IMAGES}, {}),
    "sentences": (SENTENCES(), SENTENCES(6), tasks.sentence_embedding, PAIRED, {}),
    "hidden": (WORDS(), WORDS(), tasks.token_loss, LM, dict(also=[STATES], weight=0.3)),
    "hidden of another width": (WORDS(), WORDS(6), tasks.token_loss, LM, dict(also=[STATES], weight=0)),
    "hidden, all layers, by angle": (WORDS(), WORDS(), tasks.token_loss, LM, dict(also=[(1.0, terms.hidden(kind="cosine"))], weight=0)),
    "relations": (WORDS(), WORDS(6), tasks.token_loss, LM, dict(also=[(1.0, terms.relations(heads=2))], weight=0)),
    "relations of queries, keys and values": (
        WORDS(),
        toy(6, head(), heads=3),
        tasks.token_loss,
        LM,
        dict(also=[(1.0, terms.relations({1: 2}, heads=2, of="qkv"))], weight=0),
    ),
    "maps": (WORDS(), WORDS(6), tasks.token_loss, LM, dict(also=[(1.0, terms.attentions())], weight=0)),
    "maps, by squares": (
        WORDS(),
        toy(6, head(), heads=3),
        tasks.token_loss,
        LM,
        dict(also=[(1.0, terms.attentions({2: 1}, heads={1: 0, 0: 2}, kind="mse"))], weight=0),
    ),
}
each = pytest.mark.parametrize("name", CASES)


def arrays(batch):
    return {name: jnp.asarray(x, jnp.float32 if np.asarray(x).dtype == float else jnp.int32) for name, x in batch.items()}


def make(name, *, same=False):
    """(loss_fn, params, axes, freeze, batch): with `same`, the student is the teacher."""
    student, teacher, task, batch, options = CASES[name]
    teacher = student if same else teacher
    own, guide = student.init(jax.random.key(0)), teacher.init(jax.random.key(0 if same else 1))
    widths = own["table"].shape[1], guide["table"].shape[1]
    project = {"hidden_states": widths} if name == "hidden of another width" and not same else None
    both = distill.taught(own, student.axes, guide, teacher.axes, project=project, rng=jax.random.key(2))
    return distill.distill(task, student, teacher, **options), *both, arrays(batch)


@functools.cache
def compiled(name):
    """(params, batch) -> (loss, metrics), the gradient of the total."""
    loss_fn, params, _, _, batch = make(name)
    parted = lambda p, batch: (lambda loss, metrics, _: (loss.total, (loss, metrics)))(*loss_fn(p, batch))
    step = jax.jit(jax.value_and_grad(parted, has_aux=True))
    return lambda batch=batch: (lambda seen, grads: (*seen[1], grads))(*step(params, batch))


@functools.cache
def graded(name):
    return compiled(name)()


@pytest.mark.parametrize("name", ["classes", "many labels", "answers", "words, in pieces", "pairs", "sentences", "relations", "maps"])
def test_nothing_to_learn_from_oneself(name):
    loss_fn, params, *_, batch = make(name, same=True)
    loss, metrics, _ = jax.jit(loss_fn)(params, batch)
    weight = CASES[name][4].get("weight", 0.5)
    learned = "distillation" if weight else CASES[name][4]["also"][0][1].name
    assert float(metrics[learned].value) == pytest.approx(0, abs=1e-5)  # 4 times float32 roundings
    assert float(metrics["agreement"].value if weight else 1) == 1
    task = float(metrics["task_loss"].value) if "task_loss" in metrics else 0.0
    assert float(loss.value) == pytest.approx((1 - weight) * task, rel=1e-5, abs=1e-5)


@each
def test_the_student_learns_and_the_teacher_does_not(name):
    loss, metrics, grads = graded(name)
    of_labels = {"task_loss", "accuracy", "macro_f1"} if name == "texts without labels" else set()
    assert np.isfinite(float(loss.value)) and {key for key, m in metrics.items() if not np.isfinite(float(m.value))} == of_labels
    assert not any(bool(g.any()) for g in jax.tree.leaves(grads["teacher"]))
    for part in (distill.untaught(grads), grads.get("projections", {})):
        assert part == {} or max(float(jnp.abs(g).max()) for g in jax.tree.leaves(part)) > 0


@each
def test_what_is_not_real_changes_nothing(name):
    """Other tokens and pixels in a row that fills up the batch; and of models that do not read it, where there is padding."""
    *_, batch = make(name)
    row = jnp.asarray(REAL).reshape(-1, 1)
    seen = row if name in ("pairs", "sentences", "answers") or name.startswith("texts") else batch.get("attention_mask", row) > 0
    change = {"input_ids": (seen[..., None] if name == "sentences" else seen, V - 1), "pixel_values": (row, 3.0)}
    other = {key: jnp.where(change[key][0], x, change[key][1]) if key in change else x for key, x in batch.items()}
    assert not all(jnp.array_equal(x, other[key]) for key, x in batch.items())
    (one, _, grads), (two, _, others) = graded(name), compiled(name)(other)
    assert float(one.total) == pytest.approx(float(two.total), rel=1e-6) and float(one.count) == float(two.count)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, others)


SLOW = pytest.mark.slow
MESHES = {"words, in pieces": 2, "pairs": 1, "hidden of another width": 1, "classes": 2, "texts without labels": 2}


@pytest.mark.parametrize("name", ["words, in pieces", *(pytest.param(name, marks=SLOW) for name in [*MESHES][1:])])
def test_eight_devices_and_accumulation_are_one(name):
    found = []
    for sizes, parts in (({"data": 1}, 1), ({"data": 2, "fsdp": 4}, MESHES[name])):
        loss_fn, params, axes, freeze, batch = make(name)
        mesh = make_mesh(**sizes, devices=jax.devices()[: sizes["data"] * sizes.get("fsdp", 1)])
        state = train.init_state(params, optax.sgd(0.5), mesh=mesh, axes=axes, freeze=freeze)
        step = train.train_step(loss_fn, optax.sgd(0.5), state, accumulate=parts)
        batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch) if name != "pairs" else batch
        state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        found.append((jax.device_get(state.params), float(metrics["loss"].value)))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[0][0], found[1][0])  # float32, other orders


# -- by hand ---------------------------------------------------------------------------------------------------------------


def log_softmax(x):
    x = np.asarray(x, float)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_words_are_the_definition():
    """Half of the cross-entropy and 4 KL(p | q) / 2 at temperature 2, over the tokens with a label, in float64."""
    loss, metrics, _ = graded("words")
    student, teacher, _, batch, _ = CASES["words"]
    of = lambda model, seed: (lambda head: np.asarray(head["x_BTD"]) @ np.asarray(head["w_VD"]).T)(
        model.apply(model.init(jax.random.key(seed)), input_ids=jnp.asarray(batch["input_ids"]))["head"]
    )
    s, t = of(student, 0), of(teacher, 1)
    real = batch["labels"] != -100
    p, q = log_softmax(t / 2), log_softmax(s / 2)
    soft = 4 * (np.exp(p) * (p - q)).sum(-1)[real]
    hard = -np.take_along_axis(log_softmax(s), np.maximum(batch["labels"], 0)[..., None], -1)[..., 0][real]
    assert float(loss.value) == pytest.approx((soft / 2 + hard / 2).mean(), rel=1e-5) and int(loss.count) == real.sum()
    assert float(metrics["distillation"].value) == pytest.approx(soft.mean(), rel=1e-5)
    assert float(metrics["agreement"].value) == pytest.approx((s.argmax(-1) == t.argmax(-1))[real].mean())


def test_texts_without_a_label_are_learned_from_the_teacher():
    """Half of the cross-entropy of the one with a label, and half of the divergence over all real texts."""
    loss, metrics, _ = graded("texts, few with a label")
    student, teacher, _, batch, _ = CASES["texts, few with a label"]
    of = lambda model, seed: model.apply(model.init(jax.random.key(seed)), input_ids=jnp.asarray(batch["input_ids"]))["logits"]
    s, t = np.asarray(of(student, 0)), np.asarray(of(teacher, 1))
    p, q = log_softmax(t / 2), log_softmax(s / 2)
    soft = 4 * (np.exp(p) * (p - q)).sum(-1)[REAL].mean()
    assert float(loss.value) == pytest.approx((soft - log_softmax(s)[0, FEW[0]]) / 2, rel=1e-5)
    assert int(loss.count) == REAL.sum() and float(metrics["distillation"].value) == pytest.approx(soft, rel=1e-5)


def test_layers_meet_through_a_matrix():
    _, params, *_, batch = make("hidden of another width")
    student, teacher, *_ = CASES["hidden of another width"]
    states = lambda model, params: model.apply(params, input_ids=batch["input_ids"], hidden_states=True)["hidden_states"]
    s, t = states(student, distill.untaught(params)), states(teacher, params["teacher"])
    w, real = np.asarray(params["projections"]["hidden_states"], float), VISIBLE & (TOKENS != -100).any(1, keepdims=True)
    want = np.mean([np.square(np.asarray(s[i]) @ w - np.asarray(t[j])).mean(-1)[real].mean() for i, j in ((1, 2), (2, 0))])
    loss, metrics, _ = graded("hidden of another width")
    assert float(metrics["hidden"].value) == pytest.approx(want, rel=1e-5)
    assert float(loss.value) == pytest.approx(float(metrics["task_loss"].value) + want, rel=1e-5)
    student, teacher, *_ = CASES["hidden, all layers, by angle"]
    s, t = (states(model, model.init(jax.random.key(i))) for i, model in enumerate((student, teacher)))
    angle = lambda x, y: 1 - (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    want = np.mean([angle(*(np.asarray(x, float) for x in pair))[real].mean() for pair in zip(s, t, strict=True)])
    assert float(graded("hidden, all layers, by angle")[1]["hidden"].value) == pytest.approx(want, rel=1e-4)
    assert terms.evenly(2, 6) == [0, 3, 6] and terms.evenly(3, 4) == [0, 1, 3, 4]


def looks_of(name):
    """What the student and its teacher of this case saw, and which tokens are real."""
    student, teacher, _, batch, _ = CASES[name]
    given = {key: jnp.asarray(batch[key]) for key in ("input_ids", "attention_mask")}
    outs = (model.apply(model.init(jax.random.key(i)), attentions=True, qkv=True, **given) for i, model in enumerate((student, teacher)))
    return *outs, VISIBLE & (TOKENS != -100).any(1, keepdims=True)


def test_relations_are_those_of_minilm():
    """MiniLMv2: vectors of all heads joined, cut into two relation heads, softmax(x x^T / sqrt(width of one)) over real tokens, KL row by row; in float64."""
    name = "relations of queries, keys and values"
    s, t, real = looks_of(name)
    want = np.zeros((N, T))
    for kind in "qkv":
        logs = []
        for x in (np.asarray(t["qkv"][1][kind], float), np.asarray(s["qkv"][0][kind], float)):  # layers 2 and 1
            x = x.reshape(N, T, 2, -1)
            near = np.einsum("btrw,bsrw->brts", x, x) / np.sqrt(x.shape[-1])
            near = np.where(real[:, None, None], near, -1e30)
            logs.append(log_softmax(near - near.max(-1, keepdims=True)))
        want += (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean(1)
    assert float(graded(name)[1]["relations_qkv"].value) == pytest.approx(want[real].mean(), rel=1e-4)


def test_maps_are_compared_head_by_head():
    s, t, real = looks_of("maps")
    seen = np.tril(np.ones((T, T), bool)) & VISIBLE[:, None, None]
    log = lambda x: np.log(np.where(seen, np.asarray(x, float), 1.0))
    each = [(np.exp(log(b)) * seen * (log(b) - log(a))).sum(-1).mean(1) for a, b in zip(s["attentions"], t["attentions"], strict=True)]
    assert float(graded("maps")[1]["attentions"].value) == pytest.approx(np.mean(each, 0)[real].mean(), rel=1e-4)
    s, t, real = looks_of("maps, by squares")
    a, b = np.asarray(s["attentions"][1], float)[:, [1, 0]], np.asarray(t["attentions"][0], float)[:, [0, 2]]  # layers 2 and 1
    want = np.square(a - b).sum(-1).mean(1)[real].mean()
    assert float(graded("maps, by squares")[1]["attentions"].value) == pytest.approx(want, rel=1e-4)


MASKED = {  # states, inputs and labels -> what counts of [3, 4] values, of which the last row fills up the batch
    "hidden_states": (dict(attention_mask=[[1, 1, 0, 0], [1, 1, 1, 1], [0] * 4]), [1, 0, -100], [[1, 1, 0, 0], [1] * 4, [0] * 4]),
    "hidden_states, packed": (
        dict(segment_ids=[[1, 2, 0, 0], [1] * 4, [0] * 4]),
        [[3] * 4, [-100, 1, 1, 1], [-100] * 4],
        [[1, 1, 0, 0], [1] * 4, [0] * 4],
    ),
    "decoder_hidden_states": (
        dict(attention_mask=[[1] * 4] * 3),
        [[5, 5, -100, -100], [5] * 4, [-100] * 4],
        [[1, 1, 0, 0], [1] * 4, [0] * 4],
    ),
    "vision_hidden_states": (dict(attention_mask=[[1, 0, 0, 0], [1] * 4, [0] * 4]), None, [[1] * 4, [1] * 4, [0] * 4]),
    "cross_attentions": (dict(attention_mask=[[1] * 4] * 3), [[5, 5, -100, -100], [5] * 4, [-100] * 4], [[1, 1, 0, 0], [1] * 4, [0] * 4]),
    "vision_attentions": (dict(attention_mask=[[1, 0, 0, 0], [1] * 4, [0] * 4]), None, [[1] * 4, [1] * 4, [0] * 4]),
    "attentions": (
        dict(attention_mask=[[1, 1, 0, 0], [1] * 4, [0] * 4]),
        [[5, -100, 5, 5], [5] * 4, [-100] * 4],
        [[1, 1, 0, 0], [1] * 4, [0] * 4],
    ),
    "text_hidden_states": (dict(attention_mask=[[1, 0, 0, 0], [1] * 4, [0] * 4]), None, [[1, 0, 0, 0], [1] * 4, [0] * 4]),
    ", labels": (dict(attention_mask=[[1] * 4] * 3), [[5, -100, 5, 5], [5] * 4, [-100] * 4], [[1, 0, 1, 1], [1] * 4, [0] * 4]),
    "hidden_states, without labels": (dict(attention_mask=[[1, 1, 0, 0], [1] * 4, [0] * 4]), [-100] * 3, [[1, 1, 0, 0], [1] * 4, [0] * 4]),
    ", pixels": ({}, [1, 0, -100], [[1] * 4, [1] * 4, [0] * 4]),
}


@pytest.mark.parametrize("name", MASKED)
def test_which_states_count(name):
    inputs, labels, want = MASKED[name]
    both = terms.Both({k: np.array(x) for k, x in inputs.items()}, {}, {}, {}, None if labels is None else np.array(labels))
    assert terms._real(both, jnp.zeros((3, 4)), name.partition(",")[0] or None).astype(int).tolist() == want


def test_sentences_are_near_others_not_themselves():
    """The divergence of whom each real row is near, itself apart, over rows and columns of products times 20."""
    _, params, *_, batch = make("sentences")
    student, teacher, *_ = CASES["sentences"]
    ids, rows = batch["input_ids"].reshape(2 * N, T), np.repeat(REAL, 2)
    log_p, log_q = [], []
    for logs, model, w in ((log_p, teacher, params["teacher"]), (log_q, student, distill.untaught(params))):
        x = np.asarray(model.apply(w, input_ids=ids)["sentence_embedding"], float)[rows]
        logs.append(log_softmax(np.where(np.eye(len(x)), -np.inf, 20 * x @ x.T / 2)))
    p, q = (np.where(np.isinf(x[0]), 0, x[0]) for x in (log_p, log_q))
    want = 4 * (np.where(np.eye(len(p)), 0, np.exp(p)) * (p - q)).sum(-1).mean()  # rows and columns are one: products are symmetric
    assert float(graded("sentences")[1]["distillation"].value) == pytest.approx(want, rel=1e-4)


def test_pieces_are_the_whole():
    """Loss and gradient, where pieces of three of five tokens do not divide them."""
    student, teacher, task, batch, _ = CASES["words"]
    params = distill.taught(student.init(jax.random.key(0)), None, teacher.init(jax.random.key(1))).params
    graded = lambda **more: jax.jit(
        jax.value_and_grad(lambda p: distill.distill(task, student, teacher, **more)(p, arrays(batch))[0].total)
    )
    one, two = graded()(params), graded(chunk=3)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two)  # float32, sums in another order


def test_only_a_piece_of_logits_is_held():
    """Temporaries of loss and gradient, 256 tokens, V 4096: of pieces of four tokens a row a fifth at most, and less than one array of all logits."""
    B, T, D, V = 4, 64, 8, 4096
    apply = lambda params, *, rng=None, x, **_: {"head": {"x_BTD": x, "w_VD": params["w"]}}
    model = nn.Model(lambda rng: {"w": jnp.zeros((V, D))}, apply, {"w": "vocab <- embed"})
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params, batch = {"w": shape(V, D), "teacher": {"w": shape(V, D)}}, {"x": shape(B, T, D)}

    def held(**options):
        loss_fn = distill.distill(None, model, model, weight=1.0, **options)
        step = jax.jit(jax.value_and_grad(lambda params, batch: loss_fn(params, batch)[0].total))
        return step.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    whole, pieces = held(), held(chunk=4)
    assert pieces < min(whole / 5, 4 * B * T * V), (whole, pieces)


def test_an_ensemble_is_the_mean_of_probabilities():
    members = [CLASSES(6), CLASSES(5)]
    model = distill.ensemble(members)
    params, x = model.init(jax.random.key(0)), arrays(IMAGES)
    each, both = jax.jit(lambda p: ([m.apply(p[str(i)], **x)["logits"] for i, m in enumerate(members)], model.apply(p, **x)["logits"]))(
        params
    )
    np.testing.assert_allclose(np.exp(both), np.mean(np.exp(list(map(log_softmax, each))), 0), rtol=1e-5)
    student = CLASSES()
    both = distill.taught(student.init(jax.random.key(1)), student.axes, params, model.axes)
    loss, _, _ = jax.jit(distill.distill(tasks.classification, student, model))(both.params, {**x, "labels": jnp.asarray(LABELS)})
    assert np.isfinite(float(loss.value)) and jax.tree.structure(both.axes) == jax.tree.structure(both.params)


# -- training --------------------------------------------------------------------------------------------------------------


def test_a_frozen_teacher_is_neither_optimized_nor_donated():
    loss_fn, params, axes, freeze, batch = make("classes")
    mesh, tx = make_mesh(data=1, devices=jax.devices()[:1]), optim.make(lr=0.1, steps=10, axes=axes)
    state = train.init_state(params, tx, mesh=mesh, axes=axes, freeze=freeze)
    assert not jax.tree.leaves(state.params["teacher"]) and jax.tree.leaves(state.frozen["teacher"])
    assert not any("teacher" in name for name, _ in trees.named_leaves(state.opt))
    before = state.frozen["teacher"]
    names = {name for name, _ in trees.named_leaves(state.params)}
    state, _ = train.train_step(loss_fn, tx, state)(state, batch)
    assert names == {"out", "pixels", "table"}  # as without a teacher: rules for decay and freezing hold as they are
    jax.tree.map(np.testing.assert_array_equal, before, params["teacher"])  # still there


def test_an_average_of_itself_teaches():
    student, batch = CLASSES(), arrays({**IMAGES, "labels": LABELS})
    own = student.init(jax.random.key(0))
    both = distill.taught(own, student.axes, jax.tree.map(jnp.copy, own), student.axes)
    mesh = make_mesh(fsdp=8)
    loss_fn = distill.distill(tasks.classification, student, ema=0.9)
    state = train.init_state(both.params, optax.sgd(0.5), mesh=mesh, axes=both.axes, freeze=both.freeze)
    step = train.train_step(loss_fn, optax.sgd(0.5), state)
    batch, want = jax.device_put(batch, sharding.batch_sharding(mesh)), own
    for _ in range(3):
        want = jax.tree.map(lambda t, w: 0.9 * t + 0.1 * np.asarray(w), want, distill.untaught(state.params))
        state, metrics = step(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), dict(state.frozen["teacher"]), want)
    assert float(metrics["distillation"].value) > 0


def test_a_teacher_teaches_more_than_few_labels():
    """A linear student, twelve labels of which a quarter is wrong, and sixty-four rows without any. Measured: as its teacher it says
    43% of 512 other rows after labels alone, and 88% after soft labels."""
    rng = np.random.default_rng(1)
    guide = CLASSES(16)
    student = nn.Model(lambda key: {"w": jnp.zeros((6, C))}, lambda p, *, rng=None, pixel_values: {"logits": pixel_values @ p["w"]}, None)
    taught = guide.init(jax.random.key(3))
    x, other = jnp.asarray(rng.normal(size=(76, 6)), jnp.float32), jnp.asarray(rng.normal(size=(512, 6)), jnp.float32)
    says = lambda x: jnp.argmax(guide.apply(taught, pixel_values=x)["logits"], -1)
    labels = jnp.where(jnp.arange(76) < 12, says(x), -100)
    labels = jnp.where(jnp.arange(76) < 3, (labels + 1) % C, labels)
    mesh, agree = make_mesh(data=1, devices=jax.devices()[:1]), {}
    soft = distill.distill(None, student, guide, temperature=1.0)
    for name, loss_fn, batch in (
        ("labels", tasks.classification(student), {"pixel_values": x, "labels": labels}),
        ("teacher", soft, {"pixel_values": x}),
    ):
        both = distill.taught({"w": jnp.zeros((6, C))}, None, taught if name == "teacher" else None)
        tx = optax.adam(0.05)
        state = train.init_state(both.params, tx, mesh=mesh, freeze=both.freeze)
        step = train.train_step(loss_fn, tx, state)
        for _ in range(60):
            state, _ = step(state, batch)
        agree[name] = float(jnp.mean(jnp.argmax(other @ state.params["w"], -1) == says(other)))
    assert agree["teacher"] > agree["labels"] + 0.1


def test_deit_learns_from_labels_with_one_token_and_from_its_teacher_with_the_other():
    def two(params, x):
        return {
            "logits": (x @ params["out"] + x @ params["told"]) / 2,
            "cls_logits": x @ params["out"],
            "distillation_logits": x @ params["told"],
        }

    student, teacher = toy(4, two, out=(4, C), told=(4, C)), CLASSES(6)
    params = distill.taught(student.init(jax.random.key(0)), None, teacher.init(jax.random.key(1))).params
    batch = arrays({**IMAGES, "labels": LABELS})
    graded = lambda weight: jax.grad(lambda p: distill.distill(tasks.classification, student, teacher, weight=weight)(p, batch)[0].total)
    soft, hard = jax.jit(lambda p: (graded(1.0)(p), graded(1e-9)(p)))(params)
    assert not soft["out"].any() and soft["told"].any()
    assert hard["out"].any() and float(jnp.abs(hard["told"]).max()) < 1e-6


def test_outputs_that_come_with_the_batch_teach_as_their_teacher_does():
    """Of all classes, and of the likeliest k where k is all there are."""
    student, teacher, task, batch, _ = CASES["words"]
    own, guide = student.init(jax.random.key(0)), teacher.init(jax.random.key(1))
    logits = WHOLE(6).apply(guide, input_ids=jnp.asarray(batch["input_ids"]))["logits"]
    values, ids = losses.top_k(logits, V, temperature=2.0)
    want = graded("words")[0]
    for told in ({"teacher_logits": logits}, {"teacher_values": values, "teacher_ids": ids}):
        loss, metrics, _ = jax.jit(distill.distill(task, student))(own, {**arrays(batch), **told})
        assert float(loss.value) == pytest.approx(float(want.value), rel=1e-5)
        assert float(metrics["agreement"].value) == float(graded("words")[1]["agreement"].value)


# -- models ----------------------------------------------------------------------------------------------------------------

SMALL = dict(size="tiny", vocab_size=32)
FAMILIES = {  # student, teacher, task, options, mesh: heads, layers and widths differ, and so may the family; two pipelines in one step
    "bert from roberta": (
        ("bert", dict(num_hidden_layers=1, head="sequence_classification", num_labels=C)),
        ("roberta", dict(head="sequence_classification", num_labels=C)),
        tasks.classification,
        dict(
            also=[
                (1.0, terms.hidden(project="hidden")),
                (1.0, terms.relations(heads=2)),
                (1.0, terms.relations(heads=2, of="qkv")),
                (1.0, terms.attentions(heads={0: 1})),
            ]
        ),
        dict(fsdp=4, tensor=2),
    ),
    "gpt2 from llama": (("gpt2", {}), ("llama", {}), tasks.token_loss, dict(chunk=4, divergence="js"), dict(stage=2, fsdp=4)),
}


@pytest.mark.slow
def test_a_model_learns_what_another_looks_at():
    """Encoders of other widths, heads and numbers of layers: what looks learns, the teacher does not, and padding changes nothing."""
    student = models.create("bert", **SMALL, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    teacher = models.create("bert", **SMALL, hidden_size=24, num_attention_heads=3, num_hidden_layers=2)
    rng = np.random.default_rng(0)
    own, guide = (jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, s.dtype), m.shapes()) for m in (student, teacher))
    also = [(1.0, terms.attentions(heads={0: 0, 1: 2})), (1.0, terms.relations(heads=4, of="qkv"))]
    loss_fn = distill.distill(None, student, teacher, weight=0, also=also)
    params = distill.taught(own, student.axes, guide, teacher.axes).params
    ids = rng.integers(0, 32, (3, 6))
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    step = jax.jit(jax.value_and_grad(lambda params, batch: (lambda loss, *_: loss.value)(*loss_fn(params, batch))))
    loss, grads = step(params, {"input_ids": ids, "attention_mask": mask})
    other, others = step(params, {"input_ids": np.where(mask, ids, 7), "attention_mask": mask})
    assert float(loss) == pytest.approx(float(other), rel=1e-5) and float(loss) > 0.01 and (ids != np.where(mask, ids, 7)).any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, others)
    assert not any(bool(g.any()) for g in jax.tree.leaves(grads["teacher"]))
    assert all(bool(grads["blocks"]["attention"][name].any()) for name in "qkv")
    assert not grads["blocks"]["mlp"]["down"].any()  # nothing looks behind the only layer
    same = distill.taught(own, student.axes, own, student.axes).params
    alike = distill.distill(None, student, student, weight=0, also=[(1.0, terms.attentions()), (1.0, terms.relations(heads=4, of="qkv"))])
    assert float(jax.jit(lambda params: alike(params, {"input_ids": ids, "attention_mask": mask})[0].value)(same)) == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_know_of_nothing(name):
    """A step over eight devices, its teacher in int8: within rounding what the same weights as floats teach."""
    (family, own), (other, more), task, options, sizes = FAMILIES[name]
    student, teacher = models.create(family, **SMALL, **own), models.create(other, **SMALL, **more)
    params, guide = (jax.jit(model.init)(jax.random.key(i)) for i, model in enumerate((student, teacher)))
    rules = [("blocks/.*/(q|k|v|out|up|down|gate)", "int8")]
    small = jax.jit(lambda guide: peft.quantized(guide, rules, axes=teacher.axes))(guide)
    assert any(isinstance(w, weights.Quantized) for _, w in weights.named_weights(small))
    ids = np.random.default_rng(0).integers(0, 32, (8, 8)).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids if task is tasks.token_loss else ids[:, 0] % C}
    width = lambda model: model.shapes()["embed"]["tokens"].shape[1]
    project = {"hidden": (width(student), width(teacher))} if "also" in options else None
    whole = jax.tree.map(weights.dense, small, is_leaf=weights.is_typed)
    loss_fn, rng = distill.distill(task, student, teacher, **options), jax.random.key(2)
    both, dense = (distill.taught(params, student.axes, w, teacher.axes, project=project, rng=rng) for w in (small, whole))
    mesh = make_mesh(**sizes)
    state = train.init_state(both.params, optax.sgd(0.1), mesh=mesh, axes=both.axes, freeze=both.freeze)
    state, metrics = train.train_step(lambda p, batch, rng: loss_fn(p, batch), optax.sgd(0.1), state)(
        state, jax.device_put(batch, sharding.batch_sharding(mesh))
    )
    want = jax.jit(lambda p: loss_fn(p, batch)[0].value)(dense.params)
    assert int(state.skipped) == 0 and float(metrics["distillation"].value) > 0
    assert float(metrics["loss"].value) == pytest.approx(float(want), rel=1e-4)  # float32; products in other orders


OTHERS = {  # a vision transformer from a network of convolutions with running statistics, a pair of towers from another
    "vit from resnet": ("vit", "resnet", tasks.classification, dict(head="image_classification", num_labels=C)),
    "clip": ("clip", "clip", tasks.contrastive, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_images_and_pairs_too(name):
    family, other, task, config = OTHERS[name]
    student, teacher = (models.create(one, size="tiny", **config) for one in (family, other))
    params, guide = (jax.jit(model.init)(jax.random.key(i)) for i, model in enumerate((student, teacher)))
    batch = {
        key: jnp.asarray(np.random.default_rng(0).integers(0, 9, (4, *x.shape[1:])), x.dtype) for key, x in student.module.example().items()
    }
    batch |= {"labels": jnp.arange(4) % C} if name != "clip" else {}
    both = distill.taught(params, student.axes, guide, teacher.axes)
    loss, metrics, _ = jax.jit(distill.distill(task, student, teacher, temperature=1.0))(both.params, batch)
    want = (float(metrics["task_loss"].value) + float(metrics["distillation"].value)) / 2
    assert float(loss.value) == pytest.approx(want, rel=1e-5) and float(metrics["distillation"].value) > 1e-4


# -- mistakes --------------------------------------------------------------------------------------------------------------


def call(name="classes", change=lambda batch: batch, teacher=None, **options):
    student, guide, task, batch, own = CASES[name]
    guide = teacher or guide
    both = distill.taught(student.init(jax.random.key(0)), student.axes, guide.init(jax.random.key(1)), guide.axes)
    return lambda: distill.distill(task, student, guide, **{**own, **options})(both.params, change(arrays(batch)))


PLAIN = CLASSES()
TWICE = lambda model: lambda *given: (tasks.classification(model)(*given), tasks.classification(model)(*given))[0]
MISTAKES = {
    "a divergence": (lambda: terms.soft_labels(divergence="foward"), "unknown divergence 'foward'; there are 'forward'"),
    "a weight": (lambda: distill.distill(None, PLAIN, PLAIN, weight=2), "weight 2 is to be from 0 to 1"),
    "nothing": (lambda: distill.distill(None, PLAIN, PLAIN, weight=0), "weight is 0, and also names no term"),
    "two teachers": (lambda: distill.distill(None, PLAIN, PLAIN, ema=0.9), "with ema the teacher is an average of the student"),
    "no average": (lambda: distill.distill(None, PLAIN, ema=0.9)(PLAIN.init(jax.random.key(0)), {}), "begins as the student's own weights"),
    "no teacher": (
        lambda: distill.distill(None, PLAIN)(PLAIN.init(jax.random.key(0)), arrays(IMAGES)),
        "there is no teacher: give one, or batches with its outputs",
    ),
    "other classes": (
        call(teacher=toy(4, lambda params, x: {"logits": x @ params["out"]}, out=(4, C + 1))),
        "scores 3 classes and the teacher 4",
    ),
    "other outputs": (call(teacher=SENTENCES()), "the student gives logits and the teacher sentence_embedding"),
    "asked twice": (
        lambda: distill.distill(TWICE, PLAIN, CLASSES(6))(
            distill.taught(PLAIN.init(jax.random.key(0)), None, CLASSES(6).init(jax.random.key(0))).params,
            arrays({**IMAGES, "labels": LABELS}),
        ),
        "asks its model once a batch, and this one asks 2 times",
    ),
    "widths": (call("hidden of another width"), r"layer 1 of the student is \(8, 5, 4\) .* their widths meet by taught\(project"),
    "a layer": (call("words", also=[(1.0, terms.hidden({1: 7}))]), "no layers 1: 7: the student's are 0 to 2, the teacher's 0 to 2"),
    "no states": (call("words", also=[(1.0, terms.hidden(of="hiden_states"))]), "gives no 'hiden_states'; its states are 'hidden_states'"),
    "a kind": (lambda: terms.hidden(kind="cos"), "hidden states have no kind 'cos'; there are 'mse' and 'cosine'"),
    "a kind of map": (lambda: terms.attentions(kind="kld"), "attention maps have no kind 'kld'; there are 'kl' and 'mse'"),
    "other heads": (
        call("maps, by squares", also=[(1.0, terms.attentions())]),
        "student has heads 0 to 1 and .* teacher 0 to 2; say which",
    ),
    "no such head": (
        call("maps", also=[(1.0, terms.attentions(heads={0: 2}))]),
        "student has heads 0 to 1 and .* teacher 0 to 1; say which",
    ),
    "a layer of maps": (
        call("maps", also=[(1.0, terms.attentions({0: 1}))]),
        "no layers 0: 1: the student's are 1 to 2, the teacher's 1 to 2",
    ),
    "relation heads": (
        call("relations", also=[(1.0, terms.relations(heads=3, of="qkv"))]),
        "a width of 4 does not divide into 3 relation heads",
    ),
    "a name": (lambda: distill.taught({"teacher": 1}, None), "these have 'teacher' already"),
    "no dict": (lambda: distill.taught((1, 2), None), "these are a tuple, no dict of weights"),
    "no key": (lambda: distill.taught({}, None, project={"hidden_states": (2, 3)}), "projections of hidden_states are drawn: give rng"),
    "no members": (lambda: distill.ensemble([]), "an ensemble is of one model or more"),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
