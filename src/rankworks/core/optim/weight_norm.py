"""Weight normalisation: a weight as lengths times directions, W = g v / ||v||, and the gradients of both.

    dL/dg = sum(G * v / ||v||)         dL/dv = (g / ||v||) (G - (v / ||v||) dL/dg)         G = dL/dW

Norms and sums run over the inputs of each output ("out", a length per row) or over the outputs of each input ("in", a
length per column). dL/dv is orthogonal to v, row by row or column by column, so steps along it make ||v|| grow.

The weight itself says nearly all: W / ||W|| is v / ||v|| and ||W|| is g, up to a sign that both may share. So of v and
g only ||v|| is kept, with that sign: v = norm W / ||W||. A row of zeros has no direction; v is then that row.
Source: arXiv:1602.07868, equations 2 and 3.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

NormAxis = Literal["out", "in"]


def lengths(weight: Tensor, axis: NormAxis) -> Tensor:
    """||W|| of the rows, (m, 1), or of the columns, (1, n)."""
    if axis == "in":  # torch's norm runs down columns a number at a time, ten times as slow as a sum
        return weight.square().sum(0, keepdim=True).sqrt()
    return torch.linalg.vector_norm(weight, dim=1, keepdim=True)


def summed(axis: NormAxis) -> int:
    """The dimension of W (out, in) that norms run over."""
    return 1 if axis == "out" else 0


class Split(NamedTuple):
    """A weight taken apart. v may be the weight itself, changed in place; the others are like `lengths`."""

    v: Tensor  # (m, n)
    norm: Tensor  # ||v||, not below zero
    g: Tensor  # with a sign
    has_direction: Tensor  # bool: where the weight is not zero


def split(weight: Tensor, signed_norm: Tensor | None, axis: NormAxis) -> Split:
    """Take a weight apart in place: afterwards `weight` holds v. signed_norm: what `join` returned, None at first."""
    length = lengths(weight, axis)
    if signed_norm is None:
        return Split(weight, length, length, length > 0)
    some = length > 0
    ratio = torch.where(some, signed_norm / torch.where(some, length, 1.0), 1.0)
    return Split(weight.mul_(ratio), torch.where(some, signed_norm.abs(), 0.0), length * signed_norm.sign(), some)


def gradients(G: Tensor, parts: Split, axis: NormAxis) -> tuple[Tensor, Tensor]:
    """Return dL/dv (m, n), in new memory, and dL/dg. Where there is no direction dL/dv is G, and dL/dg zero."""
    safe = torch.where(parts.has_direction, parts.norm, 1.0)
    of_g = (G * parts.v).sum(summed(axis), keepdim=True) / safe
    factor = torch.where(parts.has_direction, parts.g / safe, 1.0)
    of_v = torch.mul(G, factor).addcmul_(parts.v, -(factor * of_g / safe))
    return of_v, of_g


def join(v: Tensor, g: Tensor, has_direction: Tensor, axis: NormAxis) -> Tensor:
    """Turn v into W = g v / ||v|| in place and return ||v|| with the sign of g. Without a direction before, W is v."""
    norm = lengths(v, axis)
    some = has_direction & (norm > 0)
    v.mul_(torch.where(some, g / torch.where(some, norm, 1.0), 1.0))
    return torch.where(some & (g < 0), -norm, norm)
