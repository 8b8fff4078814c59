"""OLoRA: start from the QR factors of the weight; B has orthonormal columns.

    W = Q R (reduced, diag(R) >= 0)        B = Q[:, :r]  (out, r),   A = R[:r]  (r, in)

B A is the projection of W on the span of its first r columns: cheaper than an SVD, and dependent on the order of the
inputs. As for PiSSA the base is not rewritten; the delta is s (B A - B0 A0) and the start is exact.
Source: arXiv:2406.01775, section 3; like the released code, B A is not divided by the scale.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rankworks.core.registry import init
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, Start


@init("olora", title="OLoRA", year=2024, paper="arXiv:2406.01775")
class OLoRA(Init):
    """The first r columns of Q and rows of R, with the signs that make R's diagonal positive."""

    from_base: ClassVar[bool] = True

    def start(self, place: Place) -> Start:
        """Return the factors for a weight (out, in)."""
        # Only Q's first r columns are needed, and they depend on the weight's first r columns alone; R's first r rows
        # are then Q^T W: O(out in r) in place of a full factorisation's O(out in min(out, in)).
        weight, rank = place.weight, place.rank
        q, r = torch.linalg.qr(weight[:, :rank])  # (out, r), (r, r)
        signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        q = q * signs
        return Start(A=_upper(q.mT @ weight, rank), B=q, from_base=True)

    def problems(self, shape: Shape, rank: int) -> list[str]:
        """QR of (out, in) has min(out, in) columns and no more."""
        most = min(shape)
        return (
            [f"olora takes at most min(out, in) = {most} columns and rank is {rank}: lower it there"]
            if rank > most
            else []
        )


def _upper(rows: Tensor, rank: int) -> Tensor:
    """Set the part below the diagonal of the first `rank` columns to the zero it is in exact arithmetic."""
    rows[:, :rank] = rows[:, :rank].triu()
    return rows
