"""Parameters that DistributedDataParallel cannot hold: it is told to leave them out, and their gradients are averaged.

Stand-ins for weights held as integers (core/weights/integers.py) have the storage of one number, into which it cannot
write what the first process has. The integers are the same everywhere from the start, made alike from the same weights,
and stay so: gradients are equal after averaging, and rounding is drawn from (seed, name, step).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rankworks.core.weights.integers import IntegerParameter


def leave_out(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that DDP must not hold, and let it leave them out; before it wraps."""
    found = {name: p for name, p in module.named_parameters() if isinstance(p, IntegerParameter)}
    if found:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(found))
    return list(found.values())


def average_gradients(parameters: Sequence[nn.Parameter], processes: int) -> None:
    """Average gradients over the processes, as DDP does with those it holds."""
    for parameter in parameters:
        if processes > 1 and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= processes
