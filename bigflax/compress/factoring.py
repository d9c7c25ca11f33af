"""A matrix as a product of two narrow ones.

    svd         the nearest in the sum of squares of the matrix: Eckart and Young 1936
    asvd        the same of the matrix with its inputs multiplied by (mean |x|)^alpha: Yuan et al. 2023, arXiv 2312.05821, equation 6
    whitened    the nearest in the sum of squares of its products with what goes in: SVD-LLM, Wang et al. 2024, 2403.07378, section 3.1
    frequency   of a table of words, the nearest in the sum of squares of the rows that are looked up: GroupReduce, Chen et al. 2018, 1806.06950,
                section 3.1, one group of all words

Of w [K, N] a share of the numbers stays: rank r = share K N / (K + N), so shares above about a half pay for square matrices only where the rank that is left is
enough. What comes out is a `LowRank`.

Legend: K inputs, N outputs, R rank.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bigflax.compress.matrices import as_matrix
from bigflax.compress.observing import Seen
from bigflax.weights import LowRank, parse_axes

Array = jax.Array


def read_share(value: Any) -> float | int:
    """A share of the numbers that stay, 0.8 or "80%", or a rank, 64. Raises ValueError for anything else."""
    if isinstance(value, str) and value.endswith("%"):
        value = float(value[:-1]) / 100
    if (isinstance(value, float) and 0 < value < 1) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{value!r} is no share such as 0.8, nor a rank such as 64")


def rank_within(share: float | int, K: int, N: int) -> int:
    """The rank that leaves this share of the numbers of a matrix K x N. Raises ValueError for a rank that saves nothing."""
    rank = share if isinstance(share, int) else int(share * K * N / (K + N))
    if rank < 1 or rank * (K + N) >= K * N:
        raise ValueError(
            f"rank {rank} of a matrix {K} x {N} leaves {'nothing' if rank < 1 else 'as many numbers as before'}; take 1 to {(K * N - 1) // (K + N)}"
        )
    return rank


def svd(w: Array, share: float | int, *, axes: str, seen: Seen | None = None) -> LowRank:
    """The best of its rank in the sum of squares."""
    w_KN = as_matrix(w, axes)
    a, b = _cut(w_KN, rank_within(share, *w_KN.shape))
    return _as_low_rank(a, b, w, axes)


def asvd(w: Array, share: float | int, *, axes: str, seen: Seen, alpha: float = 0.5) -> LowRank:
    """The best of its rank once inputs are multiplied by what they are on average, to the power alpha."""
    w_KN = as_matrix(w, axes)
    size_K = _sizes(seen, alpha)
    a, b = _cut(w_KN * size_K[:, None], rank_within(share, *w_KN.shape))
    return _as_low_rank(a / size_K[:, None], b, w, axes)


def whitened(w: Array, share: float | int, *, axes: str, seen: Seen, damp: float = 1e-4) -> LowRank:
    """The best of its rank in the sum of squares of x w over all x: with L L^T = H, that of L^T w. `damp` times the mean of the hessian's diagonal is added."""
    w_KN = as_matrix(w, axes)
    root_KK = _root(seen, damp)
    a, b = _cut(root_KK @ w_KN, rank_within(share, *w_KN.shape))
    return _as_low_rank(jax.scipy.linalg.solve_triangular(root_KK, a, lower=False), b, w, axes)


def spectrum(w: Array, *, axes: str, seen: Seen | None, method: str, alpha: float = 0.5, damp: float = 1e-4) -> Array:
    """The squares of the singular values [min(K, N)] of what a method cuts, the largest first: by a rank it loses the sum of those behind it."""
    w_KN = as_matrix(w, axes)
    if method == "whitened":
        assert seen is not None
        w_KN = _root(seen, damp) @ w_KN
    elif method == "asvd":
        assert seen is not None
        w_KN = w_KN * _sizes(seen, alpha)[:, None]
    return jnp.square(_singular(w_KN))


def _sizes(seen: Seen, alpha: float) -> Array:
    size_K = (seen.size / seen.count) ** alpha
    return jnp.maximum(size_K, 1e-3 * size_K.max() + 1e-20)


def _root(seen: Seen, damp: float) -> Array:
    """L^T [K, K], upper triangular, with L L^T the damped hessian."""
    return jnp.linalg.cholesky(seen.hessian + damp * jnp.mean(seen.squares) * jnp.eye(seen.hessian.shape[-1])).T


_singular = jax.jit(functools.partial(jnp.linalg.svd, compute_uv=False))


def frequency(w: Array, share: float | int, *, axes: str, seen: Seen, smooth: float = 1.0) -> LowRank:
    """The best of its rank where each row of a table counts as often as it was looked up, and `smooth` times more: words that did not come stay words. Where
    none was looked up, in a head of its own, all rows count alike. Raises ValueError for what is no table."""
    ax = parse_axes(axes)
    if not ax.outputs_first:
        raise ValueError(
            f"how often its rows are looked up is known of a table of words, and a weight with axes {axes!r} is none; take 'whitened'"
        )
    if smooth <= 0:
        raise ValueError(f"smooth {smooth} leaves rows that were not looked up without a say; take a number above 0")
    w_KN, often_N = as_matrix(w, axes), jnp.sqrt(seen.often + smooth)
    a, b = _cut(w_KN * often_N, rank_within(share, *w_KN.shape))
    return _as_low_rank(a, b / often_N, w, axes)


@functools.partial(jax.jit, static_argnums=1)
def _cut(w_KN: Array, rank: int) -> tuple[Array, Array]:
    """a [K, R] and b [R, N], the singular values shared between them."""
    u, s, v = jnp.linalg.svd(w_KN, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _as_low_rank(a_KR: Array, b_RN: Array, w: Array, axes: str) -> LowRank:
    ax = parse_axes(axes)
    if ax.outputs_first:
        a_KR, b_RN = b_RN.T, a_KR.T
    cut = len(ax.first)
    rank = a_KR.shape[1]
    return LowRank(a_KR.reshape(*w.shape[:cut], rank).astype(w.dtype), b_RN.reshape(rank, *w.shape[cut:]).astype(w.dtype), len(ax.second))
