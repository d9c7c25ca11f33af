"""`bigflax parity`: equal models pass, a broken one is named with its layer; without PyTorch it says what to install."""

import importlib.util

import jax
import numpy as np
import pytest
from families import FAMILIES, torch_model

import bigflax
from bigflax import models, parity
from bigflax.main import main

HAS_TORCH = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="compares with PyTorch: pip install 'bigflax[parity]'")
TOKENS = {"plain", "padded right", "padded left", "longest"}
# family, head, the kinds of its inputs
CASES = [
    ("bert", "masked_lm", {*TOKENS, "token types", "packed"}), ("bert", "question_answering", {*TOKENS, "token types", "packed"}),
    ("bert", None, {*TOKENS, "token types", "packed"}), ("electra", "discriminator", {*TOKENS, "token types", "packed"}),
    ("roberta", "masked_lm", {*TOKENS, "token types", "packed"}), ("llama", "causal_lm", {*TOKENS, "packed"}),
    ("mixtral", "causal_lm", {*TOKENS, "packed"}), ("opt", "sequence_classification", TOKENS),
    ("t5", "seq2seq_lm", {*TOKENS, "packed"}), ("bart", None, {*TOKENS, "packed"}), ("bart", "sequence_classification", TOKENS),
    ("bart", "question_answering", TOKENS), ("whisper", "seq2seq_lm", TOKENS), ("clip", None, TOKENS), ("siglip", None, TOKENS),
    ("vit", "image_classification", {"plain"}), ("resnet", "image_classification", {"plain"}),
]  # fmt: skip


@needs_torch
@pytest.mark.parametrize("family, head, kinds", CASES)
def test_equal_models_pass(family, head, kinds, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FAMILIES["whisper"], "max_source_positions", 9)  # of which an example shows eight
    torch_model(family, head).save_pretrained(tmp_path)
    assert main(["parity", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    rows = parity.compare(str(tmp_path))
    assert {row.inputs for row in rows} == kinds and all(kind in shown for kind in kinds)
    has_logits = head not in (None, "question_answering", "discriminator")  # the last has one number a token, no distribution
    assert all((row.top1 == 1.0 and row.kl < 1e-6) if has_logits else row.kl is None for row in rows)


@needs_torch
def test_a_wrong_layer_is_named(tmp_path, monkeypatch, capsys):
    """The second of three layers is changed on the way in: hidden state 2 is the first to differ."""
    torch_model("llama", "causal_lm").save_pretrained(tmp_path)
    load = bigflax.hub.load

    def wrong(*args, **options):
        model, params = load(*args, **options)
        params["blocks"]["mlp"]["down"] = params["blocks"]["mlp"]["down"].at[1].multiply(1.01)
        return model, params

    monkeypatch.setattr("bigflax.hub.load", wrong)
    rows = parity.compare(str(tmp_path))
    assert {row.first for row in rows} == {"2"} and all(row.relative > 1e-4 and row.kl > 0 for row in rows)
    assert main(["parity", str(tmp_path)]) == 1
    capsys.readouterr()


@needs_torch
def test_a_wrong_layer_of_one_of_two_stacks_is_named(tmp_path, monkeypatch, capsys):
    torch_model("t5", "seq2seq_lm").save_pretrained(tmp_path)
    load = bigflax.hub.load

    def wrong(*args, **options):
        model, params = load(*args, **options)
        mlp = params["decoder"]["blocks"]["mlp"]
        mlp["down"] = mlp["down"].at[0].multiply(1.01)
        return model, params

    monkeypatch.setattr("bigflax.hub.load", wrong)
    assert main(["parity", str(tmp_path)]) == 1
    assert "decoder 1" in capsys.readouterr().out


@needs_torch
@pytest.mark.parametrize("family", ["cnn", "rnn"])
def test_what_transformers_does_not_have_is_not_compared(family, tmp_path, capsys):
    model = models.create(family, size="tiny", head=None)
    bigflax.save(model, jax.jit(model.init)(jax.random.key(0)), str(tmp_path))
    assert main(["parity", str(tmp_path)]) == 2
    assert f"transformers, which has no {family}" in capsys.readouterr().err


@pytest.mark.skipif(HAS_TORCH, reason="PyTorch is here")
def test_without_pytorch_it_says_what_to_install(tmp_path, capsys):
    assert main(["parity", str(tmp_path)]) == 2
    assert "pip install 'bigflax[parity]'" in capsys.readouterr().err


def test_convert(tmp_path, capsys):
    model = models.create("llama", size="tiny", vocab_size=40)
    params = jax.jit(model.init)(jax.random.key(0))
    bigflax.save(model, params, str(tmp_path / "a"))
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--dtype=bfloat16"]) == 0
    assert "llama: " in capsys.readouterr().out
    _, narrow = bigflax.load(str(tmp_path / "b"))
    want = jax.tree.map(lambda w: np.asarray(w.astype("bfloat16"), np.float32), params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), narrow, want)
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "c")]) == 2
    assert "there is no folder" in capsys.readouterr().err
