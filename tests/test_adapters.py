"""PEFT's folders: what is written is read again, a foreign one means what its formulas say, what does not fit is refused; and where PEFT is
installed, it and we give the same outputs with each other's folders."""

import dataclasses
import functools
import importlib.util
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import VOCAB, inputs, load_tensors, torch_model
from safetensors.numpy import save_file

import bigflax
from bigflax import models, peft, sharding, trees, weights
from bigflax.adapters.modules import TASKS
from bigflax.weights import Adapted, is_typed, parts

KEY = jax.random.key(0)
EACH = "blocks.*/(attention/(q|k|v|out)|mlp/(gate|up|down))"
# family -> head, and matrices: of modules of their own, and parts of those that the file joins, all of them or some
SITES = {
    "llama": ("causal_lm", f"{EACH}|head/w"), "gpt2": ("causal_lm", "blocks/(attention/[qv]|mlp/down)"), "gpt_neox": ("causal_lm", EACH),
    "phi3": ("causal_lm", "blocks/(attention/[qk]|mlp/up)"), "bert": ("sequence_classification", EACH), "t5": ("seq2seq_lm", ".*blocks/.*/(q|down)"),
    "modernbert": ("token_classification", EACH), "gemma2": ("causal_lm", "blocks/1/attention/q"),
}  # fmt: skip
LOW_RANK = {
    "lora": lambda sites, **given: peft.lora(rules=[(".*/q", (3, 6.0)), (sites, (2, 4.0))], **given),
    "rslora": lambda sites, **given: peft.lora(rules=[(sites, (3, 5.0))], rs=True, **given),
    "dora": lambda sites, **given: peft.dora(rules=[(sites, (3, 5.0))], **given),
}
METHODS = LOW_RANK | {"ia3": lambda sites, rng, **given: peft.ia3(rules=[(sites, "outputs")], **given)}
each_family = pytest.mark.parametrize("family", SITES)


@functools.cache
def create(family, **more):
    """A model and its weights, drawn by NumPy: nothing is compiled."""
    words = {} if family in ("vit", "siglip") else {"vocab_size": VOCAB}
    head = SITES[family][0] if family in SITES else None
    model = models.create(family, size="tiny", head=head, **words, **more)
    return model, trees.map_named(lambda name, leaf: jnp.asarray(0.1 * draw(name, *leaf.shape)), model.shapes())


def adapted(method, family, model, params):
    return stirred(METHODS[method](SITES[family][1], params=params, axes=model.axes, rng=KEY))


def draw(name, *shape):
    return np.random.default_rng(sum(map(ord, name))).normal(size=shape).astype(np.float32)


def stirred(params):
    """Each part of an adapter, a prefix and a head's scores as if it had trained."""

    def drawn(name, x):
        return jnp.asarray(np.asarray(x) + 0.3 * draw(name, *x.shape))

    def one(name, w):
        if isinstance(w, Adapted):
            made = {part: drawn(f"{name}/{part}", x) for part, x in parts(w).items() if part != "bias"}
            return dataclasses.replace(w, **made)
        return drawn(name, w) if name.startswith(("head/scores", "prefix/")) else w

    return trees.map_named(one, params, is_leaf=is_typed)


def same(a, b):
    """The same types at the same places, of the same scales and numbers."""
    a, b = dict(weights.named_weights(a)), dict(weights.named_weights(b))
    assert {name: type(w) for name, w in a.items()} == {name: type(w) for name, w in b.items()}
    for name, w in a.items():
        if isinstance(w, Adapted) and hasattr(w, "alpha"):
            assert w.rs == b[name].rs
            assert w.alpha == pytest.approx(b[name].alpha, rel=1e-14)  # of a joined module, times and by the root of a rank
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(w), jax.tree.leaves(b[name]))


@each_family
@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_loaded(method, family, tmp_path):
    model, params = create(family)
    tuned = adapted(method, family, model, params)
    assert any(isinstance(w, Adapted) for _, w in weights.named_weights(tuned))
    bigflax.save_adapter(model, tuned, str(tmp_path))
    same(bigflax.load_adapter(model, params, str(tmp_path)), tuned)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 0.5 * trees.nbytes(params)


