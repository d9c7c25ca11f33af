"""Fine-tuning by recipe: published weights, labelled text, a task of one's own, repeated seeds."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import bigflax
from bigflax import data, models, recipes, runs, sharding, summaries, tasks, train, trees
from bigflax.main import main
from bigflax.metrics import as_floats
from bigflax.writers import read_jsonl

WORDS = {"animals": "cat dog horse cow sheep".split(), "colours": "red green blue white black".split()}


def rows(n, seed):
    """Five words of one topic among five of no topic."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        topic = [*WORDS][i % 2]
        words = [*rng.choice(WORDS[topic], 3), *rng.choice(["the", "a", "of", "and", "in"], 3)]
        yield {"text": " ".join(rng.permutation(words)), "topic": topic}


def pairs(n, seed):
    """A question, and an answer with its topic's words that is preferred to one without."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield {
            "prompt": "name some:",
            "chosen": " ".join(rng.choice(WORDS["animals"], 4)),
            "rejected": " ".join(rng.choice(WORDS["colours"], 4)),
        }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with published weights, a tiny BERT whose tokenizer is beside it, and labelled text."""
    home = tmp_path_factory.mktemp("finetune")
    for name, n in {"train": 96, "test": 40}.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(n, n)))
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(64, 0)))
    tokenizer = data.train_bpe((row["text"] for row in rows(200, 0)), 300)
    for name, family, options in [("published", "bert", dict(head=None)), ("decoder", "llama", {})]:
        model = models.create(family, size="tiny", vocab_size=tokenizer.vocab_size, **options)
        bigflax.save(model, model.init(jax.random.key(0)), str(home / name), tokenizer=tokenizer)
    return home


def recipe(home, **sections):
    said = dict(
        work=str(home / "work"), model=dict(source=str(home / "published")), task=dict(name="classification"), optimizer=dict(lr=3e-3),
        data=dict(source=dict(kind="jsonl", path=str(home / "train.jsonl")), validation_source=dict(kind="jsonl", path=str(home / "test.jsonl")),
                  label="topic", length=16, batch_size=16), fit=dict(epochs=2, log_every=4),
    )  # fmt: skip
    for name, section in sections.items():
        said[name] = {**said.get(name, {}), **section} if isinstance(section, dict) else section
    return ConfigDict(said)


def test_the_recipe_follows_from_the_weights_the_task_and_the_data(home):
    config = recipes.resolve(recipe(home))
    assert (config.model.name, config.model.head, config.model.num_labels) == ("bert", "sequence_classification", None)
    assert config.tokenizer.kind == "file" and config.model.hidden_size == models.create("bert", size="tiny").config["hidden_size"]
    assert "max_line" not in config.data and "sample" not in config and config.data.text == "text"
    run = runs.Run(config)
    assert run.classes == ("animals", "colours") and run.fields["num_labels"] == 2
    assert run.steps == 12 and run.fit_options()["eval_every"] == 6
    assert sum(int((np.asarray(batch["labels"]) >= 0).sum()) for batch in run.loader("validation")) == 40  # all of the other file


def test_training_begins_with_the_published_weights(home):
    run = runs.Run(recipes.resolve(recipe(home, mesh=dict(data=2, fsdp=2, tensor=2))))
    state, (_, published) = run.init_state(), bigflax.load(str(home / "published"))
    for part in ("embed", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], published[part])
    assert state.params["head"]["scores"]["w"].shape[-1] == 2
    assert jax.tree.map(lambda x: (x.shape, x.sharding), state) == jax.tree.map(lambda x: (x.shape, x.sharding), run.state_like())


@pytest.mark.slow
def test_it_learns_and_says_so(home, capsys):
    assert runs.train_run(recipes.resolve(recipe(home, work=str(home / "learns"), fit=dict(epochs=6)))) == 0
    assert "2 classes" in capsys.readouterr().out
    summary = json.loads((home / "learns" / "summary.json").read_text())
    assert summary["eval/accuracy"] >= 0.9 and summary["steps"] == 36  # 0.5 by chance


def topic(rng):
    return {"text": " ".join(rng.choice([*WORDS["animals"], *WORDS["colours"]], rng.integers(1, 16))), "topic": str(rng.choice([*WORDS]))}


