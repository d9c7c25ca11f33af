"""Patches, positions and the heads of images against the same thing by hand in NumPy."""

import functools
import json

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigflax
from bigflax import models, nn, weights
from bigflax.models import vision
from bigflax.models.transformer import Attention, Block, Group, Transformer

B, C, D, P, Q, H, W = 2, 3, 6, 2, 4, 5, 13  # a row and a column of pixels are left over
ROWS, COLUMNS = 2, 3
X = np.random.default_rng(0).normal(size=(B, C, H, W)).astype(np.float32)
TOKENS = np.random.default_rng(1).normal(size=(B, 7, D)).astype(np.float32)
CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32: the same sums in another order


def made(module, **example):
    """The module's weights, none of which is zero or one, and its function."""
    model = nn.model(module, **example)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), model.shapes())
    return jax.device_get(params), functools.partial(model.apply, params), model


class Tokens(linen.Module):
    """An embedding alone."""

    embed: vision.PatchEmbed

    def __call__(self, pixel_values):
        return {"x": self.embed(pixel_values)[0]}


def embedded(x=X, **options):
    params, apply, _ = made(Tokens(vision.PatchEmbed(D, (H, W), (P, Q), **options)), pixel_values=X)
    return params["embed"], apply(pixel_values=x)["x"]


def patches_by_hand(p):
    """A patch at a time: row by row, and in each the sum over its channels and pixels."""
    out = np.zeros((B, ROWS * COLUMNS, D))
    for b, r, c, d in np.ndindex(B, ROWS, COLUMNS, D):
        out[b, r * COLUMNS + c, d] = (X[b, :, r * P : (r + 1) * P, c * Q : (c + 1) * Q] * p["patches"][..., d]).sum()
    return out + p.get("patches_bias", 0)


@pytest.mark.parametrize("tokens", [(), ("class",), ("class", "distillation")], ids=len)
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_tokens_in_front_of_patches(tokens, registers, bias):
    p, x = embedded(tokens=tokens, registers=registers, bias=bias)
    n = len(tokens)
    front = [p[name][0] + p["positions"][i] for i, name in enumerate(tokens)] + [*p.get("registers", ())]
    assert len(front) == n + registers and ("patches_bias" in p) == bias and p["positions"].shape == (n + ROWS * COLUMNS, D)
    want = np.concatenate([np.tile(np.reshape(front, (-1, D)), (B, 1, 1)), patches_by_hand(p) + p["positions"][n:]], axis=1)
    np.testing.assert_allclose(x, want, **CLOSE)


