"""PiSSA: put the weight's principal part in the adapter and train that; the rest stays behind, frozen.

    W = U S V^T        B = U_r (S_r/s)^(1/2)  (out, r),   A = (S_r/s)^(1/2) V_r^T  (r, in),   s = the delta's scale

so that s B A is the best rank-r approximation of W for any alpha. The base is not rewritten: the delta is
s (B A - B0 A0), hence the model starts exactly where it was, and effectively trains W - s B0 A0 + s B A.

`iterations` > 0 uses the randomised SVD (subspace iteration, the paper's fast form; 4 is its choice), seconds in place
of minutes; the start is exact in either case, because B0 A0 is whatever product was found.

`quantised` is QPiSSA, where only the residual is quantised: `rankworks.quantise(model, init="pissa", rank=r)` moves the
base to Quant(W - s B A), and the evidence it returns holds B A. The model then starts near W, and not at its base.
Source: arXiv:2404.02948, section 3, and its released code.
"""

from __future__ import annotations

from typing import Any, ClassVar

from rankworks.core.evidence import Need
from rankworks.core.fields import Setting
from rankworks.core.quantised import QUANTISED, quantised_start
from rankworks.core.registry import init
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, Start, balanced
from rankworks.linalg import randomised_svd, truncated_svd


@init("pissa", title="PiSSA", year=2024, paper="arXiv:2404.02948")
class PiSSA(Init):
    """The principal singular triplets, balanced between the factors."""

    scale_free: ClassVar[bool] = True

    iterations: int = Setting(0, "power iterations of the randomised SVD; 0 for the exact SVD", ge=0)
    oversample: int = Setting(0, "extra columns of the randomised SVD", ge=0)
    quantised: bool = Setting(False, "the base was quantised without its principal part: rankworks.quantise")

    def takes_out(self) -> bool:
        """Unless the base is quantised."""
        return not self.quantised

    @classmethod
    def needs(cls, spec: Any) -> tuple[str | Need, ...]:
        """What was left out of a quantised base."""
        return (QUANTISED,) if spec.quantised else ()

    @classmethod
    def starts_unchanged(cls, spec: Any) -> bool:
        """Unless the base is quantised."""
        return not spec.quantised

    def start(self, place: Place) -> Start:
        """Return the factors for a weight (out, in)."""
        if self.quantised:
            return quantised_start(place)
        if self.iterations:
            u, s, vh = randomised_svd(place.weight, place.rank, self.iterations, self.oversample, place.draw.generator)
        else:
            u, s, vh = truncated_svd(place.weight, place.rank)
        return balanced(u, s, vh, place.scale, from_base=True)

    def problems(self, shape: Shape, rank: int) -> list[str]:
        """A matrix has min(out, in) singular values and no more."""
        most = min(shape)
        return (
            [f"pissa takes at most min(out, in) = {most} singular values and rank is {rank}: lower it there"]
            if rank > most
            else []
        )
