"""The recipes: each opens with its command and what to expect, reads, and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workshop import rankworks

from rankworks.cli import demo
from rankworks.cli.demo import RECIPE
from rankworks.cli.recipes import find, recipes
from rankworks.compare import CompareConfig, load_compare_config
from rankworks.compare.arms import expand
from rankworks.core.hub import sample_models
from rankworks.core.hub.byte_level import BYTES
from rankworks.core.spec import AdaptSpec
from rankworks.plan import shape_names
from rankworks.train import load_config
from rankworks.train.sources import sample_data

RECIPES = recipes()
COMPARED = {name for name in RECIPES if name.startswith("compare-")}


def opening(path: Path) -> list[str]:
    """The comment a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


def test_the_recipes_of_the_clone_are_found() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    assert {path.stem: path for path in folder.glob("*.yaml")} == RECIPES
    assert find(RECIPE) == folder / f"{RECIPE}.yaml"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_its_command_and_says_what_it_does(name: str) -> None:
    comment = opening(RECIPES[name])
    assert comment[0] == f"rankworks {'compare' if name in COMPARED else 'train'} {name}"
    assert len(comment) > 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads(name: str) -> None:
    config = load_compare_config(RECIPES[name]) if name in COMPARED else load_config(RECIPES[name])
    assert config.model is not None
    assert config.data is not None
    known = {sample.name for sample in sample_models()}
    if config.model.start == "random":
        assert config.model.name in shape_names()
        assert config.model.tokenizer in {*known, BYTES}
    else:
        assert config.model.name in known
    assert config.data.name in {sample.name for sample in sample_data()}
    assert config.output == f"runs/{name}"
    if isinstance(config, CompareConfig):
        assert expand(config)[0]
    elif config.adapt is not None:
        AdaptSpec.from_flat(config.adapt)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm-bbc", "smollm2-arithmetic", "smollm2-python-stdlib"])
def test_a_recipe_runs(name: str, tmp_path: Path) -> None:
    sizes = "data.sizes={train: 16, test: 4}"
    short = ("train.steps=2", "train.batch_size=2", "evaluate.limit=4", "evaluate.max_new_tokens=8", sizes)
    said = rankworks("train", name, *short, "--output", tmp_path / "run", "--json")
    assert said.status == 0, said.err
    assert said.json["steps"] == 2
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    short = ("train.steps=4", "evaluate.limit=20", "--no-compare")
    said = rankworks("demo", *short, "--output", tmp_path / "run", "--json")
    assert said.status == 0, said.err
    told = said.json
    assert told["trainable_parameters"] == 4_884_480
    assert "learns to name the topic of a news article" in said.err
    losses = json.loads((tmp_path / "run" / "result.json").read_text())["losses"]
    assert losses[-1] < losses[0]
    assert said.err.count("; before: ") == 3
    for part in ("try next", "inspect", "merge", "report.html"):
        assert part in said.err


@pytest.mark.slow
def test_the_demos_comparison_runs(tmp_path: Path) -> None:
    short = ("budget={trials: 1, steps: 2, seeds: 1}", "evaluate.limit=20", "train.batch_size=2", "tune.lr=1e-3")
    said = rankworks("compare", demo.COMPARED, *short, "--output", tmp_path / "run", "--json")
    assert said.status == 0, said.err
    assert {row["method"] for row in said.json["leaderboard"]} == {"lora", "dora", "pissa", "vera"}
    assert all(row["status"] == "ok" for row in said.json["leaderboard"])
    assert (tmp_path / "run" / "report.html").is_file()
