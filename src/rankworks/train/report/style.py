"""The look of all charts. Their colours of text and grid are set in the page, for light and dark."""

from __future__ import annotations

from math import ceil, floor, log10
from typing import Any

import plotly.graph_objects as go

BLUE, ORANGE, GREY = "#3b82f6", "#f59e0b", "#94a3b8"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def style(figure: go.Figure, height: int) -> None:
    """Give a figure the look of the page."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 62, "r": 12, "t": 34, "b": 46},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13},
        hoverlabel={"font": {"family": FONT}, "align": "left"},
    )
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="outside", ticklen=4)
    figure.update_yaxes(showgrid=True, zeroline=False, automargin=True)


def caption(text: str, height: float) -> dict[str, Any]:
    """Return a title at the upper left of a panel that ends at `height`, a fraction of the figure's."""
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": height, "xanchor": "left", "yanchor": "bottom"}
    return {"text": text, "showarrow": False, "yshift": 6, **place}


def ticks(low: float, high: float) -> list[float]:
    """Return where a logarithmic axis is labelled: at 1, 2, 5 of every decade, or at 1, 3, or at 1 the longer it is."""
    decades = log10(high / low)
    marks = (1, 2, 5) if decades < 1.4 else (1, 3) if decades < 3 else (1,)
    powers = range(floor(log10(low)) - 1, ceil(log10(high)) + 1)
    return [float(f"{mark}e{power}") for power in powers for mark in marks]
