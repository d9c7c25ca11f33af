"""Several processes as one run, over gloo on this machine: the same weights, checkpoints that change hands, and an end for every mishap."""

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import ClassVar

import jax
import numpy as np
import pytest
from running import (
    arguments,
    completed,
    ended,
    history,
    make_recipe,
    make_text,
    restored,
    started,
    steps_done,
    steps_on_disk,
    wait_for,
    xla_flags,
)

from bigflax import hosts, trees

slow = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path):
    return make_recipe(tmp_path)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def processes(argv, count=2, devices=4):
    """`count` processes of one run."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        flags = lambda i: (f"--hosts={count}", f"--host={i}", address, "--timeout=120")
        yield [stack.enter_context(started([*argv, *flags(i)], devices)) for i in range(count)]


def all_ended(children):
    every = [ended(child) for child in children]
    assert len({one.code for one in every}) == 1, every
    return every


# -- one run, however many processes ---------------------------------------------------------------------------------------


def weights(state):
    return {name: np.asarray(leaf, np.float64) for name, leaf in trees.named_leaves(state.params)}


def distance(a, b):
    return np.sqrt(sum(((a[name] - b[name]) ** 2).sum() for name in a))


def assert_same(work, whole):
    """Losses of the same batches, and the weights they end in. Devices sum in another order: 2^-24 of rounding in a gradient, carried by Adam
    into weights step after step, stays below 1e-5 of the loss, and of the way that the weights have gone, while the learning rate is small
    (2e-6 after 40 steps; at lr 0.01, where this model diverges, it reaches 6e-5 after 60)."""
    got, want = np.array(history(work)), np.array(history(whole))
    np.testing.assert_array_equal(got[:, 0], want[:, 0])
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-5)
    (got, _), (want, begin) = restored(work), restored(whole)
    assert got.step == want.step
    assert distance(weights(got.state), weights(want.state)) < 1e-5 * distance(weights(want.state), weights(begin))


@slow
def test_two_processes_one_process_and_one_device_end_in_the_same_weights(recipe):
    """2 x 4 devices, 1 x 8, 1 x 1; the second of the two evaluates and trains its own tokenizer as well."""
    folder = lambda name: recipe.parent / name
    argv = lambda name, *mesh: arguments(
        recipe, f"work={folder(name)}", "fit.steps=20", "optimizer.lr=1e-3", "tokenizer.kind=bpe", "tokenizer.vocab_size=300",
        "fit.eval_every=10", *mesh,
    )  # fmt: skip
    mesh = ("mesh.data=2", "mesh.fsdp=4")
    assert completed(argv("one")).code == 0
    assert completed(argv("eight", *mesh), 8).code == 0
    with processes(argv("two", *mesh)) as children:
        assert all_ended(children)[0].code == 0
    assert_same(folder("eight"), folder("one"))
    assert_same(folder("two"), folder("one"))
    assert (folder("two") / "summary.json").exists()


@slow
def test_one_process_then_two_then_one(recipe):
    """Eight devices in one process, four in each of two, eight in one: one run. It changes hands by SIGTERM, sent to one process only."""
    work, whole = recipe.parent / "work", recipe.parent / "whole"
    argv = arguments(recipe, "fit.steps=120", "optimizer.lr=1e-3", "mesh.data=2", "mesh.fsdp=4")
    assert completed([*argv, f"--config.work={whole}"], 8).code == 0

    with started(argv, 8) as child:
        wait_for(lambda: steps_done(work) >= 4, child)
        child.terminate()
        assert ended(child).code == 75
    begun = steps_on_disk(work)[-1]

    with processes(argv) as children:
        wait_for(lambda: steps_done(work) >= begun + 4, children[0])
        children[1].terminate()
        first, second = all_ended(children)
    assert first.code == 75, first.err
    assert "resumed" not in second.out and "step" not in second.out  # the first process speaks for both
    assert f"resumed from step {begun}" in first.out
    stopped = int(re.search(r"stopped by a signal to one of the hosts at step (\d+)", first.out)[1])
    assert (steps_on_disk(work)[-1], len(history(work))) == (stopped, stopped)

    again = completed(argv, 8)
    assert again.code == 0, again.err
    assert f"resumed from step {stopped}" in again.out
    assert_same(work, whole)


# -- a loop of one's own ---------------------------------------------------------------------------------------------------

LOOP = """
import hashlib, json, sys, time
import jax
import numpy as np
import optax
import bigflax
from bigflax import data, losses

