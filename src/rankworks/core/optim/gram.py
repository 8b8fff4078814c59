"""The Gram matrix of a factor, F F^T for F (r, n), decomposed: inverses that a vanishing factor does not break.

    F F^T + d I = U diag(l) U^T,   d = damping * mean of its eigenvalues (that is, trace / r)

The damping is relative, so that it means the same at every size of the factors; zero gives the plain inverse. A factor
that is zero altogether has the inverse zero: what its gradients are divided by is zero too, so nothing moves. No value
is read on the way: a GPU is not waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gram(NamedTuple):
    """Eigenvalues (r,), the damping in them, and eigenvectors (r, r) in columns, in at least float32."""

    values: Tensor
    vectors: Tensor

    @property
    def inverse(self) -> Tensor:
        """(F F^T + d I)^-1 (r, r); zero where F is zero."""
        return (self.vectors * reciprocal(self.values)) @ self.vectors.t()


def grams(factors: Sequence[Tensor], damping: float) -> list[Gram]:
    """Return the decomposed Gram matrices of factors F (r, n); of the columns of B for F = B^T.

    Those of one size are decomposed in one call, which is what keeps a GPU busy with matrices so small.
    """
    alike: dict[Any, list[int]] = {}
    for i, F in enumerate(factors):
        alike.setdefault((F.shape[0], F.dtype, F.device), []).append(i)
    found: list[Any] = [None] * len(factors)
    for numbers in alike.values():
        wide = [factors[i].to(torch.promote_types(factors[i].dtype, torch.float32)) for i in numbers]
        values, vectors = torch.linalg.eigh(torch.stack([F @ F.t() for F in wide]))  # (k, r), (k, r, r)
        values = values.clamp_min_(0)
        values = values + damping * values.sum(dim=1, keepdim=True) / max(values.shape[1], 1)
        for place, i in enumerate(numbers):
            found[i] = Gram(values[place], vectors[place])
    return found


def reciprocal(values: Tensor) -> Tensor:
    """Return 1 / values, and 0 where a value is 0."""
    return torch.where(values > 0, 1 / torch.where(values > 0, values, 1.0), 0.0)
