"""RandLoRA: a full-rank change from fixed random products, of which only diagonal scalings are trained.

    W' = W + s sum_{j=1..n} B_j diag(l_j) A diag(g_j)        n = ceil(d / r),  d = min(out, in),  D = max(out, in)

A (r, d) and B_j (D, r) are random, frozen, and shared by all sites, which read their first rows and columns; l (r, n)
and g (n, d) are trained: n (r + d) numbers, so a LARGER rank trains fewer. As written for in <= out; otherwise the
change is the transpose, A on the output side. l = 0 and g = 1/max(n, d) leave the output unchanged: at the first step
only l has a gradient. With P = dL/dM * A for M_jk = l_kj A_k g_j (a row of d), dL/dl_kj = P_jk . g_j and
dL/dg_j = sum_k l_kj P_jk, so M is not kept twice for the backward pass.

`pairing`: side by side the B_j have n r columns, and the M_jk are n r rows. The paper pairs column j r + k with M_jk.
Both released codes count the rows as k n + j instead, so that a column meets another row: the same law, other numbers.
"paper" is the default; "reference" computes what PEFT computes with the same bases, and its files are read with it.

Bases: Kaiming uniform, divided by their own standard deviation, from a CPU generator at `projection_seed`, A first and
then the B_j in order; rebuilt, never stored. PEFT draws in bfloat16 (float16 on some hosts), hence `drawn_in`; float32
is the default, being the same everywhere. `sparse` bases are -1, 0, 1 with probabilities 1/2q, 1 - 1/q, 1/2q at q = 3,
`very-sparse` at q = sqrt(d). Scale: alpha/r as in PEFT, whose alpha of 640 at rank 32 is our default 20 r, or
alpha/(r sqrt(n)) as in the authors' code with its alpha = 2 r (`sqrt-bases`).

Cost: with K = n r columns a token costs K (d + D) through M, and the dense change costs D K d once, whatever the
number of tokens. The cheaper of the two is taken: long batches form the change (again in the backward pass), short ones
never do, and fewer than r tokens do not even form M.
Source: arXiv:2502.00987, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankworks.core.delta import Base
from rankworks.core.draw import Draw
from rankworks.core.fields import Probability, Rank, Setting
from rankworks.core.forms.whole import Whole
from rankworks.core.inputs import Input, OneHot, Patches, linear
from rankworks.core.kernels.mode import compute_dtype, sees_through
from rankworks.core.registry import delta
from rankworks.core.site import Shape


@delta("randlora", title="RandLoRA", year=2025, paper="arXiv:2502.00987")
class RandLoRA(Whole):
    """Trained diagonals around shared random bases."""

    rank: int = Rank(32, "rank r of one random product; a larger one trains fewer numbers")
    alpha: float | None = Setting(None, "numerator of the scale; None: 20 rank", gt=0)
    scaling: Literal["standard", "sqrt-bases"] = Setting(
        "standard", "scale = alpha/rank, or alpha/(rank sqrt(n)) for sqrt-bases"
    )
    dropout: float = Probability(0.0, "probability of dropping an input in training")
    pairing: Literal["paper", "reference"] = Setting("paper", "which scaled row each random column meets")
    bases: Literal["uniform", "sparse", "very-sparse"] = Setting("uniform", "law of the random bases")
    drawn_in: Literal["float32", "bfloat16", "float16"] = Setting("float32", "type the uniform bases are drawn in")
    projection_seed: int = Setting(0, "seed of the shared bases, whatever the adapter's own seed", ge=0)

    @classmethod
    def bank(cls, spec: Any, shapes: Sequence[Shape], draw: Draw) -> dict[str, Tensor]:
        """A (r, d) first, then B (D, n, r): d and D of the widest output and the widest input."""
        d, most = sorted((max(s.out for s in shapes), max(s.in_ for s in shapes)))
        n, draw = _bases(spec.rank, d), draw.seeded(spec.projection_seed)
        if draw.device.type == "meta":
            return {"A": draw.uniform(spec.rank, d), "B": draw.uniform(most, n, spec.rank)}
        if spec.bases == "uniform":
            kind = getattr(torch, spec.drawn_in)
            A = _uniform(draw.generator, kind, spec.rank, 1, d)  # (r, 1, d): d is what Kaiming's rule sees as inputs
            B = torch.cat([_uniform(draw.generator, kind, most, 1, spec.rank) for _ in range(n)], dim=1)
        else:
            q = 3.0 if spec.bases == "sparse" else math.sqrt(d)
            A, B = (_ternary(draw.generator, q, *size) for size in ((spec.rank, 1, d), (most, n, spec.rank)))
        return {k: _unit(t).to(draw.device, draw.dtype) for k, t in (("A", A.squeeze(1)), ("B", B))}

    def setup(self, weight: Tensor) -> None:
        """lam (r, n) = 0 leaves the output unchanged; gamma (n, d) is the path by which it gets a gradient."""
        n, d = _bases(self.rank, min(self.shape)), min(self.shape)
        self.lam = self.trainable(self.rank, n)
        self.gamma = self.trainable(n, d, fill=1 / max(n, d))

    @property
    def scale(self) -> float:
        """The multiplier of the sum."""
        n = self.lam.shape[1] if self.scaling == "sqrt-bases" else 1
        return (self.alpha or 20.0 * self.rank) / (self.rank * math.sqrt(n))

    def _slices(self) -> tuple[Tensor, Tensor]:
        """The site's part of the bases: A (r, d) and the columns of all B_j side by side (D, n r), views."""
        assert self.shared is not None
        A, B = self.shared["A"][:, : min(self.shape)], self.shared["B"][: max(self.shape), : self.lam.shape[1]]
        return A.to(self.lam.dtype), B.flatten(1).to(self.lam.dtype)

    def _rows(self, A: Tensor) -> Tensor:
        """s M (n r, d), in the order of the pairing."""
        paper, lam = self.pairing == "paper", self.scale * self.lam
        make = _rows_plainly if sees_through() else _Rows.apply
        return make(A, lam.t() if paper else lam, self.gamma, paper).flatten(0, 1)  # type: ignore[union-attr]

    def matrix(self) -> Tensor:
        """The change (out, in)."""
        A, B = self._slices()
        change = B @ self._rows(A)  # (D, d)
        return change if self.shape.in_ <= self.shape.out else change.t()

    def branch(self, x: Input) -> Tensor:
        """The change times x in the cheapest order for this many tokens."""
        x, tokens = self._dropped(x), _tokens(x)
        if isinstance(x, Tensor) and tokens < self.rank:
            return self._without_rows(x)
        if not isinstance(x, OneHot) and self._cost_dense(tokens) < self._cost_rows(tokens):
            return linear(x, self.matrix())
        A, B = self._slices()
        first, second = self._rows(A), B  # (n r, d), (D, n r)
        return linear(linear(x, first), second) if self._reads_small else linear(linear(x, B.t()), first.t())

    def forward(self, x: Input, base: Base) -> Tensor:
        """One product with the changed weight where that is the cheapest, else base(x) + branch(x)."""
        if isinstance(x, Tensor) and self._dropped_nothing and _tokens(x) >= self.rank:
            frozen, tokens = base.linear, _tokens(x)
            if frozen is not None and self._cost_one(tokens, compute_dtype(x)) < self._cost_rows(tokens):
                return super().forward(x, base)
        return base(x) + self.branch(x)

    def _without_rows(self, x: Tensor) -> Tensor:
        """The change times a few tokens: lam and gamma scale what passes, and M is never formed."""
        A, B = self._slices()
        lam, n = (self.scale * self.lam).t(), self.lam.shape[1]  # (n, r)
        if self._reads_small:
            h = linear(x.unsqueeze(-2) * self.gamma.to(x.dtype), A)  # (..., n, r)
            return linear(self._ordered(h * lam.to(h.dtype)), B)
        h = linear(x, B.t())  # (..., n r)
        paper = self.pairing == "paper"
        h = h.unflatten(-1, (n, self.rank)) if paper else h.unflatten(-1, (self.rank, n)).transpose(-1, -2)
        z = linear(h * lam.to(h.dtype), A.t())  # (..., n, d)
        return (z * self.gamma.to(z.dtype)).sum(-2)

    def _ordered(self, h: Tensor) -> Tensor:
        """(..., n, r) as the n r columns the bases meet it with."""
        return (h if self.pairing == "paper" else h.transpose(-1, -2)).flatten(-2)

    @property
    def _reads_small(self) -> bool:
        """Whether A stands on the input side."""
        return self.shape.in_ <= self.shape.out

    @property
    def _dropped_nothing(self) -> bool:
        return not (self.training and self.dropout)

    # Multiplications of one call, its backward pass included where there will be one.

    def _cost_rows(self, tokens: int) -> int:
        """Through M: x M^T B^T; dL/dM and dL/dx."""
        d, D, K = min(self.shape), max(self.shape), self.lam.numel()
        return tokens * K * (3 * d + 2 * D if torch.is_grad_enabled() else d + D)

    def _cost_dense(self, tokens: int) -> int:
        """The change formed and applied apart from the base."""
        d, D, K = min(self.shape), max(self.shape), self.lam.numel()
        times, forms = (3, 2) if torch.is_grad_enabled() else (1, 1)
        return (times * tokens + forms * K) * d * D

    def _cost_one(self, tokens: int, dtype: torch.dtype) -> int:
        """The change added to the weight, and formed again in backward; apart from the weight in a 16-bit type."""
        d, D, K = min(self.shape), max(self.shape), self.lam.numel()
        times, forms = (1, 3) if torch.is_grad_enabled() else (0, 1)
        apart = (times + 1) if dtype.itemsize < 4 else 0
        return ((times + apart) * tokens + forms * K) * d * D

    @classmethod
    def portable(cls, spec: Any) -> bool:
        """It knows nothing of its weight but the size."""
        return True

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """n (rank + d)."""
        return _bases(spec.rank, min(shape)) * (spec.rank + min(shape))


