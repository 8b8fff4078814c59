"""Whole: deltas whose change is a matrix of the weight's own size with no useful factors (sparse, tensor, kernel).

A method writes `matrix()`, the change as a function of its own tensors, or, where the change depends on the weight,
`dense(weight)` with `additive = False`. The layer then multiplies once by the changed weight, and the matrix is formed
again in the backward pass rather than kept (`kernels/whole.py`).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankworks.core.delta import Base, Delta
from rankworks.core.inputs import Input, dropout, linear
from rankworks.core.kernels import whole_linear
from rankworks.core.kernels.mode import sees_through, wants_gradient


class Whole(Delta):
    """A delta given by its matrix. A subclass with a `dropout` setting has its change see the dropped input."""

    def matrix(self) -> Tensor:
        """Return the change (out, in), a pure function of the delta's tensors. For additive methods."""
        raise TypeError(f"{type(self).__name__} must define matrix(), or dense(weight) with additive = False")

    def dense(self, weight: Tensor) -> Tensor:
        """The matrix."""
        return self.matrix()

    def changed(self, weight: Tensor) -> Tensor:
        """Return weight + dense(weight) (out, in); a subclass may have a shorter way."""
        return weight + self.dense(weight).to(weight.dtype)

    def branch(self, x: Input) -> Tensor:
        """The matrix times x, for an additive method; the matrix is formed again in the backward pass here too."""
        x, parameters = self._dropped(x), list(self.parameters())
        own = all(isinstance(p, nn.Parameter) for p in parameters)  # a functional call's are gone by the backward pass
        if sees_through() or not own or not wants_gradient(*parameters):
            return linear(x, self.matrix())
        return checkpoint(lambda: linear(x, self.matrix()), use_reentrant=False, preserve_rng_state=False)

    def forward(self, x: Input, base: Base) -> Tensor:
        """(W + D) x + b in one product where the base is a plain linear layer."""
        dropped = self._dropped(x)
        if isinstance(x, Tensor) and dropped is x:
            frozen = base.linear
            if frozen is not None and frozen[0].is_floating_point():
                trained = [p for p in self.parameters() if p.requires_grad]
                return whole_linear(x, *frozen, self.dense, trained, self.changed)
        return base(x) + (self.branch(x) if self.additive else linear(dropped, self.dense(base.weight)))

    def _dropped(self, x: Input) -> Input:
        return dropout(x, getattr(self, "dropout", 0.0), self.training)
