"""Our own folder: what is saved is loaded to the bit, whatever its type, on any mesh; on disk it takes the bits that it needs; what is damaged is named."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from safetensors.numpy import load_file, save_file
from test_checkpoint import assert_same
from test_hub import MEASURE
from test_weights import CURVED, ROUNDED, W8A8, WEIGHTS

import bigflax
from bigflax import models, packed, peft, trees, weights
from bigflax.models.published import OURS
from bigflax.sharding import TABLE, make_mesh, shardings
from bigflax.tensors import map_file

KEY = jax.random.key(0)
TINY = {
    "llama": dict(vocab_size=40, hidden_size=32, intermediate_size=48),
    "bert": dict(vocab_size=40, hidden_size=32, intermediate_size=64),
    "t5": dict(vocab_size=40, d_model=32, d_ff=64),
}
Q, AXES = "blocks/attention/q", "layers | embed -> heads head_dim"


def made(family, **more):
    model, rng = models.create(family, size="tiny", **TINY[family], **more), np.random.default_rng(0)
    return model, jax.tree.map(lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), s.dtype), model.shapes())


@pytest.fixture(scope="module")
def llama():
    return made("llama")


def with_q(params, w):
    """The weights with another in the place of the queries' matrix."""
    return trees.map_named(lambda name, leaf: w if name == Q else leaf, params)


def quantized(qtype, group=8):
    return lambda w, axes: qwix.quantize(w, qtype, channelwise_axes=(0, 2, 3), tiled_axes={1: group})


# what the laws' table has not: every format of codes, and other parts than float32
FORMATS = {
    **{kind: quantized(kind) for kind in ("int8", "int7", "int5", "int4", "int3", "int2", "nf4", "float8_e4m3fn", "float8_e5m2")},
    **{kind: quantized(kind, 32) for kind in ("mxfp4", "mxfp8")},
    "int4 with a zero": lambda w, axes: qwix.quantize(
        w, "int4", channelwise_axes=(0, 2, 3), tiled_axes={1: 8}, calibration_method="minmax"
    ),
    "int8 named by its dtype": lambda w, axes: qwix.quantize(w, jnp.int8, channelwise_axes=(0, 2, 3)),
    "bfloat16 scales": lambda w, axes: weights.quantize(w.astype(jnp.bfloat16), "int4", axes=axes, group=8),
    **{f"w8a8, {name}": make for name, (make, _) in W8A8.items() if name == "each row"},
    "dora over nf4": lambda w, axes: weights.dora(weights.quantize(w, "nf4", axes=axes, group=8), 2, axes=axes, rng=KEY, alpha=3.0),
}
ALL = {name: make for name, make in (WEIGHTS | ROUNDED | CURVED | FORMATS).items() if not name.startswith("observed")}  # is not saved


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_what_is_saved_is_loaded_to_the_bit_on_any_mesh(make, llama, tmp_path):
    model, params = llama
    params = with_q(params, make(params["blocks"]["attention"]["q"], AXES))
    packed.write(str(tmp_path), model, params)
    record = packed.open_record(str(tmp_path))
    assert record is not None
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(fsdp=4, tensor=2)):
        again = packed.read(str(tmp_path), record, model, dtype=jnp.float32, mesh=mesh, table=TABLE, head=False, new=None)
        assert_same(params, again)  # types and static fields are the trees' structure
        assert jax.tree.map(lambda x: x.sharding, again) == shardings(params, model.axes, mesh)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(again))


BITS = {"int8": 8, "int7": 7, "int5": 5, "int4": 4, "int3": 3, "int2": 2, "nf4": 4, "mxfp4": 4, "float8_e4m3fn": 8, "masked": 1}


@pytest.mark.parametrize("name, bits", BITS.items())
def test_bytes_on_disk(name, bits, llama, tmp_path):
    model, params = llama
    q = params["blocks"]["attention"]["q"]
    bigflax.save(model, with_q(params, ALL[name](q, AXES)), str(tmp_path))
    file = tmp_path / "weights.safetensors"
    sizes = {tensor.name: tensor.end - tensor.begin for tensor in map_file(str(file)).values()}
    assert sizes[f"{Q}/{'mask' if name == 'masked' else 'qvalue'}"] == q.size * bits // 8
    assert os.path.getsize(file) == 8 + int.from_bytes(file.read_bytes()[:8], "little") + sum(sizes.values())


