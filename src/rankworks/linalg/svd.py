"""Truncated singular value decompositions: exact, randomised, and of a product of factors.

All return (U, s, Vh) with U (m, r), s (r,) descending, Vh (r, n), M ~ U diag(s) Vh, signs fixed so that the entry of
largest magnitude in every right vector is positive: the same matrix gives the same factors on every machine, up to
rounding and to rotations within equal singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankworks.linalg.gram import leading_triplets
from rankworks.linalg.thin import LEAST_OF_A_WEIGHT, by_thin

SVD = tuple[Tensor, Tensor, Tensor]


def fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip each pair of singular vectors so that the largest-magnitude entry of the right one is positive."""
    if not vh.numel():
        return u, vh
    signs = torch.where(vh.amax(dim=1) + vh.amin(dim=1) < 0, -1.0, 1.0).to(vh.dtype)  # (r,)
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
    """Return an approximate rank-`rank` SVD of W (m, n) by subspace iteration.

        Q <- orth(W probe),   `iterations` times  Q <- orth(W W^T Q),   then the SVD of the small core of W^T Q

    in (2 iterations + 2) products with a matrix of rank + oversample columns. Of a tall W it is W^T Q that goes from
    one iteration to the next: the same spaces, and what is made orthonormal is the short side. One QR in each iteration
    is enough after the first: a column then lies near the span of the singular directions of its own size, the first
    factor makes it about as short as its singular value, and the product of both keeps as many digits of each column as
    if what stands between them had been made orthonormal too, eps sigma_1 / sigma_r. A column of the first Q still
    holds all directions, whose values squared would not fit beside each other.
    Test vectors are drawn on the CPU from `generator` (one with seed 0 where none is given), so every device gives the
    same factors up to rounding.
    Source: Halko, Martinsson and Tropp (2011), arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    m, n = exact.shape
    width = min(rank + oversample, m, n)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    probe = torch.randn(n, width, generator=generator, dtype=torch.float32).to(exact)
    multiply = by_thin(exact, LEAST_OF_A_WEIGHT)

    def onto_left(right: Tensor) -> Tensor:
        return multiply(exact, right.mT)  # (m, width)

    def onto_right(left: Tensor) -> Tensor:
        return multiply(left.mT, exact.mT).mT  # (n, width); this way round it reads the matrix in order

    tall = m > n
    lengthen, shorten = (onto_left, onto_right) if tall else (onto_right, onto_left)
    short = probe if tall else torch.linalg.qr(onto_left(probe)).Q  # (min(m, n), width)
    for step in range(iterations):
        long = lengthen(short)
        short = torch.linalg.qr(shorten(torch.linalg.qr(long).Q if step == 0 else long)).Q
    left = torch.linalg.qr(onto_left(short)).Q if tall else short
    right, core = torch.linalg.qr(onto_right(left))  # (n, width), (width, width): a small SVD in place of a wide
    small_u, s, small_vh = torch.linalg.svd(core.mT)
    u, vh = fix_signs((left @ small_u)[:, :rank], (small_vh @ right.mT)[:rank])
    return u, s[:rank], vh


def svd_of_product(B: Tensor, A: Tensor, rank: int | None = None) -> SVD:
    """Return the (truncated) SVD of B A for B (m, k), A (k, n) without forming the product: O((m + n) k^2)."""
    wide = torch.promote_types(B.dtype, torch.float32)
    q_left, r_left = torch.linalg.qr(B.to(wide))  # (m, min(m, k)), (min(m, k), k)
    q_right, r_right = torch.linalg.qr(A.to(wide).mT)  # (n, min(n, k)), (min(n, k), k)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    u, vh = fix_signs((q_left @ u)[:, :rank], (vh @ q_right.mT)[:rank])
    return u, s[:rank], vh
