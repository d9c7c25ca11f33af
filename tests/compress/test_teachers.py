"""What a teacher said is written once and found again; a cache half written goes on; texts that models sample are rows to learn from."""

import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import data, losses, make_mesh, models, nn, sharding, tasks, train
from bigflax.compress import distill, teachers
from bigflax.generate import generate as decode

V, T, K = 11, 4, 3


def bigrams(seed):
    """A language model that knows the last token alone: a table of logits."""
    init = lambda rng: {"table": jax.random.normal(jax.random.key(seed), (V, V)) * 2}

    def apply(params, *, rng=None, input_ids, logits=True, **_):
        x = jax.nn.one_hot(input_ids, V)
        return {"logits": x @ params["table"].T} if logits else {"head": {"x_BTD": x, "w_VD": params["table"]}}

    return nn.Model(init, apply, {"table": "vocab <- embed"})


TEACHER, STUDENT = bigrams(1), bigrams(2)
PARAMS, OWN = TEACHER.init(None), STUDENT.init(None)
IDENTITY = {"teacher": "bigrams", "temperature": 2.0}


def stream(n=5, rows=4):
    for i in range(n):
        rng = np.random.default_rng(i)
        ids = rng.integers(0, V, (rows, T)).astype(np.int32)
        labels = rng.integers(0, V, (rows, T)).astype(np.int32)
        if i == n - 1:
            labels[-1] = -100  # a row that fills up the last batch
        yield {"input_ids": ids, "labels": labels}


class Asked:
    """A teacher that counts, and may give up."""

    def __init__(self, end=None):
        self.calls, self.end, self.ask = 0, end, teachers.top_k(TEACHER, PARAMS, K, temperature=2.0)

    def __call__(self, batch):
        if self.calls == self.end:
            raise KeyboardInterrupt
        self.calls += 1
        return self.ask(batch)


@pytest.fixture(autouse=True)
def library():
    pytest.importorskip("array_record", reason="an extra")


def test_the_cache_holds_rows_and_what_was_said(tmp_path):
    source = teachers.remember(tmp_path / "cache", stream(), Asked(), identity=IDENTITY, batches_a_file=2)
    rows = [row for batch in stream() for row in zip(*batch.values(), strict=True)][:-1]
    assert len(source) == len(rows) == 19 and isinstance(source, data.Source)
    for record, (ids, labels) in zip((source[i] for i in range(19)), rows, strict=True):
        np.testing.assert_array_equal(record["input_ids"], ids)
        np.testing.assert_array_equal(record["labels"], labels)
        values, top = losses.top_k(TEACHER.apply(PARAMS, input_ids=ids[None])["logits"][0], K, temperature=2.0)
        np.testing.assert_array_equal(record["teacher_ids"], top)
        assert record["teacher_values"].dtype == np.float16 and record["teacher_values"].shape == (T, K + 1)
        np.testing.assert_allclose(record["teacher_values"], values, rtol=2**-11)  # half a unit of float16's last digit
    assert source.name(18) == "000002.array_record:2"
    other = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(other[3]["teacher_values"], source[3]["teacher_values"])


def test_a_cache_half_written_goes_on(tmp_path):
    """Stopped in the midst of its second file, and once more there: what was complete is not asked again, and the files are as of one go."""
    whole = Asked()
    teachers.remember(tmp_path / "whole", stream(), whole, identity=IDENTITY, batches_a_file=2)
    for end in (3, 1):
        with pytest.raises(KeyboardInterrupt):
            teachers.remember(tmp_path / "half", stream(), Asked(end), identity=IDENTITY, batches_a_file=2)
    assert len(teachers._files(tmp_path / "half")) == 1
    with pytest.raises(ValueError, match=r"no complete cache in .*; remember"):
        teachers.recall(tmp_path / "half")
    rest = Asked()
    source = teachers.remember(tmp_path / "half", stream(), rest, identity=IDENTITY, batches_a_file=2)
    again = Asked()
    teachers.remember(tmp_path / "half", iter(()), again, identity=IDENTITY, batches_a_file=2)
    assert (whole.calls, rest.calls, again.calls) == (5, 3, 0) and len(source) == 19
    for name in sorted(os.listdir(tmp_path / "whole")):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "half" / name).read_bytes(), name


