"""Adam and AdamW: steps along the mean gradient over the root of the mean squared gradient, as torch does them.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w <- (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

AdamW decays the weights apart from the gradient, as written; Adam adds decay w to the gradient. State: two numbers a
parameter, in its own type.
Source: arXiv:1412.6980, algorithm 1; arXiv:1711.05101, algorithm 2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rankworks.core.fields import Positive, Setting
from rankworks.core.optim.method import Group, OptimizerMethod
from rankworks.core.registry import optimizer


class _Adam(OptimizerMethod):
    """What the two have in common."""

    kind: ClassVar[Any]

    betas: tuple[float, float] = Setting((0.9, 0.999), "decays of the two moments")
    eps: float = Positive(1e-8, "added to the root, against division by zero")
    amsgrad: bool = Setting(False, "divide by the largest second moment so far")
    foreach: bool | None = Setting(None, "many tensors at once; None: as torch chooses")
    fused: bool | None = Setting(None, "one kernel for all; None: as torch chooses")

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """Torch's own."""
        make = self.kind
        return make(
            groups, lr=lr, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad, foreach=self.foreach, fused=self.fused
        )

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """Two numbers a parameter, three with amsgrad."""
        return (3 if self.amsgrad else 2) * parameter.numel() * parameter.element_size()


@optimizer("adamw", title="AdamW", year=2017, paper="arXiv:1711.05101")
class AdamW(_Adam):
    """Adam with decoupled weight decay."""

    kind = torch.optim.AdamW


@optimizer("adam", title="Adam", year=2014, paper="arXiv:1412.6980")
class Adam(_Adam):
    """Adaptive moments."""

    kind = torch.optim.Adam