def talk(rng):
    """A question of one to a dozen words, and which of them is an animal."""
    words = [*rng.choice([*WORDS["colours"], "the", "a"], rng.integers(0, 12)), rng.choice(WORDS["animals"])]
    asked = {"role": "user", "content": " ".join(rng.permutation(words))}
    return {"messages": [asked, {"role": "assistant", "content": str(words[-1])}]}


CHATML = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|endoftext|>' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def names(rng):
    words = [*rng.choice(["the", "a", "of"], rng.integers(0, 9)), *rng.choice([*WORDS["animals"], *WORDS["colours"]], 2)]
    tags = ["B-animal" if w in WORDS["animals"] else "B-colour" if w in WORDS["colours"] else "O" for w in words]
    return {"tokens": [*map(str, words)], "tags": tags}


def question(rng):
    context = " ".join(str(w) for w in rng.choice([*WORDS["animals"], *WORDS["colours"]], rng.integers(4, 20), replace=True))
    answer = str(rng.choice(context.split()))
    return {"question": answer, "context": context, "answers": {"text": [answer], "answer_start": [context.index(answer)]}}


def pair(rng):
    one = topic(rng)["text"]
    return {"anchor": one, "positive": " ".join(reversed(one.split()))}


def shouted(rng):
    one = topic(rng)["text"]
    return {"source": one, "target": one.split()[0].upper()}


def tone(rng):
    """A twentieth of a second at 8 kHz, high or low."""
    high = int(rng.integers(2))
    sound = np.sin(2 * np.pi * (2000 if high else 300) * np.arange(400) / 8000 + rng.uniform(0, 6))
    return {"audio": {"array": sound.round(3).tolist(), "sampling_rate": 8000}, "text": ["low", "high"][high]}


# task -> the model, what the data section says, a record, what an evaluation tells
KINDS = {
    "classification": (dict(name="bert", hidden_dropout_prob=0.0), dict(length=64, label="topic"), topic, {"accuracy", "macro_f1"}),
    "token_classification": (dict(name="bert"), dict(length=64), names, {"accuracy", "span_f1"}),
    "question_answering": (dict(name="bert", max_position_embeddings=128), dict(length=72, stride=8, windows=4), question, {"exact_match", "f1"}),
    "sentence_embedding": (dict(name="bert"), dict(length=64), pair, {"accuracy"}),
    "seq2seq": (dict(name="t5"), dict(length=64, target_length=16), shouted, {"accuracy"}),
    "speech": (dict(name="whisper"), dict(seconds=1.0, target_length=8), tone, {"accuracy"}),
    "chat": (dict(name="llama"), dict(length=64, template=CHATML), talk, {"accuracy"}),
}  # fmt: skip


def opened(task, home, **sections):
    """The run of a kind on records of its own, on two devices, and its first batch."""
    if task == "chat":
        pytest.importorskip("jinja2", reason="jinja2 (extra chat) is not installed")
    model, section, record, _ = KINDS[task]
    rng = np.random.default_rng(0)
    (home / "rows.jsonl").write_text("".join(json.dumps(record(rng)) + "\n" for _ in range(400)))
    said = dict(
        model=dict(size="tiny", **model), task=dict(name=task), tokenizer=dict(kind="bytes"), optimizer=dict(lr=1e-3), fit=dict(steps=5),
        data=dict(source=dict(kind="jsonl", path=str(home / "rows.jsonl")), batch_size=32, **section),
    )  # fmt: skip
    run = runs.Run(recipes.resolve(ConfigDict(said | sections)))
    run.mesh = sharding.make_mesh(data=2, devices=jax.devices()[:2])
    with run.loader("train") as loader:
        return run, next(loader), loader.spec


QUICK = ("token_classification", "seq2seq", "chat")


