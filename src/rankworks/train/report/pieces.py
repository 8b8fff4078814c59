"""The tables of a report, as HTML. Everything that comes from data is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from rankworks.train.result import SHARES, Confusion, Shown

OPENING = 200
"""Characters of a classified text that follow its headline."""


def shown(metric: str, value: float) -> str:
    """Return a metric's value as people read it."""
    return f"{100 * value:.1f} %" if metric in SHARES else f"{value:.4g}"


def tiles(values: Mapping[str, str]) -> str:
    """Return large values over their names."""
    inner = (
        f'<div class="tile"><div>{escape(value)}</div><span>{escape(name)}</span></div>'
        for name, value in values.items()
    )
    return f'<div class="tiles">{"".join(inner)}</div>'


def matrices(before: Confusion | None, after: Confusion) -> str:
    """Return the confusion matrices side by side."""
    both = {"before": before, "after": after}
    inner = (
        f'<div class="scroll"><p class="soft small">{name}</p>{matrix(confusion)}</div>'
        for name, confusion in both.items()
        if confusion is not None
    )
    legend = "A row is the right class, a column the answer; a cell counts records."
    return f'<div class="two">{"".join(inner)}</div><p class="soft small legend">{legend}</p>'


def matrix(confusion: Confusion) -> str:
    """Return a confusion matrix; a row is the right class."""
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in confusion.classes)
    body = ""
    for name, row in zip(confusion.classes, confusion.counts, strict=True):
        cells = "".join(_cell(count, count / max(sum(row), 1)) for count in row)
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    top = f'<thead><tr><th class="name"></th>{head}</tr></thead>'
    return f'<table class="matrix">{top}<tbody>{body}</tbody></table>'


def _cell(count: int, part: float) -> str:
    """Return one cell, the darker the larger its part of the row."""
    ink = "color: #fff" if part > 0.7 else "" if count else "color: var(--soft)"
    return f'<td style="background: rgba(var(--cell), {0.04 + 0.9 * part:.3f}); {ink}">{count}</td>'


def measures(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return a table of all metrics."""
    rows = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td>"
        f'<td class="number">{shown(name, before[name])}</td><td class="number">{shown(name, value)}</td></tr>'
        for name, value in after.items()
        if name in before
    )
    head = '<thead><tr><th></th><th class="number">before</th><th class="number">after</th></tr></thead>'
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def answers(examples: Iterable[Shown], classes: bool) -> str:
    """Return records with the right answer and those of the model; `classes`: an answer is a class, right or wrong."""
    body = "".join(_answer(example, classes) for example in examples)
    head = "".join(f"<th>{name}</th>" for name in ("test record", "right answer", "before", "after"))
    style = "answers" if classes else "answers free"
    table = f'<table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _answer(example: Shown, classes: bool) -> str:
    cells = [f'<td class="text">{escape(example.expected)}</td>']
    for answer in (example.before, example.after):
        style = ("right" if answer == example.expected else "wrong") if classes else "text"
        cells.append(f'<td class="{style}">{escape(answer)}</td>')
    if not classes:
        return f'<tr><td class="text">{escape(example.prompt)}</td>{"".join(cells)}</tr>'
    first, _, rest = example.prompt.strip().partition("\n")
    opening = " ".join(rest.split())[:OPENING]
    record = f'<span class="headline">{escape(first)}</span><span class="rest">{escape(opening)}</span>'
    return f"<tr><td>{record}</td>{''.join(cells)}</tr>"
