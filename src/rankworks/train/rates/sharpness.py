"""Sharpness: the largest eigenvalue of the Hessian of the loss on the trained parameters, by Lanczos' iteration.

    b_k v_k+1 = H v_k - a_k v_k - b_k-1 v_k-1,   a_k = v_k^T H v_k,   lambda = largest eigenvalue of tridiag(a, b)
    H v = (g(w + e v) - g(w - e v)) / (2 e)

with gradients g of the loss over a few batches, and e = 1e-4 sqrt(n) for n numbers: every coordinate moves by about
1e-4, well below what a step of Adam moves it, well above what rounding in float32 tells. A difference of gradients
costs two backward passes an iteration, as a product with the Hessian by double backward would, and asks nothing of
kernels that have no second derivative. Lanczos takes the products that power iteration takes and is nearer after each
of them; it finds the largest eigenvalue where the one of largest magnitude is negative, and keeps two vectors.
Source: Golub and Van Loan, Matrix Computations, section 10.1; without reorthogonalising, which repeats eigenvalues but
moves none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankworks.core.draw import Draw
from rankworks.core.errors import TrainingError

STEP = 1e-4


@dataclass(frozen=True)
class Sharpness:
    """What was measured: the eigenvalue, over how many numbers, in how many iterations, and the gradient's norm."""

    value: float
    numbers: int
    iterations: int
    gradient_norm: float


def sharpness(
    gradient: Callable[[], Sequence[Tensor]],
    parameters: Sequence[nn.Parameter],
    *,
    iterations: int = 10,
    tolerance: float = 0.02,
    step: float = STEP,
    seed: int = 0,
) -> Sharpness:
    """Measure the sharpness at the parameters as they are, which are moved meanwhile and put back to the bit.

    gradient: returns the gradients of the loss by the parameters, one tensor each, the same function at every call
    (dropout off, the same batches). It stops when the eigenvalue changes by less than `tolerance` of itself. step: of a
    coordinate, in the differences. Raises `TrainingError` where a gradient is not finite.
    """
    kept = [p.detach().clone() for p in parameters]
    n = sum(p.numel() for p in parameters)
    e, value, here = step * math.sqrt(n), 0.0, _norm(gradient())
    v, last = _unit([Draw(seed, f"sharpness:{i}").normal(*p.shape).to(p) for i, p in enumerate(parameters)]), None
    diagonal: list[float] = []
    beside: list[float] = []
    try:
        while len(diagonal) < iterations:
            ahead = [t.clone() for t in _at(parameters, kept, v, e, gradient)]
            behind = _at(parameters, kept, v, -e, gradient)
            product = [(a - b) / (2 * e) for a, b in zip(ahead, behind, strict=True)]
            diagonal.append(sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(v, product, strict=True)))
            if not math.isfinite(diagonal[-1]):
                raise TrainingError("the gradient is not finite beside the start: the sharpness cannot be measured.")
            before, value = value, _largest(diagonal, beside)
            rest = [p - diagonal[-1] * t for p, t in zip(product, v, strict=True)]
            if last is not None:
                rest = [r - beside[-1] * t for r, t in zip(rest, last, strict=True)]
            beside.append(_norm(rest))
            settled = len(diagonal) > 1 and abs(value - before) <= tolerance * abs(value)
            if settled or beside[-1] <= 1e-12 * abs(value):
                break
            v, last = [r / beside[-1] for r in rest], v
    finally:
        _put(parameters, kept)
    return Sharpness(value, n, len(diagonal), here)


def _largest(diagonal: Sequence[float], beside: Sequence[float]) -> float:
    """The largest eigenvalue of the symmetric tridiagonal matrix."""
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(beside[: len(diagonal) - 1]):
        T[i, i + 1] = T[i + 1, i] = value
    return float(torch.linalg.eigvalsh(T)[-1])


def _at(
    parameters: Sequence[nn.Parameter],
    kept: Sequence[Tensor],
    v: Sequence[Tensor],
    e: float,
    gradient: Callable[[], Sequence[Tensor]],
) -> Sequence[Tensor]:
    """The gradients at w + e v."""
    _put(parameters, [w + e * t for w, t in zip(kept, v, strict=True)])
    return gradient()


@torch.no_grad()
def _put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def _unit(tensors: Sequence[Tensor]) -> list[Tensor]:
    norm = _norm(tensors)
    return [t / norm for t in tensors]
