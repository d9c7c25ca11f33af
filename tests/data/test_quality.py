"""The policy for bad records: each kind is skipped, counted and quarantined once, or stops the run with one sentence that names it."""

import collections
import json

import pytest

from bigflax.data import BadRecord, Quality, open_source, text_batches
from bigflax.data.text import byte_tokenizer

CASES = {
    "not UTF-8": ({"text": b"ab\xff"}, "not UTF-8 (byte 2)"),
    "empty": ({"text": b" \n"}, "empty"),
    "long line": ({"text": "x" * 50 + "\n" + "y" * 101}, "a line of 101 characters (max_line is 100)"),
    "fault": ({"fault": "truncated"}, "truncated"),
    "field": ({"txet": "hello"}, "no field 'text', nearest is 'txet'"),
    "type": ({"text": 3}, "field 'text' is int, not text"),
}


@pytest.mark.parametrize("case", CASES)
def test_skip_counts_and_quarantines_once(case, tmp_path):
    record, reason = CASES[case]
    path = tmp_path / "new" / "bad.jsonl"
    quality = Quality(max_line=100, quarantine=path)
    assert quality({"text": "x" * 90 + "\n" + "é" * 90}, "good") is not None
    assert quality(record, "file:3") is None
    assert quality(record, "file:3") is None
    assert Quality(max_line=100, quarantine=path)(record, "file:3") is None  # a resumed run
    assert quality.bad == {"file:3": reason}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"name": "file:3", "reason": reason}]


@pytest.mark.parametrize("case", CASES)
def test_stop_names_the_record(case):
    record, reason = CASES[case]
    with pytest.raises(BadRecord) as error:
        Quality("stop", max_line=100)(record, "file:3")
    assert "file:3" in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_limit_counts_different_records(tmp_path):
    quality = Quality(max_bad=2, quarantine=tmp_path / "q")
    for _ in range(5):
        quality({"text": b""}, "a")
    quality({"text": b""}, "b")
    with pytest.raises(BadRecord, match=r"3 bad records, more than max_bad=2 allows; the first is a: empty"):
        quality({"text": b""}, "c")


def test_unknown_policy():
    with pytest.raises(ValueError, match="'skip' nor 'stop'"):
        Quality("ignore")


def corpus(folder, good=6, bad=2):
    folder.mkdir()
    for i in range(good):
        (folder / f"good{i}.txt").write_text(f"document {i} " * 20)
    for i in range(bad):
        (folder / f"bad{i}.txt").write_bytes(b"\xff\xfe" * 9)
    return open_source("text", path=folder)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_over_a_corpus_with_bad_files(workers, tmp_path):
    quality = Quality(quarantine=tmp_path / "bad.jsonl")
    options = {"length": 32, "batch_size": 4, "split": "all", "workers": workers}
    with text_batches(corpus(tmp_path / "c"), byte_tokenizer(), quality=quality, **options) as loader:
        for _ in range(30):  # several epochs
            next(loader)
        assert loader.bad == 2
    lines = [json.loads(line)["name"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(lines) == ["bad0.txt", "bad1.txt"]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stop_reaches_the_main_thread(workers, tmp_path):
    options = {"length": 32, "batch_size": 4, "split": "all", "workers": workers, "quality": Quality("stop")}
    with text_batches(corpus(tmp_path / "c"), byte_tokenizer(), **options) as loader, pytest.raises(BadRecord, match=r"bad\d\.txt"):
        collections.deque(loader, maxlen=0)


def test_a_corpus_of_nothing_but_bad_records_ends(tmp_path):
    source = corpus(tmp_path / "c", good=0)
    with text_batches(source, byte_tokenizer(), length=32, batch_size=4, split="all") as loader:
        with pytest.raises(ValueError, match=r"bad\d\.txt: not UTF-8"):
            next(loader)
