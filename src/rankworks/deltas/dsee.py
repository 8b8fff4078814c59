"""DSEE: low rank plus a few free entries, on a weight that may then be pruned.

    W' = W * M + s (B A + S)        S (out, in) zero but for N trained values at Omega,  s = alpha/r,  M a 0/1 mask

Omega (`omega`) are the entries of the pretrained weight that a low-rank fit explains worst: the N largest of what a
greedy bilateral sketch leaves over ("sketch"), or random ones, or the N of largest |W|. The released sketch grows its
rank to 496 on BERT's 768 x 768. Measured on low rank plus spikes, a sketch far above the weight's own rank explains the
spikes too and finds none of them, near it it finds all (200 x 160 of rank 20 with 16 spikes: 0 at rank 104, 16 at 16 to
21), so here it stops at an eighth of the smaller side; `sketch_share=0.65` gives the released rank on BERT. Omega is
stored with the values (a sketch is not the same to the bit everywhere). A ~ N(0, 0.02^2) unless another start is named,
B = 0, S = 0: the output starts unchanged. With G = dL/dW': dL/dB = s G A^T, dL/dS at an entry of Omega is s G there.

M is absent until the weight is pruned (`rankworks.compress.prune_dsee`). Then it is stored with the adapter and acts in
the layer's own product; the base keeps its numbers, pruned entries stay zero through retuning, and detaching gives all
of it back. While nothing is pruned the change is an exact LoRA of rank r + min(#rows, #columns of Omega). Merging a
pruned one is exact too and makes W' dense, for B A is. Whole rows may be silenced (structured pruning): weight, update
and bias of those outputs are then zero.
Source: arXiv:2111.00160.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.delta import Base, Delta, Factors
from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.forms.lowrank import Init, LowRank
from rankworks.core.inputs import Input, dropout, linear
from rankworks.core.kernels import fits, lowrank_linear
from rankworks.core.kernels.masked import masked_linear
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.linalg import bilateral_residual


@delta("dsee", title="DSEE", year=2021, paper="arXiv:2111.00160")
class DSEE(LowRank):
    """LoRA with N free entries, and room for a pruning mask."""

    rank: int = Rank(16)
    alpha: float = Positive(32.0, "numerator of the scale")
    entries: int = Setting(16, "N, how many single entries of the weight to train; 0 leaves a LoRA", ge=0)
    omega: Literal["sketch", "random", "largest"] = Setting(
        "sketch", "which entries: what a low-rank sketch of W leaves over, random, or the largest |W|"
    )
    sketch_rounds: int = Setting(100, "rounds of the sketch, its rank growing by 5 in each", ge=1)
    sketch_share: float = Setting(0.125, "largest rank of the sketch, as a share of the smaller side", gt=0, lt=1)
    threshold: float = Positive(0.01, "what the sketch counts as sparse: residuals of at least this size")

    values: Tensor
    index: Tensor
    kept: Tensor | None
    live: Tensor | None

    def setup(self, weight: Tensor) -> None:
        """Allocate the pair and the entries; nothing is pruned."""
        super().setup(weight)
        if self.entries:
            self.index = self.stored(self._omega(weight))  # (N,) int64, row-major, ascending
            self.values = self.trainable(self.entries)
        self.register_buffer("kept", None)  # (out, in) bool, once the weight is pruned
        self.register_buffer("live", None)  # (out,) bool, once outputs are silenced

    def _omega(self, weight: Tensor) -> Tensor:
        n = self.entries
        if weight.is_meta:
            return torch.empty(n, dtype=torch.int64, device="meta")
        if self.omega == "random":
            return self.draw.choice(weight.numel(), n)
        score = weight
        if self.omega == "sketch":
            score = bilateral_residual(
                weight, self.sketch_rounds, self.sketch_share, threshold=self.threshold, generator=self.draw.generator
            )
        return score.reshape(-1).abs().argsort(descending=True, stable=True)[:n].sort().values

    @torch.no_grad()
    def reset(self, weight: Tensor, init: Init) -> None:
        """Start the pair: as the paper does where no initialiser is named, and not at an embedding, whose A is zero."""
        super().reset(weight, init)
        if init.key == "default" and self.kind != "embedding":
            self.A.copy_(self.draw.normal(*self.A.shape, std=0.02))

    @classmethod
    def pair_rank(cls, spec: Any, shape: Shape) -> int | None:
        """None: masks of pruning stand between its factors and the change."""
        return None

    # ---- the change ----

    def pair(self) -> Factors:
        """The low-rank part's factors, silenced rows left out."""
        B, A = super().factors()
        return Factors(B if self.live is None else B * self.live.unsqueeze(1), A)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and scaled values of S, each (N,)."""
        rows, columns = self.index // self.shape.in_, self.index % self.shape.in_
        values = self.scale * self.values
        return rows, columns, values if self.live is None else values * self.live[rows]

    def _add_entries(self, y: Tensor, x: Input) -> Tensor:
        """Add S x to y (..., out) in place."""
        if not self.entries:
            return y
        rows, columns, values = self._entries()
        if isinstance(x, Tensor):
            picked = x.index_select(-1, columns)  # (..., N)
        else:
            ones = self.A.new_zeros(len(columns), self.shape.in_)
            picked = linear(x, ones.scatter(1, columns.unsqueeze(1), 1.0))
        return y.index_add_(-1, rows, (picked * values.to(picked.dtype)).to(y.dtype))

    def branch(self, x: Input) -> Tensor:
        """s (B A + S) x."""
        x = dropout(x, self.dropout, self.training)
        B, A = self.pair()
        return self._add_entries(linear(linear(x, A), B), x)

    def forward(self, x: Input, base: Base) -> Tensor:
        """(W * M) x + b + branch(x)."""
        frozen = base.linear if isinstance(x, Tensor) else None
        if self.kept is not None:
            return self._pruned(x, base, frozen) + self.branch(x)
        dropping = self.dropout > 0 and self.training
        if frozen is None or dropping or not isinstance(x, Tensor) or not fits(x, *frozen):
            return base(x) + self.branch(x)
        if x.dim() < 2 or not x.is_contiguous():  # the layer would take another kernel than for rows
            return base(x) + self.branch(x)
        B, A = self.pair()
        flat = x.reshape(-1, self.shape.in_)
        return self._add_entries(lowrank_linear(flat, *frozen, A, B), flat).reshape(*x.shape[:-1], self.shape.out)

    def _pruned(self, x: Input, base: Base, frozen: tuple[Tensor, Tensor | None] | None) -> Tensor:
        """(W * M) x + b, b without its silenced places."""
        assert self.kept is not None
        if frozen is not None and isinstance(x, Tensor):
            weight, bias = frozen
            return masked_linear(x, weight, bias if bias is None or self.live is None else bias * self.live, self.kept)
        y = base(x) - linear(x, base.weight * ~self.kept)
        if base.bias is None or self.live is None:
            return y
        return y - (base.bias * ~self.live).to(y.dtype)

    @property
    def reader(self) -> Delta | None:
        """None: its branch is more than a pair of factors."""
        return None

    def update(self) -> Tensor:
        """s (B A + S), (out, in): the trained part of the change."""
        B, A = self.pair()
        change = B @ A
        if not self.entries:
            return change
        rows, columns, values = self._entries()
        return change.index_put((rows, columns), values.to(change.dtype), accumulate=True)

    def dense(self, weight: Tensor) -> Tensor:
        """The update, and minus the pruned entries of the weight: (out, in)."""
        change = self.update()
        return change if self.kept is None else change - (weight * ~self.kept).to(change.dtype)

    def bias_change(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Minus the bias of silenced outputs."""
        return None if bias is None or self.live is None else -(bias * ~self.live)

    def factors(self) -> Factors | None:  # type: ignore[override]
        """Exact at rank r + min(#rows, #columns of Omega) while nothing is pruned."""
        return None if self.kept is not None else self.update_factors()

    def update_factors(self) -> Factors:
        """Return exact factors of the trained part: unit vectors appended for the rows or the columns of Omega."""
        B, A = self.pair()
        if not self.entries:
            return Factors(B, A)
        rows, columns, values = self._entries()
        sparse = B.new_zeros(self.shape).index_put((rows, columns), values)
        (r, _), (c, _) = (torch.unique(t, return_inverse=True) for t in (rows, columns))
        if len(r) <= len(c):  # E_r S_r with E_r the unit columns of Omega's rows
            ones, part = B.new_zeros(self.shape.out, len(r)), sparse[r]
            ones[r, torch.arange(len(r), device=r.device)] = 1
            return Factors(torch.cat([B, ones], 1), torch.cat([A, part]))
        ones = A.new_zeros(len(c), self.shape.in_)
        ones[torch.arange(len(c), device=c.device), c] = 1
        return Factors(torch.cat([B, sparse[:, c]], 1), torch.cat([A, ones]))

    def row_norms(self, weight: Tensor) -> Tensor:
        """The norm of every row of (weight + change), (out,)."""
        return super().row_norms(weight) if self.kept is None else Delta.row_norms(self, weight)

    # ---- pruning ----

    def prune(self, kept: Tensor, live: Tensor | None = None) -> None:
        """Let only the entries `kept` (out, in) of the weight act, and only the outputs `live` (out,) where given.

        What was pruned before stays pruned.
        """
        rows = torch.ones(self.shape.out, dtype=torch.bool, device=kept.device) if live is None else live
        before = torch.ones_like(kept) if self.kept is None else self.kept
        self.kept = self.stored(kept & before & rows.unsqueeze(1))
        if live is not None:
            self.live = self.stored(live if self.live is None else live & self.live)
        self.additive = False  # type: ignore[misc]

    def expect(self, names: set[str]) -> None:
        """Make room for the masks where the file has them."""
        super().expect(names)
        if "kept" in names:
            ones = torch.ones(self.shape, dtype=torch.bool)
            self.prune(ones, ones[:, 0] if "live" in names else None)

    @classmethod
    def inner_rank(cls, spec: Any, shape: Shape) -> None:  # type: ignore[override]
        """None: its change is more than a product."""
        return

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank (in + out) + N."""
        return super().count(spec, shape) + spec.entries

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """There are out * in entries and no more."""
        found = super().problems(spec, shape)
        if spec.entries > shape.out * shape.in_:
            found.append(
                f"dsee would train {spec.entries:,} single entries of a weight that has {shape.out * shape.in_:,}: "
                "lower entries there"
            )
        return found
