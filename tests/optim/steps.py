"""Seeded numbers, and steps of an optimizer on a few of them: what the tests of single steps share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rankworks as rw


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: Tensor) -> Tensor:
    """How a step on this gradient moves the parameter."""
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach() - before


def layer() -> nn.Linear:
    """A matrix (7, 5) and a vector (7,) of seeded numbers in float64."""
    made = nn.Linear(5, 7).double()
    made.weight, made.bias = nn.Parameter(draw(7, 5)), nn.Parameter(draw(7, seed=1))
    return made


def check_torchs_own(name: str, theirs: type[torch.optim.Optimizer], **settings: Any) -> None:
    """An optimizer's steps are bit for bit those of one of torch's, which decays the matrix alone."""
    mine, other = layer(), layer()
    groups: Any = [{"params": [other.weight], "weight_decay": 0.25}, {"params": [other.bias], "weight_decay": 0.0}]
    optimizers = [rw.make_optimizer(mine, name, 0.1, weight_decay=0.25, **settings), theirs(groups, 0.1, **settings)]
    for i in range(4):
        for model, optimizer in zip((mine, other), optimizers, strict=True):
            model.weight.grad, model.bias.grad = draw(7, 5, seed=10 * i), draw(7, seed=10 * i + 1)
            optimizer.step()
    assert torch.equal(mine.weight, other.weight)
    assert torch.equal(mine.bias, other.bias)


def numbers_kept(name: str, **settings: Any) -> int:
    """How many numbers an optimizer keeps for `layer()` between steps, besides its counters."""
    made = layer()
    optimizer = rw.make_optimizer(made, name, **settings)
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    return sum(value.numel() for key, value in states if isinstance(value, Tensor) and key != "step")
