"""watched: see the gradient of a change's matrix, G = dL/d(dW) (out, in), on the way of the backward pass.

    change = dW x        G = sum over what the layer multiplies of dL/dy x^T, one product as large as the layer's own

A rank schedule that scores whole matrices asks for it at some sites in some steps. G exists for one site at a time: it
is made when the gradient of the change arrives, given to `note`, and freed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankworks.core.inputs import Input, linear

Note = Callable[[Tensor], None]


def watched(change: Tensor, x: Input, note: Note) -> Tensor:
    """Return `change` (..., out), a linear function of `x`; when its gradient comes, `note(G)` is called."""
    return _Watched.apply(change, x, note)  # type: ignore[return-value]


class _Watched(torch.autograd.Function):
    """The identity, whose backward pass also forms G."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, x: Any, note: Note) -> Tensor:
        ctx.view = None if isinstance(x, Tensor) else x
        ctx.save_for_backward(x.detach() if isinstance(x, Tensor) else None)
        ctx.note = note
        return change.view_as(change)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            if x is not None:
                ctx.note(g.flatten(0, -2).t() @ x.flatten(0, -2).to(g.dtype))
            else:
                ctx.note(_adjoint(ctx.view, g))
        return g, None, None


def _adjoint(x: Any, g: Tensor) -> Tensor:
    """G (out, in) for patches and one-hot rows: the derivative of <g, linear(x, M)> by M."""
    inputs = x.size if hasattr(x, "size") else x.image.shape[1] * torch.Size(x.module.kernel_size).numel()
    with torch.enable_grad():
        matrix = g.new_zeros(g.shape[-1], inputs, requires_grad=True)
        return torch.autograd.grad(linear(x, matrix), matrix, g.to(x.dtype))[0]
