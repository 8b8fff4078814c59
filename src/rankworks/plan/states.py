"""What an optimizer keeps between steps, in bytes: each method's own formula, over the groups it makes of a model.

Step counters (4 bytes a tensor) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rankworks.core.errors import UnknownNameError, did_you_mean
from rankworks.core.registry import MethodSpec, build, methods

Optimizer = str | MethodSpec | Mapping[str, Any]


def read_optimizer(optimizer: Optimizer) -> MethodSpec:
    """Return the optimizer's settings. Raises `UnknownNameError` with near names."""
    known = [m.key for m in methods("optimizer")]
    if isinstance(optimizer, str) and optimizer not in known:
        raise UnknownNameError(f"no optimizer is called {optimizer!r} in plans.{did_you_mean(optimizer, known)}")
    return build("optimizer", optimizer)


def optimizer_bytes(optimizer: Optimizer, model: nn.Module) -> int:
    """Return the bytes an optimizer keeps for what a model trains; also of a model on the meta device."""
    method, placed = _placed(optimizer, model)
    return sum(method.state_bytes(parameter, group) for parameter, group in placed)


def resting(optimizer: Optimizer, model: nn.Module) -> set[int]:
    """Return the ids of the parameters that get no gradient in a step, of an optimizer that lets some rest in turns."""
    method, placed = _placed(optimizer, model)
    return {id(parameter) for parameter, group in placed if method.rests(parameter, group)}


def weight_bytes(optimizer: Optimizer, model: nn.Module) -> int:
    """Return the bytes of a model's parameters while an optimizer trains it: most leave them in their own types."""
    own = {id(p): p.nbytes for p in model.parameters()}
    return sum((own | _held(optimizer, model)).values())


def held_bytes(optimizer: Optimizer, model: nn.Module, plain: int) -> tuple[int, int]:
    """Return the bytes of weights and buffers, of which `plain` are there without it, and those unpacked at a time."""
    own = {id(p): p.nbytes for p in model.parameters()}
    held = {key: told for key, told in _held(optimizer, model).items() if told != own[key]}
    return plain + sum(told - own[key] for key, told in held.items()), max((own[key] for key in held), default=0)


def _held(optimizer: Optimizer, model: nn.Module) -> dict[int, int]:
    """Return the bytes in which each trained parameter is held, by its id."""
    method, placed = _placed(optimizer, model)
    return {id(parameter): method.weight_bytes(parameter, group) for parameter, group in placed}


def _placed(optimizer: Optimizer, model: nn.Module) -> tuple[Any, list[tuple[nn.Parameter, Any]]]:
    """Return the method, and what the model trains, each parameter with its group."""
    spec = read_optimizer(optimizer)
    method: Any = spec.method.cls(spec)  # type: ignore[call-arg]
    return method, [(parameter, group) for group in method.groups(model, 1.0) for parameter in group["params"]]
