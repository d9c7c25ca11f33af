"""Scores of text by their definitions, and by the libraries that others use."""

import itertools
import sys

import numpy as np
import pytest

from bigflax import scores

SAID = ["The cat sat.", "a dog", "", "one two three four", "it's"]
TRUE = ["cat sat", "the dogs", "bird", "one three four five", "its"]
VALUES = {  # by hand
    "exact_match": 2 / 5,
    "f1": (1 + 0 + 0 + 6 / 8 + 1) / 5,
    "wer": (1 + 2 + 1 + 2 + 0) / (2 + 2 + 1 + 4 + 1),
    "cer": (4 + 4 + 4 + 9 + 0) / (7 + 8 + 4 + 19 + 3),
}


@pytest.mark.parametrize("name", scores.SCORES)
def test_what_is_right_is_perfect_and_what_is_said_is_counted(name):
    if name in ("chrf", "bleu"):
        pytest.importorskip("sacrebleu", reason="sacrebleu (extra scores) is not installed")
    if name.startswith("rouge"):
        pytest.importorskip("rouge_score", reason="rouge-score (extra scores) is not installed")
    texts = ["one two three four five", "and a longer line of words"]
    perfect, wrong = (scores.scored([name], said, texts)[name] for said in (texts, ["x y", "z"]))
    assert perfect == pytest.approx({"wer": 0, "cer": 0, "chrf": 100, "bleu": 100}.get(name, 1.0))
    assert (wrong > 0.5) if name in ("wer", "cer") else (wrong < 5)
    if name in VALUES:
        assert scores.scored([name], SAID, TRUE)[name] == pytest.approx(VALUES[name])


SPOKEN = {
    "Press 1, or 42.": "press one or forty two",
    "Re-enter 0 to 317; 100, 2000 and 3D": "re enter zero to three hundred seventeen one hundred 2000 and 3d",
    "You\u2019re late, I can't wait. It's 20\u201430!": "you are late i can not wait its twenty thirty",
    "The rent, we've cannoted": "the rent we have cannoted",
}


@pytest.mark.parametrize("text", SPOKEN)
def test_the_same_words_however_they_are_written(text):
    assert scores.spoken(text) == SPOKEN[text]
    assert scores.scored(["wer", "cer"], [text], [SPOKEN[text].upper()]) == {"wer": 0, "cer": 0}


def test_corpora_are_scored_as_their_libraries_do():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu (extra scores) is not installed")
    got = scores.scored(["chrf", "bleu"], SAID, TRUE)
    assert got == {"chrf": sacrebleu.CHRF().corpus_score(SAID, [TRUE]).score, "bleu": sacrebleu.BLEU().corpus_score(SAID, [TRUE]).score}


def test_edits_by_all_ways_of_aligning():
    """Against the recursion of its definition, on all words of two letters up to four long."""
    import functools

    @functools.cache
    def by_definition(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1, by_definition(a[1:], b[1:]) + (a[0] != b[0]))

    words = ["".join(letters) for n in range(5) for letters in itertools.product("xy", repeat=n)]
    for a, b in itertools.product(words, words):
        assert scores.edits(a, b) == by_definition(a, b)
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (tuple(rng.integers(0, 4, rng.integers(0, 12)).tolist()) for _ in range(2))
        assert scores.edits(a, b) == by_definition(a, b)


def test_mistakes_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match=r"there is no score 'chrF'; .*'chrf'"):
        scores.scored(["chrF"], [], [])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"needs rouge-score: pip install 'bigflax\[scores\]'"):
        scores.scored(["rougeL"], ["a"], ["a"])
