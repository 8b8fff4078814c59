"""Rows in few bits: each row of a matrix between its own smallest and largest number, in 2^bits even steps.

    step = (max - min) / (2^bits - 1)        code = round((x - min) / step)        x^ = min + step code

so that |x - x^| <= step / 2. Two codes of 4 bits share a byte: column j with column j + half, half = ceil(n / 2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Bits = Literal[4, 8]
NUMBERS = 1 << 18  # that are treated at one time


class Rows(NamedTuple):
    """A quantised matrix (m, n)."""

    codes: Tensor  # (m, n) uint8, or (m, ceil(n / 2)) where two share a byte
    edges: Tensor  # (m, 2) float32: the smallest and the largest number of each row


def quantise_rows(X: Tensor, bits: Bits) -> Rows:
    """Return the codes of a matrix (m, n), made some rows at a time."""
    m, n = X.shape
    half = (n + 1) // 2
    codes = torch.empty(m, n if bits == 8 else half, dtype=torch.uint8, device=X.device)
    edges = torch.stack([X.amin(1), X.amax(1)], dim=1).float()  # two passes, quicker than aminmax's one
    step = (edges[:, 1:] - edges[:, :1]) / (2**bits - 1)
    scale = torch.where(step == 0, 1.0, step).reciprocal_()
    for at in _pieces(m, n):
        found = (X[at] - edges[at, :1]).mul_(scale[at]).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        codes[at] = found if bits == 8 else found[:, :half]
        if bits == 4:
            codes[at, : n - half] |= found[:, half:] << 4
    return Rows(codes, edges)


def dequantise_rows(found: Rows, columns: int, bits: Bits) -> Tensor:
    """Return the matrix (m, columns) that the codes stand for, float32."""
    codes, half = found.codes, (columns + 1) // 2
    low, high = found.edges[:, :1], found.edges[:, 1:]
    step = (high - low) / (2**bits - 1)
    out = torch.empty(len(codes), columns, device=codes.device)
    for at in _pieces(*out.shape):
        if bits == 8:
            out[at] = codes[at]
        else:
            out[at, :half] = codes[at] & 15
            out[at, half:] = codes[at, : columns - half] >> 4
        out[at].mul_(step[at]).add_(low[at])
    return out


def _pieces(m: int, n: int) -> list[slice]:
    """Rows that lie in a cache together."""
    rows = max(1, NUMBERS // max(n, 1))
    return [slice(start, start + rows) for start in range(0, m, rows)]


def row_bytes(shape: tuple[int, ...], bits: Bits) -> int:
    """Return the bytes of a matrix (m, n) in codes."""
    m, n = shape
    return m * (n if bits == 8 else -(-n // 2)) + 8 * m
