"""From finished cells to a leaderboard: means, paired differences, corrections, ranks with ties."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankworks.compare.budget import Cost
from rankworks.compare.result import ArmResult, RerunResult, Row
from rankworks.compare.session import Standing
from rankworks.compare.statistics import DRAWS, METHOD, Estimate, Resampler, better, holm, ranks
from rankworks.compare.trial import COMPLETE, DIVERGED, PRUNED
from rankworks.train.config import AUTO
from rankworks.train.rates.rate import MeasuredRate
from rankworks.train.report import interval
from rankworks.train.result import SHARES


@dataclass(frozen=True)
class Scale:
    """What is measured and in which direction it is better."""

    metric: str
    higher: bool

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1: scores times this are compared."""
        return 1 if self.higher else -1


def leaderboard(
    standings: Sequence[Standing],
    costs: Mapping[str, Cost],
    scale: Scale,
    baseline: str,
    confidence: float,
    command: Callable[[str], str],
) -> list[Row]:
    """Return a row per arm whose work is done, in the order of `ordered`."""
    done = [s for s in standings if s.done]
    whole = {s.arm.label: list(s.reruns.values()) for s in done if _failure(s) is None}
    tables = {label: np.array([r.outcomes for r in reruns]) for label, reruns in whole.items()}  # (seeds, records)
    estimates: dict[str, Estimate] = {}
    against: dict[str, Estimate] = {}
    places: dict[str, int] = {}
    corrected: dict[str, float] = {}
    if tables:
        first = next(iter(whole.values()))[0]
        resampler = Resampler(len(first.outcomes), confidence, first.weights)
        estimates = {label: resampler.estimate(table) for label, table in tables.items()}
        prior = resampler.prior(list(tables.values()))
        if baseline in tables:
            own = tables[baseline]
            against = {k: resampler.estimate(scale.sign * (t - own), prior) for k, t in tables.items() if k != baseline}
            corrected = dict(zip(against, holm([e.p for e in against.values()]), strict=True))
        beats = better([scale.sign * table for table in tables.values()], resampler, prior)
        places = dict(zip(tables, ranks(beats), strict=True))
    rows = [
        _row(s, costs[s.arm.label], scale, estimates, against, corrected, places, confidence, command(s.arm.label))
        for s in done
    ]
    return ordered(rows, scale)


def ordered(rows: Sequence[Row], scale: Scale) -> list[Row]:
    """Return rows as every table shows them: ranks never fall, the better mean first within one, failed ones last.

    A mean that varies a lot may share rank 1, and stand above a better one that is shown to be behind the best.
    """
    return sorted(rows, key=lambda r: (r.rank is None, r.rank or 0, -scale.sign * (r.mean or 0.0), r.method))


def _row(
    state: Standing,
    cost: Cost,
    scale: Scale,
    estimates: Mapping[str, Estimate],
    against: Mapping[str, Estimate],
    corrected: Mapping[str, float],
    places: Mapping[str, int],
    confidence: float,
    command: str,
) -> Row:
    label, failure = state.arm.label, _failure(state)
    finished = [r for r in state.reruns.values() if r.outcome == COMPLETE]
    mean = low = high = None
    if label in estimates:
        mean, low, high = _between(estimates[label], finished, scale.metric, confidence)
    elif finished:
        mean = float(np.mean([r.metrics[scale.metric] for r in finished]))
    compared = against.get(label)
    trials = list(state.trials.values())
    steps = [r.step_seconds for r in finished if r.step_seconds is not None]
    top = state.best
    return Row(
        method=label,
        rank=places.get(label),
        tie=places.get(label) == 1,
        mean=mean,
        low=low,
        high=high,
        difference=compared.mean if compared else None,
        difference_low=compared.low if compared else None,
        difference_high=compared.high if compared else None,
        p=compared.p if compared else None,
        p_corrected=corrected.get(label),
        status="ok" if failure is None else "failed",
        reason=failure,
        lr=top.lr if top else None,
        trainable_parameters=finished[0].trainable_parameters if finished else cost.trainable,
        memory_bytes=max((r.peak_memory_bytes for r in finished), default=None),
        planned_bytes=cost.peak_bytes,
        step_seconds=float(np.median(steps)) if steps else None,
        seconds=round(sum(t.seconds for t in trials) + sum(r.seconds for r in state.reruns.values()), 3),
        trials=len(trials),
        pruned=sum(t.outcome == PRUNED for t in trials),
        diverged=sum(t.outcome == DIVERGED for t in trials),
        seeds=len(finished),
        command=command,
        optimizer_bytes=max((r.optimizer_bytes for r in finished if r.optimizer_bytes is not None), default=None),
    )


