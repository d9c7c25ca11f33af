"""Recipes: what is said, what follows from signatures, what is refused."""

import importlib.util
import json
import re
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import bigflax
from bigflax import data, gguf, models, recipes, trees
from bigflax.data.augment import create
from bigflax.main import main

RECIPES = sorted(p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.py"))


def small(**sections):
    said = dict(work="w", model=dict(name="gpt2", size="tiny"), data=dict(source=dict(kind="python"), length=16, batch_size=4),
                task=dict(name="causal_lm"), optimizer=dict(lr=1e-3), fit=dict(steps=10))  # fmt: skip
    for name, section in sections.items():
        said[name] = {**said.get(name, {}), **section} if isinstance(section, dict) else section
    return ConfigDict(said)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_and_says_what_it_measured(name, monkeypatch):
    published = {"speech": "whisper"}.get(name, "bert")
    monkeypatch.setattr(recipes.hub, "describe", lambda source, head="": (published, {"head": head}))  # published weights are not here
    recipes.resolve(recipes.load(name))
    text = Path(recipes.find(name)).read_text()
    assert re.search(r"^Measured", text, re.M), "its docstring says what was measured, or 'not yet run'"
    assert "bigflax train" in text


@pytest.mark.parametrize("variant, numbers", [("mnist", 100_000), ("mnist:fashion", 350_000)])
def test_the_small_network_stays_small(variant, numbers):
    """Its numbers, running statistics included, for images that are augmented whole."""
    config = recipes.resolve(recipes.load(variant))
    said = {name: value for name, value in config.model.items() if name not in ("size", "source")}
    model = models.create(**{**said, "image_size": 28, "num_channels": 1})
    assert 0.7 * numbers < trees.count(model.shapes()) < numbers
    assert create("image", config.data.augment).said and config.data.min_area == config.data.central == 1


def script(name):
    """The module of a recipe that turns a package into files."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", recipes.find(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pairs_of_held_out_articles_are_in_no_text_to_learn_from(tmp_path, monkeypatch):
    """Of 300 articles, two topics: a test part of a tenth, more or less, its articles nowhere else; a rejected answer is another one's of the topic."""
    articles = {
        str(i): {"title": str(i), "extract": f"Thing {i} is one.", "description": f"Sort {i % 150}", "topic": "ab"[i % 2]}
        for i in range(300)
    }
    (tmp_path / "articles").write_text(json.dumps(articles))
    monkeypatch.chdir(tmp_path)
    script("preference").write("articles")
    texts, train, test = (
        [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()] for name in ("articles", "pairs-train", "pairs-test")
    )
    assert 10 < len(test) < 60 and len(train) + len(test) == 300
    assert [pair["prompt"] + pair["chosen"] for pair in train] == [record["text"] for record in texts]
    assert not {pair["prompt"] for pair in test} & {pair["prompt"] for pair in train}
    of = lambda answer: int(answer.split()[-1]) % 2  # 150 is even, so the topic of every article of a description is the same
    assert all(pair["chosen"] != pair["rejected"] and of(pair["chosen"]) == of(pair["rejected"]) for pair in train + test)


DICTIONARY = """export const dictionary = {
  "'bout": "B AW1 T",
  "read": "R EH1 D",
  "read(2)": "R IY1 D",
  "aarhus": "AA1 R HH UW0 S # place, danish",
  "a.m.": "EY2 EH1 M",
  "pneumonoultramicroscopic": "N UW1 M AH0",
}
"""


def test_words_and_phonemes_of_a_dictionary(tmp_path, monkeypatch):
    """First pronunciations, without stress and comments, of words of letters; one token for a letter and one for a phoneme."""
    (tmp_path / "index.js").write_text(DICTIONARY)
    monkeypatch.chdir(tmp_path)
    script("spelling").write(str(tmp_path), "spelling")
    found = [json.loads(line) for side in ("train", "test") for line in (tmp_path / "spelling" / f"{side}.jsonl").read_text().splitlines()]
    assert {one["letters"]: one["phonemes"] for one in found} == {"read": "R EH D", "aarhus": "AA R HH UW S"}
    tokenizer = data.load_tokenizer(tmp_path / "spelling" / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("read R EH D")) == "r e a d R EH D" and len(tokenizer.encode("aarhus")) == 6
    config = recipes.resolve(recipes.load("spelling"))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (config.model.pad_token_id, config.model.eos_token_id) == (0, 1)


VARIANTS = {  # code points -> what it is a variant of
    "1F3C3": "1F3C3", "1F3C3-200D-2640-FE0F-200D-27A1-FE0F": "1F3C3", "1F468-1F3FD-200D-1F3A4": "1F3A4", "1F9D1-200D-1F3A4": "1F3A4",
    "1F469-200D-2764-FE0F-200D-1F48B-200D-1F468": "2764", "1F48F": "2764", "1F468-200D-1F469-200D-1F466": "people", "1F46A": "people",
    "1F3F3-FE0F-200D-1F308": "1F3F3", "1F1F5-1F1EA": "1F1F5-1F1EA", "2640-FE0F": "2640-FE0F", "1F408-200D-2B1B": "1F408",
}  # fmt: skip


def test_variants_of_an_emoji_are_on_one_side():
    emoji = script("emoji")
    assert {code: emoji.base(code) for code in VARIANTS} == VARIANTS
    many = [
        {
            "unified": f"1F60{i % 10}{mark}",
            "name": "A B",
            "short_names": ["a_b", "b-c"],
            "subcategory": "food-asian",
            "category": "Food & Drink",
        }
        for i in range(30)
        for mark in ("", "-FE0F")
    ]
    train, test = emoji.sides(many, held_out=15)
    bases = [{emoji.base(one["unified"]) for one in side} for side in (train, test)]
    assert not bases[0] & bases[1] and len(train) + len(test) == 60 and 10 <= len(test) <= 15
    assert emoji.texts(many[0]) == {"names": "a b, b c", "groups": "a b, b c, food asian, food & drink"}


SPEECH = script("speech")
TYPES = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}


