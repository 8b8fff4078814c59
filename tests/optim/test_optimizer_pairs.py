"""Pairs: A and B of one change stand together in the groups, whatever is around them and whatever happens to them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import rankworks as rw
from rankworks.core.amend import Amendment
from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.optim.gram import grams, reciprocal
from rankworks.core.optim.pairs import paired_groups, pairs_of, partner, trained_pairs
from rankworks.core.ranks.surgery import keep_ranks, rebind, replace_ranks
from tiny import tiny_llama, token_batch


def groups_of(model: Any, **settings: Any) -> list[dict[str, Any]]:
    return paired_groups(model, 1e-2, 0.1, title="the method", **settings)


def covers(model: Any, groups: list[dict[str, Any]]) -> None:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = [pair for g in groups for pair in zip(g["names"], g["params"], strict=True)]
    assert len(held) == len(named)
    assert all(named[name] is p for name, p in held)


@pytest.mark.parametrize("delta", ["lora", "dora", "gated"])
def test_every_pair_is_found_around_whatever_stands_there(delta: str) -> None:
    model = rw.adapt(tiny_llama(), delta, rank=4, alpha=6)
    groups = groups_of(model, gates=True)
    covers(model, groups)
    assert [g["paired"] for g in groups] == [True, *[False] * (len(groups) - 1)]
    found = list(pairs_of(groups[0]))
    assert len(found) == len(trained_pairs(model)) == 14
    for (A, B, scale), name_a, name_b in zip(found, groups[0]["names"][::2], groups[0]["names"][1::2], strict=True):
        assert name_a.endswith(".A")
        assert name_b == name_a[:-1] + "B"
        assert A.shape[0] == B.shape[1] == 4
        assert scale == 1.5
        assert partner(A, groups[0]) is B
        assert partner(B, groups[0]) is A
    assert groups[0]["weight_decay"] == 0.1
    assert {g["weight_decay"] for g in groups[1:]} <= {0.0}, "magnitudes, gates"
    json.dumps([{k: v for k, v in g.items() if k != "params"} for g in groups])


def test_pairs_know_their_gates() -> None:
    gated = trained_pairs(rw.adapt(tiny_llama(), "dora", inner={"delta": "gated"}))
    assert all(pair.gate is not None and pair.delta.spec.key == "dora" for pair in gated)
    assert all(pair.gate is None for pair in trained_pairs(rw.adapt(tiny_llama(), "lora")))


def test_what_has_no_pair_stands_apart() -> None:
    """A vera beside a lora, modules trained in full, and a factor that is frozen."""
    model = rw.adapt(tiny_llama(), "lora", rank=2, targets="q_proj", full=["lm_head", "norm"])
    rw.adapt(model, "vera", rank=2, targets="v_proj", name="other")
    rw.activate(model, ["default", "other"])
    lone: Any = next(m for m in model.modules() if isinstance(m, Delta) and m.spec.key == "lora")
    lone.A.requires_grad_(False)
    groups = groups_of(model)
    covers(model, groups)
    assert len(groups[0]["params"]) == 2
    assert len(groups[0]["scales"]) == 1
    apart = [name for g in groups[1:] for name in g["names"]]
    assert any("lm_head" in name for name in apart)
    assert any(name.endswith(".B") for name in apart), "the factor whose A is frozen"


def test_a_tied_pair_stands_once() -> None:
    model = rw.adapt(tiny_llama(tie=True), "lora", rank=2, targets=["embed_tokens", "lm_head"], tied="shared")
    assert len(trained_pairs(model)) == 1
    covers(model, groups_of(model))


def test_where_no_pair_is_trained_the_method_is_refused() -> None:
    for model in (tiny_llama(), rw.adapt(tiny_llama(), "vera", rank=4)):
        with pytest.raises(TrainingError, match="no such pair is trained here: adapt the model"):
            groups_of(model)


def test_schedules_that_train_a_part_of_a_pair_are_refused() -> None:
    with pytest.raises(TrainingError, match="'dylora' trains their first ranks alone"):
        groups_of(rw.adapt(tiny_llama(), "lora", rank=4, ranks="dylora"))


def test_gates_are_refused_by_those_who_solve_for_the_factors() -> None:
    model = rw.adapt(tiny_llama(), "lora", rank=4, ranks={"ranks": "adalora", "target": 2})
    with pytest.raises(TrainingError, match="gates stand between them"):
        groups_of(model)
    assert len(groups_of(model, gates=True)[0]["scales"]) == 14


@torch.no_grad()
def test_surgery_leaves_pairs_together_at_their_scale() -> None:
    model = rw.adapt(tiny_llama(), "lora", rank=4, alpha=6, targets="q_proj")
    (group,) = groups_of(model)
    optimizer = torch.optim.SGD([group], lr=0.1)
    first, second = trained_pairs(model)
    keep_ranks(first.delta, torch.tensor([0, 2]), optimizer)
    fresh = {"A": torch.randn(3, 32), "B": torch.randn(32, 3)}
    replace_ranks(second.delta, fresh, optimizer)
    found = list(pairs_of(optimizer.param_groups[0]))
    for (A, B, scale), trained in zip(found, (first, second), strict=True):
        assert A is trained.pair.A
        assert B is trained.pair.B
        assert scale == 1.5 == pytest.approx(trained.pair.scale, rel=1e-15)
    rebind(optimizer, model)
    assert [A for A, _, _ in pairs_of(optimizer.param_groups[0])] == [first.pair.A, second.pair.A]


def test_a_gram_matrix_is_inverted_with_damping_relative_to_its_trace() -> None:
    F = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grams([F], 0.0)[0].inverse, torch.linalg.inv(F @ F.t()), atol=1e-12, rtol=0)
    damped = F @ F.t() + 0.01 * (F @ F.t()).trace() / 3 * torch.eye(3, dtype=F.dtype)
    torch.testing.assert_close(grams([F], 0.01)[0].inverse, torch.linalg.inv(damped), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        grams([1e-9 * F], 0.01)[0].inverse * 1e-18, grams([F], 0.01)[0].inverse, atol=1e-10, rtol=0
    )


def test_a_factor_of_zeros_has_the_inverse_zero() -> None:
    assert not grams([torch.zeros(3, 7)], 1e-6)[0].inverse.any()
    assert grams([torch.zeros(0, 7)], 1e-6)[0].inverse.shape == (0, 0)
    assert reciprocal(torch.tensor([0.0, 2.0])).tolist() == [0.0, 0.5]


def test_what_a_run_that_was_cut_short_left_is_undone() -> None:
    model = rw.adapt(tiny_llama(), "dora", rank=4)
    first: Any = trained_pairs(model)[0].pair
    first.held, first.amended = "A", Amendment()
    rw.make_optimizer(model, "adamw")
    assert first.held is None
    assert first.amended is None


def test_a_held_factor_gets_no_gradient_and_the_other_its_own() -> None:
    ids = token_batch(vocab=320)
    model = rw.adapt(tiny_llama(), "lora", rank=4, init="pissa")
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for held, other in (("A", "B"), ("B", "A")):
        model.zero_grad()
        for found in trained_pairs(model):
            found.pair.held = held  # type: ignore[assignment]
        model(input_ids=ids, labels=ids).loss.backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert {name[-1] for name in got} == {other}
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in got.items())


def test_methods_over_a_base_refuse_one_that_steps_on_pairs() -> None:
    model = rw.adapt(tiny_llama(), "lora", rank=4)
    for key in ("lora-plus", "allora", "lora-mgpo"):
        with pytest.raises(ConfigError, match="needs a base that takes a step from gradients, on any parameter"):
            rw.make_optimizer(model, key, base="altlora")
