"""Crosses: single rows and columns found by rook pivoting that reproduce a matrix where they stand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_svd import normal, quick
from torch import Tensor

from rankworks.linalg.cross import cross_pivots


def crossed(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return matrix[:, columns] @ torch.linalg.pinv(matrix[rows][:, columns]) @ matrix[rows]


@quick
@given(m=st.integers(1, 9), n=st.integers(1, 9), data=st.data())
def test_the_crosses_are_distinct_and_reproduce_their_rows_and_columns(m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    matrix = normal(m, n)
    rows, columns = cross_pivots(matrix, rank)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == rank
    found = crossed(matrix, rows, columns)
    torch.testing.assert_close(found[rows], matrix[rows], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[:, columns], matrix[:, columns], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("m", "n"), [(9, 7), (7, 9)])
def test_every_pivot_is_the_largest_of_its_row_and_column(m: int, n: int) -> None:
    matrix = normal(m, n)
    rows, columns = (t.tolist() for t in cross_pivots(matrix, 5))
    for k in range(5):
        left = (
            matrix - crossed(matrix, torch.tensor(rows[:k]).long(), torch.tensor(columns[:k]).long()) if k else matrix
        )
        pivot = left[rows[k], columns[k]].abs()
        assert pivot >= left[rows[k]].abs().max() - 1e-12
        assert pivot >= left[:, columns[k]].abs().max() - 1e-12


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_a_matrix_of_a_smaller_rank_is_reproduced_and_gets_other_crosses_besides(rank: int) -> None:
    matrix = normal(9, 2) @ normal(2, 7, seed=1)
    matrix[:, 0] = 0
    rows, columns = cross_pivots(matrix, rank)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == rank
    torch.testing.assert_close(crossed(matrix, rows[:2], columns[:2]), matrix, rtol=0, atol=1e-12)


def test_a_single_entry_is_found_and_zeros_have_no_pivot() -> None:
    matrix = torch.zeros(6, 5)
    assert [t.tolist() for t in cross_pivots(matrix, 3)] == [[0, 1, 2], [0, 1, 2]]
    matrix[4, 3] = -2
    rows, columns = cross_pivots(matrix, 2)
    assert (rows[0].item(), columns[0].item()) == (4, 3)


def test_more_crosses_than_lines_are_refused() -> None:
    with pytest.raises(ValueError, match="no 6 crosses"):
        cross_pivots(normal(6, 5), 6)