def test_a_norm_behind_and_a_mask_that_nothing_reads():
    p, x = embedded(norm=nn.Norm("layer"), mask=True)
    y = np.concatenate([np.tile(p["class"], (B, 1, 1)), patches_by_hand(p)], axis=1) + p["positions"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(x, y * p["norm"]["scale"] + p["norm"]["bias"], **CLOSE)
    assert p["mask"].shape == (D,)


def test_bfloat16():
    assert embedded(dtype="bfloat16")[1].dtype == jnp.bfloat16


def test_typed_patches():
    """The projection of patches multiplies by whatever stands in its place."""
    params, _, model = made(Tokens(vision.PatchEmbed(D, (H, W), (P, Q))), pixel_values=X)
    w, axes = jnp.asarray(params["embed"]["patches"]), model.axes["embed"]["patches"]
    typed = weights.lora(weights.quantize(w, "int8", axes=axes), 2, axes=axes, rng=jax.random.key(0))
    typed = weights.LoRA(typed.base, typed.a, jnp.ones(typed.b.shape), typed.alpha)
    swapped = lambda w: model.apply({"embed": params["embed"] | {"patches": w}}, pixel_values=X)["x"]
    np.testing.assert_allclose(swapped(typed), swapped(weights.dense(typed)), rtol=1e-4, atol=1e-4)
    assert np.abs(swapped(typed) - swapped(w)).max() > 0.1


# -- positions for another size --------------------------------------------------------------------------------------------

SIZES = [(3, 7), (7, 3), (4, 4), (5, 16), (37, 16), (1, 5), (6, 1)]


@pytest.mark.parametrize("old, new", SIZES, ids=str)
@pytest.mark.parametrize("antialiased", [False, True])
def test_cubic_interpolation_is_that_of_pytorch(old, new, antialiased):
    torch = pytest.importorskip("torch", reason="an oracle for tests")
    w = np.random.default_rng(0).normal(size=(old, 5)).astype(np.float32)
    lines = torch.from_numpy(w.T.copy())[None, :, :, None].expand(1, 5, old, old)
    want = torch.nn.functional.interpolate(lines, size=(new, old), mode="bicubic", align_corners=False, antialias=antialiased)
    np.testing.assert_allclose(vision.cubic(old, new, antialiased=antialiased) @ w, want[0, :, :, 0].numpy().T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("antialiased", [False, True])
def test_cubic_interpolation_keeps_what_it_must(antialiased):
    for old, new in SIZES:
        np.testing.assert_allclose(vision.cubic(old, new, antialiased=antialiased).sum(1), 1, atol=1e-6)  # what is constant stays so
    np.testing.assert_allclose(vision.cubic(4, 4, antialiased=antialiased), np.eye(4), atol=1e-7)


def test_antialiased_interpolation_keeps_a_line_straight_away_from_its_ends():
    line = vision.cubic(20, 41, antialiased=True) @ np.arange(20.0)  # A of -0.5 does, that of -0.75 does not
    np.testing.assert_allclose(line[6:-6], (np.arange(41)[6:-6] + 0.5) * 20 / 41 - 0.5, atol=1e-5)


@pytest.mark.parametrize("resize", ["cubic", "antialiased"])
def test_positions_of_an_image_of_another_size(resize):
    """Rows and columns are interpolated one after the other; the class token's position stays."""
    x = np.zeros((1, C, 4 * P, 2 * Q + 1), np.float32)
    p, y = embedded(x, resize=resize)
    grid = p["positions"][1:].reshape(ROWS, COLUMNS, D)
    rows, columns = (vision.cubic(o, n, antialiased=resize == "antialiased") for o, n in ((ROWS, 4), (COLUMNS, 2)))
    want = np.stack([rows @ grid[:, c] for c in range(COLUMNS)])
    want = np.stack([columns @ want[:, r] for r in range(4)]).reshape(8, D)
    np.testing.assert_allclose(y[0, 1:], want + p["patches_bias"], **CLOSE)
    np.testing.assert_allclose(y[0, 0], p["class"][0] + p["positions"][0], **CLOSE)


MISTAKES = {
    "another size": (X[..., :-1], {}, "images of 5 x 12 pixels do not fit a model of 5 x 13; resize them"),
    "channels last": (X.transpose(0, 2, 3, 1), {}, r"shape \(2, 5, 13, 3\) are not \[batch, 3, height, width\]: channels come before"),
    "gray": (X[:, :1], {}, r"shape \(2, 1, 5, 13\) are not \[batch, 3"),
    "one image": (X[0], {}, r"shape \(3, 5, 13\) are not \[batch, 3"),
    "no patch": (X[..., :3], dict(resize="cubic"), "images of 5 x 3 pixels do not hold one patch of 2 x 4"),
}


@pytest.mark.parametrize("x, options, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(x, options, message):
    with pytest.raises(ValueError, match=message):
        embedded(x, **options)


# -- heads -----------------------------------------------------------------------------------------------------------------


class Read(linen.Module):
    head: linen.Module

    def __call__(self, x, real=None):
        return self.head(x, None, real)


def read(head, **inputs):
    params, apply, _ = made(Read(head), x=TOKENS)
    return params["head"], apply(x=TOKENS, **inputs)


def test_class_and_mean_of_patches():
    p, out = read(vision.TwoPartHead(4, front=3))
    want = np.concatenate([TOKENS[:, 0], TOKENS[:, 3:].mean(1)], -1) @ p["scores"]["w"] + p["scores"]["b"]
    np.testing.assert_allclose(out["logits"], want, **CLOSE)


def test_two_classifiers_and_their_mean():
    p, out = read(vision.TeacherHead(4))
    one, other = (TOKENS[:, i] @ p[n]["w"] + p[n]["b"] for i, n in enumerate(("scores", "taught")))
    np.testing.assert_allclose(out["cls_logits"], one, **CLOSE)
    np.testing.assert_allclose(out["distillation_logits"], other, **CLOSE)
    np.testing.assert_allclose(out["logits"], (one + other) / 2, **CLOSE)


@pytest.mark.parametrize("real", [None, np.array([[1] * 7, [1, 1, 0, 1, 0, 0, 0]], bool)], ids=["all", "some"])
def test_attention_pooling(real):
    head = vision.AttentionPool(Attention(2, 3, causal=False, cross=True, bias=True), nn.Mlp(8, "relu", bias=True), nn.Norm("layer"))
    p, out = read(head, real=real)
    a, m = p["attention"], p["mlp"]
    for b in range(B):
        seen = TOKENS[b] if real is None else TOKENS[b][real[b]]
        q = np.einsum("d,dnh->nh", p["probe"], a["q"]) + a["q_bias"]
        k, v = (np.einsum("td,dnh->tnh", seen, a[n]) + a[f"{n}_bias"] for n in "kv")
        share = np.exp(np.einsum("nh,tnh->nt", q, k) / np.sqrt(3))
        y = np.einsum("nt,tnh,nhd->d", share / share.sum(-1, keepdims=True), v, a["out"]) + a["out_bias"]
        z = (y - y.mean()) / np.sqrt(y.var() + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
        y += np.maximum(z @ m["up"] + m["up_bias"], 0) @ m["down"] + m["down_bias"]
        np.testing.assert_allclose(out["pooler_output"][b], y, rtol=1e-4, atol=1e-4)


# -- what a block can besides ----------------------------------------------------------------------------------------------


def one_layer(**options):
    block = Block(Attention(2, 3, causal=False, bias=True), nn.Mlp(8, bias=True), nn.Norm("layer"), **options)
    embed = vision.PatchEmbed(D, (H, W), (P, Q))
    return made(Transformer(embed, (Group((block,), 2),), norm=nn.Norm("layer"), norm_states=False), pixel_values=X)


def test_layer_scale():
    """Fresh scales are what was asked for; with scales of one it is the layer without them, with scales of nought it does nothing."""
    params, _, model = one_layer(layer_scale=0.25)
    fresh = model.init(jax.random.key(0))["blocks"]
    np.testing.assert_array_equal(fresh["scale1"], np.full((2, D), 0.25))
    run = lambda s1, s2: model.apply(
        {**params, "blocks": params["blocks"] | {"scale1": jnp.full((2, D), s1), "scale2": jnp.full((2, D), s2)}}, pixel_values=X
    )["last_hidden_state"]
    plain = one_layer()[2]
    bare = {**params, "blocks": {k: v for k, v in params["blocks"].items() if not k.startswith("scale")}}
    np.testing.assert_allclose(run(1.0, 1.0), plain.apply(bare, pixel_values=X)["last_hidden_state"], **CLOSE)
    outs = [run(0.0, 0.0), run(0.5, 0.0), run(0.0, 0.5), run(0.5, 0.5)]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])
    states = model.apply({**params, "blocks": params["blocks"] | {"scale1": 0 * params["blocks"]["scale1"], "scale2": 0 * params["blocks"]["scale2"]}},
        pixel_values=X, hidden_states=True)["hidden_states"]  # fmt: skip
    np.testing.assert_array_equal(states[0], states[2])


def test_states_before_the_final_norm():
    params, apply, _ = one_layer()
    out = apply(pixel_values=X, hidden_states=True)
    last = out["hidden_states"][-1]
    normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out["last_hidden_state"], normed * params["norm"]["scale"] + params["norm"]["bias"], rtol=1e-4, atol=1e-4)
    assert len(out["hidden_states"]) == 3


def test_stochastic_depth_leaves_layers_out_in_training_only():
    _, apply, _ = one_layer(drop_path=0.5)
    plain = np.asarray(apply(pixel_values=X)["last_hidden_state"])
    np.testing.assert_array_equal(plain, one_layer()[1](pixel_values=X)["last_hidden_state"])
    outs = [np.asarray(apply(pixel_values=X, rng=jax.random.key(k), hidden_states=True)["hidden_states"][-1]) for k in range(20)]
    states = apply(pixel_values=X, hidden_states=True)["hidden_states"][0]
    assert any(np.array_equal(o[0], states[0]) for o in outs)  # all four parts are left out in one of sixteen
    assert len({o[0].sum() for o in outs}) > 5


@pytest.fixture
def folder(tmp_path):
    """A ViT that tells three classes apart, and its weights."""
    model = models.create("vit", size="tiny", num_labels=3)
    params = jax.jit(model.init)(jax.random.key(0))
    bigflax.save(model, params, str(tmp_path / "vit"))
    return tmp_path / "vit", params


def test_a_folder_keeps_the_names_of_its_classes(folder, tmp_path):
    said = json.loads((folder[0] / "config.json").read_text())
    assert said["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    said |= {"id2label": {"0": "cat", "1": "dog", "2": "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    (folder[0] / "config.json").write_text(json.dumps(said))
    bigflax.save(*bigflax.load(str(folder[0])), str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == said


def test_other_classes_are_learned_anew_on_the_same_body(folder, tmp_path):
    """Scores of another number of classes are fresh where they are asked for, and refused where they are not."""
    five, params = bigflax.load(str(folder[0]), num_labels=5)
    assert params["head"]["scores"]["w"].shape == (64, 5) and float(jnp.abs(params["head"]["scores"]["w"]).max()) > 0
    jax.tree.map(np.testing.assert_array_equal, params["blocks"], folder[1]["blocks"])
    bigflax.save(five, params, str(tmp_path / "five"))
    assert len(json.loads((tmp_path / "five" / "config.json").read_text())["id2label"]) == 5
    _, params = bigflax.load(str(folder[0]), num_labels=3)
    jax.tree.map(np.testing.assert_array_equal, params, folder[1])
    body, params = bigflax.load(str(folder[0]), head=None)
    assert set(params["head"]) == {"dense"} and "pooler_output" in body.apply(params, pixel_values=np.zeros((1, 3, 32, 32)))
    (tmp_path / "five" / "config.json").write_text((folder[0] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"classifier.* has shape \(5.*; the config makes it \(3"):
        bigflax.load(str(tmp_path / "five"))


def test_what_a_vit_cannot_be():
    with pytest.raises(ValueError, match="pooler_output_size 5 is not hidden_size 64"):
        models.create("vit", size="tiny", pooler_output_size=5)
    with pytest.raises(ValueError, match=r"unknown head 'classification'; .*'image_classification'"):
        models.create("deit", size="tiny", head="classification")
