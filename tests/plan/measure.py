"""What a real step takes on the CPU, by the allocator's own records: an independent measure for the traced one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from rankworks.plan.trace import _loss


def peak_bytes(model: Any, inputs: Any, loss: str, checkpointing: bool) -> int:
    """Return the highest sum of allocations alive during a forward and backward pass of a model in training mode."""
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return recorded_peak(model, lambda: _loss(model, inputs, loss).backward())


def recorded_peak(model: Any, passes: Callable[[], None]) -> int:
    """Return the highest sum of allocations alive during a model's passes, which are gone through twice."""
    passes()  # one-off allocations happen here
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()  # what earlier models leave to the collector would be recorded as freed here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        passes()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top
