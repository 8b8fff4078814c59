"""When a hand-written pass may run, and in which floating type.

An autograd.Function hides its inside from whoever looks through operations: a compiler, a function transform, a
forward-mode derivative. Those get the plain form. `autocast` is a promise about types that in-place operations do not
keep by themselves, so it is read here and switched off within.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def sees_through() -> bool:
    """Whether somebody looks through the operations that run now, so that only plain ones will do."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type a product of x is computed in: x's own, or autocast's where that is on (float64 stays)."""
    kind = x.device.type
    if x.dtype != torch.float64 and _autocast_is_on(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context within which operations keep the types of their operands."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _autocast_is_on(kind) else contextlib.nullcontext()


def _autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for a type of device (the meta device has none, and asking there raises)."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def laid_out_like(changed: Tensor, weight: Tensor) -> Tensor:
    """Return a changed weight in the memory order of the frozen one, which GPT-2 stores as (in, out).

    A library multiplies by either order with code of its own, and their last bits may differ; in the frozen layer's a
    change of zero leaves the output as it is to the bit.
    """
    if changed.stride() == weight.stride():
        return changed
    return torch.empty_like(weight, dtype=changed.dtype).copy_(changed)
