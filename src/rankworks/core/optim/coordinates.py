"""Coordinates: a gradient restricted to some of its rows and columns, or entries; and steps put back there.

    columns   R = G[:, c]      (m, k)        rows   R = G[r, :]   (k, n)
    entries   R = G.flat[e]    (k,)          both   R = G[r, :][:, c]

down after up is the identity, up after down keeps what was chosen and is zero elsewhere. Which coordinates are kept is
drawn from a seeded source, in ascending order: a function of (seed, step, name), so that processes and resumed runs
agree. Kept in a state they are int32 (int64 from 2^31 numbers on).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.optim.projection import Side, sides

Choice = Literal["columns", "rows", "randk", "randperm"]


class Counts(NamedTuple):
    """How many rows, columns or entries are kept; None where all are."""

    rows: int | None = None
    columns: int | None = None
    entries: int | None = None

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of R."""
        if self.entries is not None:
            return (self.entries,)
        m, n = full
        return (m if self.rows is None else self.rows, n if self.columns is None else self.columns)

    def bytes(self, numbers: int) -> int:
        """The bytes of the lists of a tensor of so many numbers."""
        return sum(k for k in self if k is not None) * list_type(numbers).itemsize


class Coordinates(NamedTuple):
    """Which rows and columns of a matrix, or which entries of a tensor of any shape, are kept: int64, distinct."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    entries: Tensor | None = None

    def into(self, G: Tensor) -> Tensor:
        """R of G, a copy."""
        if self.entries is not None:
            return G.reshape(-1).index_select(0, self.entries)
        R = G if self.rows is None else G.index_select(0, self.rows)
        return R if self.columns is None else R.index_select(1, self.columns)

    def back(self, N: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of `shape` that is N at what is kept and zero elsewhere."""
        full = N.new_zeros(shape)
        self.put(full, N)
        return full

    def put(self, full: Tensor, N: Tensor | float) -> None:
        """Overwrite what is kept of `full` in place, by N of R's shape or by a number."""
        if self.entries is not None:
            flat = full.reshape(-1)  # a copy where the memory has gaps
            _put(flat, 0, self.entries, N)
            if flat.data_ptr() != full.data_ptr():
                full.copy_(flat.view(full.shape))
        elif self.rows is None or self.columns is None:
            dim, index = (0, self.rows) if self.rows is not None else (1, self.columns)
            assert index is not None
            _put(full, dim, index, N)
        else:
            some = full.index_select(0, self.rows)
            _put(some, 1, self.columns, N)
            full.index_copy_(0, self.rows, some)

    def add(self, full: Tensor, N: Tensor, size: float) -> None:
        """Add size * back(N) to `full` in place, touching nothing else."""
        self.put(full, self.into(full).add_(N, alpha=size))


def _put(full: Tensor, dim: int, index: Tensor, N: Tensor | float) -> None:
    if isinstance(N, Tensor):
        full.index_copy_(dim, index, N)
    else:
        full.index_fill_(dim, index, N)


def count_coordinates(choice: Choice, shape: tuple[int, ...], density: float, side: Side = "std") -> Counts:
    """Return how much of a tensor is kept: the share `density` of the columns, rows or entries, rounded down.

    `randperm` keeps the rows or columns of the side that is projected, their number rounded to the nearest. Tensors
    that are no matrices have entries alone.
    """
    if choice == "randk" or len(shape) != 2:
        return Counts(entries=portion(density, torch.Size(shape).numel()))
    m, n = shape
    if choice == "columns":
        return Counts(columns=portion(density, n))
    if choice == "rows":
        return Counts(rows=portion(density, m))
    left, right = sides(shape, side)
    k = round(density * min(m, n)) if left and right else round(density * (m if left else n))
    return Counts(k if left else None, k if right else None)


def draw_coordinates(counts: Counts, shape: tuple[int, ...], draw: Draw) -> Coordinates:
    """Return distinct coordinates, uniformly drawn and ascending, on the device of the source."""
    m, n = shape if len(shape) == 2 else (0, 0)
    of = (m, n, torch.Size(shape).numel())
    return Coordinates(*(None if k is None else _choose(k, total, draw) for k, total in zip(counts, of, strict=True)))


def _choose(k: int, total: int, draw: Draw) -> Tensor:
    if k >= total:
        return torch.arange(total, device=draw.device)
    order = torch.randperm(total, generator=draw.generator, dtype=list_type(total))  # half the memory where it can
    return order[:k].sort().values.to(draw.device, torch.int64)


def list_type(numbers: int) -> torch.dtype:
    """Return the type in which places among so many numbers are kept."""
    return torch.int32 if numbers < 2**31 else torch.int64


def portion(density: float, total: int) -> int:
    """Return floor(density * total) of the number that was meant: 0.29 of 100 is 29, and not 28.999999999999996."""
    return min(total, int(density * total + 1e-9 * max(1.0, density * total)))
