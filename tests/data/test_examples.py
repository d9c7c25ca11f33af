"""Records with answers as rows: what each reader makes of a record, what it refuses, and that the rows come as they should."""

import json

import jax
import numpy as np
import pytest

from bigflax import data
from bigflax.data.quality import Quality

BYTES = data.byte_tokenizer()
CLASSES = ("no", "yes")
READERS = {  # reader -> a record that is good, and what its labels are
    "labelled": (data.labelled(BYTES, CLASSES, length=8), {"text": "abc", "label": "yes"}, 1),
    "labelled by number": (data.labelled(BYTES, CLASSES, length=8), {"text": b"abc", "label": np.array(1)}, 1),
    "labelled pair": (data.labelled(BYTES, CLASSES, length=8, pair="other"), {"text": "abc", "other": "d", "label": 0}, 0),
    "many": (data.many_labelled(BYTES, CLASSES, length=8), {"text": "abc", "labels": ["yes"]}, [0, 1]),
    "many between commas": (data.many_labelled(BYTES, CLASSES, length=8), {"text": "abc", "labels": "yes, no"}, [1, 1]),
    "none of many": (data.many_labelled(BYTES, CLASSES, length=8), {"text": "abc", "labels": ""}, [0, 0]),
    "scored": (data.scored(BYTES, length=8), {"text": "abc", "score": "0.5"}, 0.5),
    "unlabelled": (data.labelled(BYTES, CLASSES, length=8, unlabelled=True), {"text": "abc"}, -100),
    "unlabelled, the label none": (data.labelled(BYTES, CLASSES, length=8, unlabelled=True), {"text": "abc", "label": None}, -100),
    "unlabelled, with a label": (data.labelled(BYTES, CLASSES, length=8, unlabelled=True), {"text": "abc", "label": "no"}, 0),
    "unlabelled, of many": (data.many_labelled(BYTES, CLASSES, length=8, unlabelled=True), {"text": "abc"}, [-100, -100]),
    "unlabelled, without a score": (data.scored(BYTES, length=8, unlabelled=True), {"text": "abc"}, -100),
}


@pytest.mark.parametrize("name", READERS)
def test_a_row_is_the_text_and_its_label(name):
    read, record, labels = READERS[name]
    row = read(record, None)
    second = record.get("other", "").encode()
    np.testing.assert_array_equal(row["input_ids"], [*b"abc", *second, *[BYTES.pad_id] * (5 - len(second))])
    np.testing.assert_array_equal(row["attention_mask"], [1] * (3 + len(second)) + [0] * (5 - len(second)))
    np.testing.assert_array_equal(row["labels"], labels)
    assert ("token_type_ids" in row) == ("other" in record)