place, text, folder, steps = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
bigflax.start_hosts(**place)
mesh, tx = bigflax.make_mesh(), optax.adam(1e-2)
batches = data.text_batches(data.open_source("text", path=text), data.byte_tokenizer(), length=16, batch_size=8, mesh=mesh)
nats = lambda params, batch: losses.cross_entropy(params["bigram"][batch["input_ids"]], batch["labels"])
state = bigflax.init_state(lambda key: {"bigram": 0.1 * jax.random.normal(key, (264, 264))}, tx, mesh=mesh)
step = bigflax.train_step(lambda params, batch, rng: bigflax.Mean.of(nats(params, batch), batch["labels"] >= 0), tx, state)
with bigflax.Checkpoints(folder) as checkpoints, batches, bigflax.StopSignal() as stop:
    if checkpoints.latest() is not None:
        _, state, position, *_ = checkpoints.restore(state)
        batches.restore(position)
    for at in range(int(state.step) + 1, steps + 1):
        state, metrics = step(state, next(batches))
        print("step", at, float(metrics["loss"].value).hex(), flush=True)
        time.sleep(0.05)
        if stop.agreed():
            checkpoints.save(at, state, data=batches.state())
            sys.exit(stop.CODE)
    print(hashlib.sha256(np.asarray(state.params["bigram"]).tobytes()).hexdigest())
"""


@contextlib.contextmanager
def loops(text, folder, steps, *, count=2, said=(True, True), environments=({}, {}), **place):
    """`count` processes of LOOP; a process that is `said` its place is not left to find it."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        children = []
        for i in range(count):
            flags = {"coordinator": f"127.0.0.1:{port}", "processes": count, "index": i} if said[i] else {}
            env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(), "JAX_COORDINATOR_PORT": str(port), **environments[i]}
            command = [sys.executable, "-c", LOOP, json.dumps({"timeout": 60, **flags, **place}), str(text), str(folder), str(steps)]
            child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            children.append(stack.enter_context(child))
            stack.callback(child.kill)
        yield children


def until_step(child, step):
    """Reads the process's steps until it has done that one."""
    lines = []
    while not lines or lines[-1].split()[:2] != ["step", str(step)]:
        lines.append(child.stdout.readline().rstrip())
        assert lines[-1], child.stderr.read()
    return [line for line in lines if not line.startswith("[Gloo]")]


