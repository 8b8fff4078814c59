"""Code books: the values in [-1, 1] that a weight over its block's largest may take.

    nf     normal float: quantiles of the normal distribution, 0 and both ends among them, so that codes are about
           equally likely for normal weights. NF4 is the published table of sixteen numbers.
    int    k / (2^(b-1) - 1) for k = -(2^(b-1) - 1) ... 2^(b-1) - 1: symmetric integers, the lowest code left out
    dynamic  for the moments of optimizers: seven decades, each in twice as many even steps as the one below, so that
           small numbers keep a relative precision. 256 values with 0 and 1; -1 is absent. The unsigned book is finer
           by a factor of two.
Source: arXiv:2110.02861, section 2.1 (dynamic); arXiv:2305.14314, section 3 and appendix E (nf); for other numbers of
bits arXiv:2311.12023, whose formula is used.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from rankworks.core.errors import ConfigError

Code = Literal["nf", "int"]

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
OUTER = 0.9677083  # the quantile at which NF's ends stand


def code_book(code: Code, bits: int) -> Tensor:
    """Return the values, ascending, in float64: 2^bits for "nf", 2^bits - 1 for "int". Raises `ConfigError`."""
    if not 2 <= bits <= 8:
        raise ConfigError(f"a weight is quantised to 2 to 8 bits, not {bits}.")
    if code == "int":
        half = 2 ** (bits - 1) - 1
        return torch.arange(-half, half + 1, dtype=torch.float64) / half
    if code != "nf":
        raise ConfigError(f"a code is 'nf' (normal float) or 'int', not {code!r}.")
    if bits == 4:
        return torch.tensor(NF4, dtype=torch.float64)
    side = 2 ** (bits - 1)
    below = torch.linspace(1 - OUTER, 0.5, side, dtype=torch.float64)[:-1]
    above = torch.linspace(0.5, OUTER, side + 1, dtype=torch.float64)[1:]
    quantiles = torch.special.ndtri(torch.cat([below, above]))
    values = torch.cat([quantiles[: side - 1], quantiles.new_zeros(1), quantiles[side - 1 :]])
    return (values / values[-1]).clamp(-1, 1)


@cache
def dynamic_book(signed: bool) -> Tensor:
    """Return the 256 values of the dynamic code book, ascending, float32."""
    values = [0.0, 1.0]
    for decade in range(7):  # in float32 all along, so that the values are bitsandbytes' to the bit
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float32)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + [-m for m in middles] * signed
    return torch.tensor(sorted(values), dtype=torch.float32)
