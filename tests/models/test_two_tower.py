"""Two towers: which token stands for a text, what comes out of one input or both, nested configs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigflax
from bigflax import models
from bigflax.models import two_tower

B, T = 3, 8
IDS = np.array([[5, 9, 7, 9, 4, 1, 1, 1], [5, 6, 7, 8, 4, 9, 3, 2], [5, 5, 5, 5, 5, 5, 5, 5]])
IMAGES = np.random.default_rng(0).normal(size=(B, 3, 32, 32)).astype(np.float32)
CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32: the same sums in another order
FAMILIES = ("clip", "siglip")
each_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def made(family, end=None):
    config = {"text_config": {"eos_token_id": end}} if end else {}
    model, rng = models.create(family, size="tiny", **config), np.random.default_rng(1)
    return model, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.2, jnp.float32), model.shapes())


def test_the_token_that_stands_for_a_text():
    for end, want in {"last": [7, 7, 7], "highest": [1, 5, 0], 4: [4, 4, 0], 9: [1, 5, 0], 2: [0, 7, 0]}.items():
        np.testing.assert_array_equal(two_tower.end_of(jnp.asarray(IDS), end), want, err_msg=str(end))


@pytest.mark.parametrize("said, end", [(2, "highest"), (9, 9)])
def test_clip_reads_the_text_where_its_config_says(said, end):
    """In configs of before 2023 the end of a text has the id 2, whatever the tokenizer says, and is the highest id in truth."""
    assert models.create("clip", size="tiny", text_config={"eos_token_id": said}).module.end == end


@each_family
def test_embeddings_meet(family):
    """Rows of length 1; logits are their products, scaled (and moved), and one the other's transpose."""
    model, params = made(family)
    out = jax.device_get(model.apply(params, input_ids=IDS, pixel_values=IMAGES))
    for name in ("text_embeds", "image_embeds"):
        np.testing.assert_allclose(np.linalg.norm(out[name], axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(out["logit_scale"], np.exp(params["logit_scale"]), rtol=1e-6)
    want = out["text_embeds"] @ out["image_embeds"].T * np.exp(params["logit_scale"]) + params.get("logit_bias", 0)
    np.testing.assert_allclose(out["logits_per_text"], want, **CLOSE)
    np.testing.assert_array_equal(out["logits_per_image"], out["logits_per_text"].T)
    assert ("logit_bias" in out) == (family == "siglip")
    assert not {"logits_per_text", "logits_per_image"} & model.apply(params, input_ids=IDS, pixel_values=IMAGES, logits=False).keys()


@each_family
def test_either_input_alone(family):
    model, params = made(family)
    both = model.apply(params, input_ids=IDS, pixel_values=IMAGES)
    for name, given in {"text_embeds": dict(input_ids=IDS[:2]), "image_embeds": dict(pixel_values=IMAGES[:2])}.items():
        out = model.apply(params, **given, hidden_states=True)
        np.testing.assert_allclose(out[name], both[name][:2], **CLOSE)
        states = "text_hidden_states" if name == "text_embeds" else "vision_hidden_states"
        assert {n for n in out if not n.startswith("logit_")} == {name, states} and len(out[states]) == 3
    out = model.apply(params, input_ids=IDS, pixel_values=IMAGES, attentions=True, qkv=True)
    assert [len(out[f"{tower}_{name}"]) for tower in ("text", "vision") for name in ("attentions", "qkv")] == [2] * 4
    with pytest.raises(ValueError, match="takes input_ids, pixel_values or both, not nothing"):
        model.apply(params)


def test_fresh_numbers_are_those_of_the_papers():
    for family, scale, bias in (("clip", 1 / 0.07, None), ("siglip", 10, -10)):
        model = made(family)[0]
        out = model.apply(jax.jit(model.init)(jax.random.key(0)), pixel_values=IMAGES)
        np.testing.assert_allclose(out["logit_scale"], scale, rtol=1e-4)
        assert bias is None or float(out["logit_bias"]) == bias


@each_family
def test_what_a_text_sees(family):
    """CLIP's tokens see what is before them, SigLIP's all of the text; padding is seen by none."""
    model, params = made(family)
    states = lambda ids, **more: np.asarray(model.apply(params, input_ids=ids, hidden_states=True, **more)["text_hidden_states"][-1])
    other = IDS.copy()
    other[:, 4] += 100
    differs = np.abs(states(IDS) - states(other)).max((0, 2)) > 1e-5
    np.testing.assert_array_equal(differs, np.arange(T) >= 4 if family == "clip" else np.ones(T, bool))
    mask = np.repeat([[1, 1, 1, 1, 0, 1, 1, 1]], B, 0)
    differs = np.abs(states(IDS, attention_mask=mask) - states(other, attention_mask=mask)).max((0, 2)) > 1e-5
    np.testing.assert_array_equal(differs, np.arange(T) == 4)


# -- configs inside of configs ---------------------------------------------------------------------------------------------


def test_overrides_merge_into_the_size():
    config = models.create("clip", size="tiny", text_config={"hidden_size": 32}, projection_dim=8).config
    assert config["text_config"]["hidden_size"] == 32 and config["text_config"]["vocab_size"] == 256  # of the size
    assert config["text_config"]["layer_norm_eps"] == 1e-5 and config["vision_config"]["patch_size"] == 8  # of the family
    assert config["projection_dim"] == 8


MISTAKES = {
    "an unknown field inside": (dict(name="clip", text_config={"hiden_size": 3}), "clip has no config field 'text_config.hiden_size'; .* 'hidden_size'"),
    "how to compute, inside": (dict(name="clip", vision_config={"dtype": "bfloat16"}), "no config field 'vision_config.dtype'"),
    "a list of ends": (dict(name="clip", text_config={"eos_token_id": [1, 2]}), r"eos_token_id is \[1, 2\], .* must be a number"),
    "towers that do not meet": (dict(name="siglip", text_config={"projection_size": 48}), "projected to a width of 48 .* images have 64"),
    "head": (dict(name="clip", head="masked_lm"), "unknown head 'masked_lm'; there are 'None'"),
}  # fmt: skip


@pytest.mark.parametrize("options, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        models.create(size="tiny", **options)


@pytest.fixture
def folder(tmp_path):
    bigflax.save(*made("clip"), str(tmp_path / "clip"))
    return tmp_path / "clip"


def edit(folder, change):
    said = json.loads((folder / "config.json").read_text())
    change(said)
    (folder / "config.json").write_text(json.dumps(said))


BROKEN = {
    "an unknown field inside": (lambda said: said["vision_config"].update(windows=3), r"field 'vision_config.windows' \(3\), which clip does not"),
    "one known outside alone": (lambda said: said["text_config"].update(logit_scale_init_value=3), "field 'text_config.logit_scale_init_value'"),
    "a value that all refuse": (lambda said: said["text_config"].update(is_decoder=True), "says text_config.is_decoder = True, and clip"),
    "another width inside": (lambda said: said["text_config"].update(intermediate_size=3), r"config makes it \(3, 64\)"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_broken_configs(change, message, folder):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        bigflax.load(str(folder))


def test_siglip_without_its_head_is_refused(tmp_path):
    bigflax.save(*made("siglip"), str(tmp_path))
    edit(tmp_path, lambda said: said["vision_config"].update(vision_use_head=False))
    with pytest.raises(ValueError, match=r"says vision_config.vision_use_head = False, and siglip is supported with True only"):
        bigflax.load(str(tmp_path))


def test_what_a_folder_says_besides_is_kept(folder, tmp_path):
    """Fields that we do not read go out as they came in, and so does what prepares images."""
    edit(folder, lambda said: said["vision_config"].update(model_type="clip_vision_model", attention_dropout=0.0, num_beams=1))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    model, params = bigflax.load(str(folder), dtype="bfloat16")
    bigflax.save(model, params, str(tmp_path / "out"))
    said, before = (json.loads((at / "config.json").read_text()) for at in (tmp_path / "out", folder))
    assert said["vision_config"] == before["vision_config"] and said["text_config"] == before["text_config"]
    assert said["vision_config"]["hidden_size"] == 64
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"image_mean": [0.5, 0.5, 0.5]}'
    assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    out = jax.eval_shape(functools.partial(model.apply, hidden_states=True), params, input_ids=IDS, pixel_values=IMAGES)
    assert {x.dtype for name in ("text_hidden_states", "vision_hidden_states") for x in out[name]} == {jnp.dtype("bfloat16")}


OLD = (  # what transformers 4 wrote into every config
    "_name_or_path= add_cross_attention=False architectures=None bad_words_ids=None chunk_size_feed_forward=0 cross_attention_hidden_size=None "
    "decoder_start_token_id=None diversity_penalty=0.0 do_sample=False dropout=0.0 early_stopping=False encoder_no_repeat_ngram_size=0 "
    "exponential_decay_length_penalty=None finetuning_task=None forced_bos_token_id=None forced_eos_token_id=None initializer_factor=1.0 "
    "is_decoder=False is_encoder_decoder=False length_penalty=1.0 max_length=20 min_length=0 no_repeat_ngram_size=0 num_beam_groups=1 num_beams=1 "
    "num_return_sequences=1 output_attentions=False output_hidden_states=False output_scores=False prefix=None problem_type=None pruned_heads={} "
    "remove_invalid_values=False repetition_penalty=1.0 return_dict=True return_dict_in_generate=False sep_token_id=None "
    "task_specific_params=None temperature=1.0 tf_legacy_loss=False tie_encoder_decoder=False tie_word_embeddings=True tokenizer_class=None "
    "top_k=50 top_p=1.0 torch_dtype=None torchscript=False transformers_version=4.21.0 typical_p=1.0 use_bfloat16=False"
)


def test_old_configs_say_how_to_generate_inside(folder):
    fields = dict(field.split("=") for field in OLD.split())
    values = {"None": None, "True": True, "False": False, "{}": {}, "0": 0}
    edit(
        folder,
        lambda said: [said[part].update({k: values.get(v, v) for k, v in fields.items()}) for part in ("text_config", "vision_config")],
    )
    model, _ = bigflax.load(str(folder))
    assert model.config == made("clip")[0].config | {"dtype": "float32"}
    edit(folder, lambda said: said["vision_config"].update(pruned_heads={"0": [1]}))
    with pytest.raises(ValueError, match=r"says vision_config.pruned_heads = {'0': \[1\]}, and clip is supported with {} only"):
        bigflax.load(str(folder))


def test_the_first_configs_of_clip_say_it_twice(folder, tmp_path):
    """What `text_config_dict` says holds, what it leaves out has its default, and it is written once."""
    inside = {"text_config": json.loads((folder / "config.json").read_text())["text_config"]}

    def change(said):
        said["text_config_dict"] = {**inside["text_config"], "layer_norm_eps": 1e-3, "bos_token_id": 0}
        said["text_config_dict"].pop("eos_token_id")
        said["text_config"]["eos_token_id"] = 2
        said["vision_config_dict"] = None

    edit(folder, change)
    model, params = bigflax.load(str(folder))
    assert model.config["text_config"]["layer_norm_eps"] == 1e-3 and model.module.end == 49407
    bigflax.save(model, params, str(tmp_path / "out"))
    assert not {"text_config_dict", "vision_config_dict"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    again, _ = bigflax.load(str(tmp_path / "out"))
    assert again.config == model.config


@pytest.mark.parametrize("family, end", [("clip", 9), ("clip", 2), ("siglip", None)])
def test_what_is_made_here_is_read_there(family, end, tmp_path):
    """A config of ours without a folder behind it, and the same numbers from transformers, wherever it reads a text."""
    torch = pytest.importorskip("torch", reason="an oracle for tests")
    transformers = pytest.importorskip("transformers")
    model, params = made(family, end)
    bigflax.save(model, params, str(tmp_path))
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = theirs(input_ids=torch.from_numpy(IDS), pixel_values=torch.from_numpy(IMAGES))
    got = model.apply(params, input_ids=IDS, pixel_values=IMAGES)
    for name in ("text_embeds", "image_embeds", "logits_per_text"):
        np.testing.assert_allclose(got[name], want[name].numpy(), rtol=0, atol=1e-4 * float(want[name].abs().max()))
