"""`optim.lr: auto`: what is measured, what it leaves alone, what a run makes of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training import adapted, make_examples, small_run, weights

from rankworks.core.errors import ConfigError, TrainingError
from rankworks.train import api
from rankworks.train.config import CALIBRATED, OptimConfig, TrainConfig, load_config
from rankworks.train.loop import Loop, read_metrics
from rankworks.train.rate import measure_rate
from rankworks.train.result import RunResult

TRAIN, OPTIM = TrainConfig(steps=6, batch_size=8), OptimConfig(lr="auto")


def test_measuring_leaves_the_model_and_chance_alone_and_repeats() -> None:
    model, examples = adapted(), make_examples()
    model.train()
    before, chance = weights(model), torch.get_rng_state()
    first, again = (measure_rate(model, examples, TRAIN, OPTIM, progress=False) for _ in range(2))
    assert first.lr == again.lr > 0
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_a_run_measures_trains_at_that_rate_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = api.run(small_run(tmp_path, optim={"lr": "auto", "schedule": "constant", "warmup": 0}))
    assert result.rate is not None
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {line["lr"] for line in lines} == {result.rate["lr"]}
    assert json.loads((tmp_path / "run" / "rate.json").read_text()) == result.rate
    assert RunResult.from_file(tmp_path / "run" / "result.json").rate == result.rate
    assert f"learning rate {result.rate['lr']:g}, the best of trials" in capsys.readouterr().err
    assert min(result.losses[3:]) < result.losses[0]


def test_a_given_rate_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "measure_rate", None)
    assert api.run(small_run(tmp_path), progress=False).rate is None
    assert not (tmp_path / "run" / "rate.json").exists()


def test_a_resumed_run_keeps_the_rate_of_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path, optim={"lr": "auto"})
    whole = api.run(config, progress=False)
    shutil.rmtree(tmp_path / "run")
    act = Loop._guarded_step

    def stops(loop: Any) -> Any:
        if loop.step == 4:
            raise KeyboardInterrupt
        return act(loop)

    monkeypatch.setattr(Loop, "_guarded_step", stops)
    with pytest.raises(KeyboardInterrupt):
        api.run(config, progress=False)
    measured = json.loads((tmp_path / "run" / "rate.json").read_text())
    monkeypatch.setattr(Loop, "_guarded_step", act)
    monkeypatch.setattr(api, "measure_rate", None)
    resumed = api.run(config, progress=False)
    assert resumed.rate == measured
    assert (resumed.rate["lr"], resumed.losses, resumed.after) == (measured["lr"], whole.losses, whole.after)


@pytest.mark.parametrize("name", ["sgd", "galore", "zo-ranksgd"])
def test_where_no_rule_was_calibrated_it_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"holds for adamw and adam.* not for {name}.*rankworks compare") as refused:
        load_config({}, [f"optim.name={name}", "optim.lr=auto"])
    assert "auto" in str(refused.value)
    assert load_config({}, [f"optim.name={CALIBRATED[0]}", "optim.lr=auto"]).optim.lr == "auto"


@pytest.mark.parametrize("value", ["0", "-1e-3", "fast", "true", "[1e-3]", "null"])
def test_other_rates_are_refused_in_one_sentence(value: str) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr: a learning rate is a number above 0, or auto"):
        load_config({}, [f"optim.lr={value}"])


def test_a_loop_alone_asks_for_a_number() -> None:
    with pytest.raises(ConfigError, match="give a number here"):
        Loop(adapted(), make_examples(), TRAIN, OptimConfig(lr="auto"), progress=False)


def test_a_search_asks_for_a_rate_of_its_own(tmp_path: Path) -> None:
    chosen = {"select": {"select": "flexora", "top_k": 1}}
    config = small_run(tmp_path, optim={"lr": "auto"}, adapt=chosen, search={"steps": 2})
    with pytest.raises(ConfigError, match=r"give search\.lr"):
        api.run(config, progress=False)
    config["search"]["lr"] = 1e-2
    result = api.run(config, progress=False)
    assert result.rate is not None
    assert result.chosen is not None


def test_a_loss_that_is_not_finite_is_told() -> None:
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("lm_head.weight")).fill_(torch.inf)
    with pytest.raises(TrainingError, match="no learning rate at which the loss stays finite"):
        measure_rate(model, make_examples(), TRAIN, OPTIM, progress=False)
