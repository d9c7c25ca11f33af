"""Laws of every tokenizer: text comes back, token_bytes sums to its bytes, saving keeps the fingerprint, training is deterministic."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from bigflax.data.text import Tokenizer as BigTokenizer
from bigflax.data.text import byte_tokenizer, load_tokenizer, train_bpe

CORPUS = [f"def f{i}(x):\n    return x + {i}  # naïve, 東京 {i}\n" * 3 for i in range(40)]
TEXTS = ["", "a", "    return x\n\n\n", "naïve 東京 🙂\t\r\n", "<|endoftext|> as text", CORPUS[3]]
MAKERS = {"bytes": byte_tokenizer, "bpe": lambda: train_bpe(CORPUS, 400)}


@pytest.fixture(params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("text", [t for t in TEXTS if "<|" not in t])
def test_text_comes_back_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size > max(ids, default=0)


@pytest.mark.parametrize("size", [1, 30, 10_000])
def test_parts_end_to_end_are_the_whole(tokenizer, size):
    for text in [*TEXTS, "\n\n  a\n\nb\n \nc\r\nd\n):\n  e 1 2\n 3 _ x  y\n", "".join(CORPUS)]:
        parts = list(tokenizer.encode_parts(text, size))
        assert np.concatenate(parts).tolist() == tokenizer.encode(text).tolist()
    assert (len(parts) > 50) == (size < 100)


def test_marks_stand_for_no_bytes(tokenizer):
    marks = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert (tokenizer.token_bytes()[marks] == 0).all()
    assert tokenizer.decode(marks) == ""
    assert set(marks) <= set(tokenizer.special_ids.tolist())


def test_saving_keeps_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert [loaded.encode(t).tolist() for t in TEXTS] == [tokenizer.encode(t).tolist() for t in TEXTS]
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_bytes_are_their_own_ids():
    assert byte_tokenizer().encode("aé\n").tolist() == list("aé\n".encode())
    assert byte_tokenizer().vocab_size == 259


def test_training_is_deterministic_across_processes():
    code = f"from bigflax.data.text import train_bpe; print(train_bpe({CORPUS!r}, 400).fingerprint)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == train_bpe(CORPUS, 400).fingerprint != train_bpe(CORPUS[:20], 400).fingerprint


def test_training_gives_the_size_asked_for_and_reads_no_more_than_allowed():
    assert train_bpe(CORPUS, 340).vocab_size == 340
    assert 300 < train_bpe(CORPUS, 4000).vocab_size < 4000  # so few pairs are there
    read = []
    train_bpe((read.append(t) or t for t in CORPUS), 300, max_bytes=500)
    assert 500 <= sum(len(t.encode()) for t in read) < 500 + max(len(t.encode()) for t in CORPUS)
    with pytest.raises(ValueError, match="258"):
        train_bpe(CORPUS, 100)


def test_a_mask_token_is_one_of_the_vocabulary(tmp_path):
    tokenizer = train_bpe(CORPUS, 340, mask="[MASK]")
    assert tokenizer.vocab_size == 340
    assert tokenizer.decode([tokenizer.mask_id], skip_special=False) == "[MASK]" and tokenizer.mask_id in tokenizer.special_ids
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).mask_id == tokenizer.mask_id
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert train_bpe(CORPUS, 340).mask_id is None


def wordpiece(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {t: i for i, t in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "play", "##ing", "the"])}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"])
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(folder / "tokenizer.json"))


def test_a_file_with_truncation_and_padding_is_reset(tmp_path):
    wordpiece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the playing the").tolist() == [7, 5, 6, 7]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (1, 2, 0, 3)
    assert tokenizer.token_bytes().tolist() == [0, 0, 0, 0, 0, 4, 3, 3]


def test_roles_can_be_named(tmp_path):
    wordpiece(tmp_path)
    assert load_tokenizer(tmp_path, eos="[PAD]").eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[MASK]"}}))
    assert load_tokenizer(tmp_path).eos_id == 3
    with pytest.raises(ValueError, match=r"\[END\]"):
        load_tokenizer(tmp_path, eos="[END]")
    with pytest.raises(ValueError, match="role"):
        load_tokenizer(tmp_path, end="[SEP]")


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_fingerprint_is_a_sha256_of_what_decides():
    assert len(byte_tokenizer().fingerprint) == len(hashlib.sha256().hexdigest())
    assert byte_tokenizer().fingerprint == byte_tokenizer().fingerprint


def test_a_batch_is_padded_and_cut(tokenizer):
    long, short = tokenizer.encode("abcdefgh"), tokenizer.encode("ab")
    rows = tokenizer.batch(["abcdefgh", "ab", ""])
    T = len(long)
    assert rows["input_ids"].shape == rows["attention_mask"].shape == (3, T) and rows["input_ids"].dtype == np.int32
    assert rows["input_ids"][0].tolist() == long.tolist() and rows["input_ids"][1, : len(short)].tolist() == short.tolist()
    assert (rows["input_ids"][1, len(short) :] == tokenizer.pad_id).all()
    assert rows["attention_mask"].sum(1).tolist() == [T, len(short), 0]
    left = tokenizer.batch(["abcdefgh", "ab"], length=2, left=True)
    assert left["input_ids"][0].tolist() == long[:2].tolist() and left["attention_mask"][1].tolist()[-len(short) :] == [1] * len(short)
    with pytest.raises(ValueError, match="1 texts of at most 0 tokens, special ones included, make no batch"):
        tokenizer.batch(["a"], length=0)


def test_a_batch_has_the_marks_that_its_model_expects():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}, unk_token="b"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    inner.enable_truncation(3)  # as files made for sentence encoders have it
    rows = BigTokenizer(inner).batch(["a b a b a", "a"], length=5)
    assert rows["input_ids"].tolist() == [[1, 3, 4, 3, 2], [1, 3, 2, 0, 0]]  # the end survives the cut
