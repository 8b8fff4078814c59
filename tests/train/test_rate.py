"""`optim.lr: auto`: what is measured, what it leaves alone, what a run makes of it, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training import adapted, make_examples, small_run, weights

from rankworks.core.errors import ConfigError, TrainingError
from rankworks.train import api
from rankworks.train.batching.batches import Batch, Collator
from rankworks.train.config import CALIBRATED, OptimConfig, TrainConfig, load_config
from rankworks.train.loop import Loop, read_metrics
from rankworks.train.losses.objective import Objective
from rankworks.train.rates.probe import probing
from rankworks.train.rates.rate import Trial, decided, highest, measure_rate, trial, trial_steps
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


def test_the_best_trial_is_taken_and_the_last_one_is_worse() -> None:
    found = measure_rate(adapted(), make_examples(), TRAIN, OPTIM, progress=False)
    known = {float(rate): loss for rate, loss in found.trials.items() if loss is not None}
    rates = [float(rate) for rate in found.trials]
    assert rates == sorted(rates, reverse=True)
    assert found.lr == min(known, key=lambda rate: known[rate])
    assert known[found.lr] < found.start
    assert found.steps == 6


def test_its_cost_is_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {True: 0, False: 0}
    loss = Objective.loss

    def counted(objective: Objective, batch: Batch) -> torch.Tensor:
        rows[torch.is_grad_enabled()] += len(batch.labels)
        return loss(objective, batch)

    monkeypatch.setattr(Objective, "loss", counted)
    train = TRAIN.model_copy(update={"batch_size": 16, "packing": False})
    found = measure_rate(adapted(), make_examples(), train, OPTIM, progress=False)
    assert rows[False] == 16 * (1 + sum(value is not None for value in found.trials.values()))
    assert found.passes == pytest.approx((rows[True] + rows[False] / 3) / 16, abs=0.01)


def test_steps_of_a_probe_are_those_of_the_optimizer_and_are_undone() -> None:
    model, examples = adapted(), make_examples()
    before, optim = weights(model), OptimConfig(lr=1.0, clip=None)
    with probing(model, examples, TRAIN, steps=2) as probe:
        with probe.start(optim) as step:
            losses = [step(rate) for rate in (1e-2, 1e-3)]
            after = weights(model)
        assert all(torch.equal(p, before[n]) for n, p in weights(model).items())
        order = probe.order
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters, weight_decay=0.0)
    for part, rate, seen in zip(order, (1e-2, 1e-3), losses, strict=True):
        plain.zero_grad()
        batch = Collator().batch(part)
        loss = Objective(model).loss(batch) / batch.learned
        loss.backward()
        assert loss.item() == pytest.approx(seen, rel=1e-5)
        plain.param_groups[0]["lr"] = rate
        plain.step()
    assert all(torch.allclose(p, after[n], atol=1e-7) for n, p in weights(model).items())


class Bowl:
    """A probe of one number x, whose loss 1 + x^2 starts at 2, under steps of a sign."""

    def __init__(self) -> None:
        self.x = 1.0

    @contextlib.contextmanager
    def start(self, _: OptimConfig, again: bool = False) -> Iterator[Callable[[float], float]]:
        def step(rate: float) -> float:
            loss = self.loss()
            self.x -= rate * math.copysign(1, self.x)
            return loss

        yield step
        self.x = 1.0

    def loss(self) -> float:
        return 1 + self.x**2


def test_range_and_trials_of_a_bowl() -> None:
    probe: Any = Bowl()
    assert highest(probe, OPTIM) == 3.16  # x = 1 - 0.46 - 1 + 3.16: the loss is 8.3, and was 2
    assert trial(probe, OPTIM, 3.16, 6) == Trial(None, False)
    found = trial(probe, OPTIM, 0.1, 6)
    assert (found.loss, found.calm) == (pytest.approx(1 + 0.4**2), True)
    assert [trial_steps(n) for n in (1, 48, 100, 128, 10_000)] == [6, 6, 12, 16, 16]


@pytest.mark.parametrize(
    ("trials", "ends"),
    [
        ({1.0: Trial(None, False), 0.3: Trial(1.2)}, False),  # nothing says that a lower one is worse
        ({0.3: Trial(1.2), 0.1: Trial(1.3)}, True),
        ({0.3: Trial(1.2), 0.1: Trial(None)}, True),
        ({0.3: Trial(2.2), 0.1: Trial(2.3)}, False),  # none was better than no step
        ({0.3: Trial(1.2, calm=False), 0.1: Trial(1.3)}, False),  # it may have been lucky
        ({0.3: Trial(1.2, calm=False), 0.1: Trial(1.7)}, True),
    ],
)
def test_when_the_trials_end(trials: dict[float, Trial], ends: bool) -> None:
    assert decided(trials, 2.0) is ends


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
    assert resumed.rate is not None
    assert resumed.rate == measured
    assert (resumed.rate["lr"], resumed.losses, resumed.after) == (measured["lr"], whole.losses, whole.after)


@pytest.mark.parametrize("name", ["sgd", "galore", "zo-ranksgd"])
def test_where_no_rule_was_calibrated_it_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"holds for adamw and adam.* not for {name}.*rankworks compare") as refused:
        load_config({}, [f"optim.name={name}", "optim.lr=auto"])
    assert "auto" in str(refused.value)
    assert load_config({}, [f"optim.name={CALIBRATED[0]}", "optim.lr=auto"]).optim.lr == "auto"


@pytest.mark.parametrize("value", ["0", "-1e-3", ".inf", "fast", "true", "[1e-3]", "null"])
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
