"""`rankworks compare`: which method is best for a model, data and a budget."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.measure import Measurement
from rich.table import Table

from rankworks.cli.options import AsJson, Folder, Overrides
from rankworks.cli.output import Output, command, complain, facts, output, short, table

if TYPE_CHECKING:
    from rankworks.compare import CompareResult


def compare(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A YAML file, or a recipe's name.")],
    overrides: Overrides = None,
    folder: Folder = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Optuna storage URL that several processes share.", show_default="study.db in the folder"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Keep what is finished, or delete the study and begin anew.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Compare methods with equal tuning, and tell what is noise.

    Examples:
      rankworks compare compare-minilm-bbc              a recipe, by name
      rankworks compare my.yaml 'methods=[lora, dora, vera]' budget.trials=8
      rankworks compare my.yaml methods=deltas budget.equal=parameters
      rankworks compare my.yaml tune.lr=auto            measured, no sweep
      rankworks compare my.yaml --json | tail -1        for a program

    Every method gets the same trials and steps; the learning rate of each is
    tuned on validation data, its best setting is run on several seeds and
    measured on test data that no trial saw. Shown: a leaderboard with
    intervals, paired differences to a baseline, and ties.

    A comparison that was stopped, or killed, goes on where it was when the
    same command is given again. Several processes or machines share the work
    when they are given the same --storage (or the same folder):
      rankworks compare my.yaml --storage postgresql+psycopg://user@host/db

    The folder then holds result.json, result.md, report.html (opens offline),
    result.svg (a picture), a recipe per method in arms/ that repeats its row,
    and study.db with every trial.

    --json ends standard output with leaderboard, a row per method: method,
    rank, tie, mean, low, high, difference, difference_low, difference_high,
    p, p_corrected, lr, trainable_parameters, and more.
    """
    with output(as_json) as out:
        out.emit(conduct(out, file, list(overrides or []), folder, storage, resume))


def conduct(
    out: Output,
    file: str,
    overrides: list[str],
    folder: Path | None = None,
    storage: str | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """Compare, show what came of it, and return what a program reads."""
    from rankworks.cli.recipes import find
    from rankworks.compare import compare as run
    from rankworks.compare import load_compare_config

    path = find(file)
    again = ["compare", file, *overrides, *(["--output", str(folder)] if folder else [])]
    again += ["--storage", storage] if storage else []
    config = load_compare_config(path, overrides)
    if folder is not None or config.output is None:
        config.output = str(folder or f"runs/{path.stem}")
    if storage is not None:
        config.storage = storage
    out.show(f"comparing on {_title(config)}; everything is written to {short(config.output)}")
    try:
        result = run(config, resume=resume, command=command(*again))
    except KeyboardInterrupt:
        complain(f"stopped. What is finished is kept; to go on:\n  {command(*again)}", "")
        raise typer.Exit(130) from None
    show_comparison(out, result)
    return summary_line(result)


def _title(config: Any) -> str:
    data = config.data
    source = (data.name or data.path or data.train) if data else "no data"
    return f"{source} with {config.model.name if config.model else 'no model'}"


def show_comparison(out: Output, result: CompareResult) -> None:
    """Print the leaderboard and what a reader must know with it."""
    from rankworks.compare.conclude import advice, headline
    from rankworks.compare.markdown import cells, columns

    out.head(result.title)
    out.show(_board(out, result, columns(result), [cells(row, result) for row in result.leaderboard]))
    for sentence in (headline(result), *advice(result)):
        out.show(f"  {sentence}")
    for row in result.leaderboard:
        if row.status == "failed":
            out.show(f"  {row.method} failed: {row.reason}")
    for skipped in result.skipped:
        out.show(f"  {skipped.label} was not run: {skipped.reason}")
    for warning in result.warnings:
        out.show(f"  note: {warning}")
    folder = Path(str(result.output))
    best = next((row for row in result.leaderboard if row.tie), None)
    told = {"report": short(folder / "report.html"), "recipes": short(folder / "arms")}
    if best is not None:
        told["repeat the best"] = best.command
    out.show(facts(told))


def _board(out: Output, result: CompareResult, heads: list[str], rows: list[list[str]]) -> Table:
    """Return the leaderboard, without its last columns where the terminal is narrow: result.md has them all."""
    roomy = out.console.options.update(max_width=1000)
    for shown in range(len(heads), 3, -1):
        made = table(*heads[:shown])
        for column in made.columns:
            column.justify = "left" if column.header in ("", "method") else "right"
            column.no_wrap = True
        for row, each in zip(result.leaderboard, rows, strict=True):
            style = "bold green" if row.tie else "red" if row.status == "failed" else ""
            made.add_row(*each[:shown], style=style)
        if Measurement.get(out.console, roomy, made).maximum <= out.console.width:
            break
    return made


def summary_line(result: CompareResult) -> dict[str, Any]:
    """Return what `--json` prints: the leaderboard and where the rest is."""
    folder = Path(str(result.output))
    return {
        "leaderboard": [asdict(row) for row in result.leaderboard],
        "skipped": [asdict(each) for each in result.skipped],
        "warnings": result.warnings,
        "metric": result.metric,
        "higher_is_better": result.higher_is_better,
        "baseline": result.baseline,
        "base": result.base,
        "budget": result.budget,
        "complete": result.complete,
        "seconds": result.seconds,
        "output": str(folder),
        "result": str(folder / "result.json"),
        "markdown": str(folder / "result.md"),
        "report": str(folder / "report.html"),
        "picture": str(folder / "result.svg"),
    }
