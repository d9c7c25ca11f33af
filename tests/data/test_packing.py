"""Laws of rows: packing loses no token and crosses no document; masking asks for the right share and is a function of seed, epoch and
index.
"""

import itertools

import grain
import numpy as np
import pytest

from bigflax.data.packing import IGNORED, Mask, Pieces, cut, document, pack

BOS, EOS, PAD = 1, 2, 0
LENGTHS = [1, 2, 7, 8, 9, 16, 17, 40, 3, 3, 3, 25]


def documents():
    """Token ids are unique over all documents, so that a row tells where each of its tokens comes from."""
    start = 10
    for n in LENGTHS:
        yield np.concatenate(list(document([np.arange(start, start + n, dtype=np.int32)], BOS, EOS)))
        start += n


def packed(length, bins, seed=0):
    source = [{"ids": ids} for ids in documents()]
    flat = Pieces(grain.MapDataset.source(source).to_iter_dataset(), lambda element: cut([element["ids"]], length))
    return list(pack(flat, length, bins=bins, pad_id=PAD, seed=seed))


@pytest.mark.parametrize("length", [3, 8, 16, 64])
def test_cutting_asks_for_every_token_once(length):
    for ids in documents():
        pairs = [piece["pairs"] for piece in cut([ids], length)]
        assert all(1 <= len(p) <= length for p in pairs)
        np.testing.assert_array_equal(np.concatenate(pairs), np.stack([ids[:-1], ids[1:]], 1))


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_cutting_does_not_see_how_the_ids_come(size):
    for ids in documents():
        whole, parts = cut([ids], 8), cut((ids[start : start + size] for start in range(0, len(ids), size)), 8)
        assert [p["pairs"].tolist() for p in whole] == [p["pairs"].tolist() for p in parts]


@pytest.mark.parametrize("bins", [1, 3, 8])
@pytest.mark.parametrize("length", [3, 8, 16, 64])
class TestPacking:
    def test_every_label_once_and_beside_its_input(self, length, bins):
        want = sorted((int(a), int(b)) for ids in documents() for a, b in itertools.pairwise(ids))
        rows = packed(length, bins)
        got = [(int(a), int(b)) for r in rows for a, b, s in zip(r["input_ids"], r["labels"], r["segment_ids"], strict=True) if s]
        assert sorted(got) == want

    def test_a_segment_is_one_piece_of_one_document(self, length, bins):
        pieces = {tuple(p["pairs"][:, 0]) for ids in documents() for p in cut([ids], length)}
        for row in packed(length, bins):
            segments = row["segment_ids"]
            for number in range(1, segments.max() + 1):
                (where,) = np.nonzero(segments == number)
                assert tuple(row["input_ids"][where]) in pieces
                np.testing.assert_array_equal(row["position_ids"][where], np.arange(len(where)))
                np.testing.assert_array_equal(where, np.arange(where[0], where[0] + len(where)))

    def test_padding_is_marked_everywhere(self, length, bins):
        for row in packed(length, bins):
            assert {key: (value.shape, value.dtype) for key, value in row.items()} == {
                key: ((length,), np.int32) for key in ("input_ids", "labels", "segment_ids", "position_ids")
            }
            padding = row["segment_ids"] == 0
            assert (row["input_ids"][padding] == PAD).all()
            assert (row["labels"][padding] == IGNORED).all()
            assert (row["labels"][~padding] != IGNORED).all()
            assert not padding[0]


def test_a_tokenizer_without_marks_is_refused():
    with pytest.raises(ValueError, match="eos="):
        document([], None, None)


MASK_ID = 3
ORDINARY = np.arange(10, 1000, dtype=np.int32)


def masked(ids, seed=0, epoch=0, index=0, length=64, **options):
    mask = Mask(length, BOS, EOS, PAD, MASK_ID, ORDINARY, seed=seed, **options)
    return list(mask({"ids": np.asarray(ids, np.int32), "epoch": epoch, "index": index}))


def test_masking_keeps_what_it_does_not_ask_for():
    ids = np.arange(10, 310)
    rows = masked(ids, token_type_ids=True)
    restored = []
    for row in rows:
        asked, real = row["labels"] != IGNORED, row["attention_mask"] == 1
        original = np.where(asked, row["labels"], row["input_ids"])
        assert original[0] == BOS
        assert original[real][-1] == EOS
        assert (original[~real] == PAD).all()
        assert not (asked & ~real).any()
        restored += original[real][1:-1].tolist()
        assert set(row) == {"input_ids", "labels", "attention_mask", "token_type_ids"}
        assert all(value.shape == (64,) for value in row.values())
    assert restored == ids.tolist()


def test_masking_is_a_function_of_seed_epoch_and_index():
    ids = np.arange(10, 310)
    same, again = masked(ids), masked(ids)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(same, again, strict=True))
    for other in ({"seed": 1}, {"epoch": 1}, {"index": 1}):
        assert any((a["labels"] != b["labels"]).any() for a, b in zip(same, masked(ids, **other), strict=True)), other


def test_shares_of_masking():
    ids = np.full(100 * 62, 500)
    rows = masked(ids)
    inputs = np.concatenate([row["input_ids"][row["labels"] != IGNORED] for row in rows])
    assert len(inputs) == 100 * round(0.15 * 62)
    # 900 draws: a share's standard deviation is at most sqrt(0.8 * 0.2 / 900) = 0.013; four of them
    assert abs(np.mean(inputs == MASK_ID) - 0.8) < 0.053
    assert abs(np.mean(inputs == 500) - 0.1) < 0.04
    assert set(inputs[(inputs != MASK_ID)]) <= set(ORDINARY)
