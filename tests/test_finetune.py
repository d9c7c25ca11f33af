"""Fine-tuning by recipe: published weights, labelled text, a task of one's own, repeated seeds."""

import json
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import bigflax
from bigflax import data, models, recipes, runs, tasks, train
from bigflax.main import main
from bigflax.metrics import as_floats

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


def test_training_begins_with_the_published_weights(home):
    run = runs.Run(recipes.resolve(recipe(home, mesh=dict(data=2, fsdp=2, tensor=2))))
    state, (_, published) = run.init_state(), bigflax.load(str(home / "published"))
    for part in ("embed", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], published[part])
    assert state.params["head"]["scores"]["w"].shape[-1] == 2
    assert jax.tree.map(lambda x: (x.shape, x.sharding), state) == jax.tree.map(lambda x: (x.shape, x.sharding), run.state_like())


def test_it_learns_and_says_so(home, capsys):
    assert runs.train_run(recipes.resolve(recipe(home, work=str(home / "learns"), fit=dict(epochs=6)))) == 0
    assert "2 classes" in capsys.readouterr().out
    summary = json.loads((home / "learns" / "summary.json").read_text())
    assert summary["eval/accuracy"] >= 0.9 and summary["steps"] == 36  # 0.5 by chance


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
    "a label for packed text": (dict(task=dict(name="masked_lm")), "unknown key 'data.label' in the recipe"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(case, home, tmp_path, capsys):
    sections, message = MISTAKES[case]
    config = recipe(home, work=str(tmp_path), **sections)
    (tmp_path / "recipe.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({config.to_dict()!r})\n"
    )
    assert main(["train", f"--config={tmp_path}/recipe.py", "--cache="]) == 2
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
    with pytest.raises(ValueError, match=r"preferences are learned against a reference: fine-tune adapters"):
        one_step(preferences(home, task=dict(name="dpo"), model=decoder))


def test_attacks_and_augmented_text_by_recipe(home):
    """Training sees the attack's loss, evaluation the plain one and the accuracy under attack; words are left out in training alone."""
    attack = dict(name="pgd", on="embed/tokens", eps=0.5, steps=1)
    run = runs.Run(recipes.resolve(recipe(home, task=dict(attack=attack), data=dict(augment="delete:0.5"))))
    trained, evaluated = one_step(run)
    assert "clean_loss" in trained and evaluated["attacked_loss"] >= evaluated["loss"]
    words = lambda split: sum(int(np.asarray(batch["attention_mask"]).sum()) for batch, _ in zip(run.loader(split), range(2), strict=False))
    assert words("train") < 0.8 * words("validation")
    with pytest.raises(ValueError, match=r"there is no attack 'pdg'; .*'pgd'"):
        tasks.create("classification", run.model, attack=dict(name="pdg"))


@pytest.mark.slow
def test_seeds_and_the_folder_of_a_run(home, capsys):
    """Two runs and their mean; the best weights of one, merged or as an adapter alone, are what the run evaluated."""
    said = recipe(home, work=str(home / "seeds"), peft=dict(name="lora", rules=[("blocks/.*", 4)]), fit=dict(epochs=3))
    (home / "lora.py").write_text(f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({said.to_dict()!r})\n")
    assert main(["train", f"--config={home}/lora.py", "--seeds=2", "--cache="]) == 0
    assert re.search(r"held-out accuracy +0\.\d+ \+- ", capsys.readouterr().out)
    spread = json.loads((home / "seeds" / "seeds.json").read_text())["eval/accuracy"]
    assert len(spread["values"]) == 2 and spread["mean"] == pytest.approx(np.mean(spread["values"]))
    work = str(home / "seeds" / "seed1")
    assert main(["convert", work, str(home / "merged"), "--cache="]) == 0
    assert main(["convert", work, str(home / "adapter"), "--adapter", "--cache="]) == 0
    config = json.loads((home / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "animals", "1": "colours"}
    model, params = bigflax.load(str(home / "merged"))
    run = runs.Run(recipes.resolve(said, [f"work={work}"]))
    run.mesh = bigflax.make_mesh(devices=jax.devices()[:1])
    accuracy = bigflax.evaluate(bigflax.eval_step(tasks.create("classification", model)), params, run.loader("validation"))["accuracy"]
    best = max(record["eval/accuracy"] for record in map(json.loads, open(f"{work}/metrics.jsonl")) if "eval/accuracy" in record)
    assert accuracy == best
    base, params = bigflax.load(str(home / "published"), head="sequence_classification", num_labels=2)
    attached = bigflax.load_adapter(base, params, str(home / "adapter"))
    batch = {name: x for name, x in next(run.loader("validation")).items() if name != "labels"}
    np.testing.assert_allclose(
        base.apply(attached, **batch)["logits"], model.apply(bigflax.load(str(home / "merged"))[1], **batch)["logits"], atol=1e-5
    )
