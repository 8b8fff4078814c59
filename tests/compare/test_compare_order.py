"""The order of a leaderboard: ranks never fall on the way down, whatever the means, and every table keeps it."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from reporting import made_up
from rich.console import Console
from test_run_report import Page

from rankworks.cli.compare import show_comparison
from rankworks.cli.output import Output
from rankworks.compare import load_compare_config, markdown
from rankworks.compare.arms import expand
from rankworks.compare.budget import Cost
from rankworks.compare.leaderboard import Scale, leaderboard, ordered
from rankworks.compare.report import render
from rankworks.compare.result import CompareResult, RerunResult, Row
from rankworks.compare.session import Standing

RECORDS = 60
# How many records are right with each of three seeds: vera is behind lora on nearly the same records every time; pissa
# is behind vera by its mean, and so different from seed to seed that nothing is shown of it.
RIGHT = {"lora": (54, 53, 55), "vera": (44, 44, 45), "pissa": (57, 24, 40)}


def rerun(seed: int, right: int, higher: bool) -> RerunResult:
    outcomes = [float((i < right) == higher) for i in range(RECORDS)]
    metric = {"accuracy" if higher else "loss": float(np.mean(outcomes))}
    return RerunResult(seed, "complete", None, metric, outcomes, None, None, 4, 1.0, 0.1, 9.0, 9, 9)


def rows_of(higher: bool) -> list[Row]:
    config = load_compare_config({"methods": list(RIGHT), "data": {"name": "bbc-news"}, "model": {"name": "gpt2"}})
    arms, _ = expand(config)
    standings = [
        Standing(arm, 4, reruns={s: rerun(s, n, higher) for s, n in enumerate(RIGHT[arm.label])}, done=True)
        for arm in arms
    ]
    broken = Standing(arms[0], 4, reason="every trial diverged", done=True)
    broken.arm = type(arms[0])(**{**vars(arms[0]), "label": "broken"})
    scale = Scale("accuracy" if higher else "loss", higher)
    costs = {label: Cost(1, 1, 1, 1.0) for label in (*RIGHT, "broken")}
    return leaderboard([broken, *standings], costs, scale, "lora", 0.95, str)


@pytest.mark.parametrize("higher", [True, False])
def test_a_better_mean_of_a_later_rank_stands_below(higher: bool) -> None:
    rows = rows_of(higher)
    assert [(row.method, row.rank) for row in rows] == [("lora", 1), ("pissa", 1), ("vera", 2), ("broken", None)]
    _, pissa, vera, _ = rows
    assert pissa.mean is not None
    assert vera.mean is not None
    assert (vera.mean > pissa.mean) == higher
    assert pissa.tie
    assert not vera.tie


@pytest.fixture
def result() -> CompareResult:
    """Twelve made-up methods, of which good ones share no rank 1 with bad ones above them."""
    made = made_up(12)
    scale = Scale(made.metric, made.higher_is_better)
    for i, row in enumerate(made.leaderboard[:-1]):
        row.rank, row.tie = (1, True) if i % 3 == 0 else (1 + i % 3, False)
    made.leaderboard = ordered(made.leaderboard[::-1], scale)
    return made


def test_ranks_never_fall_and_means_only_within_one(result: CompareResult) -> None:
    rows = [row for row in result.leaderboard if row.rank is not None]
    assert rows == result.leaderboard[:-1]
    steps = [(a.rank or 0, -(a.mean or 0)) <= (b.rank or 0, -(b.mean or 0)) for a, b in pairwise(rows)]
    assert all(steps)
    assert any((a.mean or 0) < (b.mean or 0) for a, b in pairwise(rows))


def test_every_table_has_the_rows_in_this_order(result: CompareResult) -> None:
    wanted = [row.method for row in result.leaderboard]
    table = [line for line in markdown(result).splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[1] for line in table] == wanted
    out = Output(False)
    out.console = Console(file=io.StringIO(), width=240)
    result.output = str(Path("runs/many"))
    show_comparison(out, result)
    shown = out.console.file.getvalue()  # type: ignore[attr-defined]
    places = [re.search(rf"^ *[\d=-]+ +{re.escape(name)} ", shown, re.MULTILINE) for name in wanted]
    assert all(places)
    assert [p.start() for p in places if p] == sorted(p.start() for p in places if p)
    source = render(result)
    assert re.findall(r'<tbody class="[a-z]*" data-arm="([^"]*)">', source) == wanted
    first = re.findall(r'data-arm="[^"]*"><tr><td class="number" data-sort="(\d*)">([\d=–]+)', source)
    assert [place for place, _ in first] == [str(i) for i in range(len(wanted) - 1)] + [""]
    assert Page(source).fetched == []
