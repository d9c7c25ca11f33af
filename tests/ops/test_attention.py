"""The reference equals a brute-force loop in NumPy float64; every fast path equals the reference, in values and in gradients, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import flops, sharding
from bigflax.ops import attention, attention_weights, context, splash

DOCUMENTS = np.array([[1] * 40 + [2] * 47 + [0] * 10, [1] * 5 + [2] * 60 + [3] * 32])  # 97 tokens a row; 0 is padding
LONG = np.repeat(DOCUMENTS, 3, axis=1)[:, :256]
HALF = np.array([[0] * 40 + [1] * 216, [1] * 200 + [0] * 56])  # an attention_mask, padded left and right
CASES = {  # T, S, N, K, arguments
    "full": (97, 97, 2, 2, {}),
    "causal": (97, 97, 2, 2, dict(causal=True)),
    "causal, blocks that divide": (256, 256, 2, 2, dict(causal=True)),
    "grouped": (97, 97, 6, 2, dict(causal=True)),
    "one kv head": (97, 97, 4, 1, {}),
    "window": (200, 200, 2, 2, dict(window=7)),
    "causal window": (200, 200, 2, 1, dict(causal=True, window=33)),
    "window of one": (70, 70, 2, 2, dict(causal=True, window=1)),
    "softcap": (97, 97, 2, 2, dict(causal=True, softcap=2.0)),
    "scale": (97, 97, 2, 2, dict(causal=True, scale=0.5)),
    "bias of heads": (97, 97, 4, 2, dict(causal=True, bias=(4, 97, 97))),
    "bias of rows": (97, 97, 4, 2, dict(bias=(2, 1, 1, 97))),
    "segments": (97, 97, 4, 2, dict(causal=True, q_segments=DOCUMENTS, kv_segments=DOCUMENTS)),
    "attention mask": (97, 97, 2, 2, dict(q_segments=np.ones((2, 97), int), kv_segments=(DOCUMENTS > 0).astype(int))),
    "a row without a key": (9, 12, 2, 2, dict(q_segments=np.ones((2, 9), int), kv_segments=np.array([[0] * 12, [0, 1] * 6]))),
    "cache": (3, 50, 4, 2, dict(causal=True, q_positions=np.array([[20, 21, 22], [0, 1, 2]]), kv_positions=np.arange(50))),
    "positions with window": (30, 30, 2, 2, dict(causal=True, window=4, q_positions=np.arange(30) * 2, kv_positions=np.arange(30) * 3)),
    "fewer keys": (130, 70, 2, 2, dict(causal=True)),
    "fewer keys, window": (300, 70, 2, 2, dict(window=5)),  # most rows see nothing, whole blocks of them
    "more keys": (70, 130, 2, 2, dict(causal=True, window=40)),
    "one token": (1, 1, 1, 1, dict(causal=True)),
    "long, full": (256, 256, 2, 1, dict(scale=0.5)),
    "long, grouped": (256, 256, 4, 2, dict(causal=True, softcap=2.0)),
    "long, causal window": (256, 256, 2, 2, dict(causal=True, window=33, softcap=2.0)),
    "long, window": (256, 256, 2, 1, dict(window=150)),
    "long, segments": (256, 256, 4, 2, dict(causal=True, q_segments=LONG, kv_segments=LONG)),
    "long, attention mask": (256, 256, 2, 2, dict(causal=True, q_segments=np.ones((2, 256), int), kv_segments=HALF)),
    "long, a shared mask": (256, 256, 2, 2, dict(causal=True, q_segments=LONG[0], kv_segments=LONG[0])),
    "long, memory": (128, 256, 2, 1, dict(q_segments=np.ones((2, 128), int), kv_segments=HALF)),
    "long, bias": (64, 64, 4, 2, dict(causal=True, bias=(4, 64, 64))),
    "long, bias of rows": (64, 128, 4, 2, dict(bias=(2, 1, 1, 128))),
    "long, positions": (64, 64, 2, 2, dict(causal=True, q_positions=np.arange(64) // 2, kv_positions=np.arange(64))),
}


def build(case, dtype=jnp.float32):
    T, S, N, K, options = CASES[case]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, T, N, 8), (2, S, K, 8), (2, S, K, 8)))
    options = {name: jnp.asarray(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    if "bias" in options:
        options["bias"] = jnp.asarray(rng.normal(size=options["bias"]), jnp.float32)
    return q, k, v, options


def brute_force(q, k, v, *, causal=False, window=None, scale=None, softcap=None, bias=None, **ids):
    """The docstring's formula, a row at a time; also which rows see a key."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    rows = {name: np.broadcast_to(np.asarray(x), (B, T if name[0] == "q" else S)) for name, x in ids.items()}
    q_at, kv_at = rows.get("q_positions", np.arange(T) + np.zeros((B, 1))), rows.get("kv_positions", np.arange(S) + np.zeros((B, 1)))
    bias = np.zeros((B, N, T, S)) if bias is None else np.broadcast_to(np.asarray(bias, np.float64), (B, N, T, S))
    out, seen = np.zeros(q.shape), np.zeros((B, T), bool)
    for b, t, n in np.ndindex(B, T, N):
        allowed = np.ones(S, bool)
        if causal:
            allowed &= kv_at[b] <= q_at[b, t]
        if window is not None:
            allowed &= abs(q_at[b, t] - kv_at[b]) < window
        if "q_segments" in rows:
            allowed &= rows["q_segments"][b, t] == rows["kv_segments"][b]
        seen[b, t] = allowed.any()
        if allowed.any():
            logits = k[b, :, n // (N // K)] @ q[b, t, n] * (H**-0.5 if scale is None else scale)
            logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
            weights = np.where(allowed, np.exp(logits + bias[b, n, t]), 0)
            out[b, t, n] = weights / weights.sum() @ v[b, :, n // (N // K)]
    return out, seen


def compiled(q, k, v, options, implementation=None):
    static = {name: value for name, value in options.items() if not isinstance(value, jax.Array)} | dict(implementation=implementation)
    data = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    return jax.jit(lambda q, k, v, data: attention(q, k, v, **data, **static))(q, k, v, data)


def value_and_grads(q, k, v, options, implementation, mesh=None):
    """The output, and the gradients of a random linear function of it, of everything that has one."""
    floats = dict(q_BTNH=q, k_BSKH=k, v_BSKH=v) | ({"bias": options["bias"]} if "bias" in options else {})
    rest = {name: value for name, value in options.items() if name != "bias"}
    g = jax.random.normal(jax.random.key(1), q.shape)

    def loss(floats):
        with sharding.tracing_on(mesh):
            out = attention(**floats, **rest, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * g), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(floats)
    return out, grads


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_formula(case):
    q, k, v, options = build(case)
    expected, _ = brute_force(q, k, v, **options)
    # float32 against float64: about ten roundings of numbers of size 4
    np.testing.assert_allclose(compiled(q, k, v, options, "reference"), expected, atol=5e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "long" not in case])
def test_weights_are_distributions_that_weigh_the_values(case):
    q, k, v, options = build(case)
    weights = jax.jit(lambda q, k: attention_weights(q, k, **options))(q, k)
    expected, seen = brute_force(q, k, v, **options)
    summed = np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, q.shape[2] // k.shape[2], 2))
    np.testing.assert_allclose(summed, expected, atol=5e-6)
    rows = np.broadcast_to(seen[:, None], weights.shape[:3])
    np.testing.assert_allclose(weights.sum(-1), rows, atol=1e-5)  # zeros where a row may see no key


@pytest.mark.parametrize("case", CASES)
def test_xla_is_the_reference(case):
    q, k, v, options = build(case)
    out, grads = value_and_grads(q, k, v, options, "xla")
    expected, expected_grads = value_and_grads(q, k, v, options, "reference")
    # the same float32 sums in another order; gradients sum over up to 300 rows
    np.testing.assert_allclose(out, expected, atol=5e-6)
    for name in grads:
        np.testing.assert_allclose(grads[name], expected_grads[name], atol=3e-5, err_msg=name)


def same(got, expected):
    np.testing.assert_allclose(got[0], expected[0], atol=5e-6)  # the same float32 sums in another order
    for name in got[1]:
        np.testing.assert_allclose(got[1][name], expected[1][name], atol=3e-5, err_msg=name)  # gradients sum over up to 300 rows


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of the kernel in 256 rows, so that some are skipped."""
    monkeypatch.setattr(splash, "BLOCKS", (128, 128))
    monkeypatch.setattr(splash, "kernel", splash.kernel.__wrapped__)


SPLASH = {  # whether the kernel takes the request; every other one takes the XLA path
    "causal, blocks that divide": True, "long, full": True, "long, grouped": True, "long, causal window": True, "long, window": True,
    "long, segments": True, "long, attention mask": True, "long, a shared mask": True, "long, memory": True,
    "causal": False, "long, bias": False, "long, positions": False, "fewer keys": False, "cache": False,
}  # fmt: skip


@pytest.mark.parametrize("case", SPLASH)
def test_splash_takes_what_it_can_and_is_the_reference(case, monkeypatch, small_blocks):
    made, kernel = [], splash.kernel
    monkeypatch.setattr(splash, "kernel", lambda *args: made.append(args) or kernel(*args))
    q, k, v, options = build(case)
    same(value_and_grads(q, k, v, options, "splash"), value_and_grads(q, k, v, options, "reference"))
    assert bool(made) == SPLASH[case]


MESHES = {
    "context=8": dict(context=8),
    "data=2 context=4": dict(data=2, context=4),
    "fsdp=2 context=2 tensor=2": dict(fsdp=2, context=2, tensor=2),
    "context=2 tensor=4": dict(context=2, tensor=4),  # more devices than kv heads
}


@pytest.mark.parametrize(
    "case, mesh",
    [(case, "fsdp=2 context=2 tensor=2") for case, (T, *_) in CASES.items() if T % 4 == 0]
    + [(case, mesh) for case in ("long, segments", "long, window") for mesh in MESHES],
)
def test_a_sequence_over_devices_is_the_sequence(case, mesh):
    q, k, v, options = build(case)
    got = value_and_grads(q, k, v, options, "xla", sharding.make_mesh(**MESHES[mesh]))
    same(got, value_and_grads(q, k, v, options, "reference"))


@pytest.mark.slow  # the kernel is interpreted
@pytest.mark.parametrize("sizes", [dict(fsdp=2, context=2, tensor=2), dict(expert=2, fsdp=2, tensor=2), dict(context=2, tensor=4)], ids=str)
@pytest.mark.parametrize("case", ["long, full", "long, grouped", "long, causal window", "long, segments", "long, attention mask"])
def test_splash_over_devices_is_the_reference(case, sizes, small_blocks):
    q, k, v, options = build(case)
    if sizes.get("context"):  # halves of a device's piece are 128 rows
        q, k, v = (jnp.concatenate([x, x[:, ::-1]], axis=1) for x in (q, k, v))
        options = {name: jnp.tile(x, 2) if isinstance(x, jax.Array) else x for name, x in options.items()}
    got = value_and_grads(q, k, v, options, "splash", sharding.make_mesh(**sizes))
    same(got, value_and_grads(q, k, v, options, "reference"))


@pytest.mark.parametrize(
    "case, sizes", [("long, grouped", {}), ("long, grouped", dict(context=8)), ("long, full", dict(context=8))], ids=str
)
def test_a_policy_saves_attention_by_its_name(case, sizes):  # that of the kernel: tests/test_context.py
    q, k, v, options = build(case)

    def work(policy):
        with sharding.tracing_on(sharding.make_mesh(**sizes) if sizes else None):
            run = lambda q: jnp.sum(attention(jnp.sin(q), k, v, **options) ** 2)
            return flops.count_flops(jax.grad(jax.checkpoint(run, policy=policy)), q)

    assert work(jax.checkpoint_policies.save_only_these_names("attention")) < work(None)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_halves_travel_to_whom_they_are_due_and_home_again(n):
    at = context.Place(sharding.make_mesh(devices=jax.devices()[:n], context=n), seq=("context",))
    rule = jax.sharding.PartitionSpec(None, "context")
    spread = lambda function: jax.jit(jax.shard_map(function, mesh=at.mesh, in_specs=rule, out_specs=rule))
    there = spread(lambda x: jnp.concatenate(context.exchange(x, at), axis=1))
    back = spread(lambda x: context.give_back(jnp.stack(jnp.split(x, 2, axis=1)), at))
    halves = jnp.repeat(jnp.arange(2 * n), 3)[None]
    moved = there(halves)
    np.testing.assert_array_equal(moved[0, ::3], [half for i in range(n) for half in (i, 2 * n - 1 - i)])
    np.testing.assert_array_equal(back(moved), halves)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_devices_work_alike_and_no_more_than_they_must(n, monkeypatch):
    """2n + 1 of the 4n pairs of halves that a device multiplies where it attends to all keys; the kernel's grid visits as many blocks on each."""
    mesh, q = sharding.make_mesh(devices=jax.devices()[:n], context=n), jnp.zeros((1, 16 * n, 2, 8))

    def count(**options):
        with sharding.tracing_on(mesh):
            return flops.count_flops(lambda q: attention(q, q, q, **options), q)

    assert count(causal=True) == count() * (2 * n + 1) // (4 * n)
    monkeypatch.setattr(splash, "BLOCKS", (128, 128))
    visits = lambda order: np.asarray(
        splash.kernel.__wrapped__(256 * n, 256 * n, 1, True, None, None, True, n, order).fwd_mask_info.block_mask
    )
    per_device = lambda order: (visits(order).reshape(n, -1) > 0).sum(1)
    assert set(per_device(context.order(256 * n, n))) == {2 * n + 1}
    assert per_device((0,)).max() == 4 * n - 1


@pytest.mark.parametrize("case", ["causal", "grouped", "segments", "bias of heads", "a row without a key"])
def test_bfloat16_keeps_float32_sums(case):
    q, k, v, options = build(case, jnp.bfloat16)
    out, grads = value_and_grads(q, k, v, options, "xla")
    expected, expected_grads = value_and_grads(*(x.astype(jnp.float32) for x in (q, k, v)), options, "reference")
    assert out.dtype == jnp.bfloat16
    # weights, output and their gradients are each rounded once to 8 bits: 2^-9 of the largest number at hand, three times over
    close = lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b, atol=3 * 2**-9 * float(jnp.abs(b).max()))
    close(out, expected)
    for name in ("q_BTNH", "k_BSKH", "v_BSKH"):
        close(grads[name], expected_grads[name])


