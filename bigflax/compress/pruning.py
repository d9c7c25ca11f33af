"""Zeros in a matrix: which of its numbers can go, and what the others make good.

    magnitude    the smallest |w|: Han et al. 2015, arXiv 1506.02626
    wanda        the smallest |w| |x|, |x| the norm of what goes in: Sun et al. 2023, 2306.11695, equation 1
    sparsegpt    the smallest w^2 / u^2, u the diagonal of the inverse hessian's factor, and the rest of the matrix moves to make good what went:
                 Frantar and Alistarh 2023, 2301.00774, algorithm 1
    alps         zeros and what the others make good are looked for together, in turns that ever less may part (ADMM), then the others are fitted to the zeros
                 by conjugate gradients: Meng et al. 2024, 2406.07831, algorithms 1 and 2

A pattern is "50%", that share of all zeros, or "2:4", that many that stay of each so many inputs. Magnitude and Wanda compare within each output, as Wanda's
authors found best and as a `Sparse` stores without loss; SparseGPT within a block of inputs, ALPS within the matrix. What comes out is a `Masked`, which
trains and stays zero where it is zero; `packed` makes it a `Sparse`, which is small.

Legend: K inputs, N outputs.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from bigflax import trees
from bigflax.compress.matrices import as_matrix, as_weight, compensated, highest, prepared
from bigflax.compress.observing import Seen
from bigflax.weights import Masked, input_axis, is_typed, sparse

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Pattern:
    """`zeros` of every `of` inputs go; `of` None: that share of all."""

    zeros: float
    of: int | None = None


def read_pattern(text: Any) -> Pattern:
    """Reads "50%" or "2:4". Raises ValueError for what is neither."""
    if isinstance(text, str) and (said := re.fullmatch(r"(\d+(?:\.\d+)?)%", text)) and 0 < float(said[1]) < 100:
        return Pattern(float(said[1]) / 100)
    if isinstance(text, str) and (said := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(said[1]) < int(said[2]):
        return Pattern(int(said[2]) - int(said[1]), int(said[2]))
    raise ValueError(f"{text!r} is no pattern of zeros: give a share of zeros such as '50%', or '2:4', two that stay of each four inputs")


def kept(score_KN: Array, pattern: Pattern) -> Array:
    """Where the numbers stay, [K, N] of booleans: of each output, or each group of its inputs, those of the highest score. Scores are not negative. Raises
    ValueError where the groups do not fit."""
    K = len(score_KN)
    of = pattern.of or K
    if K % of:
        raise ValueError(f"groups of {of} do not divide {K} inputs; nearest is {math.gcd(of, K)}")
    zeros = int(pattern.zeros) if pattern.of else int(pattern.zeros * K)
    groups = score_KN.reshape(K // of, of, -1)
    if of <= 16:  # each beside each; of two alike the first goes
        ahead = jnp.tri(of, k=-1, dtype=bool)[:, :, None]
        mine, its = groups[:, :, None], groups[:, None]
        rank = jnp.sum((its < mine) | ((its == mine) & ahead), 2)
        return (rank >= zeros).reshape(score_KN.shape)
    return highest(groups, zeros, (1,)).reshape(score_KN.shape)


def magnitude(w: Array, pattern: Pattern, *, axes: str, seen: Seen | None = None) -> Masked:
    """Of each output, or group, the largest |w| stay."""
    return _masked(w, axes, jnp.abs(as_matrix(w, axes)), pattern)


def wanda(w: Array, pattern: Pattern, *, axes: str, seen: Seen) -> Masked:
    """Of each output, or group, the largest |w| |x| stay."""
    return _masked(w, axes, jnp.abs(as_matrix(w, axes)) * jnp.sqrt(seen.squares)[:, None], pattern)


def _masked(w: Array, axes: str, score_KN: Array, pattern: Pattern) -> Masked:
    mask = as_weight(kept(score_KN, pattern), axes, w.shape, bool)
    return Masked(jnp.where(mask, w, jnp.zeros((), w.dtype)), mask)


def sparsegpt(w: Array, pattern: Pattern, *, axes: str, seen: Seen, damp: float = 0.01, block: int = 128) -> Masked:
    """What a number's absence costs once the others have moved decides, and they move. `block` inputs are compared with each other (of a share)."""
    if pattern.of and block % pattern.of:
        raise ValueError(f"a block of {block} inputs does not hold whole groups of {pattern.of}")
    new, mask = _sparsegpt(as_matrix(w, axes), seen.hessian, pattern, damp, block)
    return Masked(as_weight(new, axes, w.shape, w.dtype), as_weight(mask, axes, w.shape, bool))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _sparsegpt(w_KN, hessian_KK, pattern, damp, block):
    K, N = w_KN.shape
    of = pattern.of or K
    if K % of:
        raise ValueError(f"groups of {of} do not divide {K} inputs; nearest is {math.gcd(of, K)}")
    inverse_KK, _, w = prepared(w_KN, hessian_KK, damp, False)
    cost = lambda rows, factor: jnp.square(rows) / jnp.square(jnp.diag(factor))[:, None]

    def begin(rows, factor, at):
        if pattern.of:
            return jnp.zeros(rows.shape, bool)
        real = at + jnp.arange(len(rows)) < K
        scores = jnp.where(real[:, None], cost(rows, factor), jnp.inf)
        return highest(scores, (pattern.zeros * real.sum() * N).astype(int), (0, 1))

    def of_row(rows, factor, i, at, stays):
        if pattern.of:
            here = i - i % pattern.of
            group = lambda x: jax.lax.dynamic_slice(x, (here, 0), (pattern.of, N))
            scores = group(cost(rows, factor))
            fresh = jax.lax.dynamic_update_slice(stays, kept(scores, pattern), (here, 0))
            stays = jnp.where(i % pattern.of == 0, fresh, stays)
        return stays[i].astype(rows.dtype), jnp.where(stays[i], rows[i], 0.0), stays

    stays, new = compensated(w, inverse_KK, of_row, block, begin)
    return new, stays > 0


