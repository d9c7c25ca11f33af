"""Folders in and out without PyTorch: files made here by `save`, laid on meshes, broken in every way."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import load_tensors
from safetensors.numpy import load_file, save_file

import bigflax
from bigflax import data, models, weights
from bigflax.models import published
from bigflax.sharding import make_mesh

TINY = {"gpt2": dict(vocab_size=40, n_embd=32), "llama": dict(vocab_size=40, hidden_size=32), "bert": dict(vocab_size=40, hidden_size=32)}
each_family = pytest.mark.parametrize("family", TINY)


def made(family, **more):
    model = models.create(family, size="tiny", **TINY[family], **more)
    return model, jax.jit(model.init)(jax.random.key(0))


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32)), a, b)


@pytest.fixture
def folder(tmp_path):
    bigflax.save(*made("llama"), str(tmp_path / "llama"))
    return tmp_path / "llama"


@each_family
def test_what_is_saved_is_loaded(family, tmp_path):
    model, params = made(family)
    bigflax.save(model, params, str(tmp_path))
    again, loaded = bigflax.load(str(tmp_path))
    same(loaded, params)
    assert {k: v for k, v in again.config.items() if k != "num_labels"} == {k: v for k, v in model.config.items() if k != "num_labels"}
    assert again.axes == model.axes


@each_family
def test_shards_with_an_index(family, tmp_path):
    model, params = made(family)
    bigflax.save(model, params, str(tmp_path), shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and all((tmp_path / file).stat().st_size < 20_000 + 4 * 40 * 128 for file in files)
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in load_tensors(tmp_path).values())
    same(bigflax.load(str(tmp_path))[1], params)
    bigflax.save(model, params, str(tmp_path))  # over it, in one file: nothing of the shards is left
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, tensor=4)], ids=str)
@each_family
def test_onto_a_mesh(family, sizes, tmp_path):
    """Each device reads its own slices, and gets what it would have got by cutting the whole."""
    model, params = made(family)
    bigflax.save(model, params, str(tmp_path))
    mesh = make_mesh(**sizes)
    _, laid = bigflax.load(str(tmp_path), mesh=mesh)
    same(laid, params)
    want = bigflax.sharding.shardings(model.shapes(), model.axes, mesh)
    assert jax.tree.map(lambda w: w.sharding, laid) == want
    assert any(not w.sharding.is_fully_replicated for w in jax.tree.leaves(laid))


def test_dtype(folder, tmp_path):
    model, params = bigflax.load(str(folder), dtype="bfloat16")
    assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")} and model.config["dtype"] == "bfloat16"
    bigflax.save(model, params, str(tmp_path / "half"))
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size
    again, same_params = bigflax.load(str(tmp_path / "half"))  # as stored
    same(same_params, params)
    assert again.config["dtype"] == "bfloat16"
    bigflax.save(again, same_params, str(tmp_path / "wide"), dtype="float32")
    assert {w.dtype for w in load_tensors(tmp_path / "wide").values()} == {np.dtype("float32")}


def test_another_head(tmp_path):
    """A language model's body under a new classifier, whose weights are fresh; without naming it, it is missing."""
    model, params = made("bert")
    bigflax.save(model, params, str(tmp_path))
    classifier, fresh = bigflax.load(str(tmp_path), head="sequence_classification", num_labels=11)
    same({k: v for k, v in fresh.items() if k != "head"}, {k: v for k, v in params.items() if k != "head"})
    assert fresh["head"]["scores"]["w"].shape == (32, 11) and float(jnp.abs(fresh["head"]["scores"]["w"]).max()) > 0
    bigflax.save(classifier, fresh, str(tmp_path / "classifier"))
    again, loaded = bigflax.load(str(tmp_path / "classifier"))
    same(loaded, fresh)
    assert again.config["head"] == "sequence_classification" and again.config["num_labels"] == 11
    body, _ = bigflax.load(str(tmp_path), head=None)
    assert "pooler_output" in jax.eval_shape(body.apply, body.shapes(), input_ids=np.ones((1, 4), int))


def test_typed_weights_are_merged_where_asked(folder, tmp_path):
    """As they are they make a folder of our own: tests/test_packed.py."""
    model, params = bigflax.load(str(folder))
    q, axes = params["blocks"]["attention"]["q"], model.axes["blocks"]["attention"]["q"]
    typed = weights.lora(weights.quantize(q, axes=axes), 2, axes=axes, rng=jax.random.key(0))
    params["blocks"]["attention"]["q"] = typed
    bigflax.save(model, params, str(tmp_path / "merged"), merge=True)
    same(bigflax.load(str(tmp_path / "merged"))[1]["blocks"]["attention"]["q"], weights.dense(typed))


def test_tokenizer_files_are_carried_over(folder, tmp_path):
    data.byte_tokenizer().save(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no")
    bigflax.save(*bigflax.load(str(folder)), str(tmp_path / "out"))
    assert data.load_tokenizer(tmp_path / "out").fingerprint == data.byte_tokenizer().fingerprint
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    bigflax.save(*made("gpt2"), str(tmp_path / "given"), tokenizer=data.byte_tokenizer())
    assert (tmp_path / "given" / "tokenizer.json").exists()


def edit_config(folder, **fields):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **fields}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def cut(folder, size):
    os.truncate(folder / "model.safetensors", size)


