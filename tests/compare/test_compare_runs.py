"""Whole comparisons on a tiny model: what they find, write, repeat, refuse, and make of arms that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from comparing import records, small_compare

import rankworks as rw
from rankworks.compare import CompareResult, compare, markdown
from rankworks.compare.base import Base, checksum
from rankworks.compare.config import load_compare_config
from rankworks.compare.trial import COMPLETE, DIVERGED, Bench, Outcome, averaged, blame
from rankworks.core.errors import ConfigError, DataError, DivergedError, TrainingError
from rankworks.train import RunResult, load_config, load_task, run
from tiny import byte_tokenizer, tiny_bert_classifier, tiny_llama

ONE = {"trials": 1, "steps": 2, "seeds": 1}


def test_a_comparison_finds_writes_and_repeats(tmp_path: Path):
    settings = small_compare(
        tmp_path,
        methods=["lora", "vera"],
        budget={"trials": 4, "steps": 12, "seeds": 2},
        tune={"lr": {"low": 1e-4, "high": 3.2e-2}, "widen": 1},
        train={"batch_size": 6},
    )
    result = rw.compare(settings, progress=False)
    assert result.complete
    assert result.metric == "accuracy"
    assert [row.rank for row in result.leaderboard] == sorted(row.rank or 0 for row in result.leaderboard)
    assert result.leaderboard[0].tie
    for row in result.leaderboard:
        arm = result.arm(row.method)
        scores = np.array([r.outcomes for r in arm.reruns])
        assert scores.shape == (2, 12)
        assert row.mean == pytest.approx(scores.mean())
        assert row.mean == pytest.approx(np.mean([r.metrics["accuracy"] for r in arm.reruns]))
        assert row.low is not None
        assert row.high is not None
        assert row.low <= row.mean <= row.high
        assert [r.seed for r in arm.reruns] == [1, 2]
        assert row.trials == len(arm.trials) >= 4
        best = next(t for t in arm.trials if t.slot == arm.best)
        assert best.value == min(t.value for t in arm.trials if t.outcome == "complete" and t.value is not None)
        assert row.lr == best.lr
        assert [step for step, _ in best.valid] == [3, 6, 9, 12]
        assert len(best.losses) == 12
    lora, vera = (result.arm(name) for name in ("lora", "vera"))
    assert lora.trainable_parameters > vera.trainable_parameters
    other = next(row for row in result.leaderboard if row.method == "vera")
    assert other.difference == pytest.approx(
        np.mean([r.outcomes for r in vera.reruns]) - np.mean([r.outcomes for r in lora.reruns])
    )
    # the files
    output = tmp_path / "out"
    assert CompareResult.from_file(output / "result.json") == result
    assert (output / "result.md").read_text() == markdown(result)
    # `rankworks train` on an arm's recipe repeats the rerun, record by record
    recipe = output / "arms" / "lora.yaml"
    assert recipe.read_text().startswith(f"# {lora.command}\n")
    assert (
        lora.command
        == f"rankworks train {recipe} optim.lr={lora.optim['lr']:g} train.seed=1 --output {output}/again/lora"
    )
    for rerun in lora.reruns:
        again: RunResult = run(recipe, [f"train.seed={rerun.seed}", f"output={tmp_path / 'again'}"], progress=False)
        assert again.after == rerun.metrics
        assert again.confusion == rerun.confusion
        assert [round(x, 6) for x in again.losses] == [loss for _, loss in rerun.losses]
    # a second call has nothing to do
    assert rw.compare(settings, progress=False).leaderboard == result.leaderboard


def test_hopeless_trials_are_stopped_at_a_quarter_and_a_half(tmp_path: Path):
    settings = small_compare(
        tmp_path,
        methods=["lora"],
        budget={"trials": 6, "steps": 4, "seeds": 1},
        tune={"lr": {"low": 1e-5, "high": 3.2e-3}},
    )
    pruned = [t for t in compare(settings, progress=False).arm("lora").trials if t.outcome == "pruned"]
    assert pruned  # the smallest rates learn nothing, and come after better ones
    assert {t.steps for t in pruned} <= {1, 2}
    whole = compare(settings, ["tune.prune=false", f"output={tmp_path / 'whole'}"], progress=False).arm("lora")
    assert {t.steps for t in whole.trials} == {4}


class Poison:
    """A stand-in for what goes wrong in one arm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, label: str, act: Any):
        train = Bench._train

        def poisoned(bench: Bench, model: Any, recipe: Any, *rest: Any) -> None:
            if recipe.adapt["delta"] == label:
                act(model)
            train(bench, model, recipe, *rest)

        monkeypatch.setattr(Bench, "_train", poisoned)