def alps(w: Array, pattern: Pattern, *, axes: str, seen: Seen, damp: float = 0.01, turns: int = 100, fits: int = 10) -> Masked:
    """At most `turns` times three iterations, fewer where the zeros stay where they are, and `fits` of the last fit. Matrix products and one
    eigendecomposition of the hessian: where SparseGPT goes row by row, an accelerator likes this better."""
    new, mask = _alps(as_matrix(w, axes), seen.hessian, pattern, damp, turns, fits)
    return Masked(as_weight(new, axes, w.shape, w.dtype), as_weight(mask, axes, w.shape, bool))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _alps(w_KN, hessian_KK, pattern, damp, turns, fits):
    K = len(w_KN)
    diagonal = jnp.diag(hessian_KK)
    h = hessian_KK + (damp * jnp.mean(diagonal) + jnp.where(jnp.any(diagonal > 0), 0.0, 1.0)) * jnp.eye(K)
    size_K = jnp.sqrt(jnp.diag(h))  # weights in units of what they do: the hessian's diagonal is one
    h, w = h / jnp.outer(size_K, size_K), w_KN * size_K[:, None]
    values_K, turn_KK = jnp.linalg.eigh(h)
    wanted = h @ w

    def stay(x):
        if pattern.of:
            return kept(jnp.abs(x), pattern)
        return highest(jnp.abs(x), int(pattern.zeros * x.size), (0, 1))

    def turn_once(carry):
        at, pull, dual, sparse, mask, _ = carry
        for _ in range(3):
            free = turn_KK @ ((turn_KK.T @ (wanted - dual + pull * sparse)) / (values_K + pull)[:, None])
            there = free + dual / pull
            sparse = jnp.where(now := stay(there), there, 0.0)
            dual = dual + pull * (free - sparse)
        moved = jnp.sum(now != mask) / now.sum()
        faster = jnp.where(moved >= 0.1, 1.3, jnp.where(moved >= 0.005, 1.2, 1.1))  # the paper's, section 3.2
        return at + 1, pull * faster, dual, sparse, now, moved

    begin = (0, jnp.float32(0.1), jnp.zeros_like(w), w, stay(w), jnp.float32(1.0))
    *_, sparse, mask, _ = jax.lax.while_loop(lambda carry: (carry[0] < turns) & (carry[-1] > 0), turn_once, begin)

    def fit_once(_, carry):
        x, left, way, size_N = carry
        ahead = jnp.where(mask, h @ way, 0.0)
        step_N = size_N / jnp.maximum(jnp.sum(way * ahead, 0), 1e-30)
        x, left = x + step_N * way, left - step_N * ahead
        new_N = jnp.sum(jnp.square(left), 0)
        return x, left, left + new_N / jnp.maximum(size_N, 1e-30) * way, new_N

    left = jnp.where(mask, wanted - h @ sparse, 0.0)
    fitted, *_ = jax.lax.fori_loop(0, fits, fit_once, (sparse, left, left, jnp.sum(jnp.square(left), 0)))
    return fitted / size_K[:, None], mask


def packed(params: Any, axes: Any) -> Any:
    """The tree with a Sparse in the place of each Masked whose last inputs are a multiple of 8, and which it makes smaller."""

    def one(w, text):
        if not isinstance(w, Masked) or w.w.shape[input_axis(text)] % 8:
            return w
        made = sparse(w.w, w.mask, axes=text)
        return made if trees.nbytes(made) < trees.nbytes(w.w) else w

    return jax.tree.map(one, params, axes, is_leaf=is_typed)
