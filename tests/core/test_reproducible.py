"""What MKL is asked for, and the memory order that keeps a frozen layer's own bits."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from rankworks.core import reproducible
from rankworks.core.kernels.mode import laid_out_like


@pytest.mark.parametrize(
    ("vendor", "before", "after"),
    [
        ("AuthenticAMD", None, "AUTO,STRICT"),
        ("AuthenticAMD", "COMPATIBLE", "COMPATIBLE"),
        ("GenuineIntel", None, None),
        ("", None, None),
    ],
)
def test_mkl_is_asked_for_equal_bits_where_it_needs_to_be(monkeypatch, vendor, before, after) -> None:
    monkeypatch.setattr(reproducible, "_vendor", lambda: vendor)
    monkeypatch.delenv("MKL_CBWR", raising=False)
    if before is not None:
        monkeypatch.setenv("MKL_CBWR", before)
    reproducible.settle()
    assert os.environ.get("MKL_CBWR") == after


@pytest.mark.parametrize("shape", [(6, 8), (64, 32)])
def test_a_changed_weight_is_multiplied_as_the_stored_one(shape: tuple[int, int]) -> None:
    """GPT-2's orientation: a sum takes another order than what it was made of, and the bits of a product follow it."""
    out, in_ = shape
    weight, x, bias = torch.randn(in_, out).t(), torch.randn(3, in_), torch.randn(out)
    changed = laid_out_like(torch.addmm(weight, torch.zeros(out, 2), torch.randn(2, in_)), weight)
    assert changed.stride() == weight.stride()
    assert torch.equal(F.linear(x, changed, bias), F.linear(x, weight, bias))
    assert laid_out_like(weight, weight) is weight
