"""Rows in few bits: even steps between each row's ends, two codes a byte in 4 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankworks.core.codes import rows
from rankworks.core.codes.rows import dequantise_rows, quantise_rows, row_bytes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(5, 8), (4, 7), (3, 1)])
def test_no_number_is_off_by_more_than_half_a_step(shape: Any, bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "NUMBERS", 2 * shape[1])  # two rows at a time
    X = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) + 3
    found = quantise_rows(X, bits)
    back = dequantise_rows(found, shape[1], bits)
    step = (X.amax(1) - X.amin(1)) / (2**bits - 1)
    assert ((back - X).abs() <= step[:, None] / 2 + 1e-6).all()
    assert sum(t.numel() * t.element_size() for t in found) == row_bytes(shape, bits)
    assert found.codes.shape[1] == (shape[1] if bits == 8 else (shape[1] + 1) // 2)


@pytest.mark.parametrize("bits", [4, 8])
def test_even_steps_come_back_as_they_were(bits: Any) -> None:
    """Every code is used once, so an order that is scrambled on the way back would show."""
    X = torch.arange(2.0**bits).flip(0).repeat(2, 1) - 5
    torch.testing.assert_close(dequantise_rows(quantise_rows(X, bits), X.shape[1], bits), X, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_one_number_is_itself(bits: Any) -> None:
    X = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.3, 0.3]])
    assert torch.equal(dequantise_rows(quantise_rows(X, bits), 3, bits), X)
