"""AdamW's step on one parameter, for optimizers that have a rule of their own for some and this for the rest.

w <- (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)        as torch does it
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rankworks.core.optim.method import Group
from rankworks.core.optim.moments import adam_direction
from rankworks.core.optim.stepwise import count_step


def adamw_update(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
    """Take one step in place; the group has lr, weight_decay, betas and eps. State: step, exp_avg, exp_avg_sq."""
    t = count_step(state)
    if group["weight_decay"]:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
    N, factor = adam_direction(state, gradient, t, group["betas"], group["eps"], released=False)
    parameter.add_(N, alpha=-group["lr"] * factor)
