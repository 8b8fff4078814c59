"""Where a gradient's leading subspace is found: exactly, from random probes, or from the subspace before.

    svd           the leading singular vectors, as published; the smaller Gram matrix's eigenvectors, S^3 and m n S
    randomised    subspace iteration from seeded random probes and a small SVD: 6 m n (r + 8)
    warm          Q <- orthonormal(G^T (G Q)) from the basis before, twice: 8 m n r; the first time as randomised

All give an orthonormal basis whose first columns carry most. In `svd` and `randomised` the columns are singular
vectors, sign fixed by their largest entry, and whoever keeps moments in these coordinates meets other coordinates after
every refresh. `warm` turns the columns as little as the iteration asks for: column i goes on where it was, with its
sign, so the moments keep their meaning.
Source: arXiv:2403.03507, equations 12 and 13 (svd); arXiv:0909.4061, algorithm 4.4 (randomised); the orthogonal
iteration of Golub and Van Loan, Matrix Computations, section 8.2.4 (warm).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.optim.projection import Basis, Modes, Side, leading_basis, sides
from rankworks.linalg import randomised_svd
from rankworks.linalg.orthonormal import orthonormal

Subspace = Literal["warm", "randomised", "svd"]
ITERATIONS, PROBES = 2, 8  # of both iterations; random probes beyond the rank


def find_basis(
    G: Tensor, rank: int, side: Side, how: Subspace = "warm", old: Basis | None = None, draw: Draw | None = None
) -> Basis:
    """Return the basis of the leading subspace of G (m, n) on the sides that are projected, in G's type, row-major.

    rank: at most min(m, n) is used. old: the basis before, for `warm`. draw: where random probes come from; must be
    made anew from (seed, step, name) for every call, and without it every call draws the same numbers.
    """
    if how == "svd":
        return leading_basis(G, rank, side)
    exact = G.to(torch.promote_types(G.dtype, torch.float32))
    left, right = sides((G.shape[0], G.shape[1]), side)
    r = min(rank, *G.shape)
    found = _continued(exact, old) if how == "warm" and old is not None else None
    if found is None:
        generator = (Draw(0) if draw is None else draw).generator
        u, _, vh = randomised_svd(exact, r, ITERATIONS, PROBES, generator)
        found = Basis(u if left else None, vh.mT if right else None)
    return Basis(*(None if part is None else part.to(G.dtype).contiguous() for part in found))


def _continued(G: Tensor, old: Basis) -> Basis | None:
    """The next basis, or None where the old one carries less of G than a random one would: it may be orthogonal."""
    M, start = (G, old.Q) if old.Q is not None else (G.mT, old.P)
    assert start is not None
    columns, norms = start.to(G.dtype), G.new_zeros(())
    for _ in range(ITERATIONS):
        products = M @ columns
        norms = torch.linalg.vector_norm(products, dim=0)
        columns = orthonormal(M.mT @ products.div_(torch.where(norms == 0, 1.0, norms)))  # scaled: nearly orthonormal
    if not bool(norms.square().sum() * min(G.shape) >= G.square().sum() * len(norms)):
        return None
    if old.Q is None:
        return Basis(columns, None)
    return Basis(None if old.P is None else orthonormal(G @ columns), columns)


def find_modes(
    G: Tensor, rank: int, how: Subspace = "warm", old: Modes | None = None, draw: Draw | None = None
) -> Modes:
    """Return the basis of a tensor of more than two dimensions along each that is longer than `rank`."""
    found: list[Tensor | None] = []
    for i, length in enumerate(G.shape):
        if length <= rank:
            found.append(None)
            continue
        before = None if old is None or old.factors[i] is None else Basis(old.factors[i], None)
        unfolded = G.movedim(i, 0).reshape(length, -1)
        found.append(find_basis(unfolded, rank, "left", how, before, draw).P)
    return Modes(tuple(found))