@pytest.mark.parametrize(
    ("error", "outcome", "trials"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 1),
        (RuntimeError("a bug of the method"), "failed", 1),
        (DivergedError("training stopped at step 2: the loss became nan."), "diverged", 5),
    ],
)
def test_an_arm_that_fails_is_a_result_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str, trials: int
):
    def act(model: Any) -> None:
        raise error

    Poison(monkeypatch, "vera", act)
    result = compare(
        small_compare(tmp_path, budget={"trials": 3, "steps": 2, "seeds": 1}, tune={"widen": 1}), progress=False
    )
    good, bad = result.leaderboard
    assert (good.method, good.status, good.rank) == ("lora", "ok", 1)
    assert (bad.method, bad.status, bad.rank, bad.mean) == ("vera", "failed", None, None)
    assert str(error)[:20] in str(bad.reason)
    assert [t.outcome for t in result.arm("vera").trials] == [outcome] * trials
    assert "vera** failed" in markdown(result)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["complete"]


def test_a_loss_that_is_not_finite_is_a_diverged_trial(tmp_path: Path):
    settings = small_compare(
        tmp_path, methods=["lora"], budget={"trials": 2, "steps": 8, "seeds": 1}, optim={"clip": None}
    )
    settings["tune"] = {"lr": [1e-3, 1e30], "widen": 0}
    trials = compare(settings, progress=False).arm("lora").trials
    assert {t.lr: t.outcome for t in trials} == {1e-3: "complete", 1e30: "diverged"}
    assert next(t for t in trials if t.lr == 1e30).value is None


def test_a_seed_that_broke_makes_an_arm_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train = Bench._train

    def second(bench: Bench, model: Any, recipe: Any, *rest: Any) -> None:
        if recipe.train.seed == 2:
            raise DivergedError("the loss became nan.")
        train(bench, model, recipe, *rest)

    monkeypatch.setattr(Bench, "_train", second)
    (row,) = compare(
        small_compare(tmp_path, methods=["lora"], budget={"trials": 1, "steps": 2, "seeds": 2}), progress=False
    ).leaderboard
    assert (row.status, row.rank, row.seeds) == ("failed", None, 1)
    assert str(row.reason).startswith("1 of 2 seeds diverged")
    assert row.mean is not None


