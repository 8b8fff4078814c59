"""How optimizers are made and told what to do; the promises that each keeps are the conformance suite's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.registry import build, get
from tiny import tiny_llama, token_batch

IDS = token_batch(vocab=320)


def adapted() -> Any:
    return rw.adapt(tiny_llama(), "dora", rank=4)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        optimizer.zero_grad(set_to_none=True)
        ids = (IDS + step) % 320
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def numbers(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_torchs_own_are_torchs_own() -> None:
    models = [adapted(), adapted()]
    ours = rw.make_optimizer(models[0], "adamw", lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    theirs = torch.optim.AdamW(
        [p for p in models[1].parameters() if p.requires_grad], lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0
    )
    steps(models[0], ours, 4)
    steps(models[1], theirs, 4)
    assert all(torch.equal(a, b) for a, b in zip(numbers(models[0]), numbers(models[1]), strict=True))


def test_a_spec_a_mapping_and_a_key_are_one() -> None:
    model = adapted()
    for form in ("galore", build("optimizer", "galore"), {"optimizer": "galore"}):
        assert type(rw.make_optimizer(model, form)).__name__ == "GaLoreSteps"
    assert get("optimizer", "galore").axis == "optimizer"


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="momentum above 0"):
        rw.make_optimizer(tiny_llama(), "sgd", nesterov=True)
    with pytest.raises(ConfigError, match="rank 1 or more"):
        rw.make_optimizer(tiny_llama(), "galore", rank=0)
