"""The shell of a report: one file with its styles, figures and scripts inside. It asks the network for nothing.

Parts that every report is built of: `document` around `section`s, in which `figure`s, `tabs` and `code` stand. The
look of all of them is in page.css, what they do in page.js; a report with more of its own adds both to `document`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go


def document(title: str, body: str, styles: Sequence[str] = (), scripts: Sequence[str] = ()) -> str:
    """Return a page that opens anywhere, offline.

    body: HTML. styles, scripts: CSS and JavaScript that come after those all reports share.
    """
    from plotly.offline import get_plotlyjs

    looks = "\n".join([_own("page.css"), *styles])
    codes = "".join(f"<script>\n{text}</script>\n" for text in [_own("page.js"), *scripts])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{looks}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n{codes}</body>\n</html>\n"
    )


def section(title: str, inner: str, name: str = "") -> str:
    """Return a card with a title; `name`: its id."""
    own = f' id="{escape(name)}"' if name else ""
    return f"<section{own}><h2>{escape(title)}</h2>\n{inner}</section>\n"


def figure(drawing: go.Figure, says: str, name: str = "") -> str:
    """Return a figure, drawn when it is first seen; `says`: what it shows, for those who do not see it."""
    own = f' id="{escape(name)}"' if name else ""
    height = int(drawing.to_dict()["layout"].get("height", 400))
    data = str(drawing.to_json()).replace("<", "\\u003c")  # no text of the data ends the script
    return (
        f'<div class="figure"{own} role="img" aria-label="{escape(says)}" style="height: {height}px"></div>'
        f'<script type="application/json">{data}</script>\n'
    )


def tabs(name: str, views: Mapping[str, str]) -> str:
    """Return views of which one is seen at a time: {title: HTML}, the first one first."""
    heads, panels = "", ""
    for i, (title, inner) in enumerate(views.items()):
        tab, panel = f"{name}-tab-{i}", f"{name}-view-{i}"
        heads += (
            f'<button type="button" role="tab" id="{tab}" aria-controls="{panel}" '
            f'aria-selected="{"false" if i else "true"}"{" tabindex=-1" if i else ""}>{escape(title)}</button>'
        )
        panels += f'<div role="tabpanel" id="{panel}" aria-labelledby="{tab}"{" hidden" if i else ""}>{inner}</div>'
    return f'<div class="tabs" id="{name}"><div class="heads" role="tablist">{heads}</div>{panels}</div>\n'


def code(text: str, style: str = "") -> str:
    """Return lines to be copied, with a button that does it."""
    look = f' class="{style}"' if style else ""
    return f'<div class="code"><pre{look}>{escape(text)}</pre>{copy_button("copy")}</div>'


def copy_button(words: str, text: str | None = None, says: str = "") -> str:
    """Return a button that copies `text`, or the code it stands beside."""
    given = "" if text is None else f' data-text="{escape(text)}"'
    label = f' aria-label="{escape(says)}"' if says else ""
    return f'<button type="button" class="copy"{given}{label}>{escape(words)}</button>'


def pairs(values: Mapping[str, Any]) -> str:
    """Return names and values in two columns."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f'<dl class="small">{rows}</dl>'


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
