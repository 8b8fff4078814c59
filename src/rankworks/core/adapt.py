"""The verbs on a model: adapt, activate, disabled, detach. Nothing is half-done: an adapter is built, then attached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from rankworks.core import full as full_modules
from rankworks.core import merge, shortcuts
from rankworks.core.build import make_adapter
from rankworks.core.errors import ConfigError
from rankworks.core.evidence import Evidence
from rankworks.core.layer import host_of, unwrap, wrap
from rankworks.core.refuse import check, refuse_overlap, refuse_unreachable
from rankworks.core.registry import MethodSpec
from rankworks.core.resolve import allocated, resolve
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import NAME, Adapter, State, check_name, state_of
from rankworks.core.targets import find_modules

Model = TypeVar("Model", bound=nn.Module)


def adapt(
    model: Model,
    delta: str | MethodSpec | Mapping[str, Any] | AdaptSpec = "lora",
    *,
    name: str = "default",
    evidence: Evidence | None = None,
    **settings: Any,
) -> Model:
    """Give the model a new adapter, in place, and let it act; the base's parameters stop being trained.

    `delta` is a key ("lora"), a spec (`rw.LoRA(rank=16)`), a mapping, or a whole `AdaptSpec`. `settings` are the
    adapter's (`targets`, `init`, `exclude`, `overrides`, `full`, `tied`, `dtype`, `seed`) and the delta's. `evidence`
    is what a method that starts from data needs, as `rankworks.calibrate` measures it.

    Returns the same model. Raises `ConfigError` or `TargetError` naming every problem, with the model untouched.
    """
    if isinstance(delta, AdaptSpec):
        if settings:
            raise ConfigError("give either a whole AdaptSpec or single settings, not both.")
        spec = delta
    else:
        spec = AdaptSpec.from_flat({"delta": delta, **settings})
    check_name(name)
    existing = getattr(model, NAME, None)
    if existing is not None and name in existing.adapters_by_name:
        raise ConfigError(
            f"the model already has an adapter called {name!r}: give another name, or detach(model, {name!r}) first."
        )
    if existing is not None:
        merge.refuse_merged(existing, "add to")
    resolved = resolve(model, spec)
    check(resolved, spec, evidence or {})
    resolved = allocated(resolved, spec, evidence or {})
    modules = find_modules(model, spec.full)
    state = existing if existing is not None else State()
    refuse_overlap([site for site, _ in resolved], modules, state)
    refuse_unreachable((), modules)
    with state.trial():
        adapter = make_adapter(model, state, name, resolved, spec, evidence=evidence)
        adapter.full = {n: full_modules.own_copy(m) for n, m in modules.items()}
        attach(model, state, adapter, modules)
    return model


def attach(model: nn.Module, state: State, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Put a built adapter on the model and let it alone act. Raises, with nothing done, where it cannot stand there."""
    merge.refuse_merged(state, "add to")
    refuse_overlap(adapter.sites.values(), adapter.full, state)
    refuse_unreachable(adapter.sites.values(), modules)
    if getattr(model, NAME, None) is not state:
        state.was_trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        model.requires_grad_(False)
        setattr(model, NAME, state)
    for key, site in adapter.sites.items():
        host = wrap(site)
        if adapter.name not in host.adapters:
            host.adapters[adapter.name] = nn.ModuleDict()
        held: Any = host.adapters[adapter.name]
        held[site.key] = adapter.deltas[key]
    for name, twin in adapter.full.items():
        full_modules.place(modules[name], adapter.name, twin)
    state.closed += shortcuts.close(model)
    state.adapters_by_name[adapter.name] = adapter
    activate(model, adapter.name)


def adapters(model: nn.Module) -> list[str]:
    """Return the names of the model's adapters, in the order they came."""
    state = getattr(model, NAME, None)
    return list(state.adapters_by_name) if state is not None else []


def active(model: nn.Module) -> list[str]:
    """Return the names of the adapters that act now."""
    state = getattr(model, NAME, None)
    return list(state.active) if state is not None else []


def activate(model: nn.Module, names: str | Iterable[str]) -> None:
    """Let exactly these adapters act (their changes add up); no adapter's `requires_grad` is touched.

    Raises `UnknownNameError` for a name the model does not have and `MergeError` while adapters are merged.
    """
    state = state_of(model)
    chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in chosen:
        state.adapter(name)
    merge.refuse_merged(state, "activate")
    state.active = tuple(chosen)
    state.refresh()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base. Raises `MergeError` while adapters are merged."""
    state = state_of(model)
    merge.refuse_merged(state, "disable")
    state.silenced += 1
    state.refresh()
    try:
        yield
    finally:
        state.silenced -= 1
        state.refresh()


def detach(model: nn.Module, name: str | Sequence[str] | None = None) -> None:
    """Remove one adapter (or all): merged weights are given back first, and the last one leaves the base bit for bit.

    The base's `requires_grad` flags return to what they were before the first adapter.
    """
    state = state_of(model)
    names = list(state.adapters_by_name) if name is None else [name] if isinstance(name, str) else list(name)
    for each in names:
        state.adapter(each)
    merge.refuse_switched(state, "detach")
    merge.unmerge(model)
    state.active = tuple(n for n in state.active if n not in names)
    state.show(())
    for each in names:
        _remove(state, each)
    state.refresh()
    if not state.adapters_by_name:
        shortcuts.reopen(state.closed)
        delattr(model, NAME)
        flags = state.was_trainable
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(key, True))


def _remove(state: State, name: str) -> None:
    adapter = state.adapters_by_name.pop(name)
    for site in adapter.sites.values():
        host = host_of(site)
        if host is not None and name in host.adapters:
            del host.adapters[name]
    for site in adapter.sites.values():
        host = host_of(site)
        if host is not None and not len(host.adapters):
            unwrap(site)
    for copy in adapter.full.values():
        full_modules.remove(copy.host, name)  # type: ignore[arg-type]
    wanted = {key for other in state.adapters_by_name.values() for key in other.banks}
    for key in [k for k in state.banks if k not in wanted]:
        del state.banks[key]
