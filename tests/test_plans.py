"""The verb `plan`: from a recipe and a topology to memory, time and money; nothing of the recipe's data is read."""

import importlib.util
import json

import pytest
from running import child_python

from bigflax import data, plans, recipes, topology
from bigflax.main import main

RECIPE = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        work="", model=dict(name="{family}", size="tiny", vocab_size=256, dtype="bfloat16"), tokenizer=dict(kind="file", path="there-is-none.json"),
        data=dict(source=dict(kind="text", path="nothing/*.txt"), length=128, batch_size=64, objective="{objective}"), task=dict(name="{task}"),
        optimizer=dict(lr=1e-3),
        mesh=dict(data=1, fsdp=-1), fit=dict(steps=1000),
    ))
"""


def recipe(tmp_path, family="llama", objective="causal", task="causal_lm"):
    path = tmp_path / f"{family}.py"
    path.write_text(RECIPE.format(family=family, objective=objective, task=task))
    return f"--config={path}"


def said(capsys, *argv):
    """(exit code, standard output) of the verb."""
    code = main(["plan", *argv])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "tpu7x:2x2x1"])
def test_fast(tmp_path, capsys, topology):
    code, out = said(capsys, recipe(tmp_path), f"--topology={topology}", "--fast", "--json", "--price=2.5")
    found = json.loads(out)
    assert (code, found["source"], found["topology"], found["mesh"]["fsdp"]) == (0, "estimate", topology, 8)
    assert found["tokens"] == 64 * 128
    assert found["dollars"] == pytest.approx(1000 * found["step_seconds"] / 3600 * found["chips"] * 2.5)


def test_slices_are_the_outermost_axis(tmp_path, capsys):
    code, out = said(capsys, recipe(tmp_path), "--topology=v5e:2x2", "--slices=2", "--fast", "--json")
    found = json.loads(out)
    assert (code, found["mesh"]["slice"], found["mesh"]["fsdp"]) == (0, 2, 4)
    assert found["seconds"]["dcn"] > 0


def test_an_encoder(tmp_path, capsys):
    code, out = said(capsys, recipe(tmp_path, "bert", "masked", "masked_lm"), "--topology=v5e:2x4", "--fast")
    assert code == 0 and "fits in 15.75" in out and "bound by" in out


def test_search(tmp_path, capsys):
    code, out = said(capsys, recipe(tmp_path), "--topology=v5e:2x4", "--fast", "--search")
    assert code == 0 and "layouts by the estimate" in out
    best = next(line for line in out.splitlines() if line.startswith("the best: ")).removeprefix("the best: ")
    assert all(flag.startswith("--config.") for flag in best.split())
    code, again = said(capsys, recipe(tmp_path), "--topology=v5e:2x4", "--fast", "--json", *best.split())  # as it says, so it is
    assert json.loads(again)["step_seconds"] * 1e3 == pytest.approx(float(out.split("a step takes at least ")[1].split(" ms")[0]), abs=0.06)


def test_what_does_not_fit_is_told_what_to_change(tmp_path, capsys):
    large = ["--config.model.hidden_size=4096", "--config.model.intermediate_size=16384", "--config.model.num_hidden_layers=24"]
    code, out = said(capsys, recipe(tmp_path), "--topology=v5e:2x2", "--fast", *large)
    assert code == 1 and "DOES NOT FIT" in out and "take --topology=v5e:4x" in out
    code, out = said(capsys, recipe(tmp_path), "--topology=v5e:4x4", "--fast", *large, "--config.mesh.fsdp=1", "--config.mesh.data=-1")
    assert code == 1 and "by the estimate it fits with --config.mesh." in out


MISTAKES = {
    "chip": (["--topology=v9:2x2"], "unknown chip 'v9'"),
    "shape": (["--topology=v5p:2x2"], "not of 3 dimensions"),
    "mesh": (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "mesh"),
    "batch": (["--topology=v5e:2x4", "--config.data.batch_size=12"], "batch 12 does not divide over 8 devices"),
    "picture": (["--topology=v5e:2x4", "--picture=plan.pdf"], "must end in .svg or .png"),
    "search": (["--topology=v5e:2x4", "--search", "--config.data.batch_size=3", "--config.model.num_attention_heads=5"], "5"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(tmp_path, capsys, case):
    argv, message = MISTAKES[case]
    assert main(["plan", recipe(tmp_path), "--fast", *argv]) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1


def test_picture(tmp_path, capsys):
    assert said(capsys, recipe(tmp_path), "--topology=v5e:2x4", "--fast", f"--picture={tmp_path}/plan.svg")[0] == 0
    assert b"temporaries" in (tmp_path / "plan.svg").read_bytes() or (tmp_path / "plan.svg").stat().st_size > 5000


def test_the_batch_is_that_of_the_loader(tmp_path):
    """`text_shapes` says what a loader would, of the quickstart's own source."""
    for objective, more in (("causal", {}), ("masked", {"token_type_ids": True}), ("masked", {})):
        tokenizer = data.byte_tokenizer() if objective == "causal" else data.load_tokenizer("bytes", mask="[MASK]")
        options = dict(length=32, batch_size=4, objective=objective, **more)
        loader = data.text_batches(data.open_source("python"), tokenizer, **options)
        of = lambda spec: {name: (x.shape, x.dtype) for name, x in spec.items()}
        assert of(loader.spec) == of(data.text_shapes(**options))


