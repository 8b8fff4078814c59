"""The leaderboard in words: cells that the terminal's table and result.md share, and result.md itself."""

from __future__ import annotations

from rankworks.compare.result import CompareResult, Row
from rankworks.train.report.words import duration, size

SHARES = ("accuracy", "exact_match")


def number(value: float | None, metric: str, sign: bool = False) -> str:
    """Return a value of the metric as people read it: shares in per cent, losses with four digits."""
    if value is None:
        return ""
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if metric in SHARES else f"{value:{plus}.4f}"


def unit(metric: str) -> str:
    """Return the metric's name with its unit."""
    return f"{metric.replace('_', ' ')} %" if metric in SHARES else metric.replace("_", " ")


def p_value(p: float | None) -> str:
    """Return a p-value as people read it."""
    return "" if p is None else "<0.0001" if p < 1e-4 else f"{p:.2g}"


def columns(result: CompareResult) -> list[str]:
    """Return the heads of the leaderboard's columns."""
    against = [f"vs {result.baseline}", "interval", "p"] if result.baseline else []
    interval = f"{result.confidence:.0%} interval"
    return ["", "method", unit(result.metric), interval, *against, "lr", "trained", "memory", "s/step", "spent"]


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
    return [
        "-" if row.rank is None else f"{row.rank}" + ("=" if shares_rank(row, result) else ""),
        row.method,
        number(row.mean, metric) or row.status,
        " to ".join(between),
        *compared,
        "" if row.lr is None else f"{row.lr:g}",
        f"{row.trainable_parameters:,}",
        "" if row.memory_bytes is None else size(row.memory_bytes),
        "" if row.step_seconds is None else f"{row.step_seconds:.2g}",
        duration(row.seconds),
    ]


def shares_rank(row: Row, result: CompareResult) -> bool:
    """Say whether another row has the same rank."""
    return sum(r.rank == row.rank for r in result.leaderboard) > 1


def verdict(result: CompareResult) -> str:
    """Return in a sentence what the leaderboard allows one to conclude."""
    ties = [r.method for r in result.leaderboard if r.tie]
    if not ties:
        return "No arm ran to its end."
    if len(ties) == 1:
        return f"{ties[0]} is the best (confidence {result.confidence:.0%})."
    shown = ", ".join(ties[:8]) + (f" and {len(ties) - 8} more" if len(ties) > 8 else "")
    seeds = len(result.budget["seeds"])
    return (
        f"{len(ties)} arms cannot be told apart from the best: {shown}. More seeds ({seeds} here) or test records "
        f"({result.data['test']} here) would tell smaller differences."
    )


def markdown(result: CompareResult) -> str:
    """Return the whole result for reading."""
    heads = columns(result)
    lines = [f"# {result.title}", ""]
    if not result.complete:
        lines += [f"**Not finished yet**: {len(result.leaderboard)} arms are done.", ""]
    data, budget = result.data, result.budget
    lines += [
        f"{data['title']} ({data['train']} training, {data['valid']} validation, {data['test']} test records), "
        f"{result.model['name']} ({result.model['parameters']:,} parameters). Per arm: {budget['trials']} trials of "
        f"{budget['steps']} steps, tuned on the {result.tuned_on}, then seeds {', '.join(map(str, budget['seeds']))}."
        + ("" if budget["equal"] == "none" else f" Equal {budget['equal']}: {budget['value'] or 'the baseline’s'}.")
        + f" The untouched model: {unit(result.metric)} {number(result.base.get(result.metric), result.metric)}.",
        "",
        f"**{verdict(result)}**",
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
