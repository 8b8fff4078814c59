"""Sensitivity: which of the trained numbers the loss depends on, smoothed over steps, with how sure that is.

    I = |w dL/dw|        I' <- b1 I' + (1 - b1) I        U' <- b2 U' + (1 - b2) |I - I'|   (with the new I')

Both averages start at 0 and have no correction for it. They are kept as elementwise as they are defined, two numbers
per trained one; a step makes one more for the time it takes. The score of a number is I' U', that of a rank the sum
over its tensors of the mean score of its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankworks.core.ranks.surgery import AXES


def per_rank(tensor: Tensor, name: str) -> Tensor:
    """Return the mean over a tensor's numbers of every rank, (rank,); `name` is A, B or gate."""
    return tensor if tensor.dim() == 1 else tensor.mean(dim=1 - AXES[name])


def slopes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return |w dL/dw| for every tensor; one without a gradient has zeros."""
    if not tensors:
        return []
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
    found = torch._foreach_mul([t.detach() for t in tensors], gradients)
    torch._foreach_abs_(found)
    return list(found)


class Smoothed:
    """I' and U' of the tensors of many sites, {"site.A": tensor, ...}; `update` takes them in one fixed order."""

    def __init__(self, beta1: float, beta2: float):
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in one step's gradients."""
        if not self.mean:
            self.mean = {name: torch.zeros_like(t) for name, t in tensors.items()}
            self.spread = {name: torch.zeros_like(t) for name, t in tensors.items()}
        now, mean, spread = slopes(list(tensors.values())), list(self.mean.values()), list(self.spread.values())
        if now:
            torch._foreach_lerp_(mean, now, 1 - self.beta1)
            torch._foreach_sub_(now, mean)
            torch._foreach_abs_(now)
            torch._foreach_lerp_(spread, now, 1 - self.beta2)

    def scores(self, site: str, names: Sequence[str]) -> Tensor:
        """Return the scores of a site's ranks, (rank,), from its tensors of these names."""
        total = torch.zeros(())
        for name in names:
            mean, spread = self.mean[f"{site}.{name}"], self.spread[f"{site}.{name}"]
            if mean.dim() == 1:
                score = mean * spread
            else:  # the mean of products, without a product of the tensor's size
                score = torch.linalg.vecdot(mean, spread, dim=1 - AXES[name]) / mean.shape[1 - AXES[name]]
            total = score if total.dim() == 0 else total + score
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return both averages."""
        return {"mean": dict(self.mean), "spread": dict(self.spread)}

    def load_state_dict(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Take averages back, each to where its tensor is now."""
        self.mean = {name: t.to(like[name], copy=True) for name, t in state["mean"].items()}
        self.spread = {name: t.to(like[name], copy=True) for name, t in state["spread"].items()}
