"""What must not lose a run: kill -9 inside a save, damaged files, a full disk, a read-only folder, other numbers of processes.

Each failure is one sentence, the earlier checkpoints load to the bit, and nothing hangs.
"""

import contextlib
import errno
import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import xla_flags

from bigflax import stored
from bigflax.checkpoint import Checkpoints, restore_params, target_like

HERE = Path(__file__).parent
# where one of many arrays fails, Orbax closes its event loop, to which TensorStore then brings the others
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _unfinished_coroutines_end_with_their_test():
    yield
    gc.collect()


def state_of(step, size=100_000):
    """A state that every test and every process can make again: its numbers follow from `step`."""
    w = np.random.default_rng(step).normal(size=(8, size // 8)).astype(np.float32)
    return {"params": {"w": jnp.asarray(w)}, "opt": [jnp.asarray(w * 0.5), jnp.asarray(w**2)], "step": jnp.int32(step)}


def assert_is(state, step, size=100_000):
    want = jax.tree.map(np.asarray, state_of(step, size))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), state, want))


# -- damage after the save ---------------------------------------------------------------------------------------------


def files_of(place, item):
    return sorted((p for p in (place / item).rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)


def zeros(path, part=slice(None)):
    data = bytearray(path.read_bytes())
    data[part] = bytes(len(data[part]))
    path.write_bytes(data)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "largest file cut in half": lambda place: shorten(files_of(place, "params")[0]),
    "largest file emptied": lambda place: os.truncate(files_of(place, "rest")[0], 0),
    "largest file missing": lambda place: files_of(place, "params")[0].unlink(),
    "a page of zeros": lambda place: zeros(files_of(place, "rest")[0], slice(200_000, 204_096)),
    "one bit flipped": lambda place: flip(files_of(place, "params")[0]),
    "manifest zeroed": lambda place: zeros(place / "params" / "manifest.ocdbt"),
    "an item missing": lambda place: shutil.rmtree(place / "rest"),
    "record cut in half": lambda place: shorten(place / "record" / "record.json"),
    "record edited": lambda place: (f := place / "record" / "record.json").write_text(f.read_text().replace('"seen": 2', '"seen": 3')),
    "checksums missing": lambda place: (place / "record" / "checksums.0.json").unlink(),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), data={"seen": step}, metrics={"loss": 3 - step})
    return folder


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_sentence_that_names_what_can_be_used(case, two_steps, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    DAMAGE[case](folder / "2")
    with Checkpoints(folder, best=("loss", "min")) as checkpoints:
        with pytest.raises(
            ValueError, match=rf"^checkpoint {folder}/2 is damaged \(.*\); delete that folder to continue from step 1$"
        ) as caught:
            checkpoints.restore(target_like(state_of(0)))
        assert len(str(caught.value)) < 500
        assert checkpoints.best() in (1, 2)  # a damaged record has no rank
        found = checkpoints.restore(target_like(state_of(0)), step=1)
        assert_is(found.state, 1)
    shutil.rmtree(folder / "2")  # as the sentence says
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(target_like(state_of(0))).step == 1
        checkpoints.save(2, state_of(2))
    assert capfd.readouterr().err == ""


def test_damage_of_the_only_checkpoint(two_steps, tmp_path):
    shutil.copytree(two_steps / "2", tmp_path / "2")
    shorten(files_of(tmp_path / "2", "params")[0])
    with pytest.raises(ValueError, match=r"damaged .*; there is no earlier one"):
        restore_params(tmp_path)


# -- trouble while saving ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder, options):
    """A small file system of our own on `folder`; the test is skipped where we may not mount."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def needs_mount(test):
    return pytest.mark.skipif(shutil.which("mount") is None, reason="needs the `mount` command")(test)


def save_and_wait(checkpoints, step, size=100_000):
    checkpoints.save(step, state_of(step, size))
    checkpoints.wait()


FULL = {
    "seen at once": ("size=8m", True, "it needs 11.4MiB and the disk has .*MiB left, free some space"),
    "seen while writing": ("size=8m", False, "the disk is full, free some space or choose another folder"),
    "no room for names": ("size=30m,nr_inodes=70", False, "the disk is full, free some space or choose another folder"),
}


@needs_mount
@pytest.mark.parametrize("case", FULL)
def test_full_disk(case, tmp_path, monkeypatch):
    options, looks, reason = FULL[case]
    if not looks:
        monkeypatch.setattr(stored, "require_room", lambda folder, leaves: None)
    with mounted(tmp_path / "disk", options) as disk:
        checkpoints = Checkpoints(disk / "run", keep=1)
        checkpoints.save(1, state_of(1))  # 1.2 MB
        with pytest.raises(OSError, match=rf"^checkpoint 2 could not be saved in {disk}/run: {reason}; complete checkpoints: 1$") as caught:
            save_and_wait(checkpoints, 2, 1_000_000)  # 12 MB
        assert caught.value.errno == errno.ENOSPC
        assert_is(checkpoints.restore(target_like(state_of(0))).state, 1)
        if case != "no room for names":
            checkpoints.save(3, state_of(3))  # what the failed one had written is gone, and the run may go on
            assert_is(checkpoints.restore(target_like(state_of(0))).state, 3)
            assert checkpoints.all_steps() == [3]
        checkpoints.close()


def test_a_failure_is_not_lost_when_the_block_ends(tmp_path, monkeypatch):
    def save_in_block(folder, error):
        with Checkpoints(tmp_path / folder) as checkpoints:
            checkpoints.save(2, state_of(2))
            if error is not None:
                raise error

    monkeypatch.setattr(stored, "own_checksums", lambda blocks: 1 / 0)  # something in the background fails
    with pytest.raises(OSError, match="division by zero"):
        save_in_block("one", None)
    with pytest.raises(KeyError), pytest.warns(UserWarning, match="division by zero"):
        save_in_block("two", KeyError())


@needs_mount
def test_read_only_folder(two_steps, tmp_path):
    with mounted(tmp_path / "disk", "size=30m") as disk:
        shutil.copytree(two_steps, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for folder, complete in ((disk / "run", "1, 2"), (disk / "new", "none")):
            with Checkpoints(folder) as checkpoints:
                with pytest.raises(OSError, match=f"^checkpoint 3 could not be saved in {folder}: the folder is read-only.*: {complete}$"):
                    save_and_wait(checkpoints, 3)
        with Checkpoints(disk / "run") as checkpoints:
            assert_is(checkpoints.restore(target_like(state_of(0))).state, 2)  # reading writes nothing


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run"), Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state_of(1))


# -- kill -9 ---------------------------------------------------------------------------------------------------------------

SAVES_FOREVER = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from test_checkpoint_failures import *
folder, start = sys.argv[1], int(sys.argv[2])
import warnings; warnings.simplefilter("ignore")
with Checkpoints(folder, keep=2) as checkpoints:
    for step in range(start, start + 10_000):
        state = state_of(step, 800_000)
        checkpoints.save(step, state)
        print(step, flush=True)
"""


def kill_while_saving(folder, start, after):
    """Starts a process that saves step upon step, and kills it `after` seconds from its second save. Returns the last step it began."""
    child = subprocess.Popen([sys.executable, "-c", SAVES_FOREVER, str(folder), str(start)], stdout=subprocess.PIPE, text=True)
    try:
        begun = [child.stdout.readline() for _ in range(2)]
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
        return int((begun + child.stdout.readlines())[-1])
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def check_survivors(folder, begun):
    """All complete steps load to the bit, the one before the last begun among them; what is torn is named, then swept away."""
    temporary = sorted(p.name for p in folder.iterdir() if "tmp" in p.name)
    with pytest.warns(UserWarning, match="never loaded") if temporary else contextlib.nullcontext():
        checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.torn() == temporary
    steps = checkpoints.all_steps()
    assert begun - 1 in steps or begun in steps
    for step in steps:
        assert_is(checkpoints.restore(target_like(state_of(0, 800_000)), step=step).state, step, 800_000)
    latest = steps[-1]
    checkpoints.save(latest + 1, state_of(latest + 1, 800_000))
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == sorted(map(str, (latest, latest + 1)))
    return latest + 2


def test_kill_inside_a_save(tmp_path):
    begun = kill_while_saving(tmp_path, 1, after=0.03)
    check_survivors(tmp_path, begun)


@pytest.mark.slow
def test_kill_at_twenty_moments(tmp_path):
    start, moments = 1, random.Random(0)
    for _ in range(20):
        begun = kill_while_saving(tmp_path, start, after=moments.uniform(0, 0.5))
        start = check_survivors(tmp_path, begun)


GIVEN_UP = """
import asyncio, sys
from bigflax import checkpoint
checkpoint._orbax()
read = '''
async def read():
    try:
        await asyncio.get_running_loop().create_future()
    except BaseException:
        raise Exception("read given up")
'''
exec(compile(read, sys.argv[1], "exec"))
async def main():
    waiting = read()
    asyncio.get_running_loop().call_soon(waiting.send, None)
    await asyncio.sleep(0.01)
asyncio.run(main())
"""


@pytest.mark.parametrize("file, said", [("site-packages/orbax/serialization.py", False), ("mine.py", True)])
def test_reads_that_are_given_up_say_nothing_more(file, said):
    done = subprocess.run([sys.executable, "-c", GIVEN_UP, file], capture_output=True, text=True, check=True)
    assert ("read given up" in done.stderr) == said, done.stderr


def test_what_is_half_there_is_named_and_not_loaded(two_steps, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    shutil.copytree(folder / "2" / "params", folder / "4" / "params")  # a copy that was broken off
    (folder / "notes.txt").write_text("not ours")
    with pytest.warns(UserWarning, match=r"unfinished saves, which are never loaded .*: 3\.orbax-checkpoint-tmp, 4$"):
        checkpoints = Checkpoints(folder)
    assert (checkpoints.latest(), checkpoints.torn()) == (2, ["3.orbax-checkpoint-tmp", "4"])
    checkpoints.save(5, state_of(5))
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "4", "5", "notes.txt"]


# -- processes ---------------------------------------------------------------------------------------------------------------

MEMBER = f"""
import os, sys
index, port, folder, task = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = {xla_flags(4)!r}
import warnings; warnings.simplefilter("error")
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, 2, index)
sys.path.insert(0, {str(HERE)!r})
from test_checkpoint_failures import *
on_two(index, folder, task)
"""


def on_eight():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices())


