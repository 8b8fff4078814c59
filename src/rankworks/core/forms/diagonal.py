"""Diagonal: deltas that move r coordinates between two frozen bases, W' = W + B diag(moves) A.

A (r, in) and B (out, r) are made of the weight in `setup` and again on load; only the numbers that `moves` (r,) is
computed from are trained and stored.
"""

from __future__ import annotations

from torch import Tensor

from rankworks.core.delta import Factors
from rankworks.core.forms.projected import Projected


class Diagonal(Projected):
    """A trained diagonal between frozen bases."""

    B: Tensor

    def moves(self) -> Tensor:
        """Return what is added to each coordinate, (r,)."""
        raise TypeError(f"{type(self).__name__} must define moves()")

    def middle(self, h: Tensor) -> Tensor:
        """Each coordinate times its move."""
        return h * self.moves().to(h.dtype)

    def left(self) -> Tensor:
        """B."""
        return self.B

    def factors(self) -> Factors:
        """Exact at rank r, on the original weight: (B diag(moves), A)."""
        return Factors(self.B * self.moves(), self.A)
