"""Over: methods that leave the steps to another optimizer, their `base`, and change what goes into it or how it acts.

Settings that are not the method's own are passed on to the base: betas=(0.9, 0.95) is AdamW's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.errors import ConfigError
from rankworks.core.fields import Setting
from rankworks.core.hooks import Hook
from rankworks.core.optim.method import Group, OptimizerMethod
from rankworks.core.registry import OptimizerSpec, build


class Over(OptimizerMethod):
    """A method whose steps are any other optimizer's; a subclass may give `extra_hook`."""

    base: OptimizerSpec = Setting("adamw", "the optimizer whose steps these are")

    @property
    def stepper(self) -> OptimizerMethod:
        """The base, with this method's decay."""
        spec = self.spec.base.replace(weight_decay=self.weight_decay)
        return spec.method.cls(spec)

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The base's."""
        return self.stepper.groups(model, lr)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The base's."""
        return self.stepper.build(groups, lr)

    def hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Hook]:
        """The base's and its own."""
        base, own = self.stepper.hook(model, optimizer), self.extra_hook(model, optimizer)
        return [*(base if isinstance(base, list) else [] if base is None else [base]), *([] if own is None else [own])]

    def extra_hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook | None:
        """Return what the method itself does during training besides the base's steps, or None."""
        return None

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """The base's."""
        return self.stepper.state_bytes(parameter, group)

    @classmethod
    def agree(cls, spec: Any) -> None:
        """The base steps by itself, and on every parameter by itself."""
        super().agree(spec)
        base: Any = spec.base.method.cls
        if base.closure or "model" not in base.trains:
            raise ConfigError(
                f"{spec.key} needs a base that takes a step from gradients, on any parameter, and {spec.base.key} is "
                "none: choose base adamw, sgd, ..."
            )

    @classmethod
    def accepted(cls, values: Mapping[str, Any]) -> list[str]:
        """Its own and the base's."""
        base = build("optimizer", values.get("base", "adamw")).method.cls
        return [*super().accepted(values), *base.accepted(values)]  # type: ignore[attr-defined]

    @classmethod
    def route(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Pass settings that are not its own on to the base."""
        own = {k: v for k, v in values.items() if k in cls.Spec.model_fields}
        passed = {k: v for k, v in values.items() if k not in own}
        return {**own, "base": build("optimizer", own.get("base", "adamw"), **passed)} if passed else own