@pytest.mark.parametrize("task", [task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in KINDS])
def test_every_kind_of_record_is_learned(task, tmp_path):
    """From a recipe to the first steps: the batch is what was known without a source, and five steps on it lower its loss."""
    run, batch, spec = opened(task, tmp_path)
    assert f"batch 32 x {'1 s of sound' if task == 'speech' else f'{run.config.data.length} tokens'}" in summaries.describe(run)
    shapes = run.batch_shapes()
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {name: (x.shape, x.dtype) for name, x in spec.items()}

    def loss(params):
        loss, metrics = run.loss_fn(params, batch)
        return loss.value, metrics

    @jax.jit
    def step(params):
        (loss_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda w, g: w - 1e-3 * jnp.sign(g), params, grads), loss_, metrics

    params, seen = jax.jit(run.model.init)(jax.random.key(0)), []
    for _ in range(5):
        params, value, metrics = step(params)
        seen.append(float(value))
    assert seen[-1] < seen[0] and {*metrics} == KINDS[task][-1]
    assert all(0 <= float(sums.value) <= 1 for sums in metrics.values())


def test_packed_records_have_no_epochs_but_can_be_prompted(tmp_path):
    run, *_ = opened("chat", tmp_path, sample=dict(prompt="which animal"), fit=dict(epochs=1))
    with pytest.raises(ValueError, match=r"not known before packed text is packed, .*; set fit.steps instead"):
        _ = run.steps
    assert run.tokenizer.decode(run.prompt()[0], skip_special=False) == "<user>which animal<|endoftext|><assistant>"


@pytest.mark.slow
def test_what_is_written_is_scored(tmp_path, monkeypatch):
    """The first records of the validation split, once each and without a batch's padding, beside what their labels say."""
    record = lambda rng: {"source": "abc" * 5, "target": " ".join(rng.choice(WORDS["animals"], 2))}
    monkeypatch.setitem(KINDS, "seq2seq", (dict(name="t5"), dict(length=16, target_length=12, validation_fraction=0.1), record, {}))
    monkeypatch.setattr(runs, "scored", lambda names, said, true: {name: (said, true) for name in names})
    run, *_ = opened("seq2seq", tmp_path, generate=dict(scores=("wer",), records=50, max_new_tokens=8))
    params = jax.jit(run.model.init)(jax.random.key(0))
    said, true = run.scores(params)["wer"]
    there = [json.loads(line)["target"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(said) == len(true) and 20 < len(true) < 50 and len(true) % 32
    assert sorted(true) == sorted(there[i] for i in range(400) if run.records("validation")[0].chosen(i))
    assert {*run.evaluator()(run.model.init(jax.random.key(0)))} >= {"loss", "accuracy", "wer"}


@pytest.mark.slow
def test_a_run_watches_what_is_written_and_a_chat_is_answered(tmp_path, one_device, capsys):
    sections = dict(
        generate=dict(scores=("wer", "exact_match"), records=8, max_new_tokens=8), watch=dict(metric="wer"), fit=dict(steps=2, eval_every=1)
    )
    run, *_ = opened("seq2seq", tmp_path, work=str(tmp_path / "work"), **sections)
    assert runs.train_run(run.config) == 0
    summary = json.loads((tmp_path / "work" / "summary.json").read_text())
    assert summary["eval/wer"] > 0.5 and 0 <= summary["eval/exact_match"] <= 1 and summary["sample"] is None
    run, *_ = opened("chat", tmp_path, sample=dict(prompt="which animal", max_new_tokens=5))
    assert run.sample(jax.jit(run.model.init)(jax.random.key(0))).startswith("which animal\n")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "chat"])
def test_accumulating_records_is_the_large_batch(task, tmp_path):
    """4 x 8 records of very different lengths have the gradient of 1 x 32."""
    run, batch, _ = opened(task, tmp_path)
    tx, found = optax.sgd(1.0), {}
    for parts in (1, 4):
        state = train.init_state(run.model.init, tx, mesh=run.mesh, axes=run.model.axes)
        before = jax.device_get(state.params)
        state, metrics = train.train_step(run.loss_fn, tx, state, accumulate=parts)(state, batch)
        found[parts] = jax.tree.map(np.subtract, before, jax.device_get(state.params)), float(metrics["loss"].value)
    assert found[4][1] == pytest.approx(found[1][1], rel=1e-6)
    for (name, a), (_, b) in zip(trees.named_leaves(found[1][0]), trees.named_leaves(found[4][0]), strict=True):
        # the difference of float32 weights of size one carries their rounding: 2^-24 each
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max() + 2**-23, err_msg=name)


