"""How far factors are from orthonormal: the regulariser of changes in the form of an SVD.

    released   mean over the factors of ||M||_F          paper   sum over them of ||M||_F^2
    M = A A^T - I for A (r, in)                          M = B^T B - I for B (out, r)

    d||M||_F / dA = 2 M A / ||M||_F,  and 0 at M = 0, where there is none            d||M||_F^2 / dA = 4 M A
    d||M||_F / dB = 2 B M / ||M||_F                                                  d||M||_F^2 / dB = 4 B M

Written out, since autograd of a model's many small products costs several times what these do: one (r, r) matrix per
factor is kept, and no factor is copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Form = Literal["released", "paper"]


def departure(rows: Iterable[Tensor], columns: Iterable[Tensor] = (), form: Form = "released") -> Tensor | None:
    """Return the term () for matrices whose rows, and others whose columns, should be orthonormal; None without any."""
    wide = [matrix for matrix in rows if matrix.numel()]
    tall = [matrix for matrix in columns if matrix.numel()]
    if not wide and not tall:
        return None
    return _Departure.apply(len(wide), form == "paper", *wide, *tall)  # type: ignore[return-value]


class _Departure(torch.autograd.Function):
    """See the module's text: the first `wide` matrices should have orthonormal rows, the others columns."""

    @staticmethod
    def forward(ctx: Any, wide: int, squared: bool, *matrices: Tensor) -> Tensor:
        grams = [m @ m.mT if k < wide else m.mT @ m for k, m in enumerate(matrices)]  # (r, r) each
        for gram in grams:
            gram.diagonal().sub_(1)
        norms = torch.stack([norm.to(grams[0].device) for norm in torch._foreach_norm(grams)])
        ctx.wide, ctx.squared = wide, squared
        ctx.save_for_backward(norms, *grams, *matrices)
        return norms.square().sum() if squared else norms.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        norms, *rest = ctx.saved_tensors
        count = len(norms)
        grams, matrices = rest[:count], rest[count:]
        if ctx.squared:
            factors = (4 * gradients[0]).expand(count)
        else:
            factors = torch.where(norms > 0, 2 * gradients[0] / (count * norms), 0.0)
        slopes = [gram * f.to(gram) for gram, f in zip(grams, factors.unbind(), strict=True)]
        found = [s @ m if k < ctx.wide else m @ s for k, (s, m) in enumerate(zip(slopes, matrices, strict=True))]
        return (None, None, *found)
