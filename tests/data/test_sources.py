"""Laws of every source kind: its length, random access, the same record twice, stable names, pickling, and one clear sentence for what is
missing.
"""

import importlib.util
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from bigflax.data.sources import SOURCES, fingerprint, open_source

WORDS = ["alpha", "beta, with comma", 'gamma "quoted"\nsecond line', "delta é"]


def make_text(folder):
    (folder / "sub").mkdir()
    for i, word in enumerate(WORDS):
        (folder / ("sub" if i % 2 else ".") / f"{i}.txt").write_text(word, encoding="utf-8")
    (folder / ".hidden").write_text("not a document")
    return {"path": folder}, lambda record: record["text"].decode(), sorted(WORDS, key=lambda w: (WORDS.index(w) % 2, WORDS.index(w)))


def make_lines(folder):
    (folder / "a.txt").write_text("one\ntwo\r\n")
    (folder / "b.txt").write_text("three")
    return {"path": f"{folder}/*.txt", "per": "line"}, lambda record: record["text"].decode(), ["one", "two", "three"]


def make_jsonl(folder):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in WORDS[:3]))
    (folder / "b.jsonl").write_text(json.dumps({"text": WORDS[3]}, ensure_ascii=False), encoding="utf-8")
    return {"path": [folder / "a.jsonl", folder / "b.jsonl"]}, lambda record: record["text"], WORDS


def make_csv(folder):
    import csv

    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([i, w] for i, w in enumerate(WORDS))])
    return {"path": folder}, lambda record: record["text"], WORDS


def make_numpy(folder):
    np.save(folder / "x.npy", np.arange(12).reshape(4, 3))
    np.save(folder / "y.npy", np.arange(4))
    return {"path": folder}, lambda record: (record["x"].tolist(), int(record["y"])), [([3 * i, 3 * i + 1, 3 * i + 2], i) for i in range(4)]


def make_npz(folder):
    np.savez(folder / "d.npz", x=np.arange(4))
    return {"path": folder / "d.npz"}, lambda record: int(record["x"]), [0, 1, 2, 3]


def make_parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": WORDS, "n": [1, 2, 3, 4]}), folder / "a.parquet", row_group_size=3)
    return {"path": folder, "columns": ["text"]}, lambda record: record["text"], WORDS


def make_hf_saved(folder):
    import pyarrow as pa

    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    (folder / "train").mkdir()
    for part, words in enumerate((WORDS[:3], WORDS[3:])):
        table = pa.table({"text": words})
        with pa.OSFile(str(folder / "train" / f"{part}.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "0.arrow"}, {"filename": "1.arrow"}]}))
    return {"path": folder}, lambda record: record["text"], WORDS


def make_hf_parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir()
    pq.write_table(pa.table({"text": WORDS}), folder / "data" / "train-00000-of-00001.parquet")
    pq.write_table(pa.table({"text": ["held out"]}), folder / "data" / "test-00000-of-00001.parquet")
    return {"path": folder, "split": "train"}, lambda record: record["text"], WORDS


def make_array_record(folder):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for word in WORDS:
        writer.write(json.dumps({"text": word}).encode())
    writer.close()
    return {"path": folder}, lambda record: record["text"], WORDS


def make_images(folder):
    from PIL import Image

    for i in range(4):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (5, 7), (i, 0, 0)).save(folder / f"class{i % 2}" / f"{i}.png")
    return {"path": folder, "size": (7, 5)}, lambda r: (r["image"].shape, int(r["image"][0, 0, 0]), int(r["labels"])), [
        ((7, 5, 3), i, i % 2) for i in (0, 2, 1, 3)
    ]  # fmt: skip


CASES = {
    "text": ("text", make_text), "lines": ("text", make_lines), "jsonl": ("jsonl", make_jsonl), "csv": ("csv", make_csv),
    "numpy": ("numpy", make_numpy), "npz": ("numpy", make_npz), "parquet": ("parquet", make_parquet), "hf_saved": ("hf", make_hf_saved),
    "hf_parquet": ("hf", make_hf_parquet), "arrayrecord": ("arrayrecord", make_array_record), "images": ("images", make_images),
}  # fmt: skip
NEEDS = {"parquet": "pyarrow", "hf_saved": "pyarrow", "hf_parquet": "pyarrow", "arrayrecord": "array_record", "images": "PIL"}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param], reason="an extra")
    kind, make = CASES[request.param]
    options, show, want = make(tmp_path)
    return open_source(kind, **options), show, want


