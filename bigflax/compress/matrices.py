"""Weights as matrices [K, N], inputs by outputs, and what the methods that look at what goes into them share."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigflax.weights import parse_axes

Array = jax.Array


def as_matrix(w: Array, axes: str) -> Array:
    """A weight of these axes as [K, N], in float32."""
    ax = parse_axes(axes)
    if not ax.contracted or ax.stack:
        raise ValueError(f"a weight with axes {axes!r} is no matrix")
    K = math.prod(w.shape[i] for i in ax.contracted)
    w = w.astype(jnp.float32)
    return w.reshape(-1, K).T if ax.outputs_first else w.reshape(K, -1)


def as_weight(w_KN: Array, axes: str, full: tuple[int, ...], dtype: Any) -> Array:
    """The inverse of `as_matrix`."""
    return (w_KN.T if parse_axes(axes).outputs_first else w_KN).reshape(full).astype(dtype)


def as_written(part: Array, axes: str, full: tuple[int, ...]) -> Array:
    """[K or G, N] -> the weight's axes: groups run over the last inputs first."""
    ax = parse_axes(axes)
    inputs, outputs = [full[i] for i in ax.contracted], [size for i, size in enumerate(full) if i not in ax.contracted]
    left, sizes = math.prod(inputs) // part.shape[0], []  # inputs a row stands for
    for size in reversed(inputs):
        here = math.gcd(left, size)
        if here not in (left, size):
            raise ValueError(
                f"groups of {math.prod(inputs) // part.shape[0]} inputs do not fit axes of {inputs}; take a divisor of {inputs[-1]}"
            )
        sizes.insert(0, size // here)
        left //= here
    if ax.outputs_first:
        return part.T.reshape(*outputs, *sizes)
    return part.reshape(*sizes, *outputs)


def one_output(axes: str, full: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The axes and the shape of a part with size 1 along the outputs."""
    inputs = parse_axes(axes).contracted
    return axes, tuple(size if i in inputs else 1 for i, size in enumerate(full))


def prepared(w_KN: Array, hessian_KK: Array, damp: float, order: bool) -> tuple[Array, Array, Array]:
    """(U [K, K], order [K], w [K, N]): U upper triangular with U^T U the inverse of the damped hessian, both in this order of the inputs. What never
    was anything but zero has no say, and its weights are zero."""
    diagonal = jnp.diag(hessian_KK)
    dead = (diagonal == 0) & jnp.any(diagonal > 0)  # where nothing was seen at all, every input has one say
    h = hessian_KK + jnp.diag(jnp.where(diagonal == 0, 1.0, 0.0) + damp * jnp.mean(diagonal))
    order_K = jnp.argsort(-diagonal, stable=True) if order else jnp.arange(len(h))
    w, h = jnp.where(dead[:, None], 0.0, w_KN)[order_K], h[order_K][:, order_K]
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(h), True), jnp.eye(len(h)))
    return jnp.linalg.cholesky(inverse, upper=True), order_K, w


@jax.jit
def corrected(w_KN: Array, hessian_KK: Array, cross_KK: Array, damp: float = 0.01) -> Array:
    """The matrix whose products with what goes in now, x, are nearest to those of `w_KN` with what went in before, y: of X V = Y W the damped least squares,
    V = W + (X^T X + damp)^-1 (X^T Y - X^T X) W. Where nothing has changed it is W. `damp` is a share of the mean of the hessian's diagonal."""
    h = hessian_KK + damp * jnp.mean(jnp.diag(hessian_KK)) * jnp.eye(len(hessian_KK))
    return w_KN + jax.scipy.linalg.solve(h, (cross_KK - hessian_KK) @ w_KN, assume_a="pos")


def compensated(
    w_KN: Array, inverse_KK: Array, of_row: Callable[..., tuple[Array, Array, Any]], block: int, begin: Callable[..., Any] = lambda *_: None
) -> tuple[Array, Array]:
    """(what was said of each row, what stands in its place), both [K, N]: row by row, the error of each made good by the rest through the inverse hessian's
    factor (algorithm 1 of GPTQ); rows beyond a block of them wait for its end.

    `of_row(rows [block, N], factor [block, block], i, at, state) -> (said [N], new [N], state)` decides on row i of a block, which is row `at` of all;
    `begin(rows, factor, at)` is a block's first state."""
    K, N = w_KN.shape
    block = min(block, K)
    blocks = -(-K // block)
    pad = blocks * block - K
    u = jnp.pad(inverse_KK, ((0, pad), (0, pad))) + jnp.diag(jnp.where(jnp.arange(K + pad) < K, 0.0, 1.0))
    w = jnp.pad(w_KN, ((0, pad), (0, 0)))

    def one_block(b, carry):
        w, said, put = carry
        at = b * block
        rows, factor = jax.lax.dynamic_slice(w, (at, 0), (block, N)), jax.lax.dynamic_slice(u, (at, at), (block, block))

        def one_row(i, inner):
            rows, said, put, errors, state = inner
            its, new, state = of_row(rows, factor, i, jnp.minimum(at + i, K - 1), state)
            error = (rows[i] - new) / factor[i, i]
            later = jnp.where(jnp.arange(block) > i, factor[i], 0.0)
            return rows - later[:, None] * error, said.at[at + i].set(its), put.at[at + i].set(new), errors.at[i].set(error), state

        start = (rows, said, put, jnp.zeros((block, N)), begin(rows, factor, at))
        _, said, put, errors, _ = jax.lax.fori_loop(0, block, one_row, start)
        beyond = jnp.where(jnp.arange(K + pad) >= at + block, jax.lax.dynamic_slice(u, (at, 0), (block, K + pad)), 0.0)
        return w - beyond.T @ errors, said, put

    zeros = jnp.zeros_like(w)
    _, said, put = jax.lax.fori_loop(0, blocks, one_block, (w, zeros, zeros))
    return said[:K], put[:K]


def product_error(off_KN: Array, hessian_KK: Array) -> Array:
    """The sum of squares of x off over all x: trace(off^T H off)."""
    return jnp.einsum("kn,kj,jn->", off_KN, hessian_KK, off_KN, optimize="optimal")


def highest(scores: Array, zeros: Any, axes: tuple[int, ...] = (0,)) -> Array:
    """True but for `zeros` of the numbers along these axes, those of the lowest scores; of equals the first in their order go. `zeros` may be an array.

    The least score that stays is looked for bit after bit, by counting: in XLA on a CPU a sort takes thirty times as long, and on a mesh it would hold a
    matrix whole on each device."""
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    order = bits ^ (bits >> 31 & 0x7FFFFFFF)  # whole numbers in the order of the floats

    def least(numbers, many, among: Any = True):
        few = lambda value: jnp.sum(among & (numbers < value), axes, keepdims=True) <= many
        up = lambda i, value: jnp.where(few(value | 1 << 30 - i), value | 1 << 30 - i, value)
        return jax.lax.fori_loop(0, 31, up, jnp.where(few(0), 0, jnp.iinfo(jnp.int32).min))

    edge = least(order, zeros)
    place, alike = jnp.zeros((), jnp.int32), order == edge
    for axis in axes:
        place = place * scores.shape[axis] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    gone = zeros - jnp.sum(order < edge, axes, keepdims=True)
    return (order > edge) | alike & (place >= least(place, gone, alike))
