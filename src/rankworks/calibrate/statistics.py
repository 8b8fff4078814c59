"""What can be measured at a site on data, found by its name.

gradient              mean over batches of G, the gradient of the batch's loss in the weight     (out, in)
gradient_magnitude    mean over batches of |G|                                                   (out, in)
fisher                mean over batches of G^2, the diagonal of the empirical Fisher matrix where a batch is
                      one sample                                                                 (out, in)
input_second_moment   mean over tokens of x x^T, x what the weight multiplies                    (in, in)
input_svd             the principal directions of the inputs (calibrate/input_svd.py)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankworks.calibrate.input_svd import InputSVD
from rankworks.calibrate.statistic import UNUSED, Statistic, Tokens
from rankworks.core.site import Shape


class Gradient(Statistic):
    """The mean gradient of the weight."""

    backward: ClassVar[bool] = True

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.batches = 0

    def gradient(self, G: Tensor) -> None:
        """Add one batch's."""
        G = self._of(G).to("cpu", torch.promote_types(G.dtype, torch.float32))
        self.total = G.clone() if self.total is None else self.total.add_(G)
        self.batches += 1

    def _of(self, G: Tensor) -> Tensor:
        return G

    def lacks(self) -> str | None:
        """No gradient came."""
        return UNUSED if self.total is None else None

    def result(self) -> Tensor:
        """The mean over batches."""
        assert self.total is not None
        self.total, self.batches = self.total.div_(self.batches), 1  # in place: a copy of all sites' sums is much
        return self.total


class GradientMagnitude(Gradient):
    """The mean absolute gradient of the weight."""

    def _of(self, G: Tensor) -> Tensor:
        return G.abs()

    def example(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """Not negative."""
        return torch.randn(shape.out, shape.in_, generator=generator).abs()


class Fisher(Gradient):
    """The mean squared gradient of the weight."""

    def _of(self, G: Tensor) -> Tensor:
        return G.to(torch.promote_types(G.dtype, torch.float32)).square()

    def example(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """Not negative."""
        return torch.randn(shape.out, shape.in_, generator=generator).square()


class InputSecondMoment(Statistic):
    """The mean outer product of the inputs.

    With `normalise="sample"` every sample's inputs are first divided by |their largest number|, as CorDA's released
    code does; the mean is still over tokens.
    """

    def __init__(self, normalise: Literal["none", "sample"] = "none", tokens: Tokens = "attended"):
        self.normalise, self.tokens = normalise, tokens
        self.total: Tensor | None = None
        self.count = 0

    def read(self, x: Tensor, samples: Tensor) -> None:
        """Add one use's."""
        if not len(x):
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.normalise == "sample":
            x = x / _largest(x, samples).unsqueeze(1)
        if self.total is None:
            self.total = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
        if x.device == self.total.device:
            self.total.addmm_(x.t(), x)  # (in, in)
        else:
            self.total.add_((x.t() @ x).cpu())
        self.count += len(x)

    def lacks(self) -> str | None:
        """No input came."""
        return UNUSED if self.total is None else None

    def result(self) -> Tensor:
        """The mean over tokens."""
        assert self.total is not None
        self.total, self.count = self.total.div_(self.count), 1
        return self.total

    def example(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """Of as many random inputs as there are features, and a few more."""
        x = torch.randn(shape.in_ + 4, shape.in_, generator=generator)
        return x.t() @ x / len(x)


def _largest(x: Tensor, samples: Tensor) -> Tensor:
    """Return for each row of (n, in) |the largest number of its sample|, or 1 where that is 0: (n,)."""
    rows = x.amax(1)
    found = rows.new_full((int(samples.max()) + 1,), -torch.inf).scatter_reduce_(0, samples, rows, "amax").abs()
    return torch.where(found == 0, 1.0, found)[samples]


STATISTICS: dict[str, Any] = {
    "gradient": Gradient,
    "gradient_magnitude": GradientMagnitude,
    "fisher": Fisher,
    "input_second_moment": InputSecondMoment,
    "input_svd": InputSVD,
}
