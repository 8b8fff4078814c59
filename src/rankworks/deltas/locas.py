"""Locas: a narrow feed-forward memory beside each feed-forward block, cloned from it and trained at test time.

    y = FFN(a) + tau M(a)        M(a) = V^T (act(G a) * (K a))    or, beside a plain block, V^T act(K a)

G, K, V (r, d), one row per hidden unit; act is the block's own activation (SiLU in the paper's gated models, ReLU in
its plain ones), so that merging, which makes the block r units wider, is exact:
W_gate <- [W_gate; G], W_up <- [W_up; K], W_down <- [W_down, tau V^T]. No weight changes, so there is no LoRA of it.
tau = mean_j ||W_down[:, j]|| / r, the mean norm of the block's value vectors (its columns, as stored (d, m)) over r.
Every row w of G, K, V acts as w / max(||w||, 1), in training and afterwards: longer rows are shrunk, shorter ones kept.

Start: r hidden units of the block are cloned, K and G their rows of W_up and W_gate at unit norm, V = 0, so that the
output is the base's and at first V alone has a gradient. Which units: the r of largest mean |activation| where
`evidence` tells it (`rankworks.calibrate.memory`, which also writes tokens into the memories of plain blocks), else r
by the seed: within 0.02 perplexity of it in the paper's ablation (19.06 and 19.04; Gaussian keys 19.90). Which they
were is stored. A gated block trains 3 d r numbers, a plain one 2 d r. `rw.Stream` reads a stream and learns from it.
Source: arXiv:2602.05085.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankworks.core.block import Block, Replacement
from rankworks.core.delta import Base, Delta
from rankworks.core.fields import Rank
from rankworks.core.inputs import Input, linear
from rankworks.core.registry import delta
from rankworks.core.site import Shape, Site


@delta("locas", title="Locas", year=2026, paper="arXiv:2602.05085")
class Locas(Delta):
    """Hidden units added to a feed-forward block."""

    weightless: ClassVar[bool] = True
    additive: ClassVar[bool] = False  # what it adds depends on the block's activation
    kinds: ClassVar[tuple[str, ...]] = ("ffn",)

    rank: int = Rank(64, "width r of the memory: hidden units added to each block")

    G: nn.Parameter | None

    def setup(self, weight: Tensor) -> None:
        """Clone r of the block's hidden units; V = 0 leaves the output unchanged."""
        *_, W_down = self._matrices(weight)
        tau = torch.linalg.vector_norm(_wide(W_down), dim=0).mean() / self.rank
        self.tau = self.frozen(tau.to(self.draw.dtype))  # ()
        d, r = self.shape.out, self.rank
        self.G = self.trainable(r, d) if self.shape.kernel == (3,) else None
        self.K, self.V = self.trainable(r, d), self.trainable(r, d)
        self.units = self.stored(torch.zeros(r, dtype=torch.int64))
        if "activation" in self.evidence:
            self.clone(weight, self.evidence["activation"].topk(r).indices.sort().values)
        else:
            self.clone(weight, self.draw.choice(W_down.shape[1], r))

    def _matrices(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The block's matrices, each (d, m): the gate's rows turned to columns, the up's, the down's."""
        return weight.chunk(self.shape.kernel[0], dim=1)

    @torch.no_grad()
    def clone(self, weight: Tensor, units: Tensor) -> None:
        """Start from the block's hidden units `units` (r,), given its weight (d, k m); V goes back to zero."""
        *gate, up, _ = self._matrices(weight)
        self.units.copy_(units)
        self.V.zero_()
        for own, columns in [(self.K, up), *((self.G, columns) for columns in gate)]:
            if own is not None:
                rows = _wide(columns[:, units.to(columns.device)].t())  # (r, d)
                own.copy_(rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12))

    def rows(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """G, K, V (r, d) as they act: none longer than 1."""
        return None if self.G is None else clipped(self.G), clipped(self.K), clipped(self.V)

    def memory(self, a: Tensor, act: Any) -> tuple[Tensor, Tensor]:
        """Return the hidden units (..., r) for the block's input a (..., d), and tau V (r, d) that they weigh."""
        G, K, V = self.rows()
        if G is None:
            return act(linear(a, K)), self.tau * V
        gate, up = linear(a, torch.cat([G, K])).chunk(2, dim=-1)
        return act(gate) * up, self.tau * V

    def forward(self, x: Input, base: Base) -> Tensor:
        """FFN(x) + tau M(x)."""
        assert isinstance(x, Tensor)
        hidden, values = self.memory(x, base.ffn.act)
        return base(x) + linear(hidden, values.t())

    def fused(self, site: Site) -> list[Replacement]:
        """The block, r hidden units wider."""
        assert isinstance(site, Block)
        G, K, V = self.rows()
        return site.ffn.widened(G, K, (self.tau * V).t())

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """k d r: three matrices of the memory beside a gated block, two beside a plain one."""
        return shape.kernel[0] * shape.out * spec.rank

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """There are m units to clone and no more."""
        if not shape.kernel:
            return []  # not a block: refused by its kind
        width = shape.in_ // shape.kernel[0]
        if spec.rank > width:
            return [f"locas clones rank = {spec.rank} hidden units of a block that has {width}: lower rank there"]
        return super().problems(spec, shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def clipped(rows: Tensor) -> Tensor:
    """Return w / max(||w||, 1) for every row w."""
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1.0)
