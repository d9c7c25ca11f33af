"""Laws of every pipeline: resuming is exact after any batch, splits are disjoint and complete, an epoch visits all, mixtures keep their
weights.
"""

import itertools
import json

import numpy as np
import pytest

from bigflax.data import Records, in_split, open_source, record_batches, sample_texts, text_batches
from bigflax.data.mixture import choose
from bigflax.data.pipeline import positions
from bigflax.data.text import byte_tokenizer

TOKENIZER = byte_tokenizer()


def corpus(folder, n=80, letter="x"):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"{letter}{i} " * (1 + i * 7 % 11)}) for i in range(n)]
    (folder / f"{letter}.jsonl").write_text("\n".join(lines))
    return open_source("jsonl", path=folder / f"{letter}.jsonl")


def causal(folder, **options):
    return text_batches(corpus(folder), TOKENIZER, length=24, batch_size=8, **options)


def masked(folder, **options):
    return text_batches(corpus(folder), TOKENIZER, length=24, batch_size=8, objective="masked", token_type_ids=True, **options)


def mixed(folder, **options):
    sources = [(corpus(folder), 0.7), (corpus(folder, 90, "y"), 0.2), (corpus(folder, 80, "z"), 0.1)]
    return text_batches(sources, TOKENIZER, length=24, batch_size=8, split="all", **options)


def by_content(folder, **options):
    return text_batches(corpus(folder), TOKENIZER, length=24, batch_size=8, split_by="content", **options)


def threads(folder, **options):
    return causal(folder, read_threads=2, **options)


def arrays(folder, **options):
    source = open_source("numpy", arrays={"x": np.arange(240).reshape(80, 3), "y": np.arange(80)})
    return record_batches(source, lambda r, rng: {"x": r["x"] * 2, "labels": r["y"]}, batch_size=8, split="all", **options)


PIPELINES = {f.__name__: f for f in (causal, masked, mixed, by_content, threads, arrays)}


def collect(loader, n=None):
    """The bytes of up to n batches (all without n)."""
    return [{key: np.asarray(value).tobytes() for key, value in batch.items()} for batch in itertools.islice(loader, n)]


