"""An orthonormal basis of a thin matrix's columns: the Q of a QR decomposition with a positive diagonal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankworks.linalg.orthonormal import orthonormal


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(n: int, k: int, condition: float) -> Tensor:
    """Columns whose singular values fall from 1 to 1 / condition."""
    u, v = torch.linalg.qr(draw(n, k)).Q, torch.linalg.qr(draw(k, k, seed=1)).Q
    return u * torch.logspace(0, -torch.tensor(condition).log10().item(), k, dtype=torch.float64) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
def test_columns_are_orthonormal_whatever_the_condition(condition: float, dtype: torch.dtype) -> None:
    columns = spread(60, 9, condition).to(dtype)
    Q = orthonormal(columns)
    assert Q.dtype == dtype
    assert Q.is_contiguous()
    error = (Q.mT.double() @ Q.double() - torch.eye(9)).abs().max()
    assert error < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_qr_decomposition_with_a_positive_diagonal(dtype: torch.dtype) -> None:
    columns = spread(40, 6, 10.0).to(dtype)
    R = orthonormal(columns).mT @ columns
    torch.testing.assert_close(R, R.triu(), atol=50 * torch.finfo(dtype).eps, rtol=0)
    assert bool((R.diagonal() > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_columns_and_zeros_are_filled_up(dtype: torch.dtype) -> None:
    columns = draw(20, 5).to(dtype)
    columns[:, 2], columns[:, 4] = columns[:, 0] - columns[:, 1], 0
    Q = orthonormal(columns)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(5, dtype=dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(Q @ (Q.mT @ columns), columns, atol=1e-5, rtol=0)
    zeros = orthonormal(torch.zeros(20, 5, dtype=dtype))
    torch.testing.assert_close(zeros.mT @ zeros, torch.eye(5, dtype=dtype), atol=1e-6, rtol=0)


def test_a_small_change_of_the_columns_makes_a_small_change_of_the_basis() -> None:
    columns = spread(40, 6, 10.0).float()
    moved = columns + 1e-5 * draw(40, 6, seed=2).float()
    assert (orthonormal(moved) - orthonormal(columns)).abs().max() < 1e-2
