"""`rankworks demo`: the first five minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankworks.cli import compare as comparison
from rankworks.cli.options import AsJson, Overrides
from rankworks.cli.output import output
from rankworks.cli.train import conduct

RECIPE = "smollm2-bbc-lora"
COMPARED = "compare-demo"


def demo(
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for everything the run writes.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Compare four methods on a small encoder afterwards.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """The first five minutes: a model learns BBC News, and four ways are tried.

    Examples:
      rankworks demo                     as it stands, 6 minutes on two cores
      rankworks demo train.steps=20 --no-compare        shorter

    The model (93 MB) and the articles (3 MB) are fetched once. The model is
    asked for the topic of 200 news articles, an adapter is trained on other
    articles, the model is asked again. Then: what changed, what it cost,
    report.html, and what to try next.

    Then four methods learn the same from 64 articles on a small encoder, each
    at its own best learning rate: a leaderboard that says what is noise.

    These are the recipes smollm2-bbc-lora and compare-demo and nothing else:
    `rankworks train smollm2-bbc-lora` and `rankworks compare compare-demo` do
    the same. KEY=VALUE are settings of the first.
    """
    from rankworks.cli.recipes import find

    with output(as_json) as out:
        out.show("\n".join(_opening(find(RECIPE))) + "\n")
        told = conduct(out, RECIPE, overrides or [], folder)
        if told is None:
            return
        if compare:
            out.head("which method would have been best?")
            out.show("\n".join(QUESTION) + "\n")
            beside = folder.with_name(f"{folder.name}-compare") if folder is not None else None
            told["comparison"] = comparison.conduct(out, COMPARED, [], beside)
        out.emit(told)


QUESTION = (
    "Papers compare at one learning rate. Here each of four methods has its own, tuned with the same trials, and is",
    "run again with other seeds, on a small encoder (22 M parameters) and 64 articles. About two minutes.",
)


def _opening(path: Path) -> list[str]:
    """Return what is about to happen, and the recipe as it stands."""
    recipe = [
        line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")
    ]
    return [
        "SmolLM2-135M-Instruct learns to name the topic of a news article. It is asked as it is, an adapter is trained",
        "beside its frozen weights, and it is asked again. One and a half to three minutes on two cores. The recipe:",
        "",
        *(f"  {line}" for line in recipe),
    ]
