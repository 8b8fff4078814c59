"""A layer's output as if its weight had noise: y + x E^T with E = diag(tau) Z, Z ~ N(0, 1) drawn from a seed.

Z (out, in) is drawn for the forward pass and again for the backward pass, where dL/dx += g E; between the two nothing
of its size is kept, and no gradient goes to tau. Drawn on the device where x is: there a seed gives the same numbers in
every process and when a layer is recomputed, on another kind of device it gives others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankworks.core.kernels.mode import no_autocast, sees_through, wants_gradient


def noise(tau: Tensor, inputs: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return E (out, in) in a floating type, from tau (out,)."""
    generator = torch.Generator(tau.device).manual_seed(seed)
    Z = torch.randn(len(tau), inputs, generator=generator, device=tau.device, dtype=dtype)
    return Z.mul_(tau.to(dtype).unsqueeze(1))


def add_noise(y: Tensor, x: Tensor, tau: Tensor, seed: int) -> Tensor:
    """Return y (..., out) + x (..., in) E^T. y is used up where nobody looks through the operation."""
    if sees_through():
        return y + F.linear(x.to(y.dtype), noise(tau, x.shape[-1], seed, y.dtype))
    if wants_gradient(y, x):
        return _AddNoise.apply(y, x, tau, seed)  # type: ignore[return-value]
    return _add(y.clone(), x, tau, seed)


def _add(y: Tensor, x: Tensor, tau: Tensor, seed: int) -> Tensor:
    with no_autocast(y):
        E = noise(tau, x.shape[-1], seed, y.dtype)
        y.view(-1, y.shape[-1]).addmm_(x.to(y.dtype).reshape(-1, x.shape[-1]), E.t())
    return y


class _AddNoise(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, tau: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.seed, ctx.shape, ctx.dtype = seed, x.shape, x.dtype
        if not y.is_contiguous() or not y.requires_grad:  # what needs none may be somebody's own
            return _add(y.clone(memory_format=torch.contiguous_format), x, tau, seed)
        ctx.mark_dirty(y)
        return _add(y, x, tau, seed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        (tau,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return g, None, None, None
        with no_autocast(g):
            E = noise(tau, ctx.shape[-1], ctx.seed, g.dtype)
            return g, (g.reshape(-1, g.shape[-1]) @ E).view(ctx.shape).to(ctx.dtype), None, None
