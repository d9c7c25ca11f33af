"""GGUF files, read back by the package's own reader: the same weights, codes to the bit; what llama.cpp needs to know; what it does not compute is refused."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import load_tensors
from test_packed import quantized

import bigflax
from bigflax import data, gguf, models, ops, peft, trees, weights
from bigflax.main import main
from bigflax.weights import dense

package = pytest.importorskip("gguf", reason="the extra gguf is not installed")
TINY = dict(vocab_size=96, hidden_size=64, intermediate_size=64, max_position_embeddings=256)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(num_key_value_heads=4),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(),
}


def made(family, **more):
    model, rng = models.create(family, size="tiny", **TINY | more), np.random.default_rng(0)
    return model, jax.tree.map(lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), s.dtype), model.shapes())


@pytest.fixture(scope="module")
def llama():
    return made("llama")


def read(path, heads=None):
    """Every tensor of a file: its kind, and its numbers; with (heads, kv_heads) rows of q and k as Hugging Face has them."""
    found = {}
    for tensor in package.GGUFReader(path).tensors:
        a = package.quants.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in tensor.shape[::-1]])
        if heads and (part := tensor.name.split(".")[-2]) in ("attn_q", "attn_k"):
            N = heads[part == "attn_k"]
            a = a.reshape(N, len(a) // N // 2, 2, -1).swapaxes(1, 2).reshape(a.shape)
        found[tensor.name] = (tensor.tensor_type.name, a)
    return found


def fields(path):
    return {name: field.contents() for name, field in package.GGUFReader(path).fields.items()}


THEIRS = {
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}, **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}  # fmt: skip


def renamed(name):
    """llama.cpp's name of a published tensor."""
    stem, end = name.removeprefix("model.").rsplit(".", 1)
    if stem == "lm_head":
        return f"output.{end}"
    layer, _, part = stem.removeprefix("layers.").partition(".") if stem.startswith("layers.") else ("", "", stem)
    return f"{f'blk.{layer}.' if layer else ''}{THEIRS[part]}.{end}"


@pytest.mark.parametrize("family, more", MODELS.items(), ids=MODELS)
def test_the_same_weights_as_the_published_folder(family, more, tmp_path):
    model, params = made(family, **more)
    bigflax.save(model, params, str(tmp_path))
    gguf.save(model, params, str(tmp_path / "m.gguf"))
    heads = (4, model.config["num_key_value_heads"]) if gguf.FAMILIES[family][1] else None
    got, want = read(tmp_path / "m.gguf", heads), {renamed(name): w for name, w in load_tensors(tmp_path).items()}
    assert got.keys() == want.keys()
    for name, w in want.items():
        assert got[name][0] == "F32"
        np.testing.assert_array_equal(got[name][1], w, err_msg=name)
    if heads:
        assert not np.array_equal(read(tmp_path / "m.gguf")["blk.0.attn_q.weight"][1], want["blk.0.attn_q.weight"])


def half_scale(w):
    """The weight whose scale is what a float16 holds of it."""
    return dataclasses.replace(w, scale=w.scale.astype(jnp.float16).astype(jnp.float32))


def channels(qtype):
    return lambda w, axes: weights.quantize(w, qtype, axes=axes)


EXACT = {  # codes that a format holds, and which by default
    "int8, 32": (quantized("int8", 32), "Q8_0"),
    "int8, channels": (channels("int8"), "Q8_0"),
    "int4, 32": (quantized("int4", 32), "Q4_0"),
    "int4, 64": (quantized("int4", 64), "Q4_0"),
    "int3, 32": (quantized("int3", 32), "Q4_0"),
    "int2, channels": (channels("int2"), "Q4_0"),
    "w8a8": (lambda w, axes: weights.W8A8(weights.quantize(w, axes=axes)), "Q8_0"),
}
LEAVES = {"blocks/attention/q": "attn_q", "blocks/mlp/up": "ffn_up", "blocks/mlp/down": "ffn_down"}


def with_leaves(model, params, make, names=LEAVES):
    one = lambda name, w, axes: make(w, axes) if name in names else w
    return trees.map_named(one, params, model.axes)


