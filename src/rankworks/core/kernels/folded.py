"""A frozen linear layer and a change L A behind a frozen A: y = x (W + L A)^T + b, with L A added into the weight.

x (t, in), W (out, in), b (out,), L (out, r) trained or made of what is, A (r, in) frozen and given by what it does:

    project(x) = A x (t, r)            added(W, L) = W + L A (out, in)

    forward     y = x W'^T + b,  W' = added(W, L)
    backward    dL/dx = g W',  W' formed again        dL/dL = g^T project(x)

With t tokens that costs, besides the two products that the frozen layer needs too, 2 r in out multiply-adds to form W'
twice and t r (in + out) for the gradient of L; applying L and A to every token costs t r (2 in + 3 out). Nothing of the
size of an output is touched a second time. Between the passes the layer keeps its input, which its neighbours keep too,
or how it was made (`recall`).

In a 16-bit type W + L A would swallow a change that is small beside W, so this is for 32 bits and more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankworks.core.kernels.mode import compute_dtype, laid_out_like, no_autocast
from rankworks.core.kernels.recall import maker, recall
from rankworks.linalg.thin import thin

Project = Callable[[Tensor], Tensor]
Added = Callable[[Tensor, Tensor], Tensor]


def folds(x: Tensor, out: int) -> bool:
    """Whether it is the cheaper way for x (..., in): exact enough, and tokens enough for W' to pay."""
    if compute_dtype(x).itemsize < 4:
        return False
    in_ = x.shape[-1]
    tokens = x.numel() // max(1, in_)
    if torch.is_grad_enabled():
        return tokens * (in_ + 2 * out) > 2 * in_ * out
    return tokens * (in_ + out) > in_ * out


def folded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, L: Tensor, project: Project, added: Added) -> Tensor:
    """Return x (weight + L A)^T + bias: (..., in) -> (..., out). weight and bias are frozen; call it where `folds`."""
    with no_autocast(x):
        cast = x.to(compute_dtype(x))
        return _Folded.apply(cast, weight.to(cast.dtype), bias, L.to(cast.dtype), project, added)  # type: ignore[return-value]


class _Folded(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, L: Tensor, project: Project, added: Added
    ) -> Tensor:
        ctx.maker = maker(x)  # what autograd keeps the makings of is not kept again
        ctx.save_for_backward(None if ctx.maker is not None else x, weight, L)
        ctx.project, ctx.added = project, added
        return F.linear(x, laid_out_like(added(weight, L), weight), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients  # (..., out)
        x, weight, L = ctx.saved_tensors
        with no_autocast(g):
            of_x = g @ ctx.added(weight, L) if ctx.needs_input_grad[0] else None
            of_L = None
            if ctx.needs_input_grad[3]:
                h = ctx.project(x if ctx.maker is None else recall(ctx.maker)).flatten(0, -2)  # (t, r)
                of_L = thin(h.t(), g.flatten(0, -2).t()).t()  # h^T g reads g along its rows
        return of_x, None, None, of_L, None, None
