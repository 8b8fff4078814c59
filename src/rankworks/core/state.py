"""What a model knows of its adapters: one small module, registered on the model as `rankworks`.

It has no parameters and nothing in the state dict; it holds the shared banks (so that they move with the model) and
the record of every adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rankworks.core import share
from rankworks.core.bank import Bank
from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError, UnknownNameError, did_you_mean
from rankworks.core.full import FullHost
from rankworks.core.layer import AdaptedLayer, Host, host_of
from rankworks.core.site import Site

if TYPE_CHECKING:
    from rankworks.core.block import Replacement
    from rankworks.core.spec import AdaptSpec

NAME = "rankworks"


@dataclass
class Adapter:
    """One named adapter: its spec, its deltas by site name, and its fully trained modules by module name."""

    name: str
    spec: AdaptSpec
    sites: dict[str, Site]
    deltas: dict[str, Delta]
    full: dict[str, nn.Module] = field(default_factory=dict)  # module name -> the adapter's own copy
    banks: list[str] = field(default_factory=list)
    shared: list[Bank] = field(default_factory=list)  # those of the banks that hold trained tensors, all its own

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the adapter's state by its flat name; a delta that two sites share appears once."""
        owners: dict[int, tuple[str, nn.Module]] = {}
        banks = [(f"shared.{number}", bank) for number, bank in enumerate(self.shared)]
        for prefix, module in [*self.deltas.items(), *banks, *((f"full.{n}", m) for n, m in self.full.items())]:
            owners.setdefault(id(module), (prefix, module))
        return {
            f"{prefix}.{k}": t
            for prefix, module in owners.values()
            for k, t in module.state_dict(keep_vars=True).items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Return the adapter's trainable parameters, each once."""
        modules = [*self.deltas.values(), *self.shared, *self.full.values()]
        return list({id(p): p for m in modules for p in m.parameters()}.values())


class State(nn.Module):
    """The record on a model. `active` names the adapters that act; `merged` those folded into the base."""

    def __init__(self) -> None:
        super().__init__()
        self.banks = nn.ModuleDict()
        self.adapters_by_name: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.merged: dict[str, Tensor] | None = None  # parameter name -> the base's own numbers, while merged
        self.merged_names: tuple[str, ...] = ()
        self.replaced: list[Replacement] = []  # what merging weightless deltas put away: (object, attribute, old value)
        self.untied: list[tuple[str, str]] = []  # (module path, parameter) that merging separated from its twin
        self.twins: dict[tuple[str, str], tuple[str, str]] = {}  # the twin each of them is tied to again
        self.tie_flag: bool | None = None  # config.tie_word_embeddings before merging untied it
        self.was_trainable: dict[str, bool] = {}  # the base's requires_grad flags, restored by detach
        self.closed: list[tuple[nn.Module, str, Any]] = []  # torch's short cuts around adapted layers, to reopen
        self.switched: Any = None  # the `Switched` adapter whose entries stand in the base's weights now
        self.silenced = 0  # how many `disabled` blocks run now, one inside another

    def forward(self, x: Any) -> Any:
        """Return what it is given: on an nn.Sequential the record stands last, as one of its layers."""
        return x

    def adapter(self, name: str) -> Adapter:
        """Return one adapter; raises `UnknownNameError` with the names there are."""
        if name not in self.adapters_by_name:
            raise UnknownNameError(
                f"the model has no adapter called {name!r}.{did_you_mean(name, self.adapters_by_name)}"
            )
        return self.adapters_by_name[name]

    def bank(self, key: str) -> Bank:
        """Return one of the model's banks."""
        bank = self.banks[key]
        assert isinstance(bank, Bank)
        return bank

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Within the block banks may come; if it fails, they go again."""
        known = set(self.banks)
        try:
            yield
        except BaseException:  # also where somebody stops it
            for key in set(self.banks) - known:
                del self.banks[key]
            raise

    def refresh(self) -> None:
        """Let the active adapters act, or none while they are merged or disabled."""
        self.show(() if self.silenced or self.merged is not None else self.active)

    def show(self, names: Iterable[str]) -> None:
        """Let exactly these adapters act, in this order; touches no `requires_grad`."""
        hosts: dict[int, tuple[Host, list]] = {}
        modules: dict[int, tuple[FullHost, list]] = {}
        for adapter in self.adapters_by_name.values():
            for site in adapter.sites.values():
                host = host_of(site)
                assert host is not None
                hosts.setdefault(id(host), (host, []))
            for copy in adapter.full.values():
                modules.setdefault(id(copy.host), (copy.host, []))  # type: ignore[arg-type]
        for name in names:
            adapter = self.adapters_by_name[name]
            for key, site in adapter.sites.items():
                hosts[id(host_of(site))][1].append((site, adapter.deltas[key]))
            for copy in adapter.full.values():
                modules[id(copy.host)][1].append(copy)
        for host, pairs in hosts.values():
            host._active = tuple(pairs)
        share.link(host for host, _ in hosts.values() if isinstance(host, AdaptedLayer))
        for module, copies in modules.values():
            module._acting = tuple(copies)


def state_of(model: nn.Module, create: bool = False) -> State:
    """Return the model's record; raises `ConfigError` where the model carries no adapter and `create` is false."""
    state = getattr(model, NAME, None)
    if isinstance(state, State):
        return state
    if not create:
        raise ConfigError(
            "the model carries no adapter: call rankworks.adapt(model, ...) or rankworks.load(model, path) first."
        )
    state = State()
    setattr(model, NAME, state)
    return state


def check_name(name: str) -> None:
    """Raise unless `name` can name an adapter: letters, digits, `_` and `-`."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ConfigError(f"the adapter name {name!r} must be 1 to 64 letters, digits, '_' or '-'.")


def make_bank(state: State, key: str, tensors: dict[str, Tensor]) -> Bank | None:
    """Return the model's bank `key`, made from `tensors` where it does not exist; None for a method without one."""
    if not tensors:
        return None
    if key not in state.banks:
        state.banks[key] = Bank(tensors)
    return state.bank(key)
