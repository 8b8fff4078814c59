"""`rankworks compare`: the table, the line of JSON, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from comparing import small_compare
from rich.console import Console
from typer.testing import CliRunner

from rankworks.cli.app import app
from rankworks.compare import CompareResult
from rankworks.compare.conclude import advice, headline
from rankworks.compare.markdown import cells, columns, markdown
from rankworks.compare.result import TrialResult
from rankworks.compare.session import Standing
from rankworks.compare.show import Board
from rankworks.compare.words import p_value

EXAMPLE = Path(__file__).with_name("example.json")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = small_compare(tmp_path, budget={"trials": 2, "steps": 2, "seeds": 2})
    del config["output"]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return path


def test_json_ends_with_one_line_that_has_the_leaderboard(file: Path):
    done = CliRunner().invoke(app, ["compare", str(file), "--json"])
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    told = json.loads(line)
    rows = told["leaderboard"]
    assert {row["method"] for row in rows} == {"lora", "vera"}
    for row in rows:
        assert row["low"] <= row["mean"] <= row["high"]
        assert isinstance(row["tie"], bool)
    assert told["complete"]
    assert not any("optim.lr is not used" in warning for warning in told["warnings"])  # none was given
    assert told["output"] == "runs/small"
    assert CompareResult.from_file(told["result"]).leaderboard[0].method == rows[0]["method"]
    assert "lora: seed 2 at lr" in done.stderr
    assert "cannot be told apart" in done.stderr
    # a person's call of the same goes on with it, and shows a table
    shown = CliRunner().invoke(app, ["compare", str(file)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "95% interval" in shown.stdout
    assert "spent" in shown.stdout
    assert "rankworks train runs/small/arms/" in shown.stdout
    assert "seed 2 at lr" not in shown.stderr
    narrow = CliRunner().invoke(app, ["compare", str(file)], env={"COLUMNS": "80"})
    head = next(line for line in narrow.stdout.splitlines() if "method" in line)
    assert "accuracy %" in head
    assert "spent" not in head
    assert "…" not in narrow.stdout, "whole columns are left out, none is cut"


def test_bad_input_is_one_paragraph_and_status_2(file: Path):
    for words, message in (
        (["methods=[lora, verra]"], "Did you mean 'vera'"),
        (["budget.trials=0"], "budget.trials"),
        (["baseline=dora"], "baseline: no arm is called 'dora'"),
        (["--storage", "nosuch://x"], "cannot be opened"),
    ):
        done = CliRunner().invoke(app, ["compare", str(file), *words])
        assert done.exit_code == 2, words
        assert message in " ".join(done.stderr.split())
    assert CliRunner().invoke(app, ["compare", "no-such-recipe"]).exit_code == 2


def test_the_recipe_of_the_package_is_a_comparison():
    from rankworks.cli.recipes import recipes
    from rankworks.compare import load_compare_config

    config = load_compare_config(recipes()["compare-minilm-bbc"])
    assert config.methods[0] == "lora"
    assert recipes()["compare-minilm-bbc"].read_text().startswith("# rankworks compare compare-minilm-bbc\n")


def test_cells_are_told_as_people_read_them():
    result = CompareResult.from_file(EXAMPLE)
    heads = columns(result)
    for row in result.leaderboard:
        told = dict(zip(heads, cells(row, result), strict=True))
        if row.status == "failed":
            assert told[""] == "-"
            assert told["accuracy %"] == "failed"
        if row.method == result.baseline:
            assert told["vs lora"] == "baseline"
    assert p_value(1e-9) == "<0.0001"
    assert "cannot be told apart" in headline(result)
    assert " ".join([f"**{headline(result)}**", *advice(result)]) in markdown(result)


def test_the_board_draws_its_table_on_a_terminal():
    from rankworks.compare.arms import expand
    from rankworks.compare.config import load_compare_config
    from rankworks.compare.tune import agenda

    config = load_compare_config({"methods": ["lora", "vera"]})
    arms, _ = expand(config)
    board = Board("accuracy", "validation loss", 6, 3, show=True)
    board.console = Console(force_terminal=True, width=100, height=20, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with board:
        standings = [Standing(arm, 10, agenda=agenda(arm.tune, 6, {})) for arm in arms]
        board.begin(standings)
        board.cell("lora", "trial 0", 1e-3, 10)
        board.tick(4)
        board.console.print(board._table())
        board.did()
        board.began -= 6.0
        for k in range(3):  # two of them by another process
            standings[0].trials[f"trial {k}"] = TrialResult(f"trial {k}", k, 1e-3, {}, "complete", None, 1.0, 10, 3.0)
        board.update(standings[0])
        standings[1].reason, standings[1].done = "every trial diverged", True
        board.update(standings[1])
        board.console.print(board._table())
    text = board.console.export_text()
    assert "18 runs left" in text
    assert "trial 0, step 4/10" in text
    assert "failed: every trial diverged" in text
    assert "6 runs left, about 12 s" in text
