"""Checks of a method's settings: they travel, bad ones are refused by name, and the count is the formula's."""

from __future__ import annotations

import json
import math
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from torch import nn

from rankworks.conformance import models
from rankworks.conformance.case import RANK, Case, Snapshot, adapter_of, evidence_for, refusals, refused
from rankworks.conformance.errors import ConformanceError, NotApplicable
from rankworks.conformance.run import check
from rankworks.core.adapt import adapt
from rankworks.core.config import read
from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError, RankworksError, TargetError
from rankworks.core.registry import Method, build
from rankworks.core.site import KINDS, Shape, Site
from rankworks.core.spec import AdaptSpec
from rankworks.core.summary import trainable_parameters


def _limits(info: FieldInfo) -> dict[str, Any]:
    """Return a field's limits: some of ge, gt, le, lt."""
    return {n: v for m in info.metadata for n in ("ge", "gt", "le", "lt") if (v := getattr(m, n, None)) is not None}


def _numeric(info: FieldInfo) -> type | None:
    """Return int or float for a numeric setting (also one that may be absent), else None."""
    notes = (info.annotation, *get_args(info.annotation))
    return float if float in notes else int if int in notes and bool not in notes else None


def _other_value(info: FieldInfo) -> Any:
    """Return a legal value that is not the default, where one is easy to find, else None."""
    if get_origin(info.annotation) is Literal:
        return next((v for v in get_args(info.annotation) if v != info.default), None)
    if isinstance(info.default, bool):
        return not info.default
    kind, limits = _numeric(info), _limits(info)
    if kind is int:
        return (info.default or 0) + 1 if (info.default or 0) + 1 <= limits.get("le", math.inf) else None
    given = [0.5, (info.default or 0.0) + 1.0] if kind is float else []
    return next((v for v in given if v != info.default and _within(v, limits)), None)


def _within(value: float, limits: dict[str, Any]) -> bool:
    tests = {"ge": value.__ge__, "gt": value.__gt__, "le": value.__le__, "lt": value.__lt__}
    return all(tests[name](float(limit)) for name, limit in limits.items())


@check("variants")
def spec_round_trips_through_json(method: Method, case: Case) -> None:
    """A spec written as JSON and read again is the same spec, every setting included."""
    changed = {
        n: v for n, i in method.Spec.model_fields.items() if n != method.tag and (v := _other_value(i)) is not None
    }
    singles: list[Any] = [build(method.axis, method.key, **{n: v}) for n, v in changed.items()]
    for spec in [build(method.axis, method.key), *singles]:
        text = json.dumps(spec.model_dump(mode="json"))
        again = read(method.Spec, json.loads(text))
        if again != spec:
            raise ConformanceError(
                f"{spec!r} back from {text}", repr(again), "the types of the settings: plain JSON values"
            )
        whole = AdaptSpec(delta=spec) if method.axis == "delta" else case.spec(**{method.tag: spec})
        flat = json.loads(json.dumps(whole.flat()))
        if AdaptSpec.from_flat(flat) != whole:
            raise ConformanceError(
                f"the adapter's spec back from its flat form {flat}",
                repr(AdaptSpec.from_flat(flat)),
                "settings whose name the adapter's own settings also use",
            )


@check("once")
def unknown_setting_is_refused(method: Method, case: Case) -> None:
    """A misspelt setting is refused with the nearest known name."""
    names = [n for n in method.Spec.model_fields if n != method.tag]
    wrong = names[0] + "x" if names else "no_such_setting"
    ok, message = refused(lambda: build(method.axis, method.key, **{wrong: 1}), ConfigError)
    if not ok or wrong not in message or (names and names[0] not in message):
        near = f" and {names[0]!r}" if names else ""
        raise ConformanceError(f"a ConfigError naming {wrong!r}{near}", message, "route() and accepted()")


@check("once")
def bad_settings_are_refused(method: Method, case: Case) -> None:
    """Each setting out of its range, of another type or not finite is refused in a message that names it."""
    tried = 0
    for name, info in method.Spec.model_fields.items():
        for bad in _bad_values(info) if name != method.axis else []:
            tried += 1
            ok, message = refused(lambda n=name, b=bad: build(method.axis, method.key, **{n: b}), ConfigError)
            if not ok or name not in message:
                raise ConformanceError(
                    f"{name}={bad!r} refused by a ConfigError that names {name!r}", message, f"the limits of {name}"
                )
    if not tried:
        raise NotApplicable("it has no settings")


