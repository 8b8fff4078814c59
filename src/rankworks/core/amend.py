"""Amendment: what a method of training does to low-rank changes on their way through the training forward pass.

    y = base(x) + amended(change)(x)

It stands on the delta that applies the factors (`Factored.amended`), and acts in training mode alone: evaluation,
merging, saving and exporting see the change as it is, and so do its own numbers, which it never touches. It may give
other factors of the same or another product, whose gradients go where it lets them, and add to the output; where a
layer's change is applied as a matrix (stacked experts, grouped convolutions) it may add to that.
"""

from __future__ import annotations

from torch import Tensor

from rankworks.core.delta import Factors
from rankworks.core.inputs import Input


class Amendment:
    """Leaves everything as it is; a subclass overrides what it changes."""

    def factors(self, factors: Factors) -> Factors:
        """Return the factors that act."""
        return factors

    def output(self, y: Tensor, x: Input) -> Tensor:
        """Return the output that acts, from y (..., out), the change's or the layer's, and the layer's input."""
        return y

    def matrix(self, change: Tensor) -> Tensor:
        """Return the change (out, in) that acts where it is applied as a matrix; its factors were amended before."""
        return change