def _bases(rank: int, d: int) -> int:
    """n, how many products of this rank reach full rank."""
    return -(-d // max(rank, 1))


def _tokens(x: Input) -> int:
    """How many vectors the input holds (for a convolution with a stride, at most)."""
    if isinstance(x, Patches):
        return x.image.numel() // max(x.image.shape[1], 1)
    return x.index.numel() if isinstance(x, OneHot) else x.shape[:-1].numel()


def _uniform(generator: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    """Kaiming uniform at a = sqrt(5), on the CPU."""
    return nn.init.kaiming_uniform_(torch.empty(size, dtype=dtype), a=math.sqrt(5), generator=generator)


def _ternary(generator: torch.Generator, q: float, *size: int) -> Tensor:
    """-1, 0 and 1 with probabilities 1/2q, 1 - 1/q, 1/2q, on the CPU."""
    drawn = torch.rand(size, generator=generator, dtype=torch.float32)
    return (drawn > 1 - 0.5 / q).float() - (drawn < 0.5 / q).float()


def _unit(basis: Tensor) -> Tensor:
    """Divide by the standard deviation, taken in float64 so that the number of threads cannot show in the result."""
    spread = float(basis.double().std()) if basis.numel() > 1 else 0.0
    return basis / torch.tensor(spread, dtype=basis.dtype) if spread else basis  # of few entries all may be equal


def _rows_plainly(A: Tensor, lam: Tensor, gamma: Tensor, paper: bool) -> Tensor:
    """M: (n, r, d) from lam (n, r), or (r, n, d) from lam (r, n); A (r, d), gamma (n, d)."""
    pair = A * gamma.unsqueeze(1) if paper else A.unsqueeze(1) * gamma
    return pair * lam.unsqueeze(-1)


class _Rows(torch.autograd.Function):
    """M, which keeps A, lam and gamma for the backward pass and nothing of M's size."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, lam: Tensor, gamma: Tensor, paper: bool) -> Tensor:
        ctx.save_for_backward(A, lam, gamma)
        ctx.paper = paper
        pair = A * gamma.unsqueeze(1) if paper else A.unsqueeze(1) * gamma
        return pair.mul_(lam.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        A, lam, gamma = ctx.saved_tensors
        product = gradients[0] * (A if ctx.paper else A.unsqueeze(1))  # (n, r, d) or (r, n, d)
        if ctx.paper:
            return None, torch.einsum("jki,ji->jk", product, gamma), torch.einsum("jki,jk->ji", product, lam), None
        return None, torch.einsum("kji,ji->kj", product, gamma), torch.einsum("kji,kj->ji", product, lam), None
