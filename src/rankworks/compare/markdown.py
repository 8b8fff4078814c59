"""The leaderboard in words: cells that the terminal's table and result.md share, and result.md itself."""

from __future__ import annotations

from rankworks.compare.conclude import advice, headline
from rankworks.compare.result import CompareResult, Row
from rankworks.compare.words import number, p_value, tuning, unit
from rankworks.train.report.words import duration, size


def columns(result: CompareResult) -> list[str]:
    """Return the heads of the leaderboard's columns."""
    against = [f"vs {result.baseline}", "interval", "p"] if result.baseline else []
    interval = f"{result.confidence:.0%} interval"
    sizes = [*(["trained"] * result.tells_trained), *(["optimizer"] * result.compares_optimizers)]
    return ["", "method", result.unit, interval, *against, "lr", *sizes, "memory", "s/step", "spent"]


def cells(row: Row, result: CompareResult) -> list[str]:
    """Return one row of the leaderboard; the p-value is the corrected one."""
    metric = result.metric
    between = [] if row.low is None else [number(row.low, metric), number(row.high, metric)]
    own = row.method == result.baseline
    compared = []
    if result.baseline:
        ends = [number(v, metric, sign=True) for v in (row.difference_low, row.difference_high)]
        compared = [
            "baseline" if own else number(row.difference, metric, sign=True),
            "" if row.difference is None else " to ".join(ends),
            p_value(row.p_corrected),
        ]
    kept = "" if row.optimizer_bytes is None else size(row.optimizer_bytes)
    return [
        "-" if row.rank is None else f"{row.rank}" + ("=" if shares_rank(row, result) else ""),
        row.method,
        number(row.mean, metric) or row.status,
        " to ".join(between),
        *compared,
        "" if row.lr is None else f"{row.lr:g}",
        *([f"{row.trainable_parameters:,}"] * result.tells_trained),
        *([kept] * result.compares_optimizers),
        "" if row.memory_bytes is None else size(row.memory_bytes),
        "" if row.step_seconds is None else f"{row.step_seconds:.2g}",
        duration(row.seconds),
    ]


def shares_rank(row: Row, result: CompareResult) -> bool:
    """Say whether another row has the same rank."""
    return sum(r.rank == row.rank for r in result.leaderboard) > 1


def markdown(result: CompareResult) -> str:
    """Return the whole result for reading."""
    heads = columns(result)
    lines = [f"# {result.title}", ""]
    if not result.complete:
        lines += [f"**Not finished yet**: {len(result.leaderboard)} arms are done.", ""]
    data, budget = result.data, result.budget
    lines += [
        f"{data['title']} ({data['train']} training, {data['valid']} validation, {data['test']} test records), "
        f"{result.model['name']} ({result.model['parameters']:,} parameters). Per arm: {tuning(budget)}, "
        f"tuned on the {result.tuned_on}, then seeds {', '.join(map(str, budget['seeds']))}."
        + ("" if budget["equal"] == "none" else f" Equal {budget['equal']}: {budget['value'] or 'the baseline’s'}.")
        + f" The untouched model: {unit(result.metric)} {number(result.base.get(result.metric), result.metric)}.",
        "",
        f"**{headline(result)}** {' '.join(advice(result))}".rstrip(),
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "|".join("---" if h in ("", "method") else "---:" for h in heads) + "|",
        *("| " + " | ".join(_escaped(c) for c in cells(row, result)) + " |" for row in result.leaderboard),
        "",
    ]
    failed = [f"- **{_escaped(r.method)}** failed: {r.reason}" for r in result.leaderboard if r.status == "failed"]
    lines += [*failed, *(f"- **{_escaped(s.label)}** was not run: {s.reason}" for s in result.skipped)]
    lines += [f"- {warning}" for warning in result.warnings]
    lines += ["", result.method, "", "To reproduce a row:", "", "```sh"]
    lines += [row.command for row in result.leaderboard if row.status == "ok"]
    lines += ["```", "", "To run it all again: `" + result.command + "`", ""]
    told = ", ".join(f"{key} {value}" for key, value in result.environment.items())
    return "\n".join([*lines, f"{told}; {duration(result.seconds)} in all.", ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
