"""The discrete cosine basis, and which of its vectors a matrix lies along: a subspace that is found by counting alone.

    D_ij = c_i cos(i (2 j + 1) pi / (2 S)),   c_0 = sqrt(1/S),  c_i = sqrt(2/S),   D D^T = I

Q = D^T ("dct2": its columns are the rows of D, the cosines; the first is constant) or Q = D ("dct3"). For G (m, n) with
m >= n, S = n: Sim = G Q, the columns of Sim are ranked by their l1 or l2 norm, and the r best are G's projection
already; for m < n the same along the other side. By Pythagoras ||G - back(R)||^2 is the sum of the squares of the
columns left out, so the l2 norm chooses the best r vectors, and loses at most (1 - r/S) ||G||^2; the released default
is the l1 norm. What is kept of a subspace is r integers. The basis itself is one matrix for each size, type and device,
rebuilt and never stored.

Two routes to Sim: a product with Q, 2 L S^2 flops, or Makhoul's form of a real FFT, L S log S:

    v = [x_0, x_2, x_4, ..., x_5, x_3, x_1],  F = rfft(v),  w_k = c_k exp(-i pi k / (2 S))
    y_k = Re(F_k w_k)    y_{S-k} = -Im(F_k w_k)          and backwards  F_k = (y_k - i y_{S-k}) / w_k,  x from irfft(F)

for even and odd S. Both give the same basis, so a route may change from run to run (rounding aside; in float32 for
16-bit matrices). Milliseconds of one core for a float32 matrix of 2.75 S rows, the product and the FFT: S = 256: 0.6,
0.4; 512: 4.8, 3.6; 768: 16, 6; 1024: 37, 11; 1376: 87, 36; 2048: 273, 63; and 4096 x 4096: 785, 95 (along the left side
the FFT takes up to twice as long). So "auto" takes the FFT on the CPU from S = 512 on, and the product on other
devices, whose matrix units make it cheap (not measured there).
Source: arXiv:2505.17967; Makhoul, A fast cosine transform in one and two dimensions, IEEE TASSP 28(1), 1980.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rankworks.core.optim.projection import Basis, Side, sides

Vectors = Literal["dct2", "dct3"]
Route = Literal["auto", "matmul", "fft"]
FFT_FROM = 512  # the smallest size at which the FFT is taken on the CPU
NUMBERS = {"cpu": 1 << 20}  # that are transformed at one time: what lies in a cache
INDEX = 4  # bytes of an index


class Selected(NamedTuple):
    """The best vectors, ascending, and the projection onto them."""

    index: Tensor  # (r,) int32
    R: Tensor  # (m, r) on the right side, (r, n) on the left


class Columns(NamedTuple):
    """The vectors that are kept on each side, as `Basis` has matrices; None where a side is left as it is."""

    P: Tensor | None  # (r,) int32
    Q: Tensor | None  # (r,) int32

    def basis(self, like: Tensor, vectors: Vectors = "dct2") -> Basis:
        """Return the matrices for a gradient (m, n), in its type."""
        parts = (
            None if index is None else basis_rows(index, size, like, vectors).t()
            for index, size in zip(self, like.shape, strict=True)
        )
        return Basis(*parts)


@lru_cache(maxsize=64)
def basis_matrix(size: int, dtype: torch.dtype, device: torch.device, vectors: Vectors = "dct2") -> Tensor:
    """Return Q^T (S, S): the basis vectors as rows. One tensor for each size, type and device, not to be written to."""
    i = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = torch.outer(i, 2 * i + 1).remainder_(4 * size).mul_(math.pi / (2 * size)).cos_().mul_(math.sqrt(2 / size))
    matrix[0] = math.sqrt(1 / size)
    return (matrix if vectors == "dct2" else matrix.t().contiguous()).to(device=device, dtype=dtype)


def basis_rows(index: Tensor, size: int, like: Tensor, vectors: Vectors = "dct2") -> Tensor:
    """Return the chosen basis vectors as rows (r, S), in `like`'s type and on its device."""
    return basis_matrix(size, like.dtype, like.device, vectors).index_select(0, index)


def chosen_route(size: int, device: torch.device, route: Route = "auto") -> Route:
    """Return "matmul" or "fft"."""
    if route != "auto":
        return route
    return "fft" if device.type == "cpu" and size >= FFT_FROM else "matmul"


