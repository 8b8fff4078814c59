"""Adafactor's step: the gradient over the root of a mean square kept as row and column means, its size limited.

    b2 = 1 - t^decay         r = b2 r + (1 - b2) mean over columns of (R^2 + eps)      c likewise over rows
    U_ij = R_ij / sqrt(r_i c_j / mean(r))                  U <- U / max(1, rms(U) / clip)
    step = rate U,   with beta1 its running mean:  m = beta1 m + (1 - beta1) rate U

as transformers has it: eps is added before the means, t counts from 1 (so the first step forgets the zeros), and the
running mean is of steps, rate included. Vectors keep their mean square in full. R of more than two dimensions is a
stack of matrices over its last two. What is kept is float32 where R is narrower: (.., m) + (.., n) numbers, with beta1
R's shape besides.
Source: arXiv:1804.04235, algorithms 4 and 5; `Adafactor` of transformers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rankworks.core.optim.moments import plain

DECAY, EPS, CLIP = -0.8, 1e-30, 1.0


def adafactor_step(
    state: dict[str, Any],
    R: Tensor,
    t: int,
    rate: float | Tensor,
    *,
    eps: float = EPS,
    clip: float = CLIP,
    decay: float = DECAY,
    beta1: float | None = None,
) -> Tensor:
    """Update what is kept of R (.., m, n) or (n,) for step t, from 1, and return the step to subtract, not to change.

    rate: the learning rate, a number or a tensor of one.
    """
    wide = R.to(torch.promote_types(R.dtype, torch.float32))
    b2 = 1.0 - math.pow(t, decay)
    square = wide.square()
    if R.dim() < 2:
        v = plain(state, "exp_avg_sq", wide).mul_(b2).add_(square.add_(eps), alpha=1 - b2)
        U = torch.mul(wide, v.rsqrt(), out=square)
        mean = U.square().mean()
    else:
        rows = _kept(state, "exp_avg_sq_row", square.mean(-1), b2, eps)  # (.., m)
        columns = _kept(state, "exp_avg_sq_col", square.mean(-2), b2, eps)  # (.., n)
        down = (rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)  # (.., m, 1)
        along = columns.rsqrt()  # (.., n)
        each = (square @ along.square().unsqueeze(-1)) * down.square()  # (.., m, 1): rms(U) without a pass over U
        mean = each.mean() / R.shape[-1]
        U = torch.mul(wide, down, out=square).mul_(along.unsqueeze(-2))
    U.mul_(rate / (mean.sqrt() / clip).clamp(min=1.0))
    if beta1 is None:
        return U
    return plain(state, "exp_avg", U).lerp_(U, 1 - beta1)


def _kept(state: dict[str, Any], name: str, means: Tensor, b2: float, eps: float) -> Tensor:
    return plain(state, name, means).mul_(b2).add_(means.add_(eps), alpha=1 - b2)


def adafactor_numbers(shape: tuple[int, ...], beta1: bool = False) -> int:
    """Return how many numbers are kept of R of a shape."""
    full = math.prod(shape)
    kept = full if len(shape) < 2 else math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:])
    return kept + full * beta1