def test_parts_of_other_scales_are_one_module(tmp_path):
    model, params = create("gpt2")
    rules = [("blocks/attention/q", (3, 5.0)), ("blocks/attention/v", (2, 1.0))]
    tuned = stirred(peft.lora(params, rules, axes=model.axes, rng=KEY))
    bigflax.save_adapter(model, tuned, str(tmp_path))
    got = peft.merge(bigflax.load_adapter(model, params, str(tmp_path)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, peft.merge(tuned))  # B times a ratio, rounded


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_prompts_and_prefixes(method, family, tmp_path):
    if (family, method) == ("t5", "prefix"):
        pytest.skip("a prefix stands before one text")
    tuned = peft.create(method, *create(family), rng=KEY, tokens=3)
    params = stirred(tuned.params)
    bigflax.save_adapter(tuned.model, params, str(tmp_path))
    same(bigflax.load_adapter(tuned.model, tuned.params, str(tmp_path)), params)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    shapes = {name: a.shape for name, a in load_tensors(tmp_path).items()}
    assert shapes.pop("prompt_embeddings") == (3, said["token_dim"] * (2 * said["num_layers"] if method == "prefix" else 1))
    assert set(shapes) == ({"base_model.classifier.weight", "base_model.classifier.bias", "base_model.bert.pooler.dense.weight",
                            "base_model.bert.pooler.dense.bias"} if family == "bert" else set())  # fmt: skip


# -- folders of others: the merged file is what the formulas say, tensor by tensor of the base's file ---------------------------

# family -> modules of each of its two layers, and whether the file has inputs first
FOREIGN = {
    "llama": ("model.layers.{}.", ("self_attn.q_proj", "mlp.down_proj"), False), "gpt2": ("transformer.h.{}.", ("attn.c_attn", "mlp.c_proj"), True),
    "gpt_neox": ("gpt_neox.layers.{}.", ("attention.query_key_value", "mlp.dense_4h_to_h"), False),
    "phi3": ("model.layers.{}.", ("self_attn.qkv_proj", "mlp.gate_up_proj"), False),
    "bert": ("bert.encoder.layer.{}.", ("attention.self.value", "output.dense"), False),
}  # fmt: skip


def write(folder, tensors, **said):
    folder.mkdir(exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(a) for name, a in tensors.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "peft_type": "LORA"} | said))


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3"])
@pytest.mark.parametrize("family", FOREIGN)
def test_a_foreign_folder_is_its_formula(method, family, tmp_path):
    """The first module in both layers with other ranks, the second in the last layer alone."""
    layers, modules, inputs_first = FOREIGN[family]
    model, params = create(family)
    bigflax.save(model, params, str(tmp_path / "base"))
    want, tensors = load_tensors(tmp_path / "base"), {}
    alphas = {rf"{layers.format(1).removeprefix('model.')}{modules[0]}".replace(".", r"\."): 5.0}
    for layer, module in ((0, 0), (1, 0), (1, 1)):
        name = layers.format(layer) + modules[module]
        W, key, rank = want[f"{name}.weight"], f"base_model.model.{name}", 2 + layer
        W = W.T if inputs_first else W  # [out, in]
        if method == "ia3":
            l = 1 + 0.3 * draw(name, *((1, W.shape[1]) if module else (W.shape[0], 1)))
            tensors[f"{key}.ia3_l"], W = l, W * l
            if f"{name}.bias" in want and not module:
                want[f"{name}.bias"] = want[f"{name}.bias"] * l[:, 0]
        else:
            A, B = draw(name, rank, W.shape[1]), draw(f"{name} B", W.shape[0], rank)
            alpha = 5.0 if (layer, module) == (1, 0) else 6.0
            W = W + B @ A * (alpha / (math.sqrt(rank) if method == "rslora" else rank))
            tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        if method == "dora":
            m = np.abs(draw(f"{name} m", W.shape[0]))
            tensors[f"{key}.lora_magnitude_vector"], W = m, W * (m / np.linalg.norm(W, axis=1))[:, None]
        want[f"{name}.weight"] = W.T if inputs_first else W
    said = {"peft_type": "IA3"} if method == "ia3" else dict(alpha_pattern=alphas, use_rslora=method == "rslora", use_dora=method == "dora")
    write(tmp_path / "theirs", tensors, **said)
    merged = peft.merge(bigflax.load_adapter(model, params, str(tmp_path / "theirs")))
    bigflax.save(model, merged, str(tmp_path / "merged"))
    got = load_tensors(tmp_path / "merged")
    for name, w in want.items():
        np.testing.assert_allclose(got[name], w, rtol=0, atol=2e-6 * np.abs(w).max(), err_msg=name)  # sums of other orders


