"""A run that is killed, stopped, moved or started twice is the run that was left alone: losses, weights and data, to the bit."""

import hashlib
import os
import random
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from running import arguments, completed, ended, final, history, make_recipe, started, steps_done, steps_on_disk, temporary, wait_for

from bigflax import recipes, runs, sharding, writers
from bigflax.main import main

SAVE_EVERY = 3


@pytest.fixture
def recipe(tmp_path):
    return make_recipe(tmp_path)


# -- kill -9 ---------------------------------------------------------------------------------------------------------------

# When to kill a process, as seconds or as what to wait for and how many seconds more.
MOMENTS = {
    "while it starts": lambda chance, child, work, at: time.sleep(chance.uniform(0, 4)),
    "between two steps": lambda chance, child, work, at: (
        await_step(child, work, at + chance.randint(1, 7)) and time.sleep(chance.uniform(0, 0.1))
    ),
    "inside a save": lambda chance, child, work, at: (
        await_save(child, work, at + chance.randint(1, 7)) and time.sleep(chance.uniform(0, 0.03))
    ),
}


def await_step(child, work, step):
    return wait_for(lambda: steps_done(work) >= step, child)


def await_save(child, work, step):
    return await_step(child, work, step) and wait_for(lambda: temporary(work), child)


def kill(argv, work, moment, chance):
    """One life of a run, ended by SIGKILL at the moment; True if the run had finished before."""
    begun = max(steps_on_disk(work), default=0)
    with started(argv) as child:
        MOMENTS[moment](chance, child, work, begun)
        child.send_signal(signal.SIGKILL)
        code, out, _ = ended(child)
    assert code in (-signal.SIGKILL, 0)
    if said := re.search(r"resumed from step (\d+)", out):
        assert int(said[1]) == begun
    return code == 0


def check_survivor(work, whole):
    """What stands on disk after a kill: history as it must be, and a checkpoint at most two intervals back (one save may be running)."""
    seen = history(work)
    assert seen == whole[: len(seen)]
    assert max(steps_on_disk(work), default=0) > len(seen) - 2 * SAVE_EVERY - 1


@pytest.mark.slow
def test_killed_at_twenty_moments(recipe):
    """Every life, and the run left alone, is a process of its own, because bits may depend on a process's number of devices and threads."""
    moments = 2 * ["while it starts"] + 9 * ["between two steps"] + 9 * ["inside a save"]
    chance, work, torn = random.Random(0), recipe.parent / "work", 0
    chance.shuffle(moments)
    argv = arguments(recipe, "fit.steps=150", f"fit.save_every={SAVE_EVERY}")
    assert completed([*argv, f"--config.work={recipe.parent}/whole"]).code == 0
    whole, want = history(recipe.parent / "whole"), final(recipe.parent / "whole")
    assert len(whole) == want.step == 150
    for moment in moments:
        if kill(argv, work, moment, chance):  # too late: it had finished, so begin another
            assert final(work) == want
            shutil.rmtree(work)
        torn += bool(temporary(work))
        check_survivor(work, whole)
    code, _, err = completed(argv)
    assert code == 0, err
    assert (history(work), final(work)) == (whole, want)
    assert (temporary(work), torn >= 5) == ([], True)  # the temporary folders of the dead are gone, and there were some


