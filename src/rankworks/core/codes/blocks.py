"""Blockwise quantisation: one scale per block of consecutive weights, its largest magnitude, and a code for each.

    x (n) in blocks        c_k = max |x| of block k,        code = the nearest value to x / c_k,        x^ = c_k value

A weight half-way between two values takes the lower. A block of zeros has c = 0 and decodes to zeros; the last block
may be shorter. The largest weight of a block is itself exactly, so quantising twice changes nothing. For NF4 with
blocks of 64 codes and values are those of bitsandbytes, number for number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankworks.core.codes.nearest import nearest


class Blocks(NamedTuple):
    """A quantised matrix."""

    codes: Tensor  # (n,) uint8, indices into the book, row-major
    scales: Tensor  # (blocks,) float32
    book: Tensor  # (values,) float32, ascending
    block: int
    shape: torch.Size

    @property
    def bits(self) -> float:
        """Bits per weight, float32 scales included."""
        code = max(1, (len(self.book) - 1).bit_length())
        return code + 32 * len(self.scales) / max(1, len(self.codes))


def quantise_blocks(weight: Tensor, book: Tensor, block: int = 64) -> Blocks:
    """Return the codes and scales of a tensor of any shape, taken row-major, in float32."""
    flat = weight.detach().reshape(-1).float()
    rows = _in_blocks(flat, block)
    scales = rows.abs().amax(1)  # (blocks,)
    book = book.to(flat)
    relative = rows / torch.where(scales == 0, 1.0, scales).unsqueeze(1)
    return Blocks(nearest(relative.view(-1)[: len(flat)], book), scales, book, block, weight.shape)


def dequantise_blocks(found: Blocks) -> Tensor:
    """Return the tensor that the codes stand for, float32."""
    values = _in_blocks(found.book.index_select(0, found.codes.int()), found.block).mul_(found.scales.unsqueeze(1))
    return values.reshape(-1)[: len(found.codes)].reshape(found.shape)


def _in_blocks(flat: Tensor, block: int) -> Tensor:
    """Return (blocks, block), the last filled up with zeros."""
    missing = -len(flat) % block
    return torch.nn.functional.pad(flat, (0, missing)).reshape(-1, block) if missing else flat.reshape(-1, block)
