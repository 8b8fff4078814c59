"""report.html of a comparison: what it tells is what the result holds, and it claims no more than was shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reporting import EXAMPLE, made_up
from test_run_report import Page

from rankworks.compare.conclude import advice, against_baseline, headline, named
from rankworks.compare.report import render, write_report
from rankworks.compare.report.bars import Axis
from rankworks.compare.report.classes import pooled
from rankworks.compare.report.costs import Point, cost_charts, pareto, points
from rankworks.compare.report.curves import Tuned, _lowest, _over_seeds, final_chart, rate_chart, trial_chart
from rankworks.compare.result import CompareResult, Row
from rankworks.train.report.style import ticks


@pytest.fixture
def result() -> CompareResult:
    return CompareResult.from_file(EXAMPLE)


def row(result: CompareResult, label: str) -> Row:
    return next(row for row in result.leaderboard if row.method == label)


def point(label: str, cost: float, mean: float) -> Point:
    return Point(label, cost, str(cost), mean, None, None)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_it_tells_what_the_result_holds(result: CompareResult, tmp_path: Path) -> None:
    path = write_report(result, tmp_path)
    assert path == tmp_path / "report.html"
    text = " ".join(Page(path.read_text()).text)
    for told in (
        "tiny on news", "92.8", "88.8 to 96.8", "+0.8", "no difference shown", "35,155", "903 MB", "arXiv:2106.09685",
        "every trial diverged: training stopped at step 7", "locas stands beside feed-forward blocks",
        "lay at the edge of its range", result.command, row(result, "vera").command, result.method, "torch",
        "accuracy % 34.0", "6 trials of 40 steps",
    ):  # fmt: skip
        assert told in text, told


def test_it_asks_the_network_for_nothing_and_runs_nothing_from_the_data() -> None:
    bad = "</script><script>alert(1)</script><b>x</b>"
    result = made_up(5)
    plain = render(result)
    result.arms[0].label = result.leaderboard[0].method = result.baseline = bad
    result.arms[0].notes.append(bad)
    result.arms[1].trials[-1].reason = result.skipped[0].reason = result.command = bad
    result.warnings.append(bad)
    result.arms[1].reruns[0].confusion.classes[0] = bad
    source = render(result)
    assert Page(source).fetched == []
    assert Page(source).scripts == Page(plain).scripts
    assert "<script>alert" not in source
    assert "<b>x" not in source
    assert not re.search(r"url\(|@import", source.split("</style>")[0])


def test_a_result_of_another_kind_has_a_page_too(result: CompareResult) -> None:
    loss = replace(result, metric="loss", higher_is_better=False, base={"loss": 3.0}, baseline=None)
    for arm in loss.arms:
        for rerun in arm.reruns:
            rerun.confusion, rerun.metrics = None, {"loss": 1.5, "perplexity": 4.48}
    text = " ".join(Page(render(loss)).text)
    assert "perplexity" in text
    assert "against None" not in text
    assert "Class by class" not in text


def test_a_comparison_that_has_just_begun_has_a_page_too(result: CompareResult) -> None:
    begun = replace(
        result, complete=False, leaderboard=[], arms=[replace(a, trials=[], reruns=[]) for a in result.arms]
    )
    text = " ".join(Page(render(begun)).text)
    assert "Not finished: 0 of 4 methods are done." in text
    assert "nothing to conclude" in text


# ---- what may be concluded ------------------------------------------------------------------------------------------


def test_nothing_is_called_better_that_was_not_shown_to_be(result: CompareResult) -> None:
    said = " ".join([headline(result), *advice(result)])
    assert "2 of 3 methods cannot be told apart from the best" in said
    assert "Tied for the best: pissa and lora." in said
    assert "No method is shown to be better than lora" in said
    assert "worse" not in said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"difference": 0.1, "difference_low": 0.05, "difference_high": 0.15, "p_corrected": 0.04}, "better"),
        ({"difference": 0.1, "difference_low": 0.05, "difference_high": 0.15, "p_corrected": 0.06}, "not shown"),
        ({"difference": 0.1, "difference_low": -0.01, "difference_high": 0.2, "p_corrected": 0.04}, "not shown"),
        ({"difference": -0.1, "difference_low": -0.2, "difference_high": -0.01, "p_corrected": 0.04}, "worse"),
        ({"difference": None, "p_corrected": None}, None),
    ],
)
def test_both_the_corrected_p_and_the_interval_decide(
    result: CompareResult, changes: dict[str, Any], expected: str | None
) -> None:
    assert against_baseline(replace(row(result, "pissa"), **changes), result) == expected


def test_who_stands_alone_is_the_best_and_who_is_alone_is_not(result: CompareResult) -> None:
    pissa, lora, vera, dora = result.leaderboard
    alone = replace(result, leaderboard=[pissa, replace(lora, rank=2, tie=False), vera, dora])
    assert headline(alone) == "pissa is the best of 3 methods here (95% confidence)."
    assert "Tied" not in " ".join(advice(alone))
    assert "nothing to compare" in headline(replace(result, leaderboard=[pissa, dora]))
    assert "nothing to conclude" in headline(replace(result, leaderboard=[dora]))
    assert pissa.low is not None
    every = replace(result, leaderboard=[pissa, lora, replace(vera, rank=1, tie=True, high=pissa.low + 0.01)])
    assert headline(every) == "The 3 methods cannot be told apart: choose by cost."
    (cheapest,) = [sentence for sentence in advice(every) if "Among them" in sentence]
    assert cheapest == "Among them vera trains the fewest numbers (3,655)."  # memories 0.3 % apart are not told apart
    far = replace(result, leaderboard=[pissa, lora, replace(vera, rank=1, tie=True, high=pissa.low - 0.01)])
    assert not any("vera" in sentence for sentence in advice(far) if "Among them" in sentence)
    lora.memory_bytes = pissa.memory_bytes = 700_000_000
    assert any("pissa and lora need the least memory (700 MB)" in sentence for sentence in advice(every))


def test_training_that_helped_nobody_is_said(result: CompareResult) -> None:
    assert not any("untouched" in sentence for sentence in advice(result))
    assert any("untouched" in sentence for sentence in advice(replace(result, base={"accuracy": 0.95})))


def test_many_names_are_counted() -> None:
    assert named(["a"]) == "a"
    assert named(["a", "b", "c"]) == "a, b and c"
    assert named([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5 and 4 more"


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_the_front_holds_what_nothing_beats() -> None:
    found = [
        point("cheap", 1, 0.5),
        point("bad", 2, 0.4),
        point("same", 3, 0.7),
        point("twin", 3, 0.7),
        point("x", 3, 0.6),
    ]
    assert [p.label for p in pareto(found, higher=True)] == ["cheap", "same", "twin"]
    assert [p.label for p in pareto(found, higher=False)] == ["cheap", "bad"]
    for p in found:
        beaten = any(q.cost <= p.cost and q.mean >= p.mean and (q.cost, q.mean) != (p.cost, p.mean) for q in found)
        assert beaten == (p not in pareto(found, higher=True))


def test_every_ranked_arm_stands_in_every_view(result: CompareResult) -> None:
    views = points(result)
    assert list(views) == ["trained numbers", "peak memory", "time of a run"]
    for view, figure in cost_charts(result).items():
        drawn = {text for trace in figure.data if trace.meta for text in trace.text}
        assert drawn == {"pissa", "lora", "vera"} == {p.label for p in views[view]}
    assert [p.mean for p in views["peak memory"]] == [r.mean for r in result.leaderboard[:3]]
    result.leaderboard[0].memory_bytes = None
    assert {p.label for p in points(result)["peak memory"]} == {"lora", "vera"}


def test_every_trial_stands_in_the_chart_of_learning_rates(result: CompareResult) -> None:
    figure = rate_chart(result)
    assert figure is not None
    for arm in result.arms:
        traces = {t.meta["part"]: t for t in figure.data if t.meta["arm"] == arm.label}
        for part, outcomes in (("stopped", {"pruned"}), ("broken", {"diverged"})):
            assert len(traces[part].x if part in traces else ()) == sum(t.outcome in outcomes for t in arm.trials)
        done = [t for t in arm.trials if t.outcome == "complete"]
        assert sum(len(traces[part].x) for part in ("points", "best") if part in traces) == len(done)
        if done:
            assert traces["best"].y[0] == min(t.value for t in done if t.value is not None)
            assert list(traces["line"].x) == sorted(t.lr for t in done)


def test_of_several_settings_at_a_rate_the_line_takes_the_best(result: CompareResult) -> None:
    first, second, *_ = result.arm("lora").trials
    again = replace(first, slot="again", value=first.value + 1 if first.value else None)
    assert [t.slot for t in _lowest([again, first, second])] == [second.slot, first.slot]


def test_a_score_that_was_minimised_as_its_negative_is_shown_as_itself(result: CompareResult) -> None:
    assert Tuned(result).shown([0.25]) == [0.25]
    tuned = Tuned(replace(result, tuned_on="validation exact match"))
    assert tuned.shown([-0.25]) == [25.0]
    assert tuned.title == "validation exact match %"


def test_curves_of_seeds_are_their_mean_between_their_ends(result: CompareResult) -> None:
    steps, mean, low, high = _over_seeds([[(1, 1.0), (2, 4.0), (3, 0.0)], [(1, 3.0), (2, 2.0)]], span=0)
    assert (steps, mean, low, high) == ([1, 2], [2.0, 3.0], [1.0, 2.0], [3.0, 4.0])
    for which in ("losses", "valid"):
        figure = final_chart(result, which)
        assert figure is not None
        assert [t.name for t in figure.data if t.meta["part"] == "mean"] == ["pissa", "lora", "vera"]


def test_a_trial_that_broke_at_once_is_still_named(result: CompareResult) -> None:
    figure = trial_chart(result)
    assert figure is not None
    names = [t.name for t in figure.data if t.meta["arm"] == "lora"]
    assert names == ["0.0001 diverged", "0.000316 pruned", "0.001", "0.00316 best", "0.01", "0.0316 pruned"]
    assert {t.meta["arm"] for t in figure.data if t.visible} == {"pissa"}


def test_figures_hold_what_json_can(result: CompareResult) -> None:
    found = re.findall(r'<script type="application/json">(.*?)</script>', render(result), re.S)
    assert len(found) == 3 + 4
    for text in found:
        assert set(json.loads(text)) >= {"data", "layout"}


def test_the_confusion_of_all_seeds_is_their_sum(result: CompareResult) -> None:
    confusion = pooled(result.arm("lora").reruns)
    assert confusion is not None
    assert confusion.counts[0] == [36 + 37 + 36, 4 + 3 + 4, 0]
    assert pooled([]) is None


def test_an_axis_holds_its_values_and_its_mark() -> None:
    axis = Axis.over([0.2, None, 0.8], mark=0.0)
    assert axis is not None
    places = [float(axis.place(v).rstrip("%")) for v in (0.0, 0.2, 0.8)]
    assert 0 < places[0] < places[1] < places[2] < 100
    assert Axis.over([None]) is None
    alike = Axis.over([0.5])
    assert alike is not None
    assert alike.low < 0.5 < alike.high
    share = Axis.over([0.0, 0.9], within=(0.0, 1.0))
    assert share is not None
    assert share.low == 0.0
    assert 0.9 < share.high <= 1.0


@pytest.mark.parametrize(("low", "high"), [(1e-4, 3e-2), (3655, 35155), (1.0, 8.0), (1e3, 1e7)])
def test_a_logarithmic_axis_has_a_few_labels(low: float, high: float) -> None:
    assert 2 <= sum(low <= mark <= high for mark in ticks(low, high)) <= 7
