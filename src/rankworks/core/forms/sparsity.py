"""Sharing a budget of non-zeros among layers during training: the schedule, the scores, and the dealing out.

Nothing here knows of a method: a hook is given, by site, the tensors whose importance counts, and a counter of zeros to
write to. Source: arXiv:2510.24037 (SNELLA); the importance is that of AdaLoRA (arXiv:2303.10512, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.hooks import Hook, Moment


@dataclass(frozen=True)
class Schedule:
    """The non-zeros of each site at the start and at the end, and the number of rounds from one to the other."""

    first: Mapping[str, int]
    last: Mapping[str, int]
    rounds: int

    def round_at(self, step: int, steps: int) -> int:
        """Return how many rounds are over after `step` of `steps` steps; all are after the last."""
        return step * min(self.rounds, steps) // steps

    def budget(self, done: float) -> int:
        """Return the sum when the share `done` of the rounds is over: N_last + (N_first - N_last) (1 - done)^3."""
        return round(self._at(done, sum(self.first.values()), sum(self.last.values())))

    def even(self, done: float) -> dict[str, int]:
        """Return each site's own non-zeros on the same curve."""
        return {name: round(self._at(done, self.first[name], self.last[name])) for name in self.first}

    @staticmethod
    def _at(done: float, first: int, last: int) -> float:
        return last + (first - last) * (1 - done) ** 3


def deal(budget: int, scores: Sequence[float], most: Sequence[int]) -> list[int]:
    """Share out `budget` in proportion to `scores`, at most `most` each: what is left over is dealt again.

    The shares are whole and sum to the budget exactly (to the sum of `most` where that is less); scores that are all
    zero count as equal. Rounding goes to the largest remainders, ties to the first.
    """
    left = min(budget, sum(most))
    shares = [0] * len(most)
    while left:
        free = [i for i in range(len(most)) if shares[i] < most[i]]
        weights = {i: max(float(scores[i]), 0.0) for i in free}
        total = sum(weights.values())
        if not total > 0:
            weights, total = dict.fromkeys(free, 1.0), float(len(free))
        wanted = {i: left * (weights[i] / total) for i in free}
        given = {i: min(int(wanted[i]), most[i] - shares[i]) for i in free}
        if not any(given.values()):  # less than one each: to the largest remainders
            order = sorted(free, key=lambda i: (-wanted[i], i))
            given = {i: int(place < left) for place, i in enumerate(order)}
        for i, more in given.items():
            shares[i] += more
        left -= sum(given.values())
    return shares


class Allocation(Hook):
    """Deals the non-zeros anew at the end of each round, by how important each site's tensors have been."""

    def __init__(
        self,
        tensors: Mapping[str, Sequence[nn.Parameter]],
        zeros: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        schedule: Schedule,
        by: str,
        betas: tuple[float, float],
    ):
        self.tensors, self.zeros, self.sizes = tensors, zeros, sizes
        self.schedule, self.by, self.betas = schedule, by, betas
        self.means: dict[str, list[Tensor]] = {}  # I of each tensor of a site
        self.spreads: dict[str, list[Tensor]] = {}  # U

    def after_step(self, moment: Moment) -> None:
        """Note the importance of every entry; deal where a round is over."""
        if self.by != "even":
            self._note()
        step, steps = moment.step, moment.steps
        now = self.schedule.round_at(step, steps)
        if now == self.schedule.round_at(step - 1, steps):
            return
        done = now / min(self.schedule.rounds, steps)
        names = list(self.sizes)
        if self.by == "even":
            shares = self.schedule.even(done)
        else:
            scores = self.scores()
            dealt = deal(self.schedule.budget(done), [scores[n] for n in names], [self.sizes[n] for n in names])
            shares = dict(zip(names, dealt, strict=True))
        for name in names:  # at least one entry stays, so that every layer can come back
            self.zeros[name].fill_(min(self.sizes[name] - shares[name], self.sizes[name] - 1))

    def scores(self) -> dict[str, float]:
        """Return the sites' scores, summing to 1: the mean of I U over each tensor, added over a site's tensors."""
        raw = {
            name: sum(float((i * u).double().mean()) for i, u in zip(self.means[name], self.spreads[name], strict=True))
            for name in self.means
        }
        total = sum(raw.values())
        return {n: raw.get(n, 0.0) / total if total > 0 else 1 / len(self.sizes) for n in self.sizes}

    @torch.no_grad()
    def _note(self) -> None:
        first, second = self.betas
        for name, tensors in self.tensors.items():
            means = self.means.setdefault(name, [torch.zeros_like(t, requires_grad=False) for t in tensors])
            spreads = self.spreads.setdefault(name, [torch.zeros_like(t, requires_grad=False) for t in tensors])
            for tensor, mean, spread in zip(tensors, means, spreads, strict=True):
                importance = self._importance(tensor)
                mean.lerp_(importance, 1 - first)
                spread.lerp_((importance - mean).abs(), 1 - second)

    def _importance(self, tensor: nn.Parameter) -> Tensor:
        if self.by == "magnitude":
            return tensor.abs()
        if tensor.grad is None:
            return torch.zeros_like(tensor)
        return (tensor * tensor.grad).abs().nan_to_num(nan=0.0)

    def state_dict(self) -> dict[str, Any]:
        """The running means; the counters of zeros stand with the adapter."""
        return {"means": dict(self.means), "spreads": dict(self.spreads)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back, on the device of the tensors they belong to."""
        for mine, saved in ((self.means, state["means"]), (self.spreads, state["spreads"])):
            for name, tensors in saved.items():
                mine[name] = [t.to(like.device) for t, like in zip(tensors, self.tensors[name], strict=True)]
