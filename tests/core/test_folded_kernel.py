"""The folded layer: y = x (W + L A)^T + b, against the plain form, its derivatives, and when it is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankworks as rw
from rankworks.core.kernels import folded_linear, folds


def parts(t: int = 9, out: int = 5, in_: int = 6, r: int = 2) -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = [(t, in_), (out, in_), (out,), (out, r), (r, in_)]
    x, W, b, L, A = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    return x, W, b, L, A


def run(x, W, b, L, A):
    return folded_linear(x, W, b, L, lambda x: x @ A.t(), lambda W, L: torch.addmm(W, L, A))


def test_it_is_the_layer_with_the_product() -> None:
    x, W, b, L, A = parts()
    torch.testing.assert_close(run(x, W, b, L, A), x @ W.t() + b + x @ A.t() @ L.t(), atol=1e-12, rtol=0)


def test_its_derivatives_are_derivatives_also_the_second() -> None:
    x, W, b, L, A = parts(t=4)
    x.requires_grad_(), L.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, L: run(x, W, b, L, A), (x, L))
    assert torch.autograd.gradgradcheck(lambda x, L: run(x, W, b, L, A), (x, L))


def test_no_change_is_no_change_to_the_bit() -> None:
    x, W, b, L, A = (t.float() for t in parts())
    assert torch.equal(run(x, W, b, torch.zeros_like(L), A), F.linear(x, W, b))


def test_an_input_that_is_a_product_is_made_again_and_not_kept() -> None:
    """Its factors are kept by the product itself; the gradients are the same."""
    x, W, b, L, A = parts()
    u = torch.rand_like(x).requires_grad_()
    x.requires_grad_(), L.requires_grad_()
    y = run(x * u, W, b, L, A)
    y.square().sum().backward()
    wanted = torch.autograd.grad((((x * u) @ (W + L @ A).t() + b).square()).sum(), [x, u, L])
    for tensor, gradient in zip((x, u, L), wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, atol=1e-11, rtol=0)


def test_it_is_chosen_for_many_tokens_and_never_in_16_bits() -> None:
    assert folds(torch.randn(512, 64), 64)
    assert not folds(torch.randn(3, 64), 64)
    assert not folds(torch.randn(512, 64, dtype=torch.bfloat16), 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert not folds(torch.randn(512, 64), 64)


@pytest.mark.parametrize("key", ["vera", "bone"])
def test_a_delta_gives_the_same_output_and_gradients_either_way(key: str) -> None:
    """Token by token the factors serve, all tokens at once are folded."""
    model = nn.Sequential(nn.Linear(12, 8)).double()
    rw.adapt(model, key, targets="0", rank=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    x = torch.randn(64, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ends = []
    for pieces in (1, 64):
        model.zero_grad()
        outputs = torch.cat([model(part) for part in x.chunk(pieces)])
        outputs.square().sum().backward()
        ends.append([outputs.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
