"""What an optimizer keeps between steps, as it is: the bytes of its state, beside which `plan` has the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from rankworks.core.optim.stepwise import STEP


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors of the state: moments, codes with their scales, projectors.

    Step counters (4 bytes a tensor) are left out, as in plans.
    """
    tensors = [value for state in optimizer.state.values() for name, value in state.items() if name != STEP]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
