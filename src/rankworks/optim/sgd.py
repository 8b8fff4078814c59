"""SGD: steps along the gradient, with momentum where it is asked for, as torch does them.

    b <- momentum b + (1 - dampening) g        w <- w - lr b        (nesterov: g + momentum b in place of b)

State: nothing, or one number a parameter with momentum.
Source: Robbins and Monro (1951); momentum as in Sutskever et al. (2013).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankworks.core.errors import ConfigError
from rankworks.core.fields import Setting
from rankworks.core.optim.method import Group, OptimizerMethod
from rankworks.core.registry import optimizer


@optimizer("sgd", title="SGD", year=1951, paper="Annals of Mathematical Statistics 22(3)")
class SGD(OptimizerMethod):
    """Stochastic gradient descent."""

    momentum: float = Setting(0.0, "share of the last step that is kept", ge=0, lt=1)
    dampening: float = Setting(0.0, "share of the gradient that momentum leaves out", ge=0, le=1)
    nesterov: bool = Setting(False, "look ahead along the momentum")
    foreach: bool | None = Setting(None, "many tensors at once; None: as torch chooses")
    fused: bool | None = Setting(None, "one kernel for all; None: as torch chooses")

    try_with: ClassVar[Mapping[str, Any]] = {"momentum": 0.9}

    @classmethod
    def agree(cls, spec: Any) -> None:
        """Looking ahead needs a momentum to look along."""
        super().agree(spec)
        if spec.nesterov and (spec.momentum == 0 or spec.dampening != 0):
            raise ConfigError("nesterov looks ahead along the momentum: give sgd a momentum above 0 and no dampening.")

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """Torch's own."""
        return torch.optim.SGD(
            groups,
            lr=lr,
            momentum=self.momentum,
            dampening=self.dampening,
            nesterov=self.nesterov,
            foreach=self.foreach,
            fused=self.fused,
        )

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """One number a parameter with momentum."""
        return parameter.numel() * parameter.element_size() if self.momentum else 0
