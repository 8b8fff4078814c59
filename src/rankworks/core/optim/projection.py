"""Projecting a gradient G (m, n) into a subspace of low rank, and a step back out of it.

    left     R = P^T G  (r, n)          back  P N            P (m, r)
    right    R = G Q    (m, r)          back  N Q^T          Q (n, r)
    both     R = P^T G Q  (r, r)        back  P N Q^T

P and Q have orthonormal columns. `std` projects the short side, so that what an optimizer keeps lies along the long
one: right for m >= n, left for m < n; `reverse_std` the other way round.

A tensor (d1, ..., dk) of more than two dimensions is projected along each of them, R = G x_1 U1^T x_2 U2^T ... of shape
(r1, ..., rk), r_i = min(r, d_i), U_i the leading left singular vectors of its unfolding (d_i, rest): a Tucker form. A
dimension no longer than r is left as it is, since turning it would lose and save nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rankworks.linalg import truncated_svd

Side = Literal["std", "reverse_std", "left", "right", "full"]


class Basis(NamedTuple):
    """The columns that are kept on each side; None where a side is left as it is."""

    P: Tensor | None  # (m, r)
    Q: Tensor | None  # (n, r)

    def into(self, G: Tensor) -> Tensor:
        """R of G (m, n)."""
        R = G if self.P is None else self.P.t() @ G
        return R if self.Q is None else R @ self.Q

    def back(self, N: Tensor) -> Tensor:
        """The step (m, n) of N in the subspace."""
        step = N if self.P is None else self.P @ N
        return step if self.Q is None else step @ self.Q.t()


class Modes(NamedTuple):
    """The columns that are kept along each dimension of a tensor; None where one is left as it is."""

    factors: tuple[Tensor | None, ...]  # (d_i, r)

    def into(self, G: Tensor) -> Tensor:
        """R of G."""
        return _along(G, [None if U is None else U.t() for U in self.factors])

    def back(self, N: Tensor) -> Tensor:
        """The step of N in the subspace."""
        return _along(N, self.factors)


def _along(tensor: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiply each dimension by its matrix (new, old)."""
    for i, matrix in enumerate(matrices):
        if matrix is not None:
            tensor = (matrix @ tensor.movedim(i, 0).flatten(1)).unflatten(1, _others(tensor, i)).movedim(0, i)
    return tensor.contiguous()


def _others(tensor: Tensor, i: int) -> tuple[int, ...]:
    return tuple(length for j, length in enumerate(tensor.shape) if j != i)


def sides(shape: tuple[int, ...], side: Side) -> tuple[bool, bool]:
    """Return whether the left and whether the right side of a matrix (m, n) is projected."""
    m, n = shape
    if side in ("std", "reverse_std"):
        right = (m >= n) == (side == "std")
        return not right, right
    return side in ("left", "full"), side in ("right", "full")


def leading_basis(G: Tensor, rank: int, side: Side) -> Basis:
    """Return the leading singular vectors of G, at most `rank`, on the sides that are projected, in G's type."""
    left, right = sides(tuple(G.shape), side)
    u, _, vh = truncated_svd(G, min(rank, *G.shape))  # (m, r), (r,), (r, n)
    return Basis(_own(u, G) if left else None, _own(vh.t(), G) if right else None)


def _own(columns: Tensor, G: Tensor) -> Tensor:
    """A copy in G's type and in row-major order: what a file gives back, down to the order in which BLAS adds."""
    return columns.to(G.dtype).clone(memory_format=torch.contiguous_format)


def projected_shape(shape: tuple[int, ...], rank: int, side: Side) -> tuple[int, ...]:
    """Return the shape of R."""
    if len(shape) > 2:
        return tuple(min(d, rank) for d in shape)
    r = min(rank, *shape)
    return tuple(r if projected else d for d, projected in zip(shape, sides(shape, side), strict=True))


def basis_numbers(shape: tuple[int, ...], rank: int, side: Side) -> int:
    """Return how many numbers a basis has."""
    if len(shape) > 2:
        return sum(d * rank for d in shape if d > rank)
    r = min(rank, *shape)
    return sum(r * d for d, projected in zip(shape, sides(shape, side), strict=True) if projected)


def add_back(parameter: Tensor, basis: Basis | Modes, N: Tensor, size: float) -> None:
    """Add size * back(N) to a parameter in place; to a matrix without the step as a matrix of its own."""
    N = N.to(parameter.dtype)
    if isinstance(basis, Modes):
        parameter.add_(basis.back(N), alpha=size)
    elif basis.P is not None and basis.Q is not None:
        parameter.addmm_(basis.P @ N, basis.Q.t(), alpha=size)
    elif basis.P is not None:
        parameter.addmm_(basis.P, N, alpha=size)
    elif basis.Q is not None:
        parameter.addmm_(N, basis.Q.t(), alpha=size)
