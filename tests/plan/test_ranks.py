"""What a plan says of ranks that are not those of the settings: shared out at the start, or changed in the run."""

from __future__ import annotations

from typing import Any

import pytest

import rankworks as rw
from methods.runs import tiny_run
from rankworks.core.errors import ConfigError
from rankworks.core.hooks import Hook, Moment
from rankworks.core.summary import trainable_parameters
from tiny import tiny_llama

DELTA = {"lamda++": "lamda", "maestro": "maestro"}  # lora for the others


class Most(Hook):
    """Remembers the most numbers that were trained in a step."""

    seen = 0

    def after_step(self, moment: Moment) -> None:
        self.seen = max(self.seen, trainable_parameters(moment.model))


def planned(delta: str, **settings: Any) -> Any:
    return rw.plan(tiny_llama(), delta, targets=["q_proj", "v_proj", "up_proj"], sequence=16, **settings)


@pytest.mark.parametrize("key", sorted(m.key for m in rw.methods("rank")))
def test_a_run_never_trains_more_than_its_plan_says(key: str) -> None:
    """Where all sites grow in every round it is the same number."""
    every = {"target": 4, "add": 1, "top": 6} if key == "increlora" else {}
    settings = {"rank": 2 if every else 6, "ranks": {"ranks": key, **every}}
    most, delta = Most(), DELTA.get(key, "lora")
    loop = tiny_run(None, delta, hooks=(most,), **settings)
    loop.run()
    plan = planned(delta, **settings)
    assert plan.ranks == key
    if key == "lamda++":
        assert plan.notes == [
            "lamda++ shares the ranks out anew as a run starts, by data or weights: counted as they are set"
        ]
    else:
        assert most.seen == plan.trainable_parameters
        assert trainable_parameters(loop.model) <= most.seen


def test_a_method_keeps_its_name_where_a_schedule_puts_gates_between_its_factors() -> None:
    plan = planned("lora", rank=4, ranks={"ranks": "adalora", "target": 2})
    assert (plan.delta, plan.settings["rank"]) == ("lora", 4)
    assert "lora with adalora on 6 sites" in str(plan)
    assert planned("gated").delta == "gated"
    table = rw.plan.compare(tiny_llama(), ["lora", "gated", "dora"], targets=["q_proj"], sequence=16, ranks="sora")
    assert sorted(p.delta for p in table.plans) == ["dora", "gated", "lora"]


def test_a_start_that_shares_ranks_out_is_named() -> None:
    assert planned("lora", init="eva").notes[0].startswith("eva shares the ranks out anew")
    assert planned("lora", init="pissa").notes == []


@pytest.mark.parametrize(("key", "target"), [("adalora", 5), ("increlora", 3)])
def test_a_budget_that_a_run_would_refuse_is_refused(key: str, target: int) -> None:
    with pytest.raises(ConfigError, match=r"ranks\.target"):
        planned("lora", rank=4, ranks={"ranks": key, "target": target})