def test_tables_biases_and_whole_modules(tmp_path):
    """What PEFT writes of a table that it adapts, of `bias="all"` and of `modules_to_save`."""
    model, params = create("llama", attention_bias=True)
    V, D = params["embed"]["tokens"].shape
    A, B, old = draw("A", 2, V), draw("B", D, 2), draw("old", V, D)
    bias, norm = draw("bias", D), draw("norm", D)
    module = "base_model.model.model.embed_tokens"
    tensors = {f"{module}.lora_embedding_A": A, f"{module}.lora_embedding_B": B, f"{module}.base_layer.weight": old}
    tensors |= {"base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias": bias, "base_model.model.model.norm.weight": norm}
    write(tmp_path, tensors)
    got = bigflax.load_adapter(model, params, str(tmp_path))
    np.testing.assert_allclose(weights.dense(got["embed"]["tokens"]), old + (B @ A).T * 3, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got["norm"]["scale"], norm)
    q_bias = got["blocks"]["attention"]["q_bias"]
    np.testing.assert_array_equal(q_bias[1].ravel(), bias)
    np.testing.assert_array_equal(q_bias[0], params["blocks"]["attention"]["q_bias"][0])


def test_it_lies_on_the_mesh_of_its_base_and_stands_on_any_weight(tmp_path):
    model, params = create("llama")
    tuned = adapted("lora", "llama", model, params)
    bigflax.save_adapter(model, tuned, str(tmp_path))
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    base = peft.quantized(params, [(EACH, "int8"), (".*", None)], axes=model.axes)
    base = jax.device_put(base, sharding.shardings(base, model.axes, mesh))
    got = bigflax.load_adapter(model, base, str(tmp_path))
    q = got["blocks"]["attention"]["q"]
    assert isinstance(q.base, weights.Quantized) and q.base.qvalue is base["blocks"]["attention"]["q"].qvalue
    assert q.a.sharding == sharding.shardings(q, model.axes["blocks"]["attention"]["q"], mesh).a and not q.a.sharding.is_fully_replicated
    np.testing.assert_array_equal(q.b, tuned["blocks"]["attention"]["q"].b)


def test_the_config_says_it_shortly(tmp_path):
    """A joined module of two parts has the sum of their ranks, at their scale; names are as short as they can be."""
    model, params = create("gpt2")
    rules = [("blocks/attention/[qv]", (4, 8.0)), ("blocks/mlp/.*", (2, 6.0))]
    bigflax.save_adapter(model, stirred(peft.lora(params, rules, axes=model.axes, rng=KEY)), str(tmp_path))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    want = dict(target_modules=["c_attn", "c_fc", "mlp.c_proj"], r=2, lora_alpha=6.0, rank_pattern={"c_attn": 8}, alpha_pattern={"c_attn": 16.0},
                fan_in_fan_out=True, modules_to_save=None, task_type="CAUSAL_LM")  # fmt: skip
    assert {key: said[key] for key in want} == want
    model, params = create("bert")
    bigflax.save_adapter(model, adapted("lora", "bert", model, params), str(tmp_path))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["modules_to_save"] == ["bert.pooler", "classifier"] and said["task_type"] == "SEQ_CLS"
    assert said["target_modules"] == ["intermediate.dense", "key", "output.dense", "query", "value"]
    params = peft.lora(params, [("blocks/mlp/down", 2)], axes=model.axes, rng=KEY)
    bigflax.save_adapter(model, params, str(tmp_path))  # "output.dense" alone would be the attention's too
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["target_modules"] == ["layer.0.output.dense", "layer.1.output.dense"]


def test_one_a_for_all_parts_stays_one(tmp_path):
    """PEFT's A of a joined module is not written three times."""
    model, params = create("gpt2")
    name = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"
    sizes = {"A": (4, 64), "B": (192, 4)}
    tensors = {name.format(layer, part): draw(f"{layer}{part}", *sizes[part]) for layer in (0, 1) for part in "AB"}
    write(tmp_path / "a", tensors)
    bigflax.save_adapter(model, bigflax.load_adapter(model, params, str(tmp_path / "a")), str(tmp_path / "b"))
    got = load_tensors(tmp_path / "b")
    assert got.keys() == tensors.keys()
    for key, want in tensors.items():
        np.testing.assert_array_equal(got[key], want)


