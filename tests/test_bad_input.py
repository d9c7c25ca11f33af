"""What a person or a machine gets wrong ends in one clear sentence, exit code 2, and nothing lost."""

import contextlib
import os
import re
import shutil
import subprocess

import pytest
from running import arguments, completed, final, history, make_photo_recipe, make_recipe, steps_on_disk

from bigflax.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of six steps with checkpoints at 3 and 6, on one device, in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = make_recipe(folder)
    assert completed(arguments(recipe, "fit.steps=6")).code == 0
    return recipe


def one_sentence(err):
    """The sentence of a standard error stream that holds nothing else."""
    assert re.fullmatch(r"bigflax: [^\n]+\n", err), err
    return err.removeprefix("bigflax: ").rstrip()


# What is wrong -> arguments, what the sentence must say. {} is the folder of the test.
CASES = {
    "missing file": (["data.source.path={}/nowhere.txt"], "there is no file or folder '.*/nowhere.txt'; check the path"),
    "empty glob": (["data.source.path={}/*.md"], r"the pattern '.*/\*.md' matches no file"),
    "empty folder": (["data.source.path={}/empty"], "the folder '.*/empty' holds no visible file"),
    "unknown kind of source": (["data.source.kind=txet"], "there is no source kind 'txet'; the nearest is 'text'"),
    "unknown option of a source": (["data.source.pth=x"], "unknown key 'data.source.pth'; .*'path'"),
    "batch that does not divide": (["data.batch_size=12"], "batch 12 does not divide over 8 devices on axes 'data'; nearest is 8"),
    "no batch": (["data.batch_size=0"], "batch_size 0 .* must be at least 1"),
    "micro-batches that do not divide": (["step.accumulate=3"], "batch 8 does not divide into accumulate=3"),
    "mesh larger than the devices": (["mesh.data=16"], "mesh .*data=16.* needs 16 devices, but there are 8; give one axis the size -1"),
    "mesh that does not divide": (["mesh.fsdp=3"], "mesh .*fsdp=3.* needs a multiple of 3 devices, but there are 8"),
    "unknown key": (["fit.stpes=3"], "unknown key 'fit.stpes'; .*'steps'"),
    "unknown mesh axis": (["mesh.dta=8"], "unknown key 'mesh.dta'; .*'data'"),
    "value of another type": (["fit.steps=many"], "fit.steps is 12, a int; 'many' is a str"),
    "warm-up longer than the run": (["optimizer.warmup_steps=12"], "warmup_steps 12 must be at least 0 and below the 12 steps"),
    "unknown optimizer": (["optimizer.name=adamv"], "unknown optimizer 'adamv'; .*'adamw'"),
    "unknown task": (["task.name=casual_lm"], "unknown task 'casual_lm'; .*'causal_lm'"),
    "never a line of the log": (["fit.log_every=0"], "log_every 0 must be at least 1"),
    "vocabulary too small": (["model.vocab_size=100"], "model.vocab_size 100 is smaller than the tokenizer's 259"),
    "tokenizer's file missing": (["tokenizer.kind=file", "tokenizer.path={}/nowhere"], "there is no tokenizer file '.*/nowhere'; name"),
    "tokenizer's file not named": (["tokenizer.kind=file"], "tokenizer.kind 'file' needs tokenizer.path"),
    "tokenizer's file broken": (["tokenizer.kind=file", "tokenizer.path={}/recipe.py"], "'.*/recipe.py' is not a tokenizer.json"),
    "unknown tokenizer": (["tokenizer.kind=byte"], "unknown tokenizer kind 'byte'; .*'bytes'"),
    "bad records that stop": (["data.bad_records=stop", "data.source.path={}/bad"], "bad record .*: not UTF-8 .*bad_records='skip'"),
    "more bad records than allowed": (
        ["data.max_bad=0", "data.source.path={}/bad"],
        "1 bad records, more than max_bad=0 allows; the first is",
    ),
    "metric to watch that there is not": (["fit.eval_every=3", "watch.metric=acuracy"], "no metric 'acuracy' to watch; .*'accuracy'"),
    "head without words": (["model.head=sequence_classification"], "a loss of tokens needs a model with a language-model head"),
    "sample longer than the positions": (
        ["sample.prompt=the", "sample.max_new_tokens=40"],
        "4 tokens and 40 new ones do not fit .* 32 positions",
    ),
    "sample from an impossible choice": (["sample.prompt=the", "sample.temperature=-1.0"], "temperature -1.0, .* are to be .* at least 0"),
    "no work folder": (["work="], "the recipe names no work folder; add --config.work=DIR"),
    "work folder that is a file": (["work={}/recipe.py"], "recipe.py"),
}