def container(arrays, aliases=(), kind="WhisperSpec", version=6):
    """A CTranslate2 file, byte by byte."""
    word = lambda text: struct.pack("<H", len(text) + 1) + text.encode() + b"\0"
    parts = [struct.pack("<I", version), word(kind), struct.pack("<II", 3, len(arrays))]
    for name, x in arrays.items():
        shape = struct.pack("<B", x.ndim) + struct.pack(f"<{x.ndim}I", *x.shape)
        parts += [word(name), shape, struct.pack("<BI", TYPES[str(x.dtype)], x.nbytes), x.tobytes()]
    return b"".join([*parts, struct.pack("<I", len(aliases)), *(word(name) for pair in aliases for name in pair)])


def test_weights_of_a_ctranslate2_file(tmp_path):
    """Names, shapes and numbers come back as they were written; what was one matrix is cut in the order query, key, value."""
    rng = np.random.default_rng(0)
    layer, inside, rows = "decoder/layer_1/", "model.decoder.layers.1.", rng.normal(size=(15, 4)).astype(np.float16)
    arrays = {
        "decoder/num_heads": np.array(2, np.int16), "decoder/alignment_heads": np.array([1, 0], np.int16), "decoder/embeddings/weight": rows[:7],
        "decoder/layer_norm/beta": rows[0], f"{layer}self_attention/linear_0/weight": rows, f"{layer}self_attention/linear_0/bias": rows[:, 0],
        f"{layer}attention/linear_1/weight": rows[:8], f"{layer}ffn/layer_norm/gamma": rows[1], "encoder/conv1/weight": rows.reshape(5, 4, 3),
    }  # fmt: skip
    (tmp_path / "model.bin").write_bytes(container(arrays, [("decoder/projection/weight", "decoder/embeddings/weight")]))
    kind, got = SPEECH.read(str(tmp_path / "model.bin"))
    assert kind == "WhisperSpec" and got.keys() == arrays.keys() | {"decoder/projection/weight"}
    for name, x in arrays.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        np.testing.assert_array_equal(got[name], x)
    want = {
        "model.decoder.embed_tokens.weight": rows[:7], "model.decoder.layer_norm.bias": rows[0], f"{inside}final_layer_norm.weight": rows[1],
        "model.encoder.conv1.weight": rows.reshape(5, 4, 3),
        **{f"{inside}self_attn.{part}_proj.weight": rows[5 * i : 5 * i + 5] for i, part in enumerate("qkv")},
        **{f"{inside}self_attn.{part}_proj.bias": rows[5 * i : 5 * i + 5, 0] for i, part in enumerate("qkv") if part != "k"},
        **{f"{inside}encoder_attn.{part}_proj.weight": rows[4 * i : 4 * i + 4] for i, part in enumerate("kv")},
    }  # fmt: skip
    renamed = SPEECH.renamed(kind, got)
    assert renamed.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(renamed[name], x)