# -- what is refused -----------------------------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {f"{Q}.lora_A.weight": np.ones((2, 64), np.float32), f"{Q}.lora_B.weight": np.ones((64, 2), np.float32)}
narrow = GOOD | {f"{Q}.lora_A.weight": np.ones((2, 60), np.float32)}
soft = {"prompt_embeddings": np.ones((5, 64), np.float32)}
READ = {  # tensors, fields of the config, the sentence
    "a module that is not there": (
        GOOD | {f"{Q}x.lora_A.weight": np.ones((2, 64))},
        {},
        "another base: it has .*q_projx.lora_A.weight, and llama",
    ),
    "another width": (narrow, {}, r"q_proj.lora_A.weight .* has shape \(2, 60\); this base makes it \(2, 64\)"),
    "half of a pair": ({k: v for k, v in GOOD.items() if "_A" in k}, {}, "q_proj.lora_A.weight stands alone"),
    "another method": (GOOD, {"peft_type": "LOHA"}, "type 'LOHA'; LORA, IA3, PROMPT_TUNING, PREFIX_TUNING are read"),
    "a field": (GOOD, {"lora_bias": True}, "lora_bias = True, which is not supported"),
    "a changed base": (GOOD, {"init_lora_weights": "pissa_niter_4"}, "a base that 'pissa_niter_4' has changed"),
    "nothing": ({}, {}, "holds no tensor of a LORA"),
    "a prompt": (soft, {"peft_type": "PROMPT_TUNING"}, r"a prompt of 5 tokens, .* peft.prompt\(model, params, 5\)"),
    "a prefix": (soft, {"peft_type": "PREFIX_TUNING"}, "a prefix of 5 tokens"),
}


@pytest.mark.parametrize("tensors, said, sentence", READ.values(), ids=READ)
def test_what_is_not_read(tensors, said, sentence, tmp_path):
    write(tmp_path, tensors, **said)
    with pytest.raises(ValueError, match=sentence):
        bigflax.load_adapter(*create("llama"), str(tmp_path))


def test_a_folder_that_is_none(tmp_path):
    model, params = create("llama")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        bigflax.load_adapter(model, params, str(tmp_path))
    write(tmp_path, GOOD)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="weights are pickled, which PEFT can load"):
        bigflax.load_adapter(model, params, str(tmp_path))


def test_an_adapter_of_a_longer_prompt_than_the_models(tmp_path):
    tuned = peft.create("prompt", *create("llama"), rng=KEY, tokens=4)
    write(tmp_path, {"prompt_embeddings": np.ones((5, 64), np.float32)}, peft_type="PROMPT_TUNING")
    with pytest.raises(ValueError, match="a prompt of 5 tokens"):
        bigflax.load_adapter(tuned.model, tuned.params, str(tmp_path))


def lora(rule):
    return lambda params, axes: peft.lora(params, [(rule, 2)], axes=axes, rng=KEY)


def forgetful(params, axes):
    forget = lambda name, w: dataclasses.replace(w, bias=None) if isinstance(w, weights.IA3) else w
    return trees.map_named(forget, peft.ia3(params, axes=axes), is_leaf=is_typed)


WRITE = {  # family, what is done to its params, the sentence
    "nothing": ("llama", lambda params, axes: params, "these weights have no adapter"),
    "two kinds": ("llama", lambda params, axes: lora(".*/q")(peft.ia3(params, axes=axes), axes), "have IA3, LoRA"),
    "bottlenecks": ("llama", lambda params, axes: peft.adapters(params, axes=axes, rng=KEY), "holds one of LoRA, .*have Adapter"),
    "experts": ("mixtral", lora("blocks/mlp/up"), "PEFT has no LoRA for blocks/mlp/up"),
    "patches": ("vit", lora("embed/patches"), "PEFT has no LoRA for embed/patches"),
    "a weight without a module": ("siglip", lora("vision/head/attention/out"), "PEFT has no LoRA for vision/head/attention/out"),
    "two upon one another": ("llama", lambda params, axes: lora(".*/q")(lora(".*/q")(params, axes), axes), "an adapter upon another"),
    "a table that is the head": ("gpt2", lora("embed/tokens"), "embed/tokens is the head too"),
    "an IA3 that forgets the bias": ("gpt2", forgetful, "scales the bias of"),
    "inputs of a part": (
        "phi3",
        lambda params, axes: peft.ia3(params, [("blocks/mlp/up", "inputs")], axes=axes),
        "are one module in the file",
    ),
}


