"""Laws of the loader: the batches do not depend on devices, hosts or workers; the state is that of the last batch handed out; stalls are
seen.
"""

import json
import os
import socket
import subprocess
import sys
import time

import grain
import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from running import xla_flags

from bigflax.data import Loader, open_source, text_batches, virtual_shards
from bigflax.data.rows import Rows
from bigflax.data.text import byte_tokenizer


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


class Numbers:
    """Row k of shard v is [v, k], for ever or `lengths[v]` times."""

    def __init__(self, lengths=None):
        self.lengths = lengths

    def __call__(self, shard, shards):
        rows = grain.MapDataset.range(10**6 if self.lengths is None else self.lengths[shard])
        return rows.map(lambda k: {"x": np.array([shard, k], np.int32), "labels": np.int32(k)}).to_iter_dataset(grain.ReadOptions(0, 0))


MESHES = {
    "none": None,
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "data2fsdp4": {"data": 2, "fsdp": 4},
    "fsdp4tensor2": {"fsdp": 4, "tensor": 2},
    "tensor8": {"tensor": 8},
    "slice2data2fsdp2": {"slice": 2, "data": 2, "fsdp": 2},
}


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("shards", [1, 4, 8, 16])
def test_row_r_of_the_global_batch_is_that_of_its_shard(axes, shards):
    on = MESHES[axes] and mesh(**MESHES[axes])
    with Loader(Numbers(), batch_size=16, shards=shards, mesh=on) as loader:
        for step in range(3):
            batch = next(loader)
            rows = 16 // shards
            want = [[r // rows, step * rows + r % rows] for r in range(16)]
            np.testing.assert_array_equal(batch["x"], want)
            assert batch["labels"].shape == (16,)
            if on is not None:
                parts = np.prod([size for axis, size in MESHES[axes].items() if axis != "tensor"], dtype=int)
                assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(16 // parts, 2)}


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_each_run_a_part_of_the_shards_and_together_make_the_batch(hosts):
    with Loader(Numbers(), batch_size=16, shards=8) as loader:
        want = np.asarray(next(loader)["x"])
    parts = [list(range(h * 8 // hosts, (h + 1) * 8 // hosts)) for h in range(hosts)]
    frames = [Rows(part, Numbers(), 8, 2, {}).step() for part in parts]
    got = np.concatenate([frame.rows[v]["x"] for part, frame in zip(parts, frames, strict=True) for v in part])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_state_is_that_of_the_last_batch_handed_out(prefetch):
    with Loader(Numbers(), batch_size=8, prefetch=prefetch) as loader:
        for _ in range(3):
            next(loader)
        time.sleep(0.2)  # the thread is ahead now
        assert {position["next_index"] for position in loader.state()["positions"].values()} == {3}


@pytest.mark.parametrize("before", ["none", "data8"])
@pytest.mark.parametrize("after", ["fsdp4tensor2", "tensor8", "none"])
def test_resuming_on_another_mesh(before, after):
    make = lambda name: Loader(Numbers(), batch_size=16, mesh=MESHES[name] and mesh(**MESHES[name]))
    with make(before) as loader:
        next(loader)
        state, want = json.loads(json.dumps(loader.state())), np.asarray(next(loader)["x"])
    with make(after) as loader:
        loader.restore(state)
        np.testing.assert_array_equal(next(loader)["x"], want)


LENGTHS = {"even": [3, 3, 3, 3], "uneven": [5, 0, 1, 2], "nearly none": [0, 0, 0, 1]}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("on", ["none", "data8"])
def test_a_finite_stream_ends_when_all_shards_have_and_pads_till_then(case, on):
    lengths = LENGTHS[case]
    with Loader(Numbers(lengths), batch_size=8, shards=4, finite=True, mesh=MESHES[on] and mesh(**MESHES[on])) as loader:
        for _ in range(2):
            batches = [{key: np.asarray(value) for key, value in batch.items()} for batch in loader]
            real = [tuple(x) for batch in batches for x, label in zip(batch["x"], batch["labels"], strict=True) if label >= 0]
            assert sorted(real) == [(v, k) for v in range(4) for k in range(lengths[v])]
            assert len(batches) == max(-(-n // 2) for n in lengths)
            for batch in batches:
                assert (batch["x"][batch["labels"] < 0] == 0).all()
                assert (batch["labels"][batch["labels"] < 0] == -100).all()


def test_a_stream_of_nothing_is_named():
    with Loader(Numbers([0, 0]), batch_size=2, finite=True) as loader, pytest.raises(ValueError, match="no example"):
        next(loader)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 12, "mesh": {"data": 8}}, r"batch 12 does not divide over 8 devices on axes 'data'; nearest is 8"),
        ({"batch_size": 3, "mesh": {"data": 2, "fsdp": 4}}, "batch 3 .*nearest is 8"),
        ({"batch_size": 12, "shards": 5}, "shards=4 does"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_what_does_not_divide_is_refused(options, said):
    options = {**options, "mesh": mesh(**options["mesh"])} if "mesh" in options else options
    with pytest.raises(ValueError, match=said):
        Loader(Numbers(), **options)


def test_virtual_shards():
    assert [virtual_shards(b) for b in (1, 7, 16, 64, 96, 1000, 67)] == [1, 7, 16, 64, 48, 50, 1]


def test_a_state_of_another_stream_is_refused():
    with Loader(Numbers(), batch_size=8, identity={"seed": 0, "length": 3}) as loader:
        state = loader.state()
    with pytest.raises(ValueError, match=r"seed \(0 -> 1\)"):
        Loader(Numbers(), batch_size=8, identity={"seed": 1, "length": 3}).restore(state)
    with pytest.raises(ValueError, match="pass shards=8"):
        Loader(Numbers(), batch_size=16, identity={"seed": 0, "length": 3}).restore(state)


class Slow(Numbers):
    def __call__(self, shard, shards):
        return super().__call__(shard, shards).map(lambda row: time.sleep(0.02) or row)


def test_stall_counts_waiting_and_prefetch_hides_it():
    with Loader(Slow(), batch_size=1) as loader:
        for _ in range(5):
            next(loader)
        assert 0.06 < loader.stall  # five rows of 0.02 s, none of them hidden but by the start
    with Loader(Slow(), batch_size=1) as loader:
        next(loader)
        before = loader.stall
        for _ in range(5):
            time.sleep(0.06)  # a step three times as slow as the data
            next(loader)
        assert loader.stall - before < 0.03


def test_errors_come_out_and_stay():
    def broken(shard, shards):
        return grain.MapDataset.range(9).map(lambda k: {"labels": 1 // (3 - k)}).to_iter_dataset(grain.ReadOptions(0, 0))

    with Loader(broken, batch_size=1) as loader:
        for _ in range(3):
            next(loader)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                next(loader)


def test_examples_of_different_shapes_are_named():
    ragged = lambda shard, shards: grain.MapDataset.range(9).map(lambda k: {"x": np.zeros(k)}).to_iter_dataset()
    with Loader(ragged, batch_size=2, shards=1) as loader, pytest.raises(ValueError, match="same keys and shapes"):
        next(loader)


# -- worker processes and hosts: real ones ----------------------------------------------------------------------------------------------


def text_loader(folder, **options):
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i} " * (1 + i % 7))
    return text_batches(open_source("text", path=folder), byte_tokenizer(), length=16, batch_size=8, **options)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", [True, False])
def test_workers_change_nothing_and_resume(repeat, tmp_path):
    options = {"repeat": repeat, "shards": 4}
    with text_loader(tmp_path, **options) as loader:
        want = [np.asarray(batch["input_ids"]).tolist() for _, batch in zip(range(8), loader, strict=False)]
    with text_loader(tmp_path, workers=2, **options) as loader:
        got = [np.asarray(next(loader)["input_ids"]).tolist() for _ in range(3)]
        state = loader.state()
    with text_loader(tmp_path, workers=1, **options) as loader:
        loader.restore(state)
        got += [np.asarray(batch["input_ids"]).tolist() for _, batch in zip(range(5), loader, strict=False)]
    assert got == want


@pytest.mark.slow
def test_a_killed_worker_is_named(tmp_path):
    with text_loader(tmp_path, workers=1) as loader:
        next(loader)
        loader._ahead._produce._sources[0]._process.kill()
        with pytest.raises(RuntimeError, match="worker"):
            for _ in loader:
                pass


HOST = """
import json, sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, hosts, port, folder, state, repeat = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5], sys.argv[6] == "True"
if hosts > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", hosts, rank)
from bigflax.data import open_source, text_batches
from bigflax.data.text import byte_tokenizer
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
loader = text_batches(open_source("text", path=folder), byte_tokenizer(), length=16, batch_size=8, mesh=mesh, repeat=repeat, shards=4)
if state != "-":
    loader.restore(json.loads(state))
rows = []
for _, batch in zip(range(100 if not repeat else 3), loader):
    rows.append({int(s.index[0].start or 0): np.asarray(s.data).tolist() for s in batch["input_ids"].addressable_shards})
print(json.dumps([rows, loader.state(), sorted(loader._positions)]))
loader.close()
"""


def run_hosts(hosts, folder, repeat, state="-"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": xla_flags(4 // hosts)}
    command = [sys.executable, "-c", HOST]
    arguments = [str(hosts), str(port), str(folder), state, str(repeat)]
    running = [
        subprocess.Popen([*command, str(r), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for r in range(hosts)
    ]
    done = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), done
    found = [json.loads(out.strip().splitlines()[-1]) for out, _ in done]
    assert all(state == found[0][1] for _, state, _ in found)
    read = [shard for *_, shards in found for shard in shards]
    assert sorted(read) == sorted(found[0][1]["positions"])  # each virtual shard, so each record, is read by one host alone
    steps = []
    for parts in zip(*(rows for rows, *_ in found), strict=True):
        joined = {int(at): rows for part in parts for at, rows in part.items()}
        steps.append([row for at in sorted(joined) for row in joined[at]])
    return steps, json.dumps(found[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("repeat", [True, False])
def test_one_host_and_two_hosts_give_the_same_batches_and_resume_each_other(repeat, tmp_path):
    text_loader(tmp_path)
    one, state_one = run_hosts(1, tmp_path, repeat)
    two, state_two = run_hosts(2, tmp_path, repeat)
    assert one == two
    assert len(one) >= 3
    assert state_one == state_two
    if repeat:
        assert run_hosts(2, tmp_path, repeat, state_one) == run_hosts(1, tmp_path, repeat, state_two)
