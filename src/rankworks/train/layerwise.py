"""Layer-wise updates: each parameter takes its step in the backward pass, and its gradient is freed at once.

    backward of the last micro-batch:  gradient of a parameter complete -> (summed over processes) -> its step -> freed

So no more than about one layer's gradient exists at a time. The weights after a step are those of the ordinary order:
earlier micro-batches only gather, and a largest norm is kept by going through a batch twice, first to measure the norm
of the whole gradient, freeing every part of it, then to step: the same dropout, twice the time. With several
micro-batches a step the gradients of all parameters have to be kept between them, so nothing is saved there, and with
a largest norm the steps are simply taken at the end.
Source: the per-layer updates of arXiv:2403.03507, whose released code steps on every micro-batch and cannot clip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rankworks.core.errors import ConfigError, DivergedError
from rankworks.core.hooks import Hook

Mode = Literal["gather", "measure", "step"]
NEEDS_ALL = ("penalty", "after_backward", "after_step")
"""The moments of a hook at which every gradient is there."""


class Layerwise:
    """Steps of `optimizer` taken in the backward pass. `mode` says what is done with a gradient when it is complete.

    Raises `ConfigError` where the optimizer's steps need each other's gradients, or a hook needs all of them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, name: str, hooks: Sequence[Hook], processes: int):
        if not getattr(optimizer, "layerwise", True):
            raise ConfigError(f"{name} steps on several gradients together: set optim.layerwise=false.")
        for hook in hooks:
            if any(getattr(type(hook), moment) is not getattr(Hook, moment) for moment in NEEDS_ALL):
                raise ConfigError(
                    f"{type(hook).__name__} acts on all gradients of a step, which layer-wise updates free one by one: "
                    "set optim.layerwise=false."
                )
        self.optimizer, self.processes = optimizer, processes
        self.mode: Mode = "gather"
        self.factor = 1.0  # of every gradient, from clipping
        self.place = {
            p: (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])
        }
        self.squares: dict[Tensor, Tensor] = {}
        for parameter in self.place:
            parameter.register_post_accumulate_grad_hook(self._complete)

    @contextlib.contextmanager
    def doing(self, mode: Mode) -> Iterator[None]:
        """Within the block gradients are measured and freed, or stepped on and freed; outside they gather."""
        self.mode, self.squares = mode, {}
        try:
            yield
        finally:
            self.mode = "gather"

    @property
    def norm(self) -> float:
        """The norm of all gradients of the last pass, before clipping."""
        squares = list(self.squares.values())
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def _complete(self, parameter: Tensor) -> None:
        if self.mode == "gather":
            return
        gradient = parameter.grad
        assert gradient is not None
        if self.processes > 1:
            dist.all_reduce(gradient)
            gradient /= self.processes
        square = gradient.float().square().sum()
        if not torch.isfinite(square):
            raise DivergedError(
                f"the gradient of {self._name(parameter)} is not finite. With layer-wise updates the layers behind it "
                "have taken their step already: go on from the last checkpoint, with a smaller optim.lr."
            )
        self.squares[parameter] = square
        if self.mode == "step":
            gradient *= self.factor
            self._step(parameter)
        parameter.grad = None

    def _step(self, parameter: Tensor) -> None:
        """Let the optimizer see this one parameter alone."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        group, place = self._found(parameter)
        alone = {"names": [group["names"][place]]} if "names" in group else {}
        optimizer.param_groups = [{**group, "params": [parameter], **alone}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups

    def _name(self, parameter: Tensor) -> str:
        group, place = self._found(parameter)
        return group["names"][place] if "names" in group else f"parameter {place}"

    def _found(self, parameter: Tensor) -> tuple[dict, int]:
        """Return the group of a parameter as it is now (taking up a state makes new ones), and its place in it."""
        number, place = self.place[parameter]
        return self.optimizer.param_groups[number], place
