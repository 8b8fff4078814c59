"""SparseDelta: deltas that change a few entries of the weight, and what can be done with the entries alone.

    W' = W + S        S (out, in) zero but for K entries

A method gives `placed()`, where the entries stand and how much they change. Forward and backward then cost a copy of
the weight more than the frozen layer (`kernels/sparse.py`), and the row norms that DoRA asks for cost O(K):

    ||W_o + S_o||^2 = ||W_o||^2 + sum over the entries of row o of v (2 W + v)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankworks.core.delta import Base, Delta, Entries
from rankworks.core.errors import ExportError
from rankworks.core.forms.whole import Whole
from rankworks.core.inputs import Input
from rankworks.core.kernels import add_entries, sparse_linear
from rankworks.core.kernels.mode import compute_dtype, sees_through
from rankworks.core.site import Shape
from rankworks.core.state import state_of


class SparseDelta(Whole):
    """A delta of few entries. A subclass calls `place` in `setup`."""

    index: Tensor
    values: nn.Parameter
    _known: tuple[Any, Tensor] | None = None  # the squared norms of the base's rows, and of which weight

    def place(self, weight: Tensor, index: Tensor) -> None:
        """Allocate the trained `values` (K,), zero, at `index` (K,): distinct row-major numbers, ascending."""
        self.index = self.stored(index.to(index_dtype(self.shape)))
        self.values = self.trainable(len(index))

    def placed(self) -> Entries:
        """Return where the entries stand and what is added there."""
        return Entries(self.index, getattr(self, "scale", 1.0) * self.values)

    def entries(self) -> Entries:
        """The same: the change is exactly that."""
        return self.placed()

    def matrix(self) -> Tensor:
        """The values at their places; the gradient of a value is the gradient of its entry."""
        index, values = self.placed()
        return add_entries(values.new_zeros(*self.shape), index, values)

    def forward(self, x: Input, base: Base) -> Tensor:
        """(W + S) x + b in one product, in at least float32; narrower types keep the two products apart."""
        if isinstance(x, Tensor) and compute_dtype(x).itemsize >= 4 and self._dropped(x) is x:
            frozen = base.linear
            if frozen is not None and frozen[0].is_floating_point():
                return sparse_linear(x, *frozen, *self.placed())
        return super().forward(x, base)

    def row_norms(self, weight: Tensor) -> Tensor:
        """The norm of every row of (weight + change), (out,), from the entries alone."""
        index, values = self.placed()
        squares = self._squares(weight)
        values = values.to(squares.dtype)
        there = _entries_of(weight, index).to(squares.dtype)  # (K,)
        row = index // self.shape.in_
        squares = squares.index_add(0, row, values * (2 * there + values)).clamp_min(0)
        some = squares > 0
        return torch.where(some, squares, 1).sqrt() * some  # the root has no derivative at 0

    def _squares(self, weight: Tensor) -> Tensor:
        """Return ||W_o||^2 (out,) in at least float32, read from the frozen weight once."""
        if sees_through() or weight.is_meta:
            return _row_squares(weight)
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._known is None or self._known[0] != key:
            self._known = (key, _row_squares(weight))
        return self._known[1]


def _row_squares(weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=wide).square()


def index_dtype(shape: Shape) -> torch.dtype:
    """Return the narrowest type that numbers the entries of a weight: int32 below 2^31 of them."""
    return torch.int32 if shape.out * shape.in_ <= torch.iinfo(torch.int32).max else torch.int64


def _entries_of(weight: Tensor, index: Tensor) -> Tensor:
    """Return the weight's entries (K,) at row-major numbers, whatever its layout, without copying the weight."""
    if weight.is_contiguous():
        return weight.view(-1).index_select(0, index)
    in_ = weight.shape[1]
    return weight[index // in_, index % in_]


@torch.no_grad()
def sparse_entries(model: nn.Module, name: str = "default") -> dict[str, Entries]:
    """Return {site name: (index, values)} of a sparse adapter: row-major numbers in (out, in), ascending, and changes.

    Adding `values` to the base weight's entries at `index` gives the merged weight. Raises `ExportError` where the
    adapter's change is not sparse.
    """
    found = {}
    for key, delta in state_of(model).adapter(name).deltas.items():
        entries = delta.entries()
        if entries is None:
            raise ExportError(
                f"{key}: the change of a {delta.spec.key} adapter is not sparse, so it has no list of entries: export "
                "it with kind='lora' or 'merged', or train a sparse method (shira, lift, snella)."
            )
        order = entries.index.argsort()
        found[key] = Entries(entries.index[order].clone(), entries.values[order].clone())
    return found


class Interference(NamedTuple):
    """How much two changes of one weight act on the same outputs; orthogonal ones have awom 0 and awor 1."""

    awom: float  # ||S1^T S2||_F, the magnitude
    awor: float  # 1 - nnz(S1^T S2) / in^2, the share of zeros


@torch.no_grad()
def interference(model: nn.Module, first: str, second: str) -> dict[str, Interference]:
    """Return {site name: AWOM and AWOR} of two sparse adapters, at the sites both change.

    Source: arXiv:2406.13175, section 3.3. The paper's "l2 norm" of the product is read as the Frobenius norm.
    """
    one, two = sparse_entries(model, first), sparse_entries(model, second)
    deltas = state_of(model).adapter(first).deltas
    return {key: _interference(one[key], two[key], deltas[key]) for key in one if key in two}


def _interference(one: Entries, two: Entries, delta: Delta) -> Interference:
    product = (_csr(one, delta.shape).T @ _csr(two, delta.shape)).tocsr()  # (in, in)
    product.eliminate_zeros()
    magnitude = float((product.data**2).sum() ** 0.5)
    return Interference(magnitude, 1 - product.nnz / delta.shape.in_**2)


def _csr(entries: Entries, shape: Shape) -> Any:
    import scipy.sparse  # takes a while, and only this asks for it

    index, values = entries.index.cpu().long().numpy(), entries.values.cpu().double().numpy()
    return scipy.sparse.csr_matrix((values, (index // shape.in_, index % shape.in_)), shape=tuple(shape))
