"""Every registered optimizer: its groups, its state, its resumption and what it says of itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.registry import build, get
from tiny import tiny_llama, token_batch

IDS = token_batch(vocab=320)
SMALL: dict[str, dict[str, Any]] = {"galore": {"rank": 4, "refresh": 3}, "sgd": {"momentum": 0.9}}
KEYS = [m.key for m in rw.methods("optimizer")]


def whole() -> Any:
    """A model all of whose parameters are trained."""
    return tiny_llama()


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


@pytest.mark.parametrize("make", [whole, adapted])
@pytest.mark.parametrize("key", KEYS)
def test_groups_hold_every_trained_parameter_once_with_its_name(key: str, make: Any) -> None:
    model = make()
    optimizer = rw.make_optimizer(model, key, lr=1e-3, weight_decay=0.1, **SMALL.get(key, {}))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pairs = [pair for g in optimizer.param_groups for pair in zip(g["names"], g["params"], strict=True)]
    assert len(pairs) == len(named)
    assert all(named[name] is p for name, p in pairs)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0.0)


@pytest.mark.parametrize("make", [whole, adapted])
@pytest.mark.parametrize("key", KEYS)
def test_its_state_is_as_large_as_the_formula_and_tensors_or_numbers_only(key: str, make: Any) -> None:
    model, settings = make(), SMALL.get(key, {})
    spec = build("optimizer", key, **settings)
    method = spec.method.cls(spec)  # type: ignore[call-arg]
    optimizer = rw.make_optimizer(model, spec, lr=1e-3)
    steps(model, optimizer, 2)
    told = sum(method.state_bytes(p, g) for g in optimizer.param_groups for p in g["params"])
    held = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            assert isinstance(value, (Tensor, int, float, bool)), f"{name} is a {type(value).__name__}"
            if isinstance(value, Tensor) and name != "step":
                held += value.numel() * value.element_size()
    assert told == held


@pytest.mark.parametrize("make", [whole, adapted])
@pytest.mark.parametrize("key", KEYS)
def test_it_resumes_bit_for_bit(key: str, make: Any) -> None:
    """Between two refreshes of a subspace, and over one."""
    runs = [make(), make()]
    optimizers = [rw.make_optimizer(m, key, lr=1e-2, **SMALL.get(key, {})) for m in runs]
    steps(runs[0], optimizers[0], 7)
    steps(runs[1], optimizers[1], 2)
    model = make()
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), runs[1].parameters(), strict=True):
            mine.copy_(theirs)
    optimizer = rw.make_optimizer(model, key, lr=1e-2, **SMALL.get(key, {}))
    optimizer.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    steps(model, optimizer, 5, first=2)
    assert all(torch.equal(a, b) for a, b in zip(numbers(runs[0]), numbers(model), strict=True))


@pytest.mark.parametrize("key", KEYS)
def test_it_lowers_the_loss(key: str) -> None:
    model = whole()
    optimizer = rw.make_optimizer(model, key, lr=3e-2 if key in ("sgd", "galore") else 3e-3, **SMALL.get(key, {}))
    before = model(input_ids=IDS, labels=IDS).loss.item()
    for _ in range(12):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert model(input_ids=IDS, labels=IDS).loss.item() < before


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
        assert type(rw.make_optimizer(model, form)).__name__ == "ProjectedAdamW"
    assert get("optimizer", "galore").axis == "optimizer"
