"""Several processes, one evidence: what the first process measured is sent to the others.

Each process has measured the same batches, so they differ by rounding at most; but ranks that are shared out by
comparing numbers, and factors that no later broadcast touches, must not differ at all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def agreed(found: dict[str, dict[str, Tensor]], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Return the first process's tensors, a tensor that several sites share sent once; in one process, as they are.

    `device` is the model's, over which tensors are sent where the processes cannot send from the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return found
    through = torch.device("cpu") if "gloo" in str(dist.get_backend_config()) else device
    sent: dict[int, Tensor] = {}
    for parts in found.values():
        for name, tensor in parts.items():
            if id(tensor) not in sent:
                moved = tensor.to(through).contiguous()
                dist.broadcast(moved, 0)
                sent[id(tensor)] = moved.to(tensor.device)
            parts[name] = sent[id(tensor)]
    return found
