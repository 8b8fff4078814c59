"""Wrapper: a delta around another one, `inner`, to which it hands on whatever is not its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rankworks.core.delta import Delta
from rankworks.core.draw import Draw
from rankworks.core.evidence import Need
from rankworks.core.hooks import Hook
from rankworks.core.registry import MethodSpec, build, get
from rankworks.core.site import Shape


class Wrapper(Delta):
    """A delta with a setting `inner: DeltaSpec`, and a submodule of that name once it is set up."""

    inner: Any

    @classmethod
    def wrapped(cls, spec: Any) -> MethodSpec | None:
        """Return the inner delta's settings, or None where there is no inner delta."""
        return spec.inner

    @property
    def within(self) -> Delta | None:
        """The inner delta."""
        return self.inner if self.wrapped(self.spec) is not None else None

    @property
    def pair(self) -> Delta | None:
        """The inner delta's."""
        return self.within.pair if self.within is not None else None

    @property
    def empty(self) -> bool:
        """Not by the inner delta's rank: what is around it may change the weight too."""
        return False

    def current_spec(self) -> MethodSpec:
        """Its settings, with the inner delta's as they are now."""
        return self.spec if self.within is None else self.spec.replace(inner=self.within.current_spec())

    def adopt(self, spec: Any) -> None:
        """Take other settings, the inner delta too."""
        self.spec = spec
        if self.within is not None:
            self.within.adopt(spec.inner)

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Pass on what a file holds for the inner delta."""
        self.inner.make_room({n.removeprefix("inner."): s for n, s in shapes.items() if n.startswith("inner.")})

    @classmethod
    def common(cls, spec: Any) -> dict[str, Any]:
        """The inner delta's."""
        inner = cls.wrapped(spec)
        return {} if inner is None else inner.method.cls.common(inner)

    @classmethod
    def bank(cls, spec: Any, shapes: Sequence[Shape], draw: Draw) -> dict[str, Tensor]:
        """The inner delta's bank."""
        inner = cls.wrapped(spec)
        return {} if inner is None else inner.method.cls.bank(inner, shapes, draw)

    @classmethod
    def bank_size(cls, shapes: Sequence[Shape]) -> list[Any]:
        """Every shape there is: what the inner delta's bank depends on is not known here."""
        return sorted({(*s, s.kernel) for s in shapes})

    @classmethod
    def count_shared(cls, spec: Any, shapes: Sequence[Shape]) -> int:
        """The inner delta's."""
        inner = cls.wrapped(spec)
        return 0 if inner is None else inner.method.cls.count_shared(inner, shapes)

    @classmethod
    def needs(cls, spec: Any) -> tuple[str | Need, ...]:
        """The inner delta's."""
        inner = cls.wrapped(spec)
        return () if inner is None else inner.method.cls.needs(inner)

    @classmethod
    def training_hook(cls, spec: Any, deltas: Mapping[str, Delta]) -> Hook | None:
        """The inner delta's, on the inner deltas."""
        inner = cls.wrapped(spec)
        if inner is None:
            return None
        within = {name: d.within for name, d in deltas.items() if isinstance(d, Wrapper) and d.within is not None}
        return inner.method.cls.training_hook(inner, within)

    @classmethod
    def pair_rank(cls, spec: Any, shape: Shape) -> int | None:
        """The inner delta's."""
        inner = cls.wrapped(spec)
        return None if inner is None else inner.method.cls.pair_rank(inner, shape)

    @classmethod
    def factored_rank(cls, spec: Any) -> int | None:
        """The inner delta's."""
        inner = cls.wrapped(spec)
        return None if inner is None else inner.method.cls.factored_rank(inner)

    @classmethod
    def factor_count(cls, spec: Any) -> int:
        """The inner delta's."""
        inner = cls.wrapped(spec)
        return 2 if inner is None else inner.method.cls.factor_count(inner)

    @classmethod
    def route(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Pass settings that are not its own on to the inner delta: `dora` with rank=8 is dora around a rank-8 lora."""
        own = {k: v for k, v in values.items() if k in cls.Spec.model_fields}
        passed = {k: v for k, v in values.items() if k not in own}
        inner = own.get("inner", cls.Spec.model_fields["inner"].default)
        return {**own, "inner": build("delta", inner, **passed)} if passed else own

    @classmethod
    def accepted(cls, values: Mapping[str, Any]) -> list[str]:
        """Its own settings and, in the flat form, the inner delta's."""
        inner: Any = values.get("inner", cls.Spec.model_fields["inner"].default)
        if isinstance(inner, MethodSpec):
            tag, settings = inner.key, inner.model_dump()
        else:
            tag, settings = (inner, {}) if isinstance(inner, str) else (inner.get("delta"), dict(inner))
        return [*cls.Spec.model_fields, *get("delta", str(tag)).cls.accepted(settings)]


def factored_settings(settings: MethodSpec) -> Any:
    """Return the settings of the delta whose factors an initialiser fills: the innermost, where deltas wrap others."""
    cls: Any = settings.method.cls
    inner = cls.wrapped(settings) if issubclass(cls, Wrapper) else None
    return settings if inner is None else factored_settings(inner)
