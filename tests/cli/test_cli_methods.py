"""`rankworks methods`: the registry as a table, as JSON and as pages."""

from __future__ import annotations

import pytest
from workshop import rankworks

from rankworks.core.registry import methods


def test_json_lists_every_method_with_its_settings() -> None:
    listed = rankworks("methods", "--json").json
    assert [(m["axis"], m["key"]) for m in listed] == [(m.axis, m.key) for m in methods()]
    for told, method in zip(listed, methods(), strict=True):
        assert (told["title"], told["paper"], told["year"]) == (method.title, method.paper, method.year)
        names = {setting["name"] for setting in told["settings"]}
        assert names == set(method.Spec.model_fields) - {method.tag}
    lora = next(m for m in listed if m["key"] == "lora")
    scaling = next(s for s in lora["settings"] if s["name"] == "scaling")
    assert scaling["default"] == "standard"
    assert scaling["values"] == "standard | rslora"


def test_an_axis_alone() -> None:
    listed = rankworks("methods", "--axis", "init", "--json").json
    assert {m["axis"] for m in listed} == {"init"}
    assert "pissa" in {m["key"] for m in listed}


def test_the_table_has_a_row_per_method() -> None:
    out = rankworks("methods").out
    for method in methods():
        assert any(line.startswith(f"{method.key} ") and method.title in line for line in out.splitlines()), method.key


@pytest.mark.parametrize("key", [m.key for m in methods()])
def test_every_method_has_a_page_with_its_equation_and_defaults(key: str) -> None:
    from rankworks.cli.methods import equation, settings

    said = rankworks("methods", key)
    assert said.status == 0
    method = next(m for m in methods() if m.key == key)
    assert equation(method).splitlines()[0] in said.out
    assert method.paper in said.out
    for setting in settings(method):
        assert setting["name"] in said.out
        assert setting["help"], f"{key}.{setting['name']} has no help"


@pytest.mark.parametrize(("words", "near"), [(("lroa",), "'lora'"), (("--axis", "dleta"), "'delta'")])
def test_an_unknown_name_is_answered_with_the_nearest(words: tuple[str, ...], near: str) -> None:
    said = rankworks("methods", *words)
    assert said.status == 2
    assert near in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("key", "place"), [("galore", "optim.name"), ("pissa", "adapt.init"), ("adalora", "adapt.ranks")]
)
def test_the_page_names_the_setting_that_takes_the_method(key: str, place: str) -> None:
    said = rankworks("methods", key)
    assert f"{place}={key}" in said.out
    assert f"check {key}" in said.out


def test_values_are_said_in_words() -> None:
    values, lisa = (
        {row["name"]: row["values"] for row in rankworks("methods", key, "--json").json[0]["settings"]}
        for key in ("galore", "lisa")
    )
    assert values["betas"] == "[float, float]"
    assert values["eps"] == "float | released"
    assert values["targets"] == "text | list of text"
    assert values["rank"] == "int from 0 to 65536"
    assert (lisa["base"], lisa["stack"]) == ("an optimizer", "text or none")
