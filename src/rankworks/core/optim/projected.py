"""Projected: what optimizers that work in a subspace of some weights' gradients have in common.

What is projected are the matrices that `targets` names (every linear layer but the head, and no embedding) where the
model trains them; everything else, also the factors of an adapter, is trained without a projection.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.optim.method import Group, OptimizerMethod, grouped
from rankworks.core.optim.products import Products
from rankworks.core.optim.projection import Side
from rankworks.core.targets import find_sites


class Projected(OptimizerMethod):
    """Base of the methods that project the gradients of some weights; their groups are marked `projected`."""

    most_dimensions: ClassVar[int] = 2
    """Weights of two to so many dimensions are projected."""

    rank: int = Rank(128, "rank r of the projected gradient")
    refresh: int = Setting(200, "steps from one subspace to the next", ge=1)
    scale: float = Positive(0.25, "factor on the projected step")
    side: Side = Setting("std", "which side of the gradient is projected; std: the shorter one")
    products: Products = Setting(
        "full", "of float32 matrices in and out of the subspace; fast: of bfloat16 on a CPU, TF32 on CUDA"
    )
    targets: str | list[str] = Setting("all-linear", "which weights are projected (see core/targets.py)")
    betas: tuple[float, float] = Setting((0.9, 0.999), "decays of the two moments")
    eps: float = Positive(1e-6, "added to the root, against division by zero")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The projected weights, and the others."""
        tensors = [site.tensor for site in find_sites(model, self.targets)]
        chosen = {id(tensor) for tensor in tensors if 2 <= tensor.dim() <= self.most_dimensions}

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            return 1.0, {"projected": id(parameter) in chosen}

        return grouped(model, lr, self.weight_decay, mark)

    def defaults(self, *names: str) -> Group:
        """Return settings by name, as the defaults of the groups."""
        return {name: getattr(self, name) for name in names}


def wide(tensor: Tensor) -> torch.dtype:
    """The type in which norms of a tensor are computed: its own, or float32 where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
