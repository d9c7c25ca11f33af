"""Heads against what they say, by hand in NumPy; language-model heads are tested with the models that have them."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import nn
from bigflax.models import heads

B, T, D, C = 3, 5, 8, 4
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], bool)  # whole, padded on the right, padded on the left
# what is pooled of X where REAL holds
POOLED = {
    "first": X[:, 0],
    "last": np.stack([X[0, 4], X[1, 1], X[2, 4]]),
    "mean": np.stack([X[0].mean(0), X[1, :2].mean(0), X[2, 2:].mean(0)]),
}
CLOSE = dict(rtol=1e-5, atol=1e-6)  # float32 sums of eight terms


def run(head):
    model = nn.model(Given(head), x=jax.ShapeDtypeStruct(X.shape, jnp.float32), real=jax.ShapeDtypeStruct((B, T), bool))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), model.shapes())
    return jax.device_get(params), model.apply(params, x=X, real=REAL)


class Given(linen.Module):
    head: linen.Module

    def __call__(self, x, real):
        return self.head(x, None, real)


@pytest.mark.parametrize("pool", POOLED)
@pytest.mark.parametrize("act", [None, "tanh", "relu"])
def test_scores_of_a_sequence(pool, act):
    params, out = run(heads.SequenceHead(C, pool, act))
    h = POOLED[pool]
    if act is not None:
        h = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}[act](h @ params["head"]["dense"]["w"] + params["head"]["dense"]["b"])
    np.testing.assert_allclose(out["logits"], h @ params["head"]["scores"]["w"] + params["head"]["scores"]["b"], **CLOSE)


def test_a_pooler_has_no_scores():
    params, out = run(heads.SequenceHead(0, act="tanh"))
    np.testing.assert_allclose(
        out["pooler_output"], np.tanh(X[:, 0] @ params["head"]["dense"]["w"] + params["head"]["dense"]["b"]), **CLOSE
    )
    assert set(out) == {"pooler_output"} and set(params["head"]) == {"dense"}


def test_scores_of_tokens():
    params, out = run(heads.TokenHead(2, ("start_logits", "end_logits")))
    scores = X @ params["head"]["scores"]["w"] + params["head"]["scores"]["b"]
    np.testing.assert_allclose(out["start_logits"], scores[..., 0], **CLOSE)
    np.testing.assert_allclose(out["end_logits"], scores[..., 1], **CLOSE)


def test_a_norm_behind_the_layer_of_a_head():
    """ModernBERT's: a layer without a bias, its activation, a norm without a bias, then the scores."""
    more = dict(act="relu", norm=nn.Norm("layer", 0.1, bias=False), dense_bias=False)
    for head, x in ((heads.SequenceHead(C, "mean", **more), POOLED["mean"]), (heads.TokenHead(C, **more), X)):
        params, out = run(head)
        p = params["head"]
        h = np.maximum(x @ p["dense"]["w"], 0)
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 0.1) * p["norm"]["scale"]
        np.testing.assert_allclose(out["logits"], h @ p["scores"]["w"] + p["scores"]["b"], **CLOSE)
        assert set(p) == {"dense", "norm", "scores"} and set(p["dense"]) == {"w"}


def test_an_embedding_is_the_mean_of_length_one():
    apply = lambda real: heads.EmbeddingHead().apply({}, X, None, real)["sentence_embedding"]
    np.testing.assert_allclose(apply(REAL), POOLED["mean"] / np.linalg.norm(POOLED["mean"], axis=1, keepdims=True), **CLOSE)
    assert np.isfinite(apply(np.zeros((B, T), bool))).all()  # a row without a token


def test_an_unknown_head_is_named_with_those_there_are():
    norm = lambda: nn.Norm("layer")
    with pytest.raises(ValueError, match=r"unknown head 'masked'; .*'masked_lm'"):
        heads.encoder_head("masked", vocab=9, norm=norm, labels=2, init=nn.NORMAL)
