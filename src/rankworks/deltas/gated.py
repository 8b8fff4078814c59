"""Gated ranks: a trained gate per rank between the two factors of any change that has such factors.

    W' = W + B diag(g) A        B (out, k), A (k, in) the inner delta's factors, its scale folded in;  g (k,) = 1

Rank schedules act through it (`ranks="adalora"`, ...), which also set where g starts: a gate that is zero to the bit
takes its rank out of the change. Around a trained pair (LoRA) the ranks themselves can then be removed; with a start
taken out of the base (PiSSA) the gate acts on the trained product alone, W + s (B diag(g) A - B0 A0).
With G = dL/dW': dL/dg = diag(B^T G A^T), which is zero where the start of B or A is.
A schedule may hold the last gates constant (`trained_gates`) and ask to see G (`watch`, core/ranks/watch.py).
Source: the middle factor of arXiv:2303.10512 (equation 3) and the gate of arXiv:2311.11696 (section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta, Factors
from rankworks.core.fields import Setting
from rankworks.core.forms.lowrank import Factored
from rankworks.core.forms.wrapper import Wrapper
from rankworks.core.inputs import Input, dropout, linear
from rankworks.core.ranks.watch import Note, watched
from rankworks.core.registry import DeltaSpec, delta
from rankworks.core.site import Shape


@delta("gated", title="Gated ranks", year=2023, paper="arXiv:2303.10512")
class Gated(Wrapper, Factored):
    """A gate per rank of an inner delta with exact factors."""

    inner: DeltaSpec = Setting("lora", "the delta between whose factors the gates stand; must have exact factors")

    gate: nn.Parameter
    trained_gates: int | None = None  # how many gates, from the first, are trained; None: all. A schedule sets it
    watch: Note | None = None  # while set, called with the change's gradient (out, in) in every backward

    def setup(self, weight: Tensor) -> None:
        """Build the inner delta and the gates, all one."""
        self.inner = self.child(self.spec.inner, weight)
        self.dropout = getattr(self.inner, "dropout", 0.0)
        self.gate = self.trainable(self._ranks(), fill=1.0)

    def _ranks(self) -> int:
        """k: how many ranks there are to scale."""
        if self.inner.pair is not None:
            return self.inner.pair.rank
        factors = self.inner.factors()
        assert factors is not None
        return factors.A.shape[0]

    @torch.no_grad()
    def reset(self, weight: Tensor, init: Any) -> None:
        """Start the inner delta."""
        self.inner.reset(weight, init)

    def adopt(self, spec: Any) -> None:
        """Take other settings, and as many gates as the inner delta then has ranks."""
        super().adopt(spec)
        if len(self.gate) != self._ranks():
            self.gate = nn.Parameter(self.gate.data.new_ones(self._ranks()))

    def factors(self) -> Factors:
        """Exact: (B, diag(g) A)."""
        held = self.trained_gates
        gate = self.gate if held is None else torch.cat([self.gate[:held], self.gate[held:].detach()])
        return self.inner.gated(gate)

    def factors_on(self, weight: Tensor) -> Factors:
        """The factors of the ranks that act: without those whose gate is zero (a change of zero keeps one)."""
        B, A = self.factors()
        acts = A.any(dim=1)
        if acts.all():
            return Factors(B, A)
        if not acts.any():
            acts[:1] = True
        return Factors(B[:, acts], A[acts])

    def branch(self, x: Input) -> Tensor:
        """B diag(g) A drop(x), watched where somebody asks."""
        if self.watch is None or not torch.is_grad_enabled():
            return super().branch(x)
        dropped = dropout(x, self.dropout, self.training)
        B, A = self.acting_factors()
        return self._amend(watched(linear(linear(dropped, A), B), dropped, self.watch), x)

    def dense(self, weight: Tensor) -> Tensor:
        """The product, watched where it is differentiated: grouped convolutions and experts take it as a matrix."""
        change = super().dense(weight)
        if self.watch is not None and change.requires_grad:
            change.register_hook(self.watch)
        return change

    @property
    def reader(self) -> Delta | None:
        """Itself, unless it is watched: then it runs by itself."""
        return self if self.watch is None else None

    @property
    def empty(self) -> bool:
        """Whether every gate is zero, or the inner delta is without ranks; not with a start taken out of the base."""
        return self.inner.empty or not (bool(self.gate.any()) or bool(self.factors().A.any()))

    @classmethod
    def gates(cls, spec: Any, shape: Shape) -> int:
        """The number of gates at a site."""
        inner = spec.inner
        rank = inner.method.cls.factored_rank(inner)
        return inner.method.cls.inner_rank(inner, shape) if rank is None else rank

    @classmethod
    def portable(cls, spec: Any) -> bool:
        """Where the inner delta is."""
        return spec.inner.method.cls.portable(spec.inner)

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """The inner delta's count and one gate per rank."""
        return spec.inner.method.cls.count(spec.inner, shape) + cls.gates(spec, shape)

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """The inner delta's, and that it must be additive with factors that stand by themselves."""
        inner = spec.inner.method.cls
        if not inner.additive or inner.inner_rank(spec.inner, shape) is None:
            return [
                f"gates stand between two factors, and {spec.inner.key!r} has none: choose lora, vera, lora-xs, ..."
            ]
        return inner.problems(spec.inner, shape)
