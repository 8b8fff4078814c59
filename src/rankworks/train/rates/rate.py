"""`optim.lr: auto`: the learning rate from a few short trials at the start, in place of a sweep.

    range    one step each at 1e-5, 3.2e-5, 1e-4, ..., always on the same examples, until the loss is `ROSE` times the
             first
    trials   from the rate below that one downwards in half decades, m steps each from the start, at a constant rate;
             the loss on examples that none of them used says how good a rate is
    stop     at the first rate that is worse than the best one above it; where the first one is the best, climb

A trial whose loss is `LEFT` times the first ends early. One whose loss rose by `ROSE` may have been lucky in the end:
then a rate counts as worse only if it brings less than half as much. m is the run's steps over `SHARE`, between
`FEWEST` and `MOST`. Steps are those of the run's own optimizer, on half batches, those of the range on a quarter
(`Probe`). How near this comes to a sweep, at which cost, and why the rate is not taken from the loss's sharpness,
lr = c / sqrt(n lambda), stands in docs/auto-rate.md with its figures.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch import nn

from rankworks.core.errors import TrainingError
from rankworks.train.batching.batches import Example
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.processes import processes
from rankworks.train.progress import Bar
from rankworks.train.rates.probe import Probe, probing

LADDER = [float(f"{10 ** (k / 2):.3g}") for k in range(-12, 3)]
"""Rates that are tried: half decades from 1e-6 to 10."""

LOWEST = 1e-5
"""Where the range begins."""

ROSE = 1.3
"""A loss this many times the first one is beyond what a good rate's first steps do, mostly."""

LEFT = 2.0
"""A loss this many times the first one does not come back."""

SHARE, FEWEST, MOST = 8, 6, 16
"""Steps of a trial: the run's over SHARE, between FEWEST and MOST."""

FILE = "rate.json"


@dataclass(frozen=True)
class MeasuredRate:
    """What `lr: auto` took and why.

    lr: the peak rate. trials: rate -> loss after `steps` steps at it, None where it diverged; start: that loss before
    any step. passes: what the measurement cost, in forward-backward passes over a batch of the run; seconds: the same
    in time.
    """

    lr: float
    trials: dict[str, float | None]
    start: float
    steps: int
    passes: float
    seconds: float

    def to_json(self) -> str:
        """Return what `read_rate` reads."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        told = ", ".join(f"{rate}: {'left' if loss is None else f'{loss:.4g}'}" for rate, loss in self.trials.items())
        what = f"the best of trials of {self.steps} steps (loss {self.start:.4g} before; {told})"
        return f"{self.lr:g}, {what}, which cost as much as {self.passes:.3g} steps"


def measure_rate(
    model: nn.Module,
    examples: Sequence[Example],
    train: TrainConfig,
    optim: OptimConfig,
    *,
    pad: int = 0,
    progress: bool = True,
) -> MeasuredRate:
    """Measure the learning rate for a run of these settings on the model as it stands, which is left bit for bit.

    examples: of the run; its first ones are used. In a run of several processes all measure the same, and go on with
    what the first found. Raises `TrainingError` where the loss is not finite at any rate.
    """
    started = time.monotonic()
    steps = trial_steps(train.total_steps(len(examples)))
    bar = Bar("measuring the learning rate", len(LADDER), show=progress)
    with bar, probing(model, examples, train, steps=max(steps, len(LADDER)), pad=pad) as probe:
        start = probe.loss()
        trials: dict[float, Trial] = {}
        first = LADDER.index(highest(probe, optim)) - 1

        def attempt(k: int) -> None:
            trials[LADDER[k]] = trial(probe, optim, LADDER[k], steps)
            bar.advance()

        for k in range(first, -1, -1):
            attempt(k)
            if decided(trials, start):
                break
        while best_of(trials) == max(trials) < LADDER[-1]:
            attempt(LADDER.index(max(trials)) + 1)
    best = best_of(trials)
    if best is None or not math.isfinite(start):
        raise TrainingError(
            "lr: auto found no learning rate at which the loss stays finite: look at the data and the model, or give "
            "optim.lr a number, e.g. 2e-4."
        )
    told = {f"{rate:g}": _rounded(trials[rate].loss) for rate in sorted(trials, reverse=True)}
    seconds = round(time.monotonic() - started, 3)
    return _agreed(MeasuredRate(best, told, round(start, 6), steps, round(probe.passes, 2), seconds))


def trial_steps(steps: int) -> int:
    """Return the steps of a trial for a run of `steps`."""
    return min(max(FEWEST, steps // SHARE), MOST)


@dataclass(frozen=True)
class Trial:
    """The loss after a trial, None where it left on the way; calm: whether it never rose by `ROSE`."""

    loss: float | None
    calm: bool = True


def highest(probe: Probe, optim: OptimConfig) -> float:
    """Return the rate of the step after which the loss rose, of steps at higher and higher rates."""
    with probe.start(optim, again=True) as step:
        first, last = None, LOWEST
        for rate in LADDER[LADDER.index(LOWEST) :]:
            loss = step(rate)
            first = loss if first is None else first
            if not loss <= ROSE * first:
                break
            last = rate
    return last


def trial(probe: Probe, optim: OptimConfig, rate: float, steps: int) -> Trial:
    """Take some steps at a rate."""
    with probe.start(optim) as step:
        first, calm = None, True
        for _ in range(steps):
            loss = step(rate)
            first = loss if first is None else first
            calm = calm and loss <= ROSE * first
            if not loss <= LEFT * first:
                return Trial(None, False)
        found = probe.loss()
    return Trial(found if math.isfinite(found) else None, calm)


def best_of(trials: Mapping[float, Trial]) -> float | None:
    """Return the rate with the lowest loss, None where all diverged."""
    known = {rate: trial.loss for rate, trial in trials.items() if trial.loss is not None}
    return min(known, key=lambda rate: known[rate]) if known else None


def decided(trials: Mapping[float, Trial], start: float) -> bool:
    """Say whether the last trial, at the lowest rate, is worse than the best, and that one better than no step."""
    best = best_of(trials)
    if best is None or best == min(trials):
        return False
    gains = [start - (math.inf if t.loss is None else t.loss) for t in (trials[best], trials[min(trials)])]
    return gains[0] > 0 and (trials[best].calm or gains[1] < gains[0] / 2)


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 6)


def _agreed(rate: MeasuredRate) -> MeasuredRate:
    """Return what the first process found."""
    if processes().num_processes == 1:
        return rate
    return broadcast_object_list([rate])[0]


def read_rate(folder: Path) -> MeasuredRate | None:
    """Return the rate an earlier start of a run measured, or None where it left none."""
    try:
        return MeasuredRate(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