@pytest.mark.parametrize("family, change, sentence", WRITE.values(), ids=WRITE)
def test_what_is_not_written(family, change, sentence, tmp_path):
    model, params = create(family)
    with pytest.raises(ValueError, match=sentence):
        bigflax.save_adapter(model, change(params, model.axes), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# -- beside PEFT ---------------------------------------------------------------------------------------------------------------

has_peft = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
needs_peft = pytest.mark.skipif(not has_peft, reason="parity needs PyTorch, transformers and peft: pip install 'bigflax[parity]'")
# family -> head, PEFT's modules, those that IA3 scales the inputs of
THEIRS = {
    "llama": ("causal_lm", ["q_proj", "v_proj", "down_proj"], ["down_proj"]), "gpt2": ("causal_lm", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": ("sequence_classification", ["query", "value", "output.dense"], ["output.dense"]), "t5": ("seq2seq_lm", ["q", "v", "wo"], ["wo"]),
}  # fmt: skip
CONFIGS = {
    "lora": lambda theirs, task, modules, inputs: theirs.LoraConfig(
        task_type=task, target_modules=modules, r=4, lora_alpha=6, rank_pattern={modules[0]: 3}, alpha_pattern={rf"1\.\w+\.{modules[0]}": 5}
    ),
    "rslora": lambda theirs, task, modules, inputs: theirs.LoraConfig(task_type=task, target_modules=modules, lora_alpha=6, use_rslora=True),
    "dora": lambda theirs, task, modules, inputs: theirs.LoraConfig(task_type=task, target_modules=modules, lora_alpha=6, use_dora=True),
    "ia3": lambda theirs, task, modules, inputs: theirs.IA3Config(task_type=task, target_modules=modules, feedforward_modules=inputs),
    "prompt": lambda theirs, task, modules, inputs: theirs.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix": lambda theirs, task, modules, inputs: theirs.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
}  # fmt: skip
PAIRS = [
    (family, method)
    for family in THEIRS
    for method in CONFIGS
    if (family, method) not in (("bert", "prefix"), ("t5", "prefix"))  # PEFT has none for encoders, we have none for pairs
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folder of a random model of transformers, by family."""
    made = {}

    def base(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            torch_model(family, THEIRS[family][0]).save_pretrained(made[family])
        return str(made[family])

    return base


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("family, method", PAIRS)
def test_peft_and_we_read_each_others_folders(family, method, bases, tmp_path):
    """Theirs, read here; the same with every part changed, so that joined parts have A of their own, read there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they deprecate of one another
        warnings.filterwarnings("error", message="Found missing adapter keys")
        import peft as theirs
        import torch
        import transformers

        (head, modules, ff), folder = THEIRS[family], bases(family)
        given, (*_, real) = inputs(family, "padded right")  # the last: of what the logits are of
        kind = getattr(transformers, models.family(family).HEADS[head][0])

        def logits(model, cut=0):
            with torch.no_grad():
                out = model.eval()(**{name: torch.from_numpy(x) for name, x in given.items()}).logits.numpy()
            return out[:, cut:][real] if out.ndim == 3 else out

        model = theirs.get_peft_model(kind.from_pretrained(folder), CONFIGS[method](theirs, TASKS[head], modules, ff))
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.3 * torch.randn(weight.shape) * weight.requires_grad
        model.save_pretrained(tmp_path / "theirs")

        ours, params = bigflax.load(folder)
        if method in ("prompt", "prefix"):
            ours, params, _ = peft.create(method, ours, params, rng=KEY, tokens=3)
        apply = jax.jit(ours.apply)
        read = lambda params: (lambda x: x[real] if x.ndim == 3 else x)(np.asarray(apply(params, **given)["logits"]))
        cut = 3 if method == "prompt" and head == "causal_lm" else 0  # PEFT gives the logits of the prompt too
        before, params = read(params), bigflax.load_adapter(ours, params, str(tmp_path / "theirs"))
        near(read(params), logits(model, cut), before)

        params = stirred(params)
        bigflax.save_adapter(ours, params, str(tmp_path / "ours"))
        near(logits(theirs.PeftModel.from_pretrained(kind.from_pretrained(folder), tmp_path / "ours"), cut), read(params), before)


def near(a, b, before):
    """1e-5 of the largest: float32 through three layers, summed in another order; and far from what the base gives."""
    size = np.abs(b).max()
    assert np.abs(a - b).max() <= 1e-5 * size
    assert np.abs(b - before).max() > 1e-2 * size
