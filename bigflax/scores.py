"""Scores of written text against what was to be written: lists of strings in, a number out.

    exact_match, f1          of 0..1, the mean over pairs: equal, and of words in common, as SQuAD counts both (Rajpurkar et al. 2016, 1606.05250)
    wer, cer                 edits of words, or of characters, over those that were to be written: 0 is perfect, above 1 is possible
    chrf, bleu               of 0..100, of all pairs together, as sacrebleu counts them (Popovic 2015; Papineni et al. 2002, Post 2018)
    rouge1, rouge2, rougeL   F-measures of 0..1, the mean over pairs, by rouge-score (Lin 2004)

The first four pass over case and punctuation; exact_match and f1 over English articles too, wer and cer over the ways in which the same words
are written (`spoken`).
Left out on purpose: several references for a text, and scores that take a model.
"""

import collections
import functools
import re
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bigflax import trees

Score = Callable[[Sequence[str], Sequence[str]], float]


def normalized(text: str) -> str:
    """Lower case, without punctuation, the articles a, an, the, and more than one blank: SQuAD's own."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain(text)).split())


def plain(text: str) -> str:
    """Lower case without ASCII punctuation, words one blank apart."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


SHORT = {
    "can't": "can not", "cannot": "can not", "won't": "will not", "n't": " not", "'re": " are", "'ve": " have", "'ll": " will", "'m": " am",
}  # fmt: skip
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def spoken(text: str) -> str:
    """As it is said: `plain`, with hyphens as blanks, "you're" as two words, and numbers below a thousand as words. A part of what Whisper's word
    errors pass over (Radford et al. 2022, 2212.04356, appendix C): without fillers, British spellings, money, and larger numbers."""
    text = re.sub(rf"({'|'.join(SHORT)})(?!\w)", lambda found: SHORT[found[0]], text.lower().replace("\u2019", "'"))
    text = plain(re.sub("[-\u2010-\u2015]", " ", text))
    return re.sub(r"\b\d{1,3}\b", lambda found: in_words(int(found[0])), text)


def in_words(number: int) -> str:
    """Of 0 to 999."""
    if number < 20:
        return SMALL[number]
    whole, rest = divmod(number, 10 if number < 100 else 100)
    return (TENS[whole - 2] if number < 100 else f"{SMALL[whole]} hundred") + (f" {in_words(rest)}" if rest else "")


def exact(said: str, true: str) -> float:
    """1 where the two are equal when normalized, else 0."""
    return float(normalized(said) == normalized(true))


def overlap(said: str, true: str) -> float:
    """2 common / (said + true) words; where one has none, whether both have none."""
    a, b = normalized(said).split(), normalized(true).split()
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if a and b else float(a == b)


def edits(said: Sequence[Any], true: Sequence[Any]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other (Levenshtein 1966), a row of the table at a time."""
    numbers: dict[Any, int] = {}
    a, b = (np.array([numbers.setdefault(x, len(numbers)) for x in part], int) for part in (said, true))
    at = np.arange(len(b) + 1)
    row = at
    for i, x in enumerate(a, 1):
        best = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (b != x))])
        row = np.minimum.accumulate(best - at) + at  # and then insertions, from the left
    return int(row[-1])


def _rate(split: Callable[[str], Sequence[str]], said: Sequence[str], true: Sequence[str]) -> float:
    pairs = [(split(spoken(a)), split(spoken(b))) for a, b in zip(said, true, strict=True)]
    return sum(edits(a, b) for a, b in pairs) / max(1, sum(len(b) for _, b in pairs))


def _mean(of: Callable[[str, str], float], said: Sequence[str], true: Sequence[str]) -> float:
    return float(np.mean([of(a, b) for a, b in zip(said, true, strict=True)]))


def _sacrebleu(name: str, said: Sequence[str], true: Sequence[str]) -> float:
    return getattr(_library("sacrebleu"), f"corpus_{name}")(list(said), [list(true)]).score


def _rouge(name: str, said: Sequence[str], true: Sequence[str]) -> float:
    scorer = _library("rouge_score.rouge_scorer").RougeScorer([name], use_stemmer=False)
    return _mean(lambda a, b: scorer.score(b, a)[name].fmeasure, said, true)


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this score needs {name.split('.')[0].replace('_', '-')}: pip install 'bigflax[scores]'") from error


SCORES: dict[str, Score] = {
    "exact_match": functools.partial(_mean, exact),
    "f1": functools.partial(_mean, overlap),
    "wer": functools.partial(_rate, str.split),
    "cer": functools.partial(_rate, list),
    **{name: functools.partial(_sacrebleu, name) for name in ("chrf", "bleu")},
    **{name: functools.partial(_rouge, name) for name in ("rouge1", "rouge2", "rougeL")},
}


def scored(names: Iterable[str], said: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Each score of what was said, pair by pair. Raises ValueError for an unknown one, ImportError for one whose library is absent."""
    for name in (names := list(names)):
        if name not in SCORES:
            raise ValueError(f"there is no score {name!r}; {trees.did_you_mean(name, SCORES, 'there are')}")
    return {name: float(SCORES[name](said, true)) for name in names}