def test_an_arm_that_changes_the_base_stops_everything_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def act(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6

    Poison(monkeypatch, "vera", act)
    with pytest.raises(TrainingError, match="the arm vera left the base model changed"):
        compare(small_compare(tmp_path, budget=ONE), progress=False)


def test_so_does_one_that_changes_it_while_its_step_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inside = Bench._adapted

    @contextmanager
    def changed(bench: Bench, arm: Any, recipe: Any) -> Iterator[Any]:
        with inside(bench, arm, recipe) as model:
            if arm.label == "vera":
                model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6  # type: ignore[union-attr,index,operator]
            yield model

    monkeypatch.setattr(Bench, "_adapted", changed)
    budget = {"trials": 1, "steps": 2, "seeds": 1, "equal": "time", "value": 1.0}
    with pytest.raises(TrainingError, match="the arm vera left the base model changed"):
        compare(small_compare(tmp_path, budget=budget), progress=False)


def test_a_checksum_sees_every_bit():
    model = tiny_llama()
    before = checksum(model)
    assert checksum(tiny_llama()) == before
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()  # the same numbers elsewhere
    assert checksum(model) != before
    weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    assert checksum(model) == before
    weight.view(torch.int32)[-1, -1] ^= 1
    assert checksum(model) != before
    assert checksum(model.to(torch.bfloat16)) != before


def test_every_seed_has_the_head_it_is_born_with(tmp_path: Path):
    small_compare(tmp_path)
    tiny_bert_classifier().bert.save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    settings = small_compare(tmp_path, model={"name": str(tmp_path / "bert"), "task": "classification"})
    config = load_compare_config(settings)
    assert config.data is not None
    base = Base(config, load_task(config.data), 0)
    head = base.model.classifier.weight
    first = head.detach().clone()
    second = base.use(2).classifier.weight.detach().clone()
    assert not torch.equal(first, second)
    base.restore("x")  # the checksum is that of this seed
    assert torch.equal(base.use(3).classifier.weight, base._load(3)[0].classifier.weight)
    assert torch.equal(base.use(0).classifier.weight, first)
    assert torch.equal(base.use(2).classifier.weight, second)


def test_methods_that_cannot_take_the_model_are_skipped_with_the_reason(tmp_path: Path):
    settings = small_compare(
        tmp_path, methods=["lora", {"delta": "lora", "targets": ["nowhere"], "label": "astray"}], budget=ONE
    )
    result = compare(settings, progress=False)
    assert [row.method for row in result.leaderboard] == ["lora"]
    (skipped,) = result.skipped
    assert skipped.label == "astray"
    assert "nowhere" in skipped.reason
    assert "**astray** was not run" in markdown(result)
    with pytest.raises(ConfigError, match="the baseline astray cannot run"):
        compare(settings, ["baseline=astray"], progress=False)


def test_what_is_refused_before_anything_is_trained(tmp_path: Path):
    settings = small_compare(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'vera'"):
        compare(settings, ["methods=[lora, verra]"], progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="needs model and data"):
        compare({"methods": ["lora"]}, progress=False)
    nothing = {**settings, "data": {"train": settings["data"]["train"], "test_fraction": 0.0, "max_length": 128}}
    with pytest.raises(DataError, match="decided on test data"):
        compare(nothing, progress=False)


def test_validation_data_are_held_out_where_there_are_none(tmp_path: Path):
    settings = small_compare(tmp_path, methods=["lora"], budget=ONE)
    del settings["data"]["valid"]
    result = compare(settings, ["tune.valid_fraction=0.2"], progress=False)
    assert (result.data["train"], result.data["valid"], result.data["test"]) == (24, 6, 12)
    kept = load_config(tmp_path / "out" / "arms" / "lora.yaml")
    assert kept.data is not None
    assert kept.data.valid_fraction == 0.2


def test_other_settings_are_tuned_on_request(tmp_path: Path):
    also = {"adapt.alpha": [4, 64], "optim.warmup": {"low": 0.01, "high": 0.5}}
    settings = small_compare(
        tmp_path, methods=["lora"], budget={"trials": 6, "steps": 2, "seeds": 1}, tune={"also": also}
    )
    arm = compare(settings, progress=False).arm("lora")
    assert {t.settings["adapt.alpha"] for t in arm.trials[:5]} == {4}
    assert all(0.01 <= t.settings["optim.warmup"] <= 0.5 for t in arm.trials)
    best = next(t for t in arm.trials if t.slot == arm.best)
    recipe = yaml.safe_load((tmp_path / "out" / "arms" / "lora.yaml").read_text())
    assert recipe["adapt"]["alpha"] == best.settings["adapt.alpha"] == arm.adapt["alpha"]
    assert recipe["optim"]["warmup"] == best.settings["optim.warmup"]


def test_a_loss_is_compared_where_lower_is_better(tmp_path: Path):
    small_compare(tmp_path)
    for name in ("train", "valid", "test"):
        texts = [json.dumps({"text": f"{r['text']} {r['label']} " * 4}) for r in records(15)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
    settings = small_compare(
        tmp_path, data={"max_length": 32, "chat": None}, budget={"trials": 1, "steps": 6, "seeds": 2}
    )
    settings["tune"] = {"lr": 1e-2}
    settings["methods"] = ["lora", {"delta": "lora", "label": "slow", "tune": {"lr": 1e-6}}]
    result = compare(settings, progress=False)
    assert (result.metric, result.higher_is_better) == ("loss", False)
    good, bad = result.leaderboard
    assert (good.method, bad.method) == ("lora", "slow")
    assert good.mean is not None
    assert bad.mean is not None
    assert good.mean < bad.mean
    assert bad.difference is not None
    assert bad.difference < 0  # worse than the baseline, though its loss is higher
    first = result.arm("lora").reruns[0]
    assert np.average(first.outcomes, weights=first.weights) == pytest.approx(first.metrics["loss"], rel=1e-4)


def test_blame_tells_outcomes_apart():
    memory = TrainingError("the device ran out of memory at step 3")
    memory.__cause__ = torch.OutOfMemoryError("x")
    assert blame(memory)[0] == "out of memory"
    assert blame(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"))[0] == "out of memory"
    assert blame(DivergedError("the posterior left the numbers"))[0] == "diverged"
    assert blame(torch.linalg.LinAlgError("svd did not converge"))[0] == "diverged"
    assert blame(TrainingError("the checkpoint became unreadable"))[0] == "failed"  # judged by kind, not by words
    assert blame(TrainingError("no token of the batch of step 1 has a label"))[0] == "failed"


def test_the_whole_model_is_an_arm_and_gives_the_base_back(tmp_path: Path):
    settings = small_compare(
        tmp_path, methods=["full", "lora"], baseline="full", budget={"trials": 1, "steps": 3, "seeds": 1}
    )
    settings["tune"] = {"lr": 1e-3}
    result = compare(settings, progress=False)
    assert {row.status for row in result.leaderboard} == {"ok"}
    full, lora = result.arm("full"), result.arm("lora")
    assert full.trainable_parameters == result.model["parameters"] > lora.trainable_parameters
    alone = compare(
        {**settings, "output": str(tmp_path / "alone")}, ["methods=[lora]", "baseline=lora"], progress=False
    )
    assert alone.arm("lora").reruns[0].losses == lora.reruns[0].losses
    again = run(tmp_path / "out" / "arms" / "full.yaml", [f"output={tmp_path / 'again'}"], progress=False)
    assert again.after == full.reruns[0].metrics
    assert [round(x, 6) for x in again.losses] == [loss for _, loss in full.reruns[0].losses]


def test_optimizers_are_compared_on_models_from_nothing(tmp_path: Path):
    small_compare(tmp_path)
    for name in ("train", "valid", "test"):
        texts = [json.dumps({"text": f"{r['text']} {r['label']} " * 4}) for r in records(15)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
    settings = small_compare(
        tmp_path,
        model={"start": "random"},
        data={"max_length": 32, "chat": None},
        methods=["adamw", "sgd"],
        baseline="adamw",
        budget={"trials": 1, "steps": 3, "seeds": 2},
    )
    settings["adapt"], settings["tune"] = "none", {"lr": 1e-2}
    result = compare(settings, progress=False)
    assert [r.status for r in result.leaderboard] == ["ok", "ok"]
    one, two = result.arm("adamw").reruns
    assert one.losses[0] != two.losses[0]  # every seed has weights of its own
    assert one.losses[0] == result.arm("sgd").reruns[0].losses[0]
    again = run(
        tmp_path / "out" / "arms" / "sgd.yaml", ["train.seed=2", f"output={tmp_path / 'again'}"], progress=False
    )
    assert [round(x, 6) for x in again.losses] == [loss for _, loss in result.arm("sgd").reruns[1].losses]


def test_trials_over_several_seeds(tmp_path: Path):
    """Each trial is the mean of runs that are those of single seeds, and the best by it is rerun."""
    settings: dict[str, Any] = {
        "methods": ["lora"],
        "budget": {"trials": 3, "steps": 8, "seeds": 1},
        "tune": {"lr": [1e-3, 1e-2, 3e-2], "prune": False, "widen": 0},
    }
    several = {**settings, "tune": {**settings["tune"], "seeds": 2}}
    result = compare(small_compare(tmp_path, **several, output=str(tmp_path / "two")), progress=False)
    config = load_compare_config(small_compare(tmp_path, **several))
    seeds = config.tuning_seeds(config.tune)
    assert len(set(seeds)) == 2
    assert not set(seeds) & set(range(1, 1000))  # where reruns have theirs
    alone = []
    for seed in seeds:
        one = small_compare(
            tmp_path, **settings, train={"batch_size": 4, "seed": seed}, output=str(tmp_path / f"{seed}")
        )
        alone.append({t.lr: t for t in compare(one, progress=False).arm("lora").trials})
    arm = result.arm("lora")
    for trial in arm.trials:
        assert trial.values == [runs[trial.lr].value for runs in alone]
        assert trial.value == pytest.approx(np.mean(trial.values))
        assert trial.losses == [
            (a[0], pytest.approx((a[1] + b[1]) / 2, abs=2e-6))
            for a, b in zip(*(runs[trial.lr].losses for runs in alone), strict=True)
        ]
    best = min(arm.trials, key=lambda t: t.value or 0.0)
    assert arm.best == best.slot
    assert result.leaderboard[0].lr == best.lr
    assert "each the mean of 2 seeds" in markdown(result)


def test_a_trial_ends_with_the_first_seed_that_breaks():
    whole, broken = Outcome(COMPLETE, value=1.0, seconds=2.0), Outcome(DIVERGED, "the loss became nan", seconds=1.0)
    told = averaged([whole, broken])
    assert (told.outcome, told.reason, told.value, told.seconds) == (DIVERGED, "the loss became nan", None, 3.0)
