"""The page of a comparison: what to conclude, the leaderboard, what it cost, how it went, and how to do it again."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import yaml

from rankworks.compare.conclude import advice, headline
from rankworks.compare.report.board import leaderboard
from rankworks.compare.report.classes import class_table, metric_table
from rankworks.compare.report.costs import cost_charts
from rankworks.compare.report.curves import final_chart, ordered, rate_chart, trial_chart
from rankworks.compare.result import CompareResult
from rankworks.compare.words import number, tuning, unit
from rankworks.core.files import atomic_write
from rankworks.train.report.shell import code, document, figure, pairs, section, tabs
from rankworks.train.report.words import duration

NAME = "report.html"
PICKED = 5
"""Arms whose curves are coloured at first, besides the baseline."""


def write_report(result: CompareResult, folder: str | Path) -> Path:
    """Write `report.html` into a folder; return its path."""
    path = Path(folder) / NAME
    atomic_write(path, render(result))
    return path


def render(result: CompareResult) -> str:
    """Return the page as text."""
    views = {
        view.capitalize(): figure(chart, f"{unit(result.metric)} of every method against its {view}")
        for view, chart in cost_charts(result).items()
    }
    parts = [_header(result)]
    if result.leaderboard:
        parts.append(section("Leaderboard", leaderboard(result), "leaderboard"))
    if views:
        says = (
            '<p class="soft small">On the front, no other method is cheaper and better by its mean; where intervals '
            "overlap, that may be chance. A diamond is the baseline. The vertical lines are intervals.</p>"
        )
        parts.append(section(f"{_name(result)} against cost", tabs("costs", views) + says, "cost"))
    if curves := _curves(result):
        parts.append(section("Learning rates and losses", curves, "curves"))
    if classes := class_table(result, result.confidence):
        parts.append(section("Class by class", classes, "classes"))
    if metrics := metric_table(result):
        parts.append(section("All that was measured", metrics, "metrics"))
    if trouble := _trouble(result):
        lost = result.skipped or any(row.status != "ok" for row in result.leaderboard)
        title = "Failed, skipped, and worth knowing" if lost else "Worth knowing"
        parts.append(section(title, trouble, "trouble"))
    parts += [section("Run it again", _again(result), "again"), section("How it was done", _how(result), "how")]
    return document(result.title, "".join(parts), [_own("compare.css")], [_own("compare.js")])


def _name(result: CompareResult) -> str:
    return result.metric.replace("_", " ").capitalize()


def _header(result: CompareResult) -> str:
    data, budget = result.data, result.budget
    seeds = len(budget.get("seeds") or [])
    equal = budget.get("equal", "none")
    given = f" Equal {equal}: {budget.get('value') or 'that of the baseline'}." if equal != "none" else ""
    base = number(result.base.get(result.metric), result.metric)
    facts = (
        f"{data.get('train', 0):,} training, {data.get('valid', 0):,} validation and {data.get('test', 0):,} test "
        f"records. Every method: {tuning(budget)}, tuned on the {result.tuned_on}, then {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}.{given} "
        f"{f'The untouched model: {unit(result.metric)} {base}. ' if base else ''}"
        f"{duration(result.seconds)} in all."
    )
    done = len(result.leaderboard)
    unfinished = (
        f'<p class="banner">Not finished: {done} of {len(result.arms)} methods are done.</p>'
        if not result.complete
        else ""
    )
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in advice(result))
    return (
        f'<header><p class="soft over">{escape(result.title)}</p>\n<h1 id="conclusion">{escape(headline(result))}</h1>'
        f'{unfinished}<ul class="advice">{sentences}</ul><p class="soft small">{escape(facts)}</p></header>\n'
    )


def _curves(result: CompareResult) -> str:
    """Return the views of the curves under the buttons that pick arms."""
    shapes = (
        '<p class="soft small">Filled: ran to its end, a star: the best. Open: pruned, at its last value. '
        "A cross above: diverged or failed.</p>"
    )
    band = (
        '<p class="soft small">A line is the mean over the seeds, the band reaches from the lowest to the highest.</p>'
    )
    rates = rate_chart(result)
    charts = {
        "Learning rate": rates and figure(rates, f"{result.tuned_on} over the learning rate", "rates") + shapes,
        "Validation, final runs": _final(result, "valid", band),
        "Training loss, final runs": _final(result, "losses", band),
        "Trials of one method": _trials(result),
    }
    views = {title: inner for title, inner in charts.items() if inner}
    return _picker(result) + tabs("curve", views) if views else ""


def _final(result: CompareResult, which: str, says: str) -> str | None:
    chart = final_chart(result, which)
    return chart and figure(chart, f"{which} over the steps of the final runs", f"final-{which}") + says


def _trials(result: CompareResult) -> str | None:
    chart = trial_chart(result)
    options = "".join(f"<option>{escape(arm.label)}</option>" for arm in ordered(result) if arm.trials)
    choice = f'<p class="small"><label>method <select id="tried">{options}</select></label></p>'
    says = (
        '<p class="soft small">Named by learning rate; dotted lines were pruned or diverged. '
        "Click a name to hide its line.</p>"
    )
    return chart and choice + figure(chart, "curves of the trials of one method", "trials") + says


def _picker(result: CompareResult) -> str:
    """Return a button per arm; those pressed have their curves in colour."""
    labels = [arm.label for arm in ordered(result) if arm.trials or arm.reruns]
    ranked = {row.method for row in result.leaderboard if row.rank is not None}
    chosen = [label for label in labels if label in ranked][:PICKED] or labels[:PICKED]
    if result.baseline in labels and result.baseline not in chosen:
        chosen.append(result.baseline)
    chips = "".join(
        f'<button type="button" class="chip" data-arm="{escape(label)}" aria-pressed="{str(label in chosen).lower()}">'
        f"<svg><line/></svg>{escape(label)}</button>"
        for label in labels
    )
    every = '<button type="button" class="chip plain" id="pick-none">none</button>' if len(labels) > 1 else ""
    return f'<div class="chips" role="group" aria-label="methods shown in colour">{chips}{every}</div>'


def _trouble(result: CompareResult) -> str:
    """Return what did not run and why, and what the reader was warned of."""
    failed = [(row.method, "failed", row.reason or "") for row in result.leaderboard if row.status != "ok"]
    skipped = [(arm.label, "skipped", arm.reason) for arm in result.skipped]
    rows = "".join(
        f'<tr><td>{escape(label)}</td><td><span class="tag {"bad" if what == "failed" else ""}">{what}</span></td>'
        f'<td class="text">{escape(reason)}</td></tr>'
        for label, what, reason in [*failed, *skipped]
    )
    table = f'<div class="scroll"><table class="trouble"><tbody>{rows}</tbody></table></div>' if rows else ""
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in result.warnings)
    return table + (f'<ul class="small">{warnings}</ul>' if warnings else "")


def _again(result: CompareResult) -> str:
    config = yaml.safe_dump(result.config, sort_keys=False, allow_unicode=True)
    rows = "\n".join(f"{row.command}  # {row.method}" for row in result.leaderboard if row.status == "ok")
    single = f'<p class="soft small">One row of the leaderboard:</p>{code(rows, "rows")}' if rows else ""
    folded = f'<details><summary class="soft small">The whole configuration</summary>{code(config, "wide")}</details>'
    return f'<p class="soft small">The whole comparison:</p>{code(result.command)}{single}{folded}'


def _how(result: CompareResult) -> str:
    facts: dict[str, Any] = {
        "model": f"{result.model.get('name')}, {result.model.get('parameters', 0):,} parameters, "
        f"{result.model.get('dtype')} on {result.model.get('device')}",
        **({"shape": ", ".join(f"{k} {v}" for k, v in shape.items())} if (shape := result.model.get("shape")) else {}),
        "data": result.data.get("title"),
        **result.environment,
    }
    if "rankworks" not in facts:
        facts["rankworks"] = result.version
    facts |= {"study": result.storage, "fingerprint": result.fingerprint}
    return f'<p class="small">{escape(result.method)}</p>{pairs(facts)}'


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
