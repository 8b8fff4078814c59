"""Rank schedules that each break one promise, and the good one they were made from."""

from __future__ import annotations

from typing import ClassVar

import torch

from rankworks.core.hooks import Hook, Moment
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.ranks.surgery import keep_ranks, pair_of


class Cut(Hook):
    """Keeps the second rank alone from step 10 on."""

    def __init__(self, deltas):
        self.deltas = deltas.values()

    def after_step(self, moment: Moment) -> None:
        if moment.step == 10:
            for delta in self.deltas:
                keep_ranks(delta, torch.tensor([1]), moment.optimizer)


class GoodSchedule(RankSchedule):
    """Cuts, with gates."""

    gates: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    act: ClassVar[type[Hook]] = Cut

    def hook(self, deltas):
        return self.act(deltas)


class _Climb(Cut):
    def after_step(self, moment: Moment) -> None:
        for group in moment.optimizer.param_groups:
            for p in group["params"]:
                p.data += 3e-2 * p.grad.sign()


class ClimbsInItsHook(GoodSchedule):  # schedule_learns
    act = _Climb


class _Shake(Cut):
    def after_step(self, moment: Moment) -> None:
        for delta in self.deltas:
            delta.gate.data += 0.01 * torch.randn(len(delta.gate))


class ShakesUnseeded(GoodSchedule):  # schedule_repeats
    act = _Shake


class _Counts(Cut):
    def __init__(self, deltas):
        super().__init__(deltas)
        self.seen = 0

    def after_step(self, moment: Moment) -> None:
        self.seen += 1
        for delta in self.deltas:
            delta.gate.data *= 1 + 0.01 * self.seen


class ForgetsItsCount(GoodSchedule):  # schedule_resumes_exactly
    act = _Counts


class _Silences(Cut):
    def on_end(self, moment: Moment) -> None:
        for delta in self.deltas:
            delta.forward = lambda x, base: base(x)


class SilencesTheForward(GoodSchedule):  # merged_equals_the_scheduled
    act = _Silences


class _Doubles(Cut):
    def on_end(self, moment: Moment) -> None:
        for delta in self.deltas:
            pair_of(delta).alpha *= 2


class DoublesTheScaleUntold(GoodSchedule):  # scheduled_file_reads_back
    act = _Doubles


class _Other(Cut):
    def on_end(self, moment: Moment) -> None:
        for delta in self.deltas:
            dense = delta.dense
            delta.dense = lambda weight, dense=dense: 2 * dense(weight)


class SaysAnotherDense(GoodSchedule):  # factors_are_the_change
    act = _Other
