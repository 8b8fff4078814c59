"""How float32 matrices are multiplied on the way into a subspace and out of it.

    full    as torch is set, which is in float32 where nobody has set it otherwise
    fast    with operands rounded on the way, to bfloat16 on a CPU and to TF32 on CUDA; sums and results in float32

A product of Gaussian matrices is off by 0.0024 of its norm in bfloat16, which has 8 bits where TF32 has 11. The noise
of a batch's gradient is many times that. A processor without such products (AMX or AVX512-BF16 on a CPU), numbers of
another type, and torch before 2.9 multiply in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Products = Literal["full", "fast"]
FAST = {"cpu": "bf16", "cuda": "tf32"}
EXACT = "ieee"


@contextmanager
def multiplying(products: Products, device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices so within the block, and as before after it."""
    with _at(device, FAST.get(device.type) if products == "fast" else None):
        yield


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in float32 within the block, whatever was asked for around it."""
    with _at(device, EXACT):
        yield


@contextmanager
def _at(device: torch.device, precision: str | None) -> Iterator[None]:
    switch = _switch(device)
    if switch is None or precision is None:
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


def _switch(device: torch.device) -> Any:
    """Where torch keeps the precision of products on a kind of device, or None."""
    room = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(device.type)
    matmul = getattr(room, "matmul", None)
    return matmul if hasattr(matmul, "fp32_precision") else None
