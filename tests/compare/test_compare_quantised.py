"""Comparisons on a quantised base: every arm has the base its recipe has, and all give the exact weights back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import small_compare

import rankworks as rw
from rankworks.compare import compare, load_compare_config
from rankworks.compare.base import Base, checksum
from rankworks.compare.quantised import PLAIN, QuantisedBase
from rankworks.core.errors import ConfigError
from rankworks.core.spec import AdaptSpec
from rankworks.train import load_config, load_task, run
from rankworks.train.quantising import Products, QuantiseConfig, products, quantise_base
from tiny import byte_tokenizer, tiny_bert_classifier, tiny_llama

QPISSA = {"delta": "lora", "init": {"init": "pissa", "quantised": True}, "label": "qpissa"}


def of(init: Any, rank: int = 4) -> Products:
    return products(tiny_llama(), AdaptSpec.from_flat({"delta": "lora", "rank": rank, "init": init}))


def test_a_base_is_quantised_as_asked_and_goes_back_and_forth_bit_for_bit() -> None:
    exact, model = checksum(tiny_llama()), tiny_llama()
    base = QuantisedBase(model, QuantiseConfig())
    asked: list[Products] = [PLAIN, of("loftq"), of(QPISSA["init"]), of(QPISSA["init"], 2), PLAIN, of("loftq")]
    for wanted in asked:
        base.switch(wanted)
        fresh = tiny_llama()
        evidence = quantise_base(fresh, QuantiseConfig(), wanted, progress=False)
        assert checksum(fresh) == checksum(model)
        assert set(evidence) == set(base.evidence)
        assert all(torch.equal(t, base.evidence[site][k]) for site, parts in evidence.items() for k, t in parts.items())
    base.give_back()
    assert checksum(model) == exact


def test_asking_for_the_same_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = QuantisedBase(tiny_llama(), QuantiseConfig())
    base.switch(of("loftq"))
    monkeypatch.setattr(QuantisedBase, "_quantise", lambda *_: pytest.fail("quantised again"))
    base.switch(of("loftq"))


def test_every_arm_is_what_its_recipe_gives(tmp_path: Path) -> None:
    settings = small_compare(
        tmp_path,
        methods=["lora", "loftq", QPISSA],
        budget={"trials": 1, "steps": 3, "seeds": 2},
        train={"batch_size": 6},
        tune={"lr": 1e-2, "widen": 0},
    )
    settings["model"]["quantise"] = {"bits": 3, "block": 32}
    result = compare(settings, progress=False)
    assert {row.method: row.status for row in result.leaderboard} == dict.fromkeys(("lora", "loftq", "qpissa"), "ok")
    firsts = set()
    for label in ("lora", "loftq", "qpissa"):
        arm = result.arm(label)
        recipe = load_config(str(arm.recipe), [f"output={tmp_path / label}"])
        assert recipe.model is not None
        assert recipe.model.quantise == QuantiseConfig(bits=3, block=32)
        again = run(recipe, progress=False)
        assert [round(x, 6) for x in again.losses] == [loss for _, loss in arm.reruns[0].losses]
        assert again.after["accuracy"] == arm.reruns[0].metrics["accuracy"]
        firsts.add(arm.reruns[0].losses[0])
    assert len(firsts) == 3


def test_new_heads_and_quantised_bodies_go_together(tmp_path: Path) -> None:
    """A seed's own tensors are found on the exact weights, and each seed's base is quantised alike."""
    settings = small_compare(tmp_path, model={"name": str(tmp_path / "bert"), "task": "classification"})
    tiny_bert_classifier().bert.save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    settings["model"]["quantise"] = "nf4"
    config = load_compare_config(settings)
    assert config.data is not None
    base = Base(config, load_task(config.data), 1)
    wanted = products(base.model, AdaptSpec.from_flat({"delta": "lora", "rank": 2, "init": "loftq"}))
    sums = {seed: checksum(base.use(seed)) for seed in (1, 2)}
    assert sums[1] != sums[2]
    assert len(base._own[2]) <= 2  # a head's matrix and vector
    moved = checksum(base.use(2, wanted))
    assert moved == sums[2]  # LoftQ's first round quantises plainly
    assert base.evidence
    assert checksum(base.use(1)) == sums[1]
    base.restore("any")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    settings = small_compare(tmp_path, methods=["lora", "full"])
    settings["model"]["quantise"] = "nf4"
    with pytest.raises(ConfigError, match="for a base that stays frozen"):
        compare(settings, progress=False)
    settings = small_compare(tmp_path)
    settings["model"]["quantise"] = {"holder": "bitsandbytes"}
    with pytest.raises(ConfigError, match="use holder: dense"):
        compare(settings, progress=False)
    model = rw.load_model(settings["model"]["name"])[0]
    with pytest.raises(ConfigError, match="use holder: dense"):
        QuantisedBase(model, QuantiseConfig(holder="bitsandbytes"))


def test_a_start_from_what_quantising_lost_is_skipped_where_nothing_was_quantised(tmp_path: Path) -> None:
    settings = small_compare(
        tmp_path,
        methods=["lora", "loftq", QPISSA],
        budget={"trials": 1, "steps": 1, "seeds": 1},
        tune={"lr": 1e-2, "widen": 0},
    )
    result = compare(settings, progress=False)
    assert [row.method for row in result.leaderboard] == ["lora"]
    assert [skipped.label for skipped in result.skipped] == ["loftq", "qpissa"]
    assert all("give model: {quantise: nf4}" in skipped.reason for skipped in result.skipped)
