"""PiSSA: put the weight's principal part in the adapter and train that; the rest stays behind, frozen.

    W = U S V^T        B = U_r (S_r/s)^(1/2)  (out, r),   A = (S_r/s)^(1/2) V_r^T  (r, in),   s = the delta's scale

so that s B A is the best rank-r approximation of W for any alpha. The base is not rewritten: the delta is
s (B A - B0 A0), hence the model starts exactly where it was, and effectively trains W - s B0 A0 + s B A.

`iterations` > 0 uses the randomised SVD (subspace iteration, the paper's fast form; 4 is its choice), seconds in place
of minutes; the start is exact in either case, because B0 A0 is whatever product was found.
Source: arXiv:2404.02948, section 3, and its released code.
"""

from __future__ import annotations

from typing import ClassVar

from rankworks.core.fields import Setting
from rankworks.core.registry import init
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, Start
from rankworks.linalg import randomised_svd, truncated_svd


@init("pissa", title="PiSSA", year=2024, paper="arXiv:2404.02948")
class PiSSA(Init):
    """The principal singular triplets, balanced between the factors."""

    scale_free: ClassVar[bool] = True

    iterations: int = Setting(0, "power iterations of the randomised SVD; 0 for the exact SVD", ge=0)
    oversample: int = Setting(0, "extra columns of the randomised SVD", ge=0)

    def start(self, place: Place) -> Start:
        """Return the factors for a weight (out, in)."""
        if self.iterations:
            u, s, vh = randomised_svd(place.weight, place.rank, self.iterations, self.oversample, place.draw.generator)
        else:
            u, s, vh = truncated_svd(place.weight, place.rank)
        root = (s / place.scale).sqrt()  # (r,)
        return Start(A=root.unsqueeze(1) * vh, B=u * root, from_base=True)

    def problems(self, shape: Shape, rank: int) -> list[str]:
        """A matrix has min(out, in) singular values and no more."""
        most = min(shape)
        return (
            [f"pissa takes at most min(out, in) = {most} singular values and rank is {rank}: lower it there"]
            if rank > most
            else []
        )
