"""Trion: orthogonal steps of low rank, of the part of the momentum that lies along the best vectors of a cosine basis.

    M <- M + G
    index, b = the r best vectors of M and its projection    (core/optim/dct.py)
    M <- M - (1 - momentum) back(b)
    o = Newton-Schulz(b): X = b / (||b||_F + 1e-7), `iterations` times
        X <- 3.4445 X + (-4.7750 C + 2.0315 C^2) X,  C = X X^T,  along the shorter side
    W <- (1 - lr decay) W - lr k back(o),  k by `size`:
        none 1      kj sqrt(max(1, m/n))      kimi 0.2 sqrt(max(m, n))      dion sqrt(m/n)

It is Dion with a choice among fixed vectors in the place of its power iteration and QR. The short side of W (m, n) is
projected. What is outside the subspace stays in M whole, what is inside decays, as in an error feedback. Everything
that `targets` does not name is trained by AdamW, with betas and eps of its own and `other_rate` times the rate
(released: 3e-4 beside 0.02).

The iteration runs in bfloat16 as released, or in float32 or more (`precision: full`); its five steps bring singular
values to between 0.68 and 1.13, not to 1. The published rules for k come without a default; `kj` is the one that goes
with the rate 0.02. Not taken over: on the left side the released code's FFT form takes vectors of the other basis.

State of a projected W: M, m n numbers. The r indices are chosen anew at every step, so they are not kept between steps.
Source: arXiv:2505.17967, algorithm of Trion, and its released code.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankworks.core.fields import Positive, Probability, Rank, Setting
from rankworks.core.optim.cosine import AlongCosines, matrices_at, short_basis
from rankworks.core.optim.dct import Route, Vectors, select
from rankworks.core.optim.method import Group, OptimizerMethod, grouped
from rankworks.core.optim.projection import add_back
from rankworks.core.registry import optimizer
from rankworks.linalg.newton_schulz import newton_schulz

Size = Literal["none", "kj", "kimi", "dion"]
SETTINGS = ("rank", "momentum", "size", "iterations", "precision", "norm", "vectors", "route", "betas", "eps")


@optimizer("trion", title="Trion", year=2025, paper="arXiv:2505.17967")
class Trion(OptimizerMethod):
    """Orthogonal steps in a subspace of the cosine basis."""

    rank: int = Rank(128, "rank r of a step")
    momentum: float = Probability(0.95, "share of the momentum in the subspace that stays")
    size: Size = Setting("kj", "the factor k on a step by the weight's shape")
    iterations: int = Setting(5, "steps of Newton-Schulz", ge=1)
    precision: Literal["bfloat16", "full"] = Setting(
        "bfloat16", "in which they are taken; full: float32 or the weight's"
    )
    norm: Literal[1, 2] = Setting(1, "by which vectors are ranked; 2 loses least")
    vectors: Vectors = Setting("dct2", "dct2: cosines; dct3: the transposed basis")
    route: Route = Setting(
        "auto", "how the momentum is compared with the basis: a product, an FFT, or by size and device"
    )
    targets: str | list[str] = Setting("all-linear", "which weights take such steps (see core/targets.py)")
    other_rate: float = Positive(0.015, "rate of everything else over that of these weights")
    betas: tuple[float, float] = Setting((0.9, 0.95), "decays of the two moments of everything else")
    eps: float = Positive(1e-10, "added to the root there, against division by zero")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The projected weights, and the others at their own rate."""
        chosen = matrices_at(model, self.targets)

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            projected = id(parameter) in chosen
            return 1.0 if projected else self.other_rate, {"projected": projected}

        return grouped(model, lr, self.weight_decay, mark)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        defaults = {name: getattr(self, name) for name in SETTINGS}
        return OrthogonalDCT(groups, lr=lr, weight_decay=self.weight_decay, **defaults)

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """One number of a projected weight, two of every other."""
        return (1 if group["projected"] else 2) * parameter.numel() * parameter.element_size()


class OrthogonalDCT(AlongCosines):
    """State: momentum of what is projected; step, exp_avg, exp_avg_sq of the rest."""

    def project(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One orthogonal step."""
        m, n = parameter.shape
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        M = state["momentum"].add_(gradient)
        index, b = select(M, group["rank"], m >= n, group["norm"], group["vectors"], group["route"])
        basis = short_basis(index, M, (m, n), group["vectors"])
        add_back(M, basis, b, group["momentum"] - 1)
        kind = torch.bfloat16 if group["precision"] == "bfloat16" else torch.promote_types(b.dtype, torch.float32)
        o = newton_schulz(b.to(kind), group["iterations"]).to(b.dtype)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        add_back(parameter, basis, o, -group["lr"] * step_size(m, n, group["size"]))


def step_size(m: int, n: int, rule: Size) -> float:
    """Return k for a weight (m, n)."""
    return {
        "none": 1.0,
        "kj": math.sqrt(max(1.0, m / n)),
        "kimi": 0.2 * math.sqrt(max(m, n)),
        "dion": math.sqrt(m / n),
    }[rule]
