"""Singular values and vectors of a product B A of thin factors, without the product.

B (m, r), A (r, n), r small. With thin QR factorisations B = Q_b R_b and A^T = Q_a R_a the singular values of B A are
those of the core R_b R_a^T (r, r). Nothing larger than the factors is ever made: O((m + n) r) numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankworks.linalg.svd import SVD, fix_signs


def singular_values_of_product(B: Tensor, A: Tensor) -> Tensor:
    """Return the singular values of B A, descending: (min(r, m, n),), in at least float32."""
    wide = torch.promote_types(B.dtype, torch.float32)
    left = torch.linalg.qr(B.to(wide), mode="r").R  # (min(m, r), r)
    right = torch.linalg.qr(A.to(wide).mT, mode="r").R  # (min(n, r), r)
    return torch.linalg.svdvals(left @ right.mT)


def norm_of_product(B: Tensor, A: Tensor) -> float:
    """Return ||B A||_F, from the (r, r) Gram matrices in float64 (float32 where there is none)."""
    wide = torch.float32 if B.device.type == "mps" else torch.float64
    B, A = B.to(wide), A.to(wide)
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt())


def randomised_svd_of_product(
    B: Tensor, A: Tensor, rank: int, iterations: int = 2, oversample: int = 10, generator: torch.Generator | None = None
) -> SVD:
    """Return an approximate rank-`rank` SVD of B A by subspace iteration through the factors.

    Exact once rank + oversample reaches the factors' inner size. Test vectors are drawn on the CPU.
    Source: Halko, Martinsson and Tropp (2011), arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    wide = torch.promote_types(B.dtype, torch.float32)
    B, A = B.to(wide), A.to(wide)
    width = min(rank + oversample, A.shape[0], A.shape[1], B.shape[0])
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    probe = torch.randn(A.shape[1], width, generator=generator, dtype=torch.float32).to(A)  # (n, width)
    basis = torch.linalg.qr(B @ (A @ probe)).Q  # (m, width)
    for _ in range(iterations):
        basis = torch.linalg.qr(A.mT @ (B.mT @ basis)).Q  # (n, width)
        basis = torch.linalg.qr(B @ (A @ basis)).Q  # (m, width)
    small_u, s, vh = torch.linalg.svd((basis.mT @ B) @ A, full_matrices=False)  # of (width, n)
    u, vh = fix_signs((basis @ small_u)[:, :rank], vh[:rank])
    return u, s[:rank], vh
