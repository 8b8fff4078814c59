"""What is refused before a model is touched: every reason at once, with the sites that it holds for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.evidence import Evidence
from rankworks.core.registry import MethodSpec
from rankworks.core.resolve import needs_of
from rankworks.core.site import Shape, Site
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import State
from rankworks.core.weights.holders import is_turned

BIASLESS = ("embedding", "expert")  # kinds of site that never have a bias


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
                reason = f"{spec.title} starts from the {need.name} of each weight, {need.source}"
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
    raise_all(problems)


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
    raise_all(problems)


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


def raise_all(problems: Mapping[str, list[str]]) -> None:
    """Raise `TargetError` with every reason, the first name it holds for and the number of others."""
    if problems:
        lines = [
            f"{reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for reason, names in problems.items()
        ]
        raise TargetError("; ".join(lines) + ".")
