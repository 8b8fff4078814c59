"""Split: which share of a gradient a rule with moments takes, and what is left of it for a rule without.

    columns, rows, randk   coordinates of a matrix, or entries of any tensor, drawn at random (coordinates.py)
    randperm               random rows or columns of a side
    svd, random            the leading subspace, or random orthonormal directions, of a side (bases.py)
    dct                    the vectors of the cosine basis that the gradient lies along most (dct.py); kept as a list

R = into(G), and what is left is G - back(R): zero at what is kept, or orthogonal to the basis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.optim.bases import basis_counts, density_rank, random_basis
from rankworks.core.optim.carry import Kept
from rankworks.core.optim.coordinates import Coordinates, Counts, count_coordinates, draw_coordinates, list_type
from rankworks.core.optim.dct import INDEX, Columns, best_columns
from rankworks.core.optim.projection import Basis, Side, add_back, sides
from rankworks.core.optim.subspace import Subspace, find_basis

Projection = Literal["columns", "rows", "randk", "randperm", "svd", "random", "dct"]
BASES = ("svd", "random", "dct")
LISTS = ("rows", "columns", "entries")
COSINES = ("left", "right")


Found = Kept | Columns


@dataclass(frozen=True)
class Share:
    """The share `density` of a tensor, and what is projected. Bases take matrices alone."""

    projection: Projection
    density: float
    side: Side = "std"
    subspace: Subspace = "svd"

    def counts(self, shape: tuple[int, ...]) -> Counts | None:
        """How many coordinates are kept; None for bases."""
        if self.projection in BASES:
            return None
        return count_coordinates(self.projection, shape, self.density, self.side)  # type: ignore[arg-type]

    def rank(self, shape: tuple[int, ...]) -> int:
        """How many directions are kept: no more singular vectors than the shorter side has numbers."""
        return density_rank(self.density, shape, self.side, None if self.projection == "random" else min(shape))

    def numbers(self, shape: tuple[int, ...]) -> int:
        """How many numbers R has."""
        counts = self.counts(shape)
        return math.prod(basis_counts(shape, self.rank(shape), self.side)[1] if counts is None else counts.shape(shape))

    def bytes(self, shape: tuple[int, ...], element_size: int) -> int:
        """The bytes of the basis, or of the lists of what is kept; none where R has no numbers."""
        counts = self.counts(shape)
        if not self.numbers(shape):
            return 0
        if self.projection == "dct":
            return INDEX * self.rank(shape) * sum(sides(shape, self.side))
        if counts is None:
            return basis_counts(shape, self.rank(shape), self.side)[0] * element_size
        return counts.bytes(math.prod(shape))

    def find(self, G: Tensor, draw: Draw, old: Kept | None = None) -> Found | None:
        """Return what is kept of a gradient from now on, `old` being what was until now; None where that is nothing."""
        shape = tuple(G.shape)
        if not self.numbers(shape):
            return None
        counts = self.counts(shape)
        if counts is not None:
            return draw_coordinates(counts, shape, draw)
        if self.projection == "svd":
            before = old if isinstance(old, Basis) else None
            return find_basis(G, self.rank(shape), self.side, self.subspace, before, draw)
        if self.projection == "dct":
            return best_columns(G, self.rank(shape), self.side)
        return random_basis(shape, self.rank(shape), self.side, draw, G.dtype)


def store(state: dict[str, Any], found: Found, G: Tensor) -> Kept:
    """Keep what was found for G in a state, and return it: a basis as P and Q, choices as lists of integers."""
    if isinstance(found, Basis):
        state |= _named("PQ", found)
        return found
    if isinstance(found, Columns):
        state |= _named(COSINES, found)
        return found.basis(G)
    kind = list_type(G.numel())
    state |= _named(LISTS, (None if part is None else part.to(kind) for part in found))
    return found


def _named(names: Iterable[str], parts: Iterable[Tensor | None]) -> dict[str, Tensor]:
    return {name: part for name, part in zip(names, parts, strict=True) if part is not None}


def stored(state: Mapping[str, Any], G: Tensor) -> Kept | None:
    """Return what `store` kept, for a gradient like G, or None."""
    if "P" in state or "Q" in state:
        return Basis(state.get("P"), state.get("Q"))
    if "left" in state or "right" in state:
        return Columns(state.get("left"), state.get("right")).basis(G)
    lists = [state.get(name) for name in LISTS]
    if all(part is None for part in lists):
        return None
    return Coordinates(*(None if part is None else part.long() for part in lists))


def left_over(kept: Kept, G: Tensor, R: Tensor, *, signed: bool) -> Tensor:
    """Return G - back(R) of G's shape, or its sign, in memory of its own."""
    if isinstance(kept, Coordinates):
        rest = G.sign() if signed else G.clone()
        kept.put(rest, 0.0)
        return rest
    rest = G.clone()
    add_back(rest, kept, R, -1.0)
    return rest.sign_() if signed else rest


def add_kept(parameter: Tensor, kept: Kept, N: Tensor, size: float) -> None:
    """Add size * back(N) to a parameter in place."""
    if isinstance(kept, Coordinates):
        kept.add(parameter, N, size)
    else:
        add_back(parameter, kept, N, size)
