"""An orthonormal basis of the columns of a thin matrix, in three products where they are not nearly dependent.

    C = D^-1 Y^T Y D^-1 = L L^T  (k, k, float64; D the columns' norms)        Q = Y D^-1 L^-T

This is the Q of a QR decomposition whose R has a positive diagonal: the first j columns span the first j of Y, and a
small change of Y makes a small change of Q, signs included. Q^T Q - I is about eps64 over the square of the smallest
diagonal entry of L, so below float32's rounding unless that entry is tiny; then, or where the columns are dependent,
the QR decomposition by reflections is taken, whose signs are turned the same way and which fills up with columns
orthogonal to the others.
Source: Golub and Van Loan, Matrix Computations, section 5.2; Yamamoto et al. (2015) for the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-4  # entry on the diagonal of L: Q^T Q - I below 1e-8 times the number of rows' root


def orthonormal(columns: Tensor) -> Tensor:
    """Return Q (n, k) of (n, k) with k <= n, in the type given, float32 or float64, row-major."""
    if columns.dtype == torch.float32 and columns.device.type != "mps":
        found = _cholesky(columns)
        if found is not None:
            return found
    q, r = torch.linalg.qr(columns)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).contiguous()


def _cholesky(columns: Tensor) -> Tensor | None:
    """The same from the Gram matrix in float64, or None where that is not as exact as float32."""
    wide = columns.double()
    norms = torch.linalg.vector_norm(wide, dim=0)  # (k,)
    wide /= norms  # nan for a column of zeros
    lower, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
    if not bool((failed == 0) & (lower.diagonal().amin() > SMALLEST)):
        return None
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)  # (k, k)
    return (wide @ inverse.mT).float()