def _bad_values(info: FieldInfo) -> list[Any]:
    """Return values the setting must not take."""
    limits, kind = _limits(info), _numeric(info)
    if get_origin(info.annotation) is Literal or isinstance(info.default, bool):
        return ["no such choice"]
    if kind is None:
        return []
    bad: list[Any] = ["no number"]
    bad += [v for n, v in limits.items() if n in ("gt", "lt")]
    bad += [v - 1 for n, v in limits.items() if n in ("ge", "gt")] + [
        v + 1 for n, v in limits.items() if n in ("le", "lt")
    ]
    return [*bad, math.nan, math.inf] if kind is float else bad


@check("once", "delta")
def rank_zero_is_refused(method: Method, case: Case) -> None:
    """Rank 0 is refused before the model is touched, in a message that names rank and what to give instead."""
    accepted = method.cls.accepted({})  # type: ignore[attr-defined]
    if "rank" not in accepted:
        raise NotApplicable("it has no rank")
    model = case.model()
    before = Snapshot.of(model)
    ok, message = refused(lambda: case.adapt(model, rank=0), RankworksError)
    if not ok or "rank" not in message.lower():
        raise ConformanceError(
            "rank=0 refused by an error that names rank and the remedy", message, "problems(): call super().problems()"
        )
    if changes := before.differences(model):
        raise ConformanceError(
            "the model untouched after the refusal", changes[0], "what is written before problems() speaks"
        )


@check("once", "delta")
def unclaimed_kinds_are_refused(method: Method, case: Case) -> None:
    """A kind of site the method does not claim is refused by name, and the model is untouched."""
    others = [k for k in KINDS if k not in method.cls.kinds]  # type: ignore[attr-defined]
    if not others:
        raise NotApplicable("it claims every kind of site")
    for kind in others:
        model = models.build(kind)
        before = Snapshot.of(model)
        ok, message = refused(lambda m=model, k=kind: adapt(m, case.spec(targets=models.MODELS[k][1])), TargetError)
        if not ok or kind not in message:
            raise ConformanceError(f"a TargetError that names the kind {kind!r}", message, "kinds")
        if changes := before.differences(model):
            raise ConformanceError("the model untouched after the refusal", changes[0], "core.build.check")


SHAPES = (Shape(6, 4), Shape(4, 6), Shape(8, 8), Shape(24, 2), Shape(2, 12))


@check("variants", "delta")
def count_is_the_real_count(method: Method, case: Case) -> None:
    """count(spec, shape) is the number of trained parameters, for several shapes and ranks."""
    ranks: list[dict[str, Any]] = [{"rank": r} for r in (1, RANK)] if "rank" in case.settings else [{}]
    cls: type[Delta] = method.cls  # type: ignore[assignment]
    tried = 0
    for change in ranks:
        spec = case.spec(targets="0", **change)
        for shape in () if cls.weightless else SHAPES:
            layer = nn.Sequential(nn.Linear(shape.in_, shape.out))
            if refusals(spec, Site("0", "linear", layer[0])):
                continue
            tried += 1
            adapt(layer, spec, evidence=evidence_for(layer, spec))
            real = trainable_parameters(layer)
            claimed = cls.count(spec.delta, shape) + cls.count_shared(spec.delta, [shape])
            held = sum(p.numel() for p in adapter_of(layer).parameters())
            if claimed != real or held != real:
                where = f"shape {tuple(shape)}, {change}"
                raise ConformanceError(
                    f"{claimed:,} by count() at {where}",
                    f"{real:,} trained, {held:,} in the adapter",
                    "count(), setup()",
                )
        if cls.weightless:
            tried += 1
            model = case.adapt(case.model(), **change)
            real, sites = trainable_parameters(model), adapter_of(model).sites.values()
            claimed = sum(cls.count(spec.delta, site.shape) for site in sites)
            if claimed != real:
                raise ConformanceError(f"{claimed:,} by count() at the blocks", f"{real:,} trained", "count(), setup()")
    if not tried:
        raise NotApplicable("it takes no linear layer of the shapes tried")
