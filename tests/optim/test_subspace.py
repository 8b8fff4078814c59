"""Finding the leading subspace of a gradient: exactly, from random probes, from the basis before."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.optim.projection import Basis, Modes, leading_basis
from rankworks.core.optim.subspace import find_basis, find_modes

SHAPES = [(60, 40), (40, 60)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def falling(m: int, n: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall as a gradient's do, like 1 / i."""
    u, v = (torch.linalg.qr(draw(d, min(m, n), seed=seed + i)).Q for i, d in enumerate((m, n)))
    return u / torch.arange(1, min(m, n) + 1) @ v.mT


def lost(G: Tensor, basis: Any) -> float:
    return float((G - basis.back(basis.into(G))).square().sum())


@pytest.mark.parametrize("how", ["warm", "randomised", "svd"])
@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_are_orthonormal_and_nearly_the_best(how: Any, side: Any, shape: Any, dtype: torch.dtype) -> None:
    G = falling(*shape).to(dtype)
    found = find_basis(G, 8, side, how, None, Draw(0, "a"))
    for part in found:
        if part is not None:
            assert part.is_contiguous()
            assert part.dtype == dtype
            error = (part.mT @ part - torch.eye(8, dtype=dtype)).abs().max()
            assert error < 30 * torch.finfo(dtype).eps
    assert lost(G, found) <= 1.05 * lost(G, leading_basis(G, 8, side))


@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_subspace_that_stays_is_found_ever_more_exactly(side: Any, shape: Any) -> None:
    """Per refresh the error falls at least like (s_9 / s_8)^8, the rate of two orthogonal iterations without probes."""
    G, found, errors = falling(*shape), None, []
    best = lost(G, leading_basis(G, 8, side))
    for t in range(10):
        found = find_basis(G, 8, side, "warm", found, Draw(0, f"a:{t}"))
        errors.append(lost(G, found) / best - 1)
    assert all(later <= (8 / 9) ** 8 * earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    exact = leading_basis(G, 8, side)
    for part, other in zip(found or (), exact, strict=True):
        if part is not None and other is not None:
            aligned = (part * other).sum(0).abs()
            torch.testing.assert_close(aligned, torch.ones_like(aligned), atol=1e-4, rtol=0)


def test_columns_keep_their_signs_where_the_subspace_goes_on() -> None:
    G = falling(60, 40)
    old = Basis(None, -find_basis(G, 8, "right", "svd").Q)  # type: ignore[operator]
    moved = find_basis(G + 1e-4 * draw(60, 40, seed=9), 8, "right", "warm", old, Draw(0, "b"))
    assert old.Q is not None
    assert moved.Q is not None
    assert bool(((old.Q * moved.Q).sum(0) > 0.9).all())


def test_an_old_basis_orthogonal_to_the_gradient_is_left_behind() -> None:
    G = torch.zeros(60, 40, dtype=torch.float64)
    G[:, :20] = falling(60, 20)
    blind = Basis(None, torch.eye(40, dtype=torch.float64)[:, 20:28].contiguous())
    assert lost(G, blind) == pytest.approx(float(G.square().sum()))
    once = find_basis(G, 8, "right", "warm", blind, Draw(0, "c"))
    twice = find_basis(G, 8, "right", "warm", once, Draw(0, "d"))
    assert lost(G, twice) < lost(G, once) < lost(G, blind)
    assert lost(G, find_basis(G, 8, "right", "warm", twice, Draw(0, "e"))) < 1.05 * lost(
        G, leading_basis(G, 8, "right")
    )


@pytest.mark.parametrize("how", ["warm", "randomised", "svd"])
@pytest.mark.parametrize("side", ["std", "full"])
def test_gradients_of_zeros_and_of_low_rank_give_bases(how: Any, side: Any) -> None:
    for G in (torch.zeros(30, 20), draw(30, 2).float() @ draw(2, 20, seed=1).float()):
        found = find_basis(G, 6, side, how, None, Draw(0, "z"))
        found = find_basis(G, 6, side, how, found, Draw(0, "y"))
        for part in found:
            if part is not None:
                torch.testing.assert_close(part.mT @ part, torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.back(found.into(G)), G, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["warm", "randomised"])
def test_the_rank_may_be_all_there_is(how: Any) -> None:
    G = draw(12, 8)
    found = find_basis(G, 99, "full", how)
    torch.testing.assert_close(found.back(found.into(G)), G, atol=1e-12, rtol=0)


def test_draws_depend_on_what_they_are_made_from_alone() -> None:
    G = draw(30, 20)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        before = torch.get_rng_state()
        one = find_basis(G, 4, "std", "randomised", None, Draw(0, "w:1")).Q
        assert torch.equal(before, torch.get_rng_state())
    same, other = (find_basis(G, 4, "std", "randomised", None, Draw(0, name)).Q for name in ("w:1", "w:2"))
    assert one is not None
    assert same is not None
    assert other is not None
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_gradients_in_bfloat16_have_bases_in_bfloat16() -> None:
    found = find_basis(draw(30, 20).bfloat16(), 4, "std", "warm")
    assert found.Q is not None
    assert found.Q.dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["warm", "randomised", "svd"])
def test_a_tensor_is_projected_along_every_dimension_longer_than_the_rank(how: Any) -> None:
    G = draw(12, 7, 3, 3)
    found = find_modes(G, 4, how)
    assert [None if U is None else tuple(U.shape) for U in found.factors] == [(12, 4), (7, 4), None, None]
    assert found.into(G).shape == (4, 4, 3, 3)
    assert found.back(found.into(G)).shape == G.shape
    bound = sum(
        float(torch.linalg.svdvals(G.movedim(i, 0).reshape(G.shape[i], -1))[4:].square().sum()) for i in range(2)
    )
    assert lost(G, found) <= 1.2 * bound, "the truncated higher-order SVD loses at most what its unfoldings lose"


def test_a_tensor_of_a_matrix_is_the_matrix_on_both_sides() -> None:
    G = draw(9, 7)
    matrix, tensor = leading_basis(G, 3, "full"), find_modes(G[..., None], 3, "svd")
    wanted = matrix.back(matrix.into(G))
    torch.testing.assert_close(tensor.back(tensor.into(G[..., None]))[..., 0], wanted, atol=1e-12, rtol=0)


def test_a_tensor_with_all_its_rank_loses_nothing() -> None:
    G = draw(5, 4, 3)
    assert find_modes(G, 9).factors == (None, None, None)
    assert torch.equal(Modes((None, None, None)).into(G), G)
