"""The registry: what may be registered, and what a spec refuses as soon as it is made."""

from __future__ import annotations

import pytest

import rankworks as rw
from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError, did_you_mean
from rankworks.core.fields import Positive, Setting
from rankworks.core.registry import build, register, unregister


@pytest.mark.parametrize("name", ["method", "key", "replace", "delta", "model_dump"])
def test_a_setting_cannot_have_a_name_of_the_spec_itself(name: str) -> None:
    cls = type("Clash", (Delta,), {name: Setting(1, ""), "__annotations__": {name: "int"}, "__module__": __name__})
    with pytest.raises(ConfigError, match=f"setting called '{name}'"):
        register("delta", "clash", title="Clash", year=2024, paper="none")(cls)
    assert "clash" not in [m.key for m in rw.methods("delta")]


def test_settings_that_do_not_agree_are_refused_wherever_the_spec_is_made() -> None:
    class Between(Delta):
        """Two bounds."""

        low: float = Positive(1.0, "lower bound")
        high: float = Positive(2.0, "upper bound")

        @classmethod
        def agree(cls, spec) -> None:
            if spec.low >= spec.high:
                raise ConfigError("low lies below high: give a smaller low.")

    made = register("delta", "between", title="Between", year=2024, paper="none")(Between)
    try:
        for make in (
            lambda: made.Spec(low=3),
            lambda: build("delta", "between", low=3),
            lambda: made.Spec().replace(low=3),
        ):
            with pytest.raises(ConfigError, match="below high"):
                make()
        assert build("delta", {"delta": "between", "high": 5.0}).high == 5
    finally:
        unregister("delta", "between")


def test_a_list_of_known_names_has_each_once() -> None:
    assert did_you_mean("zzz", ["rank", "alpha", "rank"]) == " Known: alpha, rank."
