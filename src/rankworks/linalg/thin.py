"""Thin products, z = a b^T of a large matrix with a few rows: the work of a low-rank pass and of a randomised SVD.

    a (m, k), b (n, k) -> z (m, n),  m or n a rank

A low-rank layer makes four per step: x A^T and dL/dh = g B have few columns and many rows; dL/dA = e^T x and
dL/dB = h^T g have few rows out of long sums over the tokens. Subspace iteration multiplies a weight so from both sides.
On CPUs torch gives float32 products to a library made for large ones, which packs the large operand anew before it
multiplies: for these that costs more than multiplying. oneDNN, which torch brings for its 16-bit products and its
compiler, reads the operand where it lies. It makes a kernel for each shape it has not met (0.4 ms), so small products
stay with `mm`. Both sum in float32; they differ in the order of the sums, as `mm` itself does from one processor to
another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

LEAST_NUMBERS = 2**19
"""Numbers in the large operand from which the kernel's making pays within one step of a model of a few layers, where
batches seldom have as many tokens as one before."""
LEAST_OF_A_WEIGHT = 2**18
"""The same where the large operand is a weight: a model has many of one shape."""


def thin(a: Tensor, b: Tensor, least: int = LEAST_NUMBERS) -> Tensor:
    """Return a b^T (m, n) of a (m, k) and b (n, k), either of which may be the transposed view of another."""
    if max(a.numel(), b.numel()) >= least and _plain(a) and _plain(b) and _unwatched(a, b) and _serves():
        return _onednn(a, b)
    return _mm(a, b)


def by_thin(large: Tensor, least: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the way `thin` goes with this large operand, to take it with many thin ones of its type without asking."""
    return _onednn if large.numel() >= least and _plain(large) and _unwatched(large, large) and _serves() else _mm


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t()


def _plain(t: Tensor) -> bool:
    """Whether the tensor is an ordinary one in float32 on a CPU that has something in it."""
    return (
        t.device.type == "cpu"
        and t.dtype == torch.float32
        and type(t) in (Tensor, torch.nn.Parameter)
        and t.numel() > 0
    )


def _unwatched(a: Tensor, b: Tensor) -> bool:
    """Whether nobody asks for ordinary operations: autograd, a counter of operations, who switched oneDNN off."""
    recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return not recorded and not torch._C._len_torch_dispatch_stack() and torch.backends.mkldnn.enabled  # type: ignore[return-value]


@cache
def _serves() -> bool:
    """Whether this torch has the operation and it does what is asked of it, with views as well."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.arange(8.0).view(2, 4)[:, :3], torch.arange(12.0).view(4, 3)
    try:
        made = _onednn(a, b), _onednn(a.t(), torch.ones(5, 2)), _onednn(a, b.t().contiguous().t())
    except (AttributeError, RuntimeError):
        return False
    asked = a @ b.t(), a.t() @ torch.ones(2, 5), a @ b.t()
    return all(torch.equal(m, w) for m, w in zip(made, asked, strict=True))


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    a = a if a.shape[0] > b.shape[0] else a.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
