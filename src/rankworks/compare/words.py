"""Numbers of a comparison as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankworks.train.result import SHARES


def number(value: float | None, metric: str, sign: bool = False) -> str:
    """Return a value of the metric as people read it: shares in per cent, losses with four digits."""
    if value is None:
        return ""
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if metric in SHARES else f"{value:{plus}.4f}"


def unit(metric: str) -> str:
    """Return the metric's name with its unit."""
    return f"{metric.replace('_', ' ')} %" if metric in SHARES else metric.replace("_", " ")


def tuning(budget: Mapping[str, Any]) -> str:
    """Return how many runs an arm was tuned on."""
    seeds = budget.get("tuning_seeds", 1)
    mean = f", each the mean of {seeds} seeds" if seeds > 1 else ""
    return f"{budget.get('trials')} trials of {budget.get('steps')} steps{mean}"


def p_value(p: float | None) -> str:
    """Return a p-value as people read it."""
    return "" if p is None else "<0.0001" if p < 1e-4 else f"{p:.2g}"
