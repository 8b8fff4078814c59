"""A layer whose change is a whole matrix D (out, in): one product with the changed weight, and D formed twice.

    y = (W + D) x + b        D = build(W), a function of the trained tensors t

Plain autograd multiplies x by W and by D apart and keeps D, and whatever D was made of, of every layer until the
backward pass. Here the two are added first, and the backward pass forms D again:

    dL/dx = (W + D)^T g        dL/dD = sum over tokens of g x^T        dL/dt = (dD/dt)^T dL/dD   by autograd, of build

so that between the passes a layer holds its input and nothing of the weight's size. W and b get no gradient; a call
that needs one takes the plain form. The derivative of the backward pass itself is taken of the same formulas.

In a 16-bit type W + D would swallow a D that is small beside W, so there the two products stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankworks.core.kernels.mode import compute_dtype, laid_out_like, no_autocast, sees_through, wants_gradient

Build = Callable[[Tensor], Tensor]


def whole_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, build: Build, trained: Sequence[Tensor], whole: Build | None = None
) -> Tensor:
    """Return x (weight + build(weight))^T + bias: (..., in) -> (..., out).

    `trained` are the parameters that `build` reads; it must be a pure function of them and of `weight` (out, in).
    `whole` may give weight + build(weight) in fewer passes than the sum takes.
    """
    changed = whole if whole is not None else (lambda weight: weight + build(weight).to(weight.dtype))
    if _fits(x, weight, bias, trained):
        cast = x.to(compute_dtype(x))
        with no_autocast(x):
            return _Whole.apply(cast, weight, bias, build if _narrow(cast) else changed, *trained)
    if _narrow(x) or _narrow(weight):
        return F.linear(x, weight, bias) + F.linear(x, build(weight).to(x.dtype))
    return F.linear(x, laid_out_like(changed(weight), weight), bias)


def _narrow(tensor: Tensor) -> bool:
    return compute_dtype(tensor).itemsize < 4


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, trained: Sequence[Tensor]) -> bool:
    """Whether the hand-written pass may run: parameters of their own (not a functional call's), the base frozen."""
    if sees_through() or wants_gradient(weight, bias) or not wants_gradient(x, *trained):
        return False
    return all(isinstance(t, nn.Parameter) for t in trained)


class _Whole(torch.autograd.Function):
    """x (..., in), weight (out, in), bias (out,) or None, build, and the trained tensors.

    `build` gives W + D, and in a 16-bit type D alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, build: Build, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.build, ctx.trained = build, trained
        ctx.versions = [t._version for t in trained]
        shift = None if bias is None else bias.to(x.dtype)
        if _narrow(x):
            return F.linear(x, weight.to(x.dtype), shift) + F.linear(x, build(weight).to(x.dtype))
        return F.linear(x, laid_out_like(build(weight.to(x.dtype)), weight), shift)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients  # (..., out)
        x, weight = ctx.saved_tensors
        if [t._version for t in ctx.trained] != ctx.versions:
            raise RuntimeError("a trained tensor was changed in place between the forward and the backward pass")
        again = torch.is_grad_enabled()
        with torch.enable_grad(), no_autocast(x):
            # (out, in), a function of the trained tensors
            change = ctx.build(weight if _narrow(x) else weight.to(x.dtype))
        of_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            made = (change if again else change.detach()).to(x.dtype)
            of_x = g @ weight.to(x.dtype) + g @ made if _narrow(x) else g @ made
        wanted = [t for t, needed in zip(ctx.trained, ctx.needs_input_grad[4:], strict=True) if needed]
        found: list[Tensor | None] = [None] * len(ctx.trained)
        if wanted and change.requires_grad:
            of_change = (g.flatten(0, -2).t() @ x.flatten(0, -2)).to(change.dtype)  # (out, in)
            parts = iter(torch.autograd.grad(change, wanted, of_change, allow_unused=True, create_graph=again))
            found = [next(parts) if needed else None for needed in ctx.needs_input_grad[4:]]
        return of_x, None, None, None, *found
