"""What the leaderboard allows one to conclude, in sentences: nothing is called better that was not shown to be.

Two facts carry every claim. Rank 1 is a confidence set: the best arm is in it, and who stands alone there is the best.
Against the baseline an arm is better or worse when its p-value, corrected for all comparisons, is below 1 - confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankworks.compare.result import CompareResult, Row
from rankworks.compare.words import number, unit
from rankworks.train.report.words import size

NAMED = 6
"""Arms that a sentence names; more are counted."""


def ran(result: CompareResult) -> list[Row]:
    """Return the rows that have a rank, best first."""
    return [row for row in result.leaderboard if row.rank is not None]


def against_baseline(row: Row, result: CompareResult) -> str | None:
    """Return "better", "worse" or "not shown" for a row beside the baseline; None where nothing was compared.

    The interval of the difference is that of one comparison, the p-value is corrected for all: both must agree.
    """
    if result.baseline is None or row.difference is None or row.p_corrected is None:
        return None
    if row.p_corrected >= 1 - result.confidence:
        return "not shown"
    if row.difference > 0 and (row.difference_low is None or row.difference_low > 0):
        return "better"
    if row.difference < 0 and (row.difference_high is None or row.difference_high < 0):
        return "worse"
    return "not shown"


def headline(result: CompareResult) -> str:
    """Return the sentence to remember."""
    rows, best = ran(result), [row for row in result.leaderboard if row.tie]
    if not best:
        return "No method ran to its end: there is nothing to conclude."
    if len(rows) == 1:
        return f"{best[0].method} alone ran to its end: there is nothing to compare it to."
    if len(best) == 1:
        return f"{best[0].method} is the best of {len(rows)} methods here ({result.confidence:.0%} confidence)."
    if len(best) == len(rows):
        return f"The {len(rows)} methods cannot be told apart: choose by cost."
    return f"{len(best)} of {len(rows)} methods cannot be told apart from the best: choose among them by cost."


def advice(result: CompareResult) -> list[str]:
    """Return the sentences that follow: who is tied, who is cheapest among them, what stands against the baseline."""
    best = [row for row in result.leaderboard if row.tie]
    said = []
    if len(best) > 1:
        said += [f"Tied for the best: {named([row.method for row in best])}.", *_cheapest(best, result)]
    said += _beside_baseline(result)
    if len(best) > 1:
        seeds, records = len(result.budget.get("seeds") or [0]), result.data.get("test")
        said.append(
            f"{seeds} {'seed' if seeds == 1 else 'seeds'} and {records} test records show no smaller differences: "
            "more of both would."
        )
    return said + _untouched(result)


def named(labels: Sequence[str]) -> str:
    """Return names in a row, the first ones of many."""
    if len(labels) > NAMED + 1:
        return f"{', '.join(labels[:NAMED])} and {len(labels) - NAMED} more"
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


@dataclass(frozen=True)
class Cost:
    """A cost of a row; measured ones are noisy, and whoever is within `noise` of the least shares the praise."""

    one: str
    several: str
    value: Callable[[Row], float | None]
    told: Callable[[float], str]
    noise: float = 0.0


STATE = Cost(
    "keeps the least for its optimizer", "keep the least for their optimizers", lambda r: r.optimizer_bytes, size, 0.01
)
"""Told where optimizers differ: under one optimizer it follows from the trained numbers."""

COSTS = (
    Cost("trains the fewest numbers", "train the fewest numbers", lambda r: r.trainable_parameters, "{:,.0f}".format),
    STATE,
    Cost("needs the least memory", "need the least memory", lambda r: r.memory_bytes, size, 0.05),
    Cost("has the shortest step", "have the shortest step", lambda r: r.step_seconds, "{:.2g} s".format, 0.1),
)


def _cheapest(best: Sequence[Row], result: CompareResult) -> list[str]:
    """Return who among the tied costs least; nothing of a cost that is the same for all.

    Only those whose interval reaches the first one's: few seeds may fail to show that a far worse arm is worse, and
    that is no reason to take it.
    """
    best, found = [row for row in best if _reaches(row, best[0], result)], []
    for cost in COSTS if result.compares_optimizers else [cost for cost in COSTS if cost is not STATE]:
        known = [(value, row.method) for row in best if (value := cost.value(row)) is not None]
        least = min((value for value, _ in known), default=0)
        low = [label for value, label in known if value <= (1 + cost.noise) * least]
        if len(low) < len(known):
            found.append(f"{named(low)} {cost.one if len(low) == 1 else cost.several} ({cost.told(least)})")
    return [f"Among them {'; '.join(found)}."] if found else []


def _reaches(row: Row, first: Row, result: CompareResult) -> bool:
    """Say whether a row's interval meets that of the first row."""
    if row.low is None or row.high is None or first.low is None or first.high is None:
        return True
    return row.high >= first.low if result.higher_is_better else row.low <= first.high


def _beside_baseline(result: CompareResult) -> list[str]:
    judged = {row.method: against_baseline(row, result) for row in result.leaderboard}
    if not any(judged.values()):
        return []
    better = [label for label, is_ in judged.items() if is_ == "better"]
    worse = [label for label, is_ in judged.items() if is_ == "worse"]
    name = result.baseline
    said = [
        f"Shown to be better than {name}: {named(better)}."
        if better
        else f"No method is shown to be better than {name}, the baseline."
    ]
    return [*said, f"Shown to be worse: {named(worse)}."] if worse else said


def _untouched(result: CompareResult) -> list[str]:
    """Return a warning where no arm is clearly better than the model before training."""
    base, rows = result.base.get(result.metric), ran(result)
    if base is None or not rows:
        return []
    told = number(base, result.metric)
    ends = [row.low if result.higher_is_better else row.high for row in rows]
    if any(end is not None and (end > base if result.higher_is_better else end < base) for end in ends):
        return []
    return [f"No method is shown to be better than the untouched model ({unit(result.metric)} {told})."]
