"""Tokenizers behind one small interface: bytes, any `tokenizer.json`, or a byte-level BPE trained on the corpus.

All three are a `tokenizers.Tokenizer` (the bytes one is a byte-level BPE without merges), so each is saved as a folder that transformers
reads too. Byte-level BPE: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2; merges after Sennrich
et al. 2016, arXiv:1508.07909. A chat template is carried along; dialogues.py reads it. Left out on purpose: slow, pure-Python tokenizers.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from etils import epath

# Marks of a document's bounds, by role: the first one that a vocabulary knows.
SPECIAL = {
    "bos": ("<|begin_of_text|>", "<bos>", "<s>", "[CLS]", "<|endoftext|>"),
    "eos": ("<|end_of_text|>", "<eos>", "</s>", "[SEP]", "<|endoftext|>", "<|im_end|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
    "mask": ("<|mask|>", "<mask>", "[MASK]"),
}
END = "<|endoftext|>"
_WORD_END = re.compile(r"[^\W_](?=[ \n])")  # a letter or digit before a blank


class Tokenizer:
    """encode(text) -> int32[n], without special tokens; decode(ids) -> str.

    bos_id and eos_id enclose a document ([CLS] and [SEP] of a BERT); each falls back to the other, pad_id to eos_id; mask_id may be None.
    `template` is the chat template that came with it (dialogues.py), or None.
    """

    def __init__(self, tokenizer, *, template: str | None = None, **special: str):
        unknown = set(special) - set(SPECIAL)
        if unknown:
            raise ValueError(f"unknown role of a special token: {', '.join(sorted(unknown))} (known: {', '.join(SPECIAL)})")
        tokenizer.no_truncation()  # files made for sentence encoders switch both on
        tokenizer.no_padding()
        self.inner, self.template, self._special = tokenizer, template, special
        ids = {role: self._find(role) for role in SPECIAL}
        self.bos_id = ids["bos"] if ids["bos"] is not None else ids["eos"]
        self.eos_id = ids["eos"] if ids["eos"] is not None else ids["bos"]
        self.pad_id = ids["pad"] if ids["pad"] is not None else self.eos_id if self.eos_id is not None else 0
        self.mask_id = ids["mask"]

    def _find(self, role: str) -> int | None:
        if role in self._special:
            token = self.inner.token_to_id(self._special[role])
            if token is None:
                raise ValueError(f"the vocabulary has no token {self._special[role]!r}, named as {role}")
            return token
        return next((i for i in map(self.inner.token_to_id, SPECIAL[role]) if i is not None), None)

    @property
    def vocab_size(self) -> int:
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps; embeddings must reach the last

    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        marked = {i for i, token in self.inner.get_added_tokens_decoder().items() if token.special}
        return np.array(sorted(marked | {i for i in (self.bos_id, self.eos_id, self.mask_id) if i is not None}), np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int32)

    def located(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode`, and the characters where each token stands, from and to: int32 [n, 2]."""
        whole = self.inner.encode(text, add_special_tokens=False)
        return np.array(whole.ids, np.int32), np.array(whole.offsets, np.int32).reshape(-1, 2)

    def batch(self, texts: Sequence[str], *, length: int | None = None, left: bool = False) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask"}: int32 [B, T], a row a text, within the special tokens that its model expects ([CLS] ... [SEP]).

        Texts are cut to `length` tokens, those included, and padded to the longest on the right, or on the `left` as `generate` wants prompts.
        Raises ValueError where `length` leaves no room for a text.
        """
        room = None if length is None else length - self.inner.num_special_tokens_to_add(False)
        if not texts or (room is not None and room < 1):
            raise ValueError(f"{len(texts)} texts of at most {length} tokens, special ones included, make no batch")
        rows = self.inner.encode_batch(list(texts), add_special_tokens=False)
        for row in rows if room is not None else ():
            row.truncate(room)
        ids = [self.inner.post_process(row).ids for row in rows]
        T = max(map(len, ids))
        pad = lambda row, value: [value] * (T - len(row)) + row if left else row + [value] * (T - len(row))
        return {
            "input_ids": np.array([pad(row, self.pad_id) for row in ids], np.int32).reshape(len(ids), T),
            "attention_mask": np.array([pad([1] * len(row), 0) for row in ids], np.int32).reshape(len(ids), T),
        }

    def row(self, text: str, pair: str | None = None, *, length: int) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask"}, and of a pair "token_type_ids": int32 [length], within the special tokens that the model expects, cut
        where it is too long, of a pair the longer text first, and padded on the right. Raises ValueError where `length` leaves no room.
        """
        return self._padded(self._cut(text, pair, length), length, pair is not None)

    def placed(
        self, text: str, pair: str | None = None, *, length: int, stride: int | None = None
    ) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
        """`row`, and where its tokens stand: int32 [length, 3], in which text (0 or 1; -1: in neither) and the characters there, from and to.

        With a `stride` of tokens the pair is not cut but read in windows, which overlap by that many: a row each, the first text in all of them.
        """
        if stride is None:
            whole = [self._cut(text, pair, length)]
        else:
            assert pair is not None
            first, second = self.inner.encode_batch([text, pair], add_special_tokens=False)
            room = length - self.inner.num_special_tokens_to_add(True) - len(first.ids)
            if room <= stride:
                raise ValueError(
                    f"a length of {length} tokens leaves {max(room, 0)} beside a text of {len(first.ids)}: windows that overlap by {stride} take more"
                )
            second.truncate(room, stride=stride)
            whole = [self.inner.post_process(first, window) for window in (second, *second.overflowing)]
        rows = []
        for one in whole:
            at = np.full((length, 3), (-1, 0, 0), np.int32)
            at[: len(one.ids)] = [(-1 if k is None else k, *span) for k, span in zip(one.sequence_ids, one.offsets, strict=True)]
            rows.append((self._padded(one, length, pair is not None), at))
        return rows

    def _cut(self, text: str, pair: str | None, length: int):
        parts = self.inner.encode_batch([text] if pair is None else [text, pair], add_special_tokens=False)
        room = length - self.inner.num_special_tokens_to_add(pair is not None)
        if room < len(parts):
            raise ValueError(
                f"a length of {length} tokens, special ones included, leaves no room for {'a text' if pair is None else 'a pair'}"
            )
        parts[0].truncate(max(room - sum(len(part.ids) for part in parts[1:]), (room + 1) // 2 if parts[1:] else room))
        for part in parts[1:]:
            part.truncate(room - len(parts[0].ids))
        return self.inner.post_process(*parts)

    def _padded(self, whole, length: int, typed: bool) -> dict[str, np.ndarray]:
        found = {"input_ids": whole.ids, "attention_mask": [1] * len(whole.ids), **({"token_type_ids": whole.type_ids} if typed else {})}
        out = {}
        for name, values in found.items():
            out[name] = np.full(length, self.pad_id if name == "input_ids" else 0, np.int32)
            out[name][: len(values)] = values
        return out

    def encode_parts(self, text: str, size: int = 16_384) -> Iterator[np.ndarray]:
        """`encode` in parts of about `size` characters, end to end the same ids.

        The parts end where a letter or digit meets a blank. There every byte-level pre-tokenizer that splits words ends a word too (a blank
        goes with what follows), so no merge reaches across; other kinds of tokenizer get one part.
        """
        start = 0
        while self._splits_words and len(text) - start > size and (match := _WORD_END.search(text, start + size)):
            yield self.encode(text[start : match.end()])
            start = match.end()
        yield self.encode(text[start:])

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_bytes(self) -> np.ndarray:
        """int32[vocab_size]: UTF-8 bytes that each token stands for, 0 for special ones.

        Exact for byte-level BPE: over the tokens of a text it sums to the text's bytes. An estimate for WordPiece and SentencePiece, which
        drop or fold blanks.
        """
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in self.inner.get_vocab(with_added_tokens=False).items():
            counts[i] = len(token) if self._byte_level else _plain_bytes(token)  # byte-level writes each byte as one character
        for i, token in self.inner.get_added_tokens_decoder().items():
            counts[i] = len(token.content.encode())
        counts[self.special_ids] = 0
        return counts

    @functools.cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.inner.to_str()).get("decoder"))

    @functools.cached_property
    def _splits_words(self) -> bool:
        before = json.dumps(json.loads(self.inner.to_str()).get("pre_tokenizer"))
        return self._byte_level and ('"use_regex": true' in before or '"Split"' in before)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides how text becomes ids."""
        content = [json.loads(self.inner.to_str()), [self.bos_id, self.eos_id, self.pad_id, self.mask_id]]
        content += [] if self.template is None else [self.template]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, folder) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja; `load_tokenizer(folder)` has the same fingerprint."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id, "mask_token": self.mask_id}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **{k: self.inner.id_to_token(i) for k, i in ids.items() if i is not None}}
        # tokenizer.json last and each in one move: a folder that has it is whole, whenever the writer was killed
        files = {"tokenizer_config.json": json.dumps(config, indent=1), "tokenizer.json": self.inner.to_str(pretty=True)}
        for name, text in {**({} if self.template is None else {"chat_template.jinja": self.template}), **files}.items():
            (folder / f"{name}.tmp").write_text(text)
            (folder / f"{name}.tmp").replace(folder / name)


def _plain_bytes(token: str) -> int:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode())


def load_tokenizer(path, **special: str) -> Tokenizer:
    """Loads "bytes", a tokenizer.json, or a folder with one; `special` names tokens by role: bos=, eos=, pad=, mask=."""
    if os.fspath(path) == "bytes":
        return byte_tokenizer()
    from tokenizers import Tokenizer as Inner  # here, not above: `import bigflax` stays quick

    file = epath.Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.exists():
        raise FileNotFoundError(f"there is no tokenizer file {os.fspath(file)!r}; name 'bytes', a tokenizer.json, or a folder with one")
    config = file.parent / "tokenizer_config.json"
    named = json.loads(config.read_text()) if config.exists() else {}
    for role in SPECIAL:
        token = named.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token and role not in special:
            special[role] = token
    chat, template = file.parent / "chat_template.jinja", named.get("chat_template")
    if chat.exists():  # which is newer than the key of the config
        template = chat.read_text()
    elif isinstance(template, list):  # several, by name
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    try:
        return Tokenizer(Inner.from_str(file.read_text()), template=template, **special)
    except Exception as error:  # the Rust library raises bare Exception
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{os.fspath(file)!r} is not a tokenizer.json: {error}") from error


def _byte_level(model):
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, pre_tokenizers

    inner = Inner(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte 0..255: itself where printable, else the next from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b if b in printable else next(spare)) for b in range(256)]


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes; then <|endoftext|>, <|pad|>, <|mask|>."""
    from tokenizers import AddedToken, models

    inner = _byte_level(models.BPE(vocab={c: b for b, c in enumerate(_byte_characters())}, merges=[]))
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (END, "<|pad|>", "<|mask|>")])
    return Tokenizer(inner)


def train_bpe(texts: Iterable[str], vocab_size: int, *, max_bytes: int = 8_000_000, mask: str | None = None) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens (fewer only if the text has too few pairs), <|endoftext|> and <|pad|> among them.

    `mask` is the name of a mask token to add, for masked language modelling. Reads `texts` in the order given until `max_bytes`; the same
    texts give the same tokenizer.
    """
    from tokenizers import models, pre_tokenizers, trainers

    special = [END, "<|pad|>", *([mask] if mask else [])]
    if vocab_size < (least := 256 + len(special)):
        raise ValueError(f"vocab_size {vocab_size} is below {least}: 256 bytes and {len(special)} special tokens; use the bytes tokenizer")
    inner = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False)
    inner.train_from_iterator(_up_to(texts, max_bytes), trainer)
    return Tokenizer(inner, **({"mask": mask} if mask else {}))


def _up_to(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    taken = 0
    for text in texts:
        yield text
        taken += len(text.encode())
        if taken >= max_bytes:
            return
