"""NLoRA's start: three factors that are literal blocks of the weight, in the manner of the Nystrom approximation.

    released    A = W[:r]  (r, in),   B = W[:, :r]  (out, r),   N = W[:r, :r]            W is not reduced
    nystrom     A = W[I],             B = W[:, J],              N = W[I, J]^+ / s        s B N A is taken out of W

`released` is what the authors' code does (its pseudo-inverse is commented out, and the base stays whole): the model
starts at W + s W[:, :r] W[:r, :r] W[:r], near W because weights are small: for independent weights of standard
deviation sigma the distance is about s sigma^2 r of ||W||. Whether the paper means this is open, so it is the default
for its figures and not for its mathematics.

`nystrom` is ours: s B N A = W[:, J] W[I, J]^+ W[I] for any s. It has W's own rows I and columns J where W[I, J] is
invertible, and is W where that has rank r besides. The base is not rewritten; the delta is s (B N A - B0 N0 A0), and
the start is exact.
The choice of I and J decides: a leading block is often nearly singular. On projections of a 135M language model at
r = 16 the approximation from leading blocks is 5 to 65 times as large as W, and from rook pivots (`pivots="rook"`, the
default) 0.8 to 1.2 times; 1.2 to 1.5 of ||W|| stays behind. Singular values of the block below `rcond` times its
largest count as zero; with rook pivots that only meets weights without full rank.
Source: arXiv:2502.14482, section 3.2, and its released code.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from rankworks.core.fields import Setting
from rankworks.core.registry import init
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, Start
from rankworks.linalg.cross import cross_pivots


@init("nlora", title="NLoRA", year=2025, paper="arXiv:2502.14482")
class NLoRAStart(Init):
    """Rows, columns, and their crossing."""

    fills: ClassVar[tuple[int, ...]] = (3,)
    unchanged: ClassVar[bool] = False

    form: Literal["released", "nystrom"] = Setting("released", "blocks as the authors' code takes them, or Nystrom's")
    pivots: Literal["rook", "leading"] = Setting("rook", "nystrom: rows and columns that cross well, or the first")
    rcond: float = Setting(
        1e-6, "nystrom: relative size at which the crossing's singular values count as 0", ge=0, lt=1
    )

    @classmethod
    def starts_unchanged(cls, spec: Any) -> bool:
        """Only Nystrom's form, which is taken out of the weight."""
        return spec.form == "nystrom"

    def takes_out(self) -> bool:
        """Nystrom's form."""
        return self.form == "nystrom"

    def start(self, place: Place) -> Start:
        """Return the three factors for a weight (out, in)."""
        weight, rank = place.weight, place.rank
        first = torch.arange(rank, device=weight.device)
        if self.form == "released":
            return Start(A=weight[:rank], B=weight[:, :rank], core=weight[:rank, :rank])
        rows, columns = (first, first) if self.pivots == "leading" else cross_pivots(weight, rank)
        A, B = weight[rows], weight[:, columns]  # (r, in), (out, r)
        inverse = torch.linalg.pinv(A[:, columns].double(), rtol=self.rcond)  # (r, r)
        return Start(A=A, B=B, core=(inverse / place.scale).to(weight.dtype), from_base=True)

    def problems(self, shape: Shape, rank: int) -> list[str]:
        """There are only so many rows and columns."""
        most = min(shape)
        if rank <= most:
            return []
        return [f"nlora takes rank rows and columns of the weight, at most {most} here, and rank is {rank}"]
