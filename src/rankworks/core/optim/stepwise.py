"""Stepwise: an optimizer that treats one parameter after the other, each by itself.

A subclass writes `update(parameter, gradient, state, group)`. What it keeps goes into `state`: tensors only, so that it
is saved, loaded and sharded like any other; torch would turn them into the parameter's type when they are loaded,
which ruins codes and scales, so here they stay what they are. Because no parameter's step needs another's, an
optimizer of this kind can act in the middle of the backward pass (`train.layerwise`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankworks.core.optim.method import Group


class Stepwise(torch.optim.Optimizer):
    """Base of the optimizers here. Settings are entries of the groups, `defaults` those that a group does not name."""

    counters: ClassVar[tuple[str, ...]] = ()
    """Entries of the state, besides STEP, that stay on the device they were made on: small numbers read by the CPU."""
    name = ""
    """The name of the parameter that is updated now, which draws depend on: a name is the same in every process."""

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; returns the closure's loss, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.step_group(group)
        return loss

    def step_group(self, group: Group) -> None:
        """Step on every parameter of a group that has a gradient; pairs are stepped on together (core/optim/pairs)."""
        names = group.get("names") or [str(i) for i in range(len(group["params"]))]
        for self.name, parameter in zip(names, group["params"], strict=True):
            if parameter.grad is not None:
                self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """Change a parameter in place; called without recording gradients. `state` is empty at the first step."""
        raise TypeError(f"{type(self).__name__} must define update(parameter, gradient, state, group)")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned, every tensor in its own type on its parameter's device."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                counts = name == STEP or name in self.counters
                if isinstance(value, Tensor) and (counts or value.dtype != self.state[parameter][name].dtype):
                    place = value.device if counts else parameter.device
                    self.state[parameter][name] = value.to(place, copy=True)


STEP = "step"
"""The entry of the state that counts a parameter's steps, a float32 number on the CPU."""


def count_step(state: dict[str, Any]) -> int:
    """Count one step of a parameter and return its number, from 1."""
    if STEP not in state:
        state[STEP] = torch.zeros((), dtype=torch.float32)
    state[STEP] += 1
    return int(state[STEP].item())
