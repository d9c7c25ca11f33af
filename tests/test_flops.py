"""FLOPs counted from a jaxpr equal the formulas one writes by hand, and XLA's own count where XLA's is right."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from bigflax import models, nn, sharding
from bigflax.flops import count_flops

B, T, D, F, N, H, L = 2, 6, 16, 32, 4, 4, 5
conv = lambda **how: lambda x, w: lax.conv_general_dilated(x, w, **{"window_strides": (1, 1), "padding": "VALID", **how})


def scan(body):
    return lambda x, w_L: lax.scan(lambda x, w: (body(x, w), None), x, w_L)[0]


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def kernel(x_ref, w_ref, y_ref):
    y_ref[...] = jnp.dot(x_ref[...], w_ref[...])


def pallas(x, w):
    rows = lambda width: pl.BlockSpec((2, width), lambda i: (i, 0))
    whole = pl.BlockSpec((D, F), lambda i: (0, 0))
    out = jax.ShapeDtypeStruct((T, F), x.dtype)
    return pl.pallas_call(kernel, out_shape=out, grid=(T // 2,), in_specs=[rows(D), whole], out_specs=rows(F))(x, w)


CASES = {  # function, shapes of its arguments, FLOPs
    "matmul": (jnp.matmul, [(T, D), (D, F)], 2 * T * D * F),
    "no products": (jnp.add, [(T, D), (T, D)], 0),
    "jit in jit": (jax.jit(jax.jit(jnp.matmul)), [(T, D), (D, F)], 2 * T * D * F),
    "vmap": (jax.vmap(jnp.matmul), [(B, T, D), (B, D, F)], 2 * B * T * D * F),
    "einsum with batch dims": (lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k), [(B, T, N, H), (B, 7, N, H)], 2 * B * N * T * 7 * H),
    "scan": (scan(jnp.matmul), [(T, D), (L, D, D)], L * 2 * T * D * D),
    "scan of checkpoint": (scan(jax.checkpoint(lambda x, w: jnp.sin(x @ w))), [(T, D), (L, D, D)], L * 2 * T * D * D),
    "scan in scan": (scan(lambda x, w: scan(jnp.matmul)(x, w)), [(T, D), (L, 3, D, D)], 3 * L * 2 * T * D * D),
    "fori_loop": (lambda x, w: lax.fori_loop(0, L, lambda _, x: x @ w, x), [(D, D), (D, D)], L * 2 * D**3),
    "dearest branch": (
        lambda x, w: lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w.T, lambda: (x @ w)[:, :D]), [(T, D), (D, F)], 4 * T * D * F),
    "custom_vjp": (custom, [(T, D), (D, F)], 2 * T * D * F),
    "gradient of custom_vjp": (jax.grad(lambda x, w: custom(x, w).sum(), (0, 1)), [(T, D), (D, F)], 3 * 2 * T * D * F),
    "custom_jvp": (lambda x, w: jax.nn.relu(x @ w), [(T, D), (D, F)], 2 * T * D * F),
    "backward is twice forward": (jax.grad(lambda x, w: jnp.sin(x @ w).sum(), (0, 1)), [(T, D), (D, F)], 3 * 2 * T * D * F),
    "ragged_dot": (lambda x, w: lax.ragged_dot(x, w, jnp.array([2, 4])), [(T, D), (2, D, F)], 2 * T * D * F),
    "pallas kernel": (pallas, [(T, D), (D, F)], 2 * T * D * F),
    "conv": (conv(), [(B, 3, 9, 9), (8, 3, 3, 3)], 2 * B * 8 * 7 * 7 * 3 * 9),
    "conv, strided": (conv(window_strides=(2, 2)), [(B, 3, 9, 9), (8, 3, 3, 3)], 2 * B * 8 * 4 * 4 * 3 * 9),
    "conv, depthwise": (conv(feature_group_count=4), [(B, 4, 9, 9), (4, 1, 3, 3)], 2 * B * 4 * 7 * 7 * 9),
    "conv, padding": (conv(padding="SAME"), [(B, 3, 9, 9), (8, 3, 3, 3)], 2 * B * 8 * (3 * 9 - 2) ** 2 * 3),
    "conv, transposed": (conv(lhs_dilation=(2, 2), padding=((2, 2), (2, 2))), [(B, 3, 4, 4), (8, 3, 3, 3)], 2 * B * 8 * (4 * 3) ** 2 * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_count_equals_formula(name):
    fn, shapes, want = CASES[name]
    assert count_flops(fn, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)) == want


@pytest.mark.parametrize("name", ["matmul", "vmap", "einsum with batch dims", "conv", "conv, strided", "conv, padding", "conv, transposed"])
def test_count_equals_xla_without_loops(name):
    fn, shapes, _ = CASES[name]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert count_flops(fn, *args) == jax.jit(fn).lower(*args).cost_analysis()["flops"]


def test_a_mixture_counts_the_experts_that_a_token_meets():
    """Two of eight: four products of a token's own experts, forward, and the router; twice more on the way back. Not the other six."""
    E, C = 8, 2
    module = nn.Moe(E, C, F, implementation="ragged")
    model = nn.model(module, x_BTD=jax.ShapeDtypeStruct((B, T, D), jnp.float32))
    x = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    run = lambda params, x: module.apply({"params": params}, x)[0].sum()
    experts, rest = 3 * 2 * B * T * C * D * F, 2 * B * T * (D * E + C * D)  # the router, and the sum by gates
    assert count_flops(run, model.shapes(), x) == experts + rest
    assert count_flops(jax.grad(run, (0, 1)), model.shapes(), x) >= 3 * experts


def test_resnet_50_has_its_published_count():
    """4.089 G products at 224 x 224 (torchvision's table), which counts the taps that fall on padding; we do not: 3.4% fewer."""
    convs = [(7, 3, 64, 112, 7 * 112 - 6)]  # kernel, channels in and out, size of the output, taps along one side that meet the image
    before = 64
    for width, size, depth in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        for i in range(depth):
            entry, taps = (2 * size if i == 0 and width > 64 else size), (3 * size - 1 if i == 0 and width > 64 else 3 * size - 2)
            convs += [(1, before, width, entry, entry), (3, width, width, size, taps), (1, width, 4 * width, size, size)]
            convs += [(1, before, 4 * width, size, size)] if i == 0 else []
            before = 4 * width
    head = 2048 * 1000
    assert sum((kernel * size) ** 2 * ins * outs for kernel, ins, outs, size, _ in convs) + head == 4_089_184_256
    model = models.create("resnet", size="50")
    images = jax.ShapeDtypeStruct((2, 3, 224, 224), jnp.float32)
    got = count_flops(lambda params, x: model.apply(params, pixel_values=x)["logits"], model.shapes(), images)
    assert got == 2 * 2 * (sum(taps**2 * ins * outs for _, ins, outs, _, taps in convs) + head)


def test_while_needs_its_turns():
    turn = lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)
    x = jax.ShapeDtypeStruct((D, D), jnp.float32)
    with pytest.raises(ValueError, match="pass while_trips"):
        count_flops(turn, x)
    assert count_flops(turn, x, while_trips=7) == 7 * 2 * D**3


def test_shard_map_counts_every_device():
    mesh = sharding.make_mesh(data=4, tensor=2)
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P(None, "tensor")), out_specs=P("data", "tensor"))
    x, w = jax.ShapeDtypeStruct((8, D), jnp.float32), jax.ShapeDtypeStruct((D, F), jnp.float32)
    assert count_flops(split, x, w) == 2 * 8 * D * F
