"""The one seam between models and typed weights: a product with, and a row lookup in, whatever stands in a weight's place.

`einsum(spec, x, w)` equals `jnp.einsum(spec, x, dense(w))` for every weight, without building `dense(w)`. The operand `x` decides the
dtype of the product; a float weight is cast to it, so bfloat16 activations over float32 master weights need no other switch.

A Rounded weight trains as the float that it is, while its products run in 8 bits, with one scale a row of x and one a column of w:

    kind    y = x w          dx = g w^T         dw = x^T g
    int8    int8 x int8      int8 x int8        in x's dtype
    fp8     e4m3 x e4m3      e5m2 x e4m3        e4m3 x e5m2

that is, where it is customary: int8 gradients of weights, sums over many tokens of very unequal size, lose what the small ones say (AQT's
training configurations leave them in bfloat16), while e5m2 has the range. Rounding is to nearest and straight through.

Sources: Micikevicius et al. 2022 (FP8 formats, arXiv 2209.05433); AQT, github.com/google/aqt. `qwix.quantize` and `qwix.einsum` are the products.

Left out on purpose: stochastic rounding of gradients, and scales remembered from earlier steps (they would be state).
"""

import contextlib
import contextvars
import functools
import string
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding

from bigflax.sharding import axes_of, batch_axes, constrain, current_layout, platform, spec
from bigflax.weights import IA3, KINDS, Adapter, DoRA, LoRA, Perturbed, Prompted, Quantized, Rounded, Weight, dense, is_typed, shape


def einsum(spec: str, x: jax.Array, w: Weight, *, precision=None) -> jax.Array:
    """`jnp.einsum(spec, x, w)` over an array or typed weight; returns x.dtype."""
    return product(w, spec, x, precision)


@functools.singledispatch
def product(w: Weight, spec: str, x: jax.Array, precision=None) -> jax.Array:
    """`einsum`, dispatched on the type of w, which registers its own."""
    return jnp.einsum(spec, x, _cast(w, x.dtype), precision=precision)


@product.register
def _(w: LoRA, spec, x, precision=None):
    inputs, weight, output = operands(spec)
    rank = next(c for c in string.ascii_lowercase if c not in spec)
    split, stack = w.a.ndim - 1, weight[: w.stacked]  # a stack of matrices (experts) leads both a and b
    spec_ab = f"{inputs},{weight[:split]}{rank},{stack}{rank}{weight[split:]}->{output}"
    # One einsum of three operands: its contraction order goes through the rank, whichever side of the weight is summed over.
    update = jnp.einsum(spec_ab, _dropped(x, w), w.a.astype(x.dtype), w.b.astype(x.dtype), precision=precision)
    return product(w.base, spec, x, precision) + update * w.scale


@product.register
def _(w: DoRA, spec, x, precision=None):
    _, weight, output = operands(spec)
    return product(w.direction, spec, x, precision) * beside(w.factor, weight, output).astype(x.dtype)


@product.register(Prompted)
@product.register(Perturbed)
def _(w, spec, x, precision=None):
    return product(w.base, spec, x, precision)


@product.register
def _(w: Quantized, spec, x, precision=None):
    return qwix.einsum(spec, x, w.astype(x.dtype), precision=precision).astype(x.dtype)


@product.register
def _(w: Rounded, spec, x, precision=None) -> Any:
    return _rounded(lettered(spec, x.ndim), w.kind, x, w.w)


def _dropped(x: jax.Array, w: LoRA) -> jax.Array:
    if w.key is None:
        return x
    kept = jax.random.bernoulli(w.key, 1 - w.rate, x.shape)
    return jnp.where(kept, x / (1 - w.rate), jnp.zeros((), x.dtype))


@product.register
def _(w: IA3, spec, x, precision=None):
    inputs, weight, output = operands(spec)
    if any(size > 1 and c not in output for c, size in zip(weight, w.scale.shape, strict=True)):
        return einsum(spec, x * beside(w.scale, weight, inputs).astype(x.dtype), w.base, precision=precision)
    y, scale = einsum(spec, x, w.base, precision=precision), beside(w.scale, weight, output)
    if w.bias is None:
        return y * scale.astype(y.dtype)
    outputs = "".join(c for c in weight if c in output)
    return y * scale.astype(y.dtype) + ((scale - 1) * beside(w.bias, outputs, output)).astype(y.dtype)


