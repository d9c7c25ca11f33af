"""Several processes as one run, over gloo on this machine: the same losses, checkpoints that change hands, and an end for every mishap."""

import contextlib
import re
import signal
import socket
import time

import numpy as np
import pytest
from running import arguments, completed, ended, history, make_recipe, started, steps_done, steps_on_disk, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path):
    return make_recipe(tmp_path)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def hosts(argv, count=2, devices=4):
    """`count` processes of one run."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        flags = lambda i: (f"--hosts={count}", f"--host={i}", address, "--timeout=120")
        yield [stack.enter_context(started([*argv, *flags(i)], devices)) for i in range(count)]


def all_ended(children):
    every = [ended(child) for child in children]
    assert len({one.code for one in every}) == 1, every
    return every


def assert_same(work, whole):
    """Losses of the same batches. Hosts sum in another order: 2^-24 of rounding in a gradient, carried by Adam into weights step after step,
    stays below 1e-5 of the loss while the learning rate is small (at 0.01, where this model diverges, it reaches 6e-5 after 60 steps)."""
    got, want = np.array(history(work)), np.array(history(whole))
    np.testing.assert_array_equal(got[:, 0], want[:, 0])
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-5)


def test_one_process_then_two_then_one(recipe, cache):
    """Eight devices in one process, four in each of two, eight in one: one run. It changes hands by SIGTERM, sent to one process only."""
    work, whole = recipe.parent / "work", recipe.parent / "whole"
    argv = arguments(recipe, "fit.steps=60", "optimizer.lr=1e-3", "mesh.data=2", "mesh.fsdp=4", cache=cache)
    assert completed([*argv, f"--config.work={whole}"], 8).code == 0

    with started(argv, 8) as child:
        wait_for(lambda: steps_done(work) >= 4, child)
        child.terminate()
        assert ended(child).code == 75
    begun = steps_on_disk(work)[-1]

    with hosts(argv) as children:
        wait_for(lambda: steps_done(work) >= begun + 4, children[0])
        children[1].terminate()
        first, second = all_ended(children)
    assert first.code == 75, first.err
    assert "resumed" not in second.out and "step" not in second.out  # the first process speaks for both
    assert f"resumed from step {begun}" in first.out
    stopped = int(re.search(r"stopped by a signal to another host at step (\d+)", first.out)[1])
    assert (steps_on_disk(work)[-1], len(history(work))) == (stopped, stopped)

    again = completed(argv, 8)
    assert again.code == 0, again.err
    assert f"resumed from step {stopped}" in again.out
    assert_same(work, whole)


def test_two_processes_from_the_start(recipe, cache):
    """One device each, and a tokenizer that both train."""
    work, whole = recipe.parent / "work", recipe.parent / "whole"
    argv = arguments(recipe, "tokenizer.kind=bpe", "tokenizer.vocab_size=300", "fit.eval_every=6", cache=cache)
    assert completed([*argv, f"--config.work={whole}"], 1).code == 0
    with hosts(argv, devices=1) as children:
        assert all_ended(children)[0].code == 0
    assert_same(work, whole)
    assert (work / "summary.json").exists()


@pytest.mark.parametrize("present", [0, 1])
def test_a_missing_host_is_named_in_time(present, recipe, cache):
    """Whichever of two processes is alone waits for `--timeout` seconds, no longer, and says so."""
    flags = ("--hosts=2", f"--host={present}", f"--coordinator=127.0.0.1:{free_port()}", "--timeout=5")
    began = time.monotonic()
    with started([*arguments(recipe, cache=cache), *flags]) as child:
        code, _, err = ended(child)
    assert time.monotonic() - began < 200  # imports on a busy machine, not a wait of minutes
    assert code == 2
    assert re.fullmatch(rf"bigflax: process {present} on \S+ could not join 2 processes at 127.0.0.1:\d+ within 5 s: .*\n", err), err


def test_a_host_that_dies_ends_the_other(recipe, cache):
    """No hang when a process is killed in the middle of a run, and the run goes on from its last checkpoint."""
    work = recipe.parent / "work"
    argv = arguments(recipe, "fit.steps=100000", cache=cache)
    with hosts(argv, devices=1) as children:
        wait_for(lambda: len(steps_on_disk(work)) >= 2, children[0])
        children[1].send_signal(signal.SIGKILL)
        code, _, err = ended(children[0], timeout=120)
    assert code not in (0, 75), err
    assert steps_on_disk(work)
