"""The numbers a run computes in: `train.precision`.

`bf16` computes products in bfloat16 within torch's autocast; weights keep their type, and an adapter's stay float32. A
run's losses and scores are computed as its steps are. Answers are generated in the weights' own type: one token at a
time, turning the weights into bfloat16 would take longer than the products.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["float32", "bf16"]


def autocast(where: nn.Module | torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a model, or what lies on a device, computes in `precision`."""
    if precision == "float32":
        return contextlib.nullcontext()
    device = where if isinstance(where, torch.device) else next(where.parameters()).device
    return torch.autocast(device.type, torch.bfloat16)
