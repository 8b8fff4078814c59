"""Whole runs from a configuration: what they measure, write, refuse and continue."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from training import records, small_run

from rankworks.core.adapt import adapt
from rankworks.core.errors import ConfigError, DataError, TrainingError
from rankworks.core.store import load
from rankworks.train import RunResult, Task, load_config, run, train
from rankworks.train.hooks import Hook
from rankworks.train.sources.template import Template
from tiny import byte_tokenizer, tiny_bert_classifier, tiny_llama


def test_a_run_learns_measures_and_writes(tmp_path: Path):
    # In the chat template, where the bytes of the labels differ from the first: as plain words all begin with a space.
    settings = {"steps": 60, "save_every": 25, "eval_every": 30, "batch_size": 8}
    config = small_run(tmp_path, train=settings, data={"chat": True})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    result = run(path, ["optim.lr=2e-2"], progress=False)
    assert result.after["accuracy"] > max(0.8, result.before["accuracy"])
    assert result.confusion is not None
    assert sum(map(sum, result.confusion.counts)) == 12
    assert sum(result.confusion.counts[i][i] for i in range(3)) / 12 == result.after["accuracy"]
    assert len(result.examples) == 3
    assert {e.expected for e in result.examples} <= {"sport", "business", "tech"}
    assert result.steps == len(result.losses) == 60
    assert [v["step"] for v in result.valid] == [30, 60]
    output = tmp_path / "run"
    assert {p.name for p in output.iterdir()} == {
        *("adapter", "before.json", "checkpoints", "config.yaml", "metrics.jsonl", "result.json")
    }
    assert RunResult.from_file(output / "result.json") == result
    assert result.adapter == str(output / "adapter")
    assert result.adapter_bytes == (output / "adapter" / "adapter.safetensors").stat().st_size
    assert result.trainable_parameters < result.total_parameters
    kept = load_config(output / "config.yaml")
    assert kept.optim.lr == 0.02
    model = tiny_llama()
    load(model, output / "adapter")
    again = train(model, byte_tokenizer(), kept.data, {"train": {"steps": 1}, "optim": {"lr": 1e-9}}, progress=False)
    assert again.before["accuracy"] == result.after["accuracy"]


def test_a_classifier_run_trains_the_new_head_with_the_adapter(tmp_path: Path):
    config = small_run(tmp_path, model={"name": str(tmp_path / "bert"), "task": "classification"}, optim={"lr": 1e-2})
    tiny_bert_classifier().bert.save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    result = run(config, ["train.steps=2"], progress=False)
    saved = json.loads((Path(result.adapter or "") / "adapter.json").read_text())
    assert saved["full"] == ["classifier"]
    without = run(
        {**config, "adapt": {"delta": "lora", "rank": 4, "full": []}}, ["train.steps=2"], resume=False, progress=False
    )
    assert result.trainable_parameters - without.trainable_parameters == 3 * 32 + 3


def completions(count: int) -> list[dict[str, str]]:
    return [{"prompt": "abc"[i % 3], "completion": ("7", "12 apples", "so 400")[i % 3]} for i in range(count)]


def test_completions_are_measured_by_exact_match_and_perplexity(tmp_path: Path):
    task = Task("completion", completions(30), completions(10), "sums", max_length=64)
    model = adapt(tiny_llama(), "lora", rank=8)
    config = {
        "optim": {"lr": 2e-2},
        "train": {"steps": 60, "batch_size": 8},
        "evaluate": {"max_new_tokens": 12, "compare": "last-number"},
    }
    result = train(model, byte_tokenizer(), task, config, progress=False)
    assert result.after["exact_match"] > 0.5 > result.before["exact_match"]
    assert result.judged == 10
    assert result.after["perplexity"] == pytest.approx(math.exp(result.after["loss"]))
    assert result.after["loss"] < result.before["loss"]
    assert any(e.after == e.expected for e in result.examples)
    assert result.adapter is None
    assert result.adapter_bytes == 4 * result.trainable_parameters


def test_plain_text_is_learned_packed(tmp_path: Path):
    text = [{"text": "the cat sat on the mat. " * (1 + i % 4)} for i in range(20)]
    task = Task("text", text[:15], text[15:], "cats", max_length=48)
    model = adapt(tiny_llama(), "lora", rank=8)
    config = {"optim": {"lr": 2e-2}, "train": {"steps": 30, "batch_size": 4}}
    result = train(model, byte_tokenizer(), task, config, progress=False)
    assert result.after["perplexity"] < 0.2 * result.before["perplexity"]
    assert len(result.examples) == 3


def test_a_sequence_classifier_is_trained(tmp_path: Path):
    classes = ["business", "sport", "tech"]
    task = Task("classification", records(30), records(12, 1), "news", None, classes, Template(), max_length=64)
    model = adapt(tiny_bert_classifier(), "lora", rank=8, full=["classifier"])
    config = {"optim": {"lr": 1e-2}, "train": {"epochs": 15, "batch_size": 6}}
    result = train(model, byte_tokenizer(), task, config, progress=False)
    assert result.after["accuracy"] > 0.8
    assert result.confusion is not None
    assert result.confusion.classes == classes


class StopError(Exception):
    pass


class Stopper(Hook):
    """Ends a run after its fifth step; the second time it lets it go on."""

    stop = True

    def after_step(self, moment):
        if self.stop and moment.step == 5:
            raise StopError


def test_an_unfinished_run_is_continued_by_the_same_call(tmp_path: Path):
    whole = run(small_run(tmp_path, output=str(tmp_path / "whole")), hooks=[Quiet()], progress=False)
    hook = Stopper()
    config = small_run(tmp_path)
    with pytest.raises(StopError):
        run(config, hooks=[hook], progress=False)
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(ConfigError, match=r"unfinished run with other settings \(optim\.lr: 0\.01 -> 0\.02\)"):
        run(config, ["optim.lr=2e-2"], hooks=[hook], progress=False)
    hook.stop = False
    result = run(config, ["train.log_every=2"], hooks=[hook], progress=False)
    assert result.losses == whole.losses
    assert result.before == whole.before
    assert result.after == whole.after
    first, second = (tmp_path / name / "adapter" / "adapter.safetensors" for name in ("whole", "run"))
    assert first.read_bytes() == second.read_bytes()
    again = run(config, hooks=[hook], progress=False)  # a finished run starts over
    assert again.losses == result.losses


class Quiet(Stopper):
    stop = False


def test_starting_over_forgets_the_unfinished_run(tmp_path: Path):
    hook = Stopper()
    config = small_run(tmp_path)
    with pytest.raises(StopError):
        run(config, hooks=[hook], progress=False)
    hook.stop = False
    result = run(config, ["optim.lr=2e-2"], hooks=[hook], resume=False, progress=False)
    assert result.steps == 6
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], r"unknown key 'optim\.lrr'.*Did you mean 'lr'"),
        (["train.steps=0", "optim.lr=-1"], r"2 problems\n  - optim\.lr.*\n  - train\.steps"),
        (["optim.name=adamww"], "Did you mean 'adamw'"),
        (["steps"], "write key=value"),
        (["output.x=1"], "'output' is a value"),
        (["adapt.rank=0"], "rank"),
        (["adapt.targets=[nothing]"], "nothing"),
        (["train.batch_size=[1"], "not a YAML value"),
    ],
)
def test_bad_settings_write_nothing(tmp_path: Path, overrides: list[str], message: str):
    config = small_run(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(config, overrides, progress=False)
    assert not (tmp_path / "run").exists()


def test_bad_data_write_nothing(tmp_path: Path):
    config = small_run(tmp_path, data={"classes": ["sport", "business"]})
    with pytest.raises(DataError, match="tech"):
        run(config, progress=False)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        run(small_run(tmp_path), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_nan_loss_leaves_no_result(tmp_path: Path):
    class Poison(Hook):
        def before_forward(self, moment):
            if moment.step == 3:
                next(p for p in moment.model.parameters() if p.requires_grad).data.fill_(torch.nan)

    with pytest.raises(TrainingError, match=r"step 3.*step-00000002"):
        run(small_run(tmp_path), hooks=[Poison()], progress=False)
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_overrides_are_typed_and_do_not_touch_what_was_given(tmp_path: Path):
    config = small_run(tmp_path)
    overrides = ["optim.lr=5e-4", "train.packing=false", "adapt.targets=[q_proj, v_proj]", "output=x"]
    changed = load_config(config, overrides)
    assert changed.optim.lr == 5e-4
    assert changed.train.packing is False
    assert changed.adapt == {"delta": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}
    assert config["optim"] == {"lr": 1e-2}
    assert load_config(changed) == changed
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="needs model and data"):
        run({"output": "x"})
