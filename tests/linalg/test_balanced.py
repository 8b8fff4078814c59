"""Balanced factors: the matrix to rounding, whatever its spectrum, in order of importance."""

from __future__ import annotations

import pytest
import torch

from rankworks.linalg.balanced import balanced_factors
from rankworks.linalg.energy import leading_energy


@pytest.mark.parametrize("shape", [(7, 7), (12, 5), (5, 12), (1, 4), (90, 70)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_they_multiply_to_the_matrix_and_are_balanced(shape: tuple[int, int], dtype: torch.dtype):
    torch.manual_seed(0)
    M, r = torch.randn(shape, dtype=dtype), min(shape)
    B, A = balanced_factors(M, r)
    wide = torch.promote_types(dtype, torch.float32)
    assert (B.shape, A.shape, B.dtype, A.dtype) == ((shape[0], r), (r, shape[1]), wide, wide)
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(B @ A, M.to(wide), atol=tight, rtol=tight)
    s = torch.diag(torch.linalg.svdvals(M.to(wide)))
    torch.testing.assert_close(B.mT @ B, s, atol=20 * tight, rtol=0)
    torch.testing.assert_close(A @ A.mT, s, atol=20 * tight, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_and_missing_singular_values_cost_nothing(dtype: torch.dtype):
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(20, 12, dtype=torch.float64)).Q, torch.linalg.qr(torch.randn(12, 12).double()).Q
    spectrum = torch.cat([torch.logspace(0, -14, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)])
    M = ((u * spectrum) @ v).to(dtype)
    B, A = balanced_factors(M, 12)
    assert torch.isfinite(B).all()
    assert float((B @ A - M).norm()) < 20 * torch.finfo(dtype).eps
    assert not any(t.abs().max() > 0 for t in balanced_factors(torch.zeros(4, 3), 3))


def test_a_smaller_rank_is_the_best_approximation():
    M = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    B, A = balanced_factors(M, 2)
    lost = float((M - B @ A).square().sum() / M.square().sum())
    assert lost == pytest.approx(1 - leading_energy(M, 2), abs=1e-13)