def _between(
    estimate: Estimate, reruns: Sequence[RerunResult], metric: str, confidence: float
) -> tuple[float, float, float]:
    """Return mean, low, high; of a share within 0 and 1, and not without width where every record went alike."""
    if metric not in SHARES:
        return estimate.mean, estimate.low, estimate.high
    low, high = max(0.0, estimate.low), min(1.0, estimate.high)
    if estimate.mean in (0.0, 1.0):
        low, high = interval(estimate.mean, len(reruns[0].outcomes), confidence)
    return estimate.mean, low, high


def _failure(state: Standing) -> str | None:
    """Return why an arm failed: a seed that broke is no small matter, so all seeds must have gone through."""
    if state.reason is not None:
        return state.reason
    broken = [r for r in state.reruns.values() if r.outcome != COMPLETE]
    if broken:
        return f"{len(broken)} of {len(state.reruns)} seeds {broken[0].outcome}: {broken[0].reason}"
    return None if state.reruns else "no seed was run"


def arm_result(state: Standing, cost: Cost, recipe: str | None, command: str) -> ArmResult:
    """Return everything about one arm."""
    arm, top = state.arm, state.best
    adapt: dict[str, Any] = dict(arm.adapt or {})
    optim = dict(arm.optim)
    if top is not None:
        optim["lr"] = top.lr
        for path, value in top.settings.items():
            block, _, name = path.partition(".")
            (adapt if block == "adapt" else optim if block == "optim" else {})[name] = value
    plan = state.agenda
    return ArmResult(
        label=arm.label,
        axis=arm.axis,
        key=arm.key,
        title=arm.title,
        paper=arm.paper,
        adapt=adapt,
        optim=optim,
        steps=state.steps,
        recipe=recipe,
        command=command,
        trainable_parameters=cost.trainable,
        adapter_parameters=cost.adapter,
        planned_bytes=cost.peak_bytes,
        planned_flops=cost.flops,
        searched=(plan.low, plan.high) if plan is not None and arm.tune.lr != AUTO else None,
        best=top.slot if top is not None else None,
        notes=[*arm.notes, *rate_notes(state), *edge_notes(state)],
        trials=[state.trials[p.name] for p in (plan.proposals if plan else []) if p.name in state.trials],
        reruns=list(state.reruns.values()),
    )


def rate_notes(state: Standing) -> list[str]:
    """Return how the best trial's rate was measured, and what that cost beside the trial."""
    top = state.best
    if top is None or top.rate is None:
        return []
    rate = MeasuredRate(**top.rate)
    return [f"learning rate {rate} beside the {top.steps} of its one trial; no rate was searched"]


def edge_notes(state: Standing) -> list[str]:
    """Return the warnings about a best rate that lay on the edge of its range."""
    if state.agenda is None or state.best is None:
        return []
    extra = sum(p.name.startswith("wider") for p in state.agenda.proposals)
    notes = []
    if extra and not state.agenda.open(state.seen):
        notes.append(
            f"the best learning rate lay on the edge of its range, which was widened to {state.agenda.low:g} ... "
            f"{state.agenda.high:g} in {extra} more trials; the best is {state.best.lr:g}"
        )
    if state.agenda.edge is not None:
        notes.append(
            f"the best learning rate {state.best.lr:g} lies on the {state.agenda.edge} edge of what was searched "
            f"({state.agenda.low:g} ... {state.agenda.high:g}): a better one may lie beyond; widen tune.lr"
        )
    return notes


def in_words(confidence: float) -> str:
    """Return how the statistics are made, for a report."""
    return METHOD.format(draws=f"{DRAWS:,}", confidence=confidence)
