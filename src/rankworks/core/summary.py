"""What an adapter is and does, in numbers: per site its shape, rank, parameters and the norm of its change."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError
from rankworks.core.merge import original
from rankworks.core.state import NAME, state_of


@dataclass(frozen=True)
class Row:
    """One site of one adapter. `change` is ||dW||_F and `relative` is ||dW||_F / ||W||_F; None without a dW."""

    site: str
    kind: str
    shape: tuple[int, int]
    method: str
    rank: int | None
    parameters: int
    change: float | None
    relative: float | None


@dataclass(frozen=True)
class Summary:
    """An adapter's rows and totals; `str()` is a table."""

    adapter: str
    method: str
    rows: list[Row]
    full: dict[str, int]
    trainable: int
    total: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"{'site':<44} {'shape':>14} {'rank':>5} {'parameters':>12} {'|change|':>10} {'relative':>9}"
        lines = [f"adapter {self.adapter!r}: {self.method}", head, "-" * len(head)]
        for r in self.rows:
            shape = f"{r.shape[0]} x {r.shape[1]}"
            rank = "" if r.rank is None else str(r.rank)
            moved = "" if r.change is None else f"{r.change:>10.4g} {r.relative:>9.2e}"
            lines.append(f"{_fit(r.site, 44):<44} {shape:>14} {rank:>5} {r.parameters:>12,} {moved}".rstrip())
        lines += [f"{_fit(n, 44):<44} {'in full':>14} {'':>5} {p:>12,}" for n, p in self.full.items()]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"{self.trainable:,} trainable of {self.total:,} ({share:.3f} %), {self.bytes:,} bytes")
        return "\n".join(lines)


@torch.no_grad()
def summary(model: nn.Module, name: str | None = None) -> Summary:
    """Return the rows and totals of one adapter (the first active one by default).

    Warns where an adapter's change is zero at every site, which is right before training and a mistake after it.
    """
    state = state_of(model)
    name = name or (state.active or tuple(state.adapters_by_name))[0]
    adapter = state.adapter(name)
    rows, seen = [], set()
    for key, site in adapter.sites.items():
        delta = adapter.deltas[key]
        change = relative = None
        if not delta.weightless:
            weight = original(state, site).weight.float()
            change = torch.linalg.vector_norm(delta.dense(weight).float()).item()
            relative = change / max(torch.linalg.vector_norm(weight).item(), 1e-30)
        own = 0 if id(delta) in seen else sum(p.numel() for p in delta.parameters())
        seen.add(id(delta))
        rank = getattr(delta, "rank", None)
        rows.append(Row(key, site.kind, (site.shape.out, site.shape.in_), delta.spec.key, rank, own, change, relative))
    full = {n: sum(p.numel() for p in m.parameters()) for n, m in adapter.full.items()}
    parameters = adapter.parameters()
    if rows and all(r.change == 0 for r in rows) and any(getattr(p, "grad", None) is not None for p in parameters):
        warnings.warn(f"adapter {name!r} was trained, yet changes nothing: every site's change is zero.", stacklevel=2)
    size = sum(t.numel() * t.element_size() for t in adapter.tensors().values())
    trainable = sum(p.numel() for p in parameters)
    return Summary(
        name, adapter.spec.asked.method.title, rows, full, trainable, base_parameters(model) + trainable, size
    )


def trainable_parameters(model: nn.Module) -> int:
    """Return how many numbers training would change now: `requires_grad` ones in active adapters (and the base)."""
    return sum(p.numel() for p in trained(model))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that training would change now, each once, in a fixed order."""
    state = getattr(model, NAME, None)
    if state is None:
        return [p for p in model.parameters() if p.requires_grad]
    acting = {id(p) for name in state.active for p in state.adapter(name).parameters()}
    mine = {id(p) for adapter in state.adapters_by_name.values() for p in adapter.parameters()}
    return [p for p in model.parameters() if p.requires_grad and (id(p) in acting or id(p) not in mine)]


def base_parameters(model: nn.Module) -> int:
    """Return the number of the base model's own parameters, adapters left out."""
    state = getattr(model, NAME, None)
    mine = set() if state is None else {id(p) for a in state.adapters_by_name.values() for p in a.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in mine)


@torch.no_grad()
def delta_weights(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return {site name: the dense change (out, in) of its weight}, in the adapter's type.

    Raises `ConfigError` for an adapter that stands beside blocks and changes no weight.
    """
    state = state_of(model)
    adapter = state.adapter(name)
    if adapter.spec.delta.method.cls.weightless:
        raise ConfigError(f"{adapter.spec.delta.key} changes no weight, so there is no change of one to show.")
    return {key: adapter.deltas[key].dense(original(state, site).weight).clone() for key, site in adapter.sites.items()}


def get_delta(model: nn.Module, site: str, name: str = "default") -> Delta:
    """Return one site's delta, for a look at its tensors."""
    return state_of(model).adapter(name).deltas[site]


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[3 - width :]