@product.register
def _(w: Adapter, spec, x, precision=None):
    inputs, weight, output = operands(spec)
    stack = "".join(c for c in weight if c in inputs and c in output)
    outputs = "".join(c for c in weight if c in output and c not in stack)
    rank = next(c for c in string.ascii_lowercase if c not in spec)
    narrow = "".join(c for c in output if c not in outputs) + rank
    z = einsum(spec, x, w.base, precision=precision)
    bias = 0 if w.bias is None else beside(w.bias, stack + outputs, output).astype(z.dtype)
    h = einsum(f"{output},{stack}{outputs}{rank}->{narrow}", z + bias, w.down, precision=precision)
    h = getattr(jax.nn, w.act)(h + beside(w.down_bias, stack + rank, narrow).astype(h.dtype))
    h = einsum(f"{narrow},{stack}{rank}{outputs}->{output}", h, w.up, precision=precision)
    return z + h + beside(w.up_bias, stack + outputs, output).astype(z.dtype)


def beside(part: jax.Array, letters: str, operand: str) -> jax.Array:
    """`part`, whose axes bear these letters, shaped to be multiplied with the operand; it is 1 along the letters that the operand lacks."""
    kept = [c for c in letters if c in operand]
    part = jnp.squeeze(part, tuple(i for i, c in enumerate(letters) if c not in operand))
    part = part.transpose(sorted(range(len(kept)), key=lambda i: operand.index(kept[i])))
    sizes = iter(part.shape)
    return part.reshape([next(sizes) if c in kept else 1 for c in operand.replace("...", "")])


_layer: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("bigflax_layer", default=None)


@contextlib.contextmanager
def casting(layer: jax.Array | None):
    """While a layer is traced inside, its weights are cast in it: `layer` is its number in a loop over layers, not known while tracing.

    A cast alone does not depend on the loop: the TPU's compiler would cast the weights of all layers before the first and keep them, 0.9 GiB a chip for
    Llama 3 8B on 16. It looks through `optimization_barrier` (libtpu 0.0.42); times a one that it cannot see to be one, each is cast in its turn.
    """
    token = _layer.set(layer)
    try:
        yield
    finally:
        _layer.reset(token)


def _cast(w: jax.Array, dtype) -> jax.Array:
    layer = _layer.get()
    if layer is None or w.dtype == dtype or platform() != "tpu":
        return w.astype(dtype)
    return (w * (1 + 0 * layer.astype(w.dtype))).astype(dtype)


