"""`tune: {lr: auto}`: one trial per arm, at a rate measured at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from comparing import small_compare

from rankworks.compare import compare, trial
from rankworks.compare.arms import expand
from rankworks.compare.config import TuneConfig, load_compare_config
from rankworks.compare.tune import Seen, agenda, distributions, given
from rankworks.core.errors import ConfigError, TrainingError


def test_every_arm_has_one_trial_at_its_measured_rate_and_reruns_it(tmp_path: Path) -> None:
    result = compare(small_compare(tmp_path, tune={"lr": "auto"}), progress=False)
    for row in result.leaderboard:
        arm = result.arm(row.method)
        (made,) = arm.trials
        assert made.rate is not None
        assert made.outcome == "complete"
        assert row.lr == arm.optim["lr"] == made.lr == made.rate["lr"] > 0
        assert arm.searched is None
        assert any(
            note.startswith(f"learning rate {made.lr:g}, the best of trials") and "one trial" in note
            for note in arm.notes
        )
        assert yaml.safe_load(Path(str(arm.recipe)).read_text())["optim"]["lr"] == made.lr
        assert len(arm.reruns) == 2
    again = compare(small_compare(tmp_path, tune={"lr": "auto"}), progress=False)
    assert [arm.trials for arm in again.arms] == [arm.trials for arm in result.arms]  # nothing was done twice


def test_other_settings_may_be_tuned_beside_it() -> None:
    tune = TuneConfig(lr="auto", also={"adapt.alpha": [8, 32]})
    first, *others = agenda(tune, 3, {}).proposals
    assert len(others) == 2
    assert given(tune, first) == {"adapt.alpha": 8}
    assert given(tune, others[0]) == {}
    assert set(distributions(tune, first)) == {"adapt.alpha"}
    seen = {p.name: Seen(1e-3, 0.5) for p in (first, *others)}
    ended = agenda(tune, 3, seen)
    assert (ended.open(seen), ended.edge) == ([], None)
    assert len(agenda(TuneConfig(lr="auto"), 6, {}).proposals) == 1


def test_an_optimizer_without_a_rule_is_refused_unless_its_entry_has_a_range(tmp_path: Path) -> None:
    entry: dict[str, Any] = {"delta": "lora", "optimizer": "sgd", "label": "sgd"}
    config = small_compare(tmp_path, tune={"lr": "auto"}, methods=["lora", entry])
    with pytest.raises(ConfigError, match=r"methods\[1\].*not for sgd: give this entry a range of its own"):
        expand(load_compare_config(config))
    config["methods"][1]["tune"] = {"lr": {"low": 1e-2, "high": 1.0}}
    arms, _ = expand(load_compare_config(config))
    assert [arm.tune.lr == "auto" for arm in arms] == [True, False]
    _, refused = expand(load_compare_config(small_compare(tmp_path, tune={"lr": "auto"}, methods="optimizers")))
    assert {"sgd", "galore"} <= {r.key for r in refused}
    assert "adamw" not in {r.key for r in refused}


def test_a_rate_that_cannot_be_measured_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise TrainingError("no direction in which the loss curves upwards.")

    monkeypatch.setattr(trial, "measure_rate", fails)
    result = compare(small_compare(tmp_path, tune={"lr": "auto"}), progress=False)
    assert {row.status for row in result.leaderboard} == {"failed"}
    assert all("curves upwards" in str(row.reason) and row.lr is None for row in result.leaderboard)
    assert all(t.lr is None for arm in result.arms for t in arm.trials)
    assert (tmp_path / "out" / "report.html").exists()
