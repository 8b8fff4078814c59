"""Learning rates and losses. Traces are made for every arm; the page colours those a reader picks, the rest is grey.

meta = {"arm": label, "part": ...} tells the page what a trace is: "line", "points", "best", "stopped", "broken" (in a
strip above, since their loss is no number), "band" and "mean". The page's script gives every picked arm a place, and
with it a colour, a dash and a height in the strip.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from rankworks.compare.result import ArmResult, CompareResult, TrialResult
from rankworks.train.report.charts import smoothed
from rankworks.train.report.style import GREY, caption, style, ticks
from rankworks.train.result import SHARES

HEIGHT = 440
SPREAD = 10.0
"""Losses that differ by more than this factor are shown on a logarithmic scale."""

Curve = list[tuple[int, float]]


class Tuned:
    """How trials' values are shown: a loss as it is, a score, which is minimised as its negative, as itself."""

    def __init__(self, result: CompareResult):
        name = result.tuned_on.removeprefix("validation ").replace(" ", "_")
        self.score = "loss" not in result.tuned_on
        self.factor = (-100.0 if name in SHARES else -1.0) if self.score else 1.0
        self.title = f"{result.tuned_on}{' %' if name in SHARES else '' if self.score else f', {result.loss_unit}'}"

    def shown(self, values: Sequence[float]) -> list[float]:
        """Return values as a reader sees them."""
        return [self.factor * value for value in values]


def ordered(result: CompareResult) -> list[ArmResult]:
    """Return the arms in the order of the leaderboard, those that are not on it last."""
    places = {row.method: i for i, row in enumerate(result.leaderboard)}
    return sorted(result.arms, key=lambda arm: places.get(arm.label, len(places)))


def rate_chart(result: CompareResult) -> go.Figure | None:
    """What every trial reached over its learning rate; trials that were stopped and those that broke stand out."""
    arms, tuned = [arm for arm in ordered(result) if any(t.lr for t in arm.trials)], Tuned(result)
    if not arms:
        return None
    drawing = go.Figure()
    for arm in arms:
        done = [t for t in arm.trials if t.outcome == "complete" and t.value is not None]
        _rates(drawing, arm, "line", _lowest(done), tuned)
        _rates(drawing, arm, "points", [t for t in done if t.slot != arm.best], tuned)
        _rates(drawing, arm, "best", [t for t in done if t.slot == arm.best], tuned)
        _rates(drawing, arm, "stopped", [t for t in arm.trials if t.outcome == "pruned" and t.value is not None], tuned)
        _rates(drawing, arm, "broken", [t for t in arm.trials if t.value is None], tuned)
    style(drawing, HEIGHT)
    broken = any(t.value is None for arm in arms for t in arm.trials)
    values = [t.value for arm in arms for t in arm.trials if t.value is not None]
    rates = [t.lr for arm in arms for t in arm.trials if t.lr is not None]
    marks = ticks(min(rates), max(rates))
    captions = [caption(tuned.title, 0.78 if broken else 1)]
    drawing.update_layout(
        hovermode="closest",
        showlegend=False,
        xaxis={"title": "learning rate", "type": "log", "range": _decades(rates), "tickvals": marks},
        yaxis={"domain": [0, 0.78 if broken else 1], "type": _scale(values)},
        yaxis2={"domain": [0.87, 1], "range": [-0.7, 7.7], "visible": False},
        annotations=[*captions, caption("diverged or failed", 1)] if broken else captions,
        margin={"r": 20, "b": 62},
    )
    drawing.update_xaxes(ticktext=[f"{mark:.0e}".replace("e-0", "e-").replace("e+00", "") for mark in marks])
    _decade_ticks(drawing, values)
    return drawing


def _rates(drawing: go.Figure, arm: ArmResult, part: str, trials: Sequence[TrialResult], tuned: Tuned) -> None:
    if not trials:
        return
    symbol = {"stopped": "circle-open", "broken": "x-thin-open", "best": "star", "points": "circle"}.get(part)
    size = {"best": 14, "broken": 9}.get(part, 7)
    drawing.add_scatter(
        x=[t.lr for t in trials],
        y=[0.0 for _ in trials] if part == "broken" else tuned.shown([float(t.value or 0) for t in trials]),
        yaxis="y2" if part == "broken" else "y",
        mode="lines" if part == "line" else "markers",
        marker={"color": GREY, "size": size, "symbol": symbol, "line": {"width": 1.6}} if symbol else None,
        line={"color": GREY, "width": 1} if part == "line" else None,
        meta={"arm": arm.label, "part": part, "labels": part == "best"},
        text=[escape(arm.label) for _ in trials],
        customdata=[_told(t) for t in trials],
        hoverinfo="skip" if part == "line" else None,
        hovertemplate=None if part == "line" else "<b>%{text}</b><br>lr %{x:.3g}<br>%{customdata}<extra></extra>",
    )


def _told(trial: TrialResult) -> str:
    """Return a trial in words for the hover; its reason in lines."""
    said = f"{trial.slot}: {trial.outcome} after {trial.steps} steps"
    said += "" if trial.value is None else f", {abs(trial.value):.4g}"
    if trial.values:
        said += f" (seeds: {', '.join('broken' if v is None else f'{abs(v):.4g}' for v in trial.values)})"
    settings = ", ".join(f"{name} {value}" for name, value in trial.settings.items())
    reason = trial.reason or ""
    lines = [said, settings, *(reason[i : i + 60] for i in range(0, min(len(reason), 240), 60))]
    return "<br>".join(escape(line) for line in lines if line)


