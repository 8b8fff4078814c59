"""Bone-bat: every r x r block of the weight is multiplied by, and shifted with, a block trained per output shard.

    W'_ij = W_ij (I + T_i) + T_i        W_ij (r, r) the blocks of W,  T (out/r, r, r) trained, zero at start

The change depends on the weight ("weight guide") and has full rank, so the adapted layer multiplies by the whole
changed matrix: out * in * r operations to form it, in the forward and again in the backward pass. r must divide both
out and in. With G = dL/dW', dL/dT_i = sum_j (W_ij^T + I) G_ij.
Source: arXiv:2409.15371, section 3 (Bone's original form; "bat" in the released code).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rankworks.core.fields import Rank
from rankworks.core.forms.whole import Whole
from rankworks.core.registry import delta
from rankworks.core.site import Shape


@delta("bone-bat", title="Bone (bat)", year=2024, paper="arXiv:2409.15371")
class BoneBat(Whole):
    """The block-affine form."""

    additive: ClassVar[bool] = False

    rank: int = Rank(64, "side r of a block")

    def setup(self, weight: Tensor) -> None:
        """T = 0 leaves the weight as it is."""
        self.T = self.trainable(self.shape.out // self.rank, self.rank, self.rank)

    def dense(self, weight: Tensor) -> Tensor:
        """W_ij T_i + T_i, block by block: (out, in)."""
        (out, in_), r = self.shape, self.rank
        # A row of W holds its parts of the blocks one after the other, so the rows of all blocks of a shard, which T_i
        # multiplies, are a view of it (in, r), and so is the result.
        change = torch.bmm(weight.to(self.T.dtype).reshape(out // r, in_, r), self.T)
        return (change.view(out // r, r, in_ // r, r) + self.T.unsqueeze(2)).view(out, in_)

    def changed(self, weight: Tensor) -> Tensor:
        """W_ij + W_ij T_i + T_i in one product and one sum: (out, in)."""
        (out, in_), r = self.shape, self.rank
        blocks = weight.to(torch.promote_types(weight.dtype, self.T.dtype)).reshape(out // r, in_, r)
        T = self.T.to(blocks.dtype)
        whole = torch.baddbmm(blocks, blocks, T).view(out // r, r, in_ // r, r)
        return whole.add_(T.unsqueeze(2)).view(out, in_).to(weight.dtype)

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """out rank."""
        return shape.out * spec.rank

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """Blocks must tile the weight."""
        found = super().problems(spec, shape)
        if spec.rank and (shape.out % spec.rank or shape.in_ % spec.rank):
            found.append(
                f"bone-bat cuts the weight in blocks of side rank = {spec.rank}, which must divide both out and in: "
                "give a common divisor there, or exclude the site"
            )
        return found
