"""The masked layer against its plain form: both derivatives, types, strides, and the start of nothing left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from rankworks.core.kernels.masked import masked_linear


def operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x (needs a gradient), W, b and the mask."""
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((2, 5, 7), (6, 7), (6,)))
    return x.requires_grad_(), W, b, torch.rand(6, 7, generator=generator) > 0.4


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_with_the_masked_weight(bias: bool) -> None:
    x, W, b, kept = operands()
    b = b if bias else None
    torch.testing.assert_close(masked_linear(x, W, b, kept), F.linear(x, W * kept, b))
    assert gradcheck(lambda x: masked_linear(x, W, b, kept), (x,))
    assert gradgradcheck(lambda x: masked_linear(x, W, b, kept), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_nothing_left_out_it_is_the_frozen_layer_to_the_bit(dtype: torch.dtype) -> None:
    x, W, b, kept = operands(dtype)
    assert torch.equal(masked_linear(x, W, b, torch.ones_like(kept)), F.linear(x, W, b))


def test_autocast_computes_in_its_type_and_returns_the_gradient_in_its_own() -> None:
    x, W, b, kept = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, W, b, kept)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, (W * kept).sum(0).expand_as(x), rtol=0.05, atol=0.05)
