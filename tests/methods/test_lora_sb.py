"""LoRA-SB: the three factors hold the truncated first step of full fine-tuning, and only the core goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import One, best_of_rank, change_of, close, delta_of, linear, negligible, weight_of
from learning import losses
from torch import Tensor

import rankworks as rw
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.state import state_of
from rankworks.core.summary import trained
from tiny import tiny_llama, token_batch

G = torch.randn(10, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def started(gradient: Tensor = G, rank: int = 3, delta: str = "lora-xs", layer: Any = None, **given: Any) -> Any:
    """A layer (10, 12) started from this gradient, by its exact SVD."""
    settings = {k: given.pop(k) for k in list(given) if k in ("update", "eta", "iterations")}
    init = {"init": "lora-sb", "iterations": 0, "eta": 0.1, **settings}
    model = One(linear(12, 10) if layer is None else layer).eval()
    return rw.adapt(
        model, delta, targets="layer", rank=rank, init=init, evidence={"layer": {"gradient": gradient}}, **given
    )


UPDATES = {"adam": -0.1 * G.sign(), "sgd": -0.1 * G}


@pytest.mark.parametrize("update", ["adam", "sgd"])
@pytest.mark.parametrize("alpha", [3.0, 12.0])
def test_the_product_is_the_truncated_first_update_for_any_alpha(update: str, alpha: float) -> None:
    close(change_of(started(update=update, alpha=alpha)), best_of_rank(UPDATES[update], 3))


@pytest.mark.parametrize("update", ["adam", "sgd"])
def test_the_bases_are_orthonormal_and_the_core_is_diagonal_and_descends(update: str) -> None:
    delta = delta_of(started(update=update, alpha=6))
    close(delta.B.T @ delta.B, torch.eye(3))
    close(delta.A @ delta.A.T, torch.eye(3))
    core = delta.R.diagonal()
    negligible(delta.R - torch.diag(core))
    assert (core >= 0).all()
    assert (core.diff() <= 0).all()
    close(delta.scale * core, torch.linalg.svdvals(UPDATES[update])[:3])


def test_the_full_update_of_adam_is_eta_everywhere_but_where_the_gradient_is_zero() -> None:
    gradient = G.clone()
    gradient[2, :5] = 0
    found = change_of(started(gradient, rank=10))  # of full rank, so nothing is left out
    close(found, torch.where(gradient == 0, 0.0, -0.1 * G.sign()))


def test_the_output_is_that_of_the_weight_after_the_step_and_of_the_base_with_eta_zero() -> None:
    x = torch.randn(4, 12)
    model = started()
    wanted = torch.nn.functional.linear(x, weight_of(model) + best_of_rank(UPDATES["adam"], 3), model.layer.bias)
    close(model(x), wanted)
    still = started(eta=0.0)
    with rw.disabled(still):
        plain = still(x)
    assert torch.equal(still(x), plain)


def test_only_the_core_is_trained_and_its_gradient_is_projected() -> None:
    model, x = started(alpha=6), torch.randn(4, 12)
    assert [p.shape for p in trained(model)] == [(3, 3)]
    y = model(x)
    g = torch.randn_like(y)
    (g * y).sum().backward()
    delta = delta_of(model)
    close(delta.R.grad, 2 * delta.B.T @ (g.T @ x) @ delta.A.T)


@pytest.mark.parametrize("alpha", [3.0, 6.0])
def test_a_step_of_the_core_projects_the_full_step(alpha: float) -> None:
    model = started(alpha=alpha)
    delta, s, full = delta_of(model), alpha / 3, torch.randn(10, 12)
    before = change_of(model)
    A, B = delta.A.clone(), delta.B.clone()
    with torch.no_grad():
        delta.R -= 0.5 * s * B.T @ full @ A.T
    moved = change_of(model) - before
    close(moved, -0.5 * s**2 * B @ B.T @ full @ A.T @ A)
    close((B.T @ B).inverse() @ (B.T @ full @ A.T) @ (A @ A.T).inverse(), B.T @ full @ A.T)  # nothing to precondition
    if s == 1:  # the nearest to -eta G that B X A can be
        best = B @ torch.linalg.lstsq(B, -0.5 * full).solution @ torch.linalg.pinv(A) @ A
        close(moved, best)


def test_the_spaces_of_the_change_never_move(tmp_path: Path) -> None:
    model, x = started(), torch.randn(4, 12)
    A, B = delta_of(model).A.clone(), delta_of(model).B.clone()
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(delta_of(model).A, A)
    assert torch.equal(delta_of(model).B, B)
    change = change_of(model)
    close(B @ B.T @ change @ A.T @ A, change)
    y = model(x)
    rw.save(model, tmp_path / "adapter")
    rw.merge(model)
    close(model(x), y)
    rw.unmerge(model)
    rw.detach(model)
    again = rw.load(model, tmp_path / "adapter")
    close(again(x), y)
    assert torch.equal(delta_of(again).A, A)


def test_it_exports_as_a_plain_lora_of_rank_r() -> None:
    model = started()
    B, A = delta_of(model).factors()
    assert (B.shape, A.shape) == ((10, 3), (3, 12))
    close(B @ A, change_of(model))


def test_the_randomised_form_is_exact_on_what_has_the_rank_and_near_elsewhere() -> None:
    few = G[:, :3] @ torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(change_of(started(few, update="sgd", iterations=10)), -0.1 * few)
    errors = [float((change_of(started(update="sgd", iterations=i)) - UPDATES["sgd"]).norm()) for i in (1, 10, 0)]
    assert errors[0] >= errors[1] >= errors[2] - 1e-12
    assert errors[1] < 1.01 * errors[2]


def test_the_printed_counts() -> None:
    """Mistral-7B, seven projections of 32 layers: r^2 for each of 224."""
    for rank, count in ((32, 229_376), (64, 917_504), (96, 2_064_384)):
        assert 224 * rw.LoRAXS(rank=rank).method.cls.count(rw.LoRAXS(rank=rank), None) == count


def test_what_it_cannot_start_is_refused() -> None:
    with pytest.raises(TargetError, match="fills 3 factors and 'lora' has 2"):
        started(delta="lora")
    with pytest.raises(TargetError, match="lower it there"):
        started(rank=11)
    with pytest.raises(TargetError, match="gradient of each weight, measured on data"):
        rw.adapt(One(linear(12, 10)), "lora-xs", targets="layer", rank=2, init="lora-sb")
    with pytest.raises(ConfigError, match="eta"):
        started(eta=-1.0)


def test_it_learns_from_a_measured_gradient() -> None:
    model, batch = tiny_llama(), token_batch(batch=4)
    spec = rw.AdaptSpec.from_flat({"delta": "lora-xs", "rank": 4, "init": {"init": "lora-sb", "eta": 1e-3}})
    evidence = rw.calibrate(model, [{"input_ids": batch, "labels": batch}], spec, progress=False)
    before = model(input_ids=batch, labels=batch).loss.item()
    rw.adapt(model, spec, evidence=evidence)
    seen = losses(model.train(), lr=3e-2)
    assert seen[0] < before  # a step has been taken
    assert seen[-1] < 0.95 * seen[0]
    for name, site in state_of(model).adapter("default").deltas.items():
        delta: Any = site
        u = torch.linalg.svd(evidence[name]["gradient"].sign().double()).U[:, :2]
        assert torch.linalg.svdvals(u.T @ delta.B.double()).min() > 0.9


def test_the_weight_is_not_decomposed_for_bases_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, weight: Tensor) -> None:
        raise AssertionError("an SVD for nothing")

    wanted = change_of(started())
    monkeypatch.setattr(rw.LoRAXS.method.cls, "bases_of", refuse)
    close(change_of(started()), wanted)
