"""The hand-written pass of a layer with a sparse change, and the choice of entries, against their plain forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from rankworks.core.kernels import add_entries, sparse_linear
from rankworks.linalg.select import kth_largest, top_entries


def case(turned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = draw(7, 5).t() if turned else draw(5, 7)
    index = torch.tensor([0, 3, 8, 20, 34], dtype=torch.int32)
    return draw(2, 3, 7).requires_grad_(), weight, draw(5), index, draw(5).requires_grad_()


def plain(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, values: Tensor) -> Tensor:
    change = torch.zeros(35, dtype=torch.float64).index_add(0, index, values).reshape(5, 7)
    return F.linear(x, weight + change, bias)


@pytest.mark.parametrize("turned", [False, True])
def test_it_is_the_plain_form_with_its_gradients(turned: bool) -> None:
    x, weight, bias, index, values = case(turned)
    ours, theirs = sparse_linear(x, weight, bias, index, values), plain(x, weight, bias, index, values)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, (x, values), g) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("turned", [False, True])
def test_first_and_second_derivatives(turned: bool) -> None:
    x, weight, bias, index, values = case(turned)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        return sparse_linear(x, weight, bias, index, values)

    assert gradcheck(layer, (x, values))
    assert gradgradcheck(layer, (x, values))


def test_adding_keeps_the_layout_and_the_weight() -> None:
    _, weight, _, index, values = case(True)
    before = weight.clone()
    added = add_entries(weight, index, values)
    assert added.stride() == weight.stride()
    assert torch.equal(weight, before)


def test_the_top_entries_of_successive_ranges_share_none_and_are_the_sorted_order() -> None:
    scores = torch.tensor([1.0, 3, 3, 2, 3, 0, 2, 2])
    order = sorted(range(8), key=lambda i: (-float(scores[i]), i))
    for k in range(1, 9):
        for skip in range(9 - k):
            assert top_entries(scores, k, skip).tolist() == sorted(order[skip : skip + k])
    assert kth_largest(scores, 3) == 3
    assert kth_largest(scores, 4) == 2
