"""Small models from nothing, byte by byte: optimizers are compared by what they reach and what they keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import rankworks as rw
from rankworks.compare import CompareResult, compare
from rankworks.compare.conclude import advice
from rankworks.compare.markdown import cells, columns
from rankworks.compare.report.costs import cost_charts, points
from rankworks.core.errors import ConfigError
from rankworks.plan import optimizer_bytes
from rankworks.train.api import run
from rankworks.train.config import load_config

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GALORE = {"rank": 8, "refresh": 2}


def pretraining(folder: Path, **blocks: Any) -> dict[str, Any]:
    """A comparison on a few lines of text."""
    for name, count in (("train", 24), ("valid", 6), ("test", 8)):
        texts = [json.dumps({"text": f"def f{i}(x):\n    return {i} * x + {count}  # naïve\n"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(texts))
    config = {
        "model": {"name": "llama-60m", "start": "random", "tokenizer": "bytes", "shape": SHAPE, "device": "cpu"},
        "data": {**{n: str(folder / f"{n}.jsonl") for n in ("train", "valid", "test")}, "max_length": 64},
        "adapt": "none",
        "methods": ["adamw", {"optimizer": {"name": "galore", **GALORE}}, "adamw8bit"],
        "baseline": "adamw",
        "train": {"batch_size": 2},
        "budget": {"trials": 1, "steps": 3, "seeds": 2},
        "tune": {"lr": 3e-3},
        "output": str(folder / "out"),
    }
    return {**config, **blocks}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompareResult]:
    folder = tmp_path_factory.mktemp("pretraining")
    return folder, compare(pretraining(folder), progress=False)


def test_what_is_kept_is_measured_and_is_what_plan_says(compared: tuple[Path, CompareResult]) -> None:
    result = compared[1]
    assert [row.status for row in result.leaderboard] == ["ok"] * 3
    model, _ = rw.load_model("llama-60m", start="random", tokenizer="bytes", shape=SHAPE)
    told = {
        arm.label: optimizer_bytes({"optimizer": arm.optim["name"], **(GALORE if "galore" in arm.label else {})}, model)
        for arm in result.arms
    }
    kept = {row.method: row.optimizer_bytes for row in result.leaderboard}
    assert kept == told
    assert kept["adamw"] == 8 * sum(p.numel() for p in model.parameters())
    assert len(set(kept.values())) == 3
    assert all(rerun.optimizer_bytes == kept[arm.label] for arm in result.arms for rerun in arm.reruns)


def test_every_seed_draws_new_weights_and_a_row_repeats_from_its_recipe(compared: tuple[Path, CompareResult]) -> None:
    folder, result = compared
    one, two = result.arm("adamw").reruns
    assert one.losses[0] != two.losses[0]
    assert all(arm.reruns[1].losses[0] == two.losses[0] for arm in result.arms)
    recipe = folder / "out" / "arms" / "adamw.yaml"
    again = run(recipe, ["train.seed=2", f"output={folder / 'again'}"], progress=False)
    assert [round(x, 6) for x in again.losses] == [loss for _, loss in two.losses]
    assert again.optimizer_bytes == two.optimizer_bytes
    assert load_config(folder / "again" / "config.yaml").model.shape == SHAPE  # type: ignore[union-attr]
    _, tokenizer = rw.load_model(again.model)  # type: ignore[arg-type]
    assert tokenizer("é")["input_ids"] == list("é".encode())


def test_it_stands_in_every_table(compared: tuple[Path, CompareResult]) -> None:
    folder, result = compared
    heads = columns(result)
    assert heads[2] == result.unit == "loss, nats per byte"
    assert "trained" not in heads  # which is the same for all
    place = heads.index("optimizer")
    shown = {row.method: cells(row, result)[place] for row in result.leaderboard}
    assert all(text.endswith("kB") for text in shown.values())
    assert f"| {shown['adamw']} |" in (folder / "out" / "result.md").read_text()
    page = (folder / "out" / "report.html").read_text()
    for row in result.leaderboard:
        body = page.split(f'<tbody class="{"best" if row.tie else ""}" data-arm="{row.method}">')[1].split("</tr>")[0]
        assert f'<td class="number" data-sort="{row.optimizer_bytes}">{shown[row.method]}</td>' in body
    assert "Optimizer state" in page


def test_the_loss_is_drawn_over_what_is_kept(compared: tuple[Path, CompareResult]) -> None:
    result = compared[1]
    views = points(result)
    assert list(views) == ["optimizer state", "peak memory", "time of a run"]  # all train the same numbers
    kept = {row.method: row.optimizer_bytes for row in result.leaderboard}
    assert {point.label: point.cost for point in views["optimizer state"]} == kept
    figure: Any = cost_charts(result)["optimizer state"]
    assert figure.layout.yaxis.title.text == "loss, nats per byte (lower is better)"


def test_who_keeps_least_is_named_among_optimizers_that_are_tied(compared: tuple[Path, CompareResult]) -> None:
    result = compared[1]
    tied = [replace(row, rank=1, tie=True) for row in result.leaderboard]
    least = min(tied, key=lambda row: row.optimizer_bytes or 0)
    said = f"{least.method} keeps the least for its optimizer"
    assert said in " ".join(advice(replace(result, leaderboard=tied)))
    alike = [replace(arm, optim={"name": "adamw"}) for arm in result.arms]
    assert said not in " ".join(advice(replace(result, leaderboard=tied, arms=alike)))


def test_a_loss_says_what_it_is_counted_in(compared: tuple[Path, CompareResult]) -> None:
    result = compared[1]
    models = [{"name": "smollm2-135m"}, {"name": "minilm-l6", "task": "classification"}]
    units = [replace(result, config={**result.config, "model": model}).loss_unit for model in models]
    assert units == ["nats per token", "nats per record"]


def test_under_one_optimizer_there_is_no_column_of_it() -> None:
    example = CompareResult.from_file(Path(__file__).with_name("example.json"))
    assert not example.compares_optimizers
    assert "optimizer" not in columns(example)


def test_the_shape_is_recorded_and_another_one_is_another_study(compared: tuple[Path, CompareResult]) -> None:
    folder, result = compared
    assert result.model["shape"] == SHAPE
    assert result.config["model"]["shape"] == SHAPE
    assert "reshaped" in result.title
    assert yaml.safe_load((folder / "out" / "arms" / "galore.yaml").read_text())["model"]["shape"] == SHAPE
    settings = pretraining(folder)
    settings["model"]["shape"] = {**SHAPE, "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match=r"model\.shape\.num_hidden_layers: 2 -> 1"):
        compare(settings, progress=False)
    other = compare({**settings, "methods": ["adamw"], "output": str(folder / "other")}, progress=False)
    assert other.fingerprint != result.fingerprint
    assert other.model["parameters"] < result.model["parameters"]
