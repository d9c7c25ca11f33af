"""The notebooks of colab/: as files they are clean, run top to bottom they give the results that their text promises.

Each is executed once, in a kernel of its own and an empty folder, with few steps; a last cell, added here, hands over what its variables hold.
"""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

COLAB = Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(path.name for path in COLAB.glob("*.ipynb"))
slow = pytest.mark.slow


def cells(name, kind="code"):
    """id -> source of the cells of a kind."""
    return {c["id"]: "".join(c["source"]) for c in json.loads((COLAB / name).read_text())["cells"] if c["cell_type"] == kind}


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_files_are_clean(name):
    nbformat = pytest.importorskip("nbformat", reason='needs pip install "bigflax[notebooks]"')
    notebook = json.loads((COLAB / name).read_text())
    nbformat.validate(notebook)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    whole = "\n".join(cells(name).values())
    assert "token=" not in whole and "drive.mount" not in whole, "needs no account"


def test_all_install_alike():
    assert len({cells(name)["install"] for name in NOTEBOOKS}) == 1


# -- the install cell, with pip and what is installed played by the test ----------------------------------------------------


class Machine:
    """A machine where bigflax is not installed; `pip` are the commands given, `constraints` what the last one had to keep."""

    def __init__(self, monkeypatch, folder, returncode=0):
        self.pip, self.constraints, version = [], [], importlib.metadata.version
        (folder / "bigflax").mkdir()
        (folder / "bigflax" / "train.py").touch()
        (folder / "colab").mkdir()
        monkeypatch.chdir(folder / "colab")

        def find(name):
            if name == "bigflax" and not self.pip:
                raise importlib.metadata.PackageNotFoundError(name)
            return version(name)

        def run(command, **_):
            self.pip.append(command)
            self.constraints = Path(command[command.index("--constraint") + 1]).read_text().splitlines()
            return SimpleNamespace(returncode=returncode)

        monkeypatch.setattr(importlib.metadata, "version", find)
        monkeypatch.setattr(subprocess, "run", run)


def test_install_keeps_jax_and_what_is_loaded(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, tmp_path)
    exec(cells(NOTEBOOKS[0])["install"], {})
    assert machine.pip == [[sys.executable, "-m", "pip", "install", "--quiet", "--constraint", machine.pip[0][6], ".."]]
    there = {d.name: d.version for d in importlib.metadata.distributions()}
    jaxes = {f"{name}=={version}" for name, version in there.items() if name.startswith(("jax", "libtpu"))}
    assert {"jax", "jaxlib"} <= {line.partition("==")[0] for line in jaxes} and jaxes <= set(machine.constraints)
    assert f"pytest=={there['pytest']}" in machine.constraints, "loaded here, so it must stay"
    assert capsys.readouterr().out.startswith("bigflax ")


def test_install_does_nothing_where_bigflax_is(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path)
    machine.pip.append("done before")
    exec(cells(NOTEBOOKS[0])["install"], {})
    assert machine.pip == ["done before"]


def test_install_says_what_to_do(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, returncode=1)
    with pytest.raises(RuntimeError, match=r"does not fit jax .* choose a newer runtime"):
        exec(cells(NOTEBOOKS[0])["install"], {})
    machine.pip.clear()
    monkeypatch.chdir("/")
    with pytest.raises(FileNotFoundError, match="beside this notebook"):
        exec(cells(NOTEBOOKS[0])["install"], {})


# -- run top to bottom ------------------------------------------------------------------------------------------------------


def execute(name, folder, steps, report, insert=None):
    """Runs the notebook in `folder`, with the code `insert` = {id: code} after those cells.

    Returns what the expression `report` gives at the end, the text that each cell printed, by id, and the ids of those that drew.
    """
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason='needs pip install "bigflax[notebooks]"')
    import nbclient
    import nbformat

    notebook = nbformat.read(COLAB / name, as_version=4)
    for at, text in (insert or {}).items():
        after = [cell["id"] for cell in notebook.cells].index(at)
        notebook.cells.insert(after + 1, nbformat.v4.new_code_cell(text, id="inserted"))
    code = f"import json\nprint('\\nREPORT ' + json.dumps({textwrap.dedent(report).strip()}))"
    notebook.cells.append(nbformat.v4.new_code_cell(code, id="report"))
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "BIGFLAX_NOTEBOOK_STEPS": str(steps)}
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env={**env, "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_PLATFORM_DIRS": "1"})
    texts = {c["id"]: "".join(o.get("text", "") for o in c["outputs"]) for c in notebook.cells if c["cell_type"] == "code"}
    images = {c["id"] for c in notebook.cells if c["cell_type"] == "code" for o in c["outputs"] if "image/png" in o.get("data", {})}
    return json.loads(texts["report"].rpartition("REPORT ")[2]), texts, images


