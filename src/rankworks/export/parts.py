"""An adapter seen module by module, as other formats see it: they know layers, not row ranges.

A `Part` is one layer with every site of it that the adapter changes: usually one, or several row ranges of a fused
projection. Its change is the sum of theirs, each in its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta, Factors
from rankworks.core.errors import ExportError, UnknownNameError
from rankworks.core.site import Site, kind_of
from rankworks.core.state import Adapter, State, state_of


@dataclass(frozen=True)
class Part:
    """One layer: its name in the model, its kind (never "rows" or "expert"), and the (site, delta) pairs on it."""

    path: str
    kind: str
    module: nn.Module
    pairs: tuple[tuple[Site, Any], ...]  # each with its Delta; formats read the attributes of particular methods

    @property
    def whole(self) -> Site:
        """The site of the whole layer."""
        return Site(self.path, self.kind, self.module)

    @property
    def delta(self) -> Any:
        """The delta where one alone changes the whole layer, else None."""
        site, delta = self.pairs[0]
        return delta if len(self.pairs) == 1 and site.rows is None else None

    @property
    def key(self) -> str:
        """The method's key."""
        return self.pairs[0][1].spec.key

    def factors(self) -> Factors | None:
        """Exact factors of the layer's change, B (out, k) and A (k, in), or None where a delta has none."""
        pieces = [(site, delta.factors_on(site.weight)) for site, delta in self.pairs]
        if any(f is None for _, f in pieces):
            return None
        out = self.whole.shape.out
        columns = [_in_rows(site, f.B, out) for site, f in pieces if f is not None]
        return Factors(torch.cat(columns, dim=1), torch.cat([f.A for _, f in pieces if f is not None], dim=0))

    def bias(self) -> Tensor | None:
        """The change of the layer's bias (out,), or None where no delta changes it."""
        total: Tensor | None = None
        for site, delta in self.pairs:
            change = delta.bias_change(site.weight, site.bias)
            if change is not None:
                change = _in_rows(site, change.unsqueeze(1), self.whole.shape.out).squeeze(1)
                total = change if total is None else total + change
        return total

    def dense(self) -> Tensor:
        """The layer's change as a matrix (out, in)."""
        out = self.whole.shape.out
        return torch.stack([_in_rows(s, d.dense(s.weight), out) for s, d in self.pairs]).sum(dim=0)

    def times(self, probe: Tensor) -> Tensor:
        """The change times a matrix (in, n): (out, n), without forming the change where factors exist."""
        factors = self.factors()
        if factors is not None:
            return factors.B @ (factors.A @ probe.to(factors.A.dtype))
        change = self.dense()
        return change @ probe.to(change.dtype)


def _in_rows(site: Site, rows: Tensor, out: int) -> Tensor:
    """Put a matrix with the rows of a site among the `out` rows of its layer."""
    if site.rows is None:
        return rows
    whole = rows.new_zeros(out, rows.shape[1])
    whole[site.rows[0] : site.rows[1]] = rows
    return whole


def chosen(model: nn.Module, name: str | None) -> tuple[State, Adapter]:
    """Return the adapter to export: the one named, or the one that acts. Raises where that is not one adapter."""
    state = state_of(model)
    if state.merged is not None:
        raise ExportError(
            "the adapters are merged into the weights, so they cannot be told apart: unmerge(model) first."
        )
    if name is None:
        if len(state.active) != 1:
            acting = ", ".join(state.active) or "none"
            raise UnknownNameError(f"one adapter is exported at a time, and {acting} act(s) now: give name=...")
        name = state.active[0]
    adapter = state.adapter(name)
    for key, tensor in adapter.tensors().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ExportError(f"{key} holds NaN or infinite values: the adapter has diverged. Load an earlier one.")
    return state, adapter


def refuse_weightless(key: str, delta: Delta, kind: str) -> None:
    """Raise `ExportError` for a delta that changes no weight."""
    if delta.weightless:
        raise ExportError(
            f"{delta.spec.method.title} stands beside {key} and changes no weight, so kind={kind!r} cannot hold it: "
            "save it as it is, or see the method's page for what can be made of it."
        )


def parts_of(adapter: Adapter, kind: str) -> list[Part]:
    """Return the adapter's layers in order, without deltas that have no rank that acts (they change nothing).

    Raises `ExportError` for a stacked expert tensor, which has no layer of its own.
    """
    groups: dict[str, list[tuple[Site, Delta]]] = {}
    for key, site in adapter.sites.items():
        if site.expert is not None:
            raise ExportError(
                f"{key} is one matrix of a stacked expert tensor, which {kind!r} files of ours do not hold: export "
                "with kind='merged', or leave the experts out of targets."
            )
        delta = adapter.deltas[key]
        refuse_weightless(key, delta, kind)
        if not delta.empty:
            groups.setdefault(site.path, []).append((site, delta))
    parts = []
    for path, pairs in groups.items():
        module = pairs[0][0].module
        parts.append(Part(path, kind_of(module) or pairs[0][0].kind, module, tuple(pairs)))
    if not parts and not adapter.full:
        raise ExportError(
            "every site of the adapter has rank 0: there is nothing to export. Keep the base as it is, or train with a "
            "weaker rank schedule."
        )
    return parts
