"""AdaptSpec: everything that describes an adapter, from YAML, the command line or Python alike.

The flat form `{delta: lora, rank: 16, targets: all-linear, init: pissa}` names the adapter's own settings and the
delta's in one mapping; `AdaptSpec.from_flat` sorts them and reports an unknown key with the nearest of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator, model_validator

from rankworks.core.config import Config, read
from rankworks.core.errors import ConfigError, did_you_mean
from rankworks.core.fields import Setting
from rankworks.core.registry import DeltaSpec, InitSpec, MethodSpec, RanksSpec, SelectSpec, build, get


class AdaptSpec(Config):
    """What to adapt, how, and from where."""

    delta: DeltaSpec = Setting("lora", "how the change of a weight is formed")
    init: InitSpec = Setting("default", "where the change starts")
    ranks: RanksSpec = Setting(None, "how rank is spread over the sites and changed in training")
    select: SelectSpec = Setting(None, "which of the targets are adapted")
    targets: str | list[str] = Setting("all-linear", "which weights (see core/targets.py)")
    exclude: list[str] = Setting([], "patterns of sites to leave out")
    overrides: dict[str, dict[str, Any]] = Setting({}, "settings by pattern; later patterns win")
    full: list[str] = Setting([], "modules to train in full, as part of the adapter")
    tied: Literal["separate", "shared"] = Setting(
        "separate", "two targets that share a weight: an adapter each, or one that serves both"
    )
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = Setting(
        None, "type of the adapter's tensors; None: the base's, but at least float32"
    )
    seed: int = Setting(0, "seed of everything random in the adapter", ge=0)

    @field_validator("exclude", "full", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [v.strip() for v in value.split(",")] if isinstance(value, str) else value

    @field_validator("delta")
    @classmethod
    def _no_clash(cls, value: MethodSpec) -> MethodSpec:
        clash = sorted(type(value).model_fields.keys() & (cls.model_fields.keys() - {"delta"}))
        if clash:  # in the flat form one of the two would be lost
            raise ValueError(
                f"the delta {value.key!r} has a setting called {clash[0]!r}, and so has every adapter: rename it in "
                "the delta's class"
            )
        return value

    @model_validator(mode="after")
    def _gated(self) -> AdaptSpec:
        """Give the delta a gate per rank where the rank schedule acts through one."""
        if self.ranks is not None and self.ranks.method.cls.gates:
            gated = with_gates(self.delta)
            if gated is not self.delta:
                object.__setattr__(self, "delta", gated)  # validated already: an assignment would do so again
        return self

    @property
    def asked(self) -> MethodSpec:
        """The delta without the gates that the rank schedule acts through: what people call it by."""
        return self.delta if self.ranks is None or self.delta.key != "gated" else self.delta.inner  # type: ignore[attr-defined]

    @property
    def title(self) -> str:
        """`LoRA (pissa)` and the like, for progress bars and messages."""
        others = [self.init.key] * (self.init.key != "default")
        others += [other.key for other in (self.ranks, self.select) if other is not None]
        title = self.asked.method.title
        return f"{title} ({', '.join(others)})" if others else title

    @classmethod
    def from_flat(cls, values: Mapping[str, Any], where: str = "adapt") -> AdaptSpec:
        """Build from one flat mapping of the adapter's and the delta's settings; `ConfigError` names all problems."""
        values = dict(values)
        own = {k: values.pop(k) for k in list(values) if k in cls.model_fields}
        delta = own.get("delta", "lora")
        tag = (
            delta.key if isinstance(delta, MethodSpec) else delta.get("delta") if isinstance(delta, Mapping) else delta
        )
        method = get("delta", str(tag))
        inner = (
            {**delta.model_dump(), **values}
            if isinstance(delta, MethodSpec)
            else {**dict(delta), **values}
            if isinstance(delta, Mapping)
            else values
        )
        known = [*cls.model_fields, *method.cls.accepted(inner)]
        unknown = [k for k in values if k not in known]
        if unknown:
            lines = [f"unknown key {k!r}.{did_you_mean(k, known)}" for k in unknown]
            raise ConfigError(f"{where} ({tag}): " + "\n  - ".join(["", *lines] if len(lines) > 1 else lines))
        own["delta"] = build("delta", delta, **values)
        return read(cls, own, where)

    def flat(self) -> dict[str, Any]:
        """Return the flat form, JSON-ready, without defaults of the adapter's own settings."""
        own = self.model_dump(mode="json", exclude={"delta", "init", "ranks", "select"}, exclude_defaults=True)
        others = {k: v.model_dump(mode="json") for k in ("ranks", "select") if (v := getattr(self, k)) is not None}
        return {**self.delta.model_dump(mode="json"), "init": self.init.model_dump(mode="json"), **others, **own}


def with_gates(delta: MethodSpec) -> MethodSpec:
    """Return the delta wrapped in `gated` (inside DoRA, which is not additive), or as it is where it has gates."""
    if delta.key == "gated":
        return delta
    inner = getattr(delta, "inner", None)
    if isinstance(inner, MethodSpec) and not delta.method.cls.additive:  # type: ignore[attr-defined]
        inside = with_gates(inner)
        return delta if inside is inner else delta.replace(inner=inside)
    return build("delta", {"delta": "gated", "inner": delta})
