"""Products of what compression leaves in a weight's place (weights/compressed.py)."""

import string

import jax
import jax.numpy as jnp
import qwix

from bigflax.ops.matmul import beside, lettered, lookup, operands, product
from bigflax.weights import IA3, W8A8, Learned, LowRank, Masked, Moving, Rotated, Scaled, Sparse, dense, hadamard, shape


@product.register
def _(w: LowRank, spec, x, precision=None) -> jax.Array:
    inputs, weight, output = operands(spec)
    rank = next(c for c in string.ascii_lowercase if c not in spec)
    stack, split = weight[: len(shape(w.b)) - 1 - w.split], len(weight) - w.split
    first, second = weight[len(stack) : split], weight[split:]
    factors = [(w.a, f"{stack}{first}{rank}"), (w.b, f"{stack}{rank}{second}")]
    (one, its), (other, others) = factors[::-1] if all(c in output for c in first) else factors  # from the inputs to the outputs
    middle = "".join(c for c in inputs if c in output or c == ".") + rank
    return product(other, f"{middle},{others}->{output}", product(one, f"{inputs},{its}->{middle}", x, precision), precision)


@product.register
def _(w: Sparse, spec, x, precision=None) -> jax.Array:
    # No unit that we know multiplies zeros faster, so it is spread out for the product; what it saves is memory.
    return product(dense(w), spec, x, precision)


@product.register(Masked | Moving | Learned)
def _(w, spec, x, precision=None) -> jax.Array:
    return product(dense(w), spec, x, precision)


@product.register
def _(w: Scaled, spec, x, precision=None) -> jax.Array:
    return product(IA3(w.base, w.scale), spec, x, precision)


@product.register
def _(w: Rotated, spec, x, precision=None) -> jax.Array:
    inputs, weight, _ = operands(spec)
    turned = weight[w.axis]
    x = x * beside(w.signs, weight, inputs).astype(x.dtype)
    return product(w.base, spec, hadamard(x, inputs.index(turned) - len(inputs)), precision)


@product.register
def _(w: W8A8, spec, x, precision=None) -> jax.Array:
    spec = lettered(spec, x.ndim)
    inputs, _, output = operands(spec)
    if w.scale is None:
        narrow = qwix.quantize(x, "int8", channelwise_axes=[i for i, c in enumerate(inputs) if c in output])
    else:
        scale = w.scale.astype(x.dtype).reshape((1,) * x.ndim)
        narrow = qwix.QArray(jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8), scale)
    return qwix.einsum(spec, narrow, w.base.astype(x.dtype), precision=precision).astype(x.dtype)


@lookup.register
def _(w_VD: LowRank, ids, dtype=None, axes=("vocab", "embed")) -> jax.Array:
    rows = lookup(w_VD.a, ids, dtype, (axes[0], None))
    return product(w_VD.b, "...r,rd->...d", rows)


@lookup.register
def _(w_VD: Moving, ids, dtype=None, axes=("vocab", "embed")) -> jax.Array:
    rows = lambda part: None if part is None else part[ids]
    found = dense(Moving(rows(w_VD.w), rows(w_VD.mask), w_VD.step, rows(w_VD.scores)))
    return found if dtype is None else found.astype(dtype)


@lookup.register
def _(w_VD: Scaled, ids, dtype=None, axes=("vocab", "embed")) -> jax.Array:
    return lookup(IA3(w_VD.base, w_VD.scale), ids, dtype, axes)


@lookup.register
def _(w_VD: W8A8, ids, dtype=None, axes=("vocab", "embed")) -> jax.Array:
    return lookup(w_VD.base, ids, dtype, axes)
