"""Weight compander: every weight passes through a bounded odd function that widens small weights and limits large ones.

    W' = W + psi_{a,b}(v0 + d) - psi_{a0,b0}(v0)        psi_{a,b}(v) = a f(v / b),  f = arctan (default) or tanh

v0 = b0 f^-1(W / a0) is the pretrained weight seen through psi, so the last term is W but for rounding and
W' = psi(v0 + d); written as a difference, the start (d = 0, a = a0, b = b0) is the base to the bit. d (out, in) is
trained: every weight is. a and b are trained too (`learn`), one pair per weight tensor, as a = a0 exp(alpha),
b = b0 exp(beta), so that they stay positive. With t = (v0 + d) / b:

    dW'/dd = (a / b) f'(t)      f'(t) = 1 / (1 + t^2) for arctan, 1 - f(t)^2 for tanh       |W'| < a sup f

Where the weight comes from (the method is a recipe from scratch, and as a delta has to meet a pretrained W):
a0 = `margin` max|W| / sup f, so that every W has a preimage well inside; b0 = a0 / `slope`, the slope of psi at zero.
The default slope 1 / 0.6706 is the one that keeps the variance of a normal v (E arctan(z)^2 = 0.6706^2) when b is its
standard deviation; above 1 it widens small weights, as the paper asks. margin -> infinity with slope 1 is plain
training of W. The paper's own psi and granularity could not be read beyond its abstract: any odd bounded increasing
function with slope above 1 fits it, hence the choice `psi`. v0 is computed from W again in each pass, not kept.
Weight decay of d draws W' back to the pretrained W. Source: arXiv:2306.16993.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rankworks.core.fields import Positive, Setting
from rankworks.core.forms.whole import Whole
from rankworks.core.registry import delta
from rankworks.core.site import Shape


class Psi(NamedTuple):
    """An odd, increasing, bounded function of slope 1 at zero, its inverse and its supremum."""

    f: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    limit: float


PSI = {"arctan": Psi(torch.atan, torch.tan, math.pi / 2), "tanh": Psi(torch.tanh, torch.atanh, 1.0)}


@delta("weight-compander", title="Weight compander", year=2023, paper="arXiv:2306.16993")
class WeightCompander(Whole):
    """The whole weight, trained before a bounded function."""

    additive: ClassVar[bool] = False

    psi: Literal["arctan", "tanh"] = Setting("arctan", "the function that every weight passes through")
    margin: float = Setting(1.1, "bound of the weights over the largest pretrained one", gt=1)
    slope: float = Positive(1.4912, "slope a/b of the function at zero; above 1 small weights move more")
    learn: bool = Setting(True, "train the bound a and the width b of each weight tensor too")

    def setup(self, weight: Tensor) -> None:
        """d = 0 and a, b at their start; the start's a0 and b0 follow from the weight."""
        largest = weight.abs().max().to(torch.promote_types(weight.dtype, torch.float32))
        largest = torch.where(largest > 0, largest, 1 / math.sqrt(self.shape.in_))  # a weight of zeros has any bound
        self.bound = self.frozen(self.margin * largest / PSI[self.psi].limit)  # a0, a scalar
        self.d = self.trainable(*self.shape)
        if self.learn:
            self.alpha, self.beta = self.trainable(1), self.trainable(1)

    def dense(self, weight: Tensor) -> Tensor:
        """psi(v0 + d) - psi0(v0), elementwise: (out, in)."""
        f, inverse, _ = PSI[self.psi]
        a, b = self.bound.to(self.d.dtype), (self.bound / self.slope).to(self.d.dtype)
        z = inverse(weight.to(self.d.dtype) / a)  # v0 / b0
        if not self.learn:
            return a * (f(z + self.d / b) - f(z))
        return a * (self.alpha.exp() * f((z + self.d / b) * torch.exp(-self.beta)) - f(z))

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """Every weight, and a and b."""
        return shape.out * shape.in_ + 2 * spec.learn
