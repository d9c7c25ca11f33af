"""Recurrent networks: by hand in NumPy, and beside torch.nn.LSTM and GRU with the weights that we write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import load_tensors

import bigflax
from bigflax import generate, models, trees

V, D, F, T = 40, 6, 5, 7
CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32: the same sums in another order
# name -> config; three layers, of which the last two are stacked
CASES = {
    "lstm": dict(cell="lstm"),
    "gru": dict(cell="gru"),
    "lstm, both ways": dict(cell="lstm", bidirectional=True),
    "gru, both ways": dict(cell="gru", bidirectional=True),
    "one layer": dict(cell="gru", num_hidden_layers=1),
}
each_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)
LENGTHS = (T, 3, 5)
IDS = np.random.default_rng(0).integers(0, V, (3, T))
RIGHT = np.array([[t < n for t in range(T)] for n in LENGTHS], int)


def made(head=None, **config):
    """A model, and weights of which none is small (a bias that is forgotten must be missed)."""
    model = models.create("rnn", vocab_size=V, embedding_size=D, hidden_size=F, head=head, **{"num_hidden_layers": 3, **config})
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.6, s.dtype), model.shapes())


def by_hand(p, x, cell):
    """One direction over one sequence [T, D]."""
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    h, c, out = np.zeros(F), np.zeros(F), []
    for x_t in x:
        a = np.einsum("d,dgf->gf", x_t, p["w"]) + p["w_bias"]
        b = np.einsum("f,fgh->gh", h, p["u"]) + p["u_bias"]
        if cell == "lstm":
            i, f, g, o = a + b
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            r, z = sigmoid(a[:2] + b[:2])
            h = (1 - z) * np.tanh(a[2] + r * b[2]) + z * h
        out.append(h)
    return np.stack(out)


def states_by_hand(params, ids, cell="lstm", bidirectional=False, num_hidden_layers=3):
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    rest = [jax.tree.map(lambda w, i=i: w[i], p["blocks_1"]) for i in range(num_hidden_layers - 1)]
    layers = [p["blocks_0"], *rest] if rest else [p["blocks"]]
    x = p["embed"]["tokens"][ids]
    for layer in layers:
        parts = [by_hand(layer["forward"], x, cell)]
        parts += [by_hand(layer["backward"], x[::-1], cell)[::-1]] if bidirectional else []
        x = np.concatenate(parts, -1)
    return x


@each_case
def test_states(config):
    """Whole rows, and rows padded on either side: real tokens have the states that they have alone, padding has none."""
    model, params = made(**config)
    apply = jax.jit(model.apply)
    for mask in (RIGHT, RIGHT[:, ::-1]):
        got = np.asarray(apply(params, input_ids=IDS, attention_mask=mask)["last_hidden_state"])
        for row, ids, real in zip(got, IDS, mask.astype(bool), strict=True):
            np.testing.assert_allclose(row[real], states_by_hand(params, ids[real], **config), **CLOSE)
            np.testing.assert_array_equal(row[~real], 0)
    plain = apply(params, input_ids=IDS)["last_hidden_state"]
    np.testing.assert_allclose(plain[1], states_by_hand(params, IDS[1], **config), **CLOSE)


@each_case
def test_documents_packed_into_a_row_begin_from_zero(config):
    model, params = made(**config)
    segments = np.array([[1, 1, 1, 2, 2, 2, 0]])
    got = np.asarray(jax.jit(model.apply)(params, input_ids=IDS[:1], segment_ids=segments)["last_hidden_state"])[0]
    for part in (slice(0, 3), slice(3, 6)):
        np.testing.assert_allclose(got[part], states_by_hand(params, IDS[0, part], **config), **CLOSE)


@each_case
def test_it_is_pytorchs(config, tmp_path):
    """The module of torch.nn with the tensors that we write: states and gradients, over packed sequences of three lengths."""
    torch = pytest.importorskip("torch")
    model, params = made(**config)
    bigflax.save(model, params, str(tmp_path))
    tensors = {name: torch.from_numpy(w) for name, w in load_tensors(tmp_path).items()}
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[config["cell"]]
    theirs = kind(D, F, config.get("num_hidden_layers", 3), batch_first=True, bidirectional=config.get("bidirectional", False))
    theirs.load_state_dict({name.removeprefix("rnn."): w for name, w in tensors.items() if name.startswith("rnn.")})
    x = tensors["embedding.weight"][torch.from_numpy(IDS)]
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    want, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    target = np.random.default_rng(2).normal(size=want.shape).astype(np.float32)
    run = lambda params: model.apply(params, input_ids=IDS, attention_mask=RIGHT)["last_hidden_state"]
    np.testing.assert_allclose(jax.jit(run)(params), want.detach().numpy(), **CLOSE)
    (want * torch.from_numpy(target)).sum().backward()
    bigflax.save(model, jax.jit(jax.grad(lambda params: (run(params) * target).sum()))(params), str(tmp_path))
    got = load_tensors(tmp_path)
    for name, w in theirs.named_parameters():
        g = w.grad.numpy()
        np.testing.assert_allclose(got[f"rnn.{name}"], g, rtol=0, atol=1e-4 * np.abs(g).max(), err_msg=name)


def test_hidden_states_and_heads():
    model, params = made("causal_lm", cell="gru")
    out = model.apply(params, input_ids=IDS, hidden_states=True)
    assert [x.shape[-1] for x in out["hidden_states"]] == [D, F, F, F]
    np.testing.assert_array_equal(out["hidden_states"][-1], out["last_hidden_state"])
    np.testing.assert_allclose(out["logits"], out["last_hidden_state"] @ params["head"]["w"].T, **CLOSE)
    for pooling, pooled in (("mean", lambda h: h.mean(0)), ("last", lambda h: h[-1])):
        model, params = made("sequence_classification", bidirectional=True, pooling=pooling, num_labels=3)
        got = model.apply(params, input_ids=IDS, attention_mask=RIGHT)["logits"]
        scores = params["head"]["scores"]
        for row, ids, n in zip(got, IDS, LENGTHS, strict=True):
            np.testing.assert_allclose(
                row, pooled(states_by_hand(params, ids[:n], bidirectional=True)) @ scores["w"] + scores["b"], **CLOSE
            )


def test_dropout_is_between_layers_and_needs_a_key():
    model, params = made(dropout=0.5)
    apply = jax.jit(lambda params, **key: model.apply(params, input_ids=IDS, hidden_states=True, **key)["hidden_states"])
    plain, one, again, other = apply(params), *(apply(params, rng=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one[1], plain[1])  # the first layer reads the embedding whole
    np.testing.assert_array_equal(one[3], again[3])
    assert np.abs(one[2] - other[2]).max() > 0.01 < np.abs(one[2] - plain[2]).max()


def test_remat_changes_nothing():
    grad = lambda model, params: jax.jit(jax.grad(lambda params: (model.apply(params, input_ids=IDS)["logits"] ** 2).mean()))(params)
    want = grad(*made("causal_lm"))
    got = grad(*made("causal_lm", remat="full"))
    for (name, a), (_, b) in zip(trees.named_leaves(got), trees.named_leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7, err_msg=name)
        assert np.abs(b).max() > 0, name


@pytest.mark.parametrize(
    "config", [dict(head=head) for head in models.family("rnn").HEADS] + [dict(head=None, bidirectional=True)], ids=str
)
def test_saved_and_loaded(config, tmp_path):
    model, params = made(**config, cell="gru")
    bigflax.save(model, params, str(tmp_path))
    again, loaded = bigflax.load(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert again.config == model.config and again.axes == model.axes


def test_tied(tmp_path):
    model = models.create("rnn", size="tiny", embedding_size=16, hidden_size=16, tie_word_embeddings=True)
    params = jax.jit(model.init)(jax.random.key(0))
    out = model.apply(params, input_ids=IDS)
    np.testing.assert_allclose(out["logits"], out["last_hidden_state"] @ params["embed"]["tokens"].T, **CLOSE)
    bigflax.save(model, params, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, bigflax.load(str(tmp_path))[1], params)


MISTAKES = {
    "cell": (lambda: made(cell="rnn"), "unknown cell 'rnn'; there are 'gru', 'lstm'"),
    "seeing ahead": (lambda: made("causal_lm", bidirectional=True), "sees the token that it is to predict; causal_lm needs bidirectional=False"),
    "tied": (lambda: made("causal_lm", tie_word_embeddings=True), "states of 5 do not fit embeddings of 6"),
    "generation": (lambda: generate.check(made("causal_lm")[0], 3, max_new_tokens=2), "only a causal decoder continues text"),
    "cache": (lambda: (lambda m, p: m.apply(p, input_ids=IDS, cache={"index": jnp.zeros(3, int)}))(*made()), "recurrent layers keep no cache"),
    "attentions": (lambda: (lambda m, p: m.apply(p, input_ids=IDS, attentions=True))(*made()), "no attentions to give"),
}  # fmt: skip


@pytest.mark.parametrize("make, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
