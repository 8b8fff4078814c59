"""Adafactor: transformers' steps, its state, and its rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import check_falls, check_resumes
from torch import Tensor, nn
from transformers.optimization import Adafactor as Reference

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.optim.adafactor import adafactor_step
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Weights(nn.Module):
    """Parameters of some shapes."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64):
        super().__init__()
        self.all = nn.ParameterList([draw(*s, seed=i).to(dtype) for i, s in enumerate(shapes)])


SHAPES = ((7, 5), (5, 7), (6,), (3, 4, 5), (2, 3, 2, 2), ())


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rates", [{}, {"scale_parameter": True}, {"relative_step": True}])
def test_the_steps_are_transformers(beta1: float | None, decay: float, rates: dict[str, bool]) -> None:
    """A relative step has no learning rate there and a factor of 1 here."""
    lr = 1.0 if "relative_step" in rates else 0.05
    model, other = Weights(*SHAPES), Weights(*SHAPES)
    ours = rw.make_optimizer(model, "adafactor", lr, beta1=beta1, weight_decay=decay, **rates)
    every = {"scale_parameter": False, "relative_step": False, **rates}
    shared = {"beta1": beta1, **every}
    matrices, vectors = ([p for p in other.all if (p.ndim > 1) == yes] for yes in (True, False))
    groups: Any = [{"params": matrices, "weight_decay": decay}, {"params": vectors}]
    theirs = Reference(groups, lr=None if "relative_step" in rates else lr, **shared)
    for i in range(5):
        for model_ in (model, other):
            for j, p in enumerate(model_.all):
                p.grad = draw(*p.shape, seed=100 * i + j) * 10.0 ** (j - 2)
        ours.step()
        theirs.step()
    for p, q in zip(model.all, other.all, strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-10)


def test_in_bfloat16_the_steps_are_transformers_too() -> None:
    model, other = (Weights((16, 8), (6,), dtype=torch.bfloat16) for _ in range(2))
    ours = rw.make_optimizer(model, "adafactor", 0.05, weight_decay=0.1)
    groups: Any = [{"params": [other.all[0]], "weight_decay": 0.1}, {"params": [other.all[1]]}]
    theirs = Reference(groups, lr=0.05, scale_parameter=False, relative_step=False)
    for i in range(4):
        for model_ in (model, other):
            for j, p in enumerate(model_.all):
                p.grad = draw(*p.shape, seed=10 * i + j).bfloat16()
        ours.step()
        theirs.step()
    for p, q in zip(model.all, other.all, strict=True):
        torch.testing.assert_close(p, q, atol=0, rtol=2**-7)
        assert all(v.dtype == torch.float32 for v in ours.state[p].values())


def test_the_first_step_has_at_most_the_root_mean_square_asked_for() -> None:
    for clip in (0.5, 1.0, 100.0):
        R = draw(40, 30) ** 3
        update = adafactor_step({}, R, 1, 1.0, clip=clip)
        square = R.square()
        exact = R / (square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()).sqrt()
        rms = float(exact.square().mean().sqrt())
        torch.testing.assert_close(update, exact / max(1.0, rms / clip), atol=1e-12, rtol=1e-10)


def test_a_gradient_of_rank_one_is_taken_to_its_signs() -> None:
    """The factored mean square is then the square itself."""
    R = draw(9, 1) @ draw(1, 6, seed=1)
    torch.testing.assert_close(adafactor_step({}, R, 1, 0.1), 0.1 * R.sign(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_a_matrix_keeps_a_row_and_a_column(beta1: float | None) -> None:
    model = open_source("llama-60m", "float32").model.requires_grad_(True)
    told = optimizer_bytes({"optimizer": "adafactor", "beta1": beta1}, model)
    factored = sum(sum(p.shape) if p.ndim > 1 else p.numel() for p in model.parameters())
    full = sum(p.numel() for p in model.parameters())
    assert told == 4 * (factored + (full if beta1 else 0))


def test_bad_settings_are_refused() -> None:
    for settings, told in (
        ({"warmup_init": True}, "warmup_init"),
        ({"beta1": 1.0}, "beta1"),
        ({"clip_threshold": 0.0}, "clip_threshold"),
        ({"decay_rate": 0.5}, "decay_rate"),
    ):
        with pytest.raises(ConfigError, match=told):
            rw.make_optimizer(nn.Linear(3, 3), "adafactor", **settings)


@pytest.mark.parametrize("options", [{}, {"beta1": 0.5, "scale_parameter": True}])
def test_the_loss_falls_and_a_run_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    check_falls("adafactor", options)
    check_resumes(tmp_path, "adafactor", options)
