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
    spec = read_optimizer(optimizer)
    method: Any = spec.method.cls(spec)  # type: ignore[call-arg]
    return sum(method.state_bytes(p, group) for group in method.groups(model, 1.0) for p in group["params"])


def weight_bytes(optimizer: Optimizer, model: nn.Module) -> int:
    """Return the bytes of a model's parameters while an optimizer trains it: most leave them in their own types."""
    spec = read_optimizer(optimizer)
    method: Any = spec.method.cls(spec)  # type: ignore[call-arg]
    own = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    trained = {id(p): method.weight_bytes(p, group) for group in method.groups(model, 1.0) for p in group["params"]}
    return sum((own | trained).values())
