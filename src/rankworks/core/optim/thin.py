"""Norms of a product P Q of thin factors, P (m, k) and Q (k, n), without forming it: (m + n) k^2 operations.

||P Q||_F^2 = <P^T P, Q Q^T>        ||(P Q)_i||^2 = P_i (Q Q^T) P_i^T
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_norm(P: Tensor, Q: Tensor) -> Tensor:
    """Return ||P Q||_F (), in at least float32."""
    P, Q = _wide(P), _wide(Q)
    return ((P.t() @ P) * (Q @ Q.t())).sum().clamp_min(0).sqrt()


def row_squares(P: Tensor, Q: Tensor) -> Tensor:
    """Return the squared norms of the rows of P Q, (m,), in at least float32."""
    P, Q = _wide(P), _wide(Q)
    return ((P @ (Q @ Q.t())) * P).sum(dim=1).clamp_min(0)


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))
