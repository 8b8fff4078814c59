"""The numbers a run computes in: `train.precision`.

`bf16` computes products in bfloat16 within torch's autocast; weights keep their type, and an adapter's stay float32. A
run's losses and scores are computed as its steps are. Answers are generated in the weights' own type: one token at a
time, turning the weights into bfloat16 would take longer than the products. `auto` is bf16 where the device multiplies
bfloat16 (CUDA from compute capability 8.0 on, CPUs with AMX or AVX512-BF16), else float32; what it came to is told
beside the result.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["float32", "bf16", "auto"]
BFLOAT16 = ("amx_bf16", "avx512_bf16")  # what a CPU calls such products


def autocast(where: nn.Module | torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a model, or what lies on a device, computes in `precision`."""
    device = where if isinstance(where, torch.device) else next(where.parameters()).device
    if resolved(precision, device) == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def resolved(precision: Precision, device: torch.device) -> Literal["float32", "bf16"]:
    """Return what a precision comes to on a device."""
    if precision != "auto":
        return precision
    return "bf16" if _multiplies_bfloat16(device) else "float32"


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # an earlier torch does not tell
        return False
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in BFLOAT16)
