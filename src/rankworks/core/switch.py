"""Rapid switching: a sparse adapter acts by overwriting its K entries of the base's weights, and leaves no trace.

    in:    W[index] = new        out:    W[index] = old        old: the base's own entries;  new = old + values

O(K) memory traffic per layer, no product and no copy of a weight; the base comes back bit for bit because its numbers
are put back, not computed. While an adapter is switched in, the layers run the base's own forward on the changed
weights: a token costs what it costs in the base. The weights are those of `merge`, to the bit.

An adapter's `old` and `new` are made when it is first switched to and kept until `switch(model, None)`, so that from
then on going from one adapter to another writes two lists of K numbers and reads nothing else.

Source: arXiv:2406.13175, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankworks.core.errors import MergeError
from rankworks.core.site import Site
from rankworks.core.state import Adapter, state_of
from rankworks.core.weights.tied import holders


class Piece(NamedTuple):
    """One weight as a vector, the places in it, and the numbers there without and with the adapter, (K,) each."""

    flat: Tensor
    index: Tensor
    old: Tensor
    new: Tensor


@dataclass
class Switched:
    """The adapter that is in the weights now, and the pieces of all that were since the base was last itself."""

    name: str
    pieces: dict[str, list[Piece]] = field(default_factory=dict)


@torch.no_grad()
def switch(model: nn.Module, name: str | None) -> nn.Module:
    """Put the sparse adapter `name` into the base's weights in place of the one that is there; None takes it out.

    The active adapters rest as long as one is switched in, and act again after `switch(model, None)`; until then
    adapting, merging, saving and detaching are refused. Raises `MergeError`, with the base as it was, where the
    adapter's change is not sparse, a weight cannot be overwritten alone, or a result would not be finite.
    """
    state = state_of(model)
    now: Switched | None = state.switched
    if name is None:
        if now is not None:
            _write_out(now)
            state.switched = None
            state.silenced -= 1
            state.refresh()
        return model
    if now is None or name not in now.pieces:
        adapter = state.adapter(name)
        if state.merged is not None:
            raise MergeError("adapters are merged into the weights: unmerge(model) before you switch.")
        _refuse(model, adapter)
    if now is None:
        pieces = _pieces(adapter)
        state.switched = Switched(name, {name: pieces})
        state.silenced += 1
        state.refresh()
    else:
        _write_out(now)
        try:
            if name not in now.pieces:
                now.pieces[name] = _pieces(adapter)
        except MergeError:
            switch(model, None)
            raise
        now.name = name
    for piece in state.switched.pieces[name]:
        _write(piece.flat, piece.index, piece.new)
    return model


def _write_out(now: Switched) -> None:
    """Give the base its own entries back."""
    for piece in now.pieces[now.name]:
        _write(piece.flat, piece.index, piece.old)


def _pieces(adapter: Adapter) -> list[Piece]:
    """Read the base's entries and make the adapter's, on a base that is itself."""
    pieces = []
    for key, site in adapter.sites.items():
        entries = adapter.deltas[key].entries()
        assert entries is not None
        flat, index = _stored(site, entries.index.long())
        old = flat.index_select(0, index)
        wide = torch.promote_types(torch.promote_types(old.dtype, entries.values.dtype), torch.float32)
        new = (old.to(wide) + entries.values.to(wide)).to(old.dtype)
        if not torch.isfinite(new).all():
            raise MergeError(
                f"{key}: the switched weight would hold NaN or infinite values, so the base stands as it was. The "
                "adapter has diverged, or the base's type is too narrow: load an earlier checkpoint, or a wider base."
            )
        pieces.append(Piece(flat, index, old, new))
    return pieces


def _write(flat: Tensor, index: Tensor, numbers: Tensor) -> None:
    flat.put_(index, numbers)  # faster than index_copy_, which takes one place at a time


def _stored(site: Site, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stored parameter as a vector and the places in it of the entries `index` of the weight (out, in)."""
    weight, held = site.weight, site.tensor.detach()
    if weight.is_contiguous():
        return weight.view(-1), index
    out, in_ = weight.shape
    if weight.t().is_contiguous():
        return weight.t().view(-1), index % in_ * out + index // in_
    rows, columns = index // in_, index % in_
    start = int(weight.storage_offset() - held.storage_offset())
    places: Tensor = start + rows * weight.stride(0) + columns * weight.stride(1)
    return held.view(-1), places


def _refuse(model: nn.Module, adapter: Adapter) -> None:
    """Raise where the adapter cannot be put into the weights by its entries alone."""
    name, remedy = adapter.name, "merge(model) instead"
    if adapter.full:
        raise MergeError(f"{name} trains {next(iter(adapter.full))} in full, which is not sparse: {remedy}.")
    for key, site in adapter.sites.items():
        delta = adapter.deltas[key]
        if delta.entries() is None:
            raise MergeError(f"{key}: the change of a {delta.spec.key} adapter is not sparse: {remedy}.")
        if site.quantised:
            raise MergeError(
                f"{key}: the base weight is quantised and has no entries to overwrite: load it unquantised."
            )
        if holders(model, site):
            raise MergeError(f"{key} shares its weight with another layer, which would change too: {remedy}.")
