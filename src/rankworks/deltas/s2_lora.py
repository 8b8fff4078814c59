"""S2-LoRA: one trained pair of factors for all layers, and a sparse vector of rank coefficients for each.

    W_l' = W_l + B diag(s_l) A        A (r, in), B (out, r) trained and shared,  s_l (r,) trained, one per site

A, B ~ N(0, std^2) and s = 0 leave the output unchanged; s has a gradient at once, dL/ds_lj = b_j^T G_l a_j. Sites of
one shape share one pair: r (in + out) numbers per distinct shape and r per site. No alpha: s is a learned scale.

The loss gains penalty * sum |s|. "proximal" takes its exact step after the optimizer's, s <- sign(s) max(|s| - lr
penalty, 0), which gives true zeros; "l1" adds penalty sign(s) to the gradient. Either way |s| < threshold becomes zero
at the end. Adam's first step has length lr, so that with penalty >= 1 the proximal step undoes it for ever: refused.
A and B sum the gradients of all their sites; `shared_gradient="mean"` divides by their number (which Adam does not
see), after clipping. The export keeps the directions with s_j != 0: rank nnz(s_l).

No code is public, and the abstract fixes only the shared pair, the sparse vectors and the count. Ours: std 0.02 and the
optional penalty |A A^T - I|^2 + |B^T B - I|^2 (`orthogonality`) are AdaLoRA's, off by default; penalty 0.1, rank 32,
one pair per shape, so that any choice of layers will do. What the sites share must be the same for all, so no setting
may differ between them.
Source: arXiv:2309.11756, abstract.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankworks.core.delta import Delta, Factors
from rankworks.core.draw import Draw
from rankworks.core.fields import NonNegative, Positive, Probability, Rank, Setting
from rankworks.core.forms.lowrank import Factored
from rankworks.core.hooks import Hook, Moment
from rankworks.core.registry import delta
from rankworks.core.site import Shape


@delta("s2-lora", title="S2-LoRA", year=2023, paper="arXiv:2309.11756")
class S2LoRA(Factored):
    """Sparse coefficients of a trained pair that all sites of one shape share."""

    one_for_all: ClassVar[tuple[str, ...]] = (
        "rank", "std", "penalty", "sparsity", "threshold", "shared_gradient", "orthogonality", "dropout",
    )  # fmt: skip

    rank: int = Rank(32, "rank of the shared pair, and most that a site's change can have")
    std: float = Positive(0.02, "standard deviation of A and B at the start")
    penalty: float = NonNegative(0.1, "weight of the sum of |s| in the loss")
    sparsity: Literal["proximal", "l1"] = Setting("proximal", "how |s| is penalised: by an exact step, or its gradient")
    threshold: float = NonNegative(0.0, "smaller |s| become zero at the end of training")
    shared_gradient: Literal["mean", "sum"] = Setting("mean", "over the sites that share a pair")
    orthogonality: float = NonNegative(0.0, "weight of |A A^T - I|^2 + |B^T B - I|^2 in the loss")
    dropout: float = Probability(0.0, "probability of dropping an input of A in training")

    @classmethod
    def bank(cls, spec: Any, shapes: Sequence[Shape], draw: Draw) -> dict[str, Tensor]:
        """A trained A (r, in) and B (out, r) for every distinct shape."""
        pairs = {}
        for out, in_ in sorted(set(shapes)):
            pairs[f"A_{out}x{in_}"] = nn.Parameter(draw.normal(spec.rank, in_, std=spec.std))
            pairs[f"B_{out}x{in_}"] = nn.Parameter(draw.normal(out, spec.rank, std=spec.std))
        return pairs

    @classmethod
    def bank_size(cls, shapes: Sequence[Shape]) -> list[Any]:
        """The distinct shapes."""
        return sorted([s.out, s.in_] for s in set(shapes))

    def setup(self, weight: Tensor) -> None:
        """s = 0 leaves the output unchanged."""
        self.s = self.trainable(self.rank)

    def pair(self) -> Factors:
        """The shared B (out, r) and A (r, in)."""
        assert self.shared is not None
        out, in_ = self.shape
        return Factors(self.shared[f"B_{out}x{in_}"], self.shared[f"A_{out}x{in_}"])

    def factors(self) -> Factors:
        """Exact: (B diag(s), A), with every direction, so that one at zero gets its gradient."""
        B, A = self.pair()
        return Factors(B * self.s, A)

    def factors_on(self, weight: Tensor) -> Factors:
        """Exact at rank nnz(s), for an export; without any, one direction of zeros, since files need a rank."""
        B, A = self.pair()
        kept = self.s.nonzero().flatten() if self.s.any() else self.s.new_zeros(1, dtype=torch.long)
        return Factors(B[:, kept] * self.s[kept], A[kept])

    @classmethod
    def training_hook(cls, spec: Any, deltas: Mapping[str, Delta]) -> Hook | None:
        """The penalties."""
        return Penalties(spec, [d for d in deltas.values() if isinstance(d, S2LoRA)])

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank."""
        return spec.rank

    @classmethod
    def count_shared(cls, spec: Any, shapes: Sequence[Shape]) -> int:
        """rank (in + out) per distinct shape."""
        return sum(spec.rank * (s.out + s.in_) for s in set(shapes))

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """A proximal step longer than Adam's own never lets s leave zero."""
        found = super().problems(spec, shape)
        if spec.sparsity == "proximal" and spec.penalty >= 1:
            found.append(
                f"a proximal penalty of {spec.penalty:g} undoes every first step of Adam, whose length is the learning "
                "rate, so s would stay zero: give a penalty below 1, or sparsity='l1'"
            )
        return found


class Penalties(Hook):
    """What the loss gains beside the data's: sparsity of s, and orthogonality of the shared pairs."""

    def __init__(self, spec: Any, deltas: Sequence[S2LoRA]):
        self.spec, self.vectors = spec, [d.s for d in deltas]
        pairs = [d.pair() for d in deltas]
        self.sharers = Counter(id(t) for pair in pairs for t in pair)
        self.pairs = list({id(pair.A): pair for pair in pairs}.values())

    @torch.no_grad()
    def after_backward(self, moment: Moment) -> None:
        """Average what is shared, then add the gradients of the penalties."""
        weight = self.spec.orthogonality
        for B, A in self.pairs:
            for t in (A, B):
                if t.grad is not None and self.spec.shared_gradient == "mean":
                    t.grad.div_(self.sharers[id(t)])
            if weight and A.grad is not None:
                A.grad.add_(_apart(A) @ A, alpha=4 * weight)
            if weight and B.grad is not None:
                B.grad.add_(B @ _apart(B.t()), alpha=4 * weight)
        if self.spec.sparsity == "l1":
            for s in self.vectors:
                if s.grad is not None:
                    s.grad.add_(s.sign(), alpha=self.spec.penalty)

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Take the proximal step, with the learning rate that the optimizer just used."""
        if self.spec.sparsity == "proximal":
            rates = {id(p): float(group["lr"]) for group in moment.optimizer.param_groups for p in group["params"]}
            for s in self.vectors:
                if s.grad is not None and id(s) in rates:
                    s.copy_(F.softshrink(s, rates[id(s)] * self.spec.penalty))

    @torch.no_grad()
    def on_end(self, moment: Moment) -> None:
        """Set what is below the threshold to zero."""
        for s in self.vectors:
            s.masked_fill_(s.abs() < self.spec.threshold, 0.0)


def _apart(rows: Tensor) -> Tensor:
    """rows rows^T - I."""
    return rows @ rows.t() - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
