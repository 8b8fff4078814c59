"""The Gram matrix of a factor, F F^T for F (r, n), decomposed: inverses that a vanishing factor does not break.

    F F^T + d I = U diag(l) U^T,   d = damping * mean of its eigenvalues (that is, trace / r)

The damping is relative, so that it means the same at every size of the factors; zero gives the plain inverse. A factor
that is zero altogether has the inverse zero: what its gradients are divided by is zero too, so nothing moves. No value
is read on the way: a GPU is not waited for.
"""

from __future__ import annotations

from typing import NamedTuple

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


def gram(F: Tensor, damping: float) -> Gram:
    """Return the decomposed Gram matrix of F (r, n); of the columns of B for F = B^T."""
    F = F.to(torch.promote_types(F.dtype, torch.float32))
    values, vectors = torch.linalg.eigh(F @ F.t())
    values = values.clamp_min(0)
    return Gram(values + damping * values.sum() / max(len(values), 1), vectors)


def reciprocal(values: Tensor) -> Tensor:
    """Return 1 / values, and 0 where a value is 0."""
    return torch.where(values > 0, 1 / torch.where(values > 0, values, 1.0), 0.0)
