"""APOLLO: SGD with a rate per channel, which is what Adam does to the norms of a random projection of the gradient.

    R = P^T G  or  G Q,  N = direction of AdamW on R          P, Q random, N(0, 1/r), drawn anew every `refresh` steps
    phi_i = ||N_i|| / (||R_i|| + 1e-8)                        per channel along the longer side (scaling="channel"),
    phi   = ||N||_F / (||R||_F + 1e-8)                        or one for all (scaling="tensor")
    U = phi G,   U <- U min(1, limit ||U_{t-1}|| / ||U||)     core/optim/scaling.py, core/optim/limiter.py
    W <- W - lr_t sqrt(scale) U,   lr_t = lr sqrt(1 - b2^t) / (1 - b1^t)

`apollo-mini` is rank 1 with one factor for all and scale 128: E ||R||^2 = ||G||^2, but the norm of R's few numbers
estimates Adam's factor low, which sqrt(scale) makes good. The released code can multiply by sqrt(scale) before the
limiter or after it; the limiter compares norms with norms, so that both are the same step. eps is not corrected for the
bias and decay comes after the step (`W <- W - lr decay W`), as released.

State of a projected W (m, n): 2 r L numbers and one float32, the norm of the last U; the seed stands in the group. P is
drawn again at every step, on the CPU from (seed, name, number), r S numbers beside 2 m n r operations of the product.
`keep_projection` keeps it between refreshes instead: r S numbers more, for devices much faster than their host.
Source: arXiv:2412.05270, algorithm 1, and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.optim.method import Group
from rankworks.core.optim.moments import adam_direction, adam_step
from rankworks.core.optim.products import multiplying
from rankworks.core.optim.projected import Projected
from rankworks.core.optim.projection import Basis, basis_numbers, projected_shape
from rankworks.core.optim.projector import gaussian_basis
from rankworks.core.optim.scaling import Scaling, add_scaled, check_scaling, norm_ratio
from rankworks.core.optim.stepwise import Stepwise, count_step
from rankworks.core.registry import optimizer


@optimizer("apollo", title="APOLLO", year=2024, paper="arXiv:2412.05270")
class APOLLO(Projected):
    """The raw gradient, with Adam's rate per channel estimated in a random subspace."""

    rank: int = Rank(256, "rank r of the projected gradient; a quarter of the hidden size is usual")
    scale: float = Positive(1.0, "the step is multiplied by its root")
    scaling: Scaling | None = Setting(
        None, "Adam's factors on the gradient; null: channel, or tensor where side is full"
    )
    limit: float | None = Setting(1.01, "largest growth of the norm of the step; null: none", ge=1)
    seed: int = Setting(0, "of the projections")
    keep_projection: bool = Setting(False, "keep the projection between refreshes in place of drawing it again")

    @classmethod
    def agree(cls, spec: Any) -> None:
        """Both sides projected leave no channels."""
        super().agree(spec)
        check_scaling(spec.key, spec.scaling, spec.side)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        names = ("rank", "refresh", "scale", "side", "betas", "eps", "scaling", "limit", "seed", "keep_projection")
        return ScaledSGD(groups, lr=lr, weight_decay=self.weight_decay, **self.defaults(*names, "products"))

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """2 r L moments and one norm of a projected weight, two of every other number."""
        size, shape = parameter.element_size(), tuple(parameter.shape)
        if not group["projected"]:
            return 2 * parameter.numel() * size
        kept = basis_numbers(shape, self.rank, self.side) if self.keep_projection else 0
        norm = max(size, 4) if self.limit is not None else 0
        return size * (2 * math.prod(projected_shape(shape, self.rank, self.side)) + kept) + norm


@optimizer("apollo-mini", title="APOLLO-Mini", year=2024, paper="arXiv:2412.05270")
class APOLLOMini(APOLLO):
    """APOLLO in one random direction, with one factor per weight."""

    rank: int = Rank(1, "rank r of the projected gradient")
    scale: float = Positive(128.0, "the step is multiplied by its root")
    scaling: Scaling | None = Setting("tensor", "Adam's factors on the gradient: one per channel, or one for all")


class ScaledSGD(Stepwise):
    """APOLLO in the groups marked `projected`, AdamW elsewhere. State: step, moments of R, norm, and P, Q if kept."""

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, projected=False, **defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step along the raw gradient."""
        t = count_step(state)
        lr, decay, betas, eps = (group[name] for name in ("lr", "weight_decay", "betas", "eps"))
        if not group["projected"]:
            adam_step(parameter, gradient, state, t, betas, eps, lr, decay)
            return
        with multiplying(group.get("products", "full"), gradient.device):
            R = self._basis(state, gradient, group, t).into(gradient)
        N, factor = adam_direction(state, R, t, betas, eps)
        ratio = norm_ratio(N, R, tuple(gradient.shape), group["side"], group["scaling"])
        add_scaled(parameter, gradient, ratio, lr * factor * math.sqrt(group["scale"]), state, group["limit"])
        if decay:
            parameter.mul_(1 - lr * decay)

    def _basis(self, state: dict[str, Any], gradient: Tensor, group: Group, t: int) -> Basis:
        number, start = divmod(t - 1, group["refresh"])
        if group["keep_projection"] and start:
            return Basis(state.get("P"), state.get("Q"))
        basis = gaussian_basis(gradient, group["rank"], group["side"], group["seed"], self.name, number)
        if group["keep_projection"]:
            state |= {name: part for name, part in zip("PQ", basis, strict=True) if part is not None}
        return basis