OWN = """
from bigflax import data, losses, tasks
from bigflax.metrics import Mean

def half(model, *, share=0.5):
    loss_fn = tasks.classification(model)
    def scaled(params, batch, rng=None):
        loss, metrics = loss_fn(params, batch, rng)
        return Mean(loss.total * share, loss.count), metrics
    return scaled

def shout(tokenizer, classes, *, length, label="label"):
    read = data.labelled(tokenizer, classes, length=length, label=label)
    return lambda record, rng=None: read({**record, "text": record["text"].upper()}, rng)

loud = tasks.Task(half, {"input_ids": data.reading(shout, data.labelled_shapes)}, "sequence_classification")
"""


def test_weights_and_tokenizer_of_a_hub_id_are_those_of_its_folder(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda source, **_: {"owner/name": str(home / "published")}[source])
    here, there = (
        runs.Run(recipes.resolve(recipe(home, work="", model=dict(source=source)), []))
        for source in (str(home / "published"), "owner/name")
    )
    assert there.tokenizer.fingerprint == here.tokenizer.fingerprint
    jax.tree.map(np.testing.assert_array_equal, *(run.init_state().weights["embed"] for run in (here, there)))


def test_a_task_of_ones_own(home):
    (home / "mine.py").write_text(OWN)
    task = dict(name=f"{home}/mine.py:loud", share=0.25)
    run = runs.Run(recipes.resolve(recipe(home, task=task)))
    batch = next(run.loader("train"))
    plain = runs.Run(recipes.resolve(recipe(home)))
    params = run.init_state().weights
    loss, other = run.loss_fn(params, batch)[0], plain.loss_fn(params, batch)[0]
    assert float(loss.total) == pytest.approx(float(other.total) / 4, rel=1e-6)
    assert run.tokenizer.decode(np.asarray(batch["input_ids"])[0]).isupper()


