"""LoLDU: factor the weight by pivoted LU and train r numbers between two unit triangles.

    W = P L diag(d) U        W' = W + P L_r diag(sigma z - sigma_0 z_0) U_r        z (r,) trained, sigma = alpha/r

L_r (out, r) are the first columns of the unit lower L, U_r (r, in) the first rows of the unit upper U, both frozen and
made from the weight again on load; the permutation lives as an index and is applied to L_r once. Written with the
residual, W_res = W - sigma_0 P L_r diag(z_0) U_r and W' = W_res + sigma P L_r diag(z) U_r: z = 0 gives W_res.
The gradient is dL/dz_i = sigma (P L)_i^T G U_i. `train_sigma` trains sigma too, as the paper counts (r + 1 numbers);
the released code leaves it out, and so does the default.

The start z_0 (`start`) is d ("lu"), or drawn around d's mean ("uniform" within half of it, "normal" with d's standard
deviation, "constant" at it), or without regard to d ("s_uniform" within +-1, "s_normal", "ones", "zeros"). The released
code subtracts the z_0 in use for the first four and d for the others, whose output therefore jumps; here the residual
is always taken with the z_0 in use, so every start leaves the output as it is. While sigma is not trained they then
differ by an offset of z alone.

A pivot that vanishes to rounding (no full rank) would be divided by; there d_i = 1 and the row of U stays unscaled.
Source: arXiv:2410.13618.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.forms.diagonal import Diagonal
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.linalg import unit_lu


@delta("loldu", title="LoLDU", year=2024, paper="arXiv:2410.13618")
class LoLDU(Diagonal):
    """A trained diagonal between frozen triangles."""

    rank: int = Rank(64, "length of the trained diagonal; the paper's default is the full width, 768")
    alpha: float = Positive(8.0, "numerator of the scale alpha/rank")
    start: Literal["lu", "uniform", "normal", "constant", "s_uniform", "s_normal", "ones", "zeros"] = Setting(
        "lu", "where the diagonal starts; the output starts unchanged in each case"
    )
    train_sigma: bool = Setting(False, "train the scale too")

    @property
    def scale(self) -> float:
        """alpha / rank, where sigma starts."""
        return self.alpha / self.rank

    def setup(self, weight: Tensor) -> None:
        """Take the triangles and the start; z = z_0 leaves the output unchanged."""
        parts = unit_lu(weight)
        B = torch.empty_like(parts.L[:, : self.rank])
        B[parts.rows] = parts.L[:, : self.rank]
        self.B = self.frozen(B.to(self.draw.dtype))  # P L_r, (out, r)
        self.A = self.frozen(parts.U[: self.rank].to(self.draw.dtype).contiguous())  # (r, in)
        self.z0 = self.frozen(self._start(parts.d[: self.rank]).to(self.draw.dtype))
        self.z = nn.Parameter(self.z0.clone())
        if self.train_sigma:
            self.sigma = self.trainable(1, fill=self.scale)

    def _start(self, d: Tensor) -> Tensor:
        """z_0 (r,)."""
        r = self.rank
        if self.start == "lu":
            return d
        if self.start == "uniform":
            return self.draw.uniform(r, bound=0.5) * d.mean().abs()
        if self.start == "normal":  # one number has no spread
            return d.mean() + d.std(correction=min(1, r - 1)) * self.draw.normal(r)
        if self.start == "constant":
            return d.mean().expand(r)
        if self.start == "s_uniform":
            return self.draw.uniform(r)
        if self.start == "s_normal":
            return self.draw.normal(r)
        return torch.full_like(d, 1.0 if self.start == "ones" else 0.0)

    def moves(self) -> Tensor:
        """sigma z - sigma_0 z_0 (r,), written with differences, so that it is zero to the bit at the start."""
        if not self.train_sigma:
            return self.scale * (self.z - self.z0)
        return self.sigma * (self.z - self.z0) + (self.sigma - self.scale) * self.z0

    @classmethod
    def inner_rank(cls, spec: Any, shape: Shape) -> int:
        """The rank."""
        return spec.rank

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank, and one with a trained sigma."""
        return spec.rank + spec.train_sigma

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """The triangles have min(out, in) columns and rows and no more."""
        if spec.rank > min(shape):
            return [f"loldu takes at most min(out, in) = {min(shape)} pivots and rank is {spec.rank}: lower it there"]
        return super().problems(spec, shape)