def shardings(mesh):
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    return {"params": {"w": split}, "opt": [split, whole], "step": whole}


def on_two(index, folder, task):
    """What each of two processes does: `save` two steps, or `restore` what one process has saved, and look at its own shards."""
    place = shardings(on_eight())
    globally = lambda step: jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: np.asarray(x)[i]), state_of(step), place
    )
    with Checkpoints(folder, keep=2) as checkpoints:
        if task == "save":
            for step in (1, 2, 3):
                checkpoints.save(step, globally(step), data={"seen": step})
            assert checkpoints.all_steps() == [2, 3]
            with pytest.raises(ValueError, match="lives on one process only"):
                checkpoints.save(4, state_of(4))
        found = checkpoints.restore(target_like(globally(0)))
        for got, want in zip(jax.tree.leaves(found.state), jax.tree.leaves(globally(3)), strict=True):
            assert got.sharding == want.sharding
            for a, b in zip(got.addressable_shards, want.addressable_shards, strict=True):
                assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
        assert found.data == {"seen": 3}
    print("done", flush=True)


def run_two(folder, task):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(i), port, str(folder), task], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        deadline = time.monotonic() + 240
        while any(m.poll() is None for m in members) and not any(m.poll() for m in members) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for m in members:
            m.kill()  # where one has failed, the other waits for it in vain
    shown = [m.communicate() for m in members]
    assert [m.returncode for m in members] == [0, 0], shown


@pytest.mark.slow
def test_two_processes_and_one(tmp_path):
    """Two processes x 4 devices save; they, one process x 8, and one device restore; then the other way round."""
    run_two(tmp_path / "two", "save")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path / "two") as checkpoints:
        assert checkpoints.meta()["mesh"] == {"axes": {"fsdp": 8}, "devices": 8, "processes": 2, "platform": "cpu"}
        place = shardings(on_eight())
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state_of(0), place)
        eight = checkpoints.restore(target).state
        assert jax.tree.map(lambda x: x.sharding, eight) == place
        assert_is(eight, 3)
        assert_is(checkpoints.restore(target_like(state_of(0))).state, 3)
        assert_is({"params": restore_params(tmp_path / "two")} | {k: eight[k] for k in ("opt", "step")}, 3)
    flip(files_of(tmp_path / "two" / "2", "params")[0])
    with Checkpoints(tmp_path / "two") as checkpoints, pytest.raises(ValueError, match="damaged"):
        checkpoints.restore(target_like(state_of(0)), step=2)
    with Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(3, eight, data={"seen": 3})
    run_two(tmp_path / "one", "restore")
