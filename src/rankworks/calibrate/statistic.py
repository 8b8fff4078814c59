"""Statistic: what is measured at a site on data. A new one is a subclass with a name in `statistics.STATISTICS`.

A statistic of gradients sees a site once per batch; one of inputs once per use of its layer, the tokens that count and
no padding, and once for all the sites that read the very same tensor. Sums stand on the CPU in at least float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankworks.core.site import Shape

Tokens = Literal["attended", "labelled"]


class Statistic:
    """One statistic of one site, or of all sites that read the same inputs."""

    backward: ClassVar[bool] = False
    tokens: Tokens = "attended"  # whose inputs: of all but padding, or where a label counts too
    passes: int = 1  # how often it may see the data, until it is done
    done: bool = False  # it needs no more data for now
    spent: bool = False  # it has seen the data as often as it may

    @property
    def idle(self) -> bool:
        """Whether it takes nothing now."""
        return self.done or self.spent

    def read(self, x: Tensor, samples: Tensor) -> None:
        """Take the inputs (n, in) of one use of the layer, and the sample (n,) of the batch that each belongs to."""

    def gradient(self, G: Tensor) -> None:
        """Take the gradient (out, in) of one batch's loss, over all uses of the layer in it."""

    @classmethod
    def settle(cls, statistics: Mapping[str, Any]) -> None:
        """Decide after a batch, across sites {name: statistic}, which are `done`."""

    def lacks(self) -> str | None:
        """Return why there is no result, as the end of a sentence on the site, or None."""
        return None

    def result(self) -> Tensor | dict[str, Tensor]:
        """Return the mean; a statistic of several parts returns them by name."""
        raise TypeError(f"{type(self).__name__} must define result()")

    def example(self, shape: Shape, generator: torch.Generator) -> Tensor | dict[str, Tensor]:
        """Return a random result for a weight of this shape, for tests of what starts from it."""
        return torch.randn(shape.out, shape.in_, generator=generator)


UNUSED = (
    "took no part in the loss of these data, so nothing could be measured there: leave it out of targets (exclude), or "
    "give data that use it"
)
