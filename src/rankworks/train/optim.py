"""A run's learning rates: the optimizers themselves stand in `rankworks.optim`."""

from __future__ import annotations

import torch

from rankworks.core.rates import learning_rate_factor
from rankworks.optim import make_optimizer

__all__ = ["learning_rate_factor", "make_optimizer", "set_learning_rate"]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's rate to `factor` times the rate it was made with; return the first group's rate."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