def _lowest(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the best trial of every learning rate, by rising rate: other settings may have been tuned too."""
    best: dict[float, TrialResult] = {}
    for trial in sorted(trials, key=lambda t: float(t.value or 0), reverse=True):
        best[float(trial.lr or 0)] = trial
    return [best[lr] for lr in sorted(best)]


def final_chart(result: CompareResult, which: str) -> go.Figure | None:
    """Training ("losses") or validation ("valid") curves of the final runs: their mean and range over the seeds."""
    tuned = Tuned(result)
    curves = {arm.label: [getattr(r, which) for r in arm.reruns if getattr(r, which)] for arm in ordered(result)}
    curves = {label: found for label, found in curves.items() if found}
    if not curves:
        return None
    drawing = go.Figure()
    values: list[float] = []
    for label, found in curves.items():
        steps, mean, low, high = _over_seeds(found, span=2 if which == "losses" else 0)
        if which == "valid":
            mean, low, high = tuned.shown(mean), tuned.shown(low), tuned.shown(high)
        values += low + high
        quiet: dict[str, Any] = {"mode": "lines", "hoverinfo": "skip", "line": {"width": 0, "color": GREY}}
        for ends, fill in ((low, "none"), (high, "tonexty")):
            drawing.add_scatter(x=steps, y=ends, fill=fill, meta={"arm": label, "part": "band"}, visible=False, **quiet)
        drawing.add_scatter(
            x=steps, y=mean, mode="lines", line={"width": 1, "color": GREY}, meta={"arm": label, "part": "mean"},
            name=escape(label), hovertemplate="%{y:.4g}",
        )  # fmt: skip
    _finish(drawing, tuned.title if which == "valid" else f"training loss, {result.loss_unit}", values)
    drawing.update_layout(hovermode="closest", showlegend=False)
    drawing.update_traces(hovertemplate="<b>%{fullData.name}</b><br>step %{x}: %{y:.4g}<extra></extra>")
    return drawing


def _over_seeds(curves: Sequence[Curve], span: int) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return steps that all curves have, and mean, lowest and highest there, each curve smoothed over 2 span + 1."""
    tables = [
        dict(zip([step for step, _ in curve], smoothed([y for _, y in curve], span), strict=True)) for curve in curves
    ]
    steps = sorted(set.intersection(*(set(table) for table in tables))) or sorted(tables[0])
    seen = [[table[step] for table in tables if step in table] for step in steps]
    return steps, [sum(ys) / len(ys) for ys in seen], [min(ys) for ys in seen], [max(ys) for ys in seen]


def trial_chart(result: CompareResult) -> go.Figure | None:
    """Curves of every trial, of one arm at a time: the darker the line the smaller the learning rate."""
    arms, tuned = [arm for arm in ordered(result) if arm.trials], Tuned(result)
    if not arms:
        return None
    drawing = go.Figure()
    for i, arm in enumerate(arms):
        trials = sorted(arm.trials, key=lambda t: (t.lr or 0, t.number))
        shades = [0.85 * k / max(1, len(trials) - 1) for k in range(len(trials))]
        colours = [str(colour) for colour in sample_colorscale("Viridis", shades)]
        for trial, colour in zip(trials, colours, strict=True):
            _course(drawing, arm, trial, colour, tuned, visible=i == 0)
    _finish(drawing, tuned.title, tuned.shown([y for arm in arms for t in arm.trials for _, y in t.valid]))
    drawing.update_layout(
        height=HEIGHT + 60, showlegend=True, hovermode="closest", yaxis={"autorange": True},
        legend={"orientation": "h", "x": 0, "y": -0.18, "yanchor": "top"}, margin={"b": 130},
    )  # fmt: skip
    return drawing


def _course(drawing: go.Figure, arm: ArmResult, trial: TrialResult, colour: str, tuned: Tuned, visible: bool) -> None:
    """Add the curve of one trial; of one that broke before it was validated there is only its name."""
    curve = trial.valid
    best, whole = trial.slot == arm.best, trial.outcome == "complete"
    marks = [0] * (len(curve) - 1) + [8] if curve else [8]
    drawing.add_scatter(
        x=[step for step, _ in curve] or [None],
        y=tuned.shown([y for _, y in curve]) or [None],
        mode="lines+markers",
        name=f"{trial.lr or 0:.3g} {'best' if best else '' if whole else trial.outcome}".strip(),
        line={"color": colour, "width": 3.5 if best else 2, "dash": "solid" if whole else "dot"},
        marker={"color": colour, "size": marks, "symbol": "circle" if whole else "x-thin-open", "line": {"width": 2}},
        meta={"arm": arm.label, "part": "course"},
        visible=visible,
        text=[_told(trial)] * max(1, len(curve)),
        hovertemplate="lr %{fullData.name}<br>step %{x}: %{y:.4g}<br>%{text}<extra></extra>",
    )


def _finish(drawing: go.Figure, title: str, values: Sequence[float]) -> None:
    style(drawing, HEIGHT)
    drawing.update_layout(xaxis={"title": "step"}, yaxis={"type": _scale(values)}, annotations=[caption(title, 1)])
    drawing.update_layout(margin={"r": 20, "b": 62})
    _decade_ticks(drawing, values)


def _scale(values: Sequence[float]) -> str:
    return "log" if values and min(values) > 0 and max(values) > SPREAD * min(values) else "linear"


def _decade_ticks(drawing: go.Figure, values: Sequence[float]) -> None:
    if _scale(values) == "log":
        marks = ticks(min(values), max(values))
        drawing.update_layout(yaxis={"tickvals": marks, "ticktext": [f"{mark:g}" for mark in marks]})


def _decades(rates: Sequence[float]) -> list[float]:
    """Return the range of a logarithmic axis with some air at both ends."""
    low, high = log10(min(rates)), log10(max(rates))
    air = 0.08 * (high - low) or 0.5
    return [low - air, high + air]
