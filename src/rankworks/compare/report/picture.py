"""`result.svg`: a leaderboard to look at, in a page of text or on a slide. One panel per comparison, a row per method.

         in the few      in the many
    lora     --o--             -o-
    vera   ---o---           -o-

A dot is a mean over seeds and test records, a line its interval; dots of arms that are not told apart from the best are
filled, the baseline's mean is the vertical line. The picture takes the reader's light or dark ground.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rankworks.compare.report.bars import Axis
from rankworks.compare.result import CompareResult, Row
from rankworks.core.files import atomic_write
from rankworks.train.report.words import amount, size
from rankworks.train.result import SHARES

NAME = "result.svg"
WIDTH, ROW, HEAD, FOOT = 860, 20, 58, 54
"""Pixels: the whole width, a row, what stands above the rows and below them."""
LETTER = 7.6
"""Width of a letter of a label, about."""
STYLE = """
text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #1f2937 }
.soft { fill: #6b7280; font-size: 12px } .own { font-weight: 650 } .head { font-weight: 600; font-size: 14px }
line { stroke: #6b7280 } .grid { stroke: #e5e7eb } .mark { stroke: #9ca3af; stroke-dasharray: 3 3 }
.span { stroke-width: 1.6 } .dot { fill: #ffffff; stroke: #6b7280; stroke-width: 1.6 }
.best.span { stroke: #2563eb } .best.dot { fill: #2563eb; stroke: #2563eb }
@media (prefers-color-scheme: dark) {
  text { fill: #e5e7eb } .soft { fill: #9ca3af } line { stroke: #9ca3af } .grid { stroke: #374151 }
  .mark { stroke: #6b7280 } .dot { fill: #0d1117; stroke: #9ca3af }
  .best.span { stroke: #60a5fa } .best.dot { fill: #60a5fa; stroke: #60a5fa }
}"""


@dataclass(frozen=True)
class Panel:
    """A comparison's place in the picture: its rows by method, its scale, and from where to where it goes in pixels."""

    result: CompareResult
    title: str
    left: float
    right: float

    @property
    def rows(self) -> dict[str, Row]:
        """The leaderboard by method."""
        return {row.method: row for row in self.result.leaderboard}

    @property
    def axis(self) -> Axis | None:
        """The scale of means and intervals; None where no arm has one."""
        values = [value for row in self.result.leaderboard for value in (row.mean, row.low, row.high)]
        return Axis.over(values, within=(0.0, 1.0) if self.result.metric in SHARES else (-math.inf, math.inf))

    def x(self, axis: Axis, value: float) -> float:
        """Return where a value lies, in pixels from the left."""
        return self.left + (self.right - self.left) * (value - axis.low) / (axis.high - axis.low)


def picture(results: Sequence[CompareResult], titles: Sequence[str] = ()) -> str:
    """Return comparisons side by side as SVG, the methods in the order of the mean of their ranks.

    titles: of the panels, else what each comparison calls itself.
    """
    methods = _order(results)
    first = results[0]
    labels, costs = 14 + LETTER * max([len(m) for m in methods] or [0]), 96 * _tells_cost(first)
    each = (WIDTH - labels - costs) / len(results)
    panels = [
        Panel(result, title, labels + at * each + 8, labels + (at + 1) * each - 16)
        for at, (result, title) in enumerate(zip(results, titles or [r.title for r in results], strict=True))
    ]
    bottom = HEAD + ROW * len(methods)
    parts = [
        f'<text x="{labels - 6:.0f}" y="{_middle(at)}" text-anchor="end"{_own(method, first)}>{escape(method)}</text>'
        for at, method in enumerate(methods)
    ]
    for panel in panels:
        parts += _panel(panel, methods, bottom)
    if costs:
        parts += _costs(results, methods)
    parts.append(f'<text class="soft" x="6" y="{bottom + 46}">{escape(_legend(first))}</text>')
    says = "; ".join(panel.title for panel in panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + FOOT}" width="{WIDTH}" role="img">'
        f"<title>{escape(says)}</title><style>{STYLE}\n</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def write_picture(result: CompareResult, folder: str | Path) -> Path:
    """Write `result.svg` into a folder; return its path."""
    path = Path(folder) / NAME
    atomic_write(path, picture([result]))
    return path


def _order(results: Sequence[CompareResult]) -> list[str]:
    """Return the methods of all comparisons, best first: by the mean of their places on the leaderboards."""
    places: dict[str, list[int]] = {}
    for result in results:
        for at, row in enumerate(result.leaderboard):
            places.setdefault(row.method, []).append(at if row.status == "ok" else len(result.leaderboard))
    return sorted(places, key=lambda method: sum(places[method]) / len(places[method]))


def _panel(panel: Panel, methods: Sequence[str], bottom: int) -> Iterator[str]:
    yield f'<text class="head" x="{panel.left:.0f}" y="20">{escape(panel.title)}</text>'
    result = panel.result
    better = "" if result.higher_is_better else ", lower is better"
    said = f"{result.unit}{better}; {result.data['train']:,} training records"
    yield f'<text class="soft" x="{panel.left:.0f}" y="38">{escape(said)}</text>'
    axis = panel.axis
    if axis is None:
        return
    for value in ticks(axis):
        x = panel.x(axis, value)
        told = f"{100 * value:.4g}" if panel.result.metric in SHARES else f"{value:.4g}"
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 8}" y2="{bottom}"/>'
        yield f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{told}</text>'
    own = panel.rows.get(panel.result.baseline or "")
    if own is not None and own.mean is not None:
        x = panel.x(axis, own.mean)
        yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 8}" y2="{bottom}"/>'
    for at, method in enumerate(methods):
        row = panel.rows.get(method)
        if row is not None:
            yield from _row(panel, axis, row, _middle(at) - 4)


def _row(panel: Panel, axis: Axis, row: Row, y: int) -> Iterator[str]:
    if row.mean is None or row.status != "ok":
        yield f'<text class="soft" x="{panel.left:.0f}" y="{y + 4}">{escape(row.status)}</text>'
        return
    best = "best " if row.tie else ""
    if row.low is not None and row.high is not None:
        ends = f'x1="{panel.x(axis, row.low):.1f}" x2="{panel.x(axis, row.high):.1f}"'
        yield f'<line class="{best}span" {ends} y1="{y}" y2="{y}"/>'
    yield f'<circle class="{best}dot" cx="{panel.x(axis, row.mean):.1f}" cy="{y}" r="4"/>'


def _tells_cost(result: CompareResult) -> bool:
    return result.tells_trained or result.compares_optimizers


def _costs(results: Sequence[CompareResult], methods: Sequence[str]) -> Iterator[str]:
    """What each method costs, at the right: numbers trained, or bytes of state among optimizers."""
    rows = {row.method: row for result in results for row in result.leaderboard}
    trained = results[0].tells_trained
    yield f'<text class="soft" x="{WIDTH - 6}" y="38" text-anchor="end">{"trained" if trained else "state"}</text>'
    for at, method in enumerate(methods):
        row = rows[method]
        told = amount(row.trainable_parameters) if trained else size(row.optimizer_bytes or 0)
        yield f'<text class="soft" x="{WIDTH - 6}" y="{_middle(at)}" text-anchor="end">{told}</text>'


def _legend(result: CompareResult) -> str:
    seeds = len(result.budget.get("seeds") or [])
    line = f" Dashed: {result.baseline}." if result.baseline else ""
    return (
        f"Mean of {seeds} seeds with its {result.confidence:.0%} interval, every method at its own best learning rate. "
        f"Filled: not told apart from the best.{line}"
    )


def _own(method: str, result: CompareResult) -> str:
    return ' class="own"' if method == result.baseline else ""


def _middle(at: int) -> int:
    """The baseline of a row's text, in pixels from above."""
    return HEAD + ROW * at + 14


def ticks(axis: Axis, about: int = 4) -> list[float]:
    """Return round values within an axis, about so many: 1, 2 or 5 times a power of ten apart."""
    wide = (axis.high - axis.low) / about
    power = 10.0 ** math.floor(math.log10(wide))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / wide)))
    first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]