def finished(children, code=0):
    found = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [code] * len(children), [err[-2000:] for _, err in found]
    return [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(text, its lines): a run of two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("loop")
    text = make_text(folder / "text")
    with loops(text, folder / "whole", 80) as children:
        first, second = finished(children)
    assert first == second and len(first) == 81
    return text, first


@slow
@pytest.mark.parametrize("number, to", [("SIGTERM", (1,)), ("SIGTERM", (0, 1)), ("SIGINT", (0,)), ("SIGINT", (0, 1))], ids=str)
def test_a_signal_saves_on_all_hosts_and_resume_is_bit_equal(number, to, whole, tmp_path):
    """gloo's sums over the same hosts are in the same order each time. JAX looks for a SIGTERM once a second: 20 steps here, or one."""
    text, lines = whole
    with loops(text, tmp_path, 80) as children:
        seen = until_step(children[0], 5)
        for i in to:
            children[i].send_signal(signal.Signals[number])
        first, second = finished(children, code=75)
    assert [*seen, *first] == second
    assert second == lines[: len(second)] and 5 <= len(second) < 5 + 45
    with loops(text, tmp_path, 80) as children:
        first, second = finished(children)
    assert first == second == lines[-len(first) :]


@slow
def test_a_signal_before_the_first_step_of_a_resumed_run(whole, tmp_path):
    """The notice is older than the first step, whose number is not 1."""
    text, _ = whole
    with loops(text, tmp_path, 80) as children:
        until_step(children[0], 5)
        children[0].terminate()
        begun = len(finished(children, code=75)[1])
    with loops(text, tmp_path, 80) as children:
        wait_for(lambda: handles_sigterm(children[1].pid), children[1])
        children[1].terminate()
        first, _ = finished(children, code=75)
    assert 1 <= len(first) < 45 and first[0].startswith(f"step {begun + 1} ")


def handles_sigterm(pid):
    """Whether a process has a handler for SIGTERM, as JAX's distributed runtime installs one."""
    with open(f"/proc/{pid}/status") as file:
        caught = next(line.split()[1] for line in file if line.startswith("SigCgt"))
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


# -- mishaps ---------------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_dies_or_falls_silent_ends_the_other(number, whole, tmp_path):
    """By a failed collective or, 10 s after its last sign of life, by JAX, which aborts."""
    with loops(whole[0], tmp_path, 100000, heartbeat=10) as children:
        until_step(children[0], 3)
        children[1].send_signal(number)
        began = time.monotonic()
        _, err = children[0].communicate(timeout=120)
        assert time.monotonic() - began < 40
        assert children[0].returncode == -signal.SIGABRT, err
        assert "another task died" in err


@slow
def test_a_host_that_dies_ends_the_other_with_a_sentence(recipe):
    """gloo sees the closed connection at once. (A save in progress would wait for the heartbeat: its hosts meet through JAX's service.)"""
    work = recipe.parent / "work"
    argv = arguments(recipe, "fit.steps=100000", "fit.save_every=100000")
    with processes(argv, devices=1) as children:
        wait_for(lambda: steps_done(work) >= 4, children[0])
        children[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        code, _, err = ended(children[0], timeout=120)
    assert time.monotonic() - began < 60  # not the heartbeat's 100 s
    assert code == 2
    assert re.search(r"bigflax: .*\nbigflax: process 0 ends; if another one ended before it, that one's output says why\n$", err), err


@slow
@pytest.mark.parametrize("present", [0, 1])
def test_a_missing_host_is_named_in_time(present, recipe):
    """Whichever of two processes is alone waits for `--timeout` seconds, no longer, and says so."""
    flags = ("--hosts=2", f"--host={present}", f"--coordinator=127.0.0.1:{free_port()}", "--timeout=5")
    began = time.monotonic()
    with started([*arguments(recipe), *flags]) as child:
        code, _, err = ended(child)
    assert time.monotonic() - began < 200  # imports on a busy machine, not a wait of minutes
    assert code == 2
    said = rf"bigflax: process {present} on \S+ could not join 2 processes at 127.0.0.1:\d+ within 5 s: missing: {1 - present}\b.*\n"
    assert re.fullmatch(said, err), err


def meet(*places, seconds=2.0):
    """What each of these processes, threads here, ends with: None, or its error."""
    found = [None] * len(places)

    def one(i):
        try:
            hosts._meet(hosts.Place(*places[i]), time.monotonic() + seconds)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_all_who_came_learn_who_did_not():
    at = f"127.0.0.1:{free_port()}"
    assert meet(*((at, 3, i) for i in range(3))) == [None] * 3
    at = f"127.0.0.1:{free_port()}"
    assert [str(error) for error in meet((at, 5, 0), (at, 5, 2), (at, 5, 4))] == ["missing: 1, 3"] * 3
    assert [str(error) for error in meet((f"localhost:{free_port()}", 5, 3))] == ["missing: 0 (Connection refused)"]


def test_hosts_that_contradict_each_other():
    at = f"127.0.0.1:{free_port()}"
    assert {str(error) for error in meet((at, 2, 0), (at, 3, 1))} == {"process 1 counts 3 processes, process 0 2"}
    at = f"127.0.0.1:{free_port()}"
    assert "two processes say that they are process 1" in {str(error) for error in meet((at, 4, 0), (at, 4, 1), (at, 4, 1))}
    assert "is not an ADDRESS:PORT" in str(meet(("127.0.0.1", 2, 0))[0])
    assert "there is no process 2 among 2" in str(meet((at, 2, 2))[0])


def test_a_stranger_at_the_door_is_let_go():
    port, found = free_port(), []
    door = threading.Thread(target=lambda: found.extend(meet((f"127.0.0.1:{port}", 2, 0), seconds=30)))
    door.start()
    with hosts._knock(("127.0.0.1", port), time.monotonic() + 10) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert meet((f"127.0.0.1:{port}", 2, 1), seconds=30) == [None]
    door.join(30)
    assert found == [None]


# -- clusters --------------------------------------------------------------------------------------------------------------

# What a cluster sets in the environment of process i of two on this machine.
CLUSTERS = {
    "slurm": lambda i: dict(
        SLURM_JOB_ID="71", SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS="2", SLURM_PROCID=str(i), SLURM_LOCALID=str(i), SLURM_STEP_NUM_NODES="1"
    ),
    "gke": lambda i: dict(  # JAX_FORCE_TPU_INIT: taken for a TPU machine; one slice says so, lest its metadata server be asked
        JAX_FORCE_TPU_INIT="1", TPU_WORKER_ID=str(i), TPU_WORKER_HOSTNAMES="127.0.0.1,127.0.0.1", MEGASCALE_NUM_SLICES="1", MEGASCALE_SLICE_ID="0",
        MEGASCALE_COORDINATOR_ADDRESS="127.0.0.1", TPU_SKIP_MDS_QUERY="1",
    ),
    "jobset, two slices": lambda i: dict(
        JAX_FORCE_TPU_INIT="1", TPU_WORKER_ID="0", TPU_WORKER_HOSTNAMES="127.0.0.1", MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID=str(i),
        MEGASCALE_COORDINATOR_ADDRESS="127.0.0.1", TPU_SKIP_MDS_QUERY="1", JOB_COMPLETION_INDEX="0",
    ),
}  # fmt: skip


@slow
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_cluster_tells_each_process_its_place(cluster, whole, tmp_path):
    text, lines = whole
    with loops(text, tmp_path, 3, said=(False, False), environments=[CLUSTERS[cluster](i) for i in range(2)]) as children:
        assert [out[:3] for out in finished(children)] == [lines[:3]] * 2


@slow
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("present", [0, 1])
def test_a_host_that_a_cluster_did_not_start_is_named(cluster, present, tmp_path):
    with loops("-", tmp_path, 3, count=1, said=(False,), environments=[CLUSTERS[cluster](present)], timeout=3) as (child,):
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert re.search(rf"RuntimeError: process {present} on \S+ could not join 2 processes .* within 3 s: missing: {1 - present}\b", err), (
        err
    )


def test_where_nothing_tells_the_others(monkeypatch):
    with pytest.raises(ValueError, match=r"nothing here tells the coordinator and the processes and the index .* say --hosts=N"):
        hosts.find(None, None, None, 5)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert hosts.find("10.0.0.1:1", 4, None, 5) == ("10.0.0.1:1", 4, 3, None)


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a Cloud TPU machine is told: here the second host of the second of two slices, two hosts each."""

    ATTRIBUTES: ClassVar = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "a:1:10.0.0.3,b:2:10.0.0.4",
        "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n",
    }

    def do_GET(self):
        text = self.ATTRIBUTES.get(self.path.rpartition("/")[2])
        self.send_response(200 if text else 404)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def tpu_machine(monkeypatch):
    """This machine, taken for one of Cloud TPU; returns a function that says where its metadata server is."""
    pytest.importorskip("requests", reason="JAX asks the metadata server through requests")
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return lambda port: monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{port}")


def test_a_metadata_server_tells(tpu_machine):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        tpu_machine(server.server_port)
        try:
            assert hosts.find(None, None, None, 20) == ("10.0.0.1:8482", 4, 3, None)
        finally:
            server.shutdown()
            thread.join()


def test_a_metadata_server_that_does_not_answer(tpu_machine):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tpu_machine(silent.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"could not find the other hosts within 1 s: no answer"):
            hosts.find(None, None, None, 1)
        assert time.monotonic() - began < 10


def test_one_host_needs_no_others():
    with hosts.StopSignal() as stop:
        assert not stop.agreed()
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed() and (stop.received, stop.stopped, stop.CODE) == ("SIGINT", True, 75)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert jax.process_count() == 1
