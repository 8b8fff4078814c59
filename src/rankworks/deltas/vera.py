"""VeRA: one frozen random pair of factors for the whole model, and two trained vectors per site.

    W' = W + diag(b) B diag(d) A        A (r, in_max), B (out_max, r) frozen;  b (out,) = 0,  d (r,) = d_initial

Every site uses the first `in` columns of A and `out` rows of B. A ~ U(+-sqrt(6/in_max)), B ~ U(+-sqrt(6/r)) (Kaiming
uniform), A drawn first from a CPU generator at `projection_seed`, as the reference does; rebuilt from it, never stored.
out + r numbers per site. No alpha: the scale is 1. With G = dL/dW', dL/db = diag(G (B diag(d) A)^T) and
dL/dd = diag(B^T diag(b) G A^T), which is zero at the first step.
Source: arXiv:2310.11454, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rankworks.core.delta import Factors
from rankworks.core.draw import Draw
from rankworks.core.fields import Positive, Probability, Rank, Setting
from rankworks.core.forms.projected import Projected
from rankworks.core.registry import delta
from rankworks.core.site import Shape


@delta("vera", title="VeRA", year=2023, paper="arXiv:2310.11454")
class VeRA(Projected):
    """Two scaling vectors around a shared random product."""

    rank: int = Rank(256)
    d_initial: float = Positive(0.1, "starting value of the inner vector d")
    dropout: float = Probability(0.0, "probability of dropping an input in training")
    projection_seed: int = Setting(0, "seed of the shared pair A, B, whatever the adapter's own seed", ge=0)

    @classmethod
    def bank(cls, spec: Any, shapes: Sequence[Shape], draw: Draw) -> dict[str, Tensor]:
        """A (r, in_max) first, then B (out_max, r)."""
        out, in_ = max(s.out for s in shapes), max(s.in_ for s in shapes)
        draw = draw.seeded(spec.projection_seed)
        return {
            "A": draw.uniform(spec.rank, in_, bound=(6 / in_) ** 0.5),
            "B": draw.uniform(out, spec.rank, bound=(6 / spec.rank) ** 0.5),
        }

    def setup(self, weight: Tensor) -> None:
        """b = 0 leaves the output unchanged; d is the only path by which b gets a gradient, so it is not zero."""
        self.b = self.trainable(self.shape.out)
        self.d = self.trainable(self.rank, fill=self.d_initial)

    def _slices(self) -> Factors:
        """The site's part of the shared pair: B (out, r), A (r, in), views."""
        assert self.shared is not None
        return Factors(
            self.shared["B"][: self.shape.out].to(self.b.dtype), self.shared["A"][:, : self.shape.in_].to(self.b.dtype)
        )

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        """The site's columns of the shared A, (r, in)."""
        return self._slices().A

    def middle(self, h: Tensor) -> Tensor:
        """d * h."""
        return h * self.d.to(h.dtype)

    def left(self) -> Tensor:
        """diag(b) B, (out, r): formed once per call, so that backward keeps nothing of the output's size for b."""
        return self.b.unsqueeze(1) * self._slices().B

    def whole_left(self) -> Tensor:
        """diag(b) B diag(d), (out, r): the gradients of b and d are then sums over one product, dL/dL = G A^T."""
        return self.left() * self.d

    def factors(self) -> Factors:
        """Exact at rank r: (diag(b) B, diag(d) A)."""
        return Factors(self.left(), self.d.unsqueeze(1) * self.A)

    @classmethod
    def inner_rank(cls, spec: Any, shape: Shape) -> int:
        """The rank."""
        return spec.rank

    @classmethod
    def portable(cls, spec: Any) -> bool:
        """It knows nothing of its weight but the size."""
        return True

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """out + rank."""
        return shape.out + spec.rank
