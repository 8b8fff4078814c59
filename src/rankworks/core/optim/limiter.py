"""The norm-growth limiter: a step may be at most `limit` times as long as the one before it was.

    f_t = min(1, limit p / ||S_t||)        S_t <- f_t S_t        p <- f_t ||S_t||

so ||S_t|| <= limit ||S_{t-1}||, and a shorter step passes untouched. The first step has no predecessor. The released
codes divide by p + 1e-8, and would hold down every step after one of length zero (which is the first step of an
adapter's A) for some 1,800 steps at limit = 1.01; here a length of zero sets no limit. p is the only thing kept, and a
number on the parameter's device: nothing waits for it. Scaling all steps alike changes no f_t.
Source: arXiv:2410.01623, section 4.3; arXiv:2412.05270.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "norm"
"""The entry of the state."""


def growth_factor(state: dict[str, Any], norm: Tensor, limit: float) -> Tensor:
    """Return f_t for a step of length `norm`, a number in float32 or wider, and keep the length after limiting."""
    factor = torch.ones_like(norm)
    if NAME in state:
        before = state[NAME].to(norm)
        shorter = limit * before / norm  # nan or inf for a step of length zero
        factor = torch.where((before > 0) & (norm > limit * before), shorter, factor)
    state[NAME] = norm * factor
    return factor
