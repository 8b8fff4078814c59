"""Arms: what the entries of `methods` mean, told before anything is loaded.

An entry is a name ("vera", "pissa", "adalora", "galore"), an axis ("deltas", "inits", "ranks", "selections",
"optimizers"), "all", a name with its axis ("init=nlora"), or a mapping of settings. A name of another axis than delta
stands on the comparison's own delta. Settings of the shared `adapt` block hold for every arm whose method has them.
"full" trains the whole model; so does an optimizer where the shared block is `adapt: none`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rankworks.compare.config import CompareConfig, TuneConfig
from rankworks.core.config import read
from rankworks.core.errors import ConfigError, RankworksError, UnknownNameError, did_you_mean
from rankworks.core.registry import TAGS, Method, MethodSpec, get, methods
from rankworks.core.spec import AdaptSpec
from rankworks.train.config import AUTO, CALIBRATED, QUANTISED_WHOLE, OptimConfig

AXES = {"deltas": "delta", "inits": "init", "ranks": "rank", "selections": "selection", "optimizers": "optimizer"}
"""What an axis is called in `methods`, in the order in which `all` goes through them."""

TAG_OF = {tag: axis for axis in AXES.values() for tag in (axis, TAGS.get(axis, axis))}


FULL = Method("full", "full", "Full fine-tuning", 0, "", object, MethodSpec)
"""Training the whole model, which is no method of the registry: what the others are measured against."""


@dataclass
class Arm:
    """One contender: its blocks of a run, its tuning, and what a reader should know about it."""

    label: str
    axis: str
    key: str
    title: str
    paper: str
    adapt: dict[str, Any] | None  # None: the whole model is trained
    optim: dict[str, Any]
    tune: TuneConfig
    notes: list[str] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The label as a file's name."""
        return re.sub(r"[^\w.+=-]+", "-", self.label).strip("-.") or "arm"

    def spec(self, seed: int = 0, full: list[str] | None = None) -> AdaptSpec:
        """Return what `adapt` takes, of an arm that adapts. Raises `ConfigError`."""
        assert self.adapt is not None
        return AdaptSpec.from_flat({"seed": seed, "full": full or [], **self.adapt}, self.label)

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the arm's numbers, every default filled in."""
        return {
            "adapt": None if self.adapt is None else self.spec().flat(),
            "optim": {k: v for k, v in OptimConfig(**self.optim).model_dump().items() if k != "lr"},
            "tune": self.tune.model_dump(mode="json", exclude={"seeds"} if self.tune.seeds == 1 else None),
        }


@dataclass(frozen=True)
class Refused:
    """An arm of an axis that cannot be made of the shared settings, with the reason."""

    label: str
    key: str
    reason: str


def expand(config: CompareConfig) -> tuple[list[Arm], list[Refused]]:
    """Return the arms, each once, and those of an axis that the shared settings do not allow.

    Raises `ConfigError`: an unknown name with the nearest ones, a wrong setting of a named entry, a baseline that is
    no arm, a shared setting that no method has.
    """
    arms: list[Arm] = []
    refused: list[Refused] = []
    seen: dict[str, str] = {}
    unused: set[str] | None = None
    for number, entry in enumerate(config.methods):
        wanted, named = _entry(entry, number)
        for method, settings in wanted:
            try:
                arm, left_out = _arm(config, method, settings, number)
            except RankworksError as error:
                if named:
                    raise
                refused.append(Refused(method.key, method.key, str(error)))
                continue
            unused = left_out if unused is None else unused & left_out
            same = json.dumps(arm.identity(), sort_keys=True)
            if same not in seen:
                arm.label = seen[same] = _free(arm, [a.label for a in arms], "label" in settings)
                arms.append(arm)
    if unused:
        deltas = {arm.spec().delta.key for arm in arms if arm.adapt is not None}
        known = {*AdaptSpec.model_fields, *(k for key in deltas for k in get("delta", key).Spec.model_fields)}
        raise ConfigError("adapt: " + " ".join(f"no method has {k!r}.{did_you_mean(k, known)}" for k in sorted(unused)))
    _check_baseline(config, arms, refused)
    return arms, refused