def transformed(X: Tensor, vectors: Vectors = "dct2", route: Route = "auto") -> Tensor:
    """Return X Q (k, S) of X (k, S), in float32 where X has 16 bits; the FFT's result lies row by row in memory."""
    size = X.shape[1]
    if chosen_route(size, X.device, route) == "matmul":
        return X @ basis_matrix(size, X.dtype, X.device, vectors).t()
    out = torch.empty(X.shape, dtype=torch.promote_types(X.dtype, torch.float32), device=X.device)
    rows = max(1, NUMBERS.get(X.device.type, 1 << 24) // size)
    change = _dct2 if vectors == "dct2" else _dct3
    for x, y in zip(X.split(rows), out.split(rows), strict=True):
        change(x, y)
    return out


def select(
    G: Tensor, rank: int, right: bool, norm: int = 1, vectors: Vectors = "dct2", route: Route = "auto"
) -> Selected:
    """Return the at most `rank` vectors that G (m, n) lies along most, of its columns' space (left) or its rows'.

    norm: 1 or 2, by which they are ranked; `G` is left as it is, R is in its type, row by row in memory.
    """
    S = transformed(G if right else G.t(), vectors, route)  # (L, S)
    index = scores(S, norm).topk(min(rank, S.shape[1]), sorted=False).indices.sort().values
    R = S.index_select(1, index)
    return Selected(index.int(), (R if right else R.t()).to(G.dtype).contiguous())


def scores(S: Tensor, norm: int) -> Tensor:
    """Return what the columns of S (L, S) are ranked by: sums of magnitudes (1) or squares (2), float32 at least."""
    kind = torch.promote_types(S.dtype, torch.float32)
    total = torch.zeros(S.shape[1], dtype=kind, device=S.device)
    for part in S.split(max(1, NUMBERS.get(S.device.type, 1 << 24) // S.shape[1])):
        total += (part.abs() if norm == 1 else part.square()).sum(0, dtype=kind)
    return total


def best_columns(
    G: Tensor, rank: int, side: Side, norm: int = 2, vectors: Vectors = "dct2", route: Route = "auto"
) -> Columns:
    """Return the vectors for each side of G (m, n) that is projected, where singular vectors might stand as well."""
    r, chosen = min(rank, *G.shape), sides((G.shape[0], G.shape[1]), side)
    found = (select(G, r, bool(at), norm, vectors, route).index if yes else None for at, yes in enumerate(chosen))
    return Columns(*found)


def moved_columns(moments: Tensor, old: Tensor, new: Tensor, right: bool) -> Tensor:
    """Return moments (m, r) or (r, n) in the coordinates `new`: a kept vector's go to its place, other places are zero.

    old, new: (r,) ascending. It is Rm = Q_old^T Q_new, a partial permutation, applied as a copy.
    """
    slot = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    lost = old[slot] != new
    kept = moments.index_select(1 if right else 0, slot)
    return kept.masked_fill_(lost if right else lost.unsqueeze(1), 0)


# ---- Makhoul -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _twiddle(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """w_k for k = 0 ... S // 2, complex."""
    k = torch.arange(size // 2 + 1, dtype=torch.float64, device="cpu")
    w = torch.polar(torch.full_like(k, math.sqrt(2 / size)), k * (-math.pi / (2 * size)))
    w[0] = math.sqrt(1 / size)
    return w.to(device=device, dtype=dtype.to_complex())


def _dct2(x: Tensor, y: Tensor) -> None:
    """y <- x D^T for rows x (k, S); y is of a type that FFTs know."""
    size, even, half = y.shape[1], (y.shape[1] + 1) // 2, y.shape[1] // 2 + 1
    y[:, :even] = x[:, ::2]
    y[:, even:] = x[:, 1::2].flip(1)
    F = torch.fft.rfft(y).mul_(_twiddle(size, y.dtype, y.device))
    y[:, :half] = F.real
    torch.neg(F.imag[:, 1 : size - half + 1].flip(1), out=y[:, half:])


def _dct3(x: Tensor, y: Tensor) -> None:
    """y <- x D for rows x (k, S)."""
    size, even, half = y.shape[1], (y.shape[1] + 1) // 2, y.shape[1] // 2 + 1
    w = _twiddle(size, y.dtype, y.device)
    F = torch.zeros(len(x), half, dtype=w.dtype, device=y.device)
    F.real.copy_(x[:, :half])
    F.imag[:, 1:] = x[:, size - half + 1 :].flip(1)
    F.imag.neg_()
    v = torch.fft.irfft(F.mul_(1 / w), n=size)
    y[:, ::2] = v[:, :even]
    y[:, 1::2] = v[:, even:].flip(1)
