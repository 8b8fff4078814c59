"""IntTune: train only an r x r matrix between literal blocks of the weight, its first rows and columns.

    W' = W + s B R A        A = W[:r]  (r, in),  B = W[:, :r]  (out, r),  R (r, r) trained,  s = alpha/r

What LoRA-XS takes from an SVD stands in the weight already: no decomposition, and the bases need no file. r^2 numbers
per site; dL/dR = s B^T G A^T, non-zero at R = 0, where it starts by default, so that the model starts as its base.
The released script starts at R = W[:r, :r], on a weight that is not reduced, and so away from the base:
`init="nlora"`. `init={"init": "nlora", "form": "nystrom"}` starts at a proper Nystrom approximation, taken out of the
weight. The same three factors, all trained, are the delta `nlora`.
Source: arXiv:2502.14482, section 3.3 (there N for R), and its released code.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from rankworks.core.forms.cored import Cored
from rankworks.core.registry import delta
from rankworks.core.site import Shape


@delta("inttune", title="IntTune", year=2025, paper="arXiv:2502.14482")
class IntTune(Cored):
    """The core between the weight's own first columns and rows."""

    decomposes: ClassVar[bool] = False

    def bases_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W[:, :r] (out, r) and W[:r] (r, in)."""
        return weight[:, : self.rank], weight[: self.rank]

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """There are only so many rows and columns."""
        most = min(shape)
        if spec.rank > most:
            return [f"inttune takes rank rows and columns of the weight, at most {most} here, and rank is {spec.rank}"]
        return super().problems(spec, shape)
