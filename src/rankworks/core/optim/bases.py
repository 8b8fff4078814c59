"""Bases of a share of a gradient's dimensions: how many directions that is, and orthonormal ones drawn at random.

With a density rho the rank is round(rho d), d the dimension that is projected (the smaller one where both are). Random
bases are the Q of a Gaussian matrix with the signs of R's diagonal, uniform over all orthonormal ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.optim.projection import Basis, Side, sides


def density_rank(density: float, shape: tuple[int, ...], side: Side, most: int | None = None) -> int:
    """Return how many directions the share `density` is, at most `most`."""
    left, right = sides(shape, side)
    of = min(shape) if left and right else shape[0 if left else 1]
    rank = round(density * of)
    return rank if most is None else min(rank, most)


def basis_counts(shape: tuple[int, ...], rank: int, side: Side) -> tuple[int, tuple[int, int]]:
    """Return how many numbers a basis of a rank has, and the shape of R in it."""
    (m, n), (left, right) = shape, sides(shape, side)
    return rank * (m * left + n * right), (rank if left else m, rank if right else n)


def random_basis(shape: tuple[int, ...], rank: int, side: Side, draw: Draw, dtype: torch.dtype) -> Basis:
    """Return a uniformly random orthonormal basis on the sides that are projected, on the device of the source."""
    parts: list[Tensor | None] = [None, None]
    exact = torch.promote_types(dtype, torch.float32)
    for i, (size, projected) in enumerate(zip(shape, sides(shape, side), strict=True)):
        if projected:
            Q, R = torch.linalg.qr(draw.normal(size, rank).to(exact))
            # In the memory order in which a checkpoint brings it back, since a product's last bits may follow it.
            parts[i] = (Q * R.diagonal().sign()).to(dtype).contiguous()
    return Basis(*parts)
