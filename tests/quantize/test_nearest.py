"""The nearest value of a book: a look-up gives what a search gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankworks.core.codes import nearest as module
from rankworks.core.codes.books import code_book, dynamic_book
from rankworks.core.codes.nearest import nearest

BOOKS = {
    "nf4": code_book("nf", 4).float(),
    "nf8": code_book("nf", 8).float(),
    "int8": code_book("int", 8).float(),
    "signed": dynamic_book(True),
    "unsigned": dynamic_book(False),
}


def searched(x: Tensor, book: Tensor) -> Tensor:
    return torch.bucketize(x, (book[1:] + book[:-1]) / 2).to(torch.uint8)


@pytest.mark.parametrize("name", BOOKS)
def test_it_is_the_search_for_every_kind_of_number(name: str) -> None:
    book = BOOKS[name]
    middles = (book[1:] + book[:-1]) / 2
    draw = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    around = [torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0)]
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38])
    x = torch.cat([draw, draw**9, 10 ** (-8 * draw.abs()), middles, *around, book, special]).clamp(-1, 1)
    assert module._table(tuple(middles.tolist()), x.device) is not None, "this book is looked up"
    assert torch.equal(nearest(x, book), searched(x, book))


def test_a_book_with_two_middles_to_a_key_is_searched() -> None:
    book = torch.tensor([-1.0, 0.5, 0.5001, 0.5002, 1.0])
    x = torch.linspace(-1, 1, 5000)
    assert module._table(tuple(((book[1:] + book[:-1]) / 2).tolist()), x.device) is None
    assert torch.equal(nearest(x, book), searched(x, book))


def test_what_is_not_contiguous_is_read_in_its_order() -> None:
    x = torch.linspace(-1, 1, 8000)[::2]
    assert torch.equal(nearest(x, dynamic_book(True)), searched(x, dynamic_book(True)))
