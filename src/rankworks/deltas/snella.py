"""SNELLA (and SNELL): a kernel matrix of two thin factors, of which only the largest entries survive.

    W' = W + S        D_oi = sum over heads h of c_h ||Q_ho - P_hi||,  c = (0.1, -0.1)        D (out, in)
                      D <- D + a softmax_o(D / g) + b                          SNELLA alone; a = g = 1, b = 0 at first
                      S = shrink(D) where |D| > theta, else 0                  theta: the t-quantile of |D|

P (2, in, rank/2), Q (2, out, rank/2) and, in SNELLA, the scalars a, g, b are trained: rank (in + out) + 3 numbers, yet
the rank of S is not bounded by theirs. Entries compete for the (1 - t) in out places in each pass; nothing of the
weight's size is kept: D is formed again in the backward pass. theta is exact for any size (torch.quantile stops at
2^24 entries): the entry of rank ceil(t in out) counted from below, so that exactly so many are zero without ties.

`shrink`   square   D |D|, with |D| held constant for the gradient: what the released code computes; the default
           soft     D (|D| - theta), theta held constant: the papers' formula as it was recalled, not verified
           hard     D

The start is not zero but tiny (|S| about 1e-6): two equal heads would be zero, and with `square` so would be every
gradient, for good. P, Q ~ U(-1, 1)/sqrt(in q), /sqrt(out q), q = rank/2, as the release draws them.
SNELL (`form="snell"`) has no scalars and takes any `norm`; SNELLA's is 2. The release drops inputs and whole changes
(`drop_path`) with probability 0.1; here neither is the default, as with every other delta.

During training the places move between layers (`deltas` share a budget of non-zeros, from `initial_sparsity` to
`sparsity` along a cubic, `rounds` times), in proportion to each layer's score mean(I U) of P plus that of Q, with
I, U running means of |p grad p| and of its deviation; a layer takes at most all its entries, and what is left over is
dealt again. `allocation="magnitude"` scores |p| in place of |p grad p|, "even" leaves every layer at one t.
Source: arXiv:2411.01800 (SNELL), arXiv:2510.24037 (SNELLA), and the authors' code for what the papers leave open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankworks.core.delta import Base, Delta, Entries
from rankworks.core.fields import Positive, Probability, Rank, Setting
from rankworks.core.forms.sparsity import Allocation, Schedule
from rankworks.core.forms.whole import Whole
from rankworks.core.hooks import Hook
from rankworks.core.inputs import Input
from rankworks.core.registry import delta
from rankworks.core.site import Shape

HEADS = (0.1, -0.1)


def _zeros(sparsity: float, shape: Shape) -> int:
    """Return how many entries are zero at a share t: ceil(t n), at least one place left."""
    n = shape.out * shape.in_
    return min(n - 1, -int(-sparsity * n // 1))


@delta("snella", title="SNELLA", year=2025, paper="arXiv:2510.24037")
class SNELLA(Whole):
    """A sparse kernel matrix."""

    unchanged_at_init: ClassVar[bool] = False

    rank: int = Rank(32, "width of the two factors over both heads; even")
    form: Literal["snella", "snell"] = Setting("snella", "snella: with the three scalars; snell: without")
    norm: float = Positive(2.0, "order p of the distance; SNELLA's is 2")
    shrink: Literal["square", "soft", "hard"] = Setting("square", "what becomes of the entries that survive")
    sparsity: float = Probability(0.3, "share of zeros at the end of training, over all layers")
    initial_sparsity: float = Probability(0.0, "share of zeros at the start")
    allocation: Literal["sensitivity", "magnitude", "even"] = Setting(
        "sensitivity", "how layers share the non-zeros during training: by sensitivity, by magnitude, or evenly"
    )
    rounds: int = Setting(100, "how often the shares are dealt during training (the paper: once per epoch)", ge=1)
    beta1: float = Probability(0.85, "decay of the running mean of the importance")
    beta2: float = Probability(0.85, "decay of the running mean of its deviation")
    dropout: float = Probability(0.0, "probability of dropping an input of the change in training")
    drop_path: float = Probability(0.0, "probability of dropping the whole change for an example in training")

    def setup(self, weight: Tensor) -> None:
        """Draw P and Q; a = g = 1, b = 0."""
        q = self.rank // 2
        self.P = self.trainable(2, self.shape.in_, q, bound=(self.shape.in_ * q) ** -0.5)
        self.Q = self.trainable(2, self.shape.out, q, bound=(self.shape.out * q) ** -0.5)
        if self.form == "snella":
            self.a, self.g = self.trainable(1, fill=1.0), self.trainable(1, fill=1.0)
            self.b = self.trainable(1)
        self.zeros = self.stored(torch.tensor([_zeros(self.initial_sparsity, self.shape)]))  # moved by the hook

    def kernel(self) -> Tensor:
        """D (out, in), in at least float32."""
        wide = torch.promote_types(self.P.dtype, torch.float32)
        P, Q = self.P.to(wide), self.Q.to(wide)
        first, second = (c * torch.cdist(Q[h], P[h], p=self.norm) for h, c in enumerate(HEADS))
        D = first + second
        if self.form == "snell":
            return D
        return D + self.a.to(wide) * torch.softmax(D / self.g.to(wide), dim=0) + self.b.to(wide)

    def matrix(self) -> Tensor:
        """S (out, in)."""
        D = self.kernel()
        size = D.detach().abs()
        theta = threshold(size, self.zeros)
        kept = torch.where(size > theta, D, 0)
        if self.shrink == "square":
            kept = kept * size
        elif self.shrink == "soft":
            kept = kept * (D.abs() - theta.clamp_min(0))
        return kept.to(self.P.dtype)

    def forward(self, x: Input, base: Base) -> Tensor:
        """The change of whole examples dropped in training where `drop_path` says so."""
        if not (self.training and self.drop_path):
            return super().forward(x, base)
        return base(x) + self.branch(x)

    def branch(self, x: Input) -> Tensor:
        """S x."""
        change = super().branch(x)
        if not (self.training and self.drop_path):
            return change
        keep = 1 - self.drop_path
        kept = torch.empty(change.shape[:1], device=change.device, dtype=change.dtype).bernoulli_(keep) / keep
        return change * kept.reshape(-1, *[1] * (change.dim() - 1))

    def entries(self) -> Entries:
        """The entries that are not zero."""
        flat = self.matrix().reshape(-1)
        index = flat.nonzero().squeeze(1)
        return Entries(index, flat[index])

    @classmethod
    def training_hook(cls, spec: Any, deltas: Mapping[str, Delta]) -> Hook | None:
        """The allocation of the non-zeros."""
        mine = {name: d for name, d in deltas.items() if isinstance(d, SNELLA)}
        sizes = {name: d.shape.out * d.shape.in_ for name, d in mine.items()}
        first, last = ({n: sizes[n] - _zeros(t(d), d.shape) for n, d in mine.items()} for t in (_initial, _final))
        return Allocation(
            {name: (d.P, d.Q) for name, d in mine.items()},
            {name: d.zeros for name, d in mine.items()},
            sizes,
            Schedule(first, last, spec.rounds),
            spec.allocation,
            (spec.beta1, spec.beta2),
        )

    @classmethod
    def exact_gradient(cls, spec: Any) -> bool:
        """Only where nothing is held constant."""
        return spec.shrink == "hard"

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank (in + out), and SNELLA's three scalars."""
        return spec.rank * (shape.in_ + shape.out) + 3 * (spec.form == "snella")

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """The rank is cut into two heads."""
        found = super().problems(spec, shape)
        if spec.rank % 2:
            found.append(f"snella cuts rank = {spec.rank} into two heads of equal width: give an even rank")
        if spec.form == "snella" and spec.norm != 2:
            found.append(f"snella's distance has norm 2, not {spec.norm:g}: leave norm out, or set form=snell")
        return found


def _initial(d: SNELLA) -> float:
    return d.initial_sparsity


def _final(d: SNELLA) -> float:
    return d.sparsity


def threshold(size: Tensor, zeros: Tensor) -> Tensor:
    """Return the number up to which entries of `size` are dropped so that `zeros` (1,) are; -1 where none is."""
    flat = size.reshape(-1)
    if torch.compiler.is_compiling() or flat.is_meta:  # no number may be read there: sort, and look it up
        found = flat.sort().values.index_select(0, (zeros - 1).clamp_min(0))
        return torch.where(zeros > 0, found, -1)
    dropped = int(zeros)
    return flat.kthvalue(dropped).values if dropped else flat.new_full((), -1)