@pytest.mark.parametrize(("pipeline", "repeat"), [*itertools.product(PIPELINES, [True, False]), ("causal", 2), ("masked", 2)])
def test_resuming_is_exact_after_any_batch(pipeline, repeat, tmp_path):
    make = PIPELINES[pipeline]
    with make(tmp_path, repeat=repeat) as loader:
        want = collect(loader, 12 if repeat is True else None)
    assert len({batch["labels"] for batch in want}) == len(want)
    for stop in {0, 1, len(want) // 2, len(want) - 1, len(want)}:
        with make(tmp_path, repeat=repeat) as first:
            assert collect(first, stop) == want[:stop]
            state = json.loads(json.dumps(first.state()))
            assert state["batches"] == stop
        with make(tmp_path, repeat=repeat) as second:
            second.restore(state)
            assert collect(second, len(want) - stop) == want[stop:]
            assert second.batches == len(want)
            assert repeat is True or not collect(second, 1)


def test_restoring_in_the_middle_goes_back(tmp_path):
    with causal(tmp_path) as loader:
        collect(loader, 3)
        state = loader.state()
        want = collect(loader, 4)
        loader.restore(state)
        assert collect(loader, 4) == want


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_seed_decides(pipeline, tmp_path):
    make = PIPELINES[pipeline]
    with make(tmp_path) as a, make(tmp_path) as b, make(tmp_path, seed=1) as c:
        first, same, other = collect(a, 6), collect(b, 6), collect(c, 6)
    assert first == same != other


@pytest.mark.parametrize("split_by", ["name", "content"])
def test_splits_are_disjoint_and_complete(split_by, tmp_path):
    source = corpus(tmp_path, 200)
    texts = {s: sorted(sample_texts(records(source, s, split_by))) for s in ("train", "validation", "all")}
    assert texts["all"] == sorted(texts["train"] + texts["validation"]) == sorted(source[i]["text"] for i in range(200))
    assert not set(texts["train"]) & set(texts["validation"])
    # 200 records of chance 0.2: standard deviation 5.7; four of them
    assert abs(len(texts["validation"]) - 40) < 23


def records(source, split, split_by="name", validation_fraction=0.2):
    from bigflax.data import Quality

    return Records(source, Quality(), split, validation_fraction, split_by)


def test_a_larger_validation_share_only_moves_records_one_way():
    names = [f"file{i}" for i in range(500)]
    small, large = ({n for n in names if in_split(n, "validation", f)} for f in (0.05, 0.2))
    assert small < large


def test_the_side_of_a_record_does_not_depend_on_the_others(tmp_path):
    few, many = records(corpus(tmp_path, 20), "train"), records(corpus(tmp_path, 200), "train")
    assert [few.chosen(i) for i in range(20)] == [many.chosen(i) for i in range(20)]


@pytest.mark.parametrize("shards", [1, 3, 8, 64])
def test_an_epoch_visits_every_record_once_over_all_shards(shards, tmp_path):
    source = corpus(tmp_path)
    streams = [positions(records(source, "all"), v, shards, seed=0, repeat=3) for v in range(shards)]
    visits = [at for stream in streams for i in range(len(stream)) if (at := stream[i]) is not None]
    for epoch in range(3):
        assert sorted(at["index"] for at in visits if at["epoch"] == epoch) == list(range(80))
    orders = [[stream[i]["index"] for stream in streams for i in range(len(stream)) if stream[i]["epoch"] == epoch] for epoch in range(3)]
    assert orders[0] != orders[1] != list(range(80)) != orders[0]


def tokens_asked(loader):
    return sum(int((np.asarray(batch["labels"]) != -100).sum()) for batch in loader)


@pytest.mark.parametrize("shards", [1, 8])
def test_one_pass_asks_for_every_token_once_and_so_does_the_next(shards, tmp_path):
    text = lambda *sources: sum(len(TOKENIZER.encode(s[i]["text"])) + 1 for s in sources for i in range(len(s)))  # and each end
    with causal(tmp_path, split="all", repeat=False, shards=shards) as loader:
        assert tokens_asked(loader) == tokens_asked(loader) == text(corpus(tmp_path))
    with mixed(tmp_path, repeat=False, shards=shards) as loader:  # until the last of its sources has ended
        assert tokens_asked(loader) == text(corpus(tmp_path), corpus(tmp_path, 90, "y"), corpus(tmp_path, 80, "z"))


def test_sources_of_a_mixture_shuffle_differently(tmp_path):
    twins = [(corpus(tmp_path, 30, "x"), 1), (corpus(tmp_path, 30, "y"), 1)]
    with text_batches(twins, TOKENIZER, length=24, batch_size=8, split="all") as loader:
        orders = [
            [at[i]["index"] for i in range(30)]
            for part in loader._make_shard.parts
            for at in [positions(part.records, 0, 1, seed=part.seed, repeat=True)]
        ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("split_by", ["name", "content"])
def test_a_split_without_a_record_ends_the_run(split_by, tmp_path):
    three = corpus(tmp_path, 3)
    options = {"split": "validation", "validation_fraction": 1e-9, "split_by": split_by}
    with pytest.raises(ValueError, match="validation split"):  # by content it shows only when reading begins
        next(text_batches(three, TOKENIZER, length=24, batch_size=8, **options))


WEIGHTS = {"even": [1, 1], "rare": [0.95, 0.05], "three": [5, 3, 2]}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shards", [1, 8, 13, 64])
def test_mixture_shares_hold_in_every_stretch_and_every_shard(weights, shards):
    weights = np.array(WEIGHTS[weights]) / sum(WEIGHTS[weights])
    chosen = np.array([choose(g, np.cumsum(weights).tolist()) for g in range(64 * shards * 4)])
    counts = lambda picks: np.bincount(picks, minlength=len(weights))
    for start in range(0, len(chosen) - 256, 64):  # a stretch of n golden-ratio points misses a share by less than 3 log(n) points; n = 256
        assert np.abs(counts(chosen[start : start + 256]) - 256 * weights).max() < 6
    for shard in range(shards):
        share = counts(chosen[shard::shards]) / len(chosen[shard::shards])
        assert np.abs(share - weights).max() < 0.1


def test_mixture_weights_in_the_batches(tmp_path):
    origins = []
    with mixed(tmp_path) as loader:
        for batch in itertools.islice(loader, 25):
            rows = np.asarray(batch["input_ids"])
            origins += [[letter for letter in "xyz" if (row == ord(letter)).any()] for row in rows]
    assert all(len(letters) == 1 for letters in origins)  # sources do not meet within a row
    shares = [sum(letters == [letter] for letters in origins) for letter in "xyz"]
    assert max(abs(share - 200 * weight) for share, weight in zip(shares, (0.7, 0.2, 0.1), strict=True)) < 6, shares


def test_refusals(tmp_path):
    for options, said in [
        ({"objective": "prefix"}, "'causal' nor 'masked'"), ({"split": "test"}, "train, validation, all"),
        ({"validation_fraction": 1.5}, "outside"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            causal(tmp_path, **options)
    with pytest.raises(ValueError, match="weight above 0"), text_batches(
        [(corpus(tmp_path), 1.0), (corpus(tmp_path), 0.0)], TOKENIZER, length=24, batch_size=8, split="all"
    ) as loader:  # fmt: skip
        next(loader)