@pytest.fixture
def setting(tmp_path):
    recipe = make_recipe(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "text", tmp_path / "bad")
    for i in range(40):  # the first that the run meets of this kind is bad
        (tmp_path / "bad" / f"b{i}.txt").write_bytes(b"caf\xe9")
    return recipe


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(case, setting, capsys, monkeypatch):
    overrides, want = CASES[case]
    argv = arguments(setting, *(text.replace("{}", str(setting.parent)) for text in overrides))
    assert main(argv) == 2
    assert re.search(want, one_sentence(capsys.readouterr().err))


def one_class(folder):
    shutil.rmtree(folder / "photos" / "down")


def no_images(folder):
    shutil.rmtree(folder / "photos")
    (folder / "photos" / "cats").mkdir(parents=True)


def corrupt(folder):
    for path in (folder / "photos" / "down").iterdir():
        path.write_bytes(path.read_bytes()[:100])


PHOTOS = {  # what becomes of the folder of images -> as above
    "no images": (no_images, [], "the folder '.*/photos' holds no .png or .* file"),
    "one class": (one_class, [], "all images are of one class, 'across'"),
    "corrupt files that stop": (corrupt, ["data.bad_records=stop"], r"bad record down/\d+.png: not a whole image: .*bad_records='skip'"),
    "more corrupt files than allowed": (corrupt, ["data.max_bad=3"], "4 bad records, more than max_bad=3 allows; the first is down/"),
    "another size than the model's": (None, ["model.image_size=32"], "model.image_size 32 is not data.size, 16; leave it out"),
    "other channels than the model's": (None, ["model.num_channels=1"], "model.num_channels 1 is not the 3 channels of data.mean"),
    "fewer labels than classes": (None, ["model.num_labels=1"], "model.num_labels 1 is smaller than the data's 2 classes"),
    "a task of words": (None, ["task.name=causal_lm"], "a loss of tokens needs a model with a language-model head"),
    "a sample": (None, ["sample.prompt=the"], "unknown key 'sample.prompt'"),
    "yardsticks": (None, ["yardsticks=True"], "unknown key 'yardsticks'"),
    "a view that cannot be": (None, ["data.flip=2.0"], "flip 2.0 is a chance"),
}


@pytest.mark.parametrize("change, overrides, want", PHOTOS.values(), ids=PHOTOS)
def test_one_sentence_of_images(change, overrides, want, tmp_path, capsys):
    recipe = make_photo_recipe(tmp_path)
    if change is not None:
        change(tmp_path)
    assert main(arguments(recipe, *overrides)) == 2
    assert re.search(want, one_sentence(capsys.readouterr().err))


COMMANDS = {
    "unknown recipe": (["train", "--config=quikstart"], "there is no recipe 'quikstart'; .*'quickstart'"),
    "recipe file missing": (["train", "--config=nowhere/x.py"], "there is no recipe file 'nowhere/x.py'"),
    "unknown argument": (
        ["train", "--confg.fit.steps=3"],
        "unknown argument '--confg.fit.steps=3'; a recipe's keys are written --config.key=value",
    ),
    "override without a value": (["train", "--config.fit.steps"], "has no value; write --config.fit.steps=VALUE"),
    "no fake devices": (["train", "--fake-devices=0"], "--fake-devices=0 is none; give 1 or more"),
    "host without hosts": (["train", "--host=1"], "--host and --coordinator need --hosts=N"),
    "nothing to generate from": (["generate", "--work=nowhere", "--prompt=a"], "there is no checkpoint in .*nowhere/checkpoints"),
}