def test_another_cache_is_not_this_one(tmp_path):
    make = lambda batches=None, **changes: teachers.remember(
        tmp_path, stream() if batches is None else batches, Asked(), identity={**IDENTITY, **changes}, batches_a_file=2
    )
    with pytest.raises(KeyboardInterrupt):
        teachers.remember(tmp_path, stream(), Asked(end=2), identity=IDENTITY, batches_a_file=2)
    with pytest.raises(ValueError, match=r"of something else: temperature \(2.0 there, 1.0 here\); take another folder"):
        make(temperature=1.0)
    with pytest.raises(ValueError, match="began with another batch"):
        make(list(stream())[1:])
    with pytest.raises(ValueError, match="no batch came"):
        teachers.remember(tmp_path / "none", iter(()), Asked(), identity=IDENTITY)
    with pytest.raises(ValueError, match="not of one shape"):
        make([*stream(4), {"input_ids": np.zeros((4, 3), np.int32), "labels": np.zeros((4, 3), np.int32)}])


def test_a_remembered_teacher_teaches(tmp_path):
    """Through the loader, on eight devices: the loss is that of the teacher's top k, and the student comes to say the same of them."""
    source = teachers.remember(tmp_path, stream(16), Asked(), identity=IDENTITY)
    mesh, tx = make_mesh(data=8), optax.adam(0.3)
    with data.record_batches(source, lambda record, rng: record, batch_size=16, split="all", mesh=mesh) as batches:
        first = next(batches)
        loss_fn = distill.distill(tasks.token_loss, STUDENT, temperature=2.0, weight=1.0)
        state = train.init_state(OWN, tx, mesh=mesh, axes=STUDENT.axes)
        step = train.train_step(loss_fn, tx, state)
        logits = STUDENT.apply(OWN, input_ids=np.asarray(first["input_ids"]))["logits"]
        want = losses.top_k_divergence(logits, np.asarray(first["teacher_values"]), np.asarray(first["teacher_ids"]), temperature=2.0)
        state, metrics = step(state, first)
        begun = float(metrics["loss"].value)
        assert begun == pytest.approx(float(want[np.asarray(first["labels"]) != -100].mean()), rel=1e-5)
        for _ in range(40):
            state, metrics = step(state, next(batches))
    assert float(metrics["agreement"].value) > 0.95 and float(metrics["loss"].value) < 0.05 * begun


# -- texts that models sample ----------------------------------------------------------------------------------------------

PROMPTS = {"prompt_ids": jnp.asarray([[0, 5], [3, 4], [0, 0]]), "prompt_mask": jnp.asarray([[0, 1], [1, 1], [0, 0]])}


def generate(params, ids, mask, rng, new=3):
    """The plain loop."""
    for i in range(new):
        logits = TEACHER.apply(params, input_ids=ids)["logits"][:, -1]
        ids = jnp.concatenate([ids, jax.random.categorical(jax.random.fold_in(rng, i), logits)[:, None]], 1)
    return ids[:, -new:]


def test_a_text_and_what_is_said_after_it():
    batch = teachers.continued(PROMPTS["prompt_ids"], PROMPTS["prompt_mask"], jnp.asarray([[7, 8, 9], [7, 2, 9], [7, 7, 7]]), eos_id=2)
    want = {
        "input_ids": [[0, 5, 7, 8], [3, 4, 7, 2], [0, 0, 7, 7]],
        "attention_mask": [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]],
        "position_ids": [[0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 0]],
        "labels": [[-100, 7, 8, 9], [-100, 7, 2, -100], [-100] * 4],
    }
    assert {name: x.tolist() for name, x in batch.items()} == want and {x.dtype for x in batch.values()} == {jnp.dtype("int32")}


