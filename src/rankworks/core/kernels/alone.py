"""alone: a product's operand whose gradient is wanted without the other's.

    T, H  ->  T, H as a constant         dL/dT as ever,  dL/dH is not computed

H stays a part of the graph, with a gradient that is not there (None), so that who counts the parameters a backward
pass has reached (several processes sum gradients when all are complete) still meets it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def alone(T: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Return T and H for a product in which T alone gets a gradient."""
    return _Alone.apply(T, H), H.detach()  # type: ignore[return-value]


class _Alone(torch.autograd.Function):
    """The identity of T, to which H is linked."""

    @staticmethod
    def forward(ctx: Any, T: Tensor, H: Tensor) -> Tensor:
        return T.view_as(T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        return g, None
