"""Truncated singular value decompositions: exact, randomised, and of a product of factors.

All return (U, s, Vh) with U (m, r), s (r,) descending, Vh (r, n), M ~ U diag(s) Vh, signs fixed so that the entry of
largest magnitude in every right vector is positive: the same matrix gives the same factors on every machine, up to
rounding and to rotations within equal singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankworks.linalg.gram import leading_triplets
from rankworks.linalg.thin import LEAST_OF_A_WEIGHT, thin

SVD = tuple[Tensor, Tensor, Tensor]


def fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip each pair of singular vectors so that the largest-magnitude entry of the right one is positive."""
    if not vh.numel():
        return u, vh
    largest = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)  # (r,)
    signs = torch.where(largest < 0, -1.0, 1.0).to(vh.dtype)
    return u * signs, vh * signs.unsqueeze(1)


def truncated_svd(matrix: Tensor, rank: int) -> SVD:
    """Return the best rank-`rank` approximation of a matrix (m, n), in at least float32.

    Of a float32 matrix (and narrower) the triplets come from the smaller Gram matrix in float64 where that is as exact
    as a float32 SVD, which is the case unless the matrix has (nearly) a smaller rank, and else from the full SVD.
    Source: Eckart and Young (1936); the squared error is the sum of the squared singular values left out.
    """
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if exact.dtype == torch.float32:
        found = leading_triplets(exact, min(rank, *exact.shape))
        if found is not None:
            u, vh = fix_signs(found[0], found[2])
            return u.float(), found[1].float(), vh.float()
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    u, vh = fix_signs(u[:, :rank], vh[:rank])
    return u, s[:rank], vh


def randomised_svd(
    matrix: Tensor, rank: int, iterations: int = 4, oversample: int = 0, generator: torch.Generator | None = None
) -> SVD:
    """Return an approximate rank-`rank` SVD of (m, n) by subspace iteration, orthonormalised at every half step.

    The work is (2 iterations + 2) products with a thin (n, rank + oversample) matrix. Test vectors are drawn on the
    CPU from `generator` (one with seed 0 where none is given), so every device gives the same factors up to rounding.
    Source: Halko, Martinsson and Tropp (2011), arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    m, n = exact.shape
    width = min(rank + oversample, m, n)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    probe = torch.randn(n, width, generator=generator, dtype=torch.float32).to(exact)

    def onto_left(right: Tensor) -> Tensor:
        return thin(exact, right.mT, LEAST_OF_A_WEIGHT)  # (m, width)

    def onto_right(left: Tensor) -> Tensor:
        return thin(left.mT, exact.mT, LEAST_OF_A_WEIGHT).mT  # (n, width); this way round it reads the matrix in order

    basis = torch.linalg.qr(onto_left(probe)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(onto_right(basis)).Q
        basis = torch.linalg.qr(onto_left(basis)).Q
    right, left = torch.linalg.qr(onto_right(basis))  # (n, width), (width, width): a small SVD in place of a wide
    small_u, s, small_vh = torch.linalg.svd(left.mT)
    u, vh = fix_signs((basis @ small_u)[:, :rank], (small_vh @ right.mT)[:rank])
    return u, s[:rank], vh


def svd_of_product(B: Tensor, A: Tensor, rank: int | None = None) -> SVD:
    """Return the (truncated) SVD of B A for B (m, k), A (k, n) without forming the product: O((m + n) k^2)."""
    wide = torch.promote_types(B.dtype, torch.float32)
    q_left, r_left = torch.linalg.qr(B.to(wide))  # (m, min(m, k)), (min(m, k), k)
    q_right, r_right = torch.linalg.qr(A.to(wide).mT)  # (n, min(n, k)), (min(n, k), k)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    u, vh = fix_signs((q_left @ u)[:, :rank], (vh @ q_right.mT)[:rank])
    return u, s[:rank], vh
