"""Truncated SVDs: exact, randomised and of a product, with one convention for signs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankworks.linalg import fix_signs, randomised_svd, svd_of_product, truncated_svd

sizes = st.integers(1, 12)
quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def product(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    return (u * s) @ vh


def with_spectrum(values: Tensor, m: int, n: int) -> Tensor:
    """A matrix (m, n) with these singular values and random singular vectors."""
    k = len(values)
    return (torch.linalg.qr(normal(m, k)).Q * values) @ torch.linalg.qr(normal(n, k, seed=1)).Q.t()


def check_form(u: Tensor, s: Tensor, vh: Tensor) -> None:
    """Orthonormal vectors, descending values, and the sign convention."""
    eye = torch.eye(len(s), dtype=s.dtype)
    torch.testing.assert_close(u.t() @ u, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(vh @ vh.t(), eye, rtol=0, atol=1e-10)
    assert (s.diff() <= 1e-12).all()
    assert (vh.gather(1, vh.abs().argmax(1, keepdim=True)) > 0).all()


# ---- exact ----


@quick
@given(m=sizes, n=sizes, data=st.data())
def test_the_error_of_the_truncation_is_what_it_left_out(m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    matrix = normal(m, n)
    u, s, vh = truncated_svd(matrix, rank)
    check_form(u, s, vh)
    left_out = torch.linalg.svdvals(matrix)[rank:]
    error = torch.linalg.matrix_norm(matrix - product(u, s, vh))
    torch.testing.assert_close(error, left_out.norm(), rtol=1e-10, atol=1e-10)


def test_no_other_matrix_of_the_rank_is_nearer() -> None:
    matrix = normal(9, 7)
    best = torch.linalg.matrix_norm(matrix - product(*truncated_svd(matrix, 3)))
    for seed in range(20):
        A = normal(3, 7, seed=seed)
        B = torch.linalg.lstsq(A.t(), matrix.t()).solution.t()  # the best B for this A
        assert torch.linalg.matrix_norm(matrix - B @ A) > best


def test_the_sign_convention_survives_a_change_of_sign() -> None:
    matrix = normal(9, 7)
    one, two = truncated_svd(matrix, 4), truncated_svd(-matrix, 4)
    torch.testing.assert_close(one[2], two[2])
    torch.testing.assert_close(one[0], -two[0])


def test_fixing_signs_does_not_change_the_product() -> None:
    u, vh = normal(5, 3), normal(3, 4, seed=1)
    fixed_u, fixed_vh = fix_signs(u, vh)
    torch.testing.assert_close(fixed_u @ fixed_vh, u @ vh)


def test_fixing_the_signs_of_nothing_gives_nothing() -> None:
    u, vh = fix_signs(torch.zeros(5, 0), torch.zeros(0, 4))
    assert (u.shape, vh.shape) == ((5, 0), (0, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_matrix_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    matrix = normal(9, 7).to(dtype)
    for u, s, vh in (
        truncated_svd(matrix, 7),
        randomised_svd(matrix, 7),
        svd_of_product(matrix, torch.eye(7, dtype=dtype)),
    ):
        assert {t.dtype for t in (u, s, vh)} == {torch.float32}
        torch.testing.assert_close(product(u, s, vh), matrix.float(), rtol=0, atol=1e-5)


# ---- randomised ----


@quick
@given(m=sizes, n=sizes)
def test_with_as_many_test_vectors_as_the_rank_it_is_exact(m: int, n: int) -> None:
    matrix = normal(m, n)
    u, s, vh = randomised_svd(matrix, min(m, n))
    check_form(u, s, vh)
    torch.testing.assert_close(product(u, s, vh), matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40)])
def test_it_is_exact_on_a_matrix_of_the_rank(m: int, n: int) -> None:
    matrix = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), m, n)
    torch.testing.assert_close(product(*randomised_svd(matrix, 3, iterations=0)), matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40)])
def test_each_iteration_gains_the_squared_ratio_across_the_gap(m: int, n: int) -> None:
    """The subspace's error shrinks as (sigma_{r+1} / sigma_r)^(2 q): here by 9 with each of q iterations."""
    values = torch.tensor([4.0, 3.5, 3.0, *[1.0] * 12], dtype=torch.float64)
    matrix = with_spectrum(values, m, n)
    exact = product(*truncated_svd(matrix, 3))
    errors = [float((product(*randomised_svd(matrix, 3, iterations=q)) - exact).norm()) for q in range(2, 8)]
    assert all(6 < before / after < 14 for before, after in pairwise(errors))


def test_it_never_beats_the_exact_one_and_oversampling_brings_it_nearer() -> None:
    matrix = with_spectrum(torch.linspace(2, 1, 30, dtype=torch.float64), 40, 30)
    best = torch.linalg.matrix_norm(matrix - product(*truncated_svd(matrix, 5)))
    errors = [
        torch.linalg.matrix_norm(matrix - product(*randomised_svd(matrix, 5, iterations=1, oversample=p)))
        for p in (0, 10, 20)
    ]
    assert errors[0] > errors[1] > errors[2] > best - 1e-12


def test_many_iterations_do_not_lose_the_small_singular_values() -> None:
    """Without orthonormalising between the steps, (1e-4)^(2q+1) would vanish beside 1 in float32."""
    values = torch.tensor([1.0, 1e-2, 1e-4, *[1e-7] * 10], dtype=torch.float64)
    matrix = with_spectrum(values, 40, 30).float()
    _, s, _ = randomised_svd(matrix, 3, iterations=10)
    torch.testing.assert_close(s.double(), values[:3], rtol=2e-3, atol=0)


