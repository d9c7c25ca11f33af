"""GGUF files, which llama.cpp and what stands upon it run: one file of metadata, tokenizer and weights, by the package `gguf` (extra `gguf`).

    save(model, params, "model.gguf")                      each weight as it is: int4 as Q4_0, int8 as Q8_0, arrays in their own dtype
    save(model, params, "model.gguf", dtype="q8_0")        all matrices; or by rules, [("embed/.*|head/.*", "q8_0"), (".*", "q4_0")]

Of the block formats, 32 neighbours along the inputs share a float16 d:

    Q8_0   w = d c, c = -128 .. 127 in a byte            int8 and int4 codes as they are
    Q4_0   w = d (c - 8), c = 0 .. 15, two a byte        int4 codes (int3, int2) as they are

So a symmetric Quantized whose scale is one over each block (groups of a multiple of 32, or whole channels) keeps its codes, and of its scale what a
float16 holds: 11 bits. Everything else is made dense and rounded by the format's own rule, 8 or 4.5 bits a number. Matrices that 32 does not
divide become float16; vectors are float32, as llama.cpp wants them.

Its `llama` rotates neighbours (2 i, 2 i + 1) where Hugging Face's rotates halves (i, i + H/2): rows of q and k are put in that order. Llama 3's stretched
rotary frequencies are a tensor. A sliding window it does not have; up to the window's length that changes nothing, so that becomes the context's.

Sources: github.com/ggml-org/llama.cpp: its package gguf 0.19, and its converter from Hugging Face, for the fields and the order of rows.
Left out on purpose: other families, formats of super-blocks (K-quants: llama-quantize makes them from float16), splitting into several files, and of
tokenizers normalizers and pre-tokenizers that llama.cpp does not know by name: such a one is refused, `tokenizer=False` leaves it out.
"""

import dataclasses
import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import data, hub, ops, trees
from bigflax.models import names
from bigflax.nn import Model
from bigflax.sharding import whole
from bigflax.tensors import read_json
from bigflax.weights import W8A8, Quantized, Weight, dense, is_typed

# family -> llama.cpp's architecture, and whether that rotates neighbours
FAMILIES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
CODES = {"q8_0": 8, "q4_0": 4}  # the bits of the codes that a block format holds
BLOCK = 32