# -- stopped, finished, changed ----------------------------------------------------------------------------------------------


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): as soon as that step is written, this process gets SIGTERM, as from a cluster that wants its machine back."""

    def arm(step):
        def write(self, at, values):
            if at == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(writers.TensorBoard, "write", write)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # should the run not catch it, the tests go on
    yield arm
    signal.signal(signal.SIGTERM, before)


def test_stop_finish_and_change(recipe, one_device, stop_at, capsys):
    """SIGTERM saves and exits with 75, the continuation equals a run that was not stopped, and then there is nothing left to do."""
    work, whole = recipe.parent / "work", recipe.parent / "whole"
    assert main(arguments(recipe, f"work={whole}")) == 0
    stop_at(5)
    assert main(arguments(recipe)) == 75
    assert "stopped by SIGTERM at step 5; everything is saved, the same command continues" in capsys.readouterr().out
    assert (steps_on_disk(work), len(history(work))) == ([3, 5], 5)

    assert main(arguments(recipe, "optimizer.lr=0.02", "data.workers=1")) == 2
    said = capsys.readouterr().err
    assert "optimizer.lr: 0.01 -> 0.02" in said and "--allow-changes" in said and "workers" not in said
    assert steps_on_disk(work) == [3, 5]
    changed = recipe.parent / "changed"
    shutil.copytree(work, changed)

    assert main(arguments(recipe)) == 0
    assert "resumed from step 5" in capsys.readouterr().out
    assert (history(work), final(work)) == (history(whole), final(whole))

    left = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert main(arguments(recipe)) == 0
    assert f"{work} holds the finished run of 12 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == left

    assert main([*arguments(recipe, f"work={changed}", "optimizer.lr=0.02"), "--allow-changes"]) == 0
    assert "changed: optimizer.lr: 0.01 -> 0.02" in capsys.readouterr().out
    assert history(changed)[:6] == history(whole)[:6]  # step 6's loss is still that of step 5's weights
    assert history(changed)[6:] != history(whole)[6:]


def test_an_early_stop_is_an_end(recipe, one_device, capsys):
    """The evaluation that ended a run ends it for good: a second start does not train past it."""
    argv = arguments(
        recipe,
        "optimizer.lr=3.0",
        "optimizer.clip=None",
        "fit.eval_every=1",
        "watch.patience=1",
        "fit.steps=40",
    )
    assert main(argv) == 0
    stopped, seen = steps_on_disk(recipe.parent / "work"), history(recipe.parent / "work")
    assert len(seen) < 40
    capsys.readouterr()
    assert main(argv) == 0
    assert "finished" in capsys.readouterr().out
    assert (steps_on_disk(recipe.parent / "work"), history(recipe.parent / "work")) == (stopped, seen)


# -- other meshes ------------------------------------------------------------------------------------------------------------


MESHES = {8: ("mesh.data=2", "mesh.fsdp=4"), 1: ("mesh.data=1",), 4: ("mesh.fsdp=2",)}


def run_on(recipe, devices):
    """The parts of the run on a mesh of some of this process's devices."""
    run = runs.Run(recipes.resolve(recipes.load(str(recipe)), MESHES[devices]))
    run.mesh = sharding.make_mesh(**run.config.mesh, devices=jax.devices()[:devices])
    return run


def hashes(loader, batches):
    """sha256 of each global batch."""
    taken = (next(loader) for _ in range(batches))
    return [hashlib.sha256(b"".join(np.asarray(batch[key]).tobytes() for key in sorted(batch))).hexdigest() for batch in taken]


def test_the_same_global_batches_on_8_then_1_then_4_devices(recipe):
    with run_on(recipe, 1).loader("train") as loader:
        whole = hashes(loader, 12)
    assert len(set(whole)) == 12
    seen, position = [], None
    for devices in MESHES:
        with run_on(recipe, devices).loader("train") as loader:
            if position is not None:
                loader.restore(position)
            seen += hashes(loader, 4)
            position = loader.state()
    assert seen == whole


@pytest.mark.slow
def test_restored_onto_8_then_1_then_4_devices(recipe):
    """The run goes on as on one device. Sums over a batch are taken in another order on each mesh, so losses agree to a few of float32's
    24 bits less: each step adds rounding of 2^-24 in gradients, which Adam (lr 0.01, moments divided by their root) carries into weights."""
    whole, work = recipe.parent / "whole", recipe.parent / "work"
    assert completed(arguments(recipe, f"work={whole}", "fit.steps=40", "optimizer.lr=1e-3")).code == 0
    for devices, mesh in MESHES.items():
        with started(arguments(recipe, "fit.steps=40", "optimizer.lr=1e-3", *mesh), devices) as child:
            begun = max(steps_on_disk(work), default=0)
            if devices != 4:
                await_step(child, work, begun + 4)
                child.terminate()
            code, out, err = ended(child)
        assert code == (0 if devices == 4 else 75), err
        assert devices == 8 or f"resumed from step {begun}" in out
    got, want = np.array(history(work)), np.array(history(whole))
    np.testing.assert_array_equal(got[:, 0], want[:, 0])
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-5)
