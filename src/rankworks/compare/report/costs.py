"""Score against what it cost, three views of one picture, with the Pareto front: no arm is cheaper and better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

import plotly.graph_objects as go

from rankworks.compare.conclude import ran
from rankworks.compare.result import CompareResult
from rankworks.compare.words import number
from rankworks.train.report.style import BLUE, GREY, ORANGE, style, ticks
from rankworks.train.report.words import duration, size
from rankworks.train.result import SHARES

HEIGHT = 440
STATE = "optimizer state"
TICKS = {STATE: ("~s", "B"), "trained numbers": ("~s", ""), "peak memory": ("~s", "B"), "time of a run": (",~r", " s")}
"""Per view, how plotly writes a number, and its unit."""


@dataclass(frozen=True)
class Point:
    """An arm in a view: what it cost, what it reached, and both in words."""

    label: str
    cost: float
    told: str
    mean: float
    low: float | None
    high: float | None


def points(result: CompareResult) -> dict[str, list[Point]]:
    """Return {view: points}, best arms first; an arm whose cost is not known is not in that view.

    A cost that is the same for all is no view, unless every one is.
    """
    views: dict[str, list[Point]] = {view: [] for view in TICKS}
    runs = {arm.label: [r.seconds for r in arm.reruns if r.outcome == "complete"] for arm in result.arms}
    for row in ran(result):
        if row.mean is None:
            continue
        times = runs.get(row.method)
        costs = {
            "trained numbers": (row.trainable_parameters, f"{row.trainable_parameters:,}"),
            STATE: (row.optimizer_bytes if result.compares_optimizers else None, size(row.optimizer_bytes or 0)),
            "peak memory": (row.memory_bytes, size(row.memory_bytes or 0)),
            "time of a run": (median(times), duration(median(times))) if times else (None, ""),
        }
        for view, (cost, told) in costs.items():
            if cost is not None:
                views[view].append(Point(row.method, cost, told, row.mean, row.low, row.high))
    told = {view: found for view, found in views.items() if len({point.cost for point in found}) > 1}
    return told or {view: found for view, found in views.items() if found}


def pareto(candidates: Sequence[Point], higher: bool) -> list[Point]:
    """Return those that no other beats in one of cost and mean without losing in the other, cheapest first."""
    front: list[Point] = []
    for point in sorted(candidates, key=lambda p: (p.cost, -p.mean if higher else p.mean)):
        last = front[-1] if front else None
        gains = last is None or (point.mean > last.mean if higher else point.mean < last.mean)
        if gains or (last is not None and (point.cost, point.mean) == (last.cost, last.mean)):
            front.append(point)
    return front


def cost_charts(result: CompareResult) -> dict[str, go.Figure]:
    """Return {view: figure}."""
    return {view: _chart(found, view, result) for view, found in points(result).items()}


def _chart(found: list[Point], view: str, result: CompareResult) -> go.Figure:
    front = pareto(found, result.higher_is_better)
    on_front = {point.label for point in front}
    behind = [point for point in found if point.label not in on_front]
    factor = 100 if result.metric in SHARES else 1
    drawing = go.Figure()
    if len({point.cost for point in front}) > 1:
        drawing.add_scatter(
            x=[p.cost for p in front], y=[factor * p.mean for p in front], mode="lines", name="Pareto front",
            line={"shape": "hv", "color": BLUE, "width": 1.5, "dash": "dot"}, hoverinfo="skip",
        )  # fmt: skip
    _dots(drawing, behind, "behind it", GREY, factor, result)
    _dots(drawing, front, "on the front", BLUE, factor, result, needed=True)
    for point in found:
        if point.label == result.baseline:
            drawing.add_scatter(
                x=[point.cost], y=[factor * point.mean], name="the baseline", mode="markers", hoverinfo="skip",
                marker={"color": ORANGE, "size": 17, "symbol": "diamond-open", "line": {"width": 2}},
                meta={"labels": True, "needed": True}, text=[escape(point.label)],
            )  # fmt: skip
    style(drawing, HEIGHT)
    costs = [point.cost for point in found]
    logarithmic = min(costs) > 0 and max(costs) > 8 * min(costs)
    tick, suffix = TICKS[view]
    better = "higher" if result.higher_is_better else "lower"
    drawing.update_layout(
        hovermode="closest",
        xaxis={"title": f"{view}{', logarithmic' if logarithmic else ''}", "type": "log" if logarithmic else "linear"},
        yaxis={"title": {"text": f"{result.unit} ({better} is better)", "standoff": 8}},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        margin={"t": 40, "b": 62, "r": 20},
    )
    drawing.update_xaxes(tickformat=tick, ticksuffix=suffix, nticks=8)
    if logarithmic:
        drawing.update_xaxes(tickvals=ticks(min(costs), max(costs)))
    return drawing


def _dots(
    drawing: go.Figure,
    found: Sequence[Point],
    name: str,
    colour: str,
    factor: float,
    result: CompareResult,
    needed: bool = False,
) -> None:
    """Add points with their intervals; meta.labels asks the page to name those that have the room, "needed" first."""
    if not found:
        return
    drawing.add_scatter(
        x=[p.cost for p in found],
        y=[factor * p.mean for p in found],
        name=name,
        mode="markers",
        marker={"color": colour, "size": 10},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [factor * ((p.mean if p.high is None else p.high) - p.mean) for p in found],
            "arrayminus": [factor * (p.mean - (p.mean if p.low is None else p.low)) for p in found],
            "color": "rgba(100, 116, 139, 0.4)",
            "thickness": 1.2,
            "width": 0,
        },
        meta={"labels": True, "needed": needed},
        text=[escape(p.label) for p in found],
        customdata=[[p.told, f"{number(p.low, result.metric)} to {number(p.high, result.metric)}"] for p in found],
        hovertemplate="<b>%{text}</b><br>%{y:.4g} (%{customdata[1]})<br>%{customdata[0]}<extra></extra>",
    )
