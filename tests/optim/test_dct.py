"""The cosine basis: orthonormal, one for each size, the same by a product and by an FFT; the best columns of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rankworks.core.optim import dct
from rankworks.core.optim.dct import (
    Columns,
    basis_matrix,
    basis_rows,
    best_columns,
    chosen_route,
    moved_columns,
    scores,
    select,
    transformed,
)
from rankworks.core.optim.projection import leading_basis

CPU = torch.device("cpu")
KINDS: Any = ["dct2", "dct3"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def Q(size: int, kind: Any = "dct2") -> Tensor:
    """The basis by its definition, vectors as columns."""
    D = torch.empty(size, size, dtype=torch.float64)
    for i, j in itertools.product(range(size), repeat=2):
        c = (1 / size) ** 0.5 if i == 0 else (2 / size) ** 0.5
        D[i, j] = c * torch.cos(torch.tensor(i * (2 * j + 1) * torch.pi / (2 * size), dtype=torch.float64))
    return D.t() if kind == "dct2" else D


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_basis_is_the_formula(size: int, kind: Any) -> None:
    torch.testing.assert_close(basis_matrix(size, torch.float64, CPU, kind).t(), Q(size, kind), atol=1e-14, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("size", [1, 2, 3, 64, 257])
def test_the_basis_is_orthonormal(size: int, dtype: torch.dtype, near: float, kind: Any) -> None:
    D = basis_matrix(size, dtype, CPU, kind)
    torch.testing.assert_close((D @ D.t()).double(), torch.eye(size, dtype=torch.float64), atol=near, rtol=0)


def test_there_is_one_basis_for_each_size_and_type() -> None:
    assert basis_matrix(8, torch.float32, CPU) is basis_matrix(8, torch.float32, CPU)
    assert basis_matrix(8, torch.float32, CPU) is not basis_matrix(9, torch.float32, CPU)
    assert basis_matrix(8, torch.float64, CPU).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 16, 31, 100])
def test_makhoul_is_the_product(size: int, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X = draw(7, size)
    for numbers in (1 << 20, 2 * size):  # in one piece, and two rows at a time
        monkeypatch.setitem(dct.NUMBERS, "cpu", numbers)
        for form in (X, X.t().contiguous().t()):
            torch.testing.assert_close(transformed(form, kind, "fft"), X @ Q(size, kind), atol=1e-13, rtol=0)
    torch.testing.assert_close(transformed(X, kind, "matmul"), X @ Q(size, kind), atol=1e-13, rtol=0)


def test_half_types_are_transformed_in_float32() -> None:
    X = draw(5, 12).bfloat16()
    S = transformed(X, "dct2", "fft")
    assert S.dtype == torch.float32
    torch.testing.assert_close(S.double(), X.double() @ Q(12), atol=1e-6, rtol=1e-5)
    assert select(X, 3, right=True, route="fft").R.dtype == torch.bfloat16


def test_the_route_goes_by_size_and_device() -> None:
    assert chosen_route(511, CPU) == "matmul"
    assert chosen_route(512, CPU) == "fft"
    assert chosen_route(4096, torch.device("cuda")) == "matmul"
    assert chosen_route(4096, CPU, "matmul") == "matmul"


@pytest.mark.parametrize("route", ["matmul", "fft"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("right", [True, False])
def test_selection_takes_the_columns_of_largest_norm(right: bool, norm: int, kind: Any, route: Any) -> None:
    G = draw(9, 6) if right else draw(6, 9)
    kept = G.clone()
    index, R = select(G, 2, right, norm, kind, route)
    similar = G @ Q(6, kind) if right else Q(6, kind).t() @ G
    ranked = torch.linalg.vector_norm(similar, norm, dim=0 if right else 1).argsort(descending=True)[:2]
    assert index.dtype == torch.int32
    assert index.tolist() == sorted(ranked.tolist())
    part = Q(6, kind)[:, index]
    torch.testing.assert_close(R, G @ part if right else part.t() @ G, atol=1e-13, rtol=0)
    assert R.is_contiguous()
    assert torch.equal(G, kept)


def test_the_l2_norm_chooses_the_best_columns_and_what_is_lost_is_theirs() -> None:
    """Brute force over all choices; and the contraction: at most 1 - r/S of the square is lost."""
    for seed in range(5):
        G = draw(7, 6, seed=seed)
        losses = {}
        for chosen in itertools.combinations(range(6), 3):
            part = Q(6)[:, list(chosen)]
            losses[chosen] = float((G - G @ part @ part.t()).square().sum())
        index, R = select(G, 3, True, 2)
        part = Q(6)[:, index]
        lost = (G - R @ part.t()).square().sum()
        assert float(lost) == pytest.approx(min(losses.values()), abs=1e-12)
        assert tuple(index.tolist()) == min(losses, key=lambda c: losses[c])
        discarded = [j for j in range(6) if j not in index.tolist()]
        torch.testing.assert_close(lost, (G @ Q(6))[:, discarded].square().sum(), atol=1e-12, rtol=0)
        assert float(lost) <= (1 - 3 / 6) * float(G.square().sum())


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_of_r_outer_products_is_projected_exactly(kind: Any, norm: int) -> None:
    G = draw(9, 3) @ Q(8, kind)[:, [1, 4, 6]].t()
    index, R = select(G, 3, True, norm, kind)
    assert index.tolist() == [1, 4, 6]
    torch.testing.assert_close(R @ basis_rows(index, 8, R, kind), G, atol=1e-13, rtol=0)


def test_at_full_rank_nothing_is_lost() -> None:
    for shape in ((7, 4), (4, 7), (5, 5)):
        G = draw(*shape)
        index, R = select(G, 99, shape[0] >= shape[1])
        assert index.tolist() == list(range(min(shape)))
        rows = basis_rows(index, min(shape), R)
        back = R @ rows if shape[0] >= shape[1] else rows.t() @ R
        torch.testing.assert_close(back, G, atol=1e-13, rtol=0)


def test_the_work_of_a_selection_does_not_depend_on_the_rank() -> None:
    G = draw(20, 16).float()
    counts = []
    for rank in (1, 16):
        with FlopCounterMode(display=False) as counter:
            select(G, rank, True, route="matmul")
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 20 * 16 * 16


def test_scores_add_up_over_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    S = draw(50, 4)
    monkeypatch.setitem(dct.NUMBERS, "cpu", 12)
    torch.testing.assert_close(scores(S, 1), S.abs().sum(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(scores(S, 2), S.square().sum(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("right", [True, False])
def test_moving_columns_is_the_rotation(right: bool) -> None:
    """Rm = Q_old^T Q_new is a partial permutation; |v Rm| too, since moved second moments stay what they are."""
    old, new = torch.tensor([0, 2, 3, 7], dtype=torch.int32), torch.tensor([1, 2, 7, 9], dtype=torch.int32)
    Rm = Q(10)[:, old].t() @ Q(10)[:, new]
    rounded = Rm.round()
    torch.testing.assert_close(Rm, rounded, atol=1e-13, rtol=0)
    assert rounded.sum(0).tolist() == [0, 1, 1, 0]
    assert rounded.sum(1).tolist() == [0, 1, 0, 1]
    m = draw(5, 4) if right else draw(4, 5)
    torch.testing.assert_close(moved_columns(m, old, new, right), m @ Rm if right else Rm.t() @ m, atol=1e-12, rtol=0)
    v = m.square()
    torch.testing.assert_close(
        moved_columns(v, old, new, right), (v @ Rm if right else Rm.t() @ v).abs(), atol=1e-12, rtol=0
    )


def test_what_is_lost_is_zero_even_if_it_was_not_finite() -> None:
    m = torch.tensor([[float("inf"), 1.0]])
    moved = moved_columns(m, torch.tensor([0, 5]), torch.tensor([5, 6]), True)
    assert moved.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_best_columns_stand_where_singular_vectors_would(shape: Any, side: Any) -> None:
    G = draw(*shape)
    columns = best_columns(G, 2, side)
    basis, singular = columns.basis(G), leading_basis(G, 2, side)
    for part, other in zip(basis, singular, strict=True):
        assert (part is None) == (other is None)
        if part is not None and other is not None:
            assert part.shape == other.shape
            torch.testing.assert_close(part.t() @ part, torch.eye(2, dtype=G.dtype), atol=1e-13, rtol=0)
    one = [index for index in columns if index is not None]
    assert all(index.dtype == torch.int32 and index.numel() == 2 for index in one)


def test_columns_are_a_basis_again_from_indices_alone() -> None:
    basis = Columns(None, torch.tensor([3, 0], dtype=torch.int32)).basis(draw(9, 6))
    assert basis.P is None
    assert basis.Q is not None
    torch.testing.assert_close(basis.Q, Q(6)[:, [3, 0]], atol=1e-14, rtol=0)
