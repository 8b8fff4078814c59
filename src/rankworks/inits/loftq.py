"""LoftQ: start from what quantising the base lost.

    W ~ Q + s B A        B = U (v/s)^(1/2)  (out, r),   A = (v/s)^(1/2) V^T  (r, in)

with Q the quantised base and U diag(v) V^T the rank-r part of W - Q, found in turns. Both come from a step of its own
that moves the base, `evidence = rankworks.quantise(model, bits=4, rank=16, init="loftq", iterations=1)`: the adapter
stands against the quantised base, from which it does not start; it starts near the unquantised model. s B A is the
same for every alpha. With pissa's order of the turns see `init={"init": "pissa", "quantised": True}`.
Source: arXiv:2310.08659, algorithm 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

from rankworks.core.evidence import Need
from rankworks.core.quantised import QUANTISED, quantised_start
from rankworks.core.registry import init
from rankworks.core.start import Init, Place, Start


@init("loftq", title="LoftQ", year=2023, paper="arXiv:2310.08659")
class LoftQ(Init):
    """The product that goes with the quantised base."""

    unchanged: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    @classmethod
    def needs(cls, spec: Any) -> tuple[str | Need, ...]:
        """What quantising left over."""
        return (QUANTISED,)

    def start(self, place: Place) -> Start:
        """Return the factors for a weight (out, in)."""
        return quantised_start(place)
