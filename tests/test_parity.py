"""`bigflax parity`: equal models pass, a broken one is named with its layer; without PyTorch it says what to install."""

import importlib.util

import jax
import numpy as np
import pytest
from families import torch_model

import bigflax
from bigflax import models, parity
from bigflax.main import main

HAS_TORCH = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="compares with PyTorch: pip install 'bigflax[parity]'")
CASES = [
    ("bert", "masked_lm"), ("bert", "question_answering"), ("bert", None), ("llama", "causal_lm"), ("opt", "sequence_classification"),
    ("electra", "discriminator"), ("roberta", "masked_lm"), ("vit", "image_classification"), ("siglip", None),
]  # fmt: skip


@needs_torch
@pytest.mark.parametrize("family, head", CASES)
def test_equal_models_pass(family, head, tmp_path, capsys):
    torch_model(family, head).save_pretrained(tmp_path)
    assert main(["parity", str(tmp_path), "--cache="]) == 0
    shown = capsys.readouterr().out
    kinds = {"plain"} if family == "vit" else {"plain", "padded right", "padded left", "longest"}
    kinds |= ({"token types"} if family in ("bert", "electra", "roberta") else set()) | (
        {"packed"} if head in ("masked_lm", "causal_lm", "question_answering") else set()
    )
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
    assert {row.first for row in rows} == {2} and all(row.relative > 1e-4 and row.kl > 0 for row in rows)
    assert main(["parity", str(tmp_path), "--cache="]) == 1
    capsys.readouterr()


@pytest.mark.parametrize("family", ["cnn", "resnet", "rnn"])
def test_what_is_not_compared(family, tmp_path):
    pytest.importorskip("transformers")
    model = models.create(family, size="tiny", head=None)
    bigflax.save(model, jax.jit(model.init)(jax.random.key(0)), str(tmp_path))
    with pytest.raises(ValueError, match=f"parity feeds tokens to what transformers has too, and {family} is not"):
        parity.compare(str(tmp_path))


@needs_torch
def test_a_pair_is_refused(tmp_path, capsys):
    torch_model("t5", "seq2seq_lm").save_pretrained(tmp_path)
    assert main(["parity", str(tmp_path), "--cache="]) == 2
    assert "rows of tokens alone, and t5 reads input_ids and decoder_input_ids" in capsys.readouterr().err


@pytest.mark.skipif(HAS_TORCH, reason="PyTorch is here")
def test_without_pytorch_it_says_what_to_install(tmp_path, capsys):
    assert main(["parity", str(tmp_path), "--cache="]) == 2
    assert "pip install 'bigflax[parity]'" in capsys.readouterr().err


def test_convert(tmp_path, capsys):
    model = models.create("llama", size="tiny", vocab_size=40)
    params = jax.jit(model.init)(jax.random.key(0))
    bigflax.save(model, params, str(tmp_path / "a"))
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--dtype=bfloat16", "--cache="]) == 0
    assert "llama: " in capsys.readouterr().out
    _, narrow = bigflax.load(str(tmp_path / "b"))
    want = jax.tree.map(lambda w: np.asarray(w.astype("bfloat16"), np.float32), params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), narrow, want)
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "c"), "--cache="]) == 2
    assert "there is no folder" in capsys.readouterr().err
