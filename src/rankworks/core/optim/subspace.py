"""Where a gradient's leading subspace is found: exactly, from random probes, or from the subspace before.

    svd           the leading singular vectors, as published: the smaller Gram matrix's eigenvectors, S^3 and m n S
    randomised    Z: 1.25 r random probes;  twice  Z <- orthonormal(G^T (G Z));  then Z is turned into singular vectors
                  by the eigenvectors of (G Z)^T G Z, and r are kept: 12.5 m n r
    warm          the same from Z = [the basis before, r / 4 random probes]; the first time as randomised

All give (nearly) singular vectors in order. Their signs are arbitrary: the largest entry is positive, with `warm` the
product with the column before, so that where the subspace goes on the moments kept in it do too.

What is lost of gradients of SmolLM2-135M on python-stdlib text (batches of 1,024 tokens, a refresh every 10 steps, r of
16, 64 and 144, six weights): ||G - back(R)||^2 was 1.017 times the exact one in the mean and at most 1.036 with `warm`,
1.021 and 1.031 with `randomised`. After one iteration it was up to 1.19, after two without more probes than r up to
1.12; the basis of ten steps before loses 1.6 to 125 times as much. `warm` costs no more than `randomised` and is the
better the more neighbouring gradients agree; against `svd` a refresh takes a small part of the time. It is the default.
Source: arXiv:2403.03507, equations 12 and 13 (svd); arXiv:0909.4061, algorithms 4.4 and 5.3 (probes and the turn).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.optim.products import exactly
from rankworks.core.optim.projection import Basis, Modes, Side, leading_basis, sides
from rankworks.linalg.orthonormal import orthonormal

Subspace = Literal["warm", "randomised", "svd"]
ITERATIONS, SHARE = 2, 4  # one random probe more for so many columns


def find_basis(
    G: Tensor, rank: int, side: Side, how: Subspace = "warm", old: Basis | None = None, draw: Draw | None = None
) -> Basis:
    """Return the basis of the leading subspace of G (m, n) on the sides that are projected, in G's type, row-major.

    rank: at most min(m, n) is used. old: the basis before, for `warm`. draw: where random probes come from; must be
    made anew from (seed, step, name) for every call, and without it every call draws the same numbers.
    """
    if how == "svd":
        return leading_basis(G, rank, side)  # from Gram matrices in float64, however float32 is multiplied
    exact = G.to(torch.promote_types(G.dtype, torch.float32))
    left, right = sides((G.shape[0], G.shape[1]), side)
    r = min(rank, *G.shape)
    M = exact if right else exact.mT  # the right singular vectors of M are looked for
    before = None if how != "warm" or old is None else old.Q if right else old.P
    found = _leading(M, r, None if before is None else before.to(M.dtype), Draw(0) if draw is None else draw)
    P, Q = (orthonormal(M @ found) if left else None, found) if right else (found, None)
    return Basis(*(None if part is None else part.to(G.dtype).contiguous() for part in (P, Q)))


def _leading(M: Tensor, r: int, old: Tensor | None, draw: Draw) -> Tensor:
    """Return r orthonormal columns (n, r) near the leading right singular vectors of M (m, n)."""
    width = min(r + -(-r // SHARE), *M.shape)
    Z = M.new_empty(M.shape[1], width)
    known = 0 if old is None else old.shape[1]
    if old is not None:
        Z[:, :known] = old
    Z[:, known:] = torch.randn(M.shape[1], width - known, generator=draw.generator).to(Z)
    for _ in range(ITERATIONS):
        Y = M @ Z
        lengths = torch.linalg.vector_norm(Y, dim=0)
        Z = orthonormal(M.mT @ Y.div_(torch.where(lengths == 0, 1.0, lengths)))  # scaled: near singular vectors
    gram = _gram(M @ Z)
    turn = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :r].to(Z)  # (width, r), largest first
    with exactly(M.device):  # as orthonormal as float32 is, however G is multiplied
        Z = Z @ turn
    towards = (Z * old).sum(0) if old is not None else Z.gather(0, Z.abs().argmax(0, keepdim=True)).squeeze(0)
    return Z * torch.where(towards < 0, -1.0, 1.0).to(Z)


def _gram(Y: Tensor) -> Tensor:
    """Y^T Y, in float64 where there is one."""
    wide = Y if Y.device.type == "mps" else Y.double()
    return wide.mT @ wide


def find_modes(
    G: Tensor, rank: int, how: Subspace = "warm", old: Modes | None = None, draw: Draw | None = None
) -> Modes:
    """Return the basis of a tensor of more than two dimensions along each that is longer than `rank`."""
    found: list[Tensor | None] = []
    for i, length in enumerate(G.shape):
        if length <= rank:
            found.append(None)
            continue
        before = None if old is None or old.factors[i] is None else Basis(old.factors[i], None)
        unfolded = G.movedim(i, 0).reshape(length, -1)
        found.append(find_basis(unfolded, rank, "left", how, before, draw).P)
    return Modes(tuple(found))
