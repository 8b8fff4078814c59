"""LoRA-XS: train only an r x r matrix between two frozen bases taken from the weight.

    W' = W + s B R A        A = S_r V_r^T (r, in),  B = U_r (out, r),  R (r, r) trained,  s = alpha/r

U S V^T is the weight's SVD, so R moves W inside its own leading subspace; r^2 numbers per site, whatever its width.
The gradient is dL/dR = s B^T G A^T, non-zero already at R = 0: with `core_std = 0` (the default) the model starts
exactly as its base. The released code draws R from N(0, 1e-5^2), which `core_std=1e-5` gives. The paper's ablation
with random bases, A ~ U(+-1/sqrt(in)) and B ~ U(+-1/sqrt(r)), is `bases="random"`.
An initialiser of three factors (`init="lora-sb"`, `"eva"`) gives other bases, which depend on data and are stored.
Source: arXiv:2405.17604, section 3 (written there for row vectors, which transposes the two bases).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.delta import Factors
from rankworks.core.fields import NonNegative, Positive, Probability, Rank, Setting
from rankworks.core.inputs import linear
from rankworks.core.lowrank import scale_of
from rankworks.core.projected import Projected
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place
from rankworks.linalg import randomised_svd, truncated_svd


@delta("lora-xs", title="LoRA-XS", year=2024, paper="arXiv:2405.17604")
class LoRAXS(Projected):
    """Three factors, of which the small middle one is trained."""

    rank: int = Rank(16)
    alpha: float = Positive(16.0, "numerator of the scale alpha/rank")
    dropout: float = Probability(0.0, "probability of dropping an input in training")
    core_std: float = NonNegative(0.0, "standard deviation of R at the start")
    bases: Literal["svd", "random"] = Setting("svd", "where A and B come from: the weight's SVD, or the seed")
    iterations: int = Setting(0, "power iterations of a randomised SVD; 0 for the exact SVD", ge=0)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return scale_of(self.alpha, self.rank)

    def setup(self, weight: Tensor) -> None:
        """Take the bases; they are rebuilt on load, and only R is stored."""
        if self.bases == "random":
            self.A = self.frozen(self.draw.uniform(self.rank, self.shape.in_, bound=self.shape.in_**-0.5))
            self.B = self.frozen(self.draw.uniform(self.shape.out, self.rank, bound=self.rank**-0.5))
        else:
            self.B, self.A = (self.frozen(t.to(self.draw.dtype)) for t in self._principal(weight))
        self.R = self.trainable(self.rank, self.rank, std=self.core_std)

    @torch.no_grad()
    def reset(self, weight: Tensor, init: Init) -> None:
        """Take bases and core from an initialiser that gives three factors; these bases are stored, not rebuilt."""
        if init.key == "default":
            return
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        start = init.start(Place(exact, self.rank, self.scale, self.draw, self.kind, 3, self.evidence))
        # contiguous, as a file gives them: another layout is another kernel, and other last bits
        self.A, self.B = (self.stored(t.to(self.A.dtype).contiguous()) for t in (start.A, start.B))
        assert start.core is not None
        self.R.copy_(start.core)

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make room for bases that came from an initialiser."""
        if {"A", "B"} & set(shapes):
            self.A, self.B = (
                self.stored(torch.zeros_like(t, memory_format=torch.contiguous_format)) for t in (self.A, self.B)
            )

    def _principal(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """U_r (out, r) and S_r V_r^T (r, in)."""
        if self.iterations:
            u, s, vh = randomised_svd(weight, self.rank, self.iterations, 0, self.draw.generator)
        else:
            u, s, vh = truncated_svd(weight, self.rank)  # (out, r), (r,), (r, in)
        return u, s.unsqueeze(1) * vh

    def middle(self, h: Tensor) -> Tensor:
        """s R A x, from A x, which backward keeps in x's place."""
        return linear(h, self.scale * self.R)

    def left(self) -> Tensor:
        """B."""
        return self.B

    def factors(self) -> Factors:
        """Exact at rank r: (s B R, A)."""
        return Factors(self.scale * self.B @ self.R, self.A)

    @classmethod
    def factored_rank(cls, spec: Any) -> int:
        """The rank of the three factors."""
        return spec.rank

    @classmethod
    def factor_count(cls, spec: Any) -> int:
        """Three."""
        return 3

    @classmethod
    def inner_rank(cls, spec: Any, shape: Shape) -> int:
        """The rank."""
        return spec.rank

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank^2."""
        return spec.rank**2

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """A matrix has min(out, in) singular vectors and no more."""
        most = min(shape)
        if spec.rank > most:
            return [
                f"lora-xs takes at most min(out, in) = {most} singular vectors and rank is {spec.rank}: lower it there"
            ]
        return super().problems(spec, shape)
