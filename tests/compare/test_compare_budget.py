"""Equal budgets: ranks solved by the plan's own formulas, and times by the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparing import small_compare

import rankworks as rw
from rankworks.compare import compare
from rankworks.compare.arms import baseline_of, expand
from rankworks.compare.budget import Planner, plan_arms
from rankworks.compare.config import load_compare_config
from rankworks.compare.trial import Bench
from rankworks.core.errors import ConfigError
from tiny import tiny_llama


def planned(entries: list[Any], budget: dict[str, Any], **blocks: Any):
    config = load_compare_config({"methods": entries, "budget": budget, **blocks})
    arms, _ = expand(config)
    planner = Planner(tiny_llama(hidden=64), config, 32, [])
    return planner, plan_arms(planner, arms, config.budget, baseline_of(config, arms))


def real_count(adapt: dict[str, Any]) -> int:
    model = tiny_llama(hidden=64)
    rw.adapt(model, **adapt)
    return rw.trainable_parameters(model)


def test_costs_are_those_of_the_real_adapter():
    _, (arms, costs, refused) = planned(["lora", "vera", "dora"], {}, adapt={"rank": 4})
    assert not refused
    for arm in arms:
        assert costs[arm.label].adapter == costs[arm.label].trainable == real_count(arm.adapt)
        assert costs[arm.label].peak_bytes > 0


def test_the_whole_model_costs_its_weights_and_what_the_optimizer_keeps():
    _, (_, costs, _) = planned(["lora", "full"], {}, adapt={"rank": 4})
    model = tiny_llama(hidden=64)
    weights = sum(p.nbytes for p in model.parameters())
    assert costs["full"].trainable == sum(p.numel() for p in model.parameters())
    assert costs["full"].peak_bytes >= 5 * weights  # weights, two moments, gradients and as much scratch
    assert costs["full"].peak_bytes > costs["lora"].peak_bytes
    assert costs["full"].flops > costs["lora"].flops


def test_equal_parameters_solve_the_rank_of_every_method():
    entries = ["lora", "dora", "lora-xs", {"delta": "lora", "init": "pissa"}]
    _, (arms, costs, refused) = planned(entries, {"equal": "parameters", "value": 9000, "tolerance": 0.15})
    assert not refused
    for arm in arms:
        assert abs(costs[arm.label].adapter / 9000 - 1) < 0.15
        assert real_count(arm.adapt) == costs[arm.label].adapter
        assert any("of the 9,000 asked for" in note for note in arm.notes)
    assert arms[3].adapt["init"]["init"] == "pissa"


def test_the_baseline_sets_the_parameters_where_no_number_is_given():
    _, (arms, costs, _) = planned(["lora", "dora"], {"equal": "parameters"}, adapt={"rank": 6})
    assert arms[0].adapt == {"delta": "lora", "rank": 6}
    assert costs["dora"].adapter == pytest.approx(costs["lora"].adapter, rel=0.25)


def test_a_method_that_is_too_far_off_is_left_out_and_none_is_refused():
    _, (arms, _, refused) = planned(["lora", "vera"], {"equal": "parameters", "value": 200_000})
    assert [a.label for a in arms] == ["lora"]
    assert refused[0].label == "vera"
    assert "the nearest to 200,000 parameters that vera trains" in refused[0].reason
    with pytest.raises(ConfigError, match=r"no method meets 3 parameters\. lora: the nearest to 3"):
        planned(["lora", "vera"], {"equal": "parameters", "value": 3})


def test_equal_memory_takes_the_highest_rank_that_fits():
    planner, (arms, costs, _) = planned(["lora", "dora"], {"equal": "memory", "value": "6MB"})
    for arm in arms:
        rank = arm.spec().delta.inner.rank if arm.key == "dora" else arm.spec().delta.rank
        assert rank > 8
        assert costs[arm.label].peak_bytes <= 6_000_000
        arm.adapt = planner.at_rank(arm, rank + 1)
        assert planner.cost(arm).peak_bytes > 6_000_000
    with pytest.raises(ConfigError, match=r"no method meets 10\.0 kB of memory.*at its peak with rank 1"):
        planned(["lora", "dora"], {"equal": "memory", "value": "10kB"})


def test_equal_time_gives_a_slower_step_fewer_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = {"lora": 0.1, "vera": 0.25}
    monkeypatch.setattr(Bench, "step_seconds", lambda bench, arm, recipe: measured[arm.label])
    settings = small_compare(tmp_path, budget={"trials": 1, "steps": 10, "seeds": 1, "equal": "time"})
    result = compare(settings, progress=False)
    assert {arm.label: arm.steps for arm in result.arms} == {"lora": 10, "vera": 4}
    assert {len(arm.reruns[0].losses) for arm in result.arms} == {4, 10}
    measured["lora"] = 99.0  # measured once: a call that goes on takes the same steps
    assert compare(settings, progress=False).arm("lora").steps == 10
    short = {**settings, "output": str(tmp_path / "short")}
    failed = compare(short, ["budget.value=1.0"], progress=False)
    assert {row.method: row.status for row in failed.leaderboard} == {"lora": "failed", "vera": "ok"}


def test_a_step_is_timed(tmp_path: Path):
    settings = small_compare(
        tmp_path, methods=["lora"], budget={"trials": 1, "seeds": 1, "equal": "time", "value": 0.5}
    )
    arm = compare(settings, progress=False).arm("lora")
    assert arm.reruns[0].step_seconds is not None
    assert arm.steps >= 1
