"""LoRA+: B moves at `ratio` times the rate of A, whatever takes the steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.train.config import OptimConfig
from rankworks.train.optim import set_learning_rate
from tiny import tiny_llama, token_batch

IDS = token_batch(vocab=320)


def adapted(**settings: Any) -> Any:
    return rw.adapt(tiny_llama(), "lora", **{"rank": 4, **settings})


def backward(model: Any) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}


def test_ratio_1_is_the_base_bit_for_bit() -> None:
    models = [adapted(), adapted()]
    optimizers = [
        rw.make_optimizer(models[0], "adamw", lr=1e-2),
        rw.make_optimizer(models[1], "lora-plus", 1e-2, ratio=1),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_b_has_its_rate_under_any_schedule() -> None:
    optimizer = rw.make_optimizer(adapted(), "lora-plus", lr=1e-3, ratio=8)
    for factor in (1.0, 0.5, 0.125):
        set_learning_rate(optimizer, factor)
        for name, rate in rates(optimizer).items():
            assert rate == pytest.approx(factor * (8e-3 if name.endswith(".B") else 1e-3), rel=1e-12)


def test_the_first_step_moves_b_by_its_rate_and_leaves_a() -> None:
    """B = 0 gives A no gradient; Adam's first step is its rate along the sign."""
    model = adapted()
    a = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(".A")}
    optimizer = rw.make_optimizer(model, "lora-plus", lr=1e-3, ratio=8, eps=1e-30)
    backward(model)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in a:
            assert torch.equal(parameter, a[name])
        elif parameter.requires_grad:
            wanted = torch.where(parameter.grad == 0, 0.0, -8e-3 * parameter.grad.sign())
            torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=0)


def test_vectors_go_with_b_and_embeddings_at_their_own_rate() -> None:
    model = rw.adapt(tiny_llama(), "dora", rank=2, targets=["q_proj", "embed_tokens"])
    found = rates(rw.make_optimizer(model, "lora-plus", lr=1e-3, ratio=4, embedding_lr=2e-6))
    for name, rate in found.items():
        wanted = 2e-6 if "embed_tokens" in name else 1e-3 if name.endswith(".A") else 4e-3
        assert rate == pytest.approx(wanted), name


def test_any_base_takes_the_steps_and_its_settings() -> None:
    optimizer = rw.make_optimizer(adapted(), "lora-plus", lr=1e-3, base="sgd", momentum=0.5)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.5
    config = OptimConfig.model_validate({"name": "lora-plus", "ratio": 4, "betas": [0.9, 0.95], "lr": 1e-4})
    assert rw.make_optimizer(adapted(), config.name, config.lr, **config.settings()).defaults["betas"] == (0.9, 0.95)
    with pytest.raises(ConfigError, match="ratio"):
        rw.make_optimizer(adapted(), "lora-plus", ratio=0.5)
