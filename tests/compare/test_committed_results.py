"""The committed results are what the recipe of their name gives, and their tables say what the numbers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankworks.cli.recipes import recipes
from rankworks.compare import CompareResult, load_compare_config
from rankworks.compare.markdown import markdown
from rankworks.compare.report import picture

RESULTS = Path(__file__).parents[2] / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/result.json"))


def said(found: Any, given: Any) -> Any:
    """What a configuration with all defaults filled in says of the names that are given."""
    return {name: said(found[name], value) for name, value in given.items()} if isinstance(given, dict) else found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_result_is_its_recipe_s(folder: Path) -> None:
    result = CompareResult.from_file(folder / "result.json")
    config = load_compare_config(recipes()[folder.name])
    assert result.complete
    given = config.model_dump(mode="json", exclude_unset=True)
    assert {name: said(result.config[name], value) for name, value in given.items()} == given
    assert result.command == f"rankworks compare {folder.name}"
    assert (folder / "result.md").read_text(encoding="utf-8") == markdown(result)
    assert (folder / "result.svg").read_text(encoding="utf-8") == picture([result])
    assert (folder / "report.html").stat().st_size > 1_000_000  # with what it needs to open offline
    assert f"({folder.name}/result.md)" in (RESULTS / "README.md").read_text(encoding="utf-8")


def test_there_are_results() -> None:
    assert FOLDERS