def two_decompositions_an_iteration(matrix: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same where both sides are made orthonormal in every iteration."""
    basis = torch.randn(matrix.shape[1], rank, generator=torch.Generator().manual_seed(0)).to(matrix)
    for side in [matrix, *[matrix.mT, matrix] * iterations]:
        basis = torch.linalg.qr(side @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, vh


@pytest.mark.parametrize("iterations", [0, 1, 2, 4])
@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40), (30, 30)])
def test_one_decomposition_an_iteration_finds_what_two_find(m: int, n: int, iterations: int) -> None:
    matrix = with_spectrum(torch.linspace(2, 1, 30, dtype=torch.float64), m, n)
    found, wanted = randomised_svd(matrix, 5, iterations), two_decompositions_an_iteration(matrix, 5, iterations)
    check_form(*found)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(product(*found), product(*wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 2, 4, 10])
@pytest.mark.parametrize("values", [(1, 1, 1, 1e-3), (1, 0.1, 0.01, 1e-3), (1, 1, 1, 1e-4), (1, 3e-2, 2e-3, 1e-4)])
def test_one_decomposition_an_iteration_loses_nothing(values: tuple[float, ...], iterations: int) -> None:
    """In float32 the smallest triplet is as exact as the two ends of the spectrum let it be, eps sigma_1 / sigma_r."""
    spectrum = torch.cat([torch.tensor(values), values[-1] * torch.linspace(0.5, 0.01, 60)]).double()
    bound = 2 * torch.finfo(torch.float32).eps * values[0] / values[-1]
    for m, n in ((120, 90), (90, 120)):
        matrix = with_spectrum(spectrum, m, n).float()
        u, s, vh = (part.double() for part in randomised_svd(matrix, len(values), iterations))
        wanted_u, wanted_s, wanted_vh = two_decompositions_an_iteration(matrix.double(), len(values), iterations)
        assert abs(s[-1] / wanted_s[-1] - 1) < bound
        for found, wanted in ((u[:, -1], wanted_u[:, -1]), (vh[-1], wanted_vh[-1])):
            assert (found - wanted * (wanted @ found)).norm() < bound


@pytest.mark.parametrize(("m", "n"), [(200, 120), (120, 200)])
def test_it_is_as_near_as_torchs_of_as_many_iterations(m: int, n: int) -> None:
    """On a spectrum like a weight's, where neither has converged: the excess over the best error, over seeds."""
    values = torch.linspace(1, 0.05, 120) ** 2
    matrix = with_spectrum(values.double(), m, n).float()
    best, ours, theirs = float(values[16:].norm()), [], []
    for seed in range(400):
        found = randomised_svd(matrix, 16, 4, generator=torch.Generator().manual_seed(seed))
        ours.append(float((matrix - product(*found)).norm()) / best - 1)
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, 16, niter=4)
        theirs.append(float((matrix - product(u, s, v.mT)).norm()) / best - 1)
    assert min(ours) > 1e-4
    assert sum(ours) < 1.05 * sum(theirs)  # three standard errors; an iteration less is 1.5 times as far


def test_the_short_side_is_made_orthonormal_and_the_long_one_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: seen.append(len(matrix)) or qr(matrix))
    for matrix in (normal(30, 40), normal(40, 30)):
        randomised_svd(matrix, 3, iterations=4)
    assert seen == [30, 40, 30, 30, 30, 30, 40, *[40, 30, 30, 30, 30, 40, 30]]


def test_the_same_generator_state_gives_the_same_factors_and_another_seed_others() -> None:
    matrix = with_spectrum(torch.linspace(2, 1, 30, dtype=torch.float64), 40, 30)
    one, two, other = (
        randomised_svd(matrix, 5, 1, generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])


def test_without_a_generator_it_is_deterministic_and_leaves_the_global_state_alone() -> None:
    matrix = with_spectrum(torch.linspace(2, 1, 30, dtype=torch.float64), 40, 30)
    before = torch.get_rng_state()
    one = randomised_svd(matrix, 5, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    assert all(torch.equal(a, b) for a, b in zip(one, randomised_svd(matrix, 5, 1), strict=True))


# ---- of a product ----


@quick
@given(m=sizes, n=sizes, k=sizes, data=st.data())
def test_the_svd_of_factors_is_the_svd_of_their_product(m: int, n: int, k: int, data: st.DataObject) -> None:
    """Also where the factors are wider than the matrix, k > min(m, n)."""
    B, A = normal(m, k), normal(k, n, seed=1)
    rank = data.draw(st.integers(1, min(m, n, k)))
    u, s, vh = svd_of_product(B, A, rank)
    check_form(u, s, vh)
    torch.testing.assert_close(s, torch.linalg.svdvals(B @ A)[:rank], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(product(u, s, vh), product(*truncated_svd(B @ A, rank)), rtol=1e-7, atol=1e-8)


@quick
@given(m=sizes, n=sizes, k=sizes)
def test_without_a_rank_the_product_comes_back_whole(m: int, n: int, k: int) -> None:
    B, A = normal(m, k), normal(k, n, seed=1)
    u, s, vh = svd_of_product(B, A)
    assert len(s) == min(m, n, k)
    torch.testing.assert_close(product(u, s, vh), B @ A, rtol=0, atol=1e-10)
