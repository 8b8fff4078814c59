"""GaLore: the optimizer runs on a projection of the gradient into a subspace that is found anew every so often.

    every `refresh` steps   G = U S V^T,  P = U[:, :r] or Q = V[:, :r]           (core/optim/projection.py: which side)
    every step              R = P^T G  or  G Q;  N = direction of AdamW on R     m, v of R's shape
                            W <- W - lr_t scale back(N),  lr_t = lr sqrt(1 - b2^t) / (1 - b1^t)

with N = m / (sqrt(v) + eps): eps is not corrected for the bias, and decay comes after the step, as in the released
code (`W <- W - lr decay W`); torch's AdamW differs there by eps alone. The moments are neither rotated nor reset when
the subspace changes. What is projected are the matrices that `targets` names (every linear layer but the head, and no
embedding), everything else is trained by the same rule without a projection.

State of a projected W (m, n), L and S its longer and shorter side: 2 r L moments and r S numbers of the basis. The
basis is a function of a past gradient, so it is saved. r is at most S.
Source: arXiv:2403.03507, algorithms 1 and 2, and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.optim.method import Group, OptimizerMethod, grouped
from rankworks.core.optim.moments import adam_direction
from rankworks.core.optim.projection import Basis, Side, add_back, leading_basis, projected_shape, sides
from rankworks.core.optim.stepwise import Stepwise, count_step
from rankworks.core.registry import optimizer
from rankworks.core.targets import find_sites


@optimizer("galore", title="GaLore", year=2024, paper="arXiv:2403.03507")
class GaLore(OptimizerMethod):
    """AdamW in a subspace of every gradient."""

    rank: int = Rank(128, "rank r of the projected gradient")
    refresh: int = Setting(200, "steps from one subspace to the next", ge=1)
    scale: float = Positive(0.25, "factor on the projected step")
    side: Side = Setting("std", "which side of the gradient is projected; std: the shorter one")
    targets: str | list[str] = Setting("all-linear", "which weights are projected (see core/targets.py)")
    betas: tuple[float, float] = Setting((0.9, 0.999), "decays of the two moments")
    eps: float = Positive(1e-6, "added to the root, against division by zero")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The projected weights, and the others."""
        chosen = {id(site.tensor) for site in find_sites(model, self.targets) if site.tensor.dim() == 2}

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            return 1.0, {"projected": id(parameter) in chosen}

        return grouped(model, lr, self.weight_decay, mark)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        defaults = {name: getattr(self, name) for name in ("rank", "refresh", "scale", "side", "betas", "eps")}
        return ProjectedAdamW(groups, lr=lr, weight_decay=self.weight_decay, **defaults)

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """2 r L + r S numbers of a projected weight, two of every other number."""
        numbers = 2 * parameter.numel()
        if group["projected"]:
            shape, r = tuple(parameter.shape), min(self.rank, *parameter.shape)
            basis = sum(r * length for length, yes in zip(shape, sides(shape, self.side), strict=True) if yes)
            numbers = 2 * math.prod(projected_shape(shape, self.rank, self.side)) + basis
        return numbers * parameter.element_size()


class ProjectedAdamW(Stepwise):
    """AdamW, on projected gradients in the groups marked `projected`. State: step, exp_avg, exp_avg_sq, P, Q."""

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, projected=False, **defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step along the direction of AdamW on R, taken back."""
        t = count_step(state)
        basis = self._basis(state, gradient, group, t)
        R = gradient if basis is None else basis.into(gradient)
        N, factor = adam_direction(state, R, t, group["betas"], group["eps"])
        if basis is None:
            parameter.add_(N, alpha=-group["lr"] * factor)
        else:
            add_back(parameter, basis, N, -group["lr"] * factor * group["scale"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _basis(self, state: dict[str, Any], gradient: Tensor, group: Group, t: int) -> Basis | None:
        if not group["projected"]:
            return None
        if (t - 1) % group["refresh"] == 0:
            found = leading_basis(gradient, group["rank"], group["side"])
            state |= {name: part for name, part in zip("PQ", found, strict=True) if part is not None}
        return Basis(state.get("P"), state.get("Q"))
