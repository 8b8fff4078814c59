"""LoRA-SB: three factors that hold the truncated first step of full fine-tuning, of which the core goes on learning.

    D = -eta sign(G)  (update="adam"),  -eta G  (update="sgd")          G the mean gradient of the weight
    D = U S V^T         B = U_r  (out, r),   C = diag(S_r) / s  (r, r),   A = V_r^T  (r, in)

The model starts at W + svd_r(D), the rank-r part of the first update already taken, and not at W: that is meant.
Adam's first step is eta times the sign of the gradient whatever its size; the sign of the sum over batches is that of
their mean. `eta` is the learning rate of that step: under a warm-up its first value, lr / (warm-up steps).

A and B are orthonormal, so the gradient of C is already the one that brings s B C A nearest to the full step (with
s = 1): the general form (1/s^2) (B^T B)^-1 (dL/dC) (A A^T)^-1 is dL/dC / s^2. There is nothing to precondition.
C is divided by s, so alpha has no effect on where the model starts; the released code holds s = 1 instead.
The delta is LoRA-XS, which trains the core alone; A and B depend on data and go in its file.
`iterations` = 10 is the released code's randomised SVD (no oversampling), 0 the exact one.
Source: arXiv:2411.19557, section 3, and its released code (which rounds the bases to bfloat16; here they are not).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from rankworks.core.evidence import Need
from rankworks.core.fields import NonNegative, Setting
from rankworks.core.registry import init
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, Start
from rankworks.linalg import randomised_svd, truncated_svd


@init("lora-sb", title="LoRA-SB", year=2024, paper="arXiv:2411.19557")
class LoRASB(Init):
    """Truncated SVD of the first full update."""

    fills: ClassVar[tuple[int, ...]] = (3,)
    unchanged: ClassVar[bool] = False

    update: Literal["adam", "sgd"] = Setting("adam", "whose first step: of Adam, -eta sign(G), or of SGD, -eta G")
    eta: float = NonNegative(1e-4, "the learning rate of the first step")
    iterations: int = Setting(10, "power iterations of the randomised SVD; 0 for the exact SVD", ge=0)

    @classmethod
    def needs(cls, spec: Any) -> tuple[str | Need, ...]:
        """The gradient."""
        return ("gradient",)

    @classmethod
    def starts_unchanged(cls, spec: Any) -> bool:
        """Only with eta = 0."""
        return spec.eta == 0

    def start(self, place: Place) -> Start:
        """Return the three factors for a weight (out, in)."""
        gradient = place.evidence["gradient"].to(place.weight)
        step = -(gradient.sign() if self.update == "adam" else gradient)  # (out, in), of eta = 1
        if self.iterations:
            u, s, vh = randomised_svd(step, place.rank, self.iterations, 0, place.draw.generator)
        else:
            u, s, vh = truncated_svd(step, place.rank)
        return Start(A=vh, B=u, core=torch.diag(self.eta * s / place.scale))

    def problems(self, shape: Shape, rank: int) -> list[str]:
        """A matrix has min(out, in) singular values and no more."""
        most = min(shape)
        if rank <= most:
            return []
        return [f"lora-sb takes at most min(out, in) = {most} singular values and rank is {rank}: lower it there"]
