"""How far factors are from orthonormal: the regulariser of changes in the form of an SVD.

    released   mean over the matrices of ||X X^T - I||_F          paper   sum over them of ||X X^T - I||_F^2

X is A (r, in) or B^T (r, out). Matrices of one shape are taken together, so a model costs as many products as it has
shapes. The norm's gradient at 0, where it has none, is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Form = Literal["released", "paper"]


def departure(matrices: Iterable[Tensor], form: Form = "released") -> Tensor | None:
    """Return the term () for matrices (r, n) whose rows should be orthonormal, or None where there are none."""
    groups: dict[tuple, list[Tensor]] = {}
    for matrix in matrices:
        if matrix.numel():
            groups.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(matrix)
    norms: list[Tensor] = []
    for same in groups.values():
        X = torch.stack(same)  # (matrices, r, n)
        gram = X @ X.mT
        norms.append(torch.linalg.vector_norm(gram - torch.eye(gram.shape[-1]).to(gram), dim=(1, 2)))
    if not norms:
        return None
    every = torch.cat([n.to(norms[0].device) for n in norms])
    return every.mean() if form == "released" else every.square().sum()
