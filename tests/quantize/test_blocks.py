"""Code books and blockwise quantisation: the published numbers, their properties, and bitsandbytes' own results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankworks.core.errors import ConfigError
from rankworks.quantize import NF4, code_book, dequantise_blocks, quantise_blocks

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(weight: Tensor, book: Tensor, block: int = 64) -> Tensor:
    return dequantise_blocks(quantise_blocks(weight, book, block))


def test_the_published_tables() -> None:
    expected = {
        2: [-1, 0, 0.3379151935, 1],
        3: [-1, -0.4786291600, -0.2171418178, 0, 0.1609301727, 0.3379151935, 0.5626169701, 1],
    }
    for bits, values in expected.items():
        torch.testing.assert_close(code_book("nf", bits), torch.tensor(values).double(), rtol=0, atol=2e-7)
    assert code_book("nf", 4).tolist() == list(NF4)


def test_nf4_is_the_quantiles_it_is_said_to_be() -> None:
    """The generation rule of the paper, to the constants' own rounding."""
    above = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9).double())[:-1]
    below = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8).double())[:-1]
    made = torch.cat([above, below, torch.zeros(1).double()]).sort().values
    torch.testing.assert_close(made / made.max(), torch.tensor(NF4).double(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_other_books(bits: int) -> None:
    nf, integers = code_book("nf", bits), code_book("int", bits)
    assert len(nf) == 2**bits
    assert len(integers) == 2**bits - 1
    for book in (nf, integers):
        assert (book.diff() > 0).all()
        assert (book[0], book[-1]) == (-1, 1)
        assert (book == 0).sum() == 1
    torch.testing.assert_close(integers, -integers.flip(0))


@quick
@given(size=st.integers(1, 300), block=st.sampled_from([1, 7, 32, 64]), scale=st.floats(1e-3, 1e3))
def test_every_weight_goes_to_its_nearest_value(size: int, block: int, scale: float) -> None:
    weight, book = scale * normal(size), code_book("nf", 4).float()
    found = quantise_blocks(weight, book, block)
    back = dequantise_blocks(found)
    for start in range(0, size, block):
        part = weight[start : start + block]
        largest = part.abs().max()
        nearest = (part.unsqueeze(1) - largest * book).abs().min(1).values
        torch.testing.assert_close((back[start : start + block] - part).abs(), nearest, rtol=0, atol=1e-6 * scale * 5)
        assert (back[start : start + block] - part).abs().max() <= largest * (1 - 0.6961928) / 2 * (1 + 1e-5)
        assert back[start : start + block].abs().max() == largest  # exactly itself


@pytest.mark.parametrize(("code", "bits"), [("nf", 4), ("nf", 3), ("int", 4), ("int", 8)])
def test_quantising_twice_changes_nothing(code: str, bits: int) -> None:
    once = there_and_back(normal(33, 47), code_book(code, bits))  # type: ignore[arg-type]
    assert torch.equal(there_and_back(once, code_book(code, bits)), once)  # type: ignore[arg-type]


def test_halfway_takes_the_lower_value_and_zeros_stay() -> None:
    book = code_book("int", 2)  # -1, 0, 1
    assert there_and_back(torch.tensor([1.0, 0.5, -0.5, 0.51]), book).tolist() == [1, 0, -1, 1]
    assert not there_and_back(torch.zeros(5, 9), code_book("nf", 4)).any()


def test_bits_count_the_scales() -> None:
    assert quantise_blocks(normal(64, 64), code_book("nf", 4)).bits == 4.5
    assert quantise_blocks(normal(64, 64), code_book("int", 8), 128).bits == 8.25


def test_normal_data_use_all_codes_and_nf4_beats_integers_on_them() -> None:
    weight = normal(64 * 4000)
    found = quantise_blocks(weight, code_book("nf", 4))
    share = found.codes.bincount(minlength=16) / len(weight)
    assert share.min() > 0.014
    assert share.max() < 0.11
    errors = {}
    for code in ("nf", "int"):
        back = there_and_back(weight, code_book(code, 4))  # type: ignore[arg-type]
        errors[code] = float((((back - weight).reshape(-1, 64) / found.scales.unsqueeze(1)) ** 2).mean())
    assert errors == pytest.approx({"nf": 0.00130, "int": 0.00167}, rel=0.02)


@pytest.mark.parametrize("shape", [(64, 128), (33, 64), (7, 5)])
def test_nf4_is_bitsandbytes_own(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="a development dependency").functional
    weight = 0.02 * normal(*shape)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantise_blocks(weight, code_book("nf", 4))
    assert torch.equal(ours.scales, state.absmax)
    pairs = torch.cat([ours.codes, ours.codes.new_full((ours.codes.numel() % 2,), 7)]).reshape(-1, 2)
    assert torch.equal(
        (pairs[:, 0] << 4 | pairs[:, 1])[: ours.codes.numel() // 2], codes.flatten()[: ours.codes.numel() // 2]
    )
    assert torch.equal(dequantise_blocks(ours), functional.dequantize_4bit(codes, state))


def test_what_is_no_code_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 to 8 bits"):
        code_book("nf", 1)
    with pytest.raises(ConfigError, match="'nf'"):
        code_book("fp", 4)  # type: ignore[arg-type]
