"""The chunked loss head equals optax over whole logits, in values and gradients, and holds a chunk of logits and of the weight only."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax.ops import linear_cross_entropy
from bigflax.sharding import make_mesh, spec, tracing_on
from bigflax.weights import dense, lora, quantize

CASES = {  # B, T, D, V, chunk, options
    "one piece": (2, 16, 8, 37, 64, {}),
    "chosen": (2, 16, 8, 37, None, {}),
    "chunks that divide": (2, 16, 8, 36, 9, {}),
    "chunks that do not": (2, 13, 8, 37, 7, {}),
    "more chunks, which divide": (2, 13, 8, 38, 30, {}),
    "a row at once": (2, 5, 8, 37, 1, {}),
    "bias": (2, 13, 8, 37, 8, dict(bias=True)),
    "softcap": (2, 13, 8, 37, 8, dict(softcap=3.0)),
    "z-loss": (2, 13, 8, 37, 8, dict(z_loss=0.01)),
    "all of it": (2, 13, 8, 37, 8, dict(bias=True, softcap=3.0, z_loss=0.01)),
    "all of it, one piece": (2, 13, 8, 37, 64, dict(bias=True, softcap=3.0, z_loss=0.01)),
}


def build(case, dtype=jnp.float32):
    B, T, D, V, chunk, options = CASES[case]
    rng = np.random.default_rng(0)
    arrays = dict(x_BTD=jnp.asarray(rng.normal(size=(B, T, D)), dtype), w_VD=jnp.asarray(rng.normal(size=(V, D)), jnp.float32))
    if "bias" in options:
        arrays["bias"] = jnp.asarray(rng.normal(size=V), jnp.float32)
    labels = jnp.asarray(np.where(rng.random((B, T)) < 0.2, -100, rng.integers(0, V, (B, T))))
    g = jnp.asarray(rng.normal(size=(B, T)), jnp.float32)
    return arrays, labels, g, chunk, {name: value for name, value in options.items() if name != "bias"}


def whole(x_BTD, w_VD, labels_BT, *, bias=None, softcap=None, z_loss=0.0):
    """optax over logits that are all there."""
    logits = jnp.einsum("btd,vd->btv", x_BTD.astype(jnp.float32), w_VD)
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels_BT, 0))
    loss += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.where(labels_BT == -100, 0, loss), logits.argmax(-1) == labels_BT


def run(function, arrays, labels, g, **options):
    """((loss, correct), gradients of a random linear function of the losses)."""

    def scalar(arrays):
        loss, correct = function(**arrays, labels_BT=labels, **options)
        return jnp.sum(loss * g), (loss, correct)

    grads, out = jax.jit(jax.grad(scalar, has_aux=True))(arrays)
    return out, grads


@pytest.mark.parametrize("case", CASES)
def test_equals_optax_over_whole_logits(case):
    arrays, labels, g, chunk, options = build(case)
    (loss, correct), grads = run(linear_cross_entropy, arrays, labels, g, chunk=chunk, **options)
    (expected, expected_correct), expected_grads = run(whole, arrays, labels, g, **options)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, atol=5e-6)  # float32 sums of 37 terms of size e, in another order
    np.testing.assert_array_equal(correct, expected_correct)
    for name in arrays:
        np.testing.assert_allclose(grads[name], expected_grads[name], atol=1e-5, err_msg=name)  # sums over 30 tokens of size 3


@pytest.mark.parametrize("case", ["one piece", "chunks that do not", "all of it"])
def test_bfloat16_activations_over_float32_weights(case):
    arrays, labels, g, chunk, options = build(case, jnp.bfloat16)
    arrays["w_VD"] = arrays["w_VD"].astype(jnp.bfloat16).astype(jnp.float32)  # so that the cast in the product loses nothing
    (loss, _), grads = run(linear_cross_entropy, arrays, labels, g, chunk=chunk, **options)
    (expected, _), expected_grads = run(whole, arrays, labels, g, **options)
    assert {name: grad.dtype for name, grad in grads.items()} == {name: array.dtype for name, array in arrays.items()}
    np.testing.assert_allclose(loss, expected, atol=1e-5)  # products of bfloat16 are exact in float32, and so are these sums
    for name in arrays:  # dlogits and the result are rounded to 8 bits: twice 2^-9 of the largest
        atol = 2 * 2**-9 * float(jnp.abs(expected_grads[name]).max())
        np.testing.assert_allclose(grads[name].astype(jnp.float32), expected_grads[name].astype(jnp.float32), atol=atol, err_msg=name)


@pytest.mark.parametrize("chunk", [8, 64])
def test_ignored_labels_cost_nothing_and_move_nothing(chunk):
    arrays, labels, g, _, _ = build("bias")
    (loss, correct), grads = run(linear_cross_entropy, arrays, jnp.full_like(labels, -100), g, chunk=chunk, z_loss=0.1)
    assert not loss.any()
    assert not correct.any()
    assert not any(grad.any() for grad in grads.values())
    (loss, _), grads = run(linear_cross_entropy, arrays, labels, g, chunk=chunk, z_loss=0.1)
    assert not loss[labels == -100].any()
    assert not grads["x_BTD"][labels == -100].any()
    assert grads["x_BTD"][labels != -100].any(-1).all()


@pytest.mark.parametrize("chunk", [2, 64])
def test_a_tie_is_correct_for_the_first_label_only(chunk):
    _, correct = linear_cross_entropy(jnp.ones((1, 4, 3)), jnp.zeros((5, 3)), jnp.array([[0, 1, 4, -100]]), chunk=chunk)
    assert correct.tolist() == [[True, False, False, False]]  # an untrained head is not all right


WEIGHTS = {
    "int8": lambda w: quantize(w, axes="vocab <- embed"),
    "lora": lambda w: lora(w, 2, axes="vocab <- embed", rng=jax.random.key(0)),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("chunk", [8, 64])
def test_typed_weights_equal_their_dense_selves(weight, chunk):
    arrays, labels, g, _, _ = build("chunks that do not")
    w = jax.tree.map(lambda part: part + 0.1 if part.dtype == jnp.float32 else part, WEIGHTS[weight](arrays["w_VD"]))
    (loss, correct), grads = run(linear_cross_entropy, {"x_BTD": arrays["x_BTD"]}, labels, g, w_VD=w, chunk=chunk)
    (expected, expected_correct), expected_grads = run(whole, {"x_BTD": arrays["x_BTD"]}, labels, g, w_VD=dense(w))
    np.testing.assert_allclose(loss, expected, atol=2e-5)  # base and update are summed apart
    np.testing.assert_array_equal(correct, expected_correct)
    np.testing.assert_allclose(grads["x_BTD"], expected_grads["x_BTD"], atol=2e-5)


def test_lora_gets_its_gradients_through_the_chunks():
    arrays, labels, g, _, _ = build("chunks that do not")
    w = jax.tree.map(lambda part: part + 0.1, WEIGHTS["lora"](arrays["w_VD"]))
    _, grads = run(linear_cross_entropy, {"w_VD": w}, labels, g, x_BTD=arrays["x_BTD"], chunk=8)
    _, expected = run(lambda w_VD, **rest: whole(w_VD=dense(w_VD), **rest), {"w_VD": w}, labels, g, x_BTD=arrays["x_BTD"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, expected)  # sums over 26 tokens and 37 words


@pytest.mark.parametrize("typed", [False, True])
def test_only_a_chunk_of_logits_is_held(typed):
    B, T, D, V = 4, 256, 8, 1024
    x, labels = jax.ShapeDtypeStruct((B, T, D), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32)
    w = jax.eval_shape(WEIGHTS["lora"], jnp.zeros((V, D))) if typed else jax.ShapeDtypeStruct((V, D), jnp.float32)

    def temporaries(chunk):
        loss = lambda x, w, labels: linear_cross_entropy(x, w, labels, chunk=chunk)[0].sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w, labels).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * B * T * V
    assert temporaries(V) >= logits
    assert temporaries(64) < logits / 3  # a sixteenth a chunk, of which four or five are held


LAYOUTS = {  # the mesh, a bias, the chunk: five rows of 40 lie on each of 8 devices, 20 on each of 2
    "fsdp": (dict(fsdp=8), False, 16),
    "fsdp and tensor": (dict(fsdp=4, tensor=2), True, 5),
    "all": (dict(data=2, fsdp=2, tensor=2), True, 8),
    "context": (dict(data=2, context=2, tensor=2), False, 7),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_equals_unsharded(layout):
    sizes, biased, chunk = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    arrays = dict(x_BTD=jnp.asarray(rng.normal(size=(8, 12, 8)), jnp.float32), w_VD=jnp.asarray(rng.normal(size=(40, 8)), jnp.float32))
    arrays |= {"bias": jnp.asarray(rng.normal(size=40), jnp.float32)} if biased else {}
    labels, g = jnp.asarray(rng.integers(0, 40, (8, 12))), jnp.ones((8, 12))
    (expected, expected_correct), expected_grads = run(linear_cross_entropy, arrays, labels, g, chunk=40)
    mesh = make_mesh(**sizes)
    names = dict(x_BTD=("batch", "seq", None), w_VD=("vocab", "embed"), bias=("vocab",))
    place = lambda a, names: jax.device_put(a, jax.NamedSharding(mesh, spec(names, a.shape, mesh)))
    with tracing_on(mesh):
        arrays = {name: place(a, names[name]) for name, a in arrays.items()}
        (loss, correct), grads = run(linear_cross_entropy, arrays, place(labels, ("batch", "seq")), g, chunk=chunk)
    np.testing.assert_allclose(loss, expected, atol=5e-6)  # the same sums in another order
    np.testing.assert_array_equal(correct, expected_correct)
    for name in grads:
        np.testing.assert_allclose(grads[name], expected_grads[name], atol=2e-5)  # over 96 tokens


def test_a_chunk_counts_the_rows_of_one_device():
    """Where more devices share the vocabulary there are not more chunks, and none at all where one takes all that a device has."""

    def chunks(mesh):
        with tracing_on(mesh):
            loss = lambda x, w, labels: linear_cross_entropy(x, w, labels, chunk=10)[0].sum()
            text = str(jax.make_jaxpr(loss)(jnp.ones((8, 12, 4)), jnp.ones((40, 4)), jnp.zeros((8, 12), int)))
        return int(found.group(1)) if (found := re.search(r"length=(\d+)", text)) else 1

    assert [chunks(make_mesh(**sizes)) for sizes in (dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, tensor=4))] == [4, 2, 1]


def test_no_device_holds_the_whole_table():
    """On an fsdp mesh a chunk of the weight is gathered at a time, and a chunk's gradient scattered at once."""
    B, T, D, V = 8, 8, 64, 4096
    mesh = make_mesh(fsdp=8)
    place = lambda shape, dtype, *names: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec(names, shape, mesh)))
    x, labels = place((B, T, D), jnp.float32, "batch", None, None), place((B, T), jnp.int32, "batch", None)
    w = place((V, D), jnp.float32, "vocab", "embed")

    def temporaries(chunk):
        with tracing_on(mesh):
            loss = lambda x, w, labels: linear_cross_entropy(x, w, labels, chunk=chunk)[0].sum()
            step = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(x.sharding, w.sharding))
            return step.lower(x, w, labels).compile().memory_analysis().temp_size_in_bytes

    whole = 4 * V * D
    assert temporaries(V) > whole
    assert temporaries(256) < whole / 2  # an eighth lies here anyway, three times over: turned to chunks, as gradient, turned back


@pytest.mark.parametrize(
    ("options", "message"), [(dict(chunk=0), "1 or more"), (dict(labels_BT=jnp.zeros((2, 3), int)), "one label a position")]
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(dict(x_BTD=jnp.ones((2, 4, 3)), w_VD=jnp.ones((5, 3)), labels_BT=jnp.zeros((2, 4), int)) | options))