@pytest.mark.parametrize(
    "case, implementation",
    [(case, name) for case in ("a row without a key", "fewer keys, window", "long, attention mask") for name in ("reference", "xla")]
    + [("long, attention mask", "splash")],
)
def test_a_row_without_a_key_is_zero_and_moves_nothing(case, implementation):
    q, k, v, options = build(case)
    _, seen = brute_force(q, k, v, **options)
    out, grads = value_and_grads(q, k, v, options, implementation)
    assert not seen.all()
    assert not np.asarray(out)[~seen].any()
    assert not np.asarray(grads["q_BTNH"])[~seen].any()
    assert all(np.isfinite(g).all() for g in grads.values())
    if case == "a row without a key":  # the first row's keys are seen by nobody
        assert not np.asarray(grads["k_BSKH"])[0].any()
        assert not np.asarray(grads["v_BSKH"])[0].any()


def test_what_causal_and_window_blank_is_not_multiplied():
    q, k, v, _ = build("causal, blocks that divide")
    flops = lambda **options: jax.jit(lambda *x: attention(*x, **options)).lower(q, k, v).compile().cost_analysis()["flops"]
    full = flops()
    assert flops(causal=True) < 0.8 * full  # 10 of 16 tiles, and the mask itself
    assert flops(causal=True, window=32) < 0.6 * full  # at most 7 of 16 by tiles


