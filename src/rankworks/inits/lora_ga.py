"""LoRA-GA: start where the first step of s B A moves the weight as a step of full fine-tuning would, at rank 2r.

    G = U S V^T, the mean gradient of the weight        A = c V[:, I_A]^T  (r, in),   B = c U[:, I_B]  (out, r)

with I_A and I_B disjoint and together {1..2r}. One step of SGD changes s B A by -eta s^2 (G A^T A + B B^T G) to first
order, which is then -eta s^2 c^2 times the best rank-2r approximation of G, whatever the split (`direction`):

    ArB2r    I_A first half, I_B second        A2rBr    the other way round
    ArBr     alternating, B the odd numbers    random   a random half each

Singular values are not used, only directions. c (`scale`): `stable` out^(1/4) / gamma^(1/2), `unit` 1, `gd` 1/s,
`weightS` the mean of (sigma_i(W) / s)^(1/2) over i <= r. As for PiSSA the base is not rewritten: the delta is
s (B A - B0 A0) and the start is exact. `norm_clip` shrinks A and B where s B A has an entry beyond the weight's
largest, so that it just reaches that one.

The paper's scheme is this start with s = alpha/sqrt(r): give the delta scaling="rslora". The decomposition is the
released code's randomised one (q = 4r, 4 power iterations), or exact with `iterations` = 0.
This is the authors' method. PEFT's `lora_ga` multiplies B by the singular values and gives both factors the same
indices in `random`, whereby the first step is no longer the best rank-2r one.
Source: arXiv:2407.05000, sections 3.2 and 3.3, and its released code.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankworks.core.evidence import Need
from rankworks.core.fields import Positive, Setting
from rankworks.core.registry import init
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, Start
from rankworks.linalg import randomised_svd, truncated_svd


@init("lora-ga", title="LoRA-GA", year=2024, paper="arXiv:2407.05000")
class LoRAGA(Init):
    """Singular directions of the gradient, some for A and others for B."""

    from_base: ClassVar[bool] = True

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = Setting("ArB2r", "which of the 2r directions A and B take")
    scale: Literal["stable", "unit", "gd", "weightS"] = Setting("stable", "the length c of A's rows and B's columns")
    gamma: float = Positive(16.0, "c = out^(1/4) / gamma^(1/2) of the stable scale")
    norm_clip: bool = Setting(False, "shrink a product with entries beyond the weight's largest")
    iterations: int = Setting(4, "power iterations of the randomised SVD; 0 for the exact SVD", ge=0)

    @classmethod
    def needs(cls, spec: Any) -> tuple[str | Need, ...]:
        """The gradient."""
        return ("gradient",)

    def start(self, place: Place) -> Start:
        """Return the factors for a weight (out, in)."""
        rank, weight = place.rank, place.weight
        gradient = place.evidence["gradient"].to(weight)  # (out, in)
        if self.iterations:
            u, _, vh = randomised_svd(gradient, 2 * rank, self.iterations, 2 * rank, place.draw.generator)
        else:
            u, _, vh = truncated_svd(gradient, 2 * rank)  # (out, 2r), (2r,), (2r, in)
        for_a, for_b = self._split(rank, place)
        length = self._length(place)
        A, B = length * vh[for_a], length * u[:, for_b]
        if self.norm_clip:
            shrink = _clipping(weight, place.scale, A, B)
            A, B = shrink * A, shrink * B
        return Start(A=A, B=B, from_base=True)

    def problems(self, shape: Shape, rank: int) -> list[str]:
        """2r directions are shared out, and a matrix has min(out, in)."""
        most = min(shape) // 2
        if rank <= most:
            return []
        return [f"lora-ga takes 2 rank directions of min(out, in) = {min(shape)}: lower the rank to {most} there"]

    def _split(self, rank: int, place: Place) -> tuple[Tensor, Tensor]:
        """The directions of A and of B, (r,) each."""
        order = torch.arange(2 * rank)
        if self.direction == "ArBr":
            return order[1::2], order[::2]
        if self.direction == "random":
            order = torch.randperm(2 * rank, generator=place.draw.generator)
        first, second = order[:rank], order[rank:]
        return (second, first) if self.direction == "A2rBr" else (first, second)

    def _length(self, place: Place) -> float | Tensor:
        """c."""
        if self.scale == "stable":
            return place.weight.shape[0] ** 0.25 / self.gamma**0.5
        if self.scale == "weightS":
            return (truncated_svd(place.weight, place.rank)[1] / place.scale).sqrt().mean()
        return 1.0 if self.scale == "unit" else 1.0 / place.scale


def _clipping(weight: Tensor, scale: float, A: Tensor, B: Tensor) -> Tensor:
    """sqrt(rho), rho = max|W| / max|s B A| where that is below 1, of A's and B's own length."""
    largest = torch.stack([(scale * part @ A).abs().max() for part in B.split(4096)]).max()
    return (weight.abs().max() / largest.clamp_min(torch.finfo(largest.dtype).tiny)).clamp_max(1.0).sqrt()
