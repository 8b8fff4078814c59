"""Triple: a change of three factors B C A of one rank r, with a square core C (r, r) between the outer two.

What the deltas that train all three (NLoRA) or the core alone (`Cored`) have in common: their settings, the scale
alpha/r, and what an initialiser asks before it fills three factors.
"""

from __future__ import annotations

from typing import Any

from rankworks.core.delta import Delta
from rankworks.core.fields import Positive, Probability, Rank
from rankworks.core.forms.lowrank import scale_of
from rankworks.core.site import Shape


class Triple(Delta):
    """Three factors of one rank."""

    rank: int = Rank(16)
    alpha: float = Positive(16.0, "numerator of the scale alpha/rank")
    dropout: float = Probability(0.0, "probability of dropping an input in training")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return scale_of(self.alpha, self.rank)

    @classmethod
    def factored_rank(cls, spec: Any) -> int:
        """The rank of the three factors."""
        return spec.rank

    @classmethod
    def factor_count(cls, spec: Any) -> int:
        """Three."""
        return 3

    @classmethod
    def inner_rank(cls, spec: Any, shape: Shape) -> int:
        """The rank."""
        return spec.rank
