"""Runs without an adapter: every weight is trained, from what is there or from nothing, and the model is left."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from training import small_run
from typer.testing import CliRunner

import rankworks as rw
from rankworks.cli.after import next_commands
from rankworks.cli.app import app
from rankworks.core.errors import ConfigError, StoreError, UnknownNameError
from rankworks.train.api import run
from rankworks.train.config import load_config
from rankworks.train.report import write_report
from rankworks.train.report.words import headline, size
from rankworks.train.result import RunResult
from rankworks.train.whole import save_model
from tiny import byte_tokenizer, tiny_llama

GALORE = {"name": "galore", "rank": 4, "refresh": 3, "lr": 1e-2}


def whole(folder: Path, **blocks: object) -> dict:
    config = small_run(folder, **blocks)
    return {**config, "adapt": "none", "optim": GALORE, "output": str(folder / "out")}


def test_the_whole_model_is_trained_and_left(tmp_path: Path) -> None:
    result = run(whole(tmp_path), progress=False)
    assert result.adapter is None
    assert result.trainable_parameters == result.total_parameters
    assert result.losses[-1] < result.losses[0]
    left, _ = rw.load_model(tmp_path / "out" / "model")
    before, _ = rw.load_model(tmp_path / "model")
    pairs = zip(left.named_parameters(), before.parameters(), strict=True)
    assert all(not torch.equal(p, q) for (name, p), q in pairs if "norm" not in name)
    assert result.model_bytes >= 4 * result.total_parameters
    assert RunResult.from_file(tmp_path / "out" / "result.json").model == str(tmp_path / "out" / "model")


def test_a_run_can_go_on_with_the_model_another_left(tmp_path: Path) -> None:
    first = run(whole(tmp_path), progress=False)
    config = {**whole(tmp_path), "output": str(tmp_path / "on")}
    config["model"] = {"name": first.model, "device": "cpu"}
    second = run({**config, "adapt": {"delta": "lora", "rank": 2}}, progress=False)
    assert second.before == pytest.approx(first.after)
    assert second.adapter is not None


def test_a_model_starts_from_nothing(tmp_path: Path) -> None:
    """A folder's configuration with the tokenizer's vocabulary, its weights drawn from the seed."""
    config = whole(tmp_path)
    config["model"] |= {"start": "random"}
    result = run({**config, "train": {**config["train"], "seed": 3}}, progress=False)
    assert result.losses[0] == pytest.approx(float(torch.tensor(len(byte_tokenizer())).log()), rel=0.05)
    folder = str(tmp_path / "model")
    drawn = [rw.load_model(folder, start="random", seed=s)[0].state_dict() for s in (3, 3, 4)]
    for name, tensor in drawn[0].items():
        assert torch.equal(tensor, drawn[1][name])
    assert any(not torch.equal(tensor, drawn[2][name]) for name, tensor in drawn[0].items())


def test_a_published_shape_takes_a_tokenizer(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = rw.load_model("llama-60m", start="random", tokenizer=tmp_path, dtype="bfloat16")
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 512)
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(ConfigError, match="tokenizer: smollm2-135m"):
        rw.load_model("llama-60m", start="random")
    with pytest.raises(UnknownNameError, match="llama-60m"):
        rw.load_model("lama-60m", start="random", tokenizer=tmp_path)
    with pytest.raises(ConfigError, match="random weights"):
        rw.load_model("llama-60m", start="random", tokenizer=tmp_path, task="encoder")
    with pytest.raises(ConfigError, match="'pretrained' or 'random'"):
        rw.load_model("llama-60m", start="scratch")


def test_none_and_null_mean_no_adapter() -> None:
    assert load_config({"adapt": "none"}).adapt is None
    assert load_config({}, ["adapt=null"]).adapt is None
    assert load_config({}).adapt == {"delta": "lora"}


def test_a_model_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    save_model(model, tokenizer, tmp_path / "model")
    kept = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full, raising=False)
    with pytest.raises(StoreError, match="No space left"):
        save_model(model, tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_shape_is_trained_byte_by_byte_and_what_is_tried_next_works(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {**whole(tmp_path), "optim": {"name": "adamw", "lr": 1e-2}}
    config["model"] = {"name": "llama-60m", "start": "random", "tokenizer": "bytes", "shape": shape, "device": "cpu"}
    for name in ("train", "test"):
        texts = [json.dumps({"text": f"def f{i}(x):\n    return {i} * x  # naïve\n"}) for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
    result = run(config, progress=False)
    words = headline(load_config(config).model_dump(mode="json"))
    assert words.startswith("llama-60m, reshaped, on ")
    assert ", trained as a whole by " in words
    assert result.losses[-1] < result.losses[0]
    assert result.optimizer_bytes == 8 * result.total_parameters  # two float32 moments a number
    assert RunResult.from_file(tmp_path / "out" / "result.json").optimizer_bytes == result.optimizer_bytes
    page = write_report(tmp_path / "out").read_text()
    for told in ("llama-60m, reshaped, on", f">{size(result.optimizer_bytes)}<", "perplexity of a byte"):
        assert told in page
    for line in next_commands(load_config(config), result)[:2]:
        done = CliRunner().invoke(app, [*shlex.split(line)[1:], "train.steps=1", "--json"])
        assert done.exit_code == 0, done.output
        before = json.loads(done.stdout.strip().splitlines()[-1])["before"]
        assert before == pytest.approx(result.after)


def test_the_command_says_where_the_model_lies(tmp_path: Path) -> None:
    config = whole(tmp_path)
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    told = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--json"])
    assert told.exit_code == 0, told.output
    line = json.loads(told.stdout.strip().splitlines()[-1])
    assert line["model"] == str(tmp_path / "out" / "model")
    assert "GaLore" in told.stderr
    assert "adapt={delta: lora}" in told.stderr.replace("'", "")
    assert "trained as a whole" in (tmp_path / "out" / "report.html").read_text()
