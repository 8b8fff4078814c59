"""A matrix as a product of two balanced factors, ordered by singular value.

    M = B A        B = U diag(sqrt s) (m, r),  A = diag(sqrt s) V^T (r, n),  B^T B = A A^T = diag(s)

At full rank only one orthogonal side is needed: with V from the smaller Gram matrix in float64 and s_i = ||M v_i||,
B A = M V V^T = M to rounding, however small the singular values that squaring cannot tell apart. That is the work of
one symmetric eigenproblem, about half of an SVD's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankworks.linalg.gram import gram
from rankworks.linalg.svd import fix_signs, truncated_svd


def balanced_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (m, rank), A (rank, n) of the best approximation of a matrix (m, n), in at least float32."""
    m, n = matrix.shape
    if rank < min(m, n) or matrix.device.type in ("mps", "meta"):
        u, s, vh = truncated_svd(matrix, rank)
        return u * s.sqrt(), s.sqrt().unsqueeze(1) * vh
    if m < n:
        B, A = balanced_factors(matrix.mT, rank)
        return A.mT, B.mT
    wide = torch.promote_types(matrix.dtype, torch.float32)
    right = torch.linalg.eigh(gram(matrix)).eigenvectors.flip(1)  # (n, n), by falling singular value
    right = fix_signs(right, right.mT)[0]
    left = matrix.double() @ right  # (m, n)
    s = torch.linalg.vector_norm(left, dim=0)
    root = s.sqrt()
    return (left / root.clamp_min(torch.finfo(torch.float64).tiny)).to(wide), (root.unsqueeze(1) * right.mT).to(wide)
