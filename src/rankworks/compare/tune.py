"""Which trials an arm gets: the same for all arms, and more only where the best rate lies on the edge of its range.

The first trials are a grid in half decades, from the middle outwards; where there are more trials than points, Optuna's
TPE sampler places the rest, and where there are fewer, they are spread over the range. When all are done and the best
learning rate lies on an edge, a decade beyond it is tried in two more trials, `tune.widen` times at most. With `lr:
auto` every trial measures its rate at its start (train/rates/rate.py), so one is enough where nothing else is tuned.
What is to be done is a function of what is finished, so every process that shares a study comes to the same cells.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from rankworks.compare.config import HALF_DECADE, Range, TuneConfig
from rankworks.train.config import AUTO

EDGE = 10**0.1
"""A rate within this factor of an end of the range is on the edge."""


AGAIN = "again"
"""A trial of this name is not pruned."""

FIRST = "trial 0"
"""Every arm has a trial of this name."""


@dataclass(frozen=True)
class Proposal:
    """A trial to be made. lr: its learning rate, None where the sampler chooses it or the trial measures it; low, high:
    the range at its time.
    """

    name: str
    lr: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Seen:
    """A finished trial: its learning rate (None: it was to be measured, and that failed), what was minimised (None: it
    diverged), and whether it ended early.
    """

    lr: float | None
    value: float | None
    pruned: bool = False


@dataclass(frozen=True)
class Agenda:
    """All trials that an arm gets by what is known now, the range in the end, and the edge that is left, if any."""

    proposals: list[Proposal]
    low: float
    high: float
    edge: str | None

    def open(self, seen: Mapping[str, Seen]) -> list[Proposal]:
        """Return what is not finished."""
        return [p for p in self.proposals if p.name not in seen]


def bounds(tune: TuneConfig) -> tuple[float, float]:
    """Return the range of learning rates before it is widened."""
    if isinstance(tune.lr, Range):
        return tune.lr.low, tune.lr.high
    if tune.lr == AUTO:
        return 0.0, math.inf
    rates = tune.lr if isinstance(tune.lr, list) else [tune.lr]
    return min(rates), max(rates)


def grid(tune: TuneConfig, trials: int) -> list[float]:
    """Return the learning rates of the first trials, at most `trials`, in the order in which they are made."""
    if tune.lr == AUTO:
        return []
    if isinstance(tune.lr, Range):
        count = 1 + math.floor(2 * math.log10(tune.lr.high / tune.lr.low) + 0.05)
        points = [rounded(tune.lr.low * HALF_DECADE**k) for k in range(count)]
    else:
        points = sorted(tune.lr) if isinstance(tune.lr, list) else [tune.lr]
    if trials == 1:
        return [points[(len(points) - 1) // 2]]
    if trials < len(points):
        points = [points[round((len(points) - 1) * k / (trials - 1))] for k in range(trials)]
    middle = (len(points) - 1) / 2
    order = sorted(range(len(points)), key=lambda i: (abs(i - middle), i))
    return [points[i] for i in order]


def count_of(tune: TuneConfig, trials: int) -> int:
    """Return how many trials an arm gets before widening: one where nothing is left to choose."""
    one = not isinstance(tune.lr, Range) and len(grid(tune, trials)) == 1 and bounds(tune)[0] == bounds(tune)[1]
    single = one or tune.lr == AUTO
    return 1 if single and not tune.also else trials


def agenda(tune: TuneConfig, trials: int, seen: Mapping[str, Seen]) -> Agenda:
    """Return the trials of an arm, given what is finished."""
    low, high = bounds(tune)
    rates = grid(tune, trials)
    count = count_of(tune, trials)
    proposals = [Proposal(f"trial {k}", rates[k] if k < len(rates) else None, low, high) for k in range(count)]
    fixed = not isinstance(tune.lr, Range | list)
    for turn in range(tune.widen + 1):
        if any(p.name not in seen for p in proposals):
            return Agenda(proposals, low, high, None)
        ended = [p for p in proposals if seen[p.name].pruned]
        if ended and best([seen[p.name] for p in proposals]) is None:
            # The trial that others were stopped for diverged in the end: the best of those runs again, to its end.
            top = min(ended, key=lambda p: seen[p.name].value or 0.0)
            again = Proposal(f"{AGAIN} {turn}", seen[top.name].lr, low, high)
            proposals.append(again)
            if again.name not in seen:
                return Agenda(proposals, low, high, None)
        edge = None if fixed else edge_of([seen[p.name] for p in proposals], low, high)
        if edge is None or turn == tune.widen:
            return Agenda(proposals, low, high, edge)
        sign, end = (-1, low) if edge == "low" else (1, high)
        beyond = [rounded(end * HALF_DECADE ** (sign * k)) for k in (1, 2)]
        low, high = min(low, *beyond), max(high, *beyond)
        proposals += [Proposal(f"wider {2 * turn + k}", rate, low, high) for k, rate in enumerate(beyond)]
    raise AssertionError("the loop returns")


def edge_of(seen: Sequence[Seen], low: float, high: float) -> str | None:
    """Return on which edge of the range the best rate lies; the lower one where every trial diverged."""
    top = best(seen)
    if top is None or top.lr is None:
        return "low"
    if low == high:
        return None
    if top.lr <= low * EDGE:
        return "low"
    return "high" if top.lr >= high / EDGE else None


def best(seen: Sequence[Seen]) -> Seen | None:
    """Return the trial with the lowest value among those that ran to their end; None where none did."""
    whole = [s for s in seen if s.value is not None and not s.pruned]
    return min(whole, key=lambda s: s.value) if whole else None  # type: ignore[arg-type,return-value]


def rounded(value: float) -> float:
    """Return three significant digits: what a person would write."""
    return float(f"{value:.3g}")


def distributions(tune: TuneConfig, proposal: Proposal) -> dict[str, BaseDistribution]:
    """Return what Optuna draws from: `lr`, and other settings by their dotted path."""
    others: dict[str, BaseDistribution] = {
        path: CategoricalDistribution(choices)
        if isinstance(choices, list)
        else FloatDistribution(choices.low, choices.high, log=choices.log)
        for path, choices in tune.also.items()
    }
    if tune.lr == AUTO:
        return others
    high = max(proposal.high, proposal.lr or 0.0)
    return {"lr": FloatDistribution(min(proposal.low, proposal.lr or high), high, log=True), **others}


def given(tune: TuneConfig, proposal: Proposal) -> dict[str, Any]:
    """Return the parameters of a trial that are not drawn: of the grid its rate, and the first choices elsewhere.

    A widened range is searched at the settings of the best trial, which the caller adds.
    """
    measured = tune.lr == AUTO
    if proposal.lr is None and not (measured and proposal.name == FIRST):
        return {}
    firsts = {path: c[0] if isinstance(c, list) else c.middle for path, c in tune.also.items()}
    return firsts if measured else {"lr": proposal.lr, **firsts}


def sampler(label: str, name: str, trials: int, seed: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of one cell: its random numbers depend on the cell alone, so a retried one draws the same."""
    return optuna.samplers.TPESampler(
        seed=zlib.crc32(f"{seed}/{label}/{name}".encode()), n_startup_trials=min(4, trials), multivariate=False
    )


def pruner(steps: int, wanted: bool) -> optuna.pruners.BasePruner:
    """Return successive halving with rungs at a quarter and a half of the steps; of each, the better half goes on."""
    if not wanted or steps < 4:
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=rung(steps), reduction_factor=2)


def rung(steps: int) -> int:
    """Return the steps between two looks at the validation data: a quarter of all."""
    return max(1, math.ceil(steps / 4))
