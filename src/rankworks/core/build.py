"""Build an adapter off the model: sites, banks and deltas, all problems found before the model is touched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rankworks.core.bank import Bank
from rankworks.core.config import read
from rankworks.core.delta import Delta
from rankworks.core.draw import Draw
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.evidence import Evidence, Need, as_needs
from rankworks.core.progress import track
from rankworks.core.registry import MethodSpec
from rankworks.core.site import Shape, Site
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import Adapter, State, make_bank
from rankworks.core.targets import check_overrides, find_sites, override_for, stacks_of
from rankworks.core.weights.holders import is_turned
from rankworks.core.weights.tied import share, twins

BIASLESS = ("embedding", "expert")  # kinds of site that never have a bias


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


def check(resolved: Iterable[tuple[Site, MethodSpec]], spec: AdaptSpec, evidence: Evidence | None = None) -> None:
    """Raise `TargetError` with every reason why a site cannot take its delta or initialiser."""
    problems: dict[str, list[str]] = {}
    for site, settings in resolved:
        if site.own_parameter is not None and is_turned(site.tensor):
            reason = (
                "bitsandbytes has turned these 4-bit weights for inference on the CPU, at their first call without "
                "gradients, and no gradient passes them any more: load the model again and adapt it before it is used"
            )
            problems.setdefault(reason, []).append(site.name)
        known = (evidence or {}).get(site.name, {})
        measured = evidence is None or site.tensor.is_meta  # shapes alone are adapted without data
        for need in () if measured else needs_of([(site, settings)], spec):
            if not need.met(known):
                reason = f"{settings_title(spec)} starts from the {need.name} of each weight, {need.source}"
                problems.setdefault(reason, []).append(site.name)
        for field, mine in settings.method.cls.common(settings).items():
            common = spec.delta.method.cls.common(spec.delta)[field]
            if mine != common:
                reason = (
                    f"{field} is {mine} here and {common} elsewhere, but {settings.key} shares tensors among all sites "
                    f"that depend on it: give one {field} for all"
                )
                problems.setdefault(reason, []).append(site.name)
        shown = f"{site.name} {tuple(site.shape)}" if site.param in site.module._parameters else site.name
        for reason in unreachable(site.module, site.own_parameter) or reasons_against(site, settings, spec):
            problems.setdefault(reason, []).append(shown)
    _raise(problems)


def reasons_against(site: Site, settings: MethodSpec, spec: AdaptSpec) -> list[str]:
    """Return why a site cannot take its delta or the initialiser, sentences without its name."""
    cls: type[Delta] = settings.method.cls
    if site.kind not in cls.kinds:
        return [f"{settings.key} does not take sites of kind {site.kind!r} (it takes {', '.join(cls.kinds)})"]
    reasons = list(cls.problems(settings, site.shape))
    rank = cls.factored_rank(settings)
    factors = cls.factor_count(settings)
    if rank is None and spec.init.key != "default":
        reasons.append(
            f"the initialiser {spec.init.key!r} fills a factor pair, which {settings.key!r} lacks: leave init out"
        )
    elif spec.init.key != "default" and factors not in spec.init.method.cls.fills:
        reasons.append(
            f"the initialiser {spec.init.key!r} fills {' or '.join(map(str, spec.init.method.cls.fills))} factors and "
            f"{settings.key!r} has {factors}: choose another initialiser"
        )
    elif site.kind not in (spec.init.method.cls.kinds or (site.kind,)):
        reasons.append(
            f"the initialiser {spec.init.key!r} starts from what a layer reads, and is not defined for sites of kind "
            f"{site.kind!r}: exclude them, or choose another initialiser"
        )
    elif not spec.init.method.cls.grouped and getattr(site.module, "groups", 1) > 1:
        reasons.append(
            f"the groups of a grouped convolution read inputs of their own, and the initialiser {spec.init.key!r} "
            "starts from those of one whole layer: exclude the site, or choose another initialiser"
        )
    elif rank and not reasons:
        reasons += spec.init.method.cls(spec.init).problems(site.shape, rank)
    if spec.ranks is not None and not reasons:
        reasons += _against_ranks(settings, spec, site.shape)
    if site.kind in BIASLESS and cls.changes_bias(settings):
        reasons.append(
            f"a site of kind {site.kind!r} has no bias, and {settings.key} would train one: set bias False there"
        )
    if not cls.grouped and getattr(site.module, "groups", 1) > 1:
        reasons.append(
            f"the change that {settings.key} makes mixes the groups of a grouped convolution, which its kernel cannot "
            "hold: exclude the site"
        )
    whole = "a stacked expert tensor" if site.kind == "expert" else "a grouped convolution"
    if (site.kind == "expert" or getattr(site.module, "groups", 1) > 1) and getattr(settings, "dropout", 0.0):
        reasons.append(
            f"dropout needs an input of its own, and {whole} takes the change as a matrix: set dropout 0 there"
        )
    if site.kind == "embedding" and getattr(site.module, "max_norm", None) is not None:
        reasons.append("the embedding rewrites its own rows (max_norm), so a change of it is not defined")
    return reasons


def _against_ranks(settings: MethodSpec, spec: AdaptSpec, shape: Shape) -> list[str]:
    """Return why the rank schedule cannot act on a change of these settings."""
    assert spec.ranks is not None
    cls: Any = spec.ranks.method.cls
    reasons = list(cls(spec.ranks).problems(settings, shape))
    if cls.inits is not None and spec.init.key not in cls.inits:
        reasons.append(
            f"{spec.ranks.key} sets its own start, or acts on factors that {spec.init.key!r} takes out of the base: "
            f"choose init {' or '.join(cls.inits)}"
        )
    delta: Any = settings.method.cls
    trained = delta.pair_rank(settings, shape) is not None and delta.factored_rank(settings) is not None
    if cls.pairs and not trained:
        reasons.append(
            f"{spec.ranks.key} cuts or adds ranks of a trained pair B A, which {_innermost(settings).key} lacks: "
            "choose lora, dora"
        )
    return reasons


def _innermost(settings: MethodSpec) -> MethodSpec:
    """Return the settings of the delta that no other is inside of."""
    inner = getattr(settings, "inner", None)
    return _innermost(inner) if isinstance(inner, MethodSpec) else settings


def unreachable(module: nn.Module, param: str | None = None) -> list[str]:
    """Return why a change of a module's class, or of its parameter, would not reach its output."""
    reasons = []
    held = module._parameters.get(param) if param is not None else None
    if "forward" in vars(module) and "_old_forward" not in vars(
        module
    ):  # the second: accelerate's, which we can follow
        reasons.append(
            "another library put a forward of its own on this very module, which would go round the change: load the "
            "model without it, or exclude the module"
        )
    if param is not None and held is None:
        reasons.append(
            "its weight is computed from other tensors (weight_norm or another parametrisation), so there is none to "
            "change: remove the parametrisation first, or exclude the module"
        )
    if held is not None and held.is_meta and "_hf_hook" in vars(module):
        reasons.append("its weight is offloaded and cannot be read: load the model without offloading this module")
    return reasons


