"""Runs with a teacher: the step is the one made by hand, only the student is kept, and what cannot be compared is said before training."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from running import WORDS, make_photo_recipe, make_text

import bigflax
from bigflax import data, exports, models, optim, recipes, runs, sharding, taught, train, trees
from bigflax.checkpoint import Checkpoints
from bigflax.compress import distill
from bigflax.main import main
from bigflax.writers import read_jsonl

LAYERS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
CLASSES = ("animals", "colours")


def rows(n):
    """Three words of a topic."""
    rng, words = np.random.default_rng(n), {"animals": "cat dog horse cow".split(), "colours": "red green blue white".split()}
    return [{"text": " ".join(rng.choice(words[topic], 3)), "label": topic} for topic in np.resize(CLASSES, n)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with labelled text, a text, and folders of untrained weights: a teacher, and those that are none for this data."""
    home = tmp_path_factory.mktemp("taught")
    (home / "unlabelled.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows(96)))
    for name, n in {"train": 96, "test": 40}.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(n)))
    make_text(home / "text")
    words = {n: data.train_bpe([" ".join(WORDS), *(row["text"] for row in rows(96))], n) for n in (280, 290)}

    def folder(name, family="bert", tokenizer=280, labels=CLASSES, **config):
        if tokenizer:
            config |= dict(vocab_size=words[tokenizer].vocab_size)
        if labels:
            config |= dict(num_labels=len(labels), head="sequence_classification")
        model, rng = models.create(family, **LAYERS, **config), np.random.default_rng(0)
        drawn = lambda name, x: jnp.asarray(name.endswith("scale") + 0.3 * rng.normal(size=x.shape), x.dtype)
        params = trees.map_named(drawn, model.shapes())
        bigflax.save(model, params, str(home / name), tokenizer=words.get(tokenizer), labels=labels or ())

    folder("teacher")
    folder("other words", tokenizer=290)
    folder("other labels", labels=("colours", "animals"))
    folder("three labels", labels=("animals", "colours", "towns"))
    folder("images", "vit", tokenizer=None, labels=None, image_size=16, patch_size=4)
    folder("decoder", "llama", labels=None, num_key_value_heads=1, tie_word_embeddings=True)
    return home


def recipe(home, *overrides, **sections):
    """A student of one layer of a text classifier."""
    said = dict(
        work=str(home / "work"), model=dict(name="bert", **{**LAYERS, "num_hidden_layers": 1}), task=dict(name="classification"),
        teacher=dict(source=str(home / "teacher")), optimizer=dict(lr=3e-3), fit=dict(epochs=2, log_every=4),
        data=dict(source=dict(kind="jsonl", path=str(home / "train.jsonl")), validation_source=dict(kind="jsonl", path=str(home / "test.jsonl")),
                  length=16, batch_size=16),
    )  # fmt: skip
    for name, section in sections.items():
        said[name] = {**said.get(name, {}), **section} if isinstance(section, dict) else section
    return recipes.resolve(ConfigDict({name: section for name, section in said.items() if section is not None}), overrides)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


