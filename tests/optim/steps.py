"""Seeded numbers, and one step of an optimizer on one parameter: what the tests of single steps share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: Tensor) -> Tensor:
    """How a step on this gradient moves the parameter."""
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach() - before
