"""What can be measured at a site on data: one small class per statistic, found by its name.

A statistic sees a site once per use of its layer and once per batch, and keeps its sums on the CPU in at least float32.
A new one is a class here with a name in `STATISTICS`: `backward` says whether it needs gradients at all.

    gradient              mean over batches of G, the gradient of the batch's loss in the weight     (out, in)
    gradient_magnitude    mean over batches of |G|                                                   (out, in)
    fisher                mean over batches of G^2, the diagonal of the empirical Fisher matrix where a batch is
                          one sample                                                                 (out, in)
    input_second_moment   mean over tokens of x x^T, x what the weight multiplies                    (in, in)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rankworks.core.site import Shape


class Statistic:
    """One statistic of one site."""

    backward: ClassVar[bool] = False

    def read(self, x: Tensor) -> None:
        """Take the inputs (n, in) of one use of the layer."""

    def gradient(self, G: Tensor) -> None:
        """Take the gradient (out, in) of one batch's loss, over all uses of the layer in it."""

    def result(self) -> Tensor | dict[str, Tensor]:
        """Return the mean; a statistic of several parts returns them by name."""
        raise TypeError(f"{type(self).__name__} must define result()")

    def example(self, shape: Shape, generator: torch.Generator) -> Tensor | dict[str, Tensor]:
        """Return a random result for a weight of this shape, for tests of what starts from it."""
        return torch.randn(shape.out, shape.in_, generator=generator)


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

    def result(self) -> Tensor:
        """The mean over batches."""
        assert self.total is not None
        return self.total / self.batches


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
    """The mean outer product of the inputs."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def read(self, x: Tensor) -> None:
        """Add one use's."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        outer = (x.t() @ x).cpu()  # (in, in)
        self.total = outer if self.total is None else self.total.add_(outer)
        self.tokens += len(x)

    def result(self) -> Tensor:
        """The mean over tokens."""
        assert self.total is not None
        return self.total / self.tokens

    def example(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """Of as many random inputs as there are features, and a few more."""
        x = torch.randn(shape.in_ + 4, shape.in_, generator=generator)
        return x.t() @ x / len(x)


STATISTICS: dict[str, Any] = {
    "gradient": Gradient,
    "gradient_magnitude": GradientMagnitude,
    "fisher": Fisher,
    "input_second_moment": InputSecondMoment,
}
