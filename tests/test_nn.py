"""The parts of a layer against the same thing written out by hand in NumPy, and the stack against a loop over its layers."""

import dataclasses
import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import nn, trees, weights

B, T, D = 2, 6, 16
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
# float32: the same sums in another order
CLOSE = dict(rtol=1e-4, atol=2e-5)


def made(module, *example, seed=1, **named):
    """The module as a pair of functions and weights of which none is zero or one."""
    rng = np.random.default_rng(seed)
    box = jax.eval_shape(lambda key: linen.init(lambda m: m(*example, **named), module)({"params": key})["params"], jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, jnp.float32), linen.unbox(box))
    return params, functools.partial(jax.jit(lambda params, *x, **k: module.apply({"params": params}, *x, **k)), params)


# -- attention -------------------------------------------------------------------------------------------------------------

N, K, H = 4, 2, 8
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2], [3, 4, 0, 1, 2, 9]])


def rotate(x, position, theta):
    """The pair (x_i, x_i+H/2) turned by position * theta^(-2i/H)."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def attention_by_hand(
    p, x, *, kv_heads=None, causal=True, theta=None, norm_eps=None, window=None, softcap=None, segments=None, positions=None, scale=H**-0.5,
    memory=None, seen=None, bias=None,
):  # fmt: skip
    """One query at a time, one head at a time; of a memory it sees where `seen` holds, [B, T, S]."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), p)
    kv_heads, at = kv_heads or N, np.tile(np.arange(T), (B, 1)) if positions is None else positions
    read = x if memory is None else memory
    q, k, v = (np.einsum("btd,dnh->btnh", x if n == "q" else read, p[n]) + p.get(f"{n}_bias", 0) for n in "qkv")
    if norm_eps is not None:
        q, k = (z / np.sqrt((z**2).mean(-1, keepdims=True) + norm_eps) * p[n]["scale"] for z, n in ((q, "q_norm"), (k, "k_norm")))
    if theta is not None:
        q, k = (np.stack([[rotate(z[b, t], at[b, t], theta) for t in range(T)] for b in range(B)]) for z in (q, k))
    y = np.zeros((B, T, D))
    for b, t, n in np.ndindex(B, T, N):
        sees = [s for s in range(read.shape[1]) if (not causal or s <= t) and (window is None or abs(t - s) < window)]
        sees = [s for s in sees if (segments is None or segments[b, s] == segments[b, t]) and (seen is None or seen[b, t, s])]
        logits = np.array([q[b, t, n] @ k[b, s, n // (N // kv_heads)] for s in sees]) * scale
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        logits = logits if bias is None else logits + bias[n, t, sees]
        share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        y[b, t] += sum(w * v[b, s, n // (N // kv_heads)] for w, s in zip(share, sees, strict=True)) @ p["out"][n]
    return y + p.get("out_bias", 0)


ROPE = nn.Rope(100.0)
PACKED = dict(q_segments=SEGMENTS, kv_segments=SEGMENTS, positions=POSITIONS)
MEMORY = np.random.default_rng(5).normal(size=(B, 4, D + 2)).astype(np.float32)  # of another length and width
REAL, SOURCES = np.array([[1, 1, 1, 0], [0, 1, 1, 1]]), np.array([[1, 2, 2, 2], [2, 1, 0, 0]])
BIAS = np.random.default_rng(6).normal(size=(N, T, T)).astype(np.float32)
ATTENTIONS = {  # name -> (module, the same for the hand, inputs)
    "plain": (nn.Attention(N, H), {}, {}),
    "both ways": (nn.Attention(N, H, causal=False), dict(causal=False), {}),
    "grouped": (nn.Attention(N, H, K), dict(kv_heads=K), {}),
    "biases": (nn.Attention(N, H, bias=True), {}, {}),
    "biases but none at the end": (nn.Attention(N, H, bias=True, out_bias=False), {}, {}),
    "rotary, packed": (nn.Attention(N, H, K, rope=ROPE), dict(kv_heads=K, theta=100.0, segments=SEGMENTS, positions=POSITIONS), PACKED),
    "normed q and k": (nn.Attention(N, H, K, rope=ROPE, norm=nn.Norm("rms", 0.01)), dict(kv_heads=K, theta=100.0, norm_eps=0.01), {}),
    "no bias of keys": (nn.Attention(N, H, bias=True, k_bias=False), {}, {}),
    "a bias of the logits": (nn.Attention(N, H, softcap=2.0), dict(softcap=2.0, bias=BIAS), dict(bias=BIAS[None])),
    "a memory": (nn.Attention(N, H, K, causal=False, cross=True), dict(kv_heads=K, causal=False, memory=MEMORY), dict(memory=MEMORY)),
    "a padded memory": (
        nn.Attention(N, H, causal=False, cross=True),
        dict(causal=False, memory=MEMORY, seen=np.repeat(REAL[:, None], T, 1)), dict(memory=MEMORY, kv_segments=REAL),
    ),
    "a packed memory": (
        nn.Attention(N, H, causal=False, cross=True), dict(causal=False, memory=MEMORY, seen=SEGMENTS[:, :, None] == SOURCES[:, None]),
        dict(memory=MEMORY, q_segments=SEGMENTS, kv_segments=SOURCES),
    ),
    "window, softcap, scale": (nn.Attention(N, H, window=3, softcap=2.0, scale=0.9), dict(window=3, softcap=2.0, scale=0.9), {}),
}  # fmt: skip


@pytest.mark.parametrize("module, options, inputs", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(module, options, inputs):
    params, apply = made(module, X, **({"memory": MEMORY} if module.cross else {}))
    y, seen = apply(X, **inputs)
    assert seen == {"cache": None}
    biases = {"q_bias", "k_bias", "v_bias"} - ({"k_bias"} if module.k_bias is False else set()) if module.bias else set()
    biases |= {"out_bias"} if module.bias and module.out_bias is None else set()
    assert {name for name in params if name.endswith("bias")} == biases
    np.testing.assert_allclose(y, attention_by_hand(params, X, **options), **CLOSE)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_what_attention_saw(name):
    """Its map weighs the values to what comes out, and y is what it is unasked; queries, keys and values are those before the rotation."""
    module, _, inputs = ATTENTIONS[name]
    params, apply = made(module, X, **({"memory": MEMORY} if module.cross else {}))
    y, seen = jax.jit(lambda params: module.apply({"params": params}, X, keep=("attentions", "qkv"), **inputs))(params)
    np.testing.assert_allclose(y, apply(X, **inputs)[0], **CLOSE)
    of = lambda x, n: np.einsum("btd,dnh->btnh", x, params[n]) + np.asarray(params.get(f"{n}_bias", 0))
    v = np.repeat(of(MEMORY if module.cross else X, "v"), N // (module.kv_heads or N), 2)
    summed = np.einsum("bnts,bsnh,nhd->btd", seen["attentions"], v, params["out"]) + np.asarray(params.get("out_bias", 0))
    np.testing.assert_allclose(summed, y, **CLOSE)
    assert seen["attentions"].dtype == jnp.float32
    assert ("qkv" in seen) != module.cross
    if not module.cross and module.norm is None:
        for n, x in seen["qkv"].items():
            np.testing.assert_allclose(x, of(X, n), **CLOSE)


def test_attention_in_pieces_through_a_cache_is_attention_at_once():
    """Four tokens, then one, then one; row 1 has two tokens of padding before it, which nobody sees."""
    _, apply = made(nn.Attention(N, H, K, rope=ROPE), X)
    mask = np.ones((B, T), int)
    mask[1, :2] = 0
    at = np.maximum(mask.cumsum(1) - 1, 0)
    want, _ = apply(X, positions=at, q_segments=np.ones((B, T), int), kv_segments=mask)
    kv = (B, T + 3, K, H)  # longer than what is ever written
    cache = {"k": jnp.full(kv, 9.0), "v": jnp.full(kv, 9.0), "segments": jnp.zeros(kv[:2], jnp.int32), "index": jnp.zeros((), jnp.int32)}
    for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
        ones = np.ones_like(mask[:, part])
        y, seen = apply(X[:, part], cache, positions=at[:, part], q_segments=ones, kv_segments=mask[:, part])
        cache = seen["cache"]
        np.testing.assert_allclose(y, want[:, part], **CLOSE)
    assert int(cache["index"]) == T
    np.testing.assert_array_equal(cache["segments"][:, T:], 0)
    np.testing.assert_array_equal(cache["k"][:, T:], 9.0)


def test_a_memory_is_remembered():
    """What is made of it at first, in a cache that begins empty, serves later queries; the rest of the memory's row 1 is padding."""
    params, apply = made(nn.Attention(N, H, causal=False, cross=True), X, memory=MEMORY)
    empty = {"k": jnp.zeros((B, 0, N, H)), "v": jnp.zeros((B, 0, N, H)), "segments": jnp.zeros((B, 0), jnp.int32)}
    want = attention_by_hand(params, X, causal=False, memory=MEMORY, seen=np.repeat(REAL[:, None], T, 1))
    y, seen = apply(X[:, :4], empty, memory=MEMORY, kv_segments=REAL)
    np.testing.assert_allclose(y, want[:, :4], **CLOSE)
    cache = seen["cache"]
    y, again = apply(X[:, 4:], cache)
    np.testing.assert_allclose(y, want[:, 4:], **CLOSE)
    assert cache["k"].shape == (B, 4, N, H) and jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), cache, again["cache"]))
    _, whole = apply(X, empty, memory=MEMORY)
    np.testing.assert_array_equal(whole["cache"]["segments"], 1)
    with pytest.raises(ValueError, match="was given none"):
        apply(X)


@pytest.mark.parametrize("dtype", nn.CACHES)
def test_what_a_cache_holds(dtype):
    """As near as its dtype says, zeros included, however large one head is beside another; room for it has the same parts."""
    x = np.random.default_rng(3).normal(size=(2, 3, K, H)).astype(np.float32) * [[1.0], [300.0]]
    x[0, 1] = 0
    there = nn.held(jnp.asarray(x, jnp.float32), dtype)
    step = np.abs(x).max(-1, keepdims=True) / 127.5 if dtype == "int8" else 2 * np.abs(x) * float(jnp.finfo(dtype).eps)
    np.testing.assert_array_less(np.abs(np.asarray(weights.dense(there), np.float32) - x), step / 2 + 1e-5 * np.abs(x) + 1e-30)
    room = nn.empty(x.shape, dtype)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(room)] == [(a.shape, a.dtype) for a in jax.tree.leaves(there)]
    assert not weights.dense(room).any() and weights.dense(room).shape == x.shape


# T5's buckets by the paper's words, with 8 buckets up to 10: distances that share one
BUCKETS = {
    # the past of each query 0, 1, 2, 3 in 8 buckets, then 4 of equal ratio (10 / 4)^(1/4) = 1.257: from 4, 5.03, 6.32, 7.95; all of the future is 0
    False: {**{d: 0 for d in range(13)}, -1: 1, -2: 2, -3: 3, -4: 4, -5: 4, -6: 5, -7: 6, -8: 7, -9: 7, -10: 7, -11: 7, -12: 7},
    # both ways 4 buckets each: 0, 1, then 2 of ratio 5^(1/2) = 2.24: from 2, 4.47
    True: {
        0: 0, -1: 1, -2: 2, -3: 2, -4: 2, **{-d: 3 for d in range(5, 13)}, 1: 5, 2: 6, 3: 6, 4: 6, **{d: 7 for d in range(5, 13)},
    },
}  # fmt: skip


@pytest.mark.parametrize("both_ways", BUCKETS)
def test_relative_bias(both_ways):
    """Whole, and for the queries from 7 on alone as a cache asks for them, where the start is data."""
    params, _ = made(nn.RelativeBias(N, 8, 10, both_ways), 13, 13)
    w = np.asarray(params["w"])
    want = np.stack([[w[BUCKETS[both_ways][s - t]] for s in range(13)] for t in range(13)]).transpose(2, 0, 1)[None]
    module = nn.RelativeBias(N, 8, 10, both_ways)
    np.testing.assert_allclose(module.apply({"params": params}, 13, 13), want)
    later = jax.jit(lambda params, start: module.apply({"params": params}, 3, 13, start))(params, jnp.array(7))
    np.testing.assert_allclose(later, want[:, :, 7:10])


def test_whole_ratios_do_not_fall_short():
    """With T5's 32 buckets up to 128, distance 16 opens bucket 10 of 16 both ways, and 32 bucket 12: a float32 logarithm may say 9.999."""
    rows = nn.RelativeBias(1)._rows()[:129][::-1]  # of distances 0 to 128 into the past
    np.testing.assert_array_equal(rows[[7, 8, 15, 16, 31, 32, 63, 64, 127, 128]], [7, 8, 9, 10, 11, 12, 13, 14, 15, 15])


# -- the other parts -------------------------------------------------------------------------------------------------------


def norm_by_hand(p, kind, eps):
    x = X.astype(np.float64) - (X.mean(-1, keepdims=True) if kind == "layer" else 0)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p.get("bias", 0)


SIGMOID = lambda x: 1 / (1 + np.exp(-x))
PARTS = {  # name -> (module, by hand)
    "linear": (nn.Linear(5, "embed -> mlp"), lambda p: X @ p["w"] + p["b"]),
    "linear without bias": (nn.Linear(5, "embed -> mlp", bias=False), lambda p: X @ p["w"]),
    "rms": (nn.Norm("rms", 0.1), lambda p: norm_by_hand(p, "rms", 0.1)),
    "layer": (nn.Norm("layer", 0.1), lambda p: norm_by_hand(p, "layer", 0.1)),
    "layer without bias": (nn.Norm("layer", 0.1, bias=False), lambda p: norm_by_hand(p, "layer", 0.1)),
    "mlp": (nn.Mlp(24, "relu", bias=True), lambda p: np.maximum(X @ p["up"] + p["up_bias"], 0) @ p["down"] + p["down_bias"]),
    "gated mlp": (nn.Mlp(24, "silu", gated=True), lambda p: (X @ p["gate"] * SIGMOID(X @ p["gate"]) * (X @ p["up"])) @ p["down"]),
    "gated mlp with biases": (
        nn.Mlp(24, "tanh", gated=True, bias=True),
        lambda p: (np.tanh(X @ p["gate"] + p["gate_bias"]) * (X @ p["up"] + p["up_bias"])) @ p["down"] + p["down_bias"],
    ),
}


@pytest.mark.parametrize("module, by_hand", PARTS.values(), ids=PARTS)
def test_part(module, by_hand):
    params, apply = made(module, X)
    want = by_hand(jax.device_get(params))
    np.testing.assert_allclose(apply(X), want, **CLOSE)
    narrow = apply(X.astype(jnp.bfloat16))  # the activations decide the dtype, whatever the weights are
    assert narrow.dtype == jnp.bfloat16
    assert np.abs(np.asarray(narrow, np.float32) - want).max() < 0.05 * np.abs(want).max()  # some roundings of 2^-8


MOES = {
    "normalized": nn.Moe(3, 2, 12),
    "as likely as they are": nn.Moe(3, 2, 12, "tanh", normalize=False),
    "beside a shared one": nn.Moe(3, 1, 12, shared=nn.Mlp(10, "tanh", gated=True)),
}


@pytest.mark.parametrize("module", MOES.values(), ids=MOES)
@pytest.mark.parametrize("implementation", ["reference", "ragged"])
def test_mixture(module, implementation):
    """One token at a time; the sums that balance are taken over the real ones."""
    params, apply = made(module.clone(implementation=implementation), jnp.asarray(X))
    p, act = jax.device_get(params), np.tanh if module.act == "tanh" else lambda x: x * SIGMOID(x)
    probs = np.exp(X @ p["router"]["w"]) / np.exp(X @ p["router"]["w"]).sum(-1, keepdims=True)
    want, times = np.zeros(X.shape), np.zeros((B, T, module.experts))
    for b, t in np.ndindex(B, T):
        best = np.argsort(-probs[b, t])[: module.choices]
        whole = probs[b, t, best].sum() if module.normalize else 1
        times[b, t, best] = 1
        for e in best:
            h = act(X[b, t] @ p["gate"][e]) * (X[b, t] @ p["up"][e])
            want[b, t] += probs[b, t, e] / whole * (h @ p["down"][e])
    if module.shared is not None:
        h = np.tanh(X @ p["shared"]["gate"]) * (X @ p["shared"]["up"])
        want += SIGMOID(X @ p["shared_gate"]["w"]) * (h @ p["shared"]["down"])
    real = np.array([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], bool)
    y, sums = apply(X, real)
    np.testing.assert_allclose(y, want, **CLOSE)
    np.testing.assert_allclose(sums["chosen"], times[real].sum(0))
    np.testing.assert_allclose(sums["probs"], probs[real].sum(0), rtol=1e-5)
    assert float(sums["tokens"]) == real.sum()
    assert float(apply(X)[1]["tokens"]) == B * T
    narrow, _ = apply(X.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16


def test_dynamic_rotation_looks_at_the_last_position():
    x = np.random.default_rng(1).normal(size=(B, T, N, H)).astype(np.float32)
    dynamic = nn.Rope(100.0, scaling=dict(rope_type="dynamic", factor=3.0, original_max_position_embeddings=4))
    at = np.arange(T)[None]
    slower = nn.Rope(100.0 * (3 * T / 4 - 2) ** (H / (H - 2)))
    np.testing.assert_allclose(dynamic(x, at), slower(x, at), **CLOSE)
    np.testing.assert_allclose(dynamic(x[:, :4], at[:, :4]), nn.Rope(100.0)(x[:, :4], at[:, :4]), **CLOSE)


# act -> its values at -1 and 2, from tables of the normal distribution and of tanh
ACTIVATIONS = {
    "gelu": (-0.158655, 1.954500),
    "gelu_new": (-0.158808, 1.954598),
    "gelu_fast": (-0.158808, 1.954598),
    "gelu_pytorch_tanh": (-0.158808, 1.954598),
    "quick_gelu": (-0.154204, 1.935659),  # -1 / (1 + e^1.702), 2 / (1 + e^-3.404)
    "silu": (-0.268941, 1.761594),
    "relu": (0.0, 2.0),
    "relu6": (0.0, 2.0),
    "tanh": (-0.761594, 0.964028),
}


def test_activations():
    assert set(ACTIVATIONS) == set(nn.ACTIVATIONS)
    for name, want in ACTIVATIONS.items():
        np.testing.assert_allclose(nn.ACTIVATIONS[name](jnp.array([-1.0, 2.0])), want, atol=2e-6, err_msg=name)


class Drop(linen.Module):
    rate: float
    rows: bool = False

    @linen.compact
    def __call__(self, x):
        return nn.dropout(self, x, self.rate, rows=self.rows)


def test_dropout_keeps_the_mean_and_needs_a_key():
    """Of 40,000 entries a quarter is zero, to five deviations (0.0108), and the others are 4/3."""
    x = jnp.ones((200, 200))
    drop = jax.jit(lambda rate, **rngs: Drop(rate).apply({}, x, rngs=rngs), static_argnums=0)
    y = np.asarray(drop(0.25, dropout=jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    assert abs((y == 0).mean() - 0.25) < 0.0108
    assert (np.asarray(drop(0.25, dropout=jax.random.key(1))) != y).any()
    for plain in (drop(0.25), drop(0.0, dropout=jax.random.key(0))):
        np.testing.assert_array_equal(plain, 1.0)


def test_whole_rows_are_left_out():
    """What is kept weighs so much more that the mean stays; the share to five deviations."""
    x = jnp.ones((4000, 3, 2))
    y = np.asarray(Drop(0.25, rows=True).apply({}, x, rngs={"dropout": jax.random.key(0)}))
    kept = y[:, :1, :1] > 0
    np.testing.assert_array_equal(y, np.where(kept, np.float32(1 / 0.75), 0) * np.ones_like(y))
    assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / 4000) ** 0.5


# -- the stack and the fence -----------------------------------------------------------------------------------------------

L = 3


class Layer(linen.Module):
    """x tanh(x w + slice of `each`) * shared + noise where there is a key."""

    @linen.compact
    def __call__(self, x, each=None, *, shared=1.0):
        x = jnp.tanh(x @ nn.weight(self, "w", (D, D), "embed -> mlp")) * shared
        x = nn.dropout(self, x if each is None else x + each, 0.5)
        return x, x.sum()


class Stack(linen.Module):
    remat: str = "none"
    unroll: int | bool = 1
    tied: bool = False

    @linen.compact
    def __call__(self, x, each=None):
        return nn.stack(Layer(name="layer"), L, x, each, remat=self.remat, unroll=self.unroll, tied=self.tied, shared=0.7)


@pytest.mark.parametrize("options", [{}, {"remat": "dots"}, {"remat": "full"}, {"unroll": True}, {"tied": True, "remat": "full"}], ids=str)
def test_stack_is_a_loop_over_its_layers(options):
    params, apply = made(Stack(**options), X)
    assert params["layer"]["w"].shape == ((D, D) if options.get("tied") else (L, D, D))
    each = np.random.default_rng(2).normal(size=(L, D)).astype(np.float32)
    y, seen = apply(X, each)
    x, want = X, []
    for w, e in zip(np.broadcast_to(params["layer"]["w"], (L, D, D)), each, strict=True):
        x = np.tanh(x @ w) * 0.7 + e
        want.append(x.sum())
    np.testing.assert_allclose(y, x, **CLOSE)
    np.testing.assert_allclose(seen, want, rtol=1e-4)


def test_every_layer_draws_its_own_weights_and_its_own_noise():
    model = nn.model(Stack(), x=jax.ShapeDtypeStruct(X.shape, X.dtype))
    w = np.asarray(jax.jit(model.init)(jax.random.key(0))["layer"]["w"])
    assert not np.allclose(w[0], w[1])
    zeros = {"layer": {"w": jnp.zeros((L, D, D))}}
    noise = jax.jit(lambda rng: model.apply(zeros, x=X, each=jnp.ones((L, B, T, D)), rng=rng)[1])  # sums of what dropout left of ones
    first = noise(jax.random.key(0))
    assert len(set(first.tolist())) == L
    np.testing.assert_array_equal(first, noise(jax.random.key(0)))


def test_the_fence():
    model = nn.model(Stack(), x=jax.ShapeDtypeStruct((1, 1, D), X.dtype))
    assert model.axes == {"layer": {"w": "layers | embed -> mlp"}}
    shapes = model.shapes()
    assert [(name, s.shape) for name, s in trees.named_leaves(shapes)] == [("layer/w", (L, D, D))]
    assert type(shapes) is dict
    assert "layers | embed -> mlp" in model.summary()
    assert nn.model(Stack(tied=True), x=jax.ShapeDtypeStruct((1, 1, D), X.dtype)).axes == {"layer": {"w": "embed -> mlp"}}
    assert hash(model) == hash(model)  # static to jit: by identity
    assert model != dataclasses.replace(model)


def test_a_stack_in_a_stack_names_both_axes():
    class Twice(linen.Module):
        @linen.compact
        def __call__(self, x):
            return nn.stack(Inner(name="inner"), 2, x)

    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x, each=None):
            return nn.stack(Layer(name="layer"), L, x)

    model = nn.model(Twice(), x=jax.ShapeDtypeStruct((1, 1, D), X.dtype))
    assert model.axes["inner"]["layer"]["w"] == "layers layers | embed -> mlp"
    assert model.shapes()["inner"]["layer"]["w"].shape == (2, L, D, D)


def test_a_weight_that_is_already_there_passes_untouched():
    """Of another type and even of another shape: what stands in the tree is what multiplies."""
    params, _ = made(nn.Linear(5, "embed -> mlp"), X)
    typed = {**params, "w": weights.quantize(params["w"], "int8", axes="embed -> mlp")}
    apply = jax.jit(lambda params: nn.Linear(5, "embed -> mlp").apply({"params": params}, X))
    np.testing.assert_allclose(apply(typed), X @ np.asarray(weights.dense(typed["w"])) + params["b"], **CLOSE)
    pruned = {"w": params["w"][:, :3], "b": params["b"][:3]}
    np.testing.assert_allclose(apply(pruned), apply(params)[..., :3], **CLOSE)


MISTAKES = {
    "activation": (lambda: made(nn.Mlp(8, "swish"), X), "unknown activation 'swish'; there are "),
    "remat": (lambda: made(Stack(remat="some"), X), "unknown remat 'some'; there are "),
    "cache": (lambda: nn.empty((1, 2), "int9"), "unknown cache dtype 'int9'; there are 'int8'"),
    "heads": (lambda: nn.head_width(30, 4), "a width of 30 does not divide over 4 heads; nearest is 28"),
}


@pytest.mark.parametrize("make, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
