"""CorDA: split the weight along what its inputs are; adapt the part they use most, or the part they use least.

    C = mean over tokens of x x^T (in, in)        W C = U S V^T        W = U S (V^T C^-1)
    B = U_k (S_k/s)^(1/2)  (out, r),   A = (S_k/s)^(1/2) V_k^T C^-1  (r, in),   s = the delta's scale

k are the r largest components in the mode "instruction" (adapt to the data), the r smallest in "knowledge" (keep what
the data stand for). In the first (s B A) C is the best rank-r approximation of W C, so B A is what matters most to the
layer's output on these data. As for PiSSA the base is not rewritten: the delta is s (B A - B0 A0), and the start is
exact.

C is singular where there are fewer tokens than features: `damping` times its mean diagonal is added to the diagonal,
and doubled until |C C^-1 - I|_F < 0.05 in the type computed in. C, damped, is what stands in all of the above.
`normalise="sample"` is the released code's C: each sample's inputs divided by |their largest number|; the paper's
equation has none, and it only weighs the samples, since a multiple of C gives the same A and B.
`iterations` > 0 finds the largest components by a randomised SVD, in a fraction of the time, as PiSSA's does.
Source: arXiv:2406.05223, section 3, and its released code.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankworks.core.errors import ConfigError
from rankworks.core.evidence import Need
from rankworks.core.fields import Positive, Setting
from rankworks.core.registry import init
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, Start
from rankworks.linalg import randomised_svd, truncated_svd

GOOD = 0.05  # |C C^-1 - I|_F of an inverse that is taken


@init("corda", title="CorDA", year=2024, paper="arXiv:2406.05223")
class CorDA(Init):
    """The largest or smallest components of W C, balanced between the factors."""

    kinds: ClassVar[tuple[str, ...] | None] = ("linear", "conv1d_hf", "conv", "rows")
    grouped: ClassVar[bool] = False
    from_base: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    mode: Literal["instruction", "knowledge"] = Setting(
        "instruction", "adapt the components the data use most, or those they use least"
    )
    normalise: Literal["none", "sample"] = Setting("none", "divide each sample's inputs by |their largest number|")
    damping: float = Positive(0.01, "added to C's diagonal, in parts of its mean; doubled until C can be inverted")
    iterations: int = Setting(0, "power iterations of a randomised SVD; 0 for the exact SVD", ge=0)

    @classmethod
    def needs(cls, spec: Any) -> tuple[str | Need, ...]:
        """The second moment of the inputs."""
        return (Need("input_second_moment", {} if spec.normalise == "none" else {"normalise": spec.normalise}),)

    def start(self, place: Place) -> Start:
        """Return the factors for a weight (out, in)."""
        C, inverse = damped(place.evidence["input_second_moment"].to(place.weight), self.damping)
        product = place.weight @ C  # (out, in)
        if self.iterations:
            u, s, vh = randomised_svd(product, place.rank, self.iterations, 0, place.draw.generator)
        elif self.mode == "instruction":
            u, s, vh = truncated_svd(product, place.rank)
        else:
            u, s, vh = truncated_svd(product, min(product.shape))
            u, s, vh = u[:, -place.rank :], s[-place.rank :], vh[-place.rank :]
        root = (s / place.scale).sqrt()  # (r,)
        return Start(A=root.unsqueeze(1) * (vh @ inverse), B=u * root, from_base=True)

    def problems(self, shape: Shape, rank: int) -> list[str]:
        """A matrix has min(out, in) singular values and no more, and subspace iteration finds the largest."""
        most, found = min(shape), []
        if rank > most:
            found.append(f"corda takes at most min(out, in) = {most} components and rank is {rank}: lower it there")
        if self.iterations and self.mode == "knowledge":
            found.append(
                "a randomised SVD finds the largest components, and corda's mode knowledge takes the smallest: set "
                "iterations to 0"
            )
        return found


def damped(C: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return C (in, in) plus a multiple of its mean diagonal, and the inverse of that. Raises `ConfigError`.

    C is symmetric and has no negative eigenvalue, so that the sum has a Cholesky factor once rounding is outweighed.
    """
    mean, one = C.diagonal().mean(), torch.eye(len(C), dtype=C.dtype, device=C.device)
    if not (torch.isfinite(mean) and mean > 0):
        raise ConfigError(
            "corda found inputs that are all zero, or not finite, at a site: leave it out of targets (exclude)."
        )
    while True:
        whole = C + damping * mean * one
        factor, failed = torch.linalg.cholesky_ex(whole)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            if torch.linalg.matrix_norm(whole @ inverse - one) < GOOD:
                return whole, inverse
        damping *= 2
