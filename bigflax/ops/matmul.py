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

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding

from bigflax.sharding import axes_of, batch_axes, constrain, current_layout, platform, spec
from bigflax.weights import IA3, KINDS, Adapter, DoRA, LoRA, Prompted, Quantized, Rounded, Weight, dense, shape


def einsum(spec: str, x: jax.Array, w: Weight, *, precision=None) -> jax.Array:
    """`jnp.einsum(spec, x, w)` over an array or typed weight; returns x.dtype."""
    if isinstance(w, LoRA):
        inputs, weight, output = _operands(spec)
        rank = next(c for c in string.ascii_lowercase if c not in spec)
        split, stack = w.a.ndim - 1, weight[: w.stacked]  # a stack of matrices (experts) leads both a and b
        spec_ab = f"{inputs},{weight[:split]}{rank},{stack}{rank}{weight[split:]}->{output}"
        # One einsum of three operands: its contraction order goes through the rank, whichever side of the weight is summed over.
        update = jnp.einsum(spec_ab, _dropped(x, w), w.a.astype(x.dtype), w.b.astype(x.dtype), precision=precision)
        return einsum(spec, x, w.base, precision=precision) + update * w.scale
    if isinstance(w, DoRA):
        inputs, weight, output = _operands(spec)
        return einsum(spec, x, w.direction, precision=precision) * _beside(w.factor, weight, output).astype(x.dtype)
    if isinstance(w, IA3):
        return _scaled(spec, x, w, precision)
    if isinstance(w, Adapter):
        return _adapted(spec, x, w, precision)
    if isinstance(w, Prompted):
        return einsum(spec, x, w.base, precision=precision)
    if isinstance(w, Quantized):
        return qwix.einsum(spec, x, w.astype(x.dtype), precision=precision).astype(x.dtype)
    if isinstance(w, Rounded):
        return _rounded(_lettered(spec, x.ndim), w.kind, x, w.w)
    return jnp.einsum(spec, x, _cast(w, x.dtype), precision=precision)


def _dropped(x: jax.Array, w: LoRA) -> jax.Array:
    if w.key is None:
        return x
    kept = jax.random.bernoulli(w.key, 1 - w.rate, x.shape)
    return jnp.where(kept, x / (1 - w.rate), jnp.zeros((), x.dtype))


def _scaled(spec: str, x: jax.Array, w: IA3, precision) -> jax.Array:
    inputs, weight, output = _operands(spec)
    if any(size > 1 and c not in output for c, size in zip(weight, w.scale.shape, strict=True)):
        return einsum(spec, x * _beside(w.scale, weight, inputs).astype(x.dtype), w.base, precision=precision)
    y, scale = einsum(spec, x, w.base, precision=precision), _beside(w.scale, weight, output)
    if w.bias is None:
        return y * scale.astype(y.dtype)
    outputs = "".join(c for c in weight if c in output)
    return y * scale.astype(y.dtype) + ((scale - 1) * _beside(w.bias, outputs, output)).astype(y.dtype)


def _adapted(spec: str, x: jax.Array, w: Adapter, precision) -> jax.Array:
    inputs, weight, output = _operands(spec)
    stack = "".join(c for c in weight if c in inputs and c in output)
    outputs = "".join(c for c in weight if c in output and c not in stack)
    rank = next(c for c in string.ascii_lowercase if c not in spec)
    narrow = "".join(c for c in output if c not in outputs) + rank
    z = einsum(spec, x, w.base, precision=precision)
    bias = 0 if w.bias is None else _beside(w.bias, stack + outputs, output).astype(z.dtype)
    h = einsum(f"{output},{stack}{outputs}{rank}->{narrow}", z + bias, w.down, precision=precision)
    h = getattr(jax.nn, w.act)(h + _beside(w.down_bias, stack + rank, narrow).astype(h.dtype))
    h = einsum(f"{narrow},{stack}{rank}{outputs}->{output}", h, w.up, precision=precision)
    return z + h + _beside(w.up_bias, stack + outputs, output).astype(z.dtype)


def _beside(part: jax.Array, letters: str, operand: str) -> jax.Array:
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
    a, b, out = _operands(spec)
    narrow = lambda v, letters, qtype: qwix.quantize(v, qtype, channelwise_axes=[i for i, c in enumerate(letters) if c in out])
    return qwix.einsum(spec, narrow(x, a, x_type), narrow(y, b, y_type), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(spec: str, kind: str, x: jax.Array, w: jax.Array) -> jax.Array:
    forward, _, _ = KINDS[kind]
    return narrow_einsum(spec, x, w, forward, forward).astype(x.dtype)


def _rounded_backward(spec, kind, saved, g):
    """As if nothing had been rounded (straight through), with products of 8 bits of their own."""
    x, w = saved
    (a, b, out), (forward, back, both) = _operands(spec), KINDS[kind]
    dx = narrow_einsum(f"{out},{b}->{a}", g, w, back, forward)
    if both:
        dw = narrow_einsum(f"{a},{out}->{b}", x, g, forward, back)
    else:
        dw = jnp.einsum(f"{a},{out}->{b}", x, g, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_rounded.defvjp(lambda spec, kind, x, w: (_rounded(spec, kind, x, w), (x, w)), _rounded_backward)


def take(w_VD: Weight, ids: jax.Array, dtype=None, *, axes: tuple[str | None, str | None] = ("vocab", "embed")) -> jax.Array:
    """Rows of a weight, whose `axes` these are: [V, D], ids [...] -> [..., D]. Ids outside 0..V-1 are clipped, as everywhere in JAX."""
    if isinstance(w_VD, Rounded):
        return take(w_VD.w, ids, dtype, axes=axes)
    if isinstance(w_VD, LoRA):
        rows = take(w_VD.base, ids, dtype, axes=axes)
        return rows + (take(w_VD.a, ids, rows.dtype, axes=(axes[0], None)) @ w_VD.b.astype(rows.dtype)) * w_VD.scale
    if isinstance(w_VD, DoRA):
        return _times(take(w_VD.direction, ids, dtype, axes=axes), w_VD.factor, ids)
    if isinstance(w_VD, IA3):
        return _times(take(w_VD.base, ids, dtype, axes=axes), w_VD.scale, ids)
    if isinstance(w_VD, Adapter):
        raise ValueError("an adapter stands behind a product, and rows of a table are not one; put it on a matrix of the layers")
    if isinstance(w_VD, Prompted):
        V = shape(w_VD)[0]
        own, more = take(w_VD.base, ids, dtype, axes=axes), take(w_VD.prompt, jnp.maximum(ids - V, 0), dtype, axes=(None, axes[1]))
        return jnp.where((ids < V)[..., None], own, more.astype(own.dtype))
    if isinstance(w_VD, Quantized):
        rows = dense(jax.tree.map(lambda part: part[ids] if part.shape[0] > 1 else part[0], w_VD))
        return rows if dtype is None else rows.astype(dtype)
    return _rows(w_VD, ids, w_VD.dtype if dtype is None else dtype, axes)


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


def _lettered(spec: str, ndim: int) -> str:
    """The spec with letters for "...", which is x's alone."""
    inputs, _, _ = _operands(spec)
    free = [c for c in string.ascii_letters if c not in spec]
    return spec.replace("...", "".join(free[: ndim - len(inputs.replace("...", ""))]))


def _operands(spec: str) -> tuple[str, str, str]:
    inputs, output = spec.replace(" ", "").split("->")
    x, w = inputs.split(",")
    return x, w, output
