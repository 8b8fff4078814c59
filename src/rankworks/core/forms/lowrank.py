"""Factored: deltas applied through exact factors. LowRank: those with two trained ones, scale * (B A - B0 A0).

B0 A0 is the product the factors start from when an initialiser takes them out of the base weight (PiSSA, OLoRA), and
absent otherwise. Subtracting it here, rather than from the base, leaves the base untouched: several adapters live on
one model, detaching is exact, the start leaves the output bit-identical, and the change is an exact LoRA of rank 2r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rankworks.core.amend import Amendment
from rankworks.core.delta import Base, Delta, Factors
from rankworks.core.fields import Positive, Probability, Rank, Setting
from rankworks.core.inputs import Input, dropout, linear
from rankworks.core.kernels import alone, fits, lowrank_linear, lowrank_row_norms, write
from rankworks.core.share import SharedInput
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, begin


class Nested(NamedTuple):
    """Which part of the factors acts: the first `width` ranks, of which the first `still` get no gradient."""

    width: int
    still: int = 0
    rescaled: bool = True  # the scale is that of a change of rank `width`, and not of the whole


class Factored(Delta):
    """A delta applied through exact factors B (out, k), A (k, in), which `factors` makes of whatever is trained.

    A subclass writes `setup` and `factors`; the layer then runs in one pass, and layers that read one input read it
    once. It may have a `dropout` setting, which acts on the input of A, and a `shift`.
    """

    dropout: float = 0.0
    amended: Amendment | None = None  # what a method of training does to it in training mode

    def factors(self) -> Factors:
        """Return the factors, as a function of the trained tensors."""
        raise TypeError(f"{type(self).__name__} must define factors()")

    def acting_factors(self) -> Factors:
        """Return the factors that a forward pass uses now."""
        return self.factors() if self._amendment is None else self._amendment.factors(self.factors())

    @property
    def _amendment(self) -> Amendment | None:
        return self.amended if self.training else None

    def _amend(self, y: Tensor, x: Input) -> Tensor:
        return y if self._amendment is None else self._amendment.output(y, x)

    def branch(self, x: Input) -> Tensor:
        """B A drop(x), and the shift."""
        B, A = self.acting_factors()
        change, shift = linear(linear(dropout(x, self.dropout, self.training), A), B), self.shift()
        return self._amend(change if shift is None else change + shift.to(change.dtype), x)

    def acting_dense(self, weight: Tensor) -> Tensor:
        """The change as a matrix, as a forward pass uses it now."""
        if self._amendment is None:
            return self.dense(weight)
        B, A = self.acting_factors()
        return self._amendment.matrix(B @ A)

    def shift(self) -> Tensor | None:
        """Return a trained vector (out,) that the change also adds to the output, or None."""
        return None

    def bias_change(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The shift."""
        return self.shift()

    def forward(self, x: Input, base: Base) -> Tensor:
        """base(x) + branch(x), in one pass where the base is a plain linear layer."""
        if isinstance(x, Tensor) and self.reader is self:
            frozen = base.linear
            if frozen is not None and fits(x, *frozen):
                return self._fused(x, frozen, base.shared)
        return base(x) + self.branch(x)

    def _fused(self, x: Tensor, frozen: tuple[Tensor, Tensor | None], shared: SharedInput | None) -> Tensor:
        p = self.dropout if self.training else 0.0
        if shared is not None and (p or torch.is_grad_enabled()):  # without either, sharing costs more than it saves
            taken = shared.take(self, x)
            if taken is not None:
                reading, place, B = taken
                return self._amend(write(reading, place, *frozen, B, self.shift()), x)
        B, A = self.acting_factors()
        return self._amend(lowrank_linear(x, *frozen, A, B, p, self.shift()), x)

    @property
    def reader(self) -> Delta | None:
        """Itself, unless a subclass has a branch of its own."""
        return self if type(self).branch is Factored.branch else None

    def row_norms(self, weight: Tensor) -> Tensor:
        """The norm of every row of (weight + change), (out,), without forming the whole sum."""
        B, A = self.factors()
        return lowrank_row_norms(weight, A, B)


