"""Adam and AdamW: torch's own steps, with decay for matrices alone, and the closed forms of their first ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import check_falls
from steps import check_torchs_own, draw, layer, numbers_kept, step

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_llama, token_batch

BOTH = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
both = pytest.mark.parametrize("name", BOTH)
SETTINGS: list[dict[str, Any]] = [{}, {"betas": (0.8, 0.95), "eps": 1e-6}, {"amsgrad": True}, {"foreach": True}]


@both
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_steps_are_torchs_own_with_decay_for_the_matrix_alone(name: str, settings: dict[str, Any]) -> None:
    check_torchs_own(name, BOTH[name], **settings)


@both
def test_on_an_adapted_model_they_are_torchs_too(name: str) -> None:
    models = [rw.adapt(tiny_llama(), "dora", rank=4) for _ in range(2)]
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
    theirs = BOTH[name](trained[1], lr=1e-2, weight_decay=0.0)
    optimizers = [rw.make_optimizer(models[0], name, lr=1e-2), theirs]
    for at in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            ids = (token_batch() + at) % 320
            model(input_ids=ids, labels=ids).loss.backward()  # type: ignore[operator]
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@both
def test_the_first_step_goes_along_the_signs(name: str) -> None:
    made = layer()
    gradient = draw(7, 5, seed=2)
    moved = step(made.weight, rw.make_optimizer(made, name, 0.1, eps=1e-12), gradient)
    torch.testing.assert_close(moved, -0.1 * gradient.sign(), rtol=1e-9, atol=0)


def test_adamw_decays_apart_from_the_gradient_and_adam_through_it() -> None:
    steps = {}
    for name in BOTH:
        made = layer()
        before = made.weight.detach().clone()
        optimizer = rw.make_optimizer(made, name, 0.1, weight_decay=0.5, eps=1e-12)
        steps[name] = step(made.weight, optimizer, torch.zeros_like(before))
    torch.testing.assert_close(steps["adamw"], -0.1 * 0.5 * before)
    torch.testing.assert_close(steps["adam"], -0.1 * before.sign(), rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize(("amsgrad", "numbers"), [(False, 2), (True, 3)])
def test_what_it_keeps(name: str, amsgrad: bool, numbers: int) -> None:
    assert numbers_kept(name, amsgrad=amsgrad) == numbers * (35 + 7)
    assert optimizer_bytes({"optimizer": name, "amsgrad": amsgrad}, layer()) == 8 * numbers * (35 + 7)


@both
def test_bad_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="eps"):
        rw.make_optimizer(layer(), name, eps=0.0)


@both
def test_the_loss_falls(name: str) -> None:
    check_falls(name, {})