@pytest.mark.parametrize("bits", range(1, 8))
def test_rows_are_cut_where_a_shard_begins(bits):
    dtypes = [d for d in ("bool", "int2", "int4", "uint4", "float4_e2m1fn", "int8", "uint8") if packed_width(d) >= bits]
    for dtype, n in itertools.product(dtypes, (1, 3, 8, 21)):
        codes = np.random.default_rng(n).integers(0, 2**bits, (2, n), np.uint8)
        if dtype.startswith("float"):
            a = codes.view(jnp.dtype(dtype))
        else:
            a = (codes.astype(int) - (2 ** (bits - 1) if dtype.startswith("int") else 0)).astype(jnp.dtype(dtype))
        rows, said = packed.pack(a, bits), {"dtype": dtype, "bits": bits, "shape": [2, n]}
        assert rows.shape == (2, -(-n * bits // 8))
        for begin, end in itertools.combinations(range(n + 1), 2):
            index = (slice(1, 2), slice(begin, end))
            np.testing.assert_array_equal(packed._slice(rows, said, index).astype(float), a[index].astype(float))


def packed_width(dtype):
    return 1 if dtype == "bool" else round(8 * trees.itemsize(jnp.dtype(dtype)))


KINDS = {  # what becomes of the matrices: a chain of everything
    "int4": lambda params, axes: peft.quantized(params, [("blocks/.*/(q|k|up|down)", "int4")], axes=axes),
    "qlora": lambda params, axes: peft.lora(params, [("blocks/(attention/.|mlp/up)", 4)], axes=axes, rng=KEY, base="nf4"),
}


@pytest.mark.parametrize("family, kind", [("llama", "qlora"), ("bert", "int4")])
def test_a_folder_gives_the_same_outputs(family, kind, tmp_path):
    model, params = made(family)
    params = KINDS[kind](params, model.axes)
    bigflax.save(model, params, str(tmp_path), tokenizer=bigflax.data.byte_tokenizer())
    given = dict(input_ids=np.arange(10).reshape(2, 5), attention_mask=np.ones((2, 5), int))
    again, loaded = bigflax.load(str(tmp_path))
    assert again.family == family and again.config | {"num_labels": 2} == model.config | {"num_labels": 2}
    want, got = jax.jit(model.apply)(params, **given), jax.jit(again.apply)(loaded, **given)
    jax.tree.map(np.testing.assert_array_equal, want, got)
    assert bigflax.data.load_tokenizer(str(tmp_path)).fingerprint == bigflax.data.byte_tokenizer().fingerprint
    bigflax.save(again, loaded, str(tmp_path / "again"))  # with what was carried along
    assert_same(bigflax.load(str(tmp_path / "again"), mesh=make_mesh(fsdp=8))[1], params)
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "config.json", "tokenizer.json", "tokenizer_config.json", "weights.json", "weights.safetensors",
    ]  # fmt: skip


def test_one_folder_holds_one_model(llama, tmp_path):
    """Ours over a published one and the other way round, in one file and in many: nothing of the last is left."""
    model, params = llama
    typed = KINDS["int4"](params, model.axes)
    there = lambda: sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(("model-", "weights-")))
    bigflax.save(model, params, str(tmp_path), shard_bytes=20_000)
    bigflax.save(model, typed, str(tmp_path), shard_bytes=20_000)
    assert there() == ["config.json", "weights.json", "weights.safetensors.index.json"]
    files = {*json.loads((tmp_path / "weights.safetensors.index.json").read_text())["weight_map"].values()}
    assert len(files) > 2 and {p.name for p in tmp_path.glob("*.safetensors")} == files
    assert_same(bigflax.load(str(tmp_path))[1], typed)
    bigflax.save(model, typed, str(tmp_path), merge=True)
    assert there() == ["config.json", "model.safetensors"]
    assert_same(bigflax.load(str(tmp_path))[1], jax.tree.map(weights.dense, typed, is_leaf=weights.is_typed))