@pytest.mark.slow
def test_what_a_model_wrote_it_would_write_again():
    """Of bigflax.generate and learned positions: in one pass over prompts padded on the left, the likeliest token at each place with a label is it."""
    model = models.create("gpt2", size="tiny", vocab_size=32)
    params = jax.tree.map(lambda w: 4 * w, jax.jit(model.init)(jax.random.key(0)))
    write = lambda params, ids, mask, rng: decode(model, params, ids, attention_mask=mask, max_new_tokens=6, temperature=0)
    prompts = {name: x[:2] for name, x in PROMPTS.items()}
    batch = teachers.sampled(write)(params, prompts, jax.random.key(0))
    labels = batch.pop("labels")
    said = jnp.argmax(jax.jit(lambda p: model.apply(p, **batch)["logits"])(params), -1)
    np.testing.assert_array_equal(said[labels != -100], labels[labels != -100])
    assert int((labels != -100).sum()) == 12 and len(set(said[labels != -100].tolist())) > 2


def test_the_student_is_taught_on_its_own_texts():
    """GKD: samples of the student's weights of that step, scored by the teacher; what is learned is what a teacher knows of the student's own words."""
    say = teachers.sampled(generate)
    with pytest.raises(ValueError, match="the batch has no prompt_ids, but input_ids"):
        say(OWN, {"input_ids": 0}, jax.random.key(0))
    both = distill.taught(OWN, STUDENT.axes, PARAMS, TEACHER.axes)
    loss_fn = distill.distill(None, STUDENT, TEACHER, divergence="js", beta=0.5, temperature=1.0)
    mesh, tx = make_mesh(data=1, devices=jax.devices()[:1]), optax.adam(0.3)
    state = train.init_state(both.params, tx, mesh=mesh, axes=both.axes, freeze=both.freeze)
    step = train.train_step(loss_fn, tx, state)
    prompts = {name: jnp.tile(x[:2], (8, 1)) for name, x in PROMPTS.items()}
    seen = []
    say = jax.jit(say)
    for i in range(20):
        batch = say(distill.untaught(state.weights), prompts, jax.random.key(i))
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"].value))
    assert seen[-1] < 0.2 * seen[0]


def test_texts_of_the_teacher_are_a_data_set(tmp_path):
    """Sequence-level: the teacher's own texts, written once, with its likeliest classes if they are wanted too."""
    say, ask = teachers.sampled(generate), teachers.top_k(TEACHER, PARAMS, K)
    told = lambda batch: (lambda texts: {**texts, **ask(texts)})(say(PARAMS, batch, jax.random.key(0)))
    source = teachers.remember(tmp_path, [PROMPTS], told, identity={"texts of": "bigrams"})
    assert len(source) == 2 and source[1]["labels"].tolist()[0] == -100 and source[1]["teacher_ids"].shape == (4, K)
    want = say(PARAMS, PROMPTS, jax.random.key(0))
    np.testing.assert_array_equal(np.stack([source[i]["labels"] for i in range(2)]), want["labels"][:2])


def test_a_share_of_the_batches_is_sampled():
    own = {**PROMPTS, "input_ids": jnp.zeros((3, 4), jnp.int32)}
    either = teachers.partly(lambda params, batch, rng: "sampled", 0.25)
    found = [either(None, own, jax.random.key(i)) for i in range(100)]
    assert 10 < sum(one == "sampled" for one in found if isinstance(one, str)) < 45
    assert next(one for one in found if not isinstance(one, str)).keys() == {"input_ids"}
    with pytest.raises(ValueError, match="from 0 to 1, not 2"):
        teachers.partly(generate, 2)


def test_a_teacher_over_pieces_and_devices_says_the_same():
    batch = next(stream(rows=8))
    want = teachers.top_k(TEACHER, PARAMS, K, temperature=2.0)(batch)
    mesh = make_mesh(data=4, tensor=2)
    told = teachers.top_k(TEACHER, PARAMS, K, temperature=2.0, mesh=mesh, chunk=1)(jax.device_put(batch, sharding.batch_sharding(mesh)))
    np.testing.assert_array_equal(told["teacher_ids"], want["teacher_ids"])
    np.testing.assert_allclose(told["teacher_values"].astype(float), want["teacher_values"].astype(float), rtol=2**-10)
