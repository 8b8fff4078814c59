"""What the entries of `methods` mean, and what is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from rankworks.compare.arms import baseline_of, expand
from rankworks.compare.config import CompareConfig, load_compare_config
from rankworks.core.errors import ConfigError, UnknownNameError
from rankworks.core.registry import methods


def config(*entries: Any, **blocks: Any) -> CompareConfig:
    return load_compare_config({"methods": list(entries), **blocks})


def arms(*entries: Any, **blocks: Any) -> dict[str, Any]:
    return {arm.label: arm for arm in expand(config(*entries, **blocks))[0]}


def test_a_name_of_any_axis_is_an_arm_on_the_shared_delta():
    found = arms("vera", "pissa", "adalora", "layra", "galore", adapt={"delta": "lora", "rank": 4})
    assert list(found) == ["vera", "pissa", "adalora", "layra", "galore"]
    assert found["vera"].adapt == {"delta": "vera", "rank": 4}
    assert found["pissa"].adapt == {"delta": "lora", "rank": 4, "init": "pissa"}
    assert found["adalora"].adapt["ranks"] == "adalora"
    assert found["layra"].adapt["select"] == "layra"
    assert found["galore"].optim["name"] == "galore"
    assert found["galore"].adapt == {"delta": "lora", "rank": 4}
    assert [a.axis for a in found.values()] == ["delta", "init", "rank", "selection", "optimizer"]


def test_an_axis_and_all_are_every_method_once():
    listed, refused = expand(config("deltas"))
    assert {a.key for a in listed} | {r.key for r in refused} == {m.key for m in methods("delta")}
    inits = arms("lora", "inits")
    assert "default" not in inits  # that is plain LoRA, which is there already
    assert set(inits) >= {"lora", "pissa", "eva"}
    everything, left = expand(config("all"))
    labels = [a.label for a in everything]
    assert len(set(labels)) == len(labels)
    assert {(a.axis, a.key) for a in everything} >= {("delta", "nlora"), ("init", "nlora"), ("rank", "maestro")}
    assert not left


def test_an_entry_with_settings():
    both = {"delta": "lora", "init": "pissa", "optimizer": "lora-plus", "rank": 2, "label": "both"}
    found = arms("lora", both, {"delta": "lora", "tune": {"lr": 1e-3}, "label": "fixed"}, adapt={"rank": 8})
    assert found["both"].adapt == {"delta": "lora", "rank": 2, "init": "pissa"}
    assert (found["both"].key, found["both"].optim["name"]) == ("pissa", "lora-plus")
    assert found["fixed"].tune.lr == 1e-3
    options = arms({"optimizer": {"name": "sgd", "momentum": 0.9}, "label": "sgd"})["sgd"]
    assert options.optim == {"name": "sgd", "momentum": 0.9}


def test_names_that_two_axes_have_are_told_apart():
    found = arms("nlora", "init=nlora")
    assert [a.axis for a in found.values()] == ["delta", "init"]
    assert any("init=nlora" in note for note in found["nlora"].notes)


def test_shared_settings_hold_where_a_method_has_them():
    found = arms("lora", "vera", adapt={"rank": 4, "alpha": 8})
    assert found["lora"].adapt["alpha"] == 8
    assert "alpha" not in found["vera"].adapt
    assert any("alpha" in note for note in found["vera"].notes)
    with pytest.raises(ConfigError, match=r"no method has 'ranc'.*Did you mean.*'rank'"):
        arms("lora", "vera", adapt={"ranc": 4})


@pytest.mark.parametrize(
    ("entries", "blocks", "message"),
    [
        (["lora", "verra"], {}, r"methods\[1\].*'verra'.*Did you mean 'vera'"),
        ([{"delta": "loraa"}], {}, r"Did you mean 'lora'"),
        ([{"delta": "lora", "ranc": 3}], {}, r"methods\[0\] \(lora\).*unknown key 'ranc'.*'rank'"),
        (["axis=lora"], {}, "names no axis"),
        (["lora"], {"baseline": "vera"}, r"baseline: no arm is called 'vera'"),
        ([{"delta": "lora", "label": "a"}, {"delta": "vera", "label": "a"}], {}, "label 'a'"),
        (["lora"], {"budget": {"value": 3}}, "equal: parameters, memory or time"),
        (["lora"], {"tune": {"lr": {"low": 1, "high": 0.1}}}, "low must be below high"),
        (["lora"], {"tune": {"also": {"optim.lr": [1]}}}, r"optim\.lr"),
        (["lora"], {"tune": {"also": {"train.steps": [1]}}}, "part of the budget"),
        (["lora"], {"tune": {"also": {"adapt.alhpa": [1]}}}, "alhpa"),
        ([{"optimizer": "adamm"}], {}, "adam"),
        (["lora"], {"budgett": {}}, "Did you mean 'budget'"),
        ([], {}, "at least one method"),
    ],
)
def test_what_is_refused(entries: list[Any], blocks: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        expand(config(*entries, **blocks))


def test_full_fine_tuning_is_an_arm():
    full = arms("lora", "full")["full"]
    assert full.adapt is None
    with pytest.raises(UnknownNameError, match="'full'"):
        arms("fulll")


def test_the_baseline_is_plain_lora_unless_another_is_named():
    for entries, given, wanted in (
        (["vera", "lora"], None, "lora"),
        (["vera", "dora"], None, "vera"),
        (["lora", "vera"], "vera", "vera"),
    ):
        settings = config(*entries, **({"baseline": given} if given else {}))
        assert baseline_of(settings, expand(settings)[0]) == wanted


def test_a_configuration_read_again_is_the_same_and_keeps_what_was_left_out():
    first = config("lora", {"delta": "vera", "tune": {"lr": 1e-3}}, optim={"warmup": 0.1}, adapt={"rank": 4})
    again = load_compare_config(first)
    assert again == first
    assert again.optim.model_fields_set == {"warmup"}
    changed = load_compare_config(first, ["optim.schedule=constant", "budget.seeds=[3, 5]"])
    assert changed.optim.model_fields_set == {"warmup", "schedule"}
    assert changed.seeds == [3, 5]
    assert first.seeds == [1, 2, 3]
