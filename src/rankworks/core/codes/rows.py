"""Rows in few bits: each row of a matrix between its own smallest and largest number, in 2^bits even steps.

    step = (max - min) / (2^bits - 1)        code = round((x - min) / step)        x^ = min + step code

so that |x - x^| <= step / 2. Two codes of 4 bits share a byte: column j with column j + half, half = ceil(n / 2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Bits = Literal[4, 8]


class Rows(NamedTuple):
    """A quantised matrix (m, n)."""

    codes: Tensor  # (m, n) uint8, or (m, ceil(n / 2)) where two share a byte
    edges: Tensor  # (m, 2) float32: the smallest and the largest number of each row


def quantise_rows(X: Tensor, bits: Bits) -> Rows:
    """Return the codes of a matrix (m, n)."""
    low, high = torch.aminmax(X.float(), dim=1, keepdim=True)  # (m, 1)
    step = (high - low) / (2**bits - 1)
    scaled = (X - low).div_(torch.where(step == 0, 1.0, step)).round_().clamp_(0, 2**bits - 1)
    codes = scaled.to(torch.uint8)
    if bits == 4:
        half = (codes.shape[1] + 1) // 2
        packed = codes[:, :half].clone()
        packed[:, : codes.shape[1] - half] |= codes[:, half:] << 4
        codes = packed
    return Rows(codes, torch.cat([low, high], dim=1))


def dequantise_rows(found: Rows, columns: int, bits: Bits) -> Tensor:
    """Return the matrix (m, columns) that the codes stand for, float32."""
    codes = found.codes
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=1)[:, :columns]
    low, high = found.edges.unbind(1)
    return torch.addcmul(low.unsqueeze(1), codes.float(), ((high - low) / (2**bits - 1)).unsqueeze(1))


def row_bytes(shape: tuple[int, ...], bits: Bits) -> int:
    """Return the bytes of a matrix (m, n) in codes."""
    m, n = shape
    return m * (n if bits == 8 else -(-n // 2)) + 8 * m