NARROW = {"encoder/conv1/weight": np.zeros((2, 2, 3), np.int8)}
REFUSED = {
    "another file": (b"PK\3\4 and so on", "no CTranslate2 file of version 6: it begins with 67324752"),
    "an empty file": (b"", "no CTranslate2 file, or cut off: it has 0 bytes, and 4 are needed"),
    "half a file": (container({"a/b": np.zeros(8, np.float32)})[:-9], "cut off: it has 69 bytes, and 74 are needed"),
    "another model": (container({}, kind="TransformerSpec"), "the file holds a TransformerSpec, and only a WhisperSpec"),
    "weights in 8 bits": (container(NARROW), r"conv1/weight \(int8\) is no part of a Whisper in floats; .* --quantization float16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whisper_of_ctranslate2_is_one_sentence(name, tmp_path):
    found, message = REFUSED[name]
    (tmp_path / "model.bin").write_bytes(found)
    with pytest.raises(ValueError, match=message):
        SPEECH.weights(str(tmp_path), str(tmp_path / "out"))


def test_defaults_come_from_signatures_and_sizes():
    config = recipes.resolve(small())
    assert config.optimizer.b2 == 0.95 and config.model.n_layer == 2 and config.model.layer_norm_epsilon == 1e-5
    assert config.mesh.data == -1 and config.mesh.tensor == 1


OVERRIDES = {
    "float": ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
    "int where a float stands": ("optimizer.weight_decay=0", "optimizer.weight_decay", 0),
    "string": ("optimizer.kind=wsd", "optimizer.kind", "wsd"),
    "none": ("optimizer.clip=None", "optimizer.clip", None),
    "where None stood": ("fit.eval_every=5", "fit.eval_every", 5),
    "model's size": ("model.size=124m", "model.n_embd", 768),
    "products in 8 bits": ("task.matmul=int8", "task.matmul", "int8"),
    "products in 8 bits, by rules": ('task.matmul=[("blocks/.*", "fp8")]', "task.matmul", [["blocks/.*", "fp8"]]),
    "another family": ("model.name=llama", "model.hidden_size", 64),
    "what follows from the data": ("model.vocab_size=None", "model.vocab_size", None),
}


@pytest.mark.parametrize("text, key, want", OVERRIDES.values(), ids=OVERRIDES)
def test_overrides(text, key, want):
    assert recipes.flat(recipes.resolve(small(), [text]))[key] == want


def test_what_a_recipe_leaves_open_the_command_says():
    said = small(fit=dict(epochs=2))
    del said.fit.steps, said.optimizer.lr
    made = recipes.resolve(said, ["fit.epochs=None", "fit.steps=7", "optimizer.lr=0.5"])
    assert (made.fit.epochs, made.fit.steps, made.optimizer.lr) == (None, 7, 0.5)


PHOTOS = dict(model=dict(name="vit", size="tiny"), data=dict(source=dict(kind="images", path="p"), size=16, batch_size=4),
              task=dict(name="classification"), optimizer=dict(lr=1e-3), fit=dict(steps=10))  # fmt: skip


def test_the_model_decides_about_the_data():
    """By what it takes: a recipe of images has no words, and what its model has of the data is left to them, whatever its size says."""
    images, text = recipes.resolve(ConfigDict(PHOTOS)), recipes.resolve(small())
    assert images.data.min_area == 0.08 and images.model.image_size is None and images.model.hidden_size == 64
    assert {*text} - {*images} == {"tokenizer", "sample", "yardsticks"} and {*images} < {*text}
    assert {*text.data} & {*images.data} >= {"source", "split_by", "validation_fraction", "bad_records", "workers"}
    assert "max_line" in text.data and not {"max_line", "field", "length", "classes"} & {*images.data}


PAIRS = dict(model=dict(name="clip", text_config=dict(hidden_size=32)), task=dict(name="contrastive"), optimizer=dict(lr=1e-3),
             data=dict(source=dict(kind="jsonl", path="p"), length=8, size=16, batch_size=4), fit=dict(steps=10))  # fmt: skip


def test_the_parts_of_a_model_have_fields_too():
    """Defaults from their own signatures, overrides, and what follows from images and words."""
    config = recipes.resolve(ConfigDict(PAIRS), ["model.vision_config.patch_size=4", "model.size=tiny"])
    text, vision = config.model.text_config, config.model.vision_config
    assert (text.hidden_size, text.num_hidden_layers, vision.patch_size, vision.hidden_act) == (32, 2, 4, "quick_gelu")
    assert (text.vocab_size, text.eos_token_id, vision.image_size, vision.num_channels) == (None,) * 4 and "dtype" not in text
    kind, words = recipes.data_kind("clip", "contrastive"), {"vocab_size": 99, "eos_token_id": 7}
    fields = recipes.model_fields(config, kind, words, None)
    model = models.create("clip", projection_dim=config.model.projection_dim, **fields)
    assert model.config["text_config"]["vocab_size"] == 99 and model.module.end == 7
    assert model.module.vision.embed.image == (16, 16) and model.module.vision.embed.patch == (4, 4)
    with pytest.raises(ValueError, match=r"model.text_config.vocab_size 50 is smaller than the tokenizer's 99"):
        recipes.model_fields(recipes.resolve(ConfigDict(PAIRS), ["model.text_config.vocab_size=50"]), kind, words, None)


MISTAKES = {
    "a key in the recipe": (
        small(optimizer=dict(lr=1.0, wieght_decay=0.1)),
        [],
        "unknown key 'optimizer.wieght_decay' in the recipe; .*'weight_decay'",
    ),
    "a section in the recipe": (small(optimiser=dict()), [], "unknown key 'optimiser'.*'optimizer'"),
    "a key on the command line": (small(), ["fit.stepps=3"], "unknown key 'fit.stepps'; .*'steps'"),
    "a section on the command line": (small(), ["fitt.steps=3"], "unknown key 'fitt.steps'; .*'fit'"),
    "a type": (small(), ["fit.steps=many"], "fit.steps is 10, a int; 'many' is a str"),
    "no value": (small(), ["fit.steps"], "has no value; write --config.fit.steps=VALUE"),
    "what has no default": (ConfigDict({**small(), "optimizer": {}}), [], "must set 'optimizer.lr'"),
    "a missing section": (ConfigDict(dict(model=dict(name="gpt2"))), [], "needs a section 'task'"),
    "a family": (small(model=dict(name="gtp2")), [], "unknown model family 'gtp2'; .*'gpt2'"),
    "a size": (small(model=dict(name="gpt2", size="125m")), [], "no size '125m'; .*'124m'"),
    "a task": (small(task=dict(name="casual_lm")), [], "unknown task 'casual_lm'; .*'causal_lm'"),
    "a tokenizer of images": (ConfigDict(PHOTOS | dict(tokenizer=dict(kind="bytes"))), [], "unknown key 'tokenizer' in the recipe"),
    "a field of a part": (
        ConfigDict(PAIRS | dict(model=dict(name="clip", text_config=dict(hiden=1)))),
        [],
        "'model.text_config.hiden'.*'hid",
    ),
    "images without a size": (ConfigDict(PHOTOS | dict(data=dict(batch_size=4, source={}))), [], "must set 'data.size'"),
    "a model of what there is not": (
        small(model=dict(name="whisper")),
        [],
        "whisper takes input_features, decoder_input_ids, which no data",
    ),
}


@pytest.mark.parametrize("recipe, overrides, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipes.resolve(recipe, overrides)


@pytest.mark.parametrize("name, message", [("quikstart", "no recipe 'quikstart'; .*'quickstart'"), ("nowhere/x.py", "no recipe file")])
def test_a_missing_recipe_is_named(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        recipes.load(name)


def test_flat_and_unflatten_are_inverse():
    keys = recipes.flat(recipes.resolve(small()))
    assert recipes.flat(recipes.unflatten(keys)) == keys


def test_diff_names_what_changed_and_ignores_what_it_is_told():
    old, new = recipes.resolve(small()), recipes.resolve(small(), ["optimizer.lr=0.5", "fit.log_every=3"])
    assert recipes.diff(old, new, ignore=recipes.HARMLESS) == ["optimizer.lr: 0.001 -> 0.5"]


@pytest.mark.parametrize("name", ["quickstart", "preference:base"])
def test_what_the_small_decoders_learn_is_read_by_others(name, tmp_path):
    """As a folder of transformers' and as a file of llama.cpp's: each is of a family that has both."""
    c = recipes.load(name).model
    model = models.create(c.name, **{key: value for key, value in c.items() if key != "name"}, vocab_size=300)
    params = model.init(jax.random.key(0))
    bigflax.save(model, params, str(tmp_path))
    again, loaded = bigflax.load(str(tmp_path))
    assert again.family == model.family
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    pytest.importorskip("gguf")
    gguf.save(model, params, str(tmp_path / "small.gguf"))


@pytest.mark.slow
def test_the_recipe_of_preferences_from_its_first_command_to_its_last(tmp_path, monkeypatch):
    """As its docstring has them, of texts of a few words and for a few steps."""
    articles = {
        str(i): {"title": str(i), "extract": f"Thing {i} is number {i} of all things." * 4, "description": f"Sort {i % 50}", "topic": "a"}
        for i in range(300)
    }
    (tmp_path / "articles").write_text(json.dumps(articles))
    monkeypatch.chdir(tmp_path)
    script("preference").write("articles")
    few = ["--config.data.length=64", "--config.data.batch_size=8", "--config.optimizer.warmup_steps=1"]
    assert main(["train", "--config=preference:base", "--config.tokenizer.vocab_size=300", "--config.fit.steps=3", *few]) == 0
    assert main(["convert", "runs/preference-base", "runs/preference-base/weights"]) == 0
    assert (
        main(["train", "--config=preference", "--config.fit.epochs=None", "--config.fit.steps=3", "--config.fit.eval_every=3", *few]) == 0
    )
    assert "eval/margin" in json.loads(Path("runs/preference-dpo/summary.json").read_text())