def refuse_unreachable(sites: Iterable[Site], modules: Mapping[str, nn.Module]) -> None:
    """Raise where a change at these sites, or a copy in place of these modules, would not reach the output."""
    problems: dict[str, list[str]] = {}
    found = [(s.name, unreachable(s.module, s.own_parameter)) for s in sites] + [
        (n, unreachable(m)) for n, m in modules.items()
    ]
    for name, reasons in found:
        for reason in reasons:
            problems.setdefault(reason, []).append(name)
    _raise(problems)


def _raise(problems: Mapping[str, list[str]]) -> None:
    """Raise `TargetError` with every reason, the first name it holds for and the number of others."""
    if problems:
        lines = [
            f"{reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for reason, names in problems.items()
        ]
        raise TargetError("; ".join(lines) + ".")


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
    for site, settings in track(resolved, f"{settings_title(spec)}: starting factors"):
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
    _raise(problems)
    return owners


def settings_title(spec: AdaptSpec) -> str:
    """Return `LoRA (pissa)` and the like, for progress bars."""
    others = [spec.init.key] * (spec.init.key != "default") + [
        s.key for s in (spec.ranks, spec.select) if s is not None
    ]
    title = spec.asked.method.title
    return f"{title} ({', '.join(others)})" if others else title


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


def refuse_overlap(sites: Iterable[Site], full: Iterable[str], state: State) -> None:
    """Raise where a module is both a site and trained in full, by this adapter or by this and another on the model."""
    sites, full = list(sites), list(full)
    both = [s.name for s in sites if any(_within(s.path, f) for f in full)]
    if both:
        raise ConfigError(
            f"{both[0]} is named both in targets and in full: add it to exclude, or leave it out of full."
        )
    for other in state.adapters_by_name.values():
        taken = [s.path for s in sites if any(_within(s.path, f) for f in other.full)]
        taken += [f for f in full if any(_within(s.path, f) for s in other.sites.values())]
        taken += [f for f in full for g in other.full if f != g and (_within(f, g) or _within(g, f))]
        if taken:
            raise ConfigError(
                f"{taken[0]} would be trained in full by one adapter and in another way by the adapter {other.name!r}: "
                "the two cannot be added up. Treat it alike in both, or detach the other."
            )


def _within(path: str, module: str) -> bool:
    """Whether a module's name is `module` or below it."""
    return path == module or path.startswith(module + ".")
