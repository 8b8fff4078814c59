"""Cored: deltas of three factors of which only the small middle one is trained.

    W' = W + s B (R - R0) A        A (r, in), B (out, r) frozen,  R (r, r) trained,  s = alpha/r

A method says where its bases A and B come from (`bases_of`); they are rebuilt on load, and only R is stored. An
initialiser of three factors gives other bases, which depend on data or on a search and are stored. R0 is the core the
change starts from where that start is taken out of the base weight, and absent otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankworks.core.delta import Factors
from rankworks.core.forms.projected import Projected
from rankworks.core.forms.triple import Triple
from rankworks.core.inputs import linear
from rankworks.core.site import Shape
from rankworks.core.start import Init, Place, begin


class Cored(Triple, Projected):
    """Three factors, of which the core is trained."""

    decomposes: ClassVar[bool] = True  # `bases_of` takes time, so it is not asked where other bases will be given

    A: Tensor
    B: Tensor
    R: nn.Parameter
    R0: Tensor | None

    def bases_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return B (out, r) and A (r, in) for a weight (out, in), the same at every call."""
        raise TypeError(f"{type(self).__name__} must define bases_of(weight)")

    def setup(self, weight: Tensor) -> None:
        """Take the bases; R is zero."""
        if self.given and self.decomposes:
            shapes = (self.shape.out, self.rank), (self.rank, self.shape.in_)
            bases = tuple(torch.empty(s, dtype=self.draw.dtype, device=self.draw.device) for s in shapes)
        else:
            bases = self.bases_of(weight)
        self.B, self.A = (self.frozen(_own(t.to(self.draw.dtype))) for t in bases)
        self.R = self.trainable(self.rank, self.rank)
        self.register_buffer("R0", None)

    @torch.no_grad()
    def reset(self, weight: Tensor, init: Init) -> None:
        """Take bases and core from an initialiser that gives three factors."""
        if init.key == "default":
            return
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        start = begin(init, Place(exact, self.rank, self.scale, self.draw, self.kind, 3, self.evidence))
        A, B = (_own(t.to(self.A.dtype)) for t in (start.A, start.B))
        if self.decomposes or not _same(A, self.A) or not _same(B, self.B):  # else they are rebuilt, and need no file
            self.A, self.B = self.stored(A), self.stored(B)
        assert start.core is not None
        self.R.copy_(start.core)
        if start.from_base:
            self.R0 = self.stored(self.R.detach().clone())

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make room for bases that came from an initialiser, and for the start."""
        if {"A", "B"} & set(shapes):
            self.A, self.B = (self.stored(torch.zeros_like(t)) for t in (self.A, self.B))
        if "R0" in shapes:
            self.R0 = self.stored(torch.zeros_like(self.R.data))

    @property
    def core(self) -> Tensor:
        """s (R - R0)."""
        return self.scale * (self.R if self.R0 is None else self.R - self.R0)

    def middle(self, h: Tensor) -> Tensor:
        """The core times A x, which backward keeps in x's place."""
        return linear(h, self.core)

    def left(self) -> Tensor:
        """B."""
        return self.B

    def factors(self) -> Factors:
        """Exact at rank r: (s B (R - R0), A)."""
        return Factors(self.B @ self.core, self.A)

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank^2."""
        return spec.rank**2


def _same(a: Tensor, b: Tensor) -> bool:
    return not a.is_meta and torch.equal(a, b)


def _own(tensor: Tensor) -> Tensor:
    """A copy in the layout that a file gives: another layout is another kernel, and other last bits."""
    return tensor.clone(memory_format=torch.contiguous_format)
