"""SGD: torch's own steps, with decay for matrices alone, and their closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import check_falls
from steps import check_torchs_own, draw, layer, numbers_kept, step

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.plan.states import optimizer_bytes

SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "foreach": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_steps_are_torchs_own_with_decay_for_the_matrix_alone(settings: dict[str, Any]) -> None:
    check_torchs_own("sgd", torch.optim.SGD, **settings)


def test_momentum_is_a_running_sum() -> None:
    """b_t = 0.9 b_(t-1) + 0.7 g_t, and b_1 = g_1; with nesterov g_t + 0.9 b_t is gone along."""
    gradients = [draw(7, 5, seed=i) for i in range(3)]
    plain, ahead = layer(), layer()
    dampened = rw.make_optimizer(plain, "sgd", 0.1, momentum=0.9, dampening=0.3)
    nesterov = rw.make_optimizer(ahead, "sgd", 0.1, momentum=0.9, nesterov=True)
    b = c = torch.zeros(7, 5).double()
    for i, gradient in enumerate(gradients):
        b, c = 0.9 * b + (0.7 if i else 1.0) * gradient, 0.9 * c + gradient
        torch.testing.assert_close(step(plain.weight, dampened, gradient), -0.1 * b)
        torch.testing.assert_close(step(ahead.weight, nesterov, gradient), -0.1 * (gradient + 0.9 * c))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_it_keeps(momentum: float) -> None:
    kept = numbers_kept("sgd", momentum=momentum)
    assert kept == (35 + 7 if momentum else 0)
    assert optimizer_bytes({"optimizer": "sgd", "momentum": momentum}, layer()) == 8 * kept


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_there_is_no_looking_ahead_without_a_whole_momentum(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="momentum above 0 and no dampening"):
        rw.make_optimizer(layer(), "sgd", nesterov=True, **settings)


def test_the_loss_falls() -> None:
    check_falls("sgd", {"momentum": 0.9}, lr=0.05)