def _entry(entry: str | Mapping[str, Any], number: int) -> tuple[list[tuple[Method, dict[str, Any]]], bool]:
    """Return the methods an entry stands for, with its settings, and whether it names one."""
    if isinstance(entry, Mapping):
        tags = [tag for tag in ("delta", "init", "ranks", "select") if entry.get(tag) is not None]
        optimizer = entry.get("optimizer")
        # What the entry adds last is what it is about: {delta: lora, init: pissa} is an arm of PiSSA.
        if optimizer is not None and not tags:
            return [(_method("optimizer", optimizer), dict(entry))], True
        tag = tags[-1] if tags else "delta"
        return [(_method(TAG_OF[tag], entry.get(tag, "lora")), dict(entry))], True
    if entry == "all":
        return [(m, {}) for axis in AXES.values() for m in methods(axis)], False
    if entry in AXES:
        return [(m, {}) for m in methods(AXES[entry])], False
    tag, equals, key = entry.partition("=")
    if equals:
        if tag not in TAG_OF:
            raise UnknownNameError(f"methods: {entry!r} names no axis.{did_you_mean(tag, TAG_OF)}")
        return [(get(TAG_OF[tag], key), {})], True
    if entry == "full":
        return [(FULL, {})], True
    found = [m for axis in AXES.values() for m in methods(axis) if m.key == entry]
    if not found:
        known = {m.key for m in methods()} | {*AXES, "all", "full"}
        raise UnknownNameError(f"methods[{number}]: no method is called {entry!r}.{did_you_mean(entry, known)}")
    return [(found[0], {})], True


def _method(axis: str, value: Any) -> Method:
    tag = TAGS.get(axis, axis)
    key = value.key if isinstance(value, MethodSpec) else value
    if isinstance(value, Mapping):
        key = value.get(tag, value.get("name") if axis == "optimizer" else None)
    return get(axis, str(key))


def _arm(config: CompareConfig, method: Method, settings: dict[str, Any], number: int) -> tuple[Arm, set[str]]:
    """Return one arm, checked, and the shared settings that it has no use for."""
    settings = dict(settings)
    where = f"methods[{number}] ({method.key})"
    label = str(settings.pop("label", method.key))
    optimizer = settings.pop("optimizer", None)
    tune = {**config.tune.model_dump(), **settings.pop("tune", {})}
    if method.axis == "optimizer" and optimizer is None:
        optimizer = method.key
    elif method.axis not in ("delta", "optimizer", "full"):
        settings.setdefault(method.tag, method.key)
    base = {} if config.adapt is None else config.adapt
    whole = method is FULL or (config.adapt is None and method.axis == "optimizer" and "delta" not in settings)
    delta = settings.pop("delta", method.key if method.axis == "delta" else base.get("delta", "lora"))
    shared, left_out = ({}, set()) if whole else _shared(base, delta)
    if whole and config.model is not None and config.model.quantise is not None:
        raise ConfigError(f"{where}: {QUANTISED_WHOLE}.")
    if whole and settings:
        within = f" An optimizer's own stand within it: {{optimizer: {{name: {method.key}, ...}}}}."
        told = f"{where}: the whole model is trained, which has no {' and no '.join(settings)}."
        raise ConfigError(told + (within if method.axis == "optimizer" else ""))
    arm = Arm(
        label=label,
        axis=method.axis,
        key=method.key,
        title=method.title,
        paper=method.paper,
        adapt=None if whole else {"delta": delta, **shared, **settings},
        optim=_optim(config.optim, optimizer),
        tune=read(TuneConfig, tune, f"{where}: tune"),
    )
    if arm.adapt is not None:
        AdaptSpec.from_flat(arm.adapt, where)
    if arm.tune.lr == AUTO:
        _check_auto(arm, where)
    for path in arm.tune.also:
        _check_path(arm, path, where)
    if left_out:
        arm.notes.append(f"{_key(delta)} has no {' and no '.join(sorted(left_out))}: the shared setting does not apply")
    others = [m for m in methods() if m.key == method.key and m.axis != method.axis]
    if others and not settings and number < len(config.methods) and config.methods[number] == method.key:
        tags = " or ".join(f"{m.tag}={m.key}" for m in others)
        arm.notes.append(f"{method.key} is taken as the {method.axis} of that name; write {tags} for the other")
    return arm, left_out


