"""Pace: another learning rate for a part of a tensor, or for tensors that share a parameter group with others.

    after the step:  p = p_before + f (p_after - p_before)          f = the rate wanted / the rate of the group

SGD, Adam and AdamW move a number by its rate times something that does not depend on the rate, so this is what a group
of its own would do, to rounding, without changing the optimizer's groups: those must be the same when a run resumes.
Moments are the optimizer's as ever. Only what has a pace of its own is copied.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Pace:
    """The parts that move at their own rate in one step: given before the optimizer acts, corrected after it."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._before: list[Tensor] = []
        self._factors: list[float] = []

    @torch.no_grad()
    def hold(self, parts: Iterable[Tensor], factor: float) -> None:
        """Let these tensors, or views of a part of them, move `factor` times as far in the coming step."""
        if factor == 1.0:
            return
        for part in parts:
            self._parts.append(part.detach())
            self._before.append(part.detach().clone())
            self._factors.append(factor)

    @torch.no_grad()
    def correct(self) -> None:
        """Correct what was held, after the step."""
        for part, before, factor in zip(self._parts, self._before, self._factors, strict=True):
            part.copy_(torch.lerp(before, part, factor) if factor else before)
        self._parts, self._before, self._factors = [], [], []
