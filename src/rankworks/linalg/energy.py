"""How much of a matrix its leading singular directions hold, from its singular values alone.

    e(r) = sum_{i<=r} s_i^2 / sum_i s_i^2          s_i^2 = the eigenvalues of the smaller Gram matrix

Squares are what is asked for, so the Gram matrix in float64 loses nothing: each s_i^2 is exact to eps64 of the largest.
A matrix (m, n) costs m n min(m, n) for the product and a tridiagonal reduction, and no singular vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankworks.linalg.gram import gram


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Return s_i^2 of a matrix (m, n), descending, (min(m, n),) in float64; never negative."""
    held = matrix.detach().cpu() if matrix.device.type == "mps" else matrix.detach()
    tall = held.mT if held.shape[0] < held.shape[1] else held
    return torch.linalg.eigvalsh(gram(tall)).flip(0).clamp_min(0)


def leading_energy(matrix: Tensor, rank: int) -> float:
    """Return e(rank) in [0, 1]; 1 for a matrix of zeros, which has nothing else to hold."""
    squares = squared_singular_values(matrix)
    total = float(squares.sum())
    return min(1.0, float(squares[:rank].sum()) / total) if total else 1.0
