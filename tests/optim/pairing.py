"""Small pieces that the tests of optimizers of pairs share: a pair with the gradients of a known G, and its groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class OnePair:
    """A pair A (r, n), B (m, r) with scale s, and what it is told by a gradient G of the weight."""

    def __init__(self, m: int = 7, n: int = 9, r: int = 3, s: float = 1.7, seed: int = 0):
        self.A = nn.Parameter(draw(r, n, seed=seed) / n**0.5)
        self.B = nn.Parameter(draw(m, r, seed=seed + 1))
        self.s = s

    @property
    def change(self) -> Tensor:
        return (self.s * self.B @ self.A).detach()

    def group(self) -> dict[str, Any]:
        return {"params": [self.A, self.B], "names": ["a.A", "a.B"], "scales": [self.s], "paired": True}

    def feel(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """Give the factors the gradients that G (m, n) means for them."""
        self.A.grad, self.B.grad = self.s * self.B.detach().t() @ G, self.s * G @ self.A.detach().t()
        return self.A.grad, self.B.grad

    def projectors(self) -> tuple[Tensor, Tensor]:
        """P_B (m, m), P_A (n, n)."""
        A, B = self.A.detach(), self.B.detach()
        return B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A


def matrices(model: nn.Module, ends: str | tuple[str, ...]) -> dict[str, Tensor]:
    """Copies of the trained parameters whose names end so."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(ends) and p.requires_grad}
