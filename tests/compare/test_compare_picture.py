"""The picture of a comparison: every method has its row, and what is drawn lies where its number says."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from reporting import made_up

from rankworks.compare import CompareResult
from rankworks.compare.report import picture
from rankworks.compare.report.bars import Axis
from rankworks.compare.report.picture import ticks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*results: CompareResult, titles: list[str] | None = None) -> ElementTree.Element:
    return ElementTree.fromstring(picture(results, titles or []))


def dots(root: ElementTree.Element) -> list[ElementTree.Element]:
    return list(root.iter(f"{SVG}circle"))


def words(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_every_method_stands_where_its_mean_is() -> None:
    result = made_up(12)
    rows = [row for row in result.leaderboard if row.status == "ok"]
    root = drawn(result)
    found = dots(root)
    assert len(found) == len(rows)
    x = [float(dot.attrib["cx"]) for dot in found]
    means = [row.mean or 0.0 for row in rows]
    scale = (x[0] - x[-1]) / (means[0] - means[-1])
    assert x == pytest.approx([x[0] + scale * (mean - means[0]) for mean in means], abs=0.2)
    assert ["best" in dot.attrib["class"] for dot in found] == [row.tie for row in rows]
    heights = [float(dot.attrib["cy"]) for dot in found]
    assert all(above < below for above, below in pairwise(heights))
    spans = [line for line in root.iter(f"{SVG}line") if "span" in line.attrib["class"]]
    for span, row in zip(spans, rows, strict=True):
        assert row.low is not None
        assert row.high is not None
        width = float(span.attrib["x2"]) - float(span.attrib["x1"])
        assert width == pytest.approx(scale * (row.high - row.low), abs=0.2)


def test_failed_methods_are_said_and_labels_are_text() -> None:
    result = made_up(6)
    result.leaderboard[0].method = "<b>odd & ends</b>"
    said = words(drawn(result))
    assert "failed" in said
    assert "<b>odd & ends</b>" in said
    assert {row.method for row in result.leaderboard} <= set(said)


def test_two_comparisons_share_their_rows() -> None:
    one, two = made_up(8), made_up(10)
    root = drawn(one, two, titles=["few", "many"])
    said = words(root)
    assert said.count("few") == said.count("many") == 1
    methods = {row.method for result in (one, two) for row in result.leaderboard}
    assert all(said.count(method) == 1 for method in methods)
    label = next(text for text in root.iter(f"{SVG}text") if text.text == "lora")
    beside = [dot for dot in dots(root) if 0 < float(label.attrib["y"]) - float(dot.attrib["cy"]) < 8]
    assert len(beside) == 2


@pytest.mark.parametrize(("low", "high"), [(0.81, 0.97), (1.8, 2.4), (-0.003, 0.011), (0.0, 1.0), (12.0, 5200.0)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    found = ticks(Axis(low, high))
    assert 2 <= len(found) <= 9
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    steps = [b - a for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert f"{steps[0]:.0e}"[0] in "125"


def test_losses_say_which_way_is_better() -> None:
    assert not any("lower" in text for text in words(drawn(made_up(4))))
    assert any("lower is better" in text for text in words(drawn(made_up(4, metric="loss", higher_is_better=False))))
