"""`rankworks train`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from workshop import Said, Workshop, rankworks

from launching import launched
from rankworks.train import RunResult
from rankworks.train.loop import History, Loop

PROMISED = (
    "before",
    "after",
    "trainable_parameters",
    "adapter_bytes",
    "tokens_per_second",
    "peak_memory_bytes",
    "adapter",
)


def test_json_is_one_line_with_what_was_promised(finished: tuple[Workshop, Said]) -> None:
    workshop, said = finished
    told = said.json
    assert said.status == 0
    assert set(PROMISED) <= set(told)
    assert set(told["before"]) == set(told["after"]) == {"accuracy"}
    assert told["trainable_parameters"] == 4 * (7 * 2 * 2 * 32 - 2 * 2 * 16 + 2 * 3 * 32)
    adapter = Path(told["adapter"])
    assert (adapter / "adapter.safetensors").stat().st_size == told["adapter_bytes"]
    written = RunResult.from_file(workshop.folder / "run" / "result.json")
    assert written.after == told["after"]
    assert Path(told["report"]).is_file()


def test_people_read_the_rest_on_standard_error(finished: tuple[Workshop, Said]) -> None:
    _, said = finished
    for part in ("accuracy", "95 % interval", "before and after", "trainable", "tokens/s", "peak memory", "try next"):
        assert part in said.err
    result = RunResult.from_file(finished[0].folder / "run" / "result.json")
    for shown in result.examples[:3]:
        assert shown.prompt.splitlines()[0] in said.err
        assert f"is {shown.expected}; before: {shown.before}, after: {shown.after}" in said.err


def test_without_json_people_read_it_on_standard_output(workshop: Workshop) -> None:
    said = rankworks("train", workshop.yaml, "train.steps=1", "--no-report")
    assert said.status == 0
    assert "try next" in said.out
    assert "try next" not in said.err
    assert not (workshop.folder / "run" / "report.html").exists()


def test_the_three_commands_it_names_work_as_printed(finished: tuple[Workshop, Said]) -> None:
    workshop, said = finished
    lines = [line.strip() for line in said.err.split("try next")[1].splitlines() if line.strip()]
    assert [shlex.split(line)[1] for line in lines] == ["inspect", "merge", "train"]
    for line in lines:
        done = rankworks(*shlex.split(line)[1:])
        assert done.status == 0, done.err
    assert (workshop.folder / "run" / "merged" / "model.safetensors").is_file()
    second = yaml.safe_load((workshop.folder / "run-dora" / "config.yaml").read_text())
    assert second["adapt"]["delta"] == "dora"


def test_a_rate_that_is_measured_is_told(workshop: Workshop) -> None:
    said = rankworks("train", workshop.yaml, "train.steps=1", "optim.lr=auto", "--json", "--no-report")
    assert said.status == 0, said.err
    rate = said.json["rate"]
    assert said.err.count(f"{rate['lr']:g}, the best of trials of {rate['steps']} steps") == 2  # before and after
    refused = rankworks("train", workshop.yaml, "optim.name=sgd", "optim.lr=auto")
    assert refused.status == 2
    assert "not for sgd: give lr a number" in " ".join(refused.err.split())


def test_overrides_and_the_output_option_win(workshop: Workshop) -> None:
    place = workshop.folder / "else where" / "1e3"  # a name that YAML would take for a number
    said = rankworks("train", workshop.yaml, "train.steps=1", "optim.lr=2e-3", "--output", place, "--json")
    assert said.status == 0, said.err
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert (config["train"]["steps"], config["optim"]["lr"], config["output"]) == (1, 0.002, str(place))
    assert not (workshop.folder / "run").exists()


def test_without_an_output_the_file_s_name_is_taken(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.folder)
    values = yaml.safe_load(workshop.yaml.read_text())
    values.pop("output")
    other = workshop.write(yaml.safe_dump(values), "my-task.yaml")
    assert rankworks("train", other, "train.steps=1", "--json").json["output"] == "runs/my-task"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trian": {}}, "unknown key 'trian'. Did you mean 'train'"),
        ({"optim": {"learning_rate": 1}}, "unknown key 'optim.learning_rate'"),
        ({"train": {"stpes": 5}}, "Did you mean 'steps'"),
        ({"train": {"steps": "many"}}, "train.steps"),
        ({"adapt": {"delta": "lroa"}}, "no delta is called 'lroa'. Did you mean 'lora'"),
        ({"adapt": {"delta": "lora", "rnak": 3}}, "unknown key 'rnak'. Did you mean 'rank'"),
        ({"adapt": {"delta": "lora", "rank": -1}}, "rank"),
        ({"data": None}, "no data"),
        ({"model": None}, "no model"),
        ({"optim": {"name": "adamv"}}, "no optimizer is called 'adamv'. Did you mean"),
    ],
)
def test_a_bad_setting_is_told_before_anything_happens(workshop: Workshop, change: dict, expected: str) -> None:
    values = {**yaml.safe_load(workshop.yaml.read_text()), **change}
    said = rankworks("train", workshop.write(yaml.safe_dump(values)), "--json")
    assert said.status == 2
    assert said.out == ""
    assert expected in " ".join(said.err.split())
    assert said.err.startswith("error: ")
    assert "evaluating" not in said.err
    assert not (workshop.folder / "run").exists()


def test_all_problems_of_a_file_are_told_at_once(workshop: Workshop) -> None:
    values = yaml.safe_load(workshop.yaml.read_text())
    values["train"] |= {"batch_size": 0, "seeed": 1}
    values["optim"]["schedule"] = "circular"
    said = rankworks("train", workshop.write(yaml.safe_dump(values)))
    assert said.status == 2
    for part in ("batch_size", "'train.seeed'. Did you mean 'seed'", "schedule", "3 problems"):
        assert part in " ".join(said.err.split())


def test_a_syntax_error_is_told_with_line_and_column(workshop: Workshop) -> None:
    said = rankworks("train", workshop.write("model: {name: x}\noptim: {lr: 1\ntrain: {steps: 1}\n"))
    assert said.status == 2
    assert "line 3, column" in said.err
    assert "other.yaml" in said.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("nowhere.yaml",), "nowhere.yaml is neither a file nor a recipe"),
        (("smollm2-bbc-lroa",), "Did you mean 'smollm2-bbc-lora'"),
    ],
)
def test_a_missing_file_is_told(words: tuple[str, ...], expected: str) -> None:
    said = rankworks("train", *words)
    assert said.status == 2
    assert expected in said.err


@pytest.mark.parametrize("override", ["steps", "=3", "train.steps.more=1"])
def test_an_override_that_is_none_is_told(workshop: Workshop, override: str) -> None:
    said = rankworks("train", workshop.yaml, override)
    assert said.status == 2
    assert repr(override) in said.err


def test_a_stopped_run_says_how_to_go_on(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", stopping_after(Loop.run, 2))
        said = rankworks("train", workshop.yaml, "optim.lr=1e-3")
    assert said.status == 130
    assert "checkpoint of step 2 is safe" in said.err
    again = said.err.strip().splitlines()[-1]
    done = rankworks(*shlex.split(again)[1:], "--json")
    assert done.status == 0, done.err
    assert done.json["steps"] == 3
    assert "going on after step 2" in done.err
    assert done.err.count("evaluating 12/12") == 1  # the measurement before was kept
    lines = (workshop.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_an_unfinished_run_of_other_settings_is_told_and_can_be_started_over(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", stopping_after(Loop.run, 2))
        assert rankworks("train", workshop.yaml).status == 130
    said = rankworks("train", workshop.yaml, "optim.lr=2e-3")
    assert said.status == 2
    assert "optim.lr: 0.01 -> 0.002" in said.err
    assert "--restart" in said.err
    assert rankworks("train", workshop.yaml, "optim.lr=2e-3", "--restart", "--json").json["steps"] == 3


def stopping_after(run: Callable[[Loop], History], steps: int) -> Callable[[Loop], History]:
    """The loop's run, ended by Ctrl-C after some steps."""

    def stopped(self: Loop) -> History:
        step = self._step

        def once_more() -> dict[str, str]:
            if self.step == steps:
                raise KeyboardInterrupt
            return step()

        self._step = once_more  # type: ignore[method-assign]
        return run(self)

    return stopped


def test_a_run_stopped_before_its_first_checkpoint_says_that_too(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "run", stopping_after(Loop.run, 1))
    said = rankworks("train", workshop.yaml)
    assert said.status == 130
    assert "before the first checkpoint" in said.err
    assert "train.save_every" in said.err


@pytest.mark.slow
def test_the_installed_program_trains(workshop: Workshop) -> None:
    program = Path(sys.executable).with_name("rankworks")
    done = subprocess.run(
        [program, "train", workshop.yaml, "train.steps=2", "--json"],
        capture_output=True, text=True, timeout=300, check=False, cwd=workshop.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["steps"] == 2


@pytest.mark.slow
def test_two_processes_are_one_run(workshop: Workshop) -> None:
    """Started as the help says; on a CPU too the processes find each other, and one of them speaks and writes."""
    for folder, start in (("one", None), ("two", launched)):
        words = ("train", workshop.yaml, "train.steps=3", "optim.lr=1e-3", "--output", workshop.folder / folder)
        said = rankworks(*words).out if start is None else start("rankworks", *words)
        assert said.count("what it cost") == 1
    steps = (workshop.folder / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3]
    one, two = (load_file(workshop.folder / name / "adapter" / "adapter.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