def test_a_writer_that_dies_leaves_nothing_that_looks_whole(llama, tmp_path, monkeypatch):
    model, params = llama
    typed = KINDS["int4"](params, model.axes)
    bigflax.save(model, typed, str(tmp_path))
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bigflax.save(model, typed, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        bigflax.load(str(tmp_path))


def test_dtype_is_that_of_arrays_alone(llama, tmp_path):
    model, params = llama
    typed = KINDS["qlora"](params, model.axes)
    want = jax.tree.map(lambda w: w if weights.is_typed(w) else w.astype(jnp.bfloat16), typed, is_leaf=weights.is_typed)
    bigflax.save(model, typed, str(tmp_path / "wide"))
    bigflax.save(model, typed, str(tmp_path / "half"), dtype="bfloat16")
    for folder, dtype in (("wide", "bfloat16"), ("half", None)):
        again, loaded = bigflax.load(str(tmp_path / folder), dtype=dtype)
        assert again.config["dtype"] == "bfloat16"
        assert_same(loaded, want)
    assert {m.dtype.name for m in jax.tree.leaves(bigflax.load(str(tmp_path / "half"), dtype="float32")[1]["norm"])} == {"float32"}


def test_other_heads_and_fields_of_our_own(tmp_path):
    model, params = made("bert")
    typed = KINDS["int4"](params, model.axes)
    bigflax.save(model, typed, str(tmp_path / "bert"))
    classifier, fresh = bigflax.load(str(tmp_path / "bert"), head="sequence_classification", num_labels=11)
    assert_same({k: v for k, v in fresh.items() if k != "head"}, {k: v for k, v in typed.items() if k != "head"})
    assert fresh["head"]["scores"]["w"].shape == (32, 11) and float(jnp.abs(fresh["head"]["scores"]["w"]).max()) > 0
    bigflax.save(classifier, fresh, str(tmp_path / "classifier"), labels=[f"class {i}" for i in range(11)])
    assert_same(bigflax.load(str(tmp_path / "classifier"))[1], fresh)
    for tied in (True, False):  # which T5's config does not tell
        t5, params = made("t5", tie_word_embeddings=tied)
        typed = peft.quantized(params, [("encoder/blocks/attention/q", "int8")], axes=t5.axes)
        bigflax.save(t5, typed, str(tmp_path / "t5"))
        again, loaded = bigflax.load(str(tmp_path / "t5"))
        assert again.config["tie_word_embeddings"] is tied
        assert_same(loaded, typed)


def test_a_type_that_is_new_is_stored_without_a_word_about_it(llama, tmp_path):
    @weights.typed("base", "gain", "offset", meta=["power", "window", "kind", "exact"])
    @dataclasses.dataclass(frozen=True)
    class Bent:
        base: weights.Weight
        gain: jax.Array
        offset: jax.Array | None
        power: float
        window: tuple
        kind: np.dtype
        exact: bool = True

    weights.shape.register(Bent, lambda w: weights.shape(w.base))
    axes = lambda w, axes: dataclasses.replace(w, base=weights.part_axes(w.base, axes), gain="layers")
    weights.part_axes.register(Bent, axes)
    model, params = llama
    try:
        q = weights.quantize(params["blocks"]["attention"]["q"], "int4", axes=AXES)
        typed = with_q(params, Bent(q, jnp.arange(2.0), None, 0.1, (3, ("a", None)), np.dtype("int8")))
        bigflax.save(model, typed, str(tmp_path))
        assert_same(bigflax.load(str(tmp_path))[1], typed)
    finally:
        weights.TYPES.remove(Bent)
    with pytest.raises(ValueError, match=r"speaks of a weight of type 'Bent'; .* 'LoRA'"):
        bigflax.load(str(tmp_path))


def edit(folder, change):
    said = json.loads((folder / "weights.json").read_text())
    change(said)
    (folder / "weights.json").write_text(json.dumps(said))


def edit_tensors(folder, change):
    save_file(change(load_file(folder / "weights.safetensors")), folder / "weights.safetensors")


UP = "blocks/mlp/up"
BROKEN = {  # what is done to the folder, what the sentence must say
    "cut off": (lambda f: os.truncate(f / "weights.safetensors", 5000), "weights.safetensors' is damaged or cut off"),
    "no tensors": (lambda f: (f / "weights.safetensors").unlink(), "has no weights.safetensors$"),
    "no JSON": (lambda f: (f / "weights.json").write_text("{"), "weights.json' is not JSON"),
    "of others": (lambda f: (f / "weights.json").write_text('{"weights": []}'), "is not an object with 'format'"),
    "of a later version": (lambda f: edit(f, lambda s: s.update(format="bigflax weights 2")), "'bigflax weights 2', and 'bigflax weights 1' is"),
    "no weights": (lambda f: edit(f, lambda s: s.update(weights=[])), "is damaged: .* its weights are a list"),
    "a field missing": (lambda f: edit(f, lambda s: s["weights"][UP].pop("static")), "is damaged: KeyError 'static'"),
    "a part missing": (lambda f: edit(f, lambda s: s["weights"][UP]["parts"].pop("scale")), "is damaged: TypeError .*scale"),
    "a part too many": (lambda f: edit(f, lambda s: s["weights"][UP]["parts"].update(bias=None)), "is damaged: TypeError .*bias"),
    "an unknown dtype": (lambda f: edit(f, lambda s: s["weights"][UP]["parts"]["scale"].update(dtype="float5")), "is damaged: TypeError .*float5"),
    "a tensor missing": (
        lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if k != f"{UP}/scale"}), "up/scale is stored as float32.*hold nothing",
    ),
    "a tensor too many": (lambda f: edit_tensors(f, lambda t: t | {"extra": np.ones(2)}), "holds extra, of which weights.json says nothing"),
    "a wrong shape": (
        lambda f: edit(f, lambda s: s["weights"][UP]["parts"]["qvalue"].update(shape=[2, 32, 46])), r"uint8\[2, 32, 23\], .* hold uint8\[2, 32, 24\]",
    ),
    "another config": (lambda f: edit_config(f, num_hidden_layers=1), r"has shape \(2, .*; the config makes it \(1, "),
    "a weight missing": (lambda f: edit_config(f, tie_word_embeddings=True), "and its config differ: head/w is in one"),
}  # fmt: skip


