"""The leading singular vectors of a float32 matrix from its smaller Gram matrix in float64.

    M (m, n), m >= n        M^T M = V diag(s^2) V^T  (n, n),   U_r = M V_r diag(1/s_r)

Only the `rank` largest eigenpairs are computed where that is less work, so r triplets of a weight cost a fraction of
its SVD. Squaring doubles the digits that are needed and float64 has them: to first order the error of s_i is
eps64 s_1^2 / (2 s_i), below the eps32 s_1 of an SVD in float32 itself, and U's columns are orthonormal up to
n eps64 (s_1/s_r)^2. Where that exceeds eps32 (a rank beyond the matrix's own, or nearly), or the eigenvectors of a
cluster fail their own check, `leading_triplets` returns None: take a full SVD.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 22  # numbers of the matrix in float64 at one time
SMALL = 64  # below this size all eigenpairs are as quick as a few


def leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return U (m, r), s (r,), Vh (r, n) of a float32 matrix (m, n) in float64, or None where float64 cannot tell.

    The result is exact to float32's own rounding. None also for what has no float64 (MPS), no numbers (meta), or
    numbers that are not finite. Signs are as they come.
    """
    if matrix.device.type in ("meta", "mps") or not 0 < rank <= min(matrix.shape):
        return None
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.mT if wide else matrix  # (m, n), m >= n
    pairs = _leading_eigenpairs(gram(tall), rank)
    if pairs is None:
        return None
    squares, right = pairs  # (r,), (n, r), descending
    precise = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    if not bool(squares[-1] > tall.shape[1] * precise * squares[0]):
        return None
    s = squares.sqrt()
    left = torch.cat([block.double() @ right for block in _blocks(tall)]) / s  # (m, r)
    return (right, s, left.mT) if wide else (left, s, right.mT)


def _blocks(tall: Tensor) -> tuple[Tensor, ...]:
    return tall.split(max(1, BLOCK // tall.shape[1]))


def gram(tall: Tensor) -> Tensor:
    """M^T M (n, n) in float64, with a part of M in float64 at a time."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for block in _blocks(tall):
        exact = block.double()
        gram.addmm_(exact.mT, exact)
    return gram


def _leading_eigenpairs(gram: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k largest eigenvalues, descending, and their vectors (n, k); None where they cannot be trusted."""
    n = len(gram)
    if not bool(gram.diagonal().sum().isfinite()):
        return None
    if gram.device.type != "cpu" or n < SMALL or 4 * k > n:
        values, vectors = torch.linalg.eigh(gram)
        return values[-k:].flip(0), vectors[:, -k:].flip(1)
    from numpy.linalg import LinAlgError
    from scipy.linalg import eigh

    with _blas_threads().limit(limits=1, user_api="blas"):  # more only wait for each other at these sizes
        try:
            found = eigh(
                gram.numpy().T,  # symmetric, and LAPACK reads columns: no copy
                subset_by_index=(n - k, n - 1),
                driver="evr",
                overwrite_a=True,
                check_finite=False,
            )
        except LinAlgError:
            return None
    values, vectors = (torch.from_numpy(t) for t in found)
    values, vectors = values.flip(0), vectors.flip(1)
    loss = (vectors.mT @ vectors - torch.eye(k, dtype=torch.float64)).abs().max()
    return (values, vectors) if bool(loss < n * torch.finfo(torch.float64).eps) else None


@cache
def _blas_threads() -> Any:
    """The threads of scipy's own BLAS, which torch does not set."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
