"""The moments of Adam, and the direction they give, of a gradient or of what it was projected to.

    m = b1 m + (1 - b1) R        v = b2 v + (1 - b2) R^2
    N = m / (sqrt(v) + eps')     factor = sqrt(1 - b2^t) / (1 - b1^t)        step = lr factor N

eps' = eps as the code of GaLore, Fira and APOLLO has it ("released"), or eps sqrt(1 - b2^t), which makes it torch's
AdamW. The moments are kept in R's type, or in 8 bits (bits=8): blocks of 256 in the dynamic code books, float32 where R
has less than 4,096 numbers. In 8 bits everything is computed in float32, and the step is taken with the moments before
they are rounded again.
Source: arXiv:1412.6980; arXiv:2110.02861 for 8 bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankworks.core.codes.blocks import Blocks, dequantise_blocks, quantise_blocks
from rankworks.core.codes.books import dynamic_book

SMALLEST, BLOCK = 4096, 256  # below so many numbers 8 bits save nothing; numbers that share a scale


class Direction(NamedTuple):
    """Where to go and how far: the step is lr * factor * N."""

    N: Tensor
    factor: float


def adam_direction(
    state: dict[str, Any],
    R: Tensor,
    t: int,
    betas: tuple[float, float],
    eps: float,
    *,
    released: bool = True,
    bits: int | None = None,
) -> Direction:
    """Update the moments of R in `state` (any shape) for step t, from 1, and return the direction of the step."""
    b1, b2 = betas
    small = bits == 8 and R.numel() >= SMALLEST
    R = R if bits is None else R.float()
    if small:
        m, v = read_codes(state, "exp_avg", R, signed=True), read_codes(state, "exp_avg_sq", R, signed=False)
    else:
        m, v = _plain(state, "exp_avg", R), _plain(state, "exp_avg_sq", R)
    m.lerp_(R, 1 - b1)
    v.mul_(b2).addcmul_(R, R, value=1 - b2)
    if small:
        write_codes(state, "exp_avg", m, signed=True)
        write_codes(state, "exp_avg_sq", v, signed=False)
    root = math.sqrt(1 - b2**t)
    return Direction(m / v.sqrt().add_(eps if released else eps * root), root / (1 - b1**t))


def _plain(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name]


def read_codes(state: dict[str, Any], name: str, like: Tensor, *, signed: bool) -> Tensor:
    """Return the float32 tensor of `like`'s shape that stands in the state in 8 bits; zeros where there is none yet."""
    if name not in state:
        return torch.zeros_like(like, dtype=torch.float32)
    book = dynamic_book(signed).to(like.device)
    return dequantise_blocks(Blocks(state[name], state[f"{name}_scales"], book, BLOCK, like.shape))


def write_codes(state: dict[str, Any], name: str, value: Tensor, *, signed: bool) -> None:
    """Keep a tensor in 8 bits: `name` (n,) uint8 and `name`_scales (blocks,) float32."""
    found = quantise_blocks(value, dynamic_book(signed).to(value.device), BLOCK)
    state[name], state[f"{name}_scales"] = found.codes, found.scales


def adam_bytes(numbers: int, element_size: int, bits: int | None = None) -> int:
    """Return the bytes of both moments of so many numbers."""
    if bits == 8 and numbers >= SMALLEST:
        return 2 * (numbers + 4 * -(-numbers // BLOCK))
    return 2 * numbers * (element_size if bits is None else 4)
