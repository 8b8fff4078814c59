"""Rows and columns of a matrix whose crossing is well conditioned: Gaussian elimination with rook pivoting.

    step k     the residual E = M - U V of k crosses has |E[i, j]| largest in its row and in its column
               U gains the column E[:, j] / E[i, j],  V the row E[i]

The first r rows I and columns J reproduce M there: M[:, J] M[I, J]^-1 M[I] = U V. Only single rows and columns of E are
formed, O((m + n) r^2) in all, where complete pivoting searches the whole of E at every step.
Source: Neal and Poole (1992), "A geometric analysis of Gaussian elimination, II"; Foster (1997) on its growth.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_pivots(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the `rank` rows and columns of a matrix (m, n), int64, in the order in which they were found.

    Where the matrix has a smaller rank the rest are the first that are left. Raises `ValueError` for rank > min(m, n).
    """
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    m, n = exact.shape
    if rank > min(m, n):
        raise ValueError(f"a matrix ({m}, {n}) has no {rank} crosses")
    u, v = exact.new_zeros(m, rank), exact.new_zeros(rank, n)
    smallest = max(m, n) * torch.finfo(exact.dtype).eps * exact.abs().amax()
    sizes = exact.square().sum(0)  # (n,), of the columns: where the search starts
    rows: list[int] = []
    columns: list[int] = []
    for k in range(rank):
        i, j, column = _rook(exact, u[:, :k], v[:k], int(sizes.argmax()))
        if not bool(column[i].abs() > smallest):  # nothing in that column: look everywhere
            place = int((exact - u[:, :k] @ v[:k]).abs().argmax())
            i, j, column = _rook(exact, u[:, :k], v[:k], place % n)
            if not bool(column[i].abs() > smallest):
                break
        u[:, k], v[k] = column / column[i], exact[i] - u[i, :k] @ v[:k]
        rows.append(i)
        columns.append(j)
        sizes = (sizes - v[k].square()).clamp_min(0.0)
        sizes[j] = -1.0
    rows += [i for i in range(m) if i not in set(rows)][: rank - len(rows)]
    columns += [j for j in range(n) if j not in set(columns)][: rank - len(columns)]
    return torch.tensor(rows, device=matrix.device), torch.tensor(columns, device=matrix.device)


def _rook(exact: Tensor, u: Tensor, v: Tensor, j: int) -> tuple[int, int, Tensor]:
    """A place (i, j) whose residual is the largest of its row and column, and the residual's column (m,)."""
    column = exact[:, j] - u @ v[:, j]
    i = int(column.abs().argmax())
    while True:
        row = exact[i] - u[i] @ v
        best = int(row.abs().argmax())
        if not bool(row[best].abs() > row[j].abs()):
            return i, j, column
        j, column = best, exact[:, best] - u @ v[:, best]
        above = int(column.abs().argmax())
        if not bool(column[above].abs() > column[i].abs()):
            return i, j, column
        i = above
