"""Projected: deltas that read the input through a frozen A, change = left middle A with little trained in between.

    y = base(x) + left (middle(A x))        A (r, in) frozen,  left (out, r),  middle from r numbers to r

A method gives its frozen A in `setup`, and `middle` (elementwise or r x r), `left`, or both. Nothing of the input is
kept for the backward pass, only h = A x (..., r), and the change is added onto the frozen output in place.

A method of vectors is often run at a rank near full, where left and A are together larger than the weight. There, and
given enough tokens, the change is cheaper as one matrix added to the weight (`Whole`'s product): with t tokens the
factors cost 2 t r (in + out) multiply-adds forward and back, the matrix 3 r in out to form, again, and to differentiate
and t in out for its gradient, which needs x. Below rank `in`, with tokens enough, a method whose left and middle are
one matrix (`whole_left`) adds left A into the weight and differentiates by left alone (`kernels/folded.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankworks.core.delta import Base, Delta
from rankworks.core.inputs import Input, dropout, linear
from rankworks.core.kernels import fits, folded_linear, folds, read, whole_linear, write
from rankworks.core.kernels.mode import compute_dtype


class Projected(Delta):
    """A delta behind a frozen projection `A` (r, in). A `dropout` setting acts on the input of A."""

    A: Tensor

    def middle(self, h: Tensor) -> Tensor:
        """Return what is done to h = A x: (..., r) -> (..., r), in h's floating type."""
        return h

    def left(self) -> Tensor:
        """Return the matrix (out, r) that takes the result to the output, every scale folded in somewhere."""
        raise TypeError(f"{type(self).__name__} must define left()")

    def whole_left(self) -> Tensor | None:
        """Return left and middle as one matrix L (out, r), change = L A, where that costs little, else None."""
        return None

    def project(self, x: Tensor) -> Tensor:
        """A x: (..., in) -> (..., r)."""
        return linear(x, self.A)

    def added(self, weight: Tensor, L: Tensor) -> Tensor:
        """weight + L A: (out, in)."""
        return torch.addmm(weight, L, self.A.to(L.dtype))

    def branch(self, x: Input) -> Tensor:
        """left (middle (A x))."""
        return linear(self.middle(linear(self._dropped(x), self.A)), self.left())

    def forward(self, x: Input, base: Base) -> Tensor:
        """base(x) + branch(x), in one pass where the base is a plain linear layer."""
        frozen = base.linear if isinstance(x, Tensor) else None
        if frozen is None or not isinstance(x, Tensor) or not fits(x, *frozen):
            return base(x) + self.branch(x)
        p = getattr(self, "dropout", 0.0) if self.training else 0.0
        if not p and self._whole_is_cheaper(x):
            return whole_linear(x, *frozen, self.dense, [q for q in self.parameters() if q.requires_grad])
        if not p and folds(x, self.shape.out):
            L = self.whole_left()
            if L is not None:
                return folded_linear(x, *frozen, L, self.project, self.added)
        reading = read(x, (self.A,), p)
        return write(reading._replace(h=(self.middle(reading.h[0]),)), 0, *frozen, self.left())

    def _dropped(self, x: Input) -> Input:
        return dropout(x, getattr(self, "dropout", 0.0), self.training)

    def _whole_is_cheaper(self, x: Tensor) -> bool:
        """Whether to multiply by the changed weight: see the module's text. Never in 16 bits, where it would round."""
        (out, in_), r = self.shape, self.A.shape[0]
        if r < in_ or compute_dtype(x).itemsize < 4:
            return False
        t = x.numel() // max(1, x.shape[-1])
        if torch.is_grad_enabled():
            return 2 * t * r * (in_ + out) > 3 * r * in_ * out + t * in_ * out
        return t * (in_ + out) > in_ * out
