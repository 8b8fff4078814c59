"""NLoRA: LoRA with an r x r matrix between its factors, all three trained; SLoRA where it starts at the base.

    W' = W + s (B N A - B0 N0 A0)        A (r, in),  N (r, r),  B (out, r),  s = alpha/r

By default B starts at zero and A, N are Kaiming uniform (SLoRA), with no B0 N0 A0: the model starts as its base.
dL/dN = s B^T G A^T is then zero at first and dL/dB = s G (N A)^T is not. `init="nlora"` takes the factors from blocks
of the weight, in the manner of the Nystrom approximation. r (in + out) + r^2 numbers per site.
B0 N0 A0 is the product they start from where that is taken out of the weight (as in core/forms/lowrank.py): the change
is then an exact LoRA of rank 2r, else of rank r. N alone, between the weight's own blocks, is the delta `inttune`.
An embedding turns the roles at the start: A is zero and B ~ N(0, 1), as for LoRA.
Source: arXiv:2502.14482, sections 3.1 and 3.2, and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.delta import Factors
from rankworks.core.forms.lowrank import Factored
from rankworks.core.forms.triple import Triple
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, begin


@delta("nlora", title="NLoRA (SLoRA)", year=2025, paper="arXiv:2502.14482")
class NLoRA(Triple, Factored):
    """Three trained factors."""

    A: nn.Parameter
    N: nn.Parameter
    B: nn.Parameter
    A0: Tensor | None
    N0: Tensor | None
    B0: Tensor | None

    def setup(self, weight: Tensor) -> None:
        """Allocate the three; the start fills them."""
        self.A = self.trainable(self.rank, self.shape.in_)
        self.N = self.trainable(self.rank, self.rank)
        self.B = self.trainable(self.shape.out, self.rank)
        for name in ("A0", "N0", "B0"):  # given tensors by a start that is taken out of the base
            self.register_buffer(name, None)

    @torch.no_grad()
    def reset(self, weight: Tensor, init: Init) -> None:
        """Start as SLoRA, or from an initialiser of three factors."""
        if init.key == "default":
            self._slora()
            return
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        start = begin(init, Place(exact, self.rank, self.scale, self.draw, self.kind, 3, self.evidence))
        assert start.core is not None
        for factor, value in ((self.A, start.A), (self.N, start.core), (self.B, start.B)):
            factor.copy_(value)
        if start.from_base:
            self.A0, self.N0, self.B0 = (self.stored(t.detach().clone()) for t in (self.A, self.N, self.B))

    def _slora(self) -> None:
        r = self.rank
        if self.kind == "embedding":
            self.B.copy_(self.draw.normal(self.shape.out, r))
        else:
            self.A.copy_(self.draw.uniform(r, self.shape.in_, bound=self.shape.in_**-0.5))
        self.N.copy_(self.draw.uniform(r, r, bound=r**-0.5))

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make room for the start where the file has one."""
        if {"A0", "N0", "B0"} & set(shapes):
            self.A0, self.N0, self.B0 = (self.stored(torch.zeros_like(t.data)) for t in (self.A, self.N, self.B))

    def factors(self) -> Factors:
        """Exact: (s B N, A), or s [B N - B0 N0, B0 N0] [A; A - A0], which is zero to the bit at the start."""
        return self._product(self.A)

    def gated(self, gate: Tensor) -> Factors:
        """(s B N, diag(gate) A), less the start: the gate acts on what is trained."""
        return self._product(gate.to(self.A.dtype).unsqueeze(1) * self.A)

    def _product(self, A: Tensor) -> Factors:
        left = self.B @ self.N  # (out, r)
        if self.A0 is None or self.N0 is None or self.B0 is None:
            return Factors(self.scale * left, A)
        start = self.B0 @ self.N0
        return Factors(self.scale * torch.cat([left - start, start], dim=1), torch.cat([A, A - self.A0], dim=0))

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank (in + out) + rank^2."""
        return spec.rank * (shape.in_ + shape.out) + spec.rank**2
