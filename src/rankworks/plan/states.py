"""What an optimizer keeps between steps, in bytes: each method's own formula, over the groups it makes of a model.

`adamw8bit` is a formula alone, until its blockwise states have an optimizer here: 2 bytes a parameter and two float32
scales per block of 256; tensors under 4,096 numbers as adamw. Step counters (4 bytes a tensor) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rankworks.core.errors import UnknownNameError, did_you_mean
from rankworks.core.registry import MethodSpec, build, methods

EIGHT_BIT = "adamw8bit"
Optimizer = str | MethodSpec | Mapping[str, Any]


def read_optimizer(optimizer: Optimizer) -> MethodSpec | None:
    """Return the optimizer's settings, or None for `adamw8bit`. Raises `UnknownNameError` with near names."""
    if optimizer == EIGHT_BIT:
        return None
    known = [EIGHT_BIT, *(m.key for m in methods("optimizer"))]
    if isinstance(optimizer, str) and optimizer not in known:
        raise UnknownNameError(f"no optimizer is called {optimizer!r} in plans.{did_you_mean(optimizer, known)}")
    return build("optimizer", optimizer)


def optimizer_bytes(optimizer: Optimizer, model: nn.Module) -> int:
    """Return the bytes an optimizer keeps for what a model trains; also of a model on the meta device."""
    spec = read_optimizer(optimizer)
    if spec is None:
        return sum(_eight_bit(p) for p in model.parameters() if p.requires_grad)
    method: Any = spec.method.cls(spec)  # type: ignore[call-arg]
    return sum(method.state_bytes(p, group) for group in method.groups(model, 1.0) for p in group["params"])


def _eight_bit(tensor: Tensor) -> int:
    n = tensor.numel()
    return 8 * n if n < 4096 else 2 * n + 8 * -(-n // 256)
