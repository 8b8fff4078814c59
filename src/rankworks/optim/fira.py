"""Fira: GaLore, and along what the projection leaves out a step as long as Adam makes those within.

    R = P^T G,   N = direction of AdamW on R                             as GaLore, of any side
    phi_i = ||N[:, i]|| / (||R[:, i]|| + 1e-8)                           per channel of the side that is not projected
    S = phi (G - P R),   S <- S min(1, limit ||S_{t-1}|| / ||S||)        core/optim/scaling.py, core/optim/limiter.py
    W <- W - lr_t (scale P N + S),   lr_t = lr sqrt(1 - b2^t) / (1 - b1^t)

The part left out is not multiplied by `scale`. A channel without a component in the subspace has phi = 0 and does not
move. scaling="tensor" has one phi = ||N|| / ||R|| for all, the paper's weaker variant; limit=None leaves the limiter
out.

residual="paper" is the equation. The released code takes G - scale P R for what is left out, since its way back
multiplies by scale: with 0.25 three quarters of the gradient within the subspace are stepped along twice.
residual="reference" does as it does, and the published numbers come from there; the default is the equation, whose
step is orthogonal to the subspace. Decay comes after the step (`W <- W - lr decay W`) and eps is not corrected for the
bias, as released. bits=8 keeps the moments in 8 bits.

State of a projected W (m, n): GaLore's 2 r L + r S numbers and one float32, the norm of the last S. subspace="dct" is
DCT-Fira: the vectors of a fixed cosine basis that the gradient lies along most, r int32 in the place of r S numbers,
and cheap enough for a refresh at every step (core/optim/dct.py).
Source: arXiv:2410.01623, algorithm 1, equations 6 to 9, and its released code; arXiv:2505.17967 for DCT-Fira.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.fields import Setting
from rankworks.core.optim.dct import INDEX, Columns, best_columns
from rankworks.core.optim.method import Group
from rankworks.core.optim.moments import adam_bytes, adam_direction, adam_step
from rankworks.core.optim.products import multiplying
from rankworks.core.optim.projected import Projected
from rankworks.core.optim.projection import Basis, add_back, basis_numbers, projected_shape, sides
from rankworks.core.optim.scaling import Scaling, add_scaled, check_scaling, norm_ratio
from rankworks.core.optim.stepwise import Stepwise, count_step
from rankworks.core.optim.subspace import Subspace, find_basis
from rankworks.core.registry import optimizer


@optimizer("fira", title="Fira", year=2024, paper="arXiv:2410.01623")
class Fira(Projected):
    """AdamW in a subspace, and scaled gradients outside it."""

    residual: Literal["paper", "reference"] = Setting("paper", "what is left out: G - P R, or G - scale P R")
    scaling: Scaling | None = Setting(None, "factors on what is left out; null: channel, or tensor where side is full")
    limit: float | None = Setting(1.01, "largest growth of the norm of what is left out; null: none", ge=1)
    subspace: Literal[Subspace, "dct"] = Setting(
        "warm", "how the subspace is found: from the one before, from probes, exactly, or among cosines"
    )
    seed: int = Setting(0, "of the random probes of the first subspace")
    bits: Literal[8] | None = Setting(None, "8: moments in blocks of 8 bits; null: in the weight's type")

    @classmethod
    def agree(cls, spec: Any) -> None:
        """Both sides projected leave no channels."""
        super().agree(spec)
        check_scaling(spec.key, spec.scaling, spec.side)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        names = ("rank", "refresh", "scale", "side", "betas", "eps", "residual", "scaling", "limit", "subspace", "seed")
        return FiraAdamW(groups, lr=lr, weight_decay=self.weight_decay, **self.defaults(*names, "bits", "products"))

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """2 r L moments, r S numbers of the basis and one norm of a projected weight, two of every other number."""
        size, shape = parameter.element_size(), tuple(parameter.shape)
        if not group["projected"]:
            return adam_bytes(parameter.numel(), size, self.bits)
        moments = adam_bytes(math.prod(projected_shape(shape, self.rank, self.side)), size, self.bits)
        norm = max(size, 4) if self.limit is not None else 0
        if self.subspace == "dct":
            return moments + INDEX * min(self.rank, *shape) * sum(sides(shape, self.side)) + norm
        return moments + size * basis_numbers(shape, self.rank, self.side) + norm


class FiraAdamW(Stepwise):
    """Fira in the groups marked `projected`, AdamW elsewhere. State: step, moments, P, Q, norm."""

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, projected=False, **defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step within the subspace and one along what it leaves out."""
        t = count_step(state)
        lr, decay, betas, eps, bits = (group[name] for name in ("lr", "weight_decay", "betas", "eps", "bits"))
        if not group["projected"]:
            adam_step(parameter, gradient, state, t, betas, eps, lr, decay, bits=bits)
            return
        with multiplying(group.get("products", "full"), gradient.device):
            basis = self._basis(state, gradient, group, t)
            R = basis.into(gradient)
            N, factor = adam_direction(state, R, t, betas, eps, bits=bits)
            ratio = norm_ratio(N, R, tuple(gradient.shape), group["side"], group["scaling"])
            rest = gradient.clone()  # (m, n)
            add_back(rest, basis, R, -1.0 if group["residual"] == "paper" else -group["scale"])
            add_back(parameter, basis, N, -lr * factor * group["scale"])
        add_scaled(parameter, rest, ratio, lr * factor, state, group["limit"])
        if decay:
            parameter.mul_(1 - lr * decay)

    def _basis(self, state: dict[str, Any], gradient: Tensor, group: Group, t: int) -> Basis:
        refreshed = (t - 1) % group["refresh"] == 0
        if group["subspace"] == "dct":
            if refreshed:
                chosen = best_columns(gradient, group["rank"], group["side"])
                state |= {name: index for name, index in zip("PQ", chosen, strict=True) if index is not None}
            return Columns(state.get("P"), state.get("Q")).basis(gradient)
        old = Basis(state.get("P"), state.get("Q"))
        if not refreshed:
            return old
        draw, before = Draw(group["seed"], f"{self.name}:{t}"), None if t == 1 else old
        found = find_basis(gradient, group["rank"], group["side"], group["subspace"], before, draw)
        state |= {name: part for name, part in zip("PQ", found, strict=True) if part is not None}
        return found
