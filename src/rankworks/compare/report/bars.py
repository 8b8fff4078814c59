"""Intervals as small drawings in a table: a line from low to high, a dot at the mean, on a scale all rows share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Axis:
    """The scale of a column of bars; mark: a value that a thin line shows in every row."""

    low: float
    high: float
    mark: float | None = None

    @classmethod
    def over(
        cls,
        values: Iterable[float | None],
        mark: float | None = None,
        within: tuple[float, float] = (float("-inf"), float("inf")),
    ) -> Axis | None:
        """Return a scale that holds all values, with some air as far as `within` allows; None where there are none."""
        known = [value for value in [*values, mark] if value is not None]
        if not known:
            return None
        air = 0.04 * (max(known) - min(known)) or 0.5 * abs(known[0]) or 1.0
        return cls(max(min(known) - air, within[0]), min(max(known) + air, within[1]), mark)

    def place(self, value: float) -> str:
        """Return where a value lies, in per cent of the width."""
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"


def bar(axis: Axis, mean: float, low: float | None, high: float | None, style: str, says: str) -> str:
    """Return the drawing of one interval. style: a class of the page's; says: the same in words."""
    inner = ""
    if axis.mark is not None:
        inner += f'<line class="mark" x1="{axis.place(axis.mark)}" x2="{axis.place(axis.mark)}" y1="0" y2="100%"/>'
    if low is not None and high is not None:
        inner += f'<line class="span" x1="{axis.place(low)}" x2="{axis.place(high)}" y1="50%" y2="50%"/>'
    inner += f'<circle cx="{axis.place(mean)}" cy="50%" r="4"/>'
    return f'<svg class="bar {style}" role="img" aria-label="{escape(says)}"><title>{escape(says)}</title>{inner}</svg>'
