"""Quantise a weight and split off a product of rank r that makes good what was lost: W ~ Q + U diag(s) V^T.

    loftq    P = 0;   T times   Q = quant(W - P),    P = svd_r(W - Q)          quantises first, ends with the product
    pissa    R = W;   T times   P = svd_r(R),        Q = quant(W - P),   R = W - Q         (QPiSSA) the other way round

With T = 1 loftq's product is the best one for the plain quantised weight, ||W - Q - P||_F^2 the sum of the squares of
the singular values left out; pissa's is the weight's principal part, whose large entries then do not widen the blocks'
scales. More rounds alternate, and both return the last, as the released codes do.
Source: arXiv:2310.08659, algorithm 1; arXiv:2404.02948, section 4 and its released code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from rankworks.linalg import truncated_svd
from rankworks.linalg.svd import SVD

Order = Literal["loftq", "pissa"]
Split = tuple[Tensor, SVD]


def split(weight: Tensor, rank: int, quant: Callable[[Tensor], Tensor], order: Order, iterations: int = 1) -> Split:
    """Return Q (out, in) and (U, s, Vh) of the product; `quant` maps a matrix (out, in) to its quantised values."""
    if order == "pissa":
        return _pissa(weight, rank, quant, iterations)
    quantised = quant(weight)
    product = truncated_svd(weight - quantised, rank)
    for _ in range(iterations - 1):
        quantised = quant(weight - _dense(product))
        product = truncated_svd(weight - quantised, rank)
    return quantised, product


def _pissa(weight: Tensor, rank: int, quant: Callable[[Tensor], Tensor], iterations: int) -> Split:
    product = truncated_svd(weight, rank)
    quantised = quant(weight - _dense(product))
    for _ in range(iterations - 1):
        product = truncated_svd(weight - quantised, rank)
        quantised = quant(weight - _dense(product))
    return quantised, product


def _dense(svd: SVD) -> Tensor:
    u, s, vh = svd
    return (u * s) @ vh
