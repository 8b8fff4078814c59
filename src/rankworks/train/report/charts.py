"""The charts of a run, as plotly figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from rankworks.train.report.gather import Evidence, interval, per_class
from rankworks.train.report.style import BLUE, GREY, ORANGE, caption, style
from rankworks.train.result import Confusion


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Return the mean of each value and those up to `span` before and after it (fewer at the ends)."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - span), min(len(values), i + span + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]


def loss_chart(evidence: Evidence) -> go.Figure | None:
    """Loss of every step, smoothed over a tenth of the run, and the learning rate under it."""
    steps = evidence.steps
    if not steps:
        return None
    x, loss = [row["step"] for row in steps], [row["loss"] for row in steps]
    figure = go.Figure()
    figure.add_scatter(
        x=x, y=loss, name="loss of the step", mode="lines", line={"color": GREY, "width": 1}, opacity=0.75,
        hovertemplate="%{y:.4f}",
    )  # fmt: skip
    if len(x) > 4:
        span = max(1, len(x) // 20)
        figure.add_scatter(
            x=x, y=smoothed(loss, span), name=f"mean over {2 * span + 1} steps", mode="lines",
            line={"color": BLUE, "width": 2.5}, hovertemplate="%{y:.4f}",
        )  # fmt: skip
    valid = [row for row in evidence.result.valid if "loss" in row]
    if valid:
        figure.add_scatter(
            x=[row["step"] for row in valid], y=[row["loss"] for row in valid], name="validation loss",
            mode="lines+markers", line={"color": ORANGE, "width": 2}, hovertemplate="%{y:.4f}",
        )  # fmt: skip
    figure.add_scatter(
        x=x, y=[row["lr"] for row in steps], name="learning rate", yaxis="y2", mode="lines", fill="tozeroy",
        line={"color": ORANGE, "width": 1.5}, fillcolor="rgba(245, 158, 11, 0.12)", hovertemplate="%{y:.3g}",
        showlegend=False,
    )  # fmt: skip
    style(figure, 400)
    figure.update_layout(
        hovermode="x unified",
        xaxis={"title": "step", "anchor": "y2", "range": [x[0], x[-1]]},
        yaxis={"domain": [0.38, 1], "rangemode": "tozero"},
        yaxis2={"domain": [0, 0.22], "rangemode": "tozero", "tickformat": ".1e", "nticks": 3},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        annotations=[caption("loss", 1), caption("learning rate", 0.22)],
    )
    return figure


def class_chart(before: Confusion | None, after: Confusion) -> go.Figure:
    """Accuracy of every class before and after, with 95 % intervals."""
    figure = go.Figure()
    for confusion, name, colour in ((before, "before", GREY), (after, "after", BLUE)):
        if confusion is None:
            continue
        rows = per_class(confusion)
        share = [right / total if total else 0.0 for right, total in rows.values()]
        ends = [interval(s, total) if total else (0.0, 0.0) for s, (_, total) in zip(share, rows.values(), strict=True)]
        error: dict[str, Any] = {
            "type": "data",
            "symmetric": False,
            "array": [100 * (high - s) for s, (_, high) in zip(share, ends, strict=True)],
            "arrayminus": [100 * (s - low) for s, (low, _) in zip(share, ends, strict=True)],
            "color": "rgba(100, 116, 139, 0.9)",
            "thickness": 1.2,
            "width": 3,
        }
        figure.add_bar(
            x=[escape(label) for label in rows], y=[100 * s for s in share], name=name, marker_color=colour,
            error_y=error,
            customdata=[f"{right} of {total}" for right, total in rows.values()],
            hovertemplate="%{x}, " + name + ": %{y:.1f} % (%{customdata})<extra></extra>",
        )  # fmt: skip
    style(figure, 320)
    ticks = [0, 25, 50, 75, 100]
    figure.update_layout(
        barmode="group",
        bargap=0.32,
        bargroupgap=0.08,
        yaxis={"range": [0, 104], "tickvals": ticks, "ticktext": [f"{tick} %" for tick in ticks]},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
    return figure
