"""Squeeze: the best change of a smaller rank in the place of a trained one, in the same pair of factors.

    D = s B A        D_k = U_k diag(S_k) V_k^T        B' = U_k diag(sqrt(S_k / s)),  A' = diag(sqrt(S_k / s)) V_k^T

so s B' A' = D_k, the best approximation of rank k (Eckart-Young), B'^T B' = A' A'^T, and the scale s stays: alpha
follows the rank. D is given by its factors, whatever they are made of: gates are folded in, and a start taken out of
the base (PiSSA, OLoRA) makes D of rank 2r and is then gone. It is never formed (linalg/squeeze.py).

Where k exceeds D's numerical rank the surplus columns of B' are zero and the rows of A' beside them drawn as a fresh
LoRA's: D is unchanged and these ranks can learn, which with zeros on both sides they could not.

Moments of an optimizer belong to the old coordinates. They are reset, or rotated: A' = T A and B' = B S give
dL/dB' = (dL/dB) T^T and dL/dA' = S^T (dL/dA), exactly so for a linear moment; squared moments are mixed with the
squares of T and S, as if the old coordinates were uncorrelated. Source: arXiv:2602.10993.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankworks.core.delta import Delta, Factors
from rankworks.core.draw import Draw
from rankworks.core.errors import ConfigError
from rankworks.core.forms.lowrank import LowRank
from rankworks.core.forms.wrapper import Wrapper
from rankworks.core.ranks.surgery import pair_of, ranked, replace_ranks
from rankworks.linalg.squeeze import norm_of_product, randomised_svd_of_product
from rankworks.linalg.svd import SVD, svd_of_product


@dataclass(frozen=True)
class Squeezer:
    """How changes are squeezed; `oversample` and `iterations` are the randomised form's."""

    svd: Literal["exact", "randomised"] = "exact"
    oversample: int = 10
    iterations: int = 2
    moments: Literal["reset", "rotate"] = "reset"
    seed: int = 0

    def decompose(self, change: Factors, rank: int, name: str) -> SVD:
        """Return U, s, Vh of B A, at least `rank` triplets; `name` seeds the randomised form's test vectors."""
        if self.svd == "exact":
            return svd_of_product(*change)
        generator = Draw(self.seed, f"squeeze:{name}").generator
        return randomised_svd_of_product(*change, rank, self.iterations, self.oversample, generator)

    @torch.no_grad()
    def squeeze(self, delta: Delta, rank: int, name: str, optimizer: Optimizer | None = None) -> float:
        """Give a delta's pair this rank in place; return the relative error ||D - D_k|| / ||D|| (0 for D = 0)."""
        pair, change = pair_of(delta), change_of(delta)
        scale = pair.scale
        u, s, vh = self.decompose(change, rank, name)
        error = _error(change, s, rank, self.svd == "exact")
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        live = int((s > torch.finfo(s.dtype).eps * max(pair.shape) * s[:1]).sum())
        root = (s[:live] / scale).sqrt()
        wide = {"B": u[:, :live] * root, "A": root.unsqueeze(1) * vh[:live]}
        fresh = Draw(self.seed, f"squeeze:{name}:{rank}", s.device, s.dtype)
        drawn = fresh.uniform(rank - live, pair.shape.in_, bound=pair.shape.in_**-0.5)
        tensors = {
            "A": torch.cat([wide["A"], drawn]),
            "B": torch.cat([wide["B"], s.new_zeros(pair.shape.out, rank - live)], dim=1),
            "gate": s.new_ones(rank),
        }
        plain = pair.A0 is None and "gate" not in ranked(delta) and pair.nested is None
        moments = _rotated(pair, tensors, live, optimizer) if self.moments == "rotate" and plain else {}
        replace_ranks(delta, tensors, optimizer)
        pair.A0 = pair.B0 = pair.nested = None
        for part, state in moments.items():
            assert optimizer is not None
            optimizer.state[getattr(pair, part)] = state
        return error


def change_of(delta: Delta) -> Factors:
    """Return the factors of the change that a delta's pair makes, gates and start included (DoRA: its inner change)."""
    inner: Any = delta
    while isinstance(inner, Wrapper) and inner.factors() is None:
        inner = inner.within
    factors = inner.factors()
    assert factors is not None
    return factors


def refuse_unsqueezable(delta: Delta, name: str) -> None:
    """Raise `ConfigError` for a delta without a trained pair."""
    if not isinstance(delta.pair, LowRank):
        raise ConfigError(
            f"{delta.spec.key} at {name} has no trained pair of factors B A to squeeze: "
            "export(kind='lora', rank=...) writes the best LoRA of that rank for any change."
        )


def rank_for(s: Tensor, energy: float) -> int:
    """Return the smallest k >= 1 with sum_{i<=k} s_i^2 >= energy * sum s_i^2; 1 for a change of nothing."""
    share = shares(s)
    return min(int((share < energy).sum()) + 1, len(s)) if len(s) else 0


def shares(s: Tensor) -> Tensor:
    """Return V(k) = sum_{i<=k} s_i^2 / sum s_i^2 for k = 1, 2, ... (k,), in float64 where there is one; 1 for zeros."""
    squares = (s if s.device.type == "mps" else s.double()).square()
    total = squares.sum()
    return squares.cumsum(0) / total if total > 0 else torch.ones_like(squares)


def _error(change: Factors, s: Tensor, rank: int, exact: bool) -> float:
    """Return ||D - D_k|| / ||D||: from the values left out where all are known, else from the norm of D."""
    if exact:
        total, lost = float(s.norm()), float(s[rank:].norm())
        return lost / total if total else 0.0
    total, kept = norm_of_product(*change), float(s[:rank].norm())
    return max(0.0, 1 - (kept / total) ** 2) ** 0.5 if total else 0.0


def _rotated(pair: LowRank, new: dict[str, Tensor], live: int, optimizer: Optimizer | None) -> dict[str, dict]:
    """Return the optimizer's states of A and B in the new coordinates."""
    if optimizer is None:
        return {}
    old = {"A": pair.A.detach().to(new["A"]), "B": pair.B.detach().to(new["A"])}
    T = (new["A"] @ old["A"].mT) @ torch.linalg.pinv(old["A"] @ old["A"].mT, hermitian=True)  # (k, r): A' = T A
    S = torch.linalg.pinv(old["B"].mT @ old["B"], hermitian=True) @ (old["B"].mT @ new["B"])  # (r, k): B' = B S
    T[live:] = 0
    found = {}
    for part, parameter, mix in (("A", pair.A, S.mT), ("B", pair.B, T)):  # dL/dA' = S^T dL/dA, dL/dB' = dL/dB T^T
        state = {}
        for key, value in optimizer.state.get(parameter, {}).items():  # type: ignore[call-overload]
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                by = (mix.square() if key.endswith("_sq") else mix).to(value)
                value = by @ value if part == "A" else value @ by.mT
            state[key] = value
        if state:
            found[part] = state
    return found
