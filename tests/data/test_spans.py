"""Places in a text as places in a row: what each token of a row stands for, by every kind of tokenizer."""

import itertools

import numpy as np
import pytest

from bigflax import data

BYTES = data.byte_tokenizer()
BPE = data.train_bpe(["Ann Lee lives in New York, naïve 東京 "] * 20, 300)
CLASSES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
WORDS = ["Ann", "Lee", "lives", "in", "naïve", "東京", "."]
TAGS = ["B-PER", "I-PER", "O", 0, "O", "B-LOC", "O"]
NUMBERS = [1, 2, 0, 0, 0, 3, 0]


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A word-piece tokenizer, which encloses what it reads in marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    parts = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", *"Ann L ##ee live ##s in . na ##ive".split(), "##ï", "##ve", "東", "##京", "who", "?"]
    inner = Tokenizer(models.WordPiece({part: i for i, part in enumerate(parts)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    home = tmp_path_factory.mktemp("marked")
    inner.save(str(home / "tokenizer.json"))
    return data.load_tokenizer(home)


@pytest.fixture(params=["bytes", "bpe", "wordpiece"])
def tokenizer(request, marked):
    return {"bytes": BYTES, "bpe": BPE, "wordpiece": marked}[request.param]


def test_the_first_piece_of_a_word_bears_its_tag(tokenizer):
    row = data.tagged(tokenizer, CLASSES, length=64)({"tokens": WORDS, "tags": TAGS}, None)
    (places,) = np.nonzero(row["labels"] != -100)
    np.testing.assert_array_equal(row["labels"][places], NUMBERS)
    real = row["attention_mask"].sum()
    bounds = [*places, real - (tokenizer.inner.num_special_tokens_to_add(False) // 2)]
    for word, a, b in zip(WORDS, bounds[:-1], bounds[1:], strict=True):
        pieces = [token.removeprefix("##") for token in map(tokenizer.inner.id_to_token, row["input_ids"][a:b])]
        made = (
            tokenizer.decode(row["input_ids"][a:b]).strip()
            if tokenizer is not BYTES
            else bytes(row["input_ids"][a:b].astype("u1")).decode()
        )
        assert made.strip() == word or "".join(pieces) == word


def test_words_that_are_cut_off_have_no_label(tokenizer):
    whole = data.tagged(tokenizer, CLASSES, length=64)({"tokens": WORDS, "tags": TAGS}, None)
    (places,) = np.nonzero(whole["labels"] != -100)
    length = int(places[3])
    row = data.tagged(tokenizer, CLASSES, length=length)({"tokens": WORDS, "tags": TAGS}, None)
    assert [*row["labels"][row["labels"] != -100]] == NUMBERS[:3]


def test_spans_become_tags_of_words():
    text, spans = "Ann Lee lives in New York, 東京.", [{"start": 0, "end": 7, "label": "PER"}, {"start": 17, "end": 25, "label": "LOC"}]
    read = lambda spans: data.tagged(BYTES, CLASSES, length=64, text="text", label="spans")({"text": text, "spans": spans}, None)
    labels = read(spans)["labels"]
    assert [*labels[labels != -100]] == [1, 2, 0, 0, 3, 4, 0, 0, 0]
    for span, message in {
        (3, 4): "a span of 'LOC' from 3 to 4 covers no word",
        (0, 99): "from 0 to 99 covers no word of the 30",
        (5, 8): "overlaps one of 'PER'",
    }.items():
        with pytest.raises(ValueError, match=message):
            read([*spans, {"start": span[0], "end": span[1], "label": "LOC"}])


def test_tags_are_found():
    from types import SimpleNamespace as Section

    words = [{"tokens": ["a"], "tags": ["B-x"]}, {"tokens": ["a"], "tags": ["O"]}]
    spans = [{"text": "a", "spans": [{"start": 0, "end": 1, "label": name}]} for name in "ba"] + [{"text": "a", "spans": []}]
    find = lambda records, **section: data.find_tags([records], Section(**{"classes": None, **section}))
    assert find(words, text="tokens", label="tags") == ("B-x", "O")
    assert find(spans, text="text", label="spans") == ("O", "B-a", "I-a", "B-b", "I-b")
    assert find(words, text="tokens", label="tags", classes=CLASSES) == CLASSES
    with pytest.raises(ValueError, match="the field 'tag' of the records holds nothing"):
        find(words, text="tokens", label="tag")


CONTEXT = "Ann Lee lives in naïve 東京 . " * 4


@pytest.mark.parametrize("of", [0, 2])
@pytest.mark.parametrize("length", [200, 64, 40])
def test_an_answer_is_where_it_stands(tokenizer, length, of):
    """In one window or several, whose tokens from the first to the last of the answer are its text."""
    start = [i for i in range(len(CONTEXT)) if CONTEXT.startswith("naïve 東京", i)][of]
    record = {"question": "who?", "context": CONTEXT, "answers": [{"text": "naïve 東京", "answer_start": start}]}
    seen = set()
    for seed in (None, *range(6)):
        rng = None if seed is None else np.random.default_rng(seed)
        row = data.answered(tokenizer, length=length, stride=20)(record, rng)
        first, last = row["labels"]
        assert 0 < first <= last and (tokenizer in (BYTES, BPE) or row["token_type_ids"][[first, last]].all())
        ids = row["input_ids"][first : last + 1]
        alone = tokenizer.encode(" naïve 東京" if tokenizer is BPE else "naïve 東京")
        np.testing.assert_array_equal(ids, alone)
        seen.add(tuple(row["input_ids"]))
    assert len(seen) == 1 if length == 200 else len(seen) > 1 or tokenizer is not BYTES or of == 0


def test_windows_cover_the_context_and_overlap():
    rows = BYTES.placed("who?", CONTEXT, length=40, stride=10)
    at = [at[at[:, 0] == 1] for _, at in rows]
    assert at[0][0, 1] == 0 and at[-1][-1, 2] == len(CONTEXT)
    for one, other in itertools.pairwise(at):
        np.testing.assert_array_equal(one[-10:], other[:10])
    assert all((row["input_ids"][:4] == [*b"who?"]).all() for row, _ in rows)


@pytest.mark.parametrize("length, held", [(200, [1, 0, 0, 0, 0, 0]), (64, [1, 1, 0, 0, 0, 0])])
def test_elsewhere_than_in_training_all_windows_are_read(length, held):
    """As many rows as `windows`, those of a window that there is not empty; the answer is in each window that holds all of it."""
    record = {"question": "who?", "context": CONTEXT, "answers": [{"text": "lives", "answer_start": 8 if length == 200 else 36}]}
    rows = data.answered(BYTES, length=length, stride=20, windows=6)(record, None)
    cut = BYTES.placed("who?", CONTEXT, length=length, stride=20)
    assert {name: row.shape for name, row in rows.items()} == {name: (6, length) for name in cut[0][0]} | {"labels": (6, 2)}
    for i, (first, last) in enumerate(rows["labels"]):
        if i < len(cut):
            np.testing.assert_array_equal(rows["input_ids"][i], cut[i][0]["input_ids"])
            assert ([*rows["input_ids"][i][first : last + 1]] == [*b"lives"]) == (first > 0)
        else:
            assert (first, last) == (-100, -100) and not rows["attention_mask"][i].any()
    assert [*(rows["labels"][:, 0] > 0)] == held
    assert data.answered(BYTES, length=length, stride=20, windows=6)(record, np.random.default_rng(0))["labels"].shape == (2,)


def test_no_answer_is_the_first_place():
    for answers in ([], {"text": [], "answer_start": []}):
        row = data.answered(BYTES, length=40, stride=10)({"question": "who?", "context": CONTEXT, "answers": answers}, None)
        assert [*row["labels"]] == [0, 0]


REFUSED = {
    "fewer tags": (data.tagged(BYTES, CLASSES, length=9), {"tokens": ["a", "b"], "tags": ["O"]}, "2 words in 'tokens' and 1 tags in 'tags'"),
    "an empty word": (data.tagged(BYTES, CLASSES, length=9), {"tokens": ["a", " "], "tags": [0, 0]}, "and no word empty"),
    "an unknown tag": (data.tagged(BYTES, CLASSES, length=9), {"tokens": ["a"], "tags": ["B-ORG"]}, "label 'B-ORG' is none of the 5 classes"),
    "another place": (data.answered(BYTES, length=9), {"question": "w", "context": "abc", "answers": [{"text": "c", "answer_start": 1}]},
                      "the answer 'c' does not stand at character 1 of 'context'"),
    "too many windows": (data.answered(BYTES, length=9, windows=2), {"question": "w", "context": "abc" * 9, "answers": []},
                         "the context takes 4 windows of 9 tokens, more than the 2 of data.windows"),
    "a long question": (data.answered(BYTES, length=9, stride=4), {"question": "w" * 6, "context": "abc", "answers": []},
                        "a length of 9 tokens leaves 3 beside a text of 6: windows that overlap by 4 take more"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    read, record, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read(record, None)
