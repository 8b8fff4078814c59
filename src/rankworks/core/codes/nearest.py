"""The nearest value of a book, by a look-up: a float's first 16 bits tell its code but for one comparison.

    key = the sign, the exponent and 7 bits of the fraction of x        code = base[key] + (x > middle[key])

base counts the middles of neighbouring values below all numbers that share a key, and middle is the one that lies
among them, infinity where none does. A book in which two middles share a key is searched instead. For a book of 256
values a look-up takes a tenth of the time of a search.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Return for each of x (n,) float32 in [-1, 1] the code, uint8, of the book's nearest value, the lower of two."""
    middles = (book[1:] + book[:-1]) / 2
    if x.device.type in ("cpu", "cuda") and len(x) >= 4 * len(book):
        table = _table(tuple(middles.tolist()), x.device)
        if table is not None:
            base, middle = table
            key = x.contiguous().view(torch.uint16)[1::2].int()  # little-endian, as all of torch's devices are
            return base.index_select(0, key).add_(x > middle.index_select(0, key))
    return torch.bucketize(x, middles, out_int32=True).to(torch.uint8)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """base (65536,) uint8 and middle (65536,) float32, or None where one comparison is not enough."""
    middles = torch.tensor(values, dtype=torch.float32)
    first = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([first, first | 0xFFFF]).view(torch.float32)
    least, most = ends.amin(0), ends.amax(0)
    known = least.isfinite() & most.isfinite() & (torch.minimum(least.abs(), most.abs()) <= 1)
    below = torch.bucketize(least, middles)
    within = torch.where(known, torch.bucketize(most, middles, right=True) - below, 0)
    if int(within.max()) > 1:
        return None
    middle = torch.where(within == 1, middles[below.clamp(max=len(values) - 1)], torch.inf)
    return torch.where(known, below, 0).to(torch.uint8).to(device), middle.to(device)
