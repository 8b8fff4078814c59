"""Bone, now MiSS: one trained matrix shared by all shards of the weight.

    row-sum   y = W x + b + D^T z        z_j = sum of x_i over i = j mod r,  D (r, out) trained, zero at start

Summing the shards first makes it cheaper than LoRA: it is a LoRA whose A is the fixed 0/1 matrix E (r, in),
E[j, i] = 1 where i = j mod r. With `mini` = m, D is (r, m), repeated out/m times along the output.
The first gradient is dense, dL/dD = E (dL/dW')^T: there is no second factor that starts at zero.
The multiplicative form, `bone-bat`, stands in bone_bat.py. No alpha: the scale is 1.
Source: arXiv:2409.15371; the row-sum form is MiSS, its efficient version.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankworks.core.delta import Base, Delta, Factors
from rankworks.core.fields import Probability, Rank, Setting
from rankworks.core.inputs import Input, dropout, linear
from rankworks.core.kernels import fits, folded_linear, folds
from rankworks.core.registry import delta
from rankworks.core.site import Shape


@delta("bone", title="Bone / MiSS", year=2024, paper="arXiv:2409.15371")
class Bone(Delta):
    """Row-sum form, with `mini` for a narrower matrix."""

    rank: int = Rank(64, "width r of a shard")
    mini: int | None = Setting(None, "columns of D, repeated over the output; None for all", ge=1)
    dropout: float = Probability(0.0, "probability of dropping an input in training")

    def setup(self, weight: Tensor) -> None:
        """D = 0 leaves the output unchanged."""
        self.D = self.trainable(self.rank, self.mini or self.shape.out)

    def _columns(self) -> Tensor:
        """D repeated over the output: (r, out)."""
        return self.D.repeat(1, self.shape.out // self.mini) if self.mini else self.D

    def _shards(self) -> Tensor:
        """E (r, in): ones where the input's number leaves remainder j."""
        eye = torch.eye(self.rank, device=self.D.device, dtype=self.D.dtype)
        return eye.repeat(1, -(-self.shape.in_ // self.rank))[:, : self.shape.in_]

    def project(self, x: Tensor) -> Tensor:
        """z = E x: a sum of shards, not a product. (..., in) -> (..., r)."""
        x = F.pad(x, (0, -self.shape.in_ % self.rank))  # zeros complete the last shard
        return x.unflatten(-1, (x.shape[-1] // self.rank, self.rank)).sum(dim=-2)

    def added(self, weight: Tensor, L: Tensor) -> Tensor:
        """weight + L E: L (out, r) beside itself, added shard by shard."""
        (out, in_), r = self.shape, self.rank
        if in_ % r:
            return weight + L.repeat(1, -(-in_ // r))[:, :in_]
        return (weight.reshape(out, in_ // r, r) + L.unsqueeze(1)).view(out, in_)

    def whole_left(self) -> Tensor:
        """D^T (out, r)."""
        return self._columns().t()

    def branch(self, x: Input) -> Tensor:
        """D^T z."""
        x = dropout(x, self.dropout, self.training)
        z = self.project(x) if isinstance(x, Tensor) else linear(x, self._shards())
        return linear(z, self._columns().t())

    def forward(self, x: Input, base: Base) -> Tensor:
        """base(x) + branch(x), with D^T E added into the weight where that is cheaper."""
        frozen = base.linear if isinstance(x, Tensor) and not (self.dropout and self.training) else None
        if frozen is None or not isinstance(x, Tensor) or not fits(x, *frozen) or not folds(x, self.shape.out):
            return base(x) + self.branch(x)
        return folded_linear(x, *frozen, self.whole_left(), self.project, self.added)

    def factors(self) -> Factors:
        """Exact at rank r: (D^T, E)."""
        return Factors(self._columns().t(), self._shards())

    @classmethod
    def portable(cls, spec: Any) -> bool:
        """It knows nothing of its weight."""
        return True

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank out, or rank mini."""
        return spec.rank * (spec.mini or shape.out)

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """mini must divide the output, and a shard cannot be wider than the input."""
        found = super().problems(spec, shape)
        if spec.rank > shape.in_:
            found.append(
                f"bone sums shards of width rank = {spec.rank}, wider than the {shape.in_} inputs: lower rank there"
            )
        if spec.mini and shape.out % spec.mini:
            found.append(
                f"bone repeats mini = {spec.mini} columns over the output and must divide {shape.out}: give a divisor"
            )
        return found
