"""Every writer takes every record; the history reads as if the run had never been cut; the console is plain where nobody looks."""

import io
import json
import math
import re

import pytest

from bigflax import writers
from bigflax.writers import Console, Jsonl, TensorBoard, Writers, duration, line, open_writers, read_jsonl

RECORDS = [(step, {"loss": 4 - step / 100, "step_time": 0.05, "mfu": 0.25}) for step in range(10, 60, 10)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write_all(writer, records=RECORDS):
    for step, values in records:
        writer.write(step, values)
    writer.close()


LINES = {  # record -> what must stand on its line
    "loss first, then cost": ({"step_time": 0.0123, "loss": 2.5}, "step   20/1000  loss 2.5000  step 12.3ms"),
    "shares are percent": ({"mfu": 0.456, "data_stall": 0.0012}, "mfu 45.6%  stall 0.1%"),
    "units": ({"tokens_per_second": 21432, "memory": 3 * 2**29, "eta": 3700}, "tokens/s 21.4K  mem 1.5GiB  eta 1h01m"),
    "evaluation": ({"eval/loss": 2.0, "eval/bits_per_byte": 1.99}, "eval loss 2.0000  eval bits per byte 1.99"),
    "nan": ({"loss": math.nan, "eta": math.nan}, "loss nan  eta ?"),
}


@pytest.mark.parametrize("name", LINES)
def test_line(name):
    values, want = LINES[name]
    assert want in line(20, values, 1000)


@pytest.mark.parametrize(("seconds", "want"), [(0.42, "0.4s"), (59.6, "1m00s"), (90, "1m30s"), (3599.9, "1h00m"), (200000, "2d07h")])
def test_duration(seconds, want):
    assert duration(seconds) == want


def test_console_elsewhere_is_plain_lines():
    stream = io.StringIO()
    write_all(Console(50, stream=stream))
    assert stream.getvalue().splitlines() == [line(step, values, 50) for step, values in RECORDS]


def test_console_on_a_terminal_keeps_the_lines_whole(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    console = Console(50, stream=stream)
    console.print("saved [a name]")
    write_all(console)
    assert "\x1b[" in stream.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    lines = [row for row in plain if row and not row.startswith("training ")]  # the bar's own
    assert lines[:2] == ["saved [a name]", line(*RECORDS[0], 50)]
    assert all(line(step, values, 50) in lines for step, values in RECORDS)


def test_history_after_a_kill_and_a_resume_is_the_uninterrupted_one(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write_all(Jsonl(whole))
    write_all(Jsonl(cut), RECORDS[:4])
    with open(cut, "a") as file:
        file.write('{"step": 50, "lo')  # killed while writing
    write_all(Jsonl(cut, step=20), RECORDS[2:])
    assert cut.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {cut.name, whole.name}  # nothing is left aside


def test_history_is_on_disk_before_close_and_is_json(tmp_path):
    writer = Jsonl(tmp_path / "h.jsonl")
    writer.write(1, {"loss": math.inf})
    text = (tmp_path / "h.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None}
    assert math.isnan(read_jsonl(tmp_path / "h.jsonl")[0]["loss"])
    writer.close()


def test_a_new_run_begins_a_new_history(tmp_path):
    write_all(Jsonl(tmp_path / "h.jsonl"), [(0, {"eval/loss": 9.0}), *RECORDS])
    Jsonl(tmp_path / "h.jsonl").close()
    assert read_jsonl(tmp_path / "h.jsonl") == []


def test_a_file_that_is_no_history_is_not_touched(tmp_path):
    (tmp_path / "h.jsonl").write_text("precious\nnotes\n")
    with pytest.raises(ValueError, match="line 1, is not a record"):
        Jsonl(tmp_path / "h.jsonl")
    assert (tmp_path / "h.jsonl").read_text() == "precious\nnotes\n"


def test_tensorboard_events_read_back_and_purge_what_was_lost(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c

    write_all(TensorBoard(tmp_path))
    (file,) = tmp_path.iterdir()
    events = [Event.FromString(payload) for payload in tfrecords(file.read_bytes(), masked_crc32c)]
    got = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    assert got == pytest.approx({(step, tag): value for step, values in RECORDS for tag, value in values.items()})

    resumed = tmp_path / "resumed"
    TensorBoard(resumed, step=20).close()
    events = [Event.FromString(p) for f in resumed.iterdir() for p in tfrecords(f.read_bytes(), masked_crc32c)]
    assert [e.step for e in events if e.session_log.status == SessionLog.SessionStatus.START] == [21]


def tfrecords(data, masked_crc32c):
    while data:
        size = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        yield data[12 : 12 + size]
        data = data[16 + size :]


def test_open_writers_is_the_usual_set_for_one_process(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    stream = io.StringIO()
    write_all(open_writers(tmp_path / "run", total_steps=50, stream=stream))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "tensorboard"}
    assert len(stream.getvalue().splitlines()) == len(read_jsonl(tmp_path / "run/metrics.jsonl")) == len(RECORDS)

    write_all(open_writers(tmp_path / "other", enabled=False, stream=stream))
    assert not (tmp_path / "other").exists()
    assert len(stream.getvalue().splitlines()) == len(RECORDS)


def test_print_reaches_the_console_only(tmp_path):
    stream = io.StringIO()
    both = Writers(Jsonl(tmp_path / "h.jsonl"), Console(stream=stream))
    both.print("saved step 20")
    both.close()
    assert stream.getvalue() == "saved step 20\n"
    assert read_jsonl(tmp_path / "h.jsonl") == []


def test_wandb_when_it_is_and_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_PROJECT", "p")  # a variable left in the environment is no reason to stop
    open_writers(tmp_path / "a", tensorboard=False, stream=io.StringIO()).close()
    with pytest.raises(ValueError, match="pip install wandb"):
        open_writers(tmp_path / "b", tensorboard=False, wandb="p", stream=io.StringIO())
