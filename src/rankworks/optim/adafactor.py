"""Adafactor: Adam whose second moment of a matrix is the product of its row and column means, and which needs no first.

    U = R / sqrt(r c^T / mean(r)), limited to a root mean square of `clip_threshold`          (core/optim/adafactor.py)
    W <- W (1 - rate decay) - rate U,      rate = lr [rms(W), at least eps[1]] [min(1e-2, 1 / sqrt t)]

The bracketed factors belong to `scale_parameter` and `relative_step`. Transformers turns both on and then takes no
learning rate; here there always is one, so both are off unless asked for, as in GaLore's pretraining runs, and with
them `lr` is a factor: lr = 1 is transformers' `lr=None`, and a schedule acts on it, also a warm-up, so that there is no
`warmup_init`. The rest are transformers' numbers. Matrices keep m + n numbers, `beta1` adds m n.
Source: arXiv:1804.04235; `Adafactor` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rankworks.core.fields import Positive, Setting
from rankworks.core.optim.adafactor import adafactor_numbers, adafactor_step
from rankworks.core.optim.method import Group, OptimizerMethod
from rankworks.core.optim.stepwise import Stepwise, count_step
from rankworks.core.registry import optimizer


@optimizer("adafactor", title="Adafactor", year=2018, paper="arXiv:1804.04235")
class Adafactor(OptimizerMethod):
    """Adaptive steps from row and column means alone."""

    eps: tuple[float, float] = Setting((1e-30, 1e-3), "added to squared gradients; least rms of a weight")
    clip_threshold: float = Positive(1.0, "largest root mean square of a step before the rate")
    decay_rate: float = Setting(-0.8, "the mean of squares forgets with 1 - t^decay_rate", lt=0)
    beta1: float | None = Setting(None, "decay of the running mean of steps; None keeps none", ge=0, lt=1)
    scale_parameter: bool = Setting(False, "rates in proportion to a weight's root mean square")
    relative_step: bool = Setting(False, "rates fall with 1 / sqrt(t); lr is then a factor")

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        return AdafactorSteps(groups, lr=lr, **{name: getattr(self, name) for name in _SETTINGS})

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """m + n numbers of a matrix, float32 where the weight is narrower."""
        numbers = adafactor_numbers(tuple(parameter.shape), self.beta1 is not None)
        return numbers * max(4, parameter.element_size())


_SETTINGS = [name for name in Adafactor.Spec.model_fields if name != "optimizer"]


class AdafactorSteps(Stepwise):
    """The optimizer. State: step, exp_avg_sq_row and exp_avg_sq_col or exp_avg_sq, exp_avg with beta1."""

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, **defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step."""
        t = count_step(state)
        wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))  # itself, or a copy
        rate = self._rate(wide, group, t)
        step = adafactor_step(
            state, gradient, t, rate, eps=group["eps"][0], clip=group["clip_threshold"], decay=group["decay_rate"],
            beta1=group["beta1"],
        )  # fmt: skip
        if group["weight_decay"]:
            wide.mul_(1 - group["weight_decay"] * rate)
        wide.sub_(step)
        if wide is not parameter:
            parameter.copy_(wide)

    @staticmethod
    def _rate(weight: Tensor, group: Group, t: int) -> Any:
        rate = group["lr"]
        if group["relative_step"]:
            rate *= min(1e-2, 1 / math.sqrt(t))
        if group["scale_parameter"]:
            rms = torch.linalg.vector_norm(weight) / math.sqrt(weight.numel())
            return rate * rms.clamp(min=group["eps"][1])
        return rate