def edit_config(folder, **fields):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | fields))


@pytest.mark.parametrize("how, want", BROKEN.values(), ids=BROKEN)
def test_broken_folders(how, want, llama, tmp_path):
    model, params = llama
    bigflax.save(model, KINDS["int4"](params, model.axes), str(tmp_path))
    how(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=want):
        bigflax.load(str(tmp_path))


REFUSED = {
    "a moment of a step": (
        lambda w: dataclasses.replace(weights.lora(w, 2, axes=AXES, rng=KEY), key=jax.random.split(KEY)), r"q/key is a key<fry>\[?\]?, which is no part",
    ),
    "one pass": (
        lambda w: weights.Observed(w, weights.Seen(jnp.zeros(()))), "q is an Observed, which looks at one pass",
    ),
    "one batch": (lambda w: weights.Perturbed(w, jnp.zeros((1, 2, 3))), "q is a Perturbed, which belongs to one batch"),
    "another shape": (lambda w: weights.quantize(w[:, :16], axes=AXES), r"q has shape \(2, 16, .*; the model has \(2, 32"),
    "a strange field": (lambda w: weights.Rounded(w, {}), "q/kind is a dict, and a static field"),
}  # fmt: skip


@pytest.mark.parametrize("make, want", REFUSED.values(), ids=REFUSED)
def test_what_is_not_saved(make, want, llama, tmp_path):
    model, params = llama
    with pytest.raises(ValueError, match=want):
        bigflax.save(model, with_q(params, make(params["blocks"]["attention"]["q"])), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_second_copy_in_memory(tmp_path):
    """268 million codes of four bits: loading holds them once, and little beside."""
    model = models.create("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16, vocab_size=1000)
    one = {size: jnp.full(size, 7, jnp.int4) for size in {s.shape for s in jax.tree.leaves(model.shapes())}}
    scales = lambda s: jnp.ones([n if i == 0 else 1 for i, n in enumerate(s)])
    typed = jax.tree.map(lambda s: weights.Quantized(one[s.shape], scales(s.shape)) if s.ndim > 2 else jnp.ones(s.shape), model.shapes())
    packed.write(str(tmp_path), model, typed)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **{k: v for k, v in model.config.items() if k not in OURS}}))
    file = (tmp_path / "weights.safetensors").stat().st_size // 1024
    env = {**os.environ, "XLA_FLAGS": ""}  # one device: eight fake ones would hold a whole copy each
    shown = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], env=env, capture_output=True, text=True, check=True)
    grown, _ = map(int, shown.stdout.split())
    held = sum(w.size * (1 if w.dtype == jnp.int4 else 4) for w in jax.tree.leaves(typed)) // 1024  # a CPU gives a code a byte
    assert file < held * 0.55
    assert grown < held + 150_000, (grown, held)
