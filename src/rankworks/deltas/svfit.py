"""SVFit: train the leading singular values of the weight, and nothing else.

    W' = W + U_r diag(d) V_r^T        W = U S V^T,  U_r (out, r) and V_r (in, r) frozen,  d (r,) trained, zero at start

The trained numbers are singular values: sigma = sigma_0 + d of W = U_r diag(sigma) V_r^T + W_e, with W_e the rest of W.
Written as a change of W it starts exactly at the base; the gradients are the same, dL/dd_i = u_i^T G v_i, and weight
decay pulls towards the pretrained values rather than towards zero. No alpha: a scale would part the trained numbers
from the singular values. Those span orders of magnitude, so `param="relative"` trains e in sigma = sigma_0 (1 + e): the
same functions, with steps in proportion. The paper's digest names neither learning rate nor scale; both are ours.
The bases come from the weight again on load (a sign of u_i goes with one of v_i and cancels); r numbers are stored.
Source: arXiv:2409.05926.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from rankworks.core.fields import Rank, Setting
from rankworks.core.forms.diagonal import Diagonal
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.linalg import truncated_svd


@delta("svfit", title="SVFit", year=2024, paper="arXiv:2409.05926")
class SVFit(Diagonal):
    """A trained move of each of the r largest singular values."""

    rank: int = Rank(64, "how many singular values to train, from the largest; the paper keeps 99 % of the spectrum")
    param: Literal["absolute", "relative"] = Setting(
        "absolute", "train the moves of the singular values, or the moves as shares of them"
    )

    def setup(self, weight: Tensor) -> None:
        """Take the bases; d = 0 leaves the output unchanged."""
        u, s, vh = (t.to(self.draw.dtype) for t in truncated_svd(weight, self.rank))  # (out, r), (r,), (r, in)
        self.B, self.A, self.sigma0 = self.frozen(u), self.frozen(vh), self.frozen(s)
        self.d = self.trainable(self.rank)

    def moves(self) -> Tensor:
        """What is added to each singular value, (r,)."""
        return self.d if self.param == "absolute" else self.sigma0 * self.d

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank."""
        return spec.rank

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """A matrix has min(out, in) singular values and no more."""
        if spec.rank > min(shape):
            return [
                f"svfit trains rank = {spec.rank} singular values and the weight has min(out, in) = {min(shape)}: "
                "lower rank there"
            ]
        return super().problems(spec, shape)