def narrow_einsum(spec: str, x: jax.Array, y: jax.Array, x_type: str, y_type: str) -> jax.Array:
    """The product of both operands in 8 bits, summed in 32: [..] float32. Each has one scale for all that one sum runs over, its largest absolute
    value over the largest number of the type, to which it is rounded to nearest."""
    a, b, out = operands(spec)
    narrow = lambda v, letters, qtype: qwix.quantize(v, qtype, channelwise_axes=[i for i, c in enumerate(letters) if c in out])
    return qwix.einsum(spec, narrow(x, a, x_type), narrow(y, b, y_type), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(spec: str, kind: str, x: jax.Array, w: jax.Array) -> jax.Array:
    forward, _, _ = KINDS[kind]
    return narrow_einsum(spec, x, w, forward, forward).astype(x.dtype)


def _rounded_backward(spec, kind, saved, g):
    """As if nothing had been rounded (straight through), with products of 8 bits of their own."""
    x, w = saved
    (a, b, out), (forward, back, both) = operands(spec), KINDS[kind]
    dx = narrow_einsum(f"{out},{b}->{a}", g, w, back, forward)
    if both:
        dw = narrow_einsum(f"{a},{out}->{b}", x, g, forward, back)
    else:
        dw = jnp.einsum(f"{a},{out}->{b}", x, g, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_rounded.defvjp(lambda spec, kind, x, w: (_rounded(spec, kind, x, w), (x, w)), _rounded_backward)


def take(w_VD: Weight, ids: jax.Array, dtype=None, *, axes: tuple[str | None, str | None] = ("vocab", "embed")) -> jax.Array:
    """Rows of a weight, whose `axes` these are: [V, D], ids [...] -> [..., D]. Ids outside 0..V-1 are clipped, as everywhere in JAX."""
    return lookup(w_VD, ids, dtype, axes)


@functools.singledispatch
def lookup(w_VD: Weight, ids: jax.Array, dtype=None, axes=("vocab", "embed")) -> jax.Array:
    """`take`, dispatched on the type of w, which registers its own; else each of its parts leads with the rows, or has one for all of them."""
    if is_typed(w_VD):
        rows = dense(jax.tree.map(lambda part: part[ids if part.shape[0] > 1 else 0 * ids], w_VD))
        return rows if dtype is None else rows.astype(dtype)
    return _rows(w_VD, ids, w_VD.dtype if dtype is None else dtype, axes)


@lookup.register
def _(w_VD: Rounded, ids, dtype=None, axes=("vocab", "embed")):
    return lookup(w_VD.w, ids, dtype, axes)


@lookup.register
def _(w_VD: LoRA, ids, dtype=None, axes=("vocab", "embed")):
    rows = lookup(w_VD.base, ids, dtype, axes)
    return rows + (lookup(w_VD.a, ids, rows.dtype, (axes[0], None)) @ w_VD.b.astype(rows.dtype)) * w_VD.scale


@lookup.register
def _(w_VD: DoRA, ids, dtype=None, axes=("vocab", "embed")):
    return _times(lookup(w_VD.direction, ids, dtype, axes), w_VD.factor, ids)


@lookup.register
def _(w_VD: IA3, ids, dtype=None, axes=("vocab", "embed")):
    return _times(lookup(w_VD.base, ids, dtype, axes), w_VD.scale, ids)


@lookup.register
def _(w_VD: Adapter, ids, dtype=None, axes=("vocab", "embed")):
    raise ValueError("an adapter stands behind a product, and rows of a table are not one; put it on a matrix of the layers")


@lookup.register
def _(w_VD: Prompted, ids, dtype=None, axes=("vocab", "embed")):
    V = shape(w_VD)[0]
    own, more = lookup(w_VD.base, ids, dtype, axes), lookup(w_VD.prompt, jnp.maximum(ids - V, 0), dtype, (None, axes[1]))
    return jnp.where((ids < V)[..., None], own, more.astype(own.dtype))


@lookup.register
def _(w_VD: Perturbed, ids, dtype=None, axes=("vocab", "embed")):
    if w_VD.delta.shape[:-1] != ids.shape:
        raise ValueError(f"ids of shape {ids.shape} are looked up in a table that is perturbed for {w_VD.delta.shape[:-1]}")
    rows = lookup(w_VD.base, ids, dtype, axes)
    return rows + w_VD.delta.astype(rows.dtype)


def _times(rows: jax.Array, scale_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows, times those of a scale that is 1 along one of its axes."""
    return rows * (scale_VD[ids] if scale_VD.shape[0] > 1 else scale_VD[0]).astype(rows.dtype)


def _rows(w_VD: jax.Array, ids: jax.Array, dtype, axes) -> jax.Array:
    """Where FSDP shards the width over devices that hold different rows of ids, each looks up all their ids in the piece of the width that it
    has, and they exchange what they found: the tokens travel, in `dtype`, and not the table, nor on the way back its gradient."""
    layout = current_layout()
    width = () if layout is None else axes_of(axes[1], w_VD.shape[1], layout.mesh, layout.table)
    if layout is None or ids.ndim != 2 or not width:
        return constrain(w_VD, *axes).at[ids].get(mode="clip").astype(dtype)
    mesh, table = layout.mesh, layout.table
    apart = {**table, "batch": tuple(axis for axis in batch_axes(mesh, table) if axis not in width)}
    lay = lambda x, *names: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, x.shape, mesh, apart)))
    rows = constrain(w_VD, *axes).at[lay(ids, "batch", "seq")].get(mode="clip")
    return constrain(lay(rows.astype(dtype), "batch", "seq", axes[1]), "batch", "seq", None)


def lettered(spec: str, ndim: int) -> str:
    """The spec with letters for "...", which is x's alone."""
    inputs, _, _ = operands(spec)
    free = [c for c in string.ascii_letters if c not in spec]
    return spec.replace("...", "".join(free[: ndim - len(inputs.replace("...", ""))]))


def operands(spec: str) -> tuple[str, str, str]:
    inputs, output = spec.replace(" ", "").split("->")
    x, w = inputs.split(",")
    return x, w, output
