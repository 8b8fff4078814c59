"""A weight and FRUGAL's optimizer on it alone, for tests of single steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.optim.blocks import Blocks
from rankworks.optim.frugal import SplitOptimizer

DEFAULTS: dict[str, Any] = {
    "refresh": 200, "projection": "columns", "side": "std", "subspace": "svd", "moments": "reset", "rule": "adamw",
    "rest": "sign_sgd", "scale": 1.0, "rest_scale": 1.0, "momentum": 0.9, "betas": (0.9, 0.999), "eps": 1e-8,
    "seed": 0, "weight_decay": 0.0,
}  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(weight: Tensor, density: float = 0.5, lr: float = 0.1, **settings: Any) -> tuple[nn.Parameter, SplitOptimizer]:
    """A weight that is projected."""
    parameter = nn.Parameter(weight.clone())
    settings = {**DEFAULTS, **settings}
    blocks = Blocks(["w"], round(density)) if settings["projection"] == "block" else None
    group = {"params": [parameter], "names": ["w"], "projected": True, "density": density}
    return parameter, SplitOptimizer([group], blocks, lr=lr, **settings)


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: Tensor) -> Tensor:
    """Take a step and return how the weight moved."""
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach() - before
