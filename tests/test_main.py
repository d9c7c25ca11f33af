"""The commands, run in this process: what they print, write and return."""

import json
import re

import pytest
from running import arguments, history, make_recipe, steps_on_disk

from bigflax import __version__
from bigflax.main import main


@pytest.fixture
def recipe(tmp_path):
    return make_recipe(tmp_path)


def test_train_to_the_end_and_generate(recipe, one_device, capsys):
    work = recipe.parent / "work"
    (recipe.parent / "text" / "bad.txt").write_bytes(b"caf\xe9")
    argv = arguments(
        recipe,
        "fit.eval_every=6",
        "sample.prompt=the ",
        "sample.max_new_tokens=8",
        "yardsticks=True",
        "data.validation_fraction=0.1",
    )
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "gpt2: 22.1K parameters" in out and "batch 8 x 32 tokens" in out and "sample" in out
    assert "step 12/12" in out and "held-out bits per byte" in out and "gzip -9 bits per byte" in out

    assert steps_on_disk(work) == [6, 9, 12]
    assert [record[0] for record in history(work)] == list(range(1, 13))
    assert history(work)[-1][1] < history(work)[0][1] - 1
    assert (work / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((work / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((work / "quarantine.jsonl").read_text()) == {"name": "bad.txt", "reason": "not UTF-8 (byte 3)"}
    summary = json.loads((work / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["sample"].startswith("the ")
    said = re.search(r"^compiled the step in (\d+\.\d) s \(cache (hit|miss)\)$", out, re.MULTILINE)
    assert said and (float(said[1]), said[2]) == (summary["compile_seconds"], summary["compile_cache"])
    assert 0 < summary["eval/bits_per_byte"] < 8 and 0 < summary["gzip_-9_bits_per_byte"] < 8

    def generate(*more):
        assert main(["generate", f"--work={work}", "--prompt=the ", *more]) == 0
        return capsys.readouterr().out

    assert generate() == generate() == summary["sample"] + "\n"
    assert generate("--config.seed=1") != generate()
    assert main(["generate", f"--work={work}", "--prompt="]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_config_show(recipe, capsys):
    assert main(["config", "show", f"--config={recipe}", "--config.fit.steps=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"fit.steps = 7", "optimizer.b2 = 0.95", "model.n_embd = 32", "tokenizer.kind = 'bytes'"} <= set(lines)
    assert main(["config", "show", f"--config={recipe}", "--config.fit.steps=7", "--diff"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.n_embd: 64 -> 32" in lines and "tokenizer.kind: 'bpe' -> 'bytes'" in lines
    assert not any(line.startswith(("optimizer.b2", "fit.log_every: 10 -> 10")) for line in lines)


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"bigflax {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["trian"], ["config"], ["generate"]], ids=str)
def test_wrong_commands_show_the_usage(argv, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(argv)
    assert capsys.readouterr().err.startswith("usage: bigflax")