def test_holds_its_records_in_any_order(case):
    source, show, want = case
    assert len(source) == len(want)
    backward = [show(source[i]) for i in reversed(range(len(source)))]
    assert backward[::-1] == want == [show(source[i]) for i in range(len(source))]


def test_names_are_distinct_stable_and_free_of_the_folder(case, tmp_path):
    source, _, want = case
    names = [source.name(i) for i in range(len(want))]
    assert len(set(names)) == len(want)
    assert not any(str(tmp_path) in name for name in names)


def test_pickles_after_use(case):
    source, show, want = case
    show(source[0])
    other = pickle.loads(pickle.dumps(source))
    assert [show(other[i]) for i in range(len(other))] == want
    assert fingerprint(other) == fingerprint(source)


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind not in ("python", "tfds")])
@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.x", "empty"])
def test_nothing_there_is_one_sentence(kind, path, tmp_path):
    if kind in NEEDS or kind == "hf":
        pytest.importorskip(NEEDS.get(kind, "pyarrow"), reason="an extra")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        open_source(kind, path=str(tmp_path / path))
    assert path.split("/")[0] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("jsnl", {}, "'jsonl'"),
        ("jsonl", {"pth": "x"}, "'path'"),
        ("jsonl", {}, "needs path"),
        ("python", {"path": "x"}, "takes none"),
        ("text", {"path": ".", "per": "word"}, "'line'"),
    ],
)
def test_unknown_names_the_nearest(kind, options, said):
    with pytest.raises(ValueError, match=said):
        open_source(kind, **options)


def test_stdlib_is_sorted_text_without_tests():
    source = open_source("python")
    names = [source.name(i) for i in range(len(source))]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert b"class ArgumentParser" in source[names.index("argparse.py")]["text"]


def test_compressed_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="decompress"):
        open_source("jsonl", path=tmp_path / "a.jsonl.gz")


FAULTS = {
    "jsonl_cut": ("jsonl", "a.jsonl", b'{"text": "whole"}\n{"text": "cut', "truncated"),
    "jsonl_bytes": ("jsonl", "a.jsonl", b'{"text": "whole"}\n{"text": "\xff"}\n', "not UTF-8"),
    "jsonl_blank": ("jsonl", "a.jsonl", b'{"text": "whole"}\n\n', "empty"),
    "csv_cut": ("csv", "a.csv", b"id,text\n1,whole\n2", "truncated"),
    "csv_quote": ("csv", "a.csv", b'id,text\n1,whole\n2,"never closed\n', "not CSV"),
    "parquet": ("parquet", "a.parquet", b"PAR1 no", "not a whole Parquet"),
    "arrayrecord": ("arrayrecord", "a.array_record", b"\0" * 70_000, "not a whole ArrayRecord"),
    "image": ("images", "c/a.png", b"\x89PNG\r\n\x1a\n", "not a whole image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_record_is_a_value_not_an_exception(fault, tmp_path):
    kind, name, content, reason = FAULTS[fault]
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind], reason="an extra")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    source = open_source(kind, path=tmp_path)
    found = [source[i] for i in range(len(source))]
    assert "fault" in found[-1], found
    assert reason in found[-1]["fault"]
    assert all(record["text"] == "whole" for record in found[:-1])


TFDS_SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, tensorflow_datasets as tfds
class Made(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int32}))
    def _split_generators(self, _):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(5):
            yield i, {"text": f"record {i}", "n": i}
Made(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
from bigflax.data import open_source
source = open_source("tfds", name="made", data_dir=sys.argv[1])
print(sorted((source[i]["text"].decode(), int(source[i]["n"])) for i in range(len(source))), source.name(1), "tensorflow" in sys.modules)
try:
    open_source("tfds", name="absent", data_dir=sys.argv[1])
except FileNotFoundError as error:
    print(error)
"""


def test_tfds_without_tensorflow(tmp_path):
    if importlib.util.find_spec("tensorflow_datasets") is None:
        pytest.skip("tensorflow-datasets is an extra and not installed")
    (tmp_path / "made.py").write_text(TFDS_SCRIPT)
    command = [sys.executable, str(tmp_path / "made.py"), str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    found, missing = done.stdout.strip().splitlines()[-2:]
    assert found == f"{[(f'record {i}', i) for i in range(5)]} made/train:1 False"
    assert "'absent'" in missing
