"""Which trained parameters an optimizer projects: the weights at named sites, and what adapters train there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rankworks.core.delta import Delta
from rankworks.core.site import kind_of
from rankworks.core.state import NAME, State
from rankworks.core.targets import find_sites, output_heads


def weights_at(model: nn.Module, targets: str | Sequence[str]) -> set[int]:
    """Return the ids of the parameters that hold the weights `targets` names (core/targets.py)."""
    return {id(site.tensor) for site in find_sites(model, targets)}


def factors_at(model: nn.Module, targets: str | Sequence[str]) -> set[int]:
    """Return the ids of the matrices that the model's adapters train at the sites `targets` names."""
    state: State | None = getattr(model, NAME, None)
    adapters = [] if state is None else state.adapters_by_name.values()
    meant = {site.path for site in find_sites(model, targets)} if adapters else set()
    deltas: list[Delta] = [d for a in adapters for key, d in a.deltas.items() if a.sites[key].path in meant]
    return {id(p) for delta in deltas for p in delta.parameters() if p.ndim == 2}


def norm_weights(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of normalisation layers, told by the name of their class."""
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    return {id(p) for module in norms for p in module.parameters(recurse=False)}


def embedding_weights(model: nn.Module) -> set[int]:
    """Return the ids of the weights of embeddings; one that is also an output head's is not among them."""
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return found - head_weights(model)


def head_weights(model: nn.Module) -> set[int]:
    """Return the ids of the weights of the output heads, tied ones included."""
    heads = output_heads(model)
    return {id(m.weight) for m in model.modules() if id(m) in heads and kind_of(m) is not None}
