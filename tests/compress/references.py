"""The published algorithms in float64 NumPy, written as their papers have them: loops over inputs, [N, K] matrices as PyTorch lays them out."""

import numpy as np


def grid(W, bits, group):
    """A scale for each output and group of inputs: the largest number lies half a step beyond the largest code."""
    N, K = W.shape
    scale = np.abs(W.reshape(N, K // group, group)).max(-1) / (2 ** (bits - 1) - 0.5)
    return np.repeat(np.where(scale < 1e-20, 1.0, scale), group, axis=1)


def rounded(x, bits):
    return np.clip(np.round(x), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def factor(H, damp):
    """The upper Cholesky factor of the inverse of the damped hessian."""
    H = H + damp * np.mean(np.diag(H)) * np.eye(len(H))
    return np.linalg.cholesky(np.linalg.inv(H)).T


def gptq(W, H, bits, group, damp=0.01, order=False):
    """(codes, scales): Frantar et al. 2022, algorithm 1, one input at a time; groups keep the scales that they had before anything moved."""
    W, H, scale = W.astype(np.float64).copy(), H.astype(np.float64), grid(W.astype(np.float64), bits, group)
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    turn = np.argsort(-np.diag(H), kind="stable") if order else np.arange(len(H))
    W, H, scale = W[:, turn], H[turn][:, turn], scale[:, turn]
    U, codes = factor(H, damp), np.zeros_like(W)
    for j in range(W.shape[1]):
        codes[:, j] = rounded(W[:, j] / scale[:, j], bits)
        error = (W[:, j] - codes[:, j] * scale[:, j]) / U[j, j]
        W[:, j + 1 :] -= np.outer(error, U[j, j + 1 :])
    back = np.argsort(turn)
    return codes[:, back], scale[:, back]


def awq(W, X, bits, group, points=20):
    """(error, the weights that come out, the scales s) of each s that is tried: Lin et al. 2023, equations 4 and 5, the error that of the products; also with
    the weights' own size."""
    size, own, tried = np.abs(X).mean(0), np.abs(W).mean(0), []
    for a, by_own in [(a, by_own) for by_own in (0, 1) for a in np.arange(points) / points]:
        s = np.maximum(size, 1e-4 * size.max()) ** a * np.maximum(own, 1e-4 * own.max()) ** (by_own * (a - 1))
        s = s / np.sqrt(s.max() * s.min())
        scaled = W * s
        scale = grid(scaled, bits, group)
        made = rounded(scaled / scale, bits) * scale / s
        tried.append((np.square(X @ (made - W).T).sum(), made, s))
    return tried


def lsq(v, s, bits, zero=0.0):
    """(v^, dv^/dv, dv^/ds) of each number: Esser et al. 2020, equations 1 to 3 and 5, each number with its own s; a zero point is added before rounding."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = v / s + zero
    where = [x <= low, x >= high]
    value = np.select(where, [(low - zero) * s, (high - zero) * s], (np.round(x) - zero) * s)
    return value, np.select(where, [0.0, 0.0], 1.0), np.select(where, [low - zero, high - zero], -x + np.round(x))


def smoothquant(W, X, alpha=0.5):
    return np.abs(X).max(0) ** alpha / np.abs(W).max(0) ** (1 - alpha)


def wanda(W, X, share=None, keep=None, of=None):
    """Where the numbers stay: Sun et al. 2023, algorithm 1."""
    metric, mask = np.abs(W) * np.linalg.norm(X, axis=0), np.ones(W.shape, bool)
    if of is None:
        gone = np.argsort(metric, axis=1, kind="stable")[:, : int(W.shape[1] * share)]
        np.put_along_axis(mask, gone, False, axis=1)
    else:
        for i in range(0, W.shape[1], of):
            gone = i + np.argsort(metric[:, i : i + of], axis=1, kind="stable")[:, : of - keep]
            np.put_along_axis(mask, gone, False, axis=1)
    return mask


def sparsegpt(W, H, share=None, keep=None, of=None, damp=0.01, block=128):
    """The weights that come out: Frantar and Alistarh 2023, algorithm 1."""
    W, U = W.astype(np.float64).copy(), factor(H.astype(np.float64), damp)
    N, K = W.shape
    for start in range(0, K, block):
        end = min(start + block, K)
        stays = np.ones((N, end - start), bool)
        if of is None:
            cost = np.square(W[:, start:end]) / np.square(np.diag(U)[start:end])
            stays = cost >= np.sort(cost.ravel())[int(cost.size * share)]
        errors = np.zeros((N, end - start))
        for j in range(start, end):
            i = j - start
            if of is not None and i % of == 0:
                cost = np.square(W[:, j : j + of]) / np.square(np.diag(U)[j : j + of])
                gone = np.argsort(cost, axis=1, kind="stable")[:, : of - keep]
                here = np.ones((N, of), bool)
                np.put_along_axis(here, gone, False, axis=1)
                stays[:, i : i + of] = here
            new = np.where(stays[:, i], W[:, j], 0)
            errors[:, i] = (W[:, j] - new) / U[j, j]
            W[:, j + 1 : end] -= np.outer(errors[:, i], U[j, j + 1 : end])
            W[:, j] = new
        W[:, end:] -= errors @ U[start:end, end:]
    return W


def alps(W, H, share=None, keep=None, of=None, damp=0.01):
    """The weights that come out: Meng et al. 2024, algorithm 1, the zeros' last fit exact, where the paper takes ten steps towards it."""
    H = H.astype(np.float64) + damp * np.mean(np.diag(H)) * np.eye(len(H))
    size = np.sqrt(np.diag(H))
    H, W = H / np.outer(size, size), W.astype(np.float64) * size

    def stays(X):
        if of is None:
            return np.abs(X) > np.sort(np.abs(X), axis=None)[int(X.size * share) - 1]
        groups = np.abs(X).reshape(len(X), -1, of)
        return (np.argsort(np.argsort(groups, -1, kind="stable"), -1) >= of - keep).reshape(X.shape)

    D, V, rho, before = W, np.zeros_like(W), 0.1, stays(W)
    for turn in range(300):
        X = np.linalg.solve(H + rho * np.eye(len(H)), (W @ H - V + rho * D).T).T
        mask = stays(X + V / rho)
        D = np.where(mask, X + V / rho, 0)
        V = V + rho * (X - D)
        if turn % 3 == 2:
            moved, before = np.sum(mask != before) / mask.sum(), mask
            if not moved:
                break
            rho *= 1.3 if moved >= 0.1 else 1.2 if moved >= 0.005 else 1.1
    for row, w, on in zip(D, W, mask, strict=True):
        row[on] = np.linalg.solve(H[np.ix_(on, on)], H[on] @ w)
    return D / size


def svd_llm(W, X, rank):
    """The least sum of squares of products that a matrix of this rank can have, by whitening: Wang et al. 2024, theorem 3.2."""
    S = np.linalg.cholesky(X.T @ X)
    return np.sqrt(np.square(np.linalg.svd(W @ S, compute_uv=False)[rank:]).sum())


def frequency_svd(W, often, rank):
    """The least sum of squares over looked-up rows of W [words, K] that a matrix of this rank can have: Chen et al. 2018, section 3.1."""
    return np.sqrt(np.square(np.linalg.svd(np.sqrt(often)[:, None] * W, compute_uv=False)[rank:]).sum())
