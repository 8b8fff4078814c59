"""NOLA: LoRA factors that are mixtures of seeded random matrices, of which only the mixing numbers are trained.

    W' = W + s B A        A = A0 + sum_{i=1..k} a_i A_i (r, in),   B = sum_{j=1..l} b_j B_j (out, r),   s = alpha/r

A_i and B_j are random and never stored: entry by entry they are a function of a seed (`core/kernels/counter.py`), made
again in the forward and in the backward pass, a few matrices at a time. k + l numbers per site, whatever its width and
rank. With G = dL/dW', dL/da_i = s <B^T G, A_i> and dL/db_j = s <G A^T, B_j>.

`form`: "lm", of the language-model code, has A_i ~ U(-1, 1)/sqrt(k), B_j ~ U(-1, 1)/sqrt(l) and a frozen
A0 ~ U(-1, 1)/sqrt(in) (Kaiming uniform); a = b = 0 leaves the output unchanged, and b gets the first gradient, as in
LoRA. The paper's equation has no A0: at a = b = 0 it would be a saddle where nothing has a gradient. Its B0 is zero.
"vit", of the vision code, has A_i ~ U(-1, 1)/sqrt(in), B_j ~ U(-1, 1)/sqrt(r), no A0, and starts away from the base, at
a_i = 1/k, b_j = 1/l; its scale is alpha = 1.

Both factors of a site have a seed each, rebuilt from the adapter's seed and the site's name (the released code stores
one below 1e10 per factor; its layers in "vit" all share seed 0). `sample`, the first numbers of both, is not stored
either, but an adapter file knows its checksum: bases that come out otherwise are refused. `keep_bases` holds the bases
in memory, for speed: (k + 1) r in + l r out numbers per site. Making them costs as many random numbers per pass, so
generate with merged weights.
Source: arXiv:2310.02556, section 3.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.delta import Factors
from rankworks.core.fields import Positive, Probability, Rank, Setting
from rankworks.core.forms.lowrank import Factored
from rankworks.core.kernels.counter import SEED_BITS, basis, combine, most_matrices
from rankworks.core.registry import delta
from rankworks.core.site import Shape

SAMPLE = 8  # numbers of either basis by which a file recognises it


@delta("nola", title="NOLA", year=2023, paper="arXiv:2310.02556")
class NOLA(Factored):
    """Two vectors of mixing numbers over regenerated bases."""

    rank: int = Rank(8)
    alpha: float = Positive(8.0, "numerator of the scale alpha/rank")
    bases_a: int = Setting(512, "k, the number of random matrices mixed into A", ge=1)
    bases_b: int = Setting(512, "l, the number of random matrices mixed into B", ge=1)
    form: Literal["lm", "vit"] = Setting("lm", "start and law of the bases: the language-model or the vision code's")
    keep_bases: bool = Setting(False, "hold the bases in memory in place of making them in every pass")
    dropout: float = Probability(0.0, "probability of dropping an input of A in training")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def setup(self, weight: Tensor) -> None:
        """Draw the two seeds; a and b are all that is trained."""
        out, in_ = self.shape
        self.seeds = self.frozen(torch.randint(2**SEED_BITS, (2,), generator=self.draw.generator))  # of A, of B
        self.sample = self.frozen(torch.stack([basis(seed, 1, SAMPLE)[0] for seed in self.seeds]))
        started = self.form == "vit"
        self.a = self.trainable(self.bases_a, fill=1 / self.bases_a if started else 0.0)
        self.b = self.trainable(self.bases_b, fill=1 / self.bases_b if started else 0.0)
        if self.keep_bases:
            sizes = (self.bases_a + (not started), self.rank * in_), (self.bases_b, self.rank * out)
            kept = [basis(seed, *size, self.draw.dtype) for seed, size in zip(self.seeds, sizes, strict=True)]
            self.basis_A, self.basis_B = (self.frozen(t) for t in kept)

    def factors(self) -> Factors:
        """Exact at rank r: (s B, A), from bases made here."""
        out, in_ = self.shape
        if self.form == "lm":  # A0 is one more matrix, whose coefficient is not trained
            a = torch.cat([self.a / self.bases_a**0.5, self.a.new_full((1,), in_**-0.5)])
            b = self.b * (self.scale / self.bases_b**0.5)
        else:
            a, b = self.a / in_**0.5, self.b * (self.scale / self.rank**0.5)
        if self.keep_bases:
            A, B = a @ self.basis_A.to(a.dtype), b @ self.basis_B.to(b.dtype)
        else:
            A, B = combine(a, self.seeds[0], self.rank * in_), combine(b, self.seeds[1], self.rank * out)
        return Factors(B.view(out, self.rank), A.view(self.rank, in_))

    @classmethod
    def starts_unchanged(cls, spec: Any) -> bool:
        """Not in the vision code's form, whose factors start as the mean of their bases."""
        return spec.form == "lm"

    @classmethod
    def inner_rank(cls, spec: Any, shape: Shape) -> int:
        """The rank."""
        return spec.rank

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """k + l."""
        return spec.bases_a + spec.bases_b

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """One seed makes 2^33 numbers."""
        found = super().problems(spec, shape)
        for setting, side in (("bases_a", shape.in_), ("bases_b", shape.out)):
            if spec.rank and getattr(spec, setting) >= most_matrices(spec.rank * side):
                found.append(
                    f"nola makes at most {most_matrices(spec.rank * side) - 1:,} matrices of {spec.rank} x {side} from "
                    f"one seed, and {setting} is {getattr(spec, setting):,}: lower it, or rank, there"
                )
        return found
