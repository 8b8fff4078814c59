"""The result of a comparison goes through JSON unchanged, and one of another format is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankworks.compare.result import FORMAT, CompareResult
from rankworks.core.errors import StoreError

EXAMPLE = Path(__file__).with_name("example.json")


def test_a_result_goes_through_json_unchanged():
    result = CompareResult.from_file(EXAMPLE)
    again = CompareResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again == result
    assert {row.method for row in result.leaderboard} == {arm.label for arm in result.arms}
    assert result.arm("vera").trials[0].valid[0] == tuple(
        json.loads(EXAMPLE.read_text())["arms"][2]["trials"][0]["valid"][0]
    )


def test_another_format_and_a_torn_file_are_refused(tmp_path: Path):
    values = json.loads(EXAMPLE.read_text())
    with pytest.raises(StoreError, match=rf"format {FORMAT + 1} .*reads {FORMAT}"):
        CompareResult.from_dict({**values, "format": FORMAT + 1})
    torn = tmp_path / "result.json"
    torn.write_text(EXAMPLE.read_text()[:500])
    with pytest.raises(StoreError, match=r"cannot be read"):
        CompareResult.from_file(torn)
