"""The leaderboard: a table to sort and search; under every row its settings, notes and the command that repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import yaml

from rankworks.compare.conclude import against_baseline
from rankworks.compare.markdown import shares_rank
from rankworks.compare.report.bars import Axis, bar
from rankworks.compare.result import ArmResult, CompareResult, Row
from rankworks.compare.words import number, p_value
from rankworks.train.report.shell import code, copy_button, pairs
from rankworks.train.report.words import duration, size
from rankworks.train.result import SHARES

VERDICTS = {"better": "better", "worse": "worse", "not shown": "no difference shown"}
SEARCHED_FROM = 9
"""Rows from which on a field to search them is worth its place."""


@dataclass(frozen=True)
class Column:
    """A column: its head, what explains it, whether larger values come first when it is sorted, its CSS class."""

    head: str
    says: str = ""
    falling: bool = False
    style: str = "number"


def leaderboard(result: CompareResult) -> str:
    """Return the table with the scales its bars share."""
    rows = result.leaderboard
    possible = (0.0, 1.0) if result.metric in SHARES else (float("-inf"), float("inf"))
    scores = Axis.over([value for row in rows for value in (row.mean, row.low, row.high)], within=possible)
    gaps = Axis.over([v for r in rows for v in (r.difference, r.difference_low, r.difference_high)], mark=0.0)
    columns = _columns(result)
    heads = "".join(_head(column) for column in columns)
    bodies = "".join(_body(row, i, result, scores, gaps, len(columns)) for i, row in enumerate(rows))
    search = (
        '<label class="search">search <input type="search" id="search" placeholder="method" autocomplete="off"></label>'
        if len(rows) >= SEARCHED_FROM
        else ""
    )
    return (
        f'{search}<div class="scroll"><table class="board" id="board"><thead><tr>{heads}</tr></thead>{bodies}</table>'
        f'</div><p class="soft small legend">{_legend(result, scores)}</p>'
    )


def _columns(result: CompareResult) -> list[Column]:
    against = [
        Column(f"against {result.baseline}", "paired difference, positive is better", True, "gap"),
        Column("p", "corrected for all comparisons", style="number less"),
    ]
    return [
        Column("#", "rank; = means shared"),
        Column("method", style="name"),
        Column(result.unit, f"mean and {result.confidence:.0%} interval", result.higher_is_better, "mean"),
        *(against if result.baseline else []),
        Column("lr", "tuned learning rate", style="number less"),
        *([Column("trained", "trained numbers")] * result.tells_trained),
        *([Column("optimizer", "bytes its state takes")] * result.compares_optimizers),
        Column("memory", "measured peak", style="number less"),
        Column("step", "seconds of a training step", style="number less"),
        Column("spent", "time of all its runs", style="number less"),
        Column("", "command", style="less"),
    ]


def _head(column: Column) -> str:
    if not column.head:
        return f'<th class="{column.style}"><span class="unseen">{escape(column.says)}</span></th>'
    first = "descending" if column.falling else "ascending"
    return (
        f'<th scope="col" class="{column.style}"><button type="button" class="sort" data-first="{first}" '
        f'title="{escape(column.says)}">{escape(column.head)}</button></th>'
    )


def _body(row: Row, place: int, result: CompareResult, scores: Axis | None, gaps: Axis | None, width: int) -> str:
    """Return a row and, folded under it, all that is known of its arm. Sorted by rank, rows stand in their places."""
    arm = next((arm for arm in result.arms if arm.label == row.method), None)
    style = "best" if row.tie else "failed" if row.status != "ok" else ""
    rank = "–" if row.rank is None else f"{row.rank}{'=' if shares_rank(row, result) else ''}"
    cells = [
        _cell(rank, None if row.rank is None else place, "number"),
        f'<th scope="row" class="name" data-sort="{escape(row.method)}">{_opener(row, result)}</th>',
        _score(row, result, scores),
        *([_gap(row, result, gaps), _cell(p_value(row.p_corrected), row.p_corrected)] if result.baseline else []),
        _cell("" if row.lr is None else f"{row.lr:.3g}", row.lr),
        *([_cell(f"{row.trainable_parameters:,}", row.trainable_parameters, "number")] * result.tells_trained),
        *([_cell(_kept(row), row.optimizer_bytes, "number")] * result.compares_optimizers),
        _cell("" if row.memory_bytes is None else size(row.memory_bytes), row.memory_bytes),
        _cell("" if row.step_seconds is None else f"{row.step_seconds:.2g} s", row.step_seconds),
        _cell(duration(row.seconds), row.seconds),
        f'<td class="less">{copy_button("copy", row.command, f"copy the command of {row.method}")}</td>',
    ]
    return (
        f'<tbody class="{style}" data-arm="{escape(row.method)}"><tr>{"".join(cells)}</tr>'
        f'<tr class="more" hidden><td colspan="{width}">{_more(row, arm, result)}</td></tr></tbody>\n'
    )


def _cell(text: str, value: float | None, style: str = "number less") -> str:
    return f'<td class="{style}" data-sort="{"" if value is None else value}">{escape(text)}</td>'


def _kept(row: Row) -> str:
    return "" if row.optimizer_bytes is None else size(row.optimizer_bytes)


def _opener(row: Row, result: CompareResult) -> str:
    own = ' <span class="tag">baseline</span>' if row.method == result.baseline else ""
    return f'<button type="button" class="open" aria-expanded="false">{escape(row.method)}</button>{own}'


def _score(row: Row, result: CompareResult, axis: Axis | None) -> str:
    if row.mean is None or axis is None:
        return f'<td class="mean" data-sort=""><span class="tag bad">{escape(row.status)}</span></td>'
    mean = number(row.mean, result.metric)
    ends = "" if row.low is None else f"{number(row.low, result.metric)} to {number(row.high, result.metric)}"
    drawn = bar(axis, row.mean, row.low, row.high, "best" if row.tie else "", f"{mean}, {ends}")
    return (
        f'<td class="mean" data-sort="{row.mean}"><span class="figures"><b>{mean}</b> '
        f'<span class="soft">{ends}</span></span>{drawn}</td>'
    )


def _gap(row: Row, result: CompareResult, axis: Axis | None) -> str:
    if row.method == result.baseline:
        return '<td class="gap soft" data-sort="0">baseline</td>'
    if row.difference is None or axis is None:
        return '<td class="gap" data-sort=""></td>'
    low, high = (number(value, result.metric, sign=True) for value in (row.difference_low, row.difference_high))
    mean, judged = number(row.difference, result.metric, sign=True), against_baseline(row, result) or "not shown"
    drawn = bar(axis, row.difference, row.difference_low, row.difference_high, judged.split()[0], f"{low} to {high}")
    return (
        f'<td class="gap" data-sort="{row.difference}"><span class="figures"><b>{mean}</b> '
        f'<span class="judged {judged.split()[0]}">{VERDICTS[judged]}</span></span>{drawn}</td>'
    )


def _legend(result: CompareResult, axis: Axis | None) -> str:
    """Return what a reader needs to know of the marks, and the values at the ends of the bars."""
    ends = f" Bars run from {number(axis.low, result.metric)} to {number(axis.high, result.metric)}." if axis else ""
    tied = "A coloured edge marks those that cannot be told apart from the best."
    gap = f" Differences to {result.baseline} are paired; the line marks none." if result.baseline else ""
    return escape(tied + gap + ends)


def _more(row: Row, arm: ArmResult | None, result: CompareResult) -> str:
    """Return the details of an arm."""
    facts: dict[str, Any] = {}
    if arm is not None:
        paper = f" ({arm.paper})" if arm.paper else ""
        facts["method"] = f"{arm.title}{paper}, {arm.axis} {arm.key}"
        facts["trained numbers"] = f"{row.trainable_parameters:,}, {arm.adapter_parameters:,} of them in the adapter"
    else:
        facts["trained numbers"] = f"{row.trainable_parameters:,}"
    if row.lr is not None:
        searched = arm.searched if arm else None
        facts["learning rate"] = f"{row.lr:g}" + (f", searched {searched[0]:g} to {searched[1]:g}" if searched else "")
    facts["tuning"] = f"{row.trials} trials, of which {row.pruned} pruned and {row.diverged} diverged"
    facts["seeds"] = row.seeds
    if row.optimizer_bytes is not None:
        facts["optimizer's state"] = f"{size(row.optimizer_bytes)} at the end of a run"
    if row.memory_bytes is not None:
        facts["peak memory"] = f"{size(row.memory_bytes)} measured, {size(row.planned_bytes)} planned"
    if row.step_seconds is not None:
        facts["time"] = f"{row.step_seconds:.3g} s a step, {duration(row.seconds)} in all"
    if result.baseline and row.p_corrected is not None:
        facts[f"against {result.baseline}"] = (
            f"{number(row.difference_low, result.metric, sign=True)} to "
            f"{number(row.difference_high, result.metric, sign=True)}, p {p_value(row.p_corrected)} corrected"
        )
    if row.reason:
        facts["failed"] = row.reason
    notes = "".join(f"<li>{escape(note)}</li>" for note in (arm.notes if arm else []))
    told = f'<ul class="small">{notes}</ul>' if notes else ""
    blocks = {"adapt": arm.adapt, "optim": arm.optim} if arm else {}
    settings = yaml.safe_dump(blocks, sort_keys=False, allow_unicode=True, default_flow_style=None) if blocks else ""
    shown = f'<pre class="small">{escape(settings)}</pre>' if settings else ""
    return (
        f'<div class="details">{code(row.command)}<div class="two">{pairs(facts)}<div>{shown}{told}</div></div></div>'
    )
