"""The one seam between models and typed weights: a product with, and a row lookup in, whatever stands in a weight's place.

`einsum(spec, x, w)` equals `jnp.einsum(spec, x, dense(w))` for every weight, without building `dense(w)`. The operand `x` decides the
dtype of the product; a float weight is cast to it, so bfloat16 activations over float32 master weights need no other switch.
"""

import string

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding

from bigflax.sharding import axes_of, batch_axes, constrain, current_layout, spec
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


def take(w_VD: Weight, ids: jax.Array, dtype=None, *, axes: tuple[str, str | None] = ("vocab", "embed")) -> jax.Array:
    """Rows of a weight, whose `axes` these are: [V, D], ids [...] -> [..., D]. Ids outside 0..V-1 are clipped, as everywhere in JAX."""
    if isinstance(w_VD, LoRA):
        rows = take(w_VD.base, ids, dtype, axes=axes)
        return rows + (take(w_VD.a, ids, rows.dtype, axes=(axes[0], None)) @ w_VD.b.astype(rows.dtype)) * w_VD.scale
    if isinstance(w_VD, Quantized):
        rows = dense(jax.tree.map(lambda part: part[ids] if part.shape[0] > 1 else part[0], w_VD))
        return rows if dtype is None else rows.astype(dtype)
    return _rows(w_VD, ids, w_VD.dtype if dtype is None else dtype, axes)


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


def _operands(spec: str) -> tuple[str, str, str]:
    inputs, output = spec.replace(" ", "").split("->")
    x, w = inputs.split(",")
    return x, w, output
