"""Soft thresholds: the proximal step of xi |z|, by which gates become zero to the bit.

T_xi(x) = sign(x) max(|x| - xi, 0) = argmin_z (z - x)^2 / 2 + xi |z|
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def soft_threshold(x: Tensor, xi: float) -> Tensor:
    """Return T_xi(x): zero where |x| <= xi, nearer to zero by xi elsewhere."""
    return x.sign() * (x.abs() - xi).clamp_min(0)


def released_threshold(x: Tensor, xi: float) -> Tensor:
    """Return what the released codes of SoRA and CoDyRA make of x, one after the other: it is zero below about 2 xi.

    First what lies beyond xi moves towards zero by xi, then what lies within xi, some of it moved there just now, is
    set to zero. So |x| = xi stays, xi < |x| < 2 xi becomes zero, and 2 xi becomes xi, up to rounding.
    """
    x = torch.where(x > xi, x - xi, x)
    x = torch.where(x < -xi, x + xi, x)
    return torch.where(x.abs() < xi, 0.0, x)


@torch.no_grad()
def shrink_(tensors: Sequence[Tensor], xi: float, released: bool = False) -> None:
    """Apply a threshold to vectors in place, to all of them at once."""
    if tensors and xi > 0:
        moved = (released_threshold if released else soft_threshold)(torch.cat(list(tensors)), xi)
        torch._foreach_copy_(list(tensors), list(moved.split([len(t) for t in tensors])))