def test_the_quickstart_needs_no_data_for_its_plan():
    config = recipes.resolve(recipes.load("quickstart"))
    assert plans.estimated(config, topology.parse("v5e:2x2")).fits


def test_a_recipe_of_images(tmp_path, capsys):
    """Nothing of its folder is read, so the number of classes is to be said; the batch counts rows."""
    code, out = said(capsys, "--config=vit:tiny", "--topology=v5e:2x2", "--fast", "--json", "--config.model.num_labels=10")
    assert code == 0 and json.loads(out)["tokens"] == 64
    assert main(["plan", "--config=vit:tiny", "--topology=v5e:2x2", "--fast"]) == 2
    assert "the recipe must set 'model.num_labels': the data do not say it" in capsys.readouterr().err
    code, out = said(capsys, "--config=vit:base", "--topology=v5e:2x4", "--fast", "--search")
    assert code == 0 and "the best: " in out


RECIPES = {  # of those that come with the package, what their slice is: all fit there
    "gpt2_124m": "v5e:2x4",
    "llama3:1b": "v5e:4x4",
    "llama3:8b": "v5e:4x4",
    "llama3:70b": "v5p:4x4x4",
    "qwen3_30b_a3b": "v5p:4x4x4",
    "bert_mlm:base": "v5e:2x2",
    "vit:base": "v5e:2x4",
    "vit:large": "v5e:4x4",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_their_slices(name):
    config = recipes.resolve(recipes.load(name))
    found = plans.estimated(config, topology.parse(RECIPES[name]))
    assert found.fits, found.table()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["libtpu", "none"])
def test_compiled_in_a_child(tmp_path, compiler):
    """The whole verb in a process of its own, by the TPU compiler, and where there is none by a CPU's on as many fake devices."""
    if compiler == "libtpu" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler (extra plan) is not installed")
    hide = "topology.has_compiler = lambda: False\n" if compiler == "none" else ""
    # the child is another process: what is hidden here must be hidden there
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nf = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'libtpu' else f(n, *a)"
    )
    argv = ["plan", recipe(tmp_path), "--topology=v5e:2x4", "--json"]
    code = f"import sys\nfrom bigflax import topology\nfrom bigflax.main import main\n{hide}sys.exit(main({argv!r}))"
    import os

    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])} if compiler == "none" else None
    found = json.loads(child_python(code, env=env).splitlines()[-1])
    assert found["source"].startswith("TPU" if compiler == "libtpu" else "CPU")
    assert found["fits"] and found["traffic"] and found["memory"]["temporaries"] > 0