@pytest.mark.parametrize("make, kind", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_codes_are_kept(make, kind, dtype, llama, tmp_path):
    model, params = llama
    typed = with_leaves(model, params, make)
    gguf.save(model, typed, str(tmp_path / "m.gguf"), dtype=dtype)
    got = read(tmp_path / "m.gguf", (4, 2))
    is_codes = lambda w: isinstance(w, weights.Quantized)
    halved = jax.tree.map(lambda w: half_scale(w) if is_codes(w) else w, typed, is_leaf=is_codes)
    bigflax.save(model, halved, str(tmp_path), merge=True)
    for name, w in load_tensors(tmp_path).items():
        theirs = renamed(name)
        if theirs.split(".")[-2] in LEAVES.values():
            assert got[theirs][0] == ("Q8_0" if dtype else kind)
            np.testing.assert_array_equal(got[theirs][1], w, err_msg=name)  # a code times a float16, in float32 here and there


ROUNDED = {  # what no format holds as it is: (weight, dtype) -> the kind, and how far a block's numbers may be off, of the largest in it
    "array to q8_0": (lambda w, axes: w, "q8_0", "Q8_0", 1 / 254 + 2**-11),
    "array to q4_0": (lambda w, axes: w, "q4_0", "Q4_0", 1 / 8 + 2**-10),  # codes end at 7 on the other side of the largest
    "array to float16": (lambda w, axes: w, "float16", "F16", 2**-11),
    "array to bfloat16": (lambda w, axes: w, "bfloat16", "BF16", 2**-8),
    "int8 to q4_0": (channels("int8"), "q4_0", "Q4_0", 1 / 8 + 2**-10),
    "int4 of 8": (quantized("int4", 8), None, "F16", 2**-11),
    "nf4": (quantized("nf4", 32), None, "F16", 2**-11),
    "lora over int4": (lambda w, axes: weights.lora(quantized("int4", 32)(w, axes), 2, axes=axes, rng=jax.random.key(0)), "q8_0", "Q8_0", 1 / 254 + 2**-11),
    "low rank": (lambda w, axes: weights.LowRank(w[:, :, 0], w[:, :16], 2), "q8_0", "Q8_0", 1 / 254 + 2**-11),
}  # fmt: skip


@pytest.mark.parametrize("make, dtype, kind, near", ROUNDED.values(), ids=ROUNDED)
def test_what_does_not_fit_is_rounded(make, dtype, kind, near, llama, tmp_path):
    model, params = llama
    typed = with_leaves(model, params, make, ["blocks/attention/q"])
    gguf.save(model, typed, str(tmp_path / "m.gguf"), dtype=dtype)
    got = read(tmp_path / "m.gguf", (4, 2))
    q_LDNH = np.asarray(dense(typed["blocks"]["attention"]["q"]), np.float32)
    for i in range(2):
        found, a = got[f"blk.{i}.attn_q.weight"]
        blocks, off = (x.reshape(-1, 32) for x in (q_LDNH[i].reshape(64, -1).T, a - q_LDNH[i].reshape(64, -1).T))
        assert found == kind and 0 < np.abs(off).max()
        assert (np.abs(off) <= near * np.abs(blocks).max(-1, keepdims=True)).all()


def test_rules_and_what_32_does_not_divide(tmp_path):
    model, params = made("llama", intermediate_size=80)
    gguf.save(model, params, str(tmp_path / "m.gguf"), dtype=[("embed/.*|head/.*", "q8_0"), (".*", "q4_0")])
    kinds = {name: kind for name, (kind, _) in read(tmp_path / "m.gguf").items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "F16" and kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.1.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert fields(tmp_path / "m.gguf")["general.file_type"] == 2
    for rules, want in (([("embed", "q8_0")], "matches no weight"), ("q5_k", "GGUF files have no 'q5_k'; .*'q8_0'")):
        with pytest.raises(ValueError, match=want):
            gguf.save(model, params, str(tmp_path / "no.gguf"), dtype=rules)
    adapted = with_leaves(model, params, lambda w, axes: weights.adapter(w, 2, axes=axes, rng=jax.random.key(0)))
    with pytest.raises(ValueError, match="an adapter is a function"):
        gguf.save(model, adapted, str(tmp_path / "no.gguf"))
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


SAID = {  # what a model is, and what its file says of it
    "llama": (dict(rope_scaling=LLAMA3), {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "block_count": 2,
        "context_length": 256, "embedding_length": 64, "feed_forward_length": 64, "rope.dimension_count": 16, "rope.freq_base": 10000.0,
        "vocab_size": 96, "attention.layer_norm_rms_epsilon": np.float32(1e-6)}),
    "mistral": (dict(sliding_window=128, rope_scaling=dict(rope_type="linear", factor=2.0)),
        {"context_length": 128, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    "qwen3": (dict(rope_scaling=YARN), {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}),
}  # fmt: skip


@pytest.mark.parametrize("family, more, want", [(family, *row) for family, row in SAID.items()], ids=SAID)
def test_metadata(family, more, want, tmp_path):
    model, params = made(family, **more)
    gguf.save(model, params, str(tmp_path / "m.gguf"), name="mine")
    said, arch = fields(tmp_path / "m.gguf"), gguf.FAMILIES[family][0]
    assert {name: said[f"{arch}.{name}"] for name in want} == want
    assert {
        "general.architecture": arch,
        "general.name": "mine",
        "general.file_type": 0,
        "tokenizer.ggml.model": "no_vocab",
    }.items() <= said.items()
    if family == "llama":
        factors = read(tmp_path / "m.gguf")["rope_freqs.weight"][1]
        want = ops.rope_frequencies(16, scaling=LLAMA3)[0]
        np.testing.assert_allclose(ops.rope_frequencies(16)[0] / factors, want, rtol=2**-22)  # two quotients


REFUSED = {
    "another family": ("gpt2", dict(n_embd=64, vocab_size=96), "language models of llama, mistral, qwen2, qwen3; this is a gpt2"),
    "another head": ("llama", dict(TINY, head=None), "this is a llama with head None"),
    "another activation": ("qwen2", dict(TINY, hidden_act="gelu"), "no qwen2 with hidden_act 'gelu'"),
    "a stretch by length": ("llama", dict(TINY, rope_scaling=dict(YARN, rope_type="dynamic")), "rope scaling 'dynamic'"),
    "a stretch of llama's": ("qwen3", dict(TINY, rope_scaling=LLAMA3), "no qwen3 with rope scaling 'llama3'"),
    "a bias": ("qwen3", dict(TINY, attention_bias=True), "no qwen3 with attention_bias"),
}


@pytest.mark.parametrize("family, more, want", REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_does_not_compute(family, more, want, tmp_path):
    model = models.create(family, size="tiny", **more)
    with pytest.raises(ValueError, match=want):
        gguf.save(model, model.shapes(), str(tmp_path / "m.gguf"))


# -- tokenizers ------------------------------------------------------------------------------------------------------------

TEXT = "The cat sat on the windowsill; a kitten slept by the window.\n" * 9


def sentencepiece(drop=()):
    """A BPE over characters with bytes to fall back to, all ways to merge a piece among its merges, as the converted tokenizers of Llama 2 have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    pieces = ["▁t", "he", "▁the", "▁c", "at", "▁cat", "in", "win", "▁win", "nd"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *sorted({*"".join(pieces), *"dows."})]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pairs = [(piece[:i], piece[i:]) for piece in pieces[259:] for i in range(1, len(piece)) if {piece[:i], piece[i:]} <= vocab.keys()]
    inner = Tokenizer(BPE(vocab=vocab, merges=[p for p in pairs if p not in drop], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.ByteFallback()
    inner.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in pieces[:3]])
    return data.Tokenizer(inner, bos="<s>", eos="</s>")


def cut_otherwise():
    from tokenizers.pre_tokenizers import Sequence, Whitespace

    tokenizer = data.train_bpe([TEXT], 280)
    tokenizer.inner.pre_tokenizer = Sequence([Whitespace(), tokenizer.inner.pre_tokenizer])
    return tokenizer


def test_a_byte_level_tokenizer(tmp_path):
    model, params = made("llama", vocab_size=300)
    tokenizer = data.train_bpe([TEXT], 290)
    tokenizer.template = "{{ messages }}"
    gguf.save(model, params, str(tmp_path / "m.gguf"), tokenizer=tokenizer)
    said = fields(tmp_path / "m.gguf")
    size = tokenizer.vocab_size
    assert said["tokenizer.ggml.model"] == "gpt2" and said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.ggml.tokens"] == [*map(tokenizer.inner.id_to_token, range(size)), *(f"[PAD{i}]" for i in range(size, 300))]
    assert said["tokenizer.ggml.token_type"] == [3 if i in tokenizer.special_ids else 1 if i < size else 5 for i in range(300)]
    merges = json.loads(tokenizer.inner.to_str())["model"]["merges"]
    assert [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]] == [tuple(pair) for pair in merges]
    assert said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id and said["tokenizer.ggml.padding_token_id"] == tokenizer.pad_id
    assert said["tokenizer.chat_template"] == "{{ messages }}" and said["tokenizer.ggml.add_bos_token"] is False


def test_a_sentencepiece_tokenizer(tmp_path):
    model, params = made("llama", vocab_size=300)
    tokenizer = sentencepiece()
    gguf.save(model, params, str(tmp_path / "m.gguf"), tokenizer=tokenizer)
    said = fields(tmp_path / "m.gguf")
    assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_space_prefix"] is True
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert said["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 6] and said["tokenizer.ggml.token_type"][259] == 1
    scores = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"], strict=True))
    pieces, text = list("▁the▁cat▁in▁the▁windows▁and"), "the cat in the windows and"
    while pairs := [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if scores.get(a + b, -1e9) > -100]:
        i = -max(pairs)[1]  # llama.cpp's rule: the pair that makes the best piece, the first of equals
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    assert pieces == tokenizer.inner.encode(text, add_special_tokens=False).tokens


UNKNOWN = {
    "bytes alone": (data.byte_tokenizer, "is a BPE without merges, which llama.cpp has no name for; tokenizer=False"),
    "cut otherwise": (cut_otherwise, r"BPE that cuts text by \['Whitespace', 'words'\], which llama.cpp has no name for"),
    "merges that are not all": (lambda: sentencepiece(drop=[("▁t", "he")]), r"never merges \('▁t', 'he'\), and llama.cpp"),
    "too many tokens": (lambda: data.train_bpe([TEXT * 9, "0123456789"], 310), "has a token of id 30., and the model a table of 300"),
}


@pytest.mark.parametrize("make, want", UNKNOWN.values(), ids=UNKNOWN)
def test_tokenizers_that_are_refused(make, want, tmp_path):
    model, params = made("llama", vocab_size=300)
    with pytest.raises(ValueError, match=want):
        gguf.save(model, params, str(tmp_path / "m.gguf"), tokenizer=make())
    assert not list(tmp_path.iterdir())


# -- the command, and llama.cpp itself --------------------------------------------------------------------------------------


def test_convert(tmp_path, capsys):
    model, params = made("llama", vocab_size=300)
    typed = peft.quantized(params, [("blocks/.*/(q|k|v|out|up|down|gate)", "int4")], axes=model.axes, group=32)
    bigflax.save(model, typed, str(tmp_path / "ours"), tokenizer=data.train_bpe([TEXT], 290))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "m.gguf")]) == 0
    kinds = {name: kind for name, (kind, _) in read(tmp_path / "m.gguf").items()}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0" and kinds["token_embd.weight"] == "F32"
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == "gpt-2"  # carried along
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "8.gguf"), "--dtype=q8_0"]) == 0
    assert read(tmp_path / "8.gguf")["token_embd.weight"][0] == "Q8_0"
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "plain")]) == 0
    np.testing.assert_array_equal(bigflax.load(str(tmp_path / "plain"))[1]["blocks"]["mlp"]["up"], dense(typed["blocks"]["mlp"]["up"]))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "no"), "--dtype=q8_0"]) == 2
    assert "q8_0 is a type of GGUF files; call the target" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_llama_cpp_computes_the_same(family, tmp_path):
    llama_cpp = pytest.importorskip("xllamacpp", reason="a build of llama.cpp (PyPI xllamacpp) is not installed")
    more = {"llama": dict(MODELS["llama"], rope_scaling=LLAMA3), "qwen3": dict(rope_scaling=YARN)}.get(family, MODELS[family])
    model, params = made(family, vocab_size=300, **more)
    params = trees.map_named(lambda name, w: jnp.ones_like(w) if name.endswith("scale") else 4 * w, params)  # so that attention decides
    tokenizer, text = data.train_bpe([TEXT], 290), "The cat slept by 12 windows"
    gguf.save(model, params, str(tmp_path / "m.gguf"), tokenizer=tokenizer)
    options = llama_cpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(tmp_path / "m.gguf"), 256, 1, False
    asked = dict(prompt=text, n_predict=1, n_probs=300, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, samplers=[], seed=1)
    said = llama_cpp.Server(options).handle_completions(asked)
    ids = tokenizer.encode(text)
    assert said["usage"]["prompt_tokens"] == len(ids)
    got = {one["id"]: one["logprob"] for one in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    want = jax.nn.log_softmax(model.apply(params, input_ids=ids[None])["logits"][0, -1])
    # llama.cpp keeps keys and values in float16, and sums in other orders: here 1% of the logits' spread; rows of q in a wrong order are 300% off
    np.testing.assert_allclose([got[i] for i in sorted(got)], want[np.array(sorted(got))], atol=0.05 * float(jnp.std(want)))