def test_texts_that_belong_together_are_rows_of_one():
    record = {"anchor": "ab", "positive": "c", "negative": "defg"}
    two, three = (data.paired(BYTES, length=3, negative=negative)(record, None) for negative in (None, "negative"))
    np.testing.assert_array_equal(three["input_ids"], [[97, 98, BYTES.pad_id], [99, BYTES.pad_id, BYTES.pad_id], [*b"def"]])
    np.testing.assert_array_equal(three["attention_mask"], [[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    for name in two:
        np.testing.assert_array_equal(two[name], three[name][:2])


@pytest.mark.parametrize("target, want", [("de", [*b"de", "end", -100]), ("defgh", [*b"def", "end"])])
def test_what_is_to_be_written_ends(target, want):
    row = data.translated(BYTES, length=5, target_length=4, prefix="to: ")({"source": "abc", "target": target}, None)
    np.testing.assert_array_equal(row["input_ids"], [*b"to: a"])
    np.testing.assert_array_equal(row["labels"], [BYTES.eos_id if x == "end" else x for x in want])


def test_a_text_that_its_tokenizer_ends_is_not_ended_twice(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    for text, want in {"a": [0, 3, 1, 2], "a a a": [0, 3, 3, 1]}.items():
        np.testing.assert_array_equal(data.ended(data.Tokenizer(inner), text, length=4)["input_ids"], want)


REFUSED = {
    "no text": ("labelled", {"txt": "a", "label": 0}, "no field 'text', nearest is 'txt'"),
    "no words": ("labelled", {"text": " ", "label": 0}, "field 'text' is empty"),
    "a number for a text": ("labelled", {"text": 3, "label": 0}, "field 'text' is int, not text"),
    "no label": ("labelled", {"text": "a", "lable": 0}, "no field 'label', nearest is 'lable'"),
    "a label out of range": ("labelled", {"text": "a", "label": 2}, "label 2 is none of the 2 classes; the nearest are"),
    "an unknown label": ("labelled", {"text": "a", "label": "yess"}, "label 'yess' is none of the 2 classes; the nearest are 'yes'"),
    "one unknown of many": ("many", {"text": "a", "labels": ["no", "maybe"]}, "label 'maybe' is none of the 2 classes"),
    "no number": ("scored", {"text": "a", "score": "good"}, "score 'good' is no number"),
    "not finite": ("scored", {"text": "a", "score": "nan"}, "score 'nan' is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    reader, record, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        READERS[reader][0](record, None)


ROWS = {  # texts, length -> the texts that are left
    "one that fits": (("abc", None), 3, b"abc"),
    "one that is cut": (("abcdef", None), 3, b"abc"),
    "a pair whose longer one is cut": (("abcdefgh", "xyz"), 8, b"abcdexyz"),
    "a pair of two long ones": (("abcdefgh", "uvwxyz"), 7, b"abcduvw"),
    "a pair whose second is cut": (("ab", "uvwxyz"), 7, b"abuvwxy"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_cut_from_the_longer_text(name):
    texts, length, want = ROWS[name]
    np.testing.assert_array_equal(BYTES.row(*texts, length=length)["input_ids"], [*want])


def test_a_row_has_the_marks_of_its_model(tmp_path):
    """As tokenizers itself makes them: [CLS] text [SEP] pair [SEP], types 0 and 1; what is cut is cut inside of the marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "[PAD]": 2, "[UNK]": 3, "a": 4, "b": 5}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.load_tokenizer(tmp_path)
    row = tokenizer.row("a a a a", "b", length=7)
    np.testing.assert_array_equal(row["input_ids"], [0, 4, 4, 4, 1, 5, 1])
    np.testing.assert_array_equal(row["token_type_ids"], [0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(tokenizer.row("a b", length=6)["input_ids"], [0, 4, 5, 1, 2, 2])
    with pytest.raises(ValueError, match="a length of 3 tokens, special ones included, leaves no room for a pair"):
        tokenizer.row("a", "b", length=3)


def lines(tmp_path, records):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return data.open_source("jsonl", path=str(tmp_path / "rows.jsonl"))


def test_every_good_record_comes_once_and_the_bad_ones_are_named(tmp_path):
    source = lines(
        tmp_path, [{"text": chr(97 + i), "label": "yes" if i % 2 else "no"} for i in range(10)] + [{"text": "z", "label": "maybe"}]
    )
    quality = Quality(field=None)
    read = data.labelled(BYTES, CLASSES, length=4)
    with data.record_batches(source, read, batch_size=4, split="all", repeat=False, quality=quality) as batches:
        rows = [row for batch in batches for row in zip(np.asarray(batch["input_ids"])[:, 0], np.asarray(batch["labels"]), strict=True)]
    assert sorted((int(a), int(b)) for a, b in rows if b != -100) == [(97 + i, i % 2) for i in range(10)]
    assert [*quality.bad] == ["rows.jsonl:11"]
    assert quality.bad["rows.jsonl:11"].startswith("label 'maybe' is none of the 2 classes; the nearest are")


def test_an_endless_stream_of_bad_records_says_so(tmp_path):
    source = lines(tmp_path, [{"txt": "a", "label": "yes"}] * 6)
    read = data.labelled(BYTES, CLASSES, length=4)
    with (
        data.record_batches(source, read, batch_size=4, validation_fraction=0.0) as batches,
        pytest.raises(
            ValueError, match=r"the train split holds no good record; the last one read is .*: no field 'text', nearest is 'txt'"
        ),
    ):
        next(batches)


def test_what_a_reader_draws_resumes(tmp_path):
    """The generator follows from (seed, epoch, index): the same rows after a restart, others in the next epoch, none outside of training."""
    source = lines(tmp_path, [{"text": chr(97 + i)} for i in range(8)])

    def read(record, rng):
        return {"draw": np.int64(-1 if rng is None else rng.integers(1 << 40)), "letter": np.int32(ord(record["text"]))}

    open_ = lambda **more: data.record_batches(source, read, batch_size=4, validation_fraction=0.0, **more)
    values = lambda batch: dict(zip(np.asarray(batch["letter"]).tolist(), np.asarray(batch["draw"]).tolist(), strict=True))
    with open_() as batches:
        first = values(next(batches)) | values(next(batches))
        position = batches.state()
        second = values(next(batches)) | values(next(batches))
    with open_() as batches:
        batches.restore(position)
        assert values(next(batches)) | values(next(batches)) == second
    assert first.keys() == second.keys() and not set(first.values()) & set(second.values())
    with open_(split="all", repeat=False) as batches:
        assert {*values(next(batches)).values()} == {-1}


def test_packed_records_come_once_each_and_resume(tmp_path):
    """Rows of several records, each whole and none twice; after a restart those that would have come."""
    records = [{"prompt": "q" * (1 + i % 7), "completion": chr(97 + i)} for i in range(20)]
    read = data.chat(BYTES, length=16)
    open_ = lambda **more: data.record_batches(lines(tmp_path, records), read, packed=16, batch_size=4, validation_fraction=0.0, **more)
    with open_(split="all", repeat=False) as batches:
        rows = [row for batch in batches for row in zip(*(np.asarray(batch[name]) for name in ("input_ids", "segment_ids")), strict=True)]
    found = [ids[segments == k].tolist() for ids, segments in rows for k in range(1, segments.max() + 1)]
    assert sorted(found) == sorted(read(record, None)["pairs"][:, 0].tolist() for record in records)
    assert len(rows) < 20
    with open_(seed=3) as batches:
        for _ in range(3):
            next(batches)
        position = batches.state()
        want = [jax.tree.map(np.asarray, next(batches)) for _ in range(4)]
    with open_(seed=3) as batches:
        batches.restore(position)
        for one in want:
            jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(np.asarray, next(batches)))
    with open_(seed=3, bins=2) as batches, pytest.raises(ValueError, match="the data stream is not the one that was saved; changed: bins"):
        batches.restore(position)


def test_classes_are_found_in_order(tmp_path):
    records = [{"text": "a", "label": label, "labels": labels} for label, labels in [("b", ["x"]), ("a", ["y", "x"]), ("b", [])]]
    assert data.find_classes([lines(tmp_path, records)], "label") == ("a", "b")
    assert data.find_classes([lines(tmp_path, records)], "labels") == ("x", "y")
    assert data.find_classes([lines(tmp_path, records)], "label", ("b", "a")) == ("b", "a")
    assert data.find_classes([lines(tmp_path, [{"label": i} for i in (10, 9, 1)])], "label") == ("1", "9", "10")
    with pytest.raises(ValueError, match="no record is of class 'c'; the field 'label' has 'b', 'a'"):
        data.find_classes([lines(tmp_path, records)], "label", ("a", "b", "c"))
    with pytest.raises(ValueError, match="the field 'labl' of the records holds nothing; to tell classes apart takes 2 or more"):
        data.find_classes([lines(tmp_path, records)], "labl")
