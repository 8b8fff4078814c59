"""Which trials an arm gets, as a function of what is finished."""

from __future__ import annotations

import math

import pytest

from rankworks.compare.config import Range, TuneConfig
from rankworks.compare.tune import Seen, agenda, best, distributions, edge_of, given, grid, sampler


def tune(low: float = 1e-4, high: float = 3.2e-2, **settings) -> TuneConfig:
    return TuneConfig(lr=Range(low=low, high=high), **settings)


def finish(settings: TuneConfig, trials: int, optimum: float, diverges: float = math.inf) -> tuple[dict, int]:
    """Run the agenda to its end on a parabola in log lr; returns the trials seen and how many rounds it took."""
    seen: dict[str, Seen] = {}
    for turn in range(20):
        opened = agenda(settings, trials, seen).open(seen)
        if not opened:
            return seen, turn
        for p in opened:
            lr = p.lr if p.lr is not None else math.sqrt(p.low * p.high)
            seen[p.name] = Seen(lr, None if lr > diverges else math.log10(lr / optimum) ** 2)
    raise AssertionError("the agenda does not end")


def test_the_first_trials_are_half_decades_from_the_middle_outwards():
    assert grid(tune(), 6) == [1e-3, 3.16e-3, 3.16e-4, 1e-2, 1e-4, 3.16e-2]
    assert sorted(grid(tune(), 3)) == [1e-4, 1e-3, 3.16e-2]  # fewer trials are spread over the range
    assert grid(tune(), 1) == [1e-3]
    listed = TuneConfig(lr=[1e-2, 1e-3])
    assert sorted(grid(listed, 5)) == [1e-3, 1e-2]
    more = agenda(tune(), 8, {})
    assert [p.lr is None for p in more.proposals] == [False] * 6 + [True] * 2


def test_one_rate_and_nothing_else_to_choose_is_one_trial():
    assert len(agenda(TuneConfig(lr=1e-3), 6, {}).proposals) == 1
    assert len(agenda(TuneConfig(lr=1e-3, also={"adapt.alpha": [1, 2]}), 6, {}).proposals) == 6


@pytest.mark.parametrize(
    ("optimum", "extra", "edge"),
    [(1e-3, 0, None), (1e-1, 2, None), (2e-5, 2, None), (30.0, 4, "high"), (1e-9, 4, "low")],
)
def test_a_range_is_widened_by_a_decade_on_the_side_of_the_best(optimum: float, extra: int, edge: str | None):
    seen, _ = finish(tune(), 6, optimum)
    assert len(seen) == 6 + extra
    ended = agenda(tune(), 6, seen)
    assert ended.edge == edge
    top = best(list(seen.values()))
    assert top is not None
    if edge is None:
        assert abs(math.log10(top.lr / optimum)) < 0.26
    if extra == 2:
        assert (ended.low, ended.high) == pytest.approx((1e-4, 0.32) if optimum > 1e-3 else (1e-5, 3.2e-2))


def test_where_all_trials_diverge_lower_rates_are_tried():
    seen, _ = finish(tune(1e-2, 1.0), 4, 1e-3, diverges=5e-3)
    assert best(list(seen.values())) is not None
    lost, _ = finish(tune(1e-2, 1.0), 4, 1e-3, diverges=1e-9)
    assert best(list(lost.values())) is None
    assert len(lost) == 4 + 4


def test_a_run_that_others_were_stopped_for_and_that_diverged_does_not_decide():
    settings = tune(widen=0)
    seen = {p.name: Seen(p.lr or 1.0, 0.5 + k, pruned=True) for k, p in enumerate(agenda(settings, 6, {}).proposals)}
    seen["trial 0"] = Seen(1e-3, None)
    opened = agenda(settings, 6, seen).open(seen)
    assert [(p.name, p.lr) for p in opened] == [("again 0", seen["trial 1"].lr)]
    seen["again 0"] = Seen(opened[0].lr or 0.0, 0.2)
    assert not agenda(settings, 6, seen).open(seen)


def test_edges():
    assert edge_of([Seen(1e-4, 1.0), Seen(1e-3, 2.0)], 1e-4, 1e-2) == "low"
    assert edge_of([Seen(9e-3, 1.0), Seen(1e-3, 2.0)], 1e-4, 1e-2) == "high"
    assert edge_of([Seen(9e-3, 3.0), Seen(1e-3, 2.0)], 1e-4, 1e-2) is None
    assert edge_of([Seen(9e-3, 1.0, pruned=True), Seen(1e-3, 2.0)], 1e-4, 1e-2) is None


def test_other_settings_start_at_their_first_choice_and_are_then_drawn():
    settings = tune(also={"adapt.alpha": [8, 32], "optim.warmup": {"low": 0.01, "high": 0.16}})
    first = agenda(settings, 7, {}).proposals
    assert given(settings, first[0]) == {"lr": 1e-3, "adapt.alpha": 8, "optim.warmup": pytest.approx(0.04)}
    assert given(settings, first[6]) == {}
    assert set(distributions(settings, first[6])) == {"lr", "adapt.alpha", "optim.warmup"}


def test_a_retried_trial_draws_the_same():
    import optuna

    def draw(name: str) -> float:
        study = optuna.create_study(sampler=sampler("lora", name, 4, 0))
        return study.ask().suggest_float("lr", 1e-4, 1e-1, log=True)

    assert draw("trial 6") == draw("trial 6") != draw("trial 7")
