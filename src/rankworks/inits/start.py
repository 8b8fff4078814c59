"""default and gaussian: one factor random, the other zero, so that the model starts as its base.

    default     A ~ U(-1/sqrt(in), 1/sqrt(in)),  B = 0      (Kaiming uniform with slope sqrt 5)
    gaussian    A ~ N(0, (1/rank)^2),            B = 0

An embedding turns the roles, A = 0 and B ~ N(0, 1): its A is looked up by token, and zero rows there leave every
token where it was. At the first step the zero factor alone moves: dL/dB = scale G A^T, dL/dA = scale B^T G = 0.
Source: arXiv:2106.09685, section 4.1, and the reference implementation.
"""

from __future__ import annotations

from rankworks.core.registry import init
from rankworks.core.start import Init, Place, Start


def _embedding(place: Place) -> Start:
    out, in_ = place.weight.shape
    return Start(A=place.weight.new_zeros(place.rank, in_), B=place.draw.normal(out, place.rank))


@init("default", title="Kaiming uniform", year=2021, paper="arXiv:2106.09685")
class Default(Init):
    """A uniform in +-1/sqrt(in), B zero."""

    def start(self, place: Place) -> Start:
        """Return the factors for a weight (out, in)."""
        if place.kind == "embedding":
            return _embedding(place)
        out, in_ = place.weight.shape
        return Start(A=place.draw.uniform(place.rank, in_, bound=in_**-0.5), B=place.weight.new_zeros(out, place.rank))


@init("gaussian", title="Gaussian", year=2021, paper="arXiv:2106.09685")
class Gaussian(Init):
    """A normal with standard deviation 1/rank, B zero."""

    def start(self, place: Place) -> Start:
        """Return the factors for a weight (out, in)."""
        if place.kind == "embedding":
            return _embedding(place)
        out, in_ = place.weight.shape
        return Start(
            A=place.draw.normal(place.rank, in_, std=1 / place.rank), B=place.weight.new_zeros(out, place.rank)
        )