@pytest.mark.parametrize("argv, want", COMMANDS.values(), ids=COMMANDS)
def test_one_sentence_for_a_wrong_command(argv, want, capsys):
    assert main(argv) == 2
    assert re.search(want, one_sentence(capsys.readouterr().err))


def test_what_is_wrong_is_found_before_work(setting, capsys):
    """A schedule, mesh or batch that cannot be costs no tokenizer training: nothing is written."""
    for override in ("optimizer.warmup_steps=12", "data.batch_size=12", "mesh.data=16"):
        assert main(arguments(setting, override, "tokenizer.kind=bpe")) == 2
        assert not (setting.parent / "work").exists(), override


# -- machines --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder, options):
    """A small file system on `folder`; the test is skipped where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None:
        pytest.skip("needs the `mount` command")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield lambda change: subprocess.run(["mount", "-o", f"remount,{change}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The same run, longer, and never in trouble."""
    work = tmp_path_factory.mktemp("whole") / "work"
    assert completed(arguments(trained, f"work={work}")).code == 0
    return history(work), final(work)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["work", "work/checkpoints"])
def test_full_disk(place, trained, whole, tmp_path):
    """The disk fills up in the middle of the run: earlier checkpoints stay, and with more room the run ends as if nothing had been."""
    argv = arguments(trained, f"work={tmp_path}/work", "checkpoint.keep=9")
    with mounted(tmp_path / place, "size=1100k") as remount:
        code, _, err = completed(argv)
        assert code == 2
        said, left = one_sentence(err), steps_on_disk(tmp_path / "work")
        complete = ", ".join(map(str, left))
        assert left and left[-1] < 12
        assert re.search(rf"checkpoint {left[-1] + 3} could not be saved in .*free some space.*; complete checkpoints: {complete}$", said)
        remount("size=20m")
        assert completed(argv).code == 0
        assert (history(tmp_path / "work"), final(tmp_path / "work")) == whole


@pytest.mark.slow
def test_read_only_folder(trained, tmp_path):
    with mounted(tmp_path / "disk", "size=20m") as remount:
        shutil.copytree(trained.parent / "work", tmp_path / "disk" / "old")
        shutil.rmtree(tmp_path / "disk" / "old" / "checkpoints" / "6")
        remount("ro")
        for name in ("new", "old"):
            code, _, err = completed(arguments(trained, f"work={tmp_path}/disk/{name}", "fit.steps=6"))
            assert code == 2
            assert re.match(f"Read-only file system: '{tmp_path}/disk/{name}", one_sentence(err))
        remount("rw")
        assert completed(arguments(trained, f"work={tmp_path}/disk/old", "fit.steps=6")).code == 0
        assert final(tmp_path / "disk" / "old") == final(trained.parent / "work")


@pytest.mark.slow
def test_corrupt_checkpoint(trained, tmp_path):
    """The sentence names the folder to delete; without it the run continues from the step before and ends alike."""
    work = tmp_path / "work"
    shutil.copytree(trained.parent / "work", work)
    (work / "summary.json").unlink()  # as if killed just before the end
    largest = max((work / "checkpoints" / "6" / "params").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    argv = arguments(trained, f"work={work}", "fit.steps=6")
    code, _, err = completed(argv)
    assert code == 2
    named = re.search(r"checkpoint (\S+) is damaged \(.*\); delete that folder to continue from step 3$", one_sentence(err))
    shutil.rmtree(named[1])
    assert completed(argv).code == 0
    assert final(work) == final(trained.parent / "work")
