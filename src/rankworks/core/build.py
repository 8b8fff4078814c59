"""Build an adapter off the model: its banks and its deltas, of sites that are resolved (resolve.py) and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankworks.core.bank import Bank
from rankworks.core.config import read
from rankworks.core.delta import Delta
from rankworks.core.draw import Draw
from rankworks.core.evidence import Evidence
from rankworks.core.progress import track
from rankworks.core.refuse import raise_all
from rankworks.core.registry import MethodSpec
from rankworks.core.site import Shape, Site
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import Adapter, State, make_bank
from rankworks.core.weights.tied import share, twins


def make_adapter(
    model: nn.Module,
    state: State,
    name: str,
    resolved: list[tuple[Site, MethodSpec]],
    spec: AdaptSpec,
    start: bool = True,
    evidence: Evidence | None = None,
) -> Adapter:
    """Return an adapter with its deltas and banks, not yet on the model. With `start=False` no initialiser runs."""
    banks = _make_banks(state, name, resolved, spec)
    deltas = _make_deltas(model, resolved, spec, banks, start, evidence or {})
    keys = [key for _, key in banks.values() if key]
    shared = [bank for bank, _ in banks.values() if bank is not None and any(True for _ in bank.parameters())]
    return Adapter(name, spec, {s.name: s for s, _ in resolved}, deltas, banks=keys, shared=shared)


Banks = dict[str, tuple[Bank | None, str | None]]


def _make_banks(state: State, name: str, resolved: list[tuple[Site, MethodSpec]], spec: AdaptSpec) -> Banks:
    """Return the bank and its key for every distinct choice of settings."""
    banks: Banks = {}
    for settings in {_identity(s): s for _, s in resolved}.values():
        shapes = [site.shape for site, other in resolved if other == settings]
        first = resolved[0][0]
        tensors = settings.method.cls.bank(settings, shapes, Draw(_seed(settings, spec), "bank", first.tensor.device))
        key = bank_key(settings, spec, shapes)
        trained = {k: t for k, t in tensors.items() if isinstance(t, nn.Parameter)}
        if trained:  # they are this adapter's alone, in the type it trains in
            key = f"{key}_{name}"
            tensors |= {k: nn.Parameter(t.detach().to(_dtype(spec, first))) for k, t in trained.items()}
        banks[_identity(settings)] = (make_bank(state, key, tensors), key if tensors else None)
    return banks


def _make_deltas(
    model: nn.Module,
    resolved: list[tuple[Site, MethodSpec]],
    spec: AdaptSpec,
    banks: Banks,
    start: bool,
    evidence: Evidence,
) -> dict[str, Delta]:
    """Return the deltas by site name."""
    by_name = {site.name: site for site, _ in resolved}
    owners = twins(model, list(by_name.values())) if spec.tied == "shared" else {}
    owners = {**owners, **sharing(resolved, spec)}
    initialiser = spec.init.method.cls(spec.init)
    schedule: Any = None if spec.ranks is None else spec.ranks.method.cls(spec.ranks)
    if schedule is not None:
        schedule.init = spec.init.key
    deltas: dict[str, Delta] = {}
    for site, settings in track(resolved, f"{spec.title}: starting factors"):
        if site.name in owners:
            continue
        tensor = site.tensor
        draw = Draw(spec.seed, site.name, tensor.device, _dtype(spec, site))
        weight = site.weight
        known = evidence.get(site.name)
        delta = settings.method.cls(settings, site.shape, draw, banks[_identity(settings)][0], site.kind, known)
        delta.given = start and spec.init.key != "default"
        delta.setup(weight)
        if start:
            delta.reset(weight, initialiser)
            if schedule is not None:
                schedule.prepare(delta)
        delta.train(site.module.training)
        for part in delta.modules():
            if isinstance(part, Delta):
                part.evidence = {}  # used; not kept in memory
        deltas[site.name] = delta
    for name, owner in owners.items():
        deltas[name] = share(deltas[owner], by_name[name])
    return {name: deltas[name] for name in by_name}


def sharing(resolved: list[tuple[Site, MethodSpec]], spec: AdaptSpec) -> dict[str, str]:
    """Return {site: the site whose change it uses} as the selection says. Raises `TargetError` where it cannot."""
    if spec.select is None:
        return {}
    owners = dict(spec.select.method.cls(spec.select).owners([site for site, _ in resolved]))  # type: ignore[call-arg]
    settings = {site.name: own for site, own in resolved}
    problems: dict[str, list[str]] = {}
    for name, owner in owners.items():
        cls: type[Delta] = settings[name].method.cls
        if not cls.portable(settings[name]):
            reason = (
                f"{spec.select.key} lets sites share one change, and that of {settings[name].key} is made for the "
                "weight it stands at: set share to False in select, or choose lora, vera, ..."
            )
            problems.setdefault(reason, []).append(name)
        elif settings[name] != settings[owner]:
            reason = (
                f"{spec.select.key} lets sites share one change, which can have one set of settings, and overrides or "
                f"an allocation of ranks give {owner} others: treat them alike, or set share to False in select"
            )
            problems.setdefault(reason, []).append(name)
    raise_all(problems)
    return owners


def differences(settings: MethodSpec, common: MethodSpec) -> dict[str, Any]:
    """Return the settings that differ from the adapter's own, as an adapter file records them per site."""
    mine, theirs = settings.model_dump(mode="json"), common.model_dump(mode="json")
    return {k: v for k, v in mine.items() if v != theirs[k]}


def with_differences(common: MethodSpec, changes: Mapping[str, Any]) -> MethodSpec:
    """Return the adapter's settings with one site's differences, as read from a file."""
    if not changes:
        return common
    return read(type(common), {**common.model_dump(mode="json"), **changes}, "settings of a site")


def _identity(settings: MethodSpec) -> str:
    return json.dumps(settings.model_dump(mode="json"), sort_keys=True)


def _seed(settings: MethodSpec, spec: AdaptSpec) -> int:
    """The bank's seed: the method's own where it has one, so that adapters of other seeds share the bank."""
    return getattr(settings, "projection_seed", spec.seed)


def bank_key(settings: MethodSpec, spec: AdaptSpec, shapes: list[Shape]) -> str:
    """Return the name of the bank these settings ask for: the same request gives the same name."""
    import hashlib

    size = settings.method.cls.bank_size(shapes)
    text = json.dumps([_identity(settings), _seed(settings, spec), size])
    return f"{settings.key.replace('-', '_')}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _dtype(spec: AdaptSpec, site: Site) -> torch.dtype:
    """The adapter's floating type: as asked, else the base's where it is at least float32, else float32."""
    if spec.dtype is not None:
        return getattr(torch, spec.dtype)
    base = site.tensor.dtype
    if not base.is_floating_point:
        return torch.float32
    return torch.promote_types(base, torch.float32)
