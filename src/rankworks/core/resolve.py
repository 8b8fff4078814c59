"""Which sites an adapter stands at, and the settings of each: targets, selection, overrides, shared-out ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from rankworks.core.errors import TargetError
from rankworks.core.evidence import Evidence, Need, as_needs
from rankworks.core.registry import MethodSpec
from rankworks.core.site import Site
from rankworks.core.spec import AdaptSpec
from rankworks.core.targets import check_overrides, find_sites, override_for, stacks_of


def resolve(model: nn.Module, spec: AdaptSpec) -> list[tuple[Site, MethodSpec]]:
    """Return every site with the settings it gets. Raises once, naming every problem."""
    sites = find_sites(model, spec.targets, spec.exclude, spec.delta.method.cls.kinds)
    depth = check_overrides(model, sites, spec.overrides)  # of all that is targeted: what is selected may change
    if spec.select is not None:
        sites = _selected(model, sites, spec.select)
    resolved = []
    for site in sites:
        changes = override_for(site, spec.overrides, depth)
        resolved.append((site, spec.delta.replace(**changes) if changes else spec.delta))
    return resolved


def _selected(model: nn.Module, sites: list[Site], select: MethodSpec) -> list[Site]:
    """Return the sites that the selection keeps."""
    chosen = set(select.method.cls(select).choose(sites, stacks_of(model)))  # type: ignore[call-arg]
    kept = [site for site in sites if site.name in chosen]
    if not kept:
        raise TargetError(f"the selection {select.key!r} leaves no site to adapt: widen targets, or let it keep more.")
    return kept


def needs_of(resolved: Iterable[tuple[Site, MethodSpec]], spec: AdaptSpec) -> tuple[Need, ...]:
    """Return what an adapter must know from data at these sites before it starts, each statistic once.

    Raises `ConfigError` where the sites want one with different options; of a single site they never differ.
    """
    wanted: list[str | Need] = [] if spec.ranks is None else list(spec.ranks.method.cls.needs(spec.ranks))
    for site, delta in resolved:
        wanted += delta.method.cls.needs(delta)
        wanted += spec.init.method.cls.needs_at(spec.init, delta, site.shape)
    return as_needs(wanted)


def allocated(
    resolved: list[tuple[Site, MethodSpec]], spec: AdaptSpec, evidence: Evidence
) -> list[tuple[Site, MethodSpec]]:
    """Return the sites with the ranks that the initialiser and the rank schedule give them before the start.

    On the meta device, where there is nothing to share out by, those of the schedule at its largest.
    """
    shapes = any(site.tensor.is_meta for site, _ in resolved)
    if not shapes:
        resolved = _replaced(resolved, spec.init.method.cls(spec.init).allocate(resolved, evidence))  # type: ignore[call-arg]
    if spec.ranks is not None:
        schedule = spec.ranks.method.cls(spec.ranks)  # type: ignore[call-arg]
        schedule.check(resolved)
        resolved = _replaced(resolved, schedule.largest(resolved) if shapes else schedule.allocate(resolved, evidence))
    return resolved


def _replaced(
    resolved: list[tuple[Site, MethodSpec]], changes: Mapping[str, Mapping[str, Any]]
) -> list[tuple[Site, MethodSpec]]:
    return [(s, d.replace(**changes[s.name]) if changes.get(s.name) else d) for s, d in resolved]