STEPS = {
    "soft labels": (dict(temperature=3.0, weight=0.7), dict(data=1)),
    "states and relations, on eight devices": (dict(states=0.3, related=0.2, heads=2), dict(data=2, fsdp=2, tensor=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("said, mesh", STEPS.values(), ids=STEPS)
def test_a_step_is_the_one_made_by_hand(home, said, mesh):
    """To the bit: the same weights and metrics as of a state that holds both, and none of the teacher's in what comes back."""
    run = taught.Taught(recipe(home, teacher=said, step=dict(accumulate=2)))
    run.mesh = sharding.make_mesh(**mesh, devices=jax.devices()[: math.prod(mesh.values())])
    run.check()
    assert run.tokenizer.vocab_size == run.model.config["vocab_size"] and run.classes == CLASSES
    with run.loader("train") as loader:
        batch = next(loader)
    begun = run.init_state()
    both = distill.taught(begun.weights, run.model.axes, run.teacher.params, run.teacher.model.axes)
    tx = optim.make(**run.config.optimizer, steps=run.steps, axes=both.axes)
    whole = train.init_state(both.params, tx, mesh=run.mesh, axes=both.axes, freeze=both.freeze)
    loss_fn = distill.lesson(run.loss_of, run.model, run.teacher.model, **said)
    whole, want = train.train_step(loss_fn, tx, whole, seed=run.config.seed, accumulate=2)(whole, batch)
    shapes = jax.tree.map(lambda x: (x.shape, x.sharding), begun)
    state, got = run.step(begun)(begun, batch)
    assert jax.tree.map(lambda x: (x.shape, x.sharding), state) == shapes
    assert {"task_loss", "distillation", "agreement"} <= got.keys()
    same(got, want)
    same(state.params, distill.untaught(whole.params))
    assert not [name for name, _ in trees.named_leaves(state) if "teacher" in name]


def test_a_student_begins_with_some_of_the_teachers_layers(home):
    run = taught.Taught(recipe(home, teacher=dict(every=2)))
    state, (_, params) = run.init_state(), bigflax.load(str(home / "teacher"))
    same(state.params["embed"], params["embed"])
    same(state.params["head"], params["head"])
    same(state.params["blocks"], jax.tree.map(lambda x: x[:1], params["blocks"]))
    narrow = taught.Taught(recipe(home, teacher=dict(every=2), model=dict(hidden_size=16)))
    with pytest.raises(ValueError, match=r"every 2\. of the teacher's layers: .* would be .*, and the student's is"):
        narrow.begin()


def test_what_the_teacher_has_no_weights_for_is_new(home):
    """A classifier of the layers of a decoder that was never one."""
    model = dict(name="llama", **{**LAYERS, "num_hidden_layers": 1}, num_key_value_heads=1, tie_word_embeddings=True)
    run = taught.Taught(recipe(home, model=model, teacher=dict(every=2, source=str(home / "decoder"))))
    params, (_, its) = run.init_state().params, bigflax.load(str(home / "decoder"))
    same(params["blocks"], jax.tree.map(lambda x: x[:1], its["blocks"]))
    assert params["head"]["scores"]["w"].shape == (32, 2)


MISTAKES = {
    "no such folder": (dict(source="nowhere"), {}, "there is no folder 'nowhere'"),
    "another vocabulary": (
        "other words", {"tokenizer": dict(kind="file", path="{}/teacher")}, "a vocabulary of its own, of 290 words where the student's has 280",
    ),
    "other labels": ("other labels", {}, "tells apart colours, animals, and the data have animals, colours"),
    "more labels": ("three labels", {}, "tells apart animals, colours, towns, and the data"),
    "another kind of input": ("images", {"tokenizer": dict(kind="file", path="{}/teacher")}, "a vit, reads pixel_values, and the student, a bert, input_ids"),
    "another task": ("decoder", {}, "they must read alike"),
    "two beginnings": (dict(every=2), {"model": dict(source="{}/teacher")}, "leave out one of the two"),
    "an attack": ("teacher", {"task": dict(attack=dict(name="pgd", on="embed/tokens", eps=0.5, steps=1))}, "leave out task.attack"),
    "other widths": (dict(states=1.0), {"model": dict(hidden_size=16)}, "their widths meet by"),
}  # fmt: skip


def begun(run):
    """What a run looks at before its first step."""
    run.check()
    with run.loader("train") as loader:
        run.check_end(loader, train.Watch("loss"))


@pytest.mark.parametrize("teacher, sections, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_before_training(teacher, sections, message, home):
    put = lambda x: {k: put(v) for k, v in x.items()} if isinstance(x, dict) else x.format(home) if isinstance(x, str) else x
    teacher = dict(source=str(home / teacher)) if isinstance(teacher, str) else teacher
    config = recipe(home, teacher=teacher, **put(sections))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        begun(taught.Taught(config))


def test_a_recipe_says_what_its_teacher_takes(home):
    with pytest.raises(ValueError, match=r"'teacher\.weigth'.*'weight'"):
        recipe(home, teacher=dict(weigth=1.0))
    unnamed = recipe(home).to_dict()
    del unnamed["teacher"]["source"]
    with pytest.raises(ValueError, match=r"must set 'teacher\.source'"):
        recipes.resolve(ConfigDict(unnamed))
    assert "teacher" not in recipe(home, teacher=None)
    assert recipe(home, f"teacher.source={home}/decoder", "teacher.weight=1.0", teacher=None).teacher.weight == 1.0
    alone = runs.Run(recipe(home, "data.unlabelled=True", teacher=None))
    with pytest.raises(ValueError, match=r"leave out data\.unlabelled, or give the recipe a section teacher"):
        alone.check()
    run = runs.Run(recipe(home))
    with pytest.raises(ValueError, match=r"make a taught\.Taught of it"):
        run.step(run.init_state())


# -- whole runs --------------------------------------------------------------------------------------------------------------


def written(home, name, config):
    """The file of a recipe."""
    path = home / f"{name}.py"
    path.write_text(f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({config!r})\n")
    return path


def kept(work):
    with Checkpoints(os.path.join(work, "checkpoints")) as checkpoints:
        return checkpoints._record(checkpoints.latest())["leaves"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_text_classifier_of_half_the_layers(home, capsys):
    """Learned, from texts alone, of the work folder of a run whose own beginning is gone, and written where the teacher is not any more."""
    text = dict(length=16, batch_size=16, source=dict(kind="jsonl", path=str(home / "train.jsonl")),
                validation_source=dict(kind="jsonl", path=str(home / "test.jsonl")))  # fmt: skip
    both = dict(task=dict(name="classification"), optimizer=dict(lr=3e-3), data=text, watch=dict(metric="accuracy", mode="max"))
    first = dict(both, work=str(home / "first"), model=dict(source=str(home / "teacher")), fit=dict(epochs=4, log_every=6))
    assert main(["train", f"--config={written(home, 'first', first)}"]) == 0
    student = dict(name="bert", **{**LAYERS, "num_hidden_layers": 1})
    both["data"] = dict(text, source=dict(kind="jsonl", path=str(home / "unlabelled.jsonl")), unlabelled=True)
    second = dict(both, work=str(home / "second"), model=student, fit=dict(steps=36, log_every=6, eval_every=12),
                  teacher=dict(source=str(home / "first"), every=2, weight=1.0))  # fmt: skip
    path = written(home, "second", second)
    (home / "teacher").rename(home / "moved")
    assert main(["train", f"--config={path}"]) == 0
    (home / "moved").rename(home / "teacher")
    assert f"taught by {home}/first" in capsys.readouterr().out
    records = read_jsonl(home / "second" / "metrics.jsonl")
    steps = [record for record in records if "agreement" in record]
    assert steps[-1]["agreement"] > 0.8 and steps[-1]["distillation"] < 0.5 * steps[0]["distillation"]
    assert not {"accuracy", "macro_f1", "task_loss"} & steps[-1].keys()
    assert max(record["eval/accuracy"] for record in records if "eval/accuracy" in record) > 0.8
    assert not [name for name in kept(home / "second") if "teacher" in name or "projections" in name]
    (home / "first").rename(home / "gone")
    assert main(["convert", str(home / "second"), str(home / "small")]) == 0
    (home / "gone").rename(home / "first")
    model, params = bigflax.load(str(home / "small"))
    assert model.config["num_hidden_layers"] == 1 and trees.count(params) < trees.count(bigflax.load(str(home / "teacher"))[1])


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_that_goes_on_asks_its_teacher_again(home):
    """Twelve steps at once, and six and six, give one student."""
    config = lambda work, steps: recipe(
        home, work=str(home / work), optimizer=dict(kind="constant"), fit=dict(epochs=None, steps=steps, log_every=1, save_every=6)
    )
    quiet = dict(make=taught.Taught, say=lambda text: None)
    for work, steps in [("straight", 12), ("in two", 6), ("in two", 12)]:
        assert runs.train_run(config(work, steps), allow_changes=True, **quiet) == 0
    same(*(exports.trained(str(home / work)).weights for work in ("straight", "in two")))
    straight, in_two = (
        [(r["step"], r["loss"], r["agreement"]) for r in read_jsonl(home / work / "metrics.jsonl") if "agreement" in r]
        for work in ("straight", "in two")
    )
    assert straight == in_two and len(straight) == 12


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_decoder_of_half_the_layers(home):
    """Of a folder of weights, all of whose tokenizer is the student's; its sample and its loss are those of any run."""
    student = dict(name="llama", **{**LAYERS, "num_hidden_layers": 1}, num_key_value_heads=1, tie_word_embeddings=True)
    packed = dict(
        source=dict(kind="text", path=str(home / "text")), validation_source=None, length=32, batch_size=8, validation_fraction=0.2
    )
    config = recipes.resolve(
        ConfigDict(
            dict(
                work=str(home / "decoded"), model=student, task=dict(name="causal_lm"), data=packed, optimizer=dict(lr=1e-2),
                teacher=dict(source=str(home / "decoder"), every=2, weight=1.0), fit=dict(steps=30, log_every=1, eval_every=30),
                sample=dict(prompt=WORDS[0], max_new_tokens=4),
            )
        )
    )  # fmt: skip
    assert runs.train_run(config, make=taught.Taught, say=lambda text: None) == 0
    records = read_jsonl(home / "decoded" / "metrics.jsonl")
    steps = [record for record in records if "agreement" in record]
    assert steps[-1]["distillation"] < 0.7 * steps[0]["distillation"]
    assert any("eval/bits_per_byte" in record for record in records)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_images_too(tmp_path):
    """A ViT of one layer by the run of one of two; the teacher sees the images that were mixed for the student."""
    path = make_photo_recipe(tmp_path)
    short = ["--config.fit.steps=10", "--config.fit.eval_every=10"]
    assert main(["train", f"--config={path}", *short]) == 0
    said = [f"teacher.source={tmp_path}/work", "teacher.every=2", "model.num_hidden_layers=1", "task.mixup=0.5", f"work={tmp_path}/small"]
    assert main(["train", f"--config={path}", *short, *(f"--config.{text}" for text in said)]) == 0
    assert "agreement" in read_jsonl(tmp_path / "small" / "metrics.jsonl")[0]