class Pair(Delta):
    """A delta with two trained factors A (rank, in), B (out, rank), whose ranks a schedule may order, cut and grow."""

    A: nn.Parameter
    B: nn.Parameter
    rank: Any
    scale: Any  # what multiplies B A
    nested: Nested | None = None  # set by a schedule that trains many ranks at once
    held: Literal["A", "B"] | None = None  # the factor that gets no gradient now; an optimizer that alternates sets it

    @property
    def pair(self) -> Delta | None:
        """Itself."""
        return self

    def acting(self) -> tuple[Tensor, Tensor]:
        """Return B (out, k) and A (k, in), of the ranks that act."""
        return (self.B, self.A) if self.nested is None else _nested(self.B, self.A, self.nested)

    def settle(self, rank: int, scale: float) -> None:
        """Let the settings say the rank there is now, such that B A is multiplied by this scale."""
        raise TypeError(f"{type(self).__name__} must define settle(rank, scale)")


class LowRank(Pair, Factored):
    """A delta whose change is scale * B A with A (rank, in) and B (out, rank) trained."""

    rank: int = Rank(8)
    alpha: float = Positive(8.0, "numerator of the scale")
    scaling: Literal["standard", "rslora"] = Setting("standard", "scale = alpha/rank, or alpha/sqrt(rank) for rslora")
    dropout: float = Probability(0.0, "probability of dropping an input of A in training")

    A0: Tensor | None
    B0: Tensor | None

    @property
    def scale(self) -> float:
        """The multiplier of B A: of the ranks that act, where they are nested and rescaled."""
        narrowed = self.nested is not None and self.nested.rescaled
        return scale_of(self.alpha, self.nested.width if narrowed else self.rank, self.scaling)  # type: ignore[union-attr]

    def settle(self, rank: int, scale: float) -> None:
        """alpha follows the rank."""
        alpha = alpha_of(scale, rank, self.scaling)
        self.spec = self.spec.replace(rank=rank, alpha=alpha)
        self.rank, self.alpha = rank, alpha

    @property
    def empty(self) -> bool:
        """Without ranks, unless a start is taken out of the base or a bias is trained."""
        return self.rank == 0 and self.A0 is None and self.shift() is None

    def setup(self, weight: Tensor) -> None:
        """Allocate A and B; the initialiser fills them."""
        self.A = self.trainable(self.rank, self.shape.in_)
        self.B = self.trainable(self.shape.out, self.rank)
        self.register_buffer("A0", None)  # given a tensor by the starts that are taken out of the base
        self.register_buffer("B0", None)

    @torch.no_grad()
    def reset(self, weight: Tensor, init: Init) -> None:
        """Fill A and B from the initialiser, and remember the start where it was taken out of the base."""
        if not self.rank:  # an allocation may leave a site without any
            return
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        start = begin(init, Place(exact, self.rank, self.scale, self.draw, self.kind, evidence=self.evidence))
        self.A.copy_(start.A)
        self.B.copy_(start.B)
        if start.from_base:
            self.A0, self.B0 = self.stored(self.A.detach().clone()), self.stored(self.B.detach().clone())

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make room for the start where the file has one: it keeps its rank when that of A and B changes."""
        super().make_room(shapes)
        if {"A0", "B0"} <= set(shapes):
            self.A0, self.B0 = (self.stored(self.A.data.new_zeros(shapes[name])) for name in ("A0", "B0"))

    def adopt(self, spec: Any) -> None:
        """Take other settings; A and B are made again, as zeros, where the rank is another."""
        self.spec = spec
        if spec.rank != self.rank:
            self.A = nn.Parameter(self.A.data.new_zeros(spec.rank, self.shape.in_))
            self.B = nn.Parameter(self.B.data.new_zeros(self.shape.out, spec.rank))
        self.rank, self.alpha = spec.rank, spec.alpha

    def factors(self) -> Factors:
        """Exact: (scale B, A), or the rank-2r pair `scale [B - B0, B0] [A; A - A0] = scale (B A - B0 A0)`.

        Written with differences, the change is zero to the bit at the start on every backend, and a small change
        keeps its digits in a 16-bit type, where B A x - B0 A0 x would lose them to cancellation.
        """
        if self.held is None:
            return self._product(self.B, self.A)
        if self.held == "A":
            return self._product(*alone(self.B, self.A))
        A, B = alone(self.A, self.B)
        return self._product(B, A)

    def gated(self, gate: Tensor) -> Factors:
        """(scale B, diag(gate) A), less the start: the gate acts on what is trained."""
        return self._product(self.B, gate.to(self.A.dtype).unsqueeze(1) * self.A)

    def unscaled(self) -> Factors:
        """The factors of change / scale, of the ranks that act: (B, A), or ([B, -B0], [A; A0]) with a start."""
        B, A = self.acting()
        if self.A0 is None or self.B0 is None:
            return Factors(B, A)
        start = scale_of(self.alpha, self.rank, self.scaling) / (self.scale or 1.0)
        return Factors(torch.cat([B, -start * self.B0], dim=1), torch.cat([A, self.A0], dim=0))

    def _product(self, B: Tensor, A: Tensor) -> Factors:
        if self.nested is not None:
            B, A = _nested(B, A, self.nested)
        if self.A0 is None or self.B0 is None:
            return Factors(self.scale * B, A)
        scale = scale_of(self.alpha, self.rank, self.scaling)
        if A.shape != self.A0.shape:  # ranks were cut or added since the start
            return Factors(torch.cat([self.scale * B, -scale * self.B0], dim=1), torch.cat([A, self.A0], dim=0))
        wide = torch.cat([B - self.B0, self.B0], dim=1)  # (out, 2r)
        return Factors(scale * wide, torch.cat([A, A - self.A0], dim=0))

    @classmethod
    def factored_rank(cls, spec: Any) -> int:
        """The rank of A and B."""
        return spec.rank

    @classmethod
    def pair_rank(cls, spec: Any, shape: Shape) -> int | None:
        """The rank."""
        return spec.rank

    @classmethod
    def inner_rank(cls, spec: Any, shape: Shape) -> int:
        """The rank."""
        return spec.rank

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank (in + out)."""
        return spec.rank * (shape.in_ + shape.out)


def scale_of(alpha: float, rank: int, scaling: str = "standard") -> float:
    """Return alpha/rank, or alpha/sqrt(rank) for "rslora"; without ranks alpha itself, so that a scale survives them.

    A change whose last rank was cut may still take its start B0 A0 out of the base, and may grow again.
    """
    rank = max(rank, 1)
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


def alpha_of(scale: float, rank: int, scaling: str = "standard") -> float:
    """Return the alpha that gives exactly this scale at this rank, where a float does (the nearest where none does)."""
    near = scale * (math.sqrt(max(rank, 1)) if scaling == "rslora" else max(rank, 1))
    tried = [near, math.nextafter(near, 0.0), math.nextafter(near, math.inf)]
    return min(tried, key=lambda alpha: abs(scale_of(alpha, rank, scaling) - scale))


def _nested(B: Tensor, A: Tensor, nested: Nested) -> tuple[Tensor, Tensor]:
    """The first `width` columns of B and rows of A, the first `still` of them without gradient."""
    width, still = nested.width, nested.still
    B, A = B[:, :width], A[:width]
    if not still:
        return B, A
    return torch.cat([B[:, :still].detach(), B[:, still:]], 1), torch.cat([A[:still].detach(), A[still:]])
