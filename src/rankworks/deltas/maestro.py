"""Maestro's layer: two factors trained in place of the weight, from its own singular value decomposition.

    W' = B A        W = U diag(S) V^T,  B = U diag(sqrt S) (out, r),  A = diag(sqrt S) V^T (r, in)

r = min(out, in) by default, and the function at the start is the base's to rounding; a smaller `rank` starts from the
best approximation of that rank (the fixed-ratio baseline, Pufferfish). The frozen weight is read at the start alone:
a layer costs r (in + out) products per token, a convolution its kernel with r outputs and then a 1 x 1 one, with the
base's stride, padding, dilation and bias. With `bias` a shift c (out,) is trained too. With G = dL/dW', dL/dA = B^T G
and dL/dB = G A^T.

`ranks="maestro"` orders the ranks by importance and shrinks them while training (ranks/maestro.py); it may go down to
0, where the layer gives its bias alone. As a change beside the base it is B A - W, of full rank: merging and exporting
merged are exact. `rankworks.compress.factorised` counts where B A is cheaper than the product.
Source: arXiv:2308.14929, section 3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankworks.core.delta import Base
from rankworks.core.fields import Setting
from rankworks.core.forms.lowrank import Pair
from rankworks.core.inputs import Input, linear
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.linalg.balanced import balanced_factors


@delta("maestro", title="Maestro", year=2023, paper="arXiv:2308.14929")
class Maestro(Pair):
    """W' = B A."""

    additive: ClassVar[bool] = False
    unchanged_at_init: ClassVar[bool] = False  # to rounding, at full rank

    rank: int | None = Setting(None, "how many ranks there are; None: min(out, in)", ge=0, le=65536)
    bias: bool = Setting(False, "also train a shift of the bias")

    scale: float = 1.0
    c: nn.Parameter | None

    def setup(self, weight: Tensor) -> None:
        """Allocate the factors; they start in `reset`, and a loaded adapter brings its own."""
        self.rank = width_of(self.spec, self.shape)
        self.A, self.B = self.trainable(self.rank, self.shape.in_), self.trainable(self.shape.out, self.rank)
        self.c = self.trainable(self.shape.out) if self.bias else None

    @torch.no_grad()
    def reset(self, weight: Tensor, init: Any) -> None:
        """Factor the weight."""
        B, A = balanced_factors(weight, len(self.A))
        self.B.copy_(B)
        self.A.copy_(A)

    def forward(self, x: Input, base: Base) -> Tensor:
        """B A x + b + c, without the frozen product."""
        B, A = self.acting()
        bias, h = base.bias, linear(x, A)  # (..., r)
        if self.c is not None:
            bias = self.c if bias is None else bias.to(self.c.dtype) + self.c
        return F.linear(h, B.to(h.dtype), None if bias is None else bias.to(h.dtype))

    def dense(self, weight: Tensor) -> Tensor:
        """B A - W (out, in)."""
        B, A = self.acting()
        return B @ A - weight.to(A.dtype)

    def bias_change(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """c."""
        return self.c

    def adopt(self, spec: Any) -> None:
        """Take other settings; the factors are made again, as zeros, where the rank is another."""
        self.spec = spec
        rank = width_of(spec, self.shape)
        if rank != self.rank:
            self.A = nn.Parameter(self.A.data.new_zeros(rank, self.shape.in_))
            self.B = nn.Parameter(self.B.data.new_zeros(self.shape.out, rank))
        self.rank = rank

    def settle(self, rank: int, scale: float) -> None:
        """There is no scale."""
        self.spec, self.rank = self.spec.replace(rank=rank), rank

    @classmethod
    def pair_rank(cls, spec: Any, shape: Shape) -> int:
        """The rank."""
        return width_of(spec, shape)

    @classmethod
    def changes_bias(cls, spec: Any) -> bool:
        """With `bias`."""
        return spec.bias

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank (in + out), and out with `bias`."""
        return width_of(spec, shape) * (shape.in_ + shape.out) + spec.bias * shape.out

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """A matrix has min(out, in) singular vectors and no more."""
        if spec.rank == 0:
            return ["rank 0 leaves nothing to train: leave the rank out for all there is, or exclude the site"]
        if spec.rank is not None and spec.rank > min(shape):
            return [
                f"maestro takes at most min(out, in) = {min(shape)} singular vectors and rank is {spec.rank}: lower it "
                "there, or leave it out"
            ]
        return []


def width_of(spec: Any, shape: Shape) -> int:
    """Return how many ranks these settings mean at a weight of this shape."""
    return min(shape) if spec.rank is None else spec.rank