def save(
    model: Model, params: Any, path: str, *, dtype: str | trees.Rules | None = None, tokenizer: Any = None, name: str = ""
) -> None:  # fmt: skip
    """Writes a language model of one of FAMILIES, adapted and compressed as it may be, as one file.

    `dtype` is one of KINDS for all matrices, or rules over our names that give one, or None: each as it is. `tokenizer` is a folder, a
    `data.Tokenizer`, or False for none; by default it comes from where the model was loaded. Raises ValueError for what GGUF has no place for.
    """
    gguf, c = _library(), model.config
    arch, neighbours = _architecture(model)
    rules = [(".*", dtype)] if dtype is None or isinstance(dtype, str) else trees.checked(dtype)
    leaves, like = dict(trees.named_leaves(params, is_typed)), dict(trees.named_leaves(model.shapes()))
    if leaves.keys() != like.keys():
        raise ValueError(f"these are not the weights of this model: {min(leaves.keys() ^ like.keys())} is in one of the two only")
    trees.apply_rules(rules, params, is_leaf=is_typed)
    shapes = {leaf: w.shape for leaf, w in like.items()}
    table = gguf.get_tensor_name_map(next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == arch), c["num_hidden_layers"])
    made = _tensors(model, leaves, shapes, rules, neighbours)
    tensors = [(str(table.get_name(theirs, (".weight", ".bias"))), one) for theirs, one in made]
    if (stretched := _frequencies(model)) is not None:
        tensors.append(("rope_freqs.weight", _Tensor("float32", stretched.shape, lambda: stretched)))

    writer = gguf.GGUFWriter(None, arch)
    _add_config(writer, model, name or os.path.basename(model.source or model.family))
    most = max(KINDS, key=lambda kind: sum(math.prod(one.shape) for _, one in tensors if one.kind == kind))
    writer.add_file_type({"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7, "q4_0": 2}[most])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with tempfile.TemporaryDirectory() as scratch:
        _add_tokenizer(writer, _tokenizer_folder(tokenizer, model, scratch), c["vocab_size"])
    for theirs, one in tensors:
        kind = gguf.GGMLQuantizationType[KINDS[one.kind]]
        size, width = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(theirs, one.shape, np.dtype("float32"), math.prod(one.shape) // size * width, kind)
    first = jax.process_index() == 0  # the others give what lies on them
    if first:
        writer.write_header_to_file(path + ".tmp")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    for _, one in tensors:
        array = one.make()
        if first:
            writer.write_tensor_data(array)
    writer.close()
    if first:
        os.replace(path + ".tmp", path)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"GGUF files need the package gguf: pip install 'bigflax[gguf]' ({error})") from None
    return gguf


def _architecture(model: Model) -> tuple[str, bool]:
    """llama.cpp's name for what a model computes, and how it rotates. Raises ValueError where it computes nothing of the kind."""
    c = model.config
    if model.family not in FAMILIES or c["head"] != "causal_lm":
        raise ValueError(f"GGUF is written of language models of {', '.join(FAMILIES)}; this is a {model.family} with head {c['head']!r}")
    kind = (c["rope_scaling"] or {}).get("rope_type", (c["rope_scaling"] or {}).get("type", "default"))
    plain_yarn = not {"attention_factor", "mscale", "mscale_all_dim", "truncate"} & (c["rope_scaling"] or {}).keys()
    for what, wrong in {
        f"hidden_act {c['hidden_act']!r}": c["hidden_act"] != "silu",
        "attention_bias": c.get("attention_bias", False) and model.family == "qwen3",
        f"rope scaling {kind!r}": kind == "dynamic" or (kind == "llama3" and not FAMILIES[model.family][1]) or (kind == "yarn" and not plain_yarn),
    }.items():  # fmt: skip
        if wrong:
            raise ValueError(f"llama.cpp computes no {model.family} with {what}, so this model is not written as GGUF")
    return FAMILIES[model.family]


# -- weights ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tensor:
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]  # of a block format uint8 [rows, bytes], else floats


def _tensors(
    model: Model, leaves: dict[str, Weight], shapes: names.Shapes, rules: trees.Rules, neighbours: bool
) -> Iterator[tuple[str, _Tensor]]:
    """Published name and tensor of each weight of each layer; a leaf is fetched once, when its first layer is made."""
    host = functools.lru_cache(1)(lambda leaf: jax.tree.map(whole, leaves[leaf]))
    for entry in hub.lines(model, prefixed=True):
        leaf, shape = entry.leaves[0], entry.shape(shapes)
        w = leaves[leaf].base if isinstance(leaves[leaf], W8A8) else leaves[leaf]
        jax.eval_shape(dense, w)  # raises, before a byte is written, for what no array stands for
        fits = {kind: _fits(w, entry, shapes[leaf], bits) for kind, bits in CODES.items()}
        kind = "float32" if len(shape) == 1 else trees.match(rules, leaf) or _own(w, fits)
        if kind not in KINDS:
            raise ValueError(f"GGUF files have no {kind!r}; {trees.did_you_mean(str(kind), KINDS, 'there are')}")
        if kind in CODES and shape[-1] % BLOCK:
            kind = "float16"
        heads = neighbours and re.search(r"attention/(q|k)(_bias)?$", leaf)
        rows = _neighbours(shape[0], shapes[leaf][-1]) if heads else slice(None)
        make = functools.partial(_made, entry, rows, kind, fits.get(kind, False))
        for theirs, at in entry.names(shapes):
            yield theirs, _Tensor(kind, shape, lambda make=make, leaf=leaf, at=at: make(jax.tree.map(lambda part: part[at], host(leaf))))


def _made(entry: names.Entry, rows: Any, kind: str, exact: bool, w: Weight) -> np.ndarray:
    """The tensor of one layer's weight."""
    if isinstance(w, Quantized | W8A8) and exact:
        q = w.base if isinstance(w, W8A8) else w
        scales = _laid(entry, _spread(q.scale.astype(np.float32), q.qvalue.shape))[rows, ::BLOCK]
        return _blocks(_laid(entry, q.qvalue.astype(np.int8))[rows], scales, kind)
    gguf, a = _library(), np.asarray(dense(jax.tree.map(jnp.asarray, w)), np.float32)
    return gguf.quants.quantize(np.ascontiguousarray(_laid(entry, a)[rows]), gguf.GGMLQuantizationType[KINDS[kind]])


def _laid(entry: names.Entry, a: np.ndarray) -> np.ndarray:
    """One layer of a leaf as its published tensor lies: [outputs, inputs]."""
    one = (None,) * len(entry.fields)
    return entry.write((0,) * len(one), lambda _: a[one])


def _own(w: Weight, fits: dict[str, bool]) -> str:
    """The kind that holds a weight as it is, or nearly."""
    if is_typed(w):
        return "q4_0" if fits["q4_0"] else "q8_0" if fits["q8_0"] else "float16"
    return str(w.dtype) if str(w.dtype) in KINDS else "float32"


def _fits(w: Weight, entry: names.Entry, full: tuple[int, ...], bits: int) -> bool:
    """Whether codes of so many bits hold those of `w`, and each block of 32 of its rows has one scale."""
    if not isinstance(w, Quantized) or w.zero_point is not None or not jnp.issubdtype(w.qvalue.dtype, jnp.signedinteger):
        return False
    inner = w.scale.shape[len(entry.fields) :]
    rows = _laid(entry, _spread(np.arange(math.prod(inner)).reshape(inner), full[len(entry.fields) :]))
    if round(8 * trees.itemsize(w.qvalue.dtype)) > bits or rows.ndim == 1 or rows.shape[1] % BLOCK:
        return False
    blocks = rows.reshape(len(rows), -1, BLOCK)
    return bool((blocks == blocks[..., :1]).all())


def _spread(part: np.ndarray, full: tuple[int, ...]) -> np.ndarray:
    """A scale in the shape of its codes."""
    for axis, size in enumerate(full):
        part = np.repeat(part, size // part.shape[axis], axis)
    return part


def _blocks(codes: np.ndarray, scales: np.ndarray, kind: str) -> np.ndarray:
    """uint8 [rows, bytes] of int8 codes [rows, inputs] and their scales [rows, inputs / 32]."""
    c = codes.reshape(*scales.shape, BLOCK)
    if kind == "q4_0":  # the first half of a block in the low bits, the second in the high ones
        c = (c + 8).astype(np.uint8)
        c = c[..., : BLOCK // 2] | c[..., BLOCK // 2 :] << 4
    return np.concatenate([scales[..., None].astype(np.float16).view(np.uint8), c.view(np.uint8)], -1).reshape(len(codes), -1)


def _neighbours(rows: int, head_dim: int) -> np.ndarray:
    """The order of rows in which a pair (i, i + H/2) of each head stands side by side."""
    return np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _frequencies(model: Model) -> np.ndarray | None:
    """By what the rotary frequencies of Llama 3's stretch are divided, [H / 2]; None of any other."""
    c = model.config
    if (c["rope_scaling"] or {}).get("rope_type", (c["rope_scaling"] or {}).get("type")) != "llama3":
        return None
    plain, stretched = (ops.rope_frequencies(_head_dim(c), theta=c["rope_theta"], scaling=s)[0] for s in (None, c["rope_scaling"]))
    return np.asarray(plain / stretched, np.float32)


def _head_dim(c: Mapping[str, Any]) -> int:
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


# -- metadata --------------------------------------------------------------------------------------------------------------


def _add_config(writer: Any, model: Model, name: str) -> None:
    gguf, c = _library(), model.config
    windows = [block.attention.window for group in model.module.groups for block in group.blocks if block.attention.window]
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(min([c["max_position_embeddings"], *windows]))
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"] or c["num_attention_heads"])
    writer.add_key_length(_head_dim(c))
    writer.add_value_length(_head_dim(c))
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_rope_dimension_count(_head_dim(c))
    writer.add_rope_freq_base(c["rope_theta"])
    scaling = c["rope_scaling"] or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow") or 1)


# -- tokenizer -------------------------------------------------------------------------------------------------------------

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how a byte-level BPE cuts text first, step by step -> llama.cpp's name for it
CUTS = {("words",): "gpt-2", ("digits", "words"): "smollm", (_LETTERS % "{1,3}",): "llama-bpe", (_LETTERS % "",): "qwen2"}


def _tokenizer_folder(tokenizer: Any, model: Model, scratch: str) -> str | None:
    if isinstance(tokenizer, data.Tokenizer):
        tokenizer.save(scratch)
        return scratch
    if tokenizer is None and os.path.exists(os.path.join(model.source or "", "tokenizer.json")):
        return model.source
    return os.fspath(tokenizer) if tokenizer else None


def _add_tokenizer(writer: Any, folder: str | None, rows: int) -> None:
    """The vocabulary of a tokenizer.json, one token a row of the table, and what goes with it: merges or scores, special tokens, chat template."""
    gguf = _library()
    if folder is None:
        writer.add_tokenizer_model(gguf.NoVocab.tokenizer_model)
        return
    path = os.path.join(folder, "tokenizer.json")
    said = read_json(path, "model")
    inner, added = said["model"], {token["id"]: token for token in said.get("added_tokens") or ()}
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in inner.get("merges") or ()]
    tokens = {i: text for text, i in inner["vocab"].items()} if isinstance(inner["vocab"], dict) else {}
    tokens |= {i: token["content"] for i, token in added.items()}
    cuts = _cuts(said)
    if inner.get("type") != "BPE" or not merges or not (inner.get("byte_fallback") or cuts in CUTS):
        how = f"{inner.get('type')} that cuts text by {list(cuts)}" if merges else f"{inner.get('type')} without merges"
        raise ValueError(f"{path!r} is a {how}, which llama.cpp has no name for; tokenizer=False writes the weights without one")
    if max(tokens) >= rows:
        raise ValueError(f"{path!r} has a token of id {max(tokens)}, and the model a table of {rows}")
    special = gguf.SpecialVocab(folder, load_merges=not inner.get("byte_fallback"), n_vocab=rows)
    for mark in ("bos", "eos"):
        special.add_special_token.setdefault(mark, False)  # said aloud: llama.cpp's own defaults depend on the kind
    special.add_to_gguf(writer, quiet=True)

    def kind(i: int) -> int:
        if i not in tokens:
            return gguf.TokenType.UNUSED
        if i in added:
            return gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED
        if inner.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", tokens[i]):
            return gguf.TokenType.BYTE
        return gguf.TokenType.UNKNOWN if tokens[i] == inner.get("unk_token") else gguf.TokenType.NORMAL

    if inner.get("byte_fallback"):  # SentencePiece's: what was merged first has the highest score
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        known, pieces = set(merges), {tokens[i] for i in tokens if kind(i) == gguf.TokenType.NORMAL}
        cuttings = ((piece[:i], piece[i:]) for piece in sorted(pieces) for i in range(1, len(piece)))
        if lost := [pair for pair in cuttings if pieces.issuperset(pair) and pair not in known]:
            raise ValueError(
                f"{path!r} never merges {lost[0]}, and llama.cpp, which goes by what a merge gives, would; tokenizer=False writes none"
            )
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(ranks.get(tokens.get(i, ""), len(merges))) for i in range(rows)])
        writer.add_add_space_prefix(_begins_with_space(said))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(CUTS[cuts])
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([kind(i) for i in range(rows)])


def _steps(said: dict[str, Any], part: str, inside: str) -> list[dict[str, Any]]:
    one = said.get(part) or {}
    return one[inside] if one.get("type") == "Sequence" else [one]


def _cuts(said: dict[str, Any]) -> tuple[str, ...]:
    """The steps of a tokenizer.json's pre-tokenizer, as CUTS names them."""
    found = []
    for step in _steps(said, "pre_tokenizer", "pretokenizers"):
        if step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex", step["pattern"]))
        elif step.get("type") == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            found += ["words"] if step.get("use_regex", True) else []
        else:
            found.append(step.get("type") or "nothing")
    return tuple(found)


def _begins_with_space(said: dict[str, Any]) -> bool:
    """Whether a blank is put before the text."""
    cuts = _steps(said, "pre_tokenizer", "pretokenizers")
    spaced = any(step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "never") != "never" for step in cuts)
    return spaced or any(step.get("type") == "Prepend" for step in _steps(said, "normalizer", "normalizers"))
