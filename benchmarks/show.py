"""Print the committed results as Markdown tables: `python benchmarks/show.py`, or with names of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def main() -> None:
    """Show every result, or those named."""
    names = sys.argv[1:] or sorted(path.stem for path in RESULTS.glob("*.json"))
    for name in names:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        where = result["environment"]
        versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
        print(f"### {name}\n\n{where['date']}, {where['cpu']}, {where['threads']} threads; {versions}.\n")
        for title, rows in _tables(result):
            print(f"{title}\n\n{_markdown(rows)}\n")


def _tables(result: Row) -> list[tuple[str, list[Row]]]:
    """Return the tables of one result: (title, rows)."""
    kind = result["benchmark"]
    if kind == "train_step":
        parts = [("Full logits, transformers' own loss:", "full_logits"), ("The real task:", "task")]
        return [(title, [_step(n, r) for n, r in result[key].items()]) for title, key in parts if result.get(key)]
    if kind == "deltas":
        return [("One stack of layers, each method's defaults:", [_delta(n, r) for n, r in result["methods"].items()])]
    if kind == "inits":
        return [("From a loaded model to one that can train:", [_init(n, r) for n, r in result["inits"].items()])]
    if kind == "optimizers":
        return [(f"{case}:", [_optimizer(n, r) for n, r in rows.items()]) for case, rows in result["cases"].items()]
    if kind in ("inits_convergence", "ranks"):
        return [(f"{task}:", [_learned(n, r) for n, r in result[task].items()]) for task in result["setting"]["tasks"]]
    return [("", _plain(result))]


def _init(name: str, row: Row) -> Row:
    return {
        "start": name,
        "seconds": row["seconds"],
        "over peft": ratio(row, "peft"),
        "peak GB": gigabytes(row),
        "of it before": round(row["before_start_bytes"] / 1e9, 2) if "before_start_bytes" in row else "",
    }


def _optimizer(name: str, row: Row) -> Row:
    return {
        "optimizer": name,
        "ms": round(1000 * row["seconds"], 2),
        "over AdamW": ratio(row, "adamw"),
        "mean, refreshed every 10": row["mean_over_adamw"] if "refresh_seconds" in row else "",
        "every 200": row.get("mean_over_adamw_at_200", ""),
        "state MB": round(row["state_bytes"] / 1e6, 2),
    }


def _learned(name: str, row: Row) -> Row:
    loss, below, steps = row["loss"], row["below_plain"], row["steps_mean"]
    return {
        "contender": name,
        "best rate": f"{row['rate']:g}",
        "trained": f"{row['trained']:,}",
        "loss": f"{loss['mean']} ({loss['low']} to {loss['high']})",
        "below the first's": f"{below['mean']} ({below['low']} to {below['high']})",
        "steps to the first's": f"{steps['mean']} ({steps['low']} to {steps['high']})" if steps else str(row["steps"]),
    }


def _step(name: str, row: Row) -> Row:
    return {
        "variant": name,
        "seconds": row["seconds"],
        "over floor": ratio(row, "floor"),
        "over peft": ratio(row, "peft"),
        "tokens/s": row.get("tokens_per_second", ""),
        "peak GB": gigabytes(row),
        "peak over peft": row.get("peak_over_peft", ""),
    }


def _delta(name: str, row: Row) -> Row:
    return {
        "method": name,
        "trained": f"{row['trained']:,}" if "trained" in row else "",
        "step over floor": ratio(row, "floor"),
        "step over peft": ratio(row, "peft"),
        "peak GB": gigabytes(row),
        "bytes in the file per trained number": row.get("bytes_per_trained", ""),
        "merge ms": round(1000 * row["merge_seconds"], 1) if "merge_seconds" in row else "",
    }


def _plain(result: Row) -> list[Row]:
    """Return the first list of rows in a result whose form this script does not know better."""
    return next(value for value in result.values() if isinstance(value, list) and value and isinstance(value[0], dict))


def ratio(row: Row, peer: str) -> str:
    """The median ratio and its quartiles over the rounds."""
    if f"over_{peer}" not in row:
        return ""
    low, high = row[f"over_{peer}_quartiles"]
    return f"{row[f'over_{peer}']:.2f} ({low:.2f} to {high:.2f})"


def gigabytes(row: Row) -> str:
    """The peak, where it was measured."""
    return f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else ""


def _markdown(rows: list[Row]) -> str:
    """Return a table, without columns that are empty throughout."""
    columns = [c for c in rows[0] if any(str(row.get(c, "")) for row in rows)]
    show: Callable[[Any], str] = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)  # noqa: E731
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(show(row.get(c, "")) for c in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    main()