MISTAKES = {
    "weights of another family": (dict(model=dict(name="gpt2")), "holds a bert, not the gpt2 that model.name says"),
    "a size beside weights": (dict(model=dict(size="tiny")), "has a size of its own; leave out model.size 'tiny'"),
    "no such folder": (dict(model=dict(source="nowhere")), "there is no folder 'nowhere', and a hub id is written owner/name"),
    "no such file of tasks": (dict(task=dict(name="nowhere.py:mine")), "there is no file 'nowhere.py' to take the task 'mine' from"),
    "no such field": (dict(data=dict(label="topik")), "the field 'topik' of the records holds nothing"),
    "a class without a record": (dict(data=dict(classes=("animals", "colours", "plants"))), "no record is of class 'plants'"),
    "another vocabulary": (dict(tokenizer=dict(kind="bpe", vocab_size=400)), "model.vocab_size 300 is smaller than the tokenizer's"),
    "longer than the positions": (dict(data=dict(length=600)), "600 tokens are more than the .* learned positions"),
    "texts in another field": (dict(data=dict(text="txt")), "the train split holds no good record; .*no field 'txt', nearest is 'text'"),
    "epochs and steps": (dict(fit=dict(steps=9)), "fit.epochs 2 and fit.steps 9 both say how long to train; set one of them to None"),
    "rules that are none": (dict(peft=dict(name="lora", rules="blocks/.*")), "rules are pairs of a regex and a value, .* not 'blocks/.*'"),
    "a regex that is none": (dict(peft=dict(name="lora", rules=[("blocks/(", 4)])), "rules are pairs of a regex and a value, .*unterminated"),
    "an attack without a name": (dict(task=dict(attack=dict(eps=0.5))), "task.attack names a method and its options"),
    "an attack with a wrong option": (
        dict(task=dict(attack=dict(name="pgd", on="embed/tokens", epps=0.5))), "pgd got an unexpected keyword argument 'epps'; an attack has bounds, eps",
    ),
    "a label for packed text": (dict(task=dict(name="masked_lm")), "unknown key 'data.label' in the recipe"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(case, home, tmp_path, capsys):
    sections, message = MISTAKES[case]
    config = recipe(home, work=str(tmp_path), **sections)
    (tmp_path / "recipe.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({config.to_dict()!r})\n"
    )
    assert main(["train", f"--config={tmp_path}/recipe.py"]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_tasks_of_a_file_are_found_by_name(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    assert tasks.find(f"{tmp_path}/mine.py:half").head is None
    with pytest.raises(ValueError, match=r"has no task 'lout'; .*'loud'"):
        tasks.find(f"{tmp_path}/mine.py:lout")


METHODS = {  # tests/test_peft.py has each of them; here, that recipes reach all kinds: typed weights, another model, another tree
    "lora": dict(rules=(("blocks/attention/(q|v)", 4),), dropout=0.1, base="int8"),
    "prefix": dict(tokens=3),
    "last_layers": dict(layers=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_by_recipe(name, home):
    """The state is born as it is restored, and a step moves what trains and nothing else."""
    run = runs.Run(recipes.resolve(recipe(home, peft={"name": name, **METHODS[name]})))
    run.mesh = bigflax.make_mesh(devices=jax.devices()[:1])
    state = run.init_state()
    assert jax.tree.map(lambda x: (x.shape, x.sharding), state) == jax.tree.map(lambda x: (x.shape, x.sharding), run.state_like())
    before = jax.tree.map(np.array, (state.params, state.frozen))
    assert run.tuned is not None and "the optimizer holds" in run.tuned.summary(run.tx)
    new, metrics = bigflax.train_step(run.loss_fn, run.tx, state)(state, next(run.loader("train")))
    assert np.isfinite(metrics["loss"].value)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before[0]), jax.tree.leaves(new.params), strict=True))
    jax.tree.map(np.testing.assert_array_equal, before[1], new.frozen)


def one_step(run):
    """The metrics of the first batch, and those of the evaluation."""
    run.mesh = bigflax.make_mesh(devices=jax.devices()[:1])
    state = run.init_state()
    batch = next(run.loader("train"))
    seen = jax.eval_shape(lambda params, batch: run.loss_fn(params, batch, jax.random.key(0))[1], state.weights, batch)
    return seen, as_floats(train.eval_step(run.loss_fn)(state.weights, batch))


def preferences(home, **sections):
    said = recipe(home, **sections)
    said.data = ConfigDict(dict(source=dict(kind="jsonl", path=str(home / "pairs.jsonl")), length=24, batch_size=8))
    said.fit = ConfigDict(dict(steps=2))
    return runs.Run(recipes.resolve(said))


def test_preferences_by_recipe(home):
    """Against the model beneath the adapter the margin begins at 0, and the loss at log 2; a reward begins as any number."""
    lora = dict(name="lora", rules=[("blocks/attention/q", 2)])
    decoder = dict(source=str(home / "decoder"))
    _, metrics = one_step(preferences(home, task=dict(name="dpo"), model=decoder, peft=lora))
    assert metrics["margin"] == pytest.approx(0, abs=1e-6) and metrics["loss"] == pytest.approx(np.log(2), rel=1e-5)
    run = preferences(home, task=dict(name="reward"))
    assert run.fields["num_labels"] == 1 and np.isfinite(one_step(run)[1]["margin"])


def test_a_reference_is_asked_once_where_all_weights_train(home, tmp_path, monkeypatch):
    """It is what the step's own reference would say, of both splits, is kept, and is what a run that goes on reads again."""
    decoder = dict(source=str(home / "decoder"))
    run = preferences(home, work=str(tmp_path), task=dict(name="dpo"), model=decoder)
    _, metrics = one_step(run)
    assert metrics["margin"] == pytest.approx(0, abs=1e-6) and metrics["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert {name: (x.shape, x.dtype) for name, x in run.batch_shapes().items()} == {
        name: (x.shape, x.dtype) for name, x in run.loader("train").spec.items()
    }
    pairs = {json.dumps(json.loads(line), sort_keys=True) for line in (home / "pairs.jsonl").read_text().splitlines()}
    assert run.reference is not None and len(run.reference["record"]) == len(pairs)
    again = preferences(home, work=str(tmp_path), task=dict(name="dpo"), model=decoder)
    monkeypatch.setattr(runs.Run, "init_state", None)  # the weights that it was asked of are gone
    jax.tree.map(np.testing.assert_array_equal, run.reference, again.reference)


@pytest.mark.slow
@pytest.mark.parametrize("peft", [dict(name="lora", rules=[("blocks/.*", 4)]), {}], ids=["lora", "full"])
def test_preferences_train_by_recipe(home, peft, tmp_path):
    """A whole run of DPO: held-out pairs are told apart, and by a margin."""
    said = preferences(
        home, work=str(tmp_path / "dpo"), task=dict(name="dpo", beta=1.0), model=dict(source=str(home / "decoder")), peft=peft
    ).config.copy_and_resolve_references()
    with said.unlocked():
        said.fit.epochs, said.fit.steps, said.data.validation_fraction, said.fit.eval_every = 8, None, 0.3, 10
    assert runs.train_run(said, say=lambda text: None) == 0
    summary = json.loads((tmp_path / "dpo" / "summary.json").read_text())
    assert summary["eval/accuracy"] >= 0.9 and summary["eval/margin"] > 0.1


def test_attacks_and_augmented_text_by_recipe(home):
    """Training sees the attack's loss, evaluation the plain one and the accuracy under attack; words are left out in training alone."""
    attack = dict(name="pgd", on="embed/tokens", eps=0.5, steps=1)
    run = runs.Run(recipes.resolve(recipe(home, task=dict(attack=attack), data=dict(augment="delete:0.5"))))
    trained, evaluated = one_step(run)
    assert "clean_loss" in trained and evaluated["attacked_loss"] >= evaluated["loss"]
    plain = runs.Run(recipes.resolve(recipe(home, task=dict(attack={**attack, "name": "attacked"}))))
    trained, evaluated = one_step(plain)
    assert not {"clean_loss", "attacked_loss"} & trained.keys() and "attacked_accuracy" in evaluated
    words = lambda split: sum(int(np.asarray(batch["attention_mask"]).sum()) for batch, _ in zip(run.loader(split), range(2), strict=False))
    assert words("train") < 0.8 * words("validation")
    with pytest.raises(ValueError, match=r"there is no attack 'pdg'; .*'pgd'"):
        tasks.create("classification", run.model, attack=dict(name="pdg"))


@pytest.mark.slow
def test_seeds_and_the_folder_of_a_run(home, capsys):
    """Two runs and their mean; the best weights of one, merged or as an adapter alone, are what the run evaluated."""
    said = recipe(home, work=str(home / "seeds"), peft=dict(name="lora", rules=[("blocks/.*", 4)]), fit=dict(epochs=3))
    (home / "lora.py").write_text(f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({said.to_dict()!r})\n")
    assert main(["train", f"--config={home}/lora.py", "--seeds=2"]) == 0
    assert re.search(r"held-out accuracy +0\.\d+ \+- ", capsys.readouterr().out)
    spread = json.loads((home / "seeds" / "seeds.json").read_text())["eval/accuracy"]
    assert len(spread["values"]) == 2 and spread["mean"] == pytest.approx(np.mean(spread["values"]))
    work = str(home / "seeds" / "seed1")
    (home / "train.jsonl").rename(home / "away.jsonl")  # weights can be written where the data are not
    assert main(["convert", work, str(home / "merged")]) == 0
    assert main(["convert", work, str(home / "adapter"), "--adapter"]) == 0
    (home / "away.jsonl").rename(home / "train.jsonl")
    config = json.loads((home / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "animals", "1": "colours"}
    model, params = bigflax.load(str(home / "merged"))
    run = runs.Run(recipes.resolve(said, [f"work={work}"]))
    run.mesh = bigflax.make_mesh(devices=jax.devices()[:1])
    accuracy = bigflax.evaluate(bigflax.eval_step(tasks.create("classification", model)), params, run.loader("validation"))["accuracy"]
    best = max(record["eval/accuracy"] for record in read_jsonl(f"{work}/metrics.jsonl") if "eval/accuracy" in record)
    assert accuracy == best
    base, params = bigflax.load(str(home / "published"), head="sequence_classification", num_labels=2)
    attached = bigflax.load_adapter(base, params, str(home / "adapter"))
    batch = {name: x for name, x in next(run.loader("validation")).items() if name != "labels"}
    np.testing.assert_allclose(
        base.apply(attached, **batch)["logits"], model.apply(bigflax.load(str(home / "merged"))[1], **batch)["logits"], atol=1e-5
    )
