"""The search of a selection before a run: what it writes, that it may be stopped anywhere, that the run is afresh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import distributed_search
import pytest
import torch
from safetensors.torch import load_file
from training import make_examples, small_run

import rankworks as rw
from launching import launched
from rankworks.core.errors import ConfigError, DataError, TargetError
from rankworks.core.hooks import Hook
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import state_of
from rankworks.train import run
from rankworks.train.api import FOUND
from rankworks.train.config import RunConfig
from rankworks.train.searching.relax import ScoreSteps
from rankworks.train.searching.search import must_search, search
from tiny import tiny_bert_classifier, tiny_llama

FLEXORA = {"select": "flexora", "top_k": 1}
DIFFORA = {"select": "diffora", "every": 2}


class StopError(Exception):
    """What ends a run in the middle."""


class Stop(Hook):
    """Ends the run after a step."""

    def __init__(self, step: int):
        self.step = step

    def after_step(self, moment):
        if moment.step == self.step:
            raise StopError


def searching(folder: Path, select: dict[str, Any], output: str = "run", **blocks: Any) -> dict[str, Any]:
    blocks = {"search": {"steps": 5}, "adapt": {"select": select}, **blocks}
    return small_run(folder, **blocks) | {"output": str(folder / output)}


def stop_searching(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    own = ScoreSteps.after_step

    def after_step(self, moment):
        own(self, moment)
        if moment.step == step:
            raise StopError

    monkeypatch.setattr(ScoreSteps, "after_step", after_step)


def outcome(output: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    return json.loads((output / FOUND).read_text()), load_file(output / "adapter" / "adapter.safetensors")


def same(a: Path, b: Path) -> None:
    (found, tensors), (other, others) = outcome(a), outcome(b)
    assert found == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize("select", [FLEXORA, DIFFORA, {**FLEXORA, "order": "unrolled"}])
def test_a_run_searches_writes_what_it_found_and_adapts_that(tmp_path: Path, select: dict[str, Any]):
    result = run(searching(tmp_path, select), progress=False)
    found, tensors = outcome(tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert found["select"] == select["select"] == meta["adapt"]["select"]["select"]
    assert found["steps"] == 5
    assert meta["adapt"]["select"]["chosen"] == found["chosen"] == result.chosen
    assert set(found["scores"]) == set(found["weights"]) >= set(found["chosen"])
    assert len(set(found["scores"].values())) > 1
    kept = {site for site in meta["sites"] if any(key.startswith(f"{site}.") for key in tensors)}
    shared = {site for site in meta["sites"] if site not in found["sites"]}
    assert set(found["sites"]) <= kept
    assert bool(shared) == (select["select"] == "diffora")
    assert result.losses[-1] < result.losses[0]
    assert [json.loads(line)["step"] for line in (tmp_path / "run/search/metrics.jsonl").read_text().splitlines()]


def test_the_run_starts_afresh_on_all_the_data(tmp_path: Path):
    first = run(searching(tmp_path, FLEXORA), progress=False)
    told = {**FLEXORA, "chosen": outcome(tmp_path / "run")[0]["chosen"]}
    second = run(searching(tmp_path, told, "told"), progress=False)
    assert first.losses == second.losses
    assert first.before == second.before
    tensors, others = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("run", "told"))
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert not (tmp_path / "told" / FOUND).exists()


@pytest.mark.parametrize(("select", "stopped"), [(FLEXORA, 1), (FLEXORA, 5), ({**DIFFORA, "order": "unrolled"}, 3)])
def test_a_search_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, monkeypatch, select, stopped: int):
    blocks: dict[str, Any] = {"adapt": {"select": select, "dropout": 0.1}}
    run(searching(tmp_path, select, "whole", **blocks), progress=False)
    with monkeypatch.context() as patch:
        stop_searching(patch, stopped)
        with pytest.raises(StopError):
            run(searching(tmp_path, select, **blocks), progress=False)
    kept = list((tmp_path / "run" / "search" / "checkpoints").glob("step-*"))
    assert bool(kept) == (stopped > 2)
    torch.manual_seed(99)
    run(searching(tmp_path, select, **blocks), progress=False)
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("select", [FLEXORA, DIFFORA])
def test_a_run_that_was_stopped_after_its_search_does_not_search_again(tmp_path: Path, monkeypatch, select):
    run(searching(tmp_path, select, "whole"), progress=False)
    with pytest.raises(StopError):
        run(searching(tmp_path, select), hooks=[Stop(3)], progress=False)
    stop_searching(monkeypatch, 1)
    run(searching(tmp_path, select), hooks=[Stop(0)], progress=False)
    same(tmp_path / "whole", tmp_path / "run")


def test_other_settings_are_refused_and_restarting_searches_again(tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_searching(patch, 3)
        with pytest.raises(StopError):
            run(searching(tmp_path, FLEXORA), progress=False)
    other = searching(tmp_path, FLEXORA, search={"steps": 4})
    with pytest.raises(ConfigError, match=r"unfinished search with other settings \(search.steps: 5 -> 4\).*--restart"):
        run(other, progress=False)
    run(other, progress=False, resume=False)
    assert outcome(tmp_path / "run")[0]["steps"] == 4
    run(searching(tmp_path, FLEXORA), progress=False)  # the folder's run is over, so this is a new one
    assert outcome(tmp_path / "run")[0]["steps"] == 5
    run(searching(tmp_path, {"select": "layra"}), progress=False)
    assert not (tmp_path / "run" / FOUND).exists()


def test_what_would_fail_afterwards_is_refused_before_the_search(tmp_path: Path, monkeypatch):
    stop_searching(monkeypatch, 1)

    def tried(select, **adapt: Any) -> None:
        run(searching(tmp_path, select, adapt={"select": select, **adapt}), progress=False)

    with pytest.raises(TargetError, match="set share to False"):
        tried(DIFFORA, delta="dora")
    with pytest.raises(TargetError, match="leaves no site"):
        tried({**DIFFORA, "rho": 0.0, "share": False})
    with pytest.raises(ConfigError, match="top_k is 3"):
        tried({**FLEXORA, "top_k": 3})
    with pytest.raises(ConfigError, match=r"locas changes no weight, so a search has nothing to weigh"):
        tried(FLEXORA, delta="locas", targets="re:mlp$", rank=4)
    with pytest.raises(ConfigError, match=r"search.valid|valid"):
        run(searching(tmp_path, FLEXORA, search={"valid": 1.0}), progress=False)


def test_overrides_of_layers_that_are_not_chosen_are_no_mistake(tmp_path: Path):
    overrides = {"@0": {"rank": 2}, "@1": {"rank": 3}}
    run(searching(tmp_path, FLEXORA, adapt={"select": FLEXORA, "overrides": overrides}), progress=False)
    found, tensors = outcome(tmp_path / "run")
    number = int(found["chosen"][0][-1])
    assert {t.shape[0] for name, t in tensors.items() if name.endswith(".A")} == {2 + number}


MORE: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "eva": {"init": "eva"},
    "adalora": {"ranks": {"ranks": "adalora", "target": 2}},
    "dora-eva": {"delta": "dora", "init": "eva"},
}


@pytest.mark.parametrize("name", MORE)
def test_starts_from_data_and_schedules_of_ranks_go_with_it(tmp_path: Path, monkeypatch, name: str):
    adapters, more, own = [], MORE[name], ScoreSteps.on_start

    def on_start(self, moment):
        adapters.append(state_of(moment.model).adapter("search"))
        own(self, moment)

    monkeypatch.setattr(ScoreSteps, "on_start", on_start)
    result = run(searching(tmp_path, FLEXORA, adapt={"select": FLEXORA, **more}), progress=False)
    assert result.losses[-1] < result.losses[0]
    assert outcome(tmp_path / "run")[0]["chosen"] == result.chosen
    (searched,) = adapters
    assert searched.spec.ranks is None
    assert len(searched.sites) == 14
    meta = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert ("ranks" in meta["adapt"]) == ("ranks" in more)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unrolled-bf16-checkpointing": ({"order": "unrolled"}, {"gradient_checkpointing": True, "precision": "bf16"}),
    "accumulated-unpacked": ({"every": 2}, {"accumulate": 2, "packing": False}),
    "two-steps-deep": ({"order": "unrolled", "unroll": 2}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_whatever_the_loop_does_the_search_does(tmp_path: Path, name: str):
    select, train = OPTIONS[name]
    blocks: dict[str, Any] = {"train": {**train, "save_every": None}, "search": {"steps": 4, "batches": 2}}
    result = run(searching(tmp_path, {**FLEXORA, **select}, **blocks), progress=False)
    assert result.losses[-1] < result.losses[0]
    assert any(score != 0 for score in outcome(tmp_path / "run")[0]["scores"].values())


def test_a_classifier_with_its_head_in_full(tmp_path: Path):
    config = searching(tmp_path, FLEXORA)
    tiny_bert_classifier().save_pretrained(tmp_path / "model")
    config["model"]["task"] = "classification"
    config["optim"]["lr"] = 3e-2
    result = run(config, progress=False)
    found, tensors = outcome(tmp_path / "run")
    assert found["chosen"] == result.chosen
    assert {name for name in tensors if not name.startswith(found["chosen"][0])} == {
        "full.classifier.weight",
        "full.classifier.bias",
    }
    assert any(score != 0 for score in found["scores"].values())


def test_the_model_is_left_as_it_was_and_no_folder_is_needed():
    model = tiny_llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    spec = AdaptSpec.from_flat({"delta": "lora", "rank": 2, "select": FLEXORA})
    assert must_search(spec)
    config = RunConfig.model_validate({"train": {"steps": 4, "batch_size": 4}, "optim": {"lr": 1e-2}})
    found = [search(model, make_examples(), spec, config, progress=False) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].steps == 4
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rw.adapters(model) == []
    with pytest.raises(DataError, match="there is one example"):
        search(model, make_examples()[:1], spec, config, progress=False)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path):
    launched(Path(__file__).parent / "distributed_search.py", tmp_path / "scores")
    first, second = (json.loads((tmp_path / f"scores.{rank}").read_text()) for rank in (0, 1))
    assert first == second
    alone = distributed_search.scores()
    assert first == pytest.approx(alone, abs=1e-4)
    assert max(map(abs, alone.values())) > 1e-2