STEPS = 24
# The quickstart's text and code, with a model and a held-out part that take seconds.
SMALL = """
config.model.update(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
config.data.validation_fraction = 0.006
"""


@slow
def test_quickstart_learns_resumes_and_writes(tmp_path):
    report = """{
        "steps": [STEPS, MORE, first_steps, second_steps], "first": first, "second": second, "text": text, "prompt": PROMPT, "work": work,
        "checkpoints": Checkpoints(os.path.join(work, "checkpoints")).all_steps(),
        "history": [json.loads(line) for line in open(os.path.join(work, "metrics.jsonl"))],
    }"""
    found, texts, images = execute("01_quickstart.ipynb", tmp_path, STEPS, report, {"machine": SMALL})
    whole = STEPS + STEPS // 2
    assert found["steps"] == [STEPS, STEPS // 2, STEPS, whole]
    assert found["checkpoints"][-1] == whole
    assert f"resumed from step {STEPS} " in texts["more"]
    assert f"fit.steps: {STEPS} -> {whole}" in texts["more"]
    assert found["work"] == "./runs/quickstart-cpu"
    assert (tmp_path / "runs" / "quickstart-cpu" / "loss.png").is_file()
    assert images == {"curve"}

    losses = [record["loss"] for record in found["history"] if "loss" in record]
    assert losses[0] < math.log(2048) + 0.1
    assert losses[-1] < losses[0] - 0.5
    model = "this model"
    assert found["second"][model] < found["first"][model] < 8  # 8 bits a byte is what no model at all needs
    yardsticks = {name: value for name, value in found["first"].items() if name != model}
    assert list(yardsticks) == ["xz -9", "gzip -9", "3-gram"]
    assert all(1 < value < 3 for value in yardsticks.values())
    assert yardsticks == {name: value for name, value in found["second"].items() if name != model}
    shown = [(line[:12].strip(), float(line[12:18])) for line in texts["yardsticks"].splitlines()]
    assert shown == [(name, round(value, 2)) for name, value in sorted(found["first"].items(), key=lambda item: item[1])]
    assert found["text"].startswith(found["prompt"])
    assert len(found["text"]) > len(found["prompt"])


@slow
def test_your_own_step_is_what_its_text_says(tmp_path):
    report = """{
        "mesh": dict(mesh.shape), "batch": {name: list(x.shape) for name, x in batch.items()}, "rows": list(batch["input_ids"].sharding.spec),
        "layout": layout(state.params), "moments": [layout(state.opt[0].mu), layout(state.opt[0].nu)],
        "history": history, "compiled": step.compiled._cache_size(),
        "held_out": [before, after], "resumed": [found.step, int(resumed.step), same], "saved": Checkpoints(folder).all_steps(),
        "differ": float(max(abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(state)))),
        "nnx": [nnx_history, layout(nnx_state.params)], "taught": [untaught, taught],
        "teacher": all(np.array_equal(pupil.frozen["teacher"][name], big.params[name]) for name in big.params),
        "trains": [name for name, _ in trees.named_leaves(pupil.opt[0].mu)],
    }"""
    got, texts, _ = execute("02_your_own_step.ipynb", tmp_path, STEPS, report)
    assert got["mesh"] == {"data": 2, "fsdp": 4}
    assert got["batch"] == {name: [32, 64] for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    assert got["rows"] == [["data", "fsdp"]]
    # name -> whole shape, axes, the piece on each of the four devices of fsdp
    assert got["layout"] == {
        "embed": [[264, 32], ["fsdp"], [66, 32]], "up": [[256, 256], ["fsdp"], [64, 256]], "down": [[256, 264], [None, "fsdp"], [256, 66]],
    }  # fmt: skip
    assert got["moments"] == [got["layout"]] * 2
    assert "Adam's moments lie alike: True" in texts["state"]

    assert len(got["history"]) == STEPS
    assert abs(got["history"][0] - math.log(264)) < 1
    assert got["history"][-1] < got["history"][0] - 1
    assert got["held_out"][1] < got["held_out"][0] - 1
    assert got["resumed"] == [STEPS // 2, STEPS, True]
    assert (got["saved"], got["differ"], got["compiled"]) == ([STEPS // 2], 0, 1)

    history, layout = got["nnx"]
    assert history[-1] < history[0] - 1
    assert layout["mix/kernel"] == [[8, 32, 256], [None, None, "fsdp"], [8, 32, 64]]
    untaught, taught = got["taught"]
    assert all(taught[name] < untaught[name] for name in ("own", "divergence"))
    assert got["teacher"]
    assert got["trains"] == ["student/down", "student/embed", "student/up"]


def topics_and_weights(tmp_path):
    """A tiny BERT of random weights and texts whose topic is in their words, both of which lie where the notebooks look first."""
    import jax
    import numpy as np

    import bigflax
    from bigflax import data, models

    rng, topics = np.random.default_rng(0), {"animals": ["cat", "dog", "cow"], "colours": ["red", "blue", "green"]}
    text = lambda topic: " ".join(rng.permutation([*rng.choice(topics[topic], 3), *rng.choice(["the", "of", "and"], 3)]))
    for name, n in {"train": 128, "test": 32}.items():
        rows = [{"text": text(topic), "label": topic} for topic in topics for _ in range(n // 2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = data.train_bpe((text(topic) for topic in topics for _ in range(50)), 290)
    model = models.create("bert", size="tiny", vocab_size=tokenizer.vocab_size, head=None)
    bigflax.save(model, model.init(jax.random.key(0)), str(tmp_path / "weights"), tokenizer=tokenizer)


@slow
def test_fine_tuning_compares_and_writes(tmp_path):
    import numpy as np

    topics_and_weights(tmp_path)
    small = "for config in configs.values():\n    config.optimizer.lr, config.optimizer.warmup_steps = 3e-3, 2"
    report = """{
        "rows": len(rows), "found": found, "sizes": sizes, "classes": classes, "chances": [float(row.sum()) for row in chances],
    }"""
    got, texts, images = execute("03_finetune.ipynb", tmp_path, 0, report, {"recipe": small})
    assert got["rows"] == 128 and images == {"compare"}
    assert got["classes"] == {"0": "animals", "1": "colours"}
    np.testing.assert_allclose(got["chances"], 1, rtol=1e-5)
    full, lora = got["found"]["full"], got["found"]["lora"]
    assert full["best accuracy"] >= 0.9
    assert lora["trained"] < full["trained"] / 5 and lora["optimizer"] < full["optimizer"] / 5
    assert got["sizes"]["adapter"] < got["sizes"]["merged"] / 5
    assert "peft.name: None -> 'lora'" in texts["recipe"]
    assert " are frozen; the optimizer holds " in texts["lora"]


@slow
def test_a_student_is_measured_beside_its_teacher(tmp_path):
    topics_and_weights(tmp_path)
    small = "EPOCHS, STEPS = 4, 30\nconfig.optimizer.lr, config.optimizer.warmup_steps = 3e-3, 2"
    report = """{
        "rows": [[row.step, row.metrics["accuracy"], row.disk or row.memory, row.speed, row.kl] for row in report.rows],
        "without": without.rows[2].metrics["accuracy"], "classes": classes, "layers": model.config["num_hidden_layers"],
        "chances": [float(row.sum()) for row in chances],
    }"""
    got, _, images = execute("04_compress.ipynb", tmp_path, 0, report, {"settings": small})
    assert images == {"report"}
    steps, accuracy, size, speed, apart = zip(*got["rows"], strict=True)
    assert steps == ("start", "1-layers", "2-recover", "3-quantize-int8") and got["layers"] == 1
    assert accuracy[0] >= 0.9 and accuracy[3] >= 0.9
    assert size[3] < size[2] < size[0] and min(speed) > 0
    assert apart[0] is None and 0 < apart[1] and abs(apart[3] - apart[2]) < 0.01
    assert got["classes"] == {"0": "animals", "1": "colours"}


@slow
def test_vision_augments_learns_and_shows_its_errors(tmp_path):
    """On squares that stand in the upper or lower half, for digits 0 and 1, which lie where the notebook looks first."""
    import numpy as np

    rng = np.random.default_rng(0)
    for side, n in {"train": 512, "test": 96}.items():
        labels = np.arange(n) % 2
        image = rng.integers(0, 40, (n, 28, 28)).astype(np.uint8)
        for i, label in enumerate(labels):
            row, column = 4 + 12 * label, rng.integers(4, 16)
            image[i, row : row + 8, column : column + 8] = 220
        np.savez(tmp_path / f"digits-{side}.npz", image=image, labels=labels.astype(np.int32))
    report = """{"accuracy": accuracy, "table": table.tolist(), "step": int(step), "asked": len(true)}"""
    got, _, images = execute("05_vision.ipynb", tmp_path, STEPS, report)
    assert images == {"look", "wrong"}
    assert got["asked"] == 96 and sum(map(sum, got["table"])) == 96
    assert got["accuracy"] >= 0.9 and 0 < got["step"] <= STEPS
