"""Leading triplets through the Gram matrix: as exact as a float64 SVD at float32's precision, or refused."""

from __future__ import annotations

import pytest
import torch
from test_svd import normal, product, with_spectrum
from torch import Tensor

from rankworks.linalg import randomised_svd, truncated_svd
from rankworks.linalg.gram import leading_triplets

SHAPES = [(90, 70), (70, 90), (80, 80), (300, 40)]  # above and below the size where only some pairs are computed
EPS = torch.finfo(torch.float32).eps


def decaying(m: int, n: int) -> Tensor:
    return with_spectrum(1 + 3 * 0.95 ** torch.arange(min(m, n), dtype=torch.float64), m, n).float()


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_the_triplets_are_those_of_a_float64_svd(m: int, n: int, rank: int) -> None:
    matrix = decaying(m, n)
    found = leading_triplets(matrix, rank)
    assert found is not None
    u, s, vh = found
    exact_u, exact_s, exact_vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(s, exact_s[:rank], rtol=1e-13, atol=0)
    torch.testing.assert_close(product(u, s, vh), product(exact_u[:, :rank], exact_s[:rank], exact_vh[:rank]))
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.mT, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_what_is_left_has_the_next_singular_value_as_its_norm(m: int, n: int) -> None:
    matrix = decaying(m, n)
    u, s, vh = truncated_svd(matrix, 8)
    assert {t.dtype for t in (u, s, vh)} == {torch.float32}
    left = matrix.double() - product(u.double(), s.double(), vh.double())
    exact = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(torch.linalg.matrix_norm(left, 2), exact[8], rtol=8 * EPS, atol=0)
    torch.testing.assert_close(left.square().sum(), exact[8:].square().sum(), rtol=8 * EPS, atol=0)
    torch.testing.assert_close(u.mT @ u, torch.eye(8), rtol=0, atol=8 * EPS)
    torch.testing.assert_close(vh @ vh.mT, torch.eye(8), rtol=0, atol=8 * EPS)
    assert (vh.gather(1, vh.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [6, 30])
def test_beyond_the_matrix_rank_it_is_the_full_svd(m: int, n: int, rank: int) -> None:
    matrix = (normal(m, 5) @ normal(5, n, seed=1)).float()
    assert leading_triplets(matrix, rank) is None
    assert leading_triplets(matrix, 5) is not None
    u, s, vh = truncated_svd(matrix, rank)
    torch.testing.assert_close(u.mT @ u, torch.eye(rank), rtol=0, atol=2e-6)
    torch.testing.assert_close(vh @ vh.mT, torch.eye(rank), rtol=0, atol=2e-6)
    torch.testing.assert_close(product(u, s, vh), matrix, rtol=0, atol=30 * EPS * float(s[0]))


@pytest.mark.parametrize("smallest", [1e-2, 1e-3, 1e-5])
def test_small_singular_values_are_right_or_left_to_the_full_svd(smallest: float) -> None:
    values = torch.cat([torch.tensor([1.0, 0.5, smallest]), torch.full((60,), smallest / 2)]).double()
    matrix = with_spectrum(values, 90, 70).float()
    exact = torch.linalg.svdvals(matrix.double())[:3]
    found = leading_triplets(matrix, 3)
    assert (found is None) == (smallest < 1e-4)
    if found is not None:
        torch.testing.assert_close(found[1], exact, rtol=EPS, atol=0)
        torch.testing.assert_close(found[0].mT @ found[0], torch.eye(3, dtype=torch.float64), rtol=0, atol=EPS)
    torch.testing.assert_close(truncated_svd(matrix, 3)[1].double(), exact, rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("matrix", [torch.eye(80), torch.diag(torch.tensor([2.0] * 20 + [1.0] * 60))])
def test_equal_singular_values_have_orthonormal_vectors(matrix: Tensor) -> None:
    """Of the whole cluster any orthonormal vectors serve, but orthonormal they must be."""
    turn = torch.linalg.qr(normal(80, 80)).Q.float()
    for each in (matrix, turn @ matrix, turn @ matrix @ turn.mT):
        u, s, vh = truncated_svd(each, 8)
        torch.testing.assert_close(s, matrix.diagonal()[:8], rtol=4e-6, atol=0)
        torch.testing.assert_close(u.mT @ u, torch.eye(8), rtol=0, atol=4e-6)
        torch.testing.assert_close(vh @ vh.mT, torch.eye(8), rtol=0, atol=4e-6)
        torch.testing.assert_close(u.mT @ each @ vh.mT, torch.diag(s), rtol=0, atol=4e-6)


def test_zeros_and_numbers_that_are_none_are_left_to_the_full_svd() -> None:
    assert leading_triplets(torch.zeros(80, 70), 4) is None
    assert leading_triplets(torch.full((80, 70), float("nan")), 4) is None
    assert leading_triplets(torch.empty(80, 70, device="meta"), 4) is None
    assert not truncated_svd(torch.zeros(80, 70), 4)[1].any()
    assert [tuple(t.shape) for t in truncated_svd(torch.empty(80, 70, device="meta"), 4)] == [(80, 4), (4,), (4, 70)]


def test_a_float64_matrix_keeps_all_its_digits() -> None:
    values = torch.tensor([1.0, 1e-3, 1e-6, 1e-9, *[1e-11] * 60], dtype=torch.float64)
    _, s, _ = truncated_svd(with_spectrum(values, 90, 70), 4)
    torch.testing.assert_close(s, values[:4], rtol=1e-5, atol=0)


def test_a_tall_matrix_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = decaying(300, 40)
    whole = truncated_svd(matrix, 6)
    monkeypatch.setattr("rankworks.linalg.gram.BLOCK", 40 * 17)
    for a, b in zip(truncated_svd(matrix, 6), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * EPS)


# ---- randomised ----


def test_the_randomised_form_is_as_near_in_float32_as_in_float64() -> None:
    matrix = decaying(90, 70)
    single = randomised_svd(matrix, 8, 4)
    double = randomised_svd(matrix.double(), 8, 4)
    errors = [torch.linalg.matrix_norm(matrix.double() - product(*(t.double() for t in f))) for f in (single, double)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(single[0].mT @ single[0], torch.eye(8), rtol=0, atol=1e-6)


def test_the_randomised_form_of_a_matrix_of_a_smaller_rank_is_orthonormal_and_exact() -> None:
    matrix = (normal(90, 3) @ normal(3, 70, seed=1)).float()
    for each in (matrix, matrix.mT):
        u, s, vh = randomised_svd(each, 8, 4)
        torch.testing.assert_close(u.mT @ u, torch.eye(8), rtol=0, atol=90 * EPS)  # Householder's own bound, m eps
        torch.testing.assert_close(vh @ vh.mT, torch.eye(8), rtol=0, atol=90 * EPS)
        torch.testing.assert_close(product(u, s, vh), each, rtol=0, atol=90 * EPS * float(s[0]))
