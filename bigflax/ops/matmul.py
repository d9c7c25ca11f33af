"""The one seam between models and typed weights: a product with, and a row lookup in, whatever stands in a weight's place.

`einsum(spec, x, w)` equals `jnp.einsum(spec, x, dense(w))` for every weight, without building `dense(w)`. The operand `x` decides the
dtype of the product; a float weight is cast to it, so bfloat16 activations over float32 master weights need no other switch.
"""

import string

import jax
import jax.numpy as jnp
import qwix

from bigflax.weights import LoRA, Quantized, Weight, dense


def einsum(spec: str, x: jax.Array, w: Weight, *, precision=None) -> jax.Array:
    """`jnp.einsum(spec, x, w)` over an array or typed weight; returns x.dtype."""
    if isinstance(w, LoRA):
        inputs, weight, output = _operands(spec)
        rank = next(c for c in string.ascii_lowercase if c not in spec)
        split, stack = w.a.ndim - 1, weight[: w.stacked]  # a stack of matrices (experts) leads both a and b
        spec_ab = f"{inputs},{weight[:split]}{rank},{stack}{rank}{weight[split:]}->{output}"
        # One einsum of three operands: its contraction order goes through the rank, whichever side of the weight is summed over.
        update = jnp.einsum(spec_ab, x, w.a.astype(x.dtype), w.b.astype(x.dtype), precision=precision)
        return einsum(spec, x, w.base, precision=precision) + update * w.scale
    if isinstance(w, Quantized):
        return qwix.einsum(spec, x, w.astype(x.dtype), precision=precision).astype(x.dtype)
    return jnp.einsum(spec, x, w.astype(x.dtype), precision=precision)


def take(w_VD: Weight, ids: jax.Array, dtype=None) -> jax.Array:
    """Rows of a weight: [V, D], ids [...] -> [..., D]. Ids outside 0..V-1 are clipped, as everywhere in JAX."""
    if isinstance(w_VD, LoRA):
        rows = take(w_VD.base, ids, dtype)
        return rows + (take(w_VD.a, ids, rows.dtype) @ w_VD.b.astype(rows.dtype)) * w_VD.scale
    if isinstance(w_VD, Quantized):
        rows = dense(jax.tree.map(lambda part: part[ids] if part.shape[0] > 1 else part[0], w_VD))
    else:
        rows = w_VD.at[ids].get(mode="clip")
    return rows if dtype is None else rows.astype(dtype)


def _operands(spec: str) -> tuple[str, str, str]:
    inputs, output = spec.replace(" ", "").split("->")
    x, w = inputs.split(",")
    return x, w, output
