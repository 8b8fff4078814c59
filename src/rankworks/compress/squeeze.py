"""LoRA-Squeeze after training: train at a high rank, then keep the best approximation of a smaller one.

    rw.squeeze(model, rank=8)          Post-Squeeze: rank 8 everywhere; train on from it for Cont-Squeeze
    rw.squeeze(model, energy=0.99)     at every site the smallest rank that keeps this share of the change's energy

The energy of rank k is V(k) = sum_{i<=k} s_i^2 / sum s_i^2 of the change's singular values: a helper of third-party
tools, not the paper's. `common=True` gives all sites one rank, the smallest whose V(k), averaged over them, is enough.
How a change is squeezed stands in core/ranks/squeeze.py; the staged form, while training, is ranks="lora-squeeze".
Source: arXiv:2602.10993.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError
from rankworks.core.merge import refuse_merged
from rankworks.core.progress import track
from rankworks.core.ranks.squeeze import Squeezer, change_of, rank_for, refuse_unsqueezable, shares
from rankworks.core.ranks.surgery import pair_of
from rankworks.core.state import state_of
from rankworks.linalg.squeeze import singular_values_of_product


@dataclass(frozen=True)
class SqueezedSite:
    """One site: the rank it had and has, and ||D - D_k|| / ||D||, the relative error of its change."""

    site: str
    before: int
    after: int
    error: float


@dataclass(frozen=True)
class Squeezed:
    """What was squeezed, with the adapter's trained numbers before and after; `str()` is a table."""

    adapter: str
    sites: list[SqueezedSite]
    before: int
    after: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{s.site:<52} {s.before:>4} -> {s.after:<4} error {100 * s.error:.3g} %" for s in self.sites]
        return "\n".join([*lines, f"{self.before:,} -> {self.after:,} trained numbers"])


def squeeze(
    model: nn.Module,
    rank: int | None = None,
    energy: float | None = None,
    *,
    name: str | None = None,
    common: bool = False,
    svd: Literal["exact", "randomised"] = "exact",
    oversample: int = 10,
    iterations: int = 2,
    seed: int = 0,
    optimizer: Optimizer | None = None,
) -> Squeezed:
    """Replace every change of an adapter by its best approximation of a smaller rank, in place.

    Args:
        model: a model that carries the adapter.
        rank: the rank every site gets, where it has more; with `energy` the largest a site may keep.
        energy: share of each change's squared norm to keep, in (0, 1].
        name: the adapter; by default the first that acts.
        common: with `energy`, one rank for all sites.
        svd: through a QR core, or by subspace iteration (exact too once rank + oversample reaches the rank held).
        oversample: test vectors beyond the rank, for the randomised form.
        iterations: its power iterations.
        seed: of its test vectors, and of ranks that have nothing to hold.
        optimizer: one that trains the adapter and shall go on with it; its moments begin anew.

    Works on any trained pair: lora, dora's inner change, gated ranks, and starts taken out of the base, whose change of
    rank 2r becomes a plain pair. No tensor larger than the factors is made. Returns the ranks and errors. Raises
    `ConfigError`, with nothing changed, where a delta has no trained pair, and `MergeError` while it is merged.
    """
    state = state_of(model)
    refuse_merged(state, "squeeze")
    if (rank is None and energy is None) or (common and energy is None):
        raise ConfigError("say how small: rank=8, energy=0.99, or both; common=True goes with energy.")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1 (given: {rank}).")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is the share of the squared norm to keep, above 0 and at most 1 (given: {energy}).")
    if svd not in ("exact", "randomised"):
        raise ConfigError(f"svd is 'exact' or 'randomised', not {svd!r}.")
    adapter = state.adapter(name or (state.active or tuple(state.adapters_by_name))[0])
    squeezer = Squeezer(svd, oversample, iterations, "reset", seed)
    owners = {id(d): (key, d) for key, d in reversed(adapter.deltas.items()) if type(d) is adapter_class(adapter)}
    deltas = dict(reversed(owners.values()))
    for key, delta in deltas.items():
        refuse_unsqueezable(delta, key)
    before = sum(p.numel() for p in adapter.parameters())
    wanted = _ranks(deltas, rank, energy, common)
    sites = []
    for key, delta in track(list(deltas.items()), "squeezing"):
        held = pair_of(delta).rank
        error = squeezer.squeeze(delta, wanted[key], key, optimizer)
        sites.append(SqueezedSite(key, held, wanted[key], error))
    state.refresh()
    return Squeezed(adapter.name, sites, before, sum(p.numel() for p in adapter.parameters()))


def adapter_class(adapter: Any) -> type[Delta]:
    """Return the class of an adapter's own deltas: what else stands at its sites are transposes of tied twins."""
    return adapter.spec.delta.method.cls


@torch.no_grad()
def _ranks(deltas: Mapping[str, Delta], rank: int | None, energy: float | None, common: bool) -> dict[str, int]:
    """Return the rank every site gets; never more than its change can hold."""
    held = {key: min(change_of(delta).A.shape[0], *delta.shape) for key, delta in deltas.items()}
    most = {key: min(k, rank) if rank is not None else k for key, k in held.items()}
    if energy is None:
        return most
    values = {key: singular_values_of_product(*change_of(delta)) for key, delta in deltas.items()}
    if not common:
        return {key: min(rank_for(s, energy), most[key]) for key, s in values.items()}
    curves = [shares(s).cpu() for s in values.values() if len(s)]
    longest = max((len(c) for c in curves), default=0)
    padded = [torch.cat([c, torch.ones(longest - len(c), dtype=c.dtype)]) for c in curves]
    one = int((torch.stack(padded).mean(0) < energy - 1e-12).sum()) + 1 if padded else 0
    return {key: min(one, k) for key, k in most.items()}
