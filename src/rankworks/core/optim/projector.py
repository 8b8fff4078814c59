"""Random projections that need not be kept: P, Q with independent entries N(0, 1/r), drawn from a seed and names.

    E[P P^T] = I,  so  E ||P^T g||^2 = ||g||^2 for every column g

Projection number k of a weight is a function of (seed, the weight's name, k): each process, each resumed run and each
order of the weights draws the same one, on the CPU. Drawing again costs S r numbers, a product with it 2 m n r
operations.
"""

from __future__ import annotations

from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.optim.projection import Basis, Side, sides


def gaussian_basis(like: Tensor, rank: int, side: Side, seed: int, name: str, number: int) -> Basis:
    """Return projection `number` of the weight `name`, for gradients (m, n) of `like`'s shape, type and device."""
    m, n = like.shape
    r = min(rank, m, n)
    draw = Draw(seed, f"{name}:{number}", like.device, like.dtype)
    left, right = sides((m, n), side)
    P = draw.normal(m, r, std=r**-0.5) if left else None
    return Basis(P, draw.normal(n, r, std=r**-0.5) if right else None)
