"""Rules with one moment or none: Lion, momentum, and the sign of either; beside Adam's, in core/optim/moments.py.

    lion        N = sign(b1 m + (1 - b1) R),  then m <- b2 m + (1 - b2) R
    sgdm        m <- mu m + R,  N = m                       mu = 0: N = R, and nothing is kept
    signsgdm    m <- mu m + R,  N = sign(m)                 mu = 0: signSGD

The step is lr * N. R may be a gradient or what it was projected to; the moment has its shape and its type.
Source: arXiv:2302.06675, algorithm 2 (Lion); arXiv:1802.04434 (signSGD, signum).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.optim.moments import Direction, adam_direction

Rule = Literal["adamw", "lion", "sgdm", "signsgdm"]
BETAS: dict[str, tuple[float, float]] = {"adamw": (0.9, 0.999), "lion": (0.9, 0.99)}
"""The decays each rule is published with."""


def lion_direction(state: dict[str, Any], R: Tensor, betas: tuple[float, float]) -> Direction:
    """Update Lion's moment of R in `state` and return the direction of the step."""
    b1, b2 = betas
    m = _moment(state, R)
    N = m.lerp(R, 1 - b1).sign_()
    m.lerp_(R, 1 - b2)
    return Direction(N, 1.0)


def momentum_direction(state: dict[str, Any], R: Tensor, momentum: float, *, signed: bool = False) -> Direction:
    """Update the momentum of R in `state` and return the direction of the step: a tensor that must not be changed."""
    if momentum:
        R = _moment(state, R).mul_(momentum).add_(R)
    return Direction(R.sign() if signed else R, 1.0)


def direction(
    rule: Rule, state: dict[str, Any], R: Tensor, t: int, betas: tuple[float, float], eps: float, momentum: float
) -> Direction:
    """Return the direction of a rule's step t, from 1 since its moments began. AdamW is torch's."""
    if rule == "adamw":
        return adam_direction(state, R, t, betas, eps, released=False)
    if rule == "lion":
        return lion_direction(state, R, betas)
    return momentum_direction(state, R, momentum, signed=rule == "signsgdm")


def moments_of(rule: Rule, momentum: float) -> int:
    """Return how many numbers a rule keeps for each number of R."""
    return {"adamw": 2, "lion": 1}.get(rule, 1 if momentum else 0)


def _moment(state: dict[str, Any], R: Tensor) -> Tensor:
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(R)
    return state["exp_avg"]
