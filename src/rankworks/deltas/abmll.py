"""ABMLL: a Gaussian over the change of every weight, and another one over tasks that it starts from, four LoRA pairs.

    W' = W + s mu_phi                               a task's mean: a plain LoRA, what an ordinary run trains and exports
    W' = W + s (mu_phi + sigma_phi * eps)           a sample, eps ~ N(0, I) for every entry and every forward pass

    mu_phi   = B A      sigma_phi   = c exp(spread_B spread_A)                the task's posterior
    mu_theta = B A      sigma_theta = c exp(spread_B spread_A)                the prior, its own factors: prior_*

A (r, in), B (out, r), s = alpha/r; each B starts at zero, so the model starts as its base and every spread as c. The
posterior starts as the prior. `rw.MetaLearner` (train/meta.py) trains all of it: the posterior in a few steps on a
task, the prior over tasks, with samples and the divergence of the two; there 4 r (in + out) numbers learn. An ordinary
run trains the posterior's mean, r (in + out) numbers, and carries the rest along in the adapter's file.

A sample is applied without a matrix of the weight's size (core/kernels/gaussian.py). Merging, exporting and
delta_weights see the mean, a rank-r LoRA; spreads are dropped there.

The paper prints sigma = B A + c I and calls it a variance. An identity is undefined for m != n and would leave no
spread beside the diagonal, so here c is added to every entry, and sigma is the standard deviation. It is kept positive
by an exponential, which leaves sigma = c where its B is zero: form="log"; form="additive" is max(B A + c, 1e-6), the
literal formula. No value of c is published but that it goes with the spread of the pretrained weights: None takes 0.01
times the standard deviation of the weight's entries, which moves outputs little at the start; it is stored.
Source: arXiv:2508.14285 (there is no released code); the method it builds on: Ravi and Beatson, ICLR 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankworks.core.amend import Amendment
from rankworks.core.delta import Delta
from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.forms.lowrank import LowRank
from rankworks.core.inputs import Input, linear
from rankworks.core.kernels.gaussian import Form, Gaussian, HyperPrior, Spread, noise_linear, noise_matrix
from rankworks.core.registry import delta
from rankworks.core.site import Shape

PAIRS = (("A", "B"), ("spread_A", "spread_B"))
"""The posterior's factors; the prior's have the same names after `prior_`."""


@delta("abmll", title="ABMLL", year=2025, paper="arXiv:2508.14285")
class ABMLL(LowRank):
    """A LoRA that is the mean of a Gaussian, and the prior of that Gaussian."""

    rank: int = Rank(8)
    alpha: float = Positive(16.0, "numerator of the scale")
    form: Form = Setting("log", "what a spread's factors give: its logarithm over c, or what is added to c")
    c: float | None = Setting(None, "spread where its factors are zero; None: 0.01 of the weight's own", gt=0)

    deviation: Tensor  # () standard deviation of the base weight's entries
    noise: Noise | None = None  # while set, every forward pass adds this sample's deviation from the mean

    def setup(self, weight: Tensor) -> None:
        """The mean's factors, trained; its spread's and the prior's, stored."""
        super().setup(weight)
        self.deviation = self.stored(weight.to(self.draw.dtype).std(correction=0))
        out, in_ = self.shape
        self.spread_A = self.stored(torch.zeros(self.rank, in_, dtype=self.draw.dtype))
        self.spread_B = self.stored(torch.zeros(out, self.rank, dtype=self.draw.dtype))
        for name in (name for pair in PAIRS for name in pair):
            self.register_buffer(f"prior_{name}", self.stored(torch.zeros_like(getattr(self, name).data)))

    @torch.no_grad()
    def reset(self, weight: Tensor, init: Any) -> None:
        """Start the mean as a LoRA of the same seed does, the spread at c, and the prior at both."""
        super().reset(weight, init)
        spread = self.tensors()[2]  # (r, in)
        spread.copy_(self.draw.normal(*spread.shape, std=max(self.rank, 1) ** -0.5))
        self.settle_prior()

    def adopt(self, spec: Any) -> None:
        """Take other settings, and room for factors of that rank."""
        super().adopt(spec)
        shapes = {"A": self.A.shape, "B": self.B.shape}
        for name in (name for pair in PAIRS for name in pair):
            for each in (f"prior_{name}", *([name] if name.startswith("spread") else [])):
                held: Tensor = getattr(self, each)
                if held.shape != shapes[name[-1]]:
                    setattr(self, each, self.stored(held.new_zeros(shapes[name[-1]])))

    # ---- posterior and prior --------------------------------------------------------------------------------------

    def tensors(self, prior: bool = False) -> list[Tensor]:
        """The four factors of the posterior, or of the prior."""
        return [getattr(self, f"prior_{name}" if prior else name) for pair in PAIRS for name in pair]

    def law(self, prior: bool = False) -> Gaussian:
        """The posterior or the prior, before the scale."""
        A, B, C, D = self.tensors(prior)
        return Gaussian(B, A, Spread(D, C, self.spread_at_rest, self.form))

    @property
    def spread_at_rest(self) -> Tensor | float:
        """c, on the device where it is no setting."""
        return 0.01 * self.deviation if self.c is None else self.c

    def hyper_prior(self, relative: bool = True) -> HyperPrior:
        """What the prior's own means and precisions are expected to be, in units of this weight or absolute."""
        return HyperPrior(self.deviation, self.spread_at_rest) if relative else HyperPrior(1.0, 1.0)

    @torch.no_grad()
    def start_task(self) -> None:
        """Put the posterior to the prior."""
        for mine, start in zip(self.tensors(), self.tensors(prior=True), strict=True):
            mine.copy_(start)

    @torch.no_grad()
    def settle_prior(self) -> None:
        """Put the prior to the posterior."""
        for start, mine in zip(self.tensors(prior=True), self.tensors(), strict=True):
            start.copy_(mine)

    @property
    def _amendment(self) -> Amendment | None:
        if self.noise is not None:  # in evaluation too: tasks are predicted with samples
            return self.noise
        return self.amended if self.training else None

    # ---- what others may do with it -------------------------------------------------------------------------------

    @property
    def pair(self) -> Delta | None:
        """None: a schedule that cuts the mean's ranks would leave the prior's."""
        return None

    @classmethod
    def pair_rank(cls, spec: Any, shape: Shape) -> int | None:
        """None."""
        return None


class Noise(Amendment):
    """One sample's deviation from the mean, s sigma_phi * eps, for every forward pass while it stands on a delta."""

    def __init__(self, owner: ABMLL, seed: int):
        self.owner, self.seed = owner, seed

    def output(self, y: Tensor, x: Input) -> Tensor:
        """Add it, applied to x (..., in)."""
        owner = self.owner
        if isinstance(x, Tensor):
            return y + owner.scale * noise_linear(x, owner.law().spread, self.seed).to(y.dtype)
        return y + linear(x, self.matrix_of(x.dtype)).to(y.dtype)

    def matrix(self, change: Tensor) -> Tensor:
        """Add it to the change (out, in)."""
        return change + self.matrix_of(change.dtype)

    def matrix_of(self, dtype: torch.dtype) -> Tensor:
        """The deviation (out, in)."""
        return (self.owner.scale * noise_matrix(self.owner.law().spread, self.seed)).to(dtype)