DOWN = "model.layers.1.mlp.down_proj.weight"
BROKEN = {  # what is done to the folder, what the sentence must say
    "cut off": (lambda f: cut(f, 30_000), "model.safetensors' is damaged or cut off"),
    "cut off in its header": (lambda f: cut(f, 100), "damaged or cut off"),
    "empty": (lambda f: cut(f, 0), "damaged or cut off"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors$"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "another format, which transformers can load"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json' is not JSON"),
    "a tensor missing": (lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if k != DOWN}), "lacks layers.1.mlp.down_proj.weight"),
    "one too many": (lambda f: edit_tensors(f, lambda t: {**t, "model.extra": np.ones(2)}), "holds extra, which llama"),
    "layers too many": (lambda f: edit_config(f, num_hidden_layers=1), "holds layers.1.* and 6 more, which llama"),
    "a wrong shape": (lambda f: edit_tensors(f, lambda t: {**t, DOWN: t[DOWN].T}), r"down_proj.weight in '.*' has shape \(176, 32\); .* \(32, 176\)"),
    "stored as int8": (
        lambda f: edit_tensors(f, lambda t: {k: v.astype(np.int8) for k, v in t.items()}), "is stored as I8, which is not supported; F64",
    ),
    "an unknown type": (lambda f: edit_config(f, model_type="lama"), "model_type 'lama'; the families are 'llama'"),
    "an unknown field": (lambda f: edit_config(f, attention_sinks=4), r"field 'attention_sinks' \(4\), which llama does not support"),
    "a value we do not compute": (lambda f: edit_config(f, pretraining_tp=2), "says pretraining_tp = 2, and llama is supported with 1 only"),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), "says quantization_config = .*, and llama .* None only"),
    "an unknown architecture": (lambda f: edit_config(f, architectures=["LlamaForTokens"]), "'LlamaForTokens' is not known; there are"),
    "config that is no object": (lambda f: (f / "config.json").write_text("[]"), "config.json' is not an object"),
    "an unknown scaling": (lambda f: edit_config(f, rope_scaling={"rope_type": "spiral"}), "rope has no scaling 'spiral'"),
}  # fmt: skip


@pytest.mark.parametrize("how, want", BROKEN.values(), ids=BROKEN)
def test_broken_folders(how, want, folder):
    how(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=want):
        bigflax.load(str(folder))


REFUSED = {  # family -> a field, and a value of it that is another function
    "albert": [("num_hidden_groups", 2), ("inner_group_num", 2), ("is_decoder", True)],
    "mixtral": [("router_jitter_noise", 0.1)],
    "modernbert": [("decoder_bias", False), ("mlp_dropout", 0.1), ("tie_word_embeddings", False), ("rope_scaling", {"factor": 2.0})],
    "qwen2_moe": [("decoder_sparse_step", 2), ("mlp_only_layers", [0])],
    "qwen3_moe": [("decoder_sparse_step", 2), ("mlp_only_layers", [0])],
}


@pytest.mark.parametrize("family, field, value", [(family, *row) for family, rows in REFUSED.items() for row in rows], ids=str)
def test_values_that_a_family_does_not_compute(family, field, value):
    with pytest.raises(ValueError, match=f"says {field} = .*, and {family} is supported with .* only"):
        published.understand({"model_type": family, field: value}, "folder")


def test_broken_index(tmp_path):
    bigflax.save(*made("gpt2"), str(tmp_path), shard_bytes=20_000)
    kept = tmp_path / "kept"
    shutil.copy(next(tmp_path.glob("model-00002*")), kept)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="has no model-00002"):
        bigflax.load(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an object with 'weight_map'"):
        bigflax.load(str(tmp_path))


def test_a_hub_id_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is neither a folder here nor to be had from the hub"):
        bigflax.load("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '\./nothing', and a hub id is written owner/name"):
        bigflax.load("./nothing")


def test_token_ids_out_of_range(folder):
    model, params = bigflax.load(str(folder))
    with pytest.raises(ValueError, match="token id 40 is outside of the vocabulary of 40"):
        model.apply(params, input_ids=np.array([[3, 40]]))


def test_other_weights_are_refused(folder, tmp_path):
    model, params = bigflax.load(str(folder))
    with pytest.raises(ValueError, match="not the weights of this model: norm/scale is in one"):
        bigflax.save(model, {k: v for k, v in params.items() if k != "norm"}, str(tmp_path / "x"))


MEASURE = r"""
import re, sys, jax, jax.numpy as jnp
from bigflax import hub
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])  # getrusage's would begin at the parent's
jax.block_until_ready(jnp.zeros(1))
before = peak()
_, params = hub.load(sys.argv[1])
jax.block_until_ready(params)
print(peak() - before, sum(w.nbytes for w in jax.tree.leaves(params)) // 1024)
"""


@pytest.mark.slow
def test_no_second_copy_in_memory(tmp_path):
    """1 GB of weights: loading takes them once; of the mapped files no more than a few tensors stay in memory."""
    config = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16, vocab_size=1000)
    model = models.create("llama", **config)
    largest = max(w.size * 4 for w in jax.tree.leaves(model.shapes())) // 1024
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.5), model.shapes())
    bigflax.save(model, params, str(tmp_path), shard_bytes=2**28)
    del params
    env = {**os.environ, "XLA_FLAGS": ""}  # one device: eight fake ones would hold a whole copy each of what is not sharded
    shown = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], env=env, capture_output=True, text=True, check=True)
    grown, stored = map(int, shown.stdout.split())
    assert stored > 1000 * 1000 < grown  # KiB; the second shows that the measure sees what it is to see
    assert grown < stored + 150_000 < stored + largest, (grown, stored, largest)  # tensors being read, and what tracing takes