def _shared(shared: Mapping[str, Any], delta: Any) -> tuple[dict[str, Any], set[str]]:
    """Return the shared settings that a delta has, and the names of those it has not."""
    values = {k: v for k, v in shared.items() if k != "delta"}
    method = _method("delta", delta)
    inner = delta.model_dump() if isinstance(delta, MethodSpec) else dict(delta) if isinstance(delta, Mapping) else {}
    known = {*AdaptSpec.model_fields, *method.cls.accepted({**inner, **values})}  # type: ignore[attr-defined]
    return {k: v for k, v in values.items() if k in known}, {k for k in values if k not in known}


def _optim(shared: OptimConfig, optimizer: Any) -> dict[str, Any]:
    """Return the optim block of an arm; another optimizer does not take the options of the shared one."""
    block = {k: v for k, v in shared.model_dump().items() if k in shared.model_fields_set and k != "lr"}
    if optimizer is None:
        return block
    given: dict[str, Any] = {"name": optimizer} if isinstance(optimizer, str) else dict(optimizer)
    given["name"] = given.pop("optimizer", given.get("name"))
    other = given["name"] != shared.name
    block = {k: v for k, v in block.items() if not (other and k == "options")} | given
    OptimConfig(**block)
    return block


def _check_auto(arm: Arm, where: str) -> None:
    """Raise where the rate would be measured for an optimizer that no rule was calibrated for."""
    name = OptimConfig(**arm.optim).name
    if name not in CALIBRATED:
        raise ConfigError(
            f"{where}: tune.lr: auto holds for {' and '.join(CALIBRATED)}, for which it was calibrated, not for "
            f"{name}: give this entry a range of its own, tune: {{lr: {{low: 1.0e-4, high: 3.2e-2}}}}."
        )


def _check_path(arm: Arm, path: str, where: str) -> None:
    """Raise where a setting to be tuned is not one of this arm's, by giving it its first value."""
    choices = arm.tune.also[path]
    first = choices[0] if isinstance(choices, list) else choices.middle
    block, _, name = path.partition(".")
    if block == "adapt":
        AdaptSpec.from_flat({**(arm.adapt or {}), name: first}, f"{where}: tune.also.{path}")
    elif block == "optim":
        OptimConfig(**{**arm.optim, name: first})


def _free(arm: Arm, taken: list[str], chosen: bool) -> str:
    """Return a label that no other arm has. Raises `ConfigError` where the user chose one twice."""
    if arm.label not in taken:
        return arm.label
    if chosen:
        raise ConfigError(f"two entries of methods have the label {arm.label!r}: give each its own.")
    longer = f"{TAGS.get(arm.axis, arm.axis)}={arm.key}"
    return next(t for t in (longer, *(f"{longer} {n}" for n in range(2, 10_000))) if t not in taken)


def _key(delta: Any) -> str:
    return _method("delta", delta).key


def _check_baseline(config: CompareConfig, arms: list[Arm], refused: list[Refused]) -> None:
    labels = [arm.label for arm in arms]
    if not labels:
        raise ConfigError("no method is left to compare: " + " ".join(f"{r.label}: {r.reason}" for r in refused))
    if config.baseline is not None and config.baseline not in labels:
        raise ConfigError(f"baseline: no arm is called {config.baseline!r}.{did_you_mean(config.baseline, labels)}")


def baseline_of(config: CompareConfig, arms: list[Arm]) -> str:
    """Return the label of the baseline: the one named, plain LoRA where it is there, else the first arm."""
    labels = [arm.label for arm in arms]
    return config.baseline or ("lora" if "lora" in labels else labels[0])