def test_segments_of_packed_rows_equal_the_documents_apart():
    q, k, v, options = build("segments")
    packed = compiled(q, k, v, options)
    alone = compiled(*(x[:1, 40:87] for x in (q, k, v)), dict(causal=True))
    np.testing.assert_allclose(packed[:1, 40:87], alone, atol=5e-6)


ERRORS = {
    "unknown implementation": (dict(implementation="flash"), "reference, xla, splash, cudnn"),
    "cudnn on a CPU": (dict(implementation="cudnn"), "needs an NVIDIA GPU"),
    "one kind of segments": (dict(kv_segments=np.ones((2, 97), int)), "together"),
    "no window": (dict(window=0), "1 or more"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    options, message = ERRORS[case]
    q, k, v, _ = build("causal")
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **options)


def test_heads_that_do_not_divide():
    q, k, v, _ = build("grouped")
    with pytest.raises(ValueError, match="multiple"):
        attention(q[:, :, :5], k, v)


CUDNN = {  # whether cuDNN takes the request; every other one takes the XLA path, never a dense mask
    "causal": True, "full": True, "causal window": True, "scale": True,
    "window": False, "softcap": False, "segments": False, "bias of heads": False, "cache": False, "fewer keys": False,
}  # fmt: skip


@pytest.mark.parametrize("case", CUDNN)
def test_cudnn_takes_what_it_can_and_means_the_same(case, monkeypatch):
    """The call as cuDNN would see it, answered by JAX's own XLA implementation of the same arguments."""
    asked, plain = [], jax.nn.dot_product_attention

    def stand_in(*args, implementation, **options):
        asked.append(implementation)
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v, options = build(case, jnp.bfloat16)
    out = compiled(q, k, v, options)
    expected = compiled(q, k, v, options, "reference")
    assert asked == (["cudnn"] if CUDNN[case] else [])
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=2**-6)  # one unit of bfloat16 between 2 and 4
    jax.eval_shape(lambda *x: attention(*x, **options), *(x.astype(jnp.float32) for x in (q, k, v)))
    assert len(asked) == CUDNN[case]  # float32 is not cuDNN's
