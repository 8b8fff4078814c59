"""LoRA-XS: train only an r x r matrix between two frozen bases taken from the weight.

    W' = W + s B R A        A = S_r V_r^T (r, in),  B = U_r (out, r),  R (r, r) trained,  s = alpha/r

U S V^T is the weight's SVD, so R moves W inside its own leading subspace; r^2 numbers per site, whatever its width.
The gradient is dL/dR = s B^T G A^T, non-zero already at R = 0: with `core_std = 0` (the default) the model starts
exactly as its base. The released code draws R from N(0, 1e-5^2), which `core_std=1e-5` gives. The paper's ablation
with random bases, A ~ U(+-1/sqrt(in)) and B ~ U(+-1/sqrt(r)), is `bases="random"`.
An initialiser of three factors (`init="lora-sb"`, `"eva"`, `"nlora"`) gives other bases, which are stored.
Source: arXiv:2405.17604, section 3 (written there for row vectors, which transposes the two bases).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from rankworks.core.fields import NonNegative, Setting
from rankworks.core.forms.cored import Cored
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.linalg import randomised_svd, truncated_svd


@delta("lora-xs", title="LoRA-XS", year=2024, paper="arXiv:2405.17604")
class LoRAXS(Cored):
    """Three factors, of which the small middle one is trained."""

    core_std: float = NonNegative(0.0, "standard deviation of R at the start")
    bases: Literal["svd", "random"] = Setting("svd", "where A and B come from: the weight's SVD, or the seed")
    iterations: int = Setting(0, "power iterations of a randomised SVD; 0 for the exact SVD", ge=0)

    def setup(self, weight: Tensor) -> None:
        """Take the bases; R is zero, or drawn."""
        super().setup(weight)
        self.R = self.trainable(self.rank, self.rank, std=self.core_std)

    def bases_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """U_r (out, r) and S_r V_r^T (r, in), or random ones."""
        if self.bases == "random":
            A = self.draw.uniform(self.rank, self.shape.in_, bound=self.shape.in_**-0.5)
            return self.draw.uniform(self.shape.out, self.rank, bound=self.rank**-0.5), A
        if self.iterations:
            u, s, vh = randomised_svd(weight, self.rank, self.iterations, 0, self.draw.generator)
        else:
            u, s, vh = truncated_svd(weight, self.rank)  # (out, r), (r,), (r, in)
        return u, s.unsqueeze(1) * vh

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """A matrix has min(out, in) singular vectors and no more."""
        most = min(shape)
        if spec.rank > most:
            return [
                f"lora-xs takes at most min(out, in) = {most} singular vectors and rank is {spec.rank}: lower it there"
            ]
        return super().problems(spec, shape)
