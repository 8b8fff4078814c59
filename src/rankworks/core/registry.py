"""The registry: every method by axis and key, with the Spec made from its own annotations.

    @delta("lora-xs", title="LoRA-XS", year=2024, paper="arXiv:2405.17604")
    class LoRAXS(LowRank):
        rank: int = Rank(16)

gives a pydantic model `LoRAXS.Spec` (fields of the class and its bases, plus `delta: "lora-xs"`), an entry in
`methods()`, a command-line option, a documentation page and the conformance checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, SerializeAsAny, create_model, model_validator

from rankworks.core.config import Config, read
from rankworks.core.errors import ConfigError, UnknownNameError, did_you_mean
from rankworks.core.fields import HasSettings

T = TypeVar("T", bound=type[HasSettings])


@dataclass(frozen=True)
class Method:
    """One registered method: what it is, where it comes from, and the class that does it."""

    key: str
    axis: str
    title: str
    year: int
    paper: str
    cls: type
    Spec: type[MethodSpec]

    @property
    def summary(self) -> str:
        """The first line of the method's module docstring, without its title."""
        doc = inspect.getdoc(inspect.getmodule(self.cls)) or inspect.getdoc(self.cls) or self.title
        return doc.splitlines()[0].split(": ", 1)[-1].rstrip(".")

    @property
    def origin(self) -> str:
        """Where the class is defined: `package.module.Class`."""
        return f"{self.cls.__module__}.{self.cls.__qualname__}"

    @property
    def tag(self) -> str:
        """The name of the axis in configurations: `delta`, `init`, `ranks`, `select`."""
        return TAGS.get(self.axis, self.axis)


class MethodSpec(Config):
    """The settings of one method. `Spec.method` is its registry entry."""

    method: ClassVar[Method]

    @model_validator(mode="after")
    def _agrees(self) -> MethodSpec:
        type(self).method.cls.agree(self)  # type: ignore[attr-defined]
        return self

    @property
    def key(self) -> str:
        """The key under which the method is registered."""
        return self.method.key

    def replace(self, **changes: Any) -> MethodSpec:
        """Return a validated copy with some settings changed; an unknown setting raises with the nearest name."""
        current = {k: getattr(self, k) for k in type(self).model_fields}
        return build(self.method.axis, {**current, **changes})


TAGS = {"rank": "ranks", "selection": "select"}
"""What an axis is called in configurations where that is not its own name: `rank` there is the rank of a change."""

_METHODS: dict[tuple[str, str], Method] = {}


def register(axis: str, key: str, *, title: str, year: int, paper: str) -> Callable[[T], T]:
    """Register a class under (axis, key) and give it a `Spec` made from its annotated settings.

    Raises `ConfigError` when the key is taken by another class, a setting has no default, or its name is one that a
    spec has a meaning of its own for (`method`, `key`, `replace`, the axis' tag).
    """

    def decorate(cls: T) -> T:
        origin = f"{cls.__module__}.{cls.__qualname__}"
        taken = _METHODS.get((axis, key))
        if taken is not None and taken.origin != origin:
            raise ConfigError(f"the {axis} key {key!r} is already taken by {taken.origin}; choose another key.")
        reserved = {name for name in dir(MethodSpec) if not name.startswith("_")} | {"method", TAGS.get(axis, axis)}
        if clash := sorted(reserved & set(cls.settings)):
            raise ConfigError(f"{origin} has a setting called {clash[0]!r}, which every spec has: choose another name.")
        tag: Any = (Literal[key], key)  # type: ignore[valid-type]
        make: Any = create_model
        parts = {TAGS.get(axis, axis): tag, **cls.settings}
        spec = make(cls.__name__, __base__=MethodSpec, __module__=cls.__module__, __doc__=cls.__doc__, **parts)
        method = Method(key, axis, title, year, paper, cls, spec)
        spec.method = method
        setattr(cls, "Spec", spec)  # noqa: B010 - the class gains it here, not in its body
        _METHODS[(axis, key)] = method
        return cls

    return decorate


def unregister(axis: str, key: str) -> None:
    """Forget a method: for tests and notebooks that define one twice."""
    _METHODS.pop((axis, key), None)


def delta(key: str, *, title: str, year: int, paper: str) -> Callable[[T], T]:
    """Register a `Delta` class: how the change of a weight is formed."""
    return register("delta", key, title=title, year=year, paper=paper)


def init(key: str, *, title: str, year: int, paper: str) -> Callable[[T], T]:
    """Register an `Init` class: where a delta starts."""
    return register("init", key, title=title, year=year, paper=paper)


def rank(key: str, *, title: str, year: int, paper: str) -> Callable[[T], T]:
    """Register a `RankSchedule` class: how rank is spread over the sites and changed during training."""
    return register("rank", key, title=title, year=year, paper=paper)


def selection(key: str, *, title: str, year: int, paper: str) -> Callable[[T], T]:
    """Register a `Selection` class: which sites get a change at all."""
    return register("selection", key, title=title, year=year, paper=paper)


def optimizer(key: str, *, title: str, year: int, paper: str) -> Callable[[T], T]:
    """Register an `OptimizerMethod` class: how gradients become steps."""
    return register("optimizer", key, title=title, year=year, paper=paper)


def methods(axis: str | None = None) -> list[Method]:
    """Return all registered methods (of one axis), ordered by axis and key."""
    return sorted((m for m in _METHODS.values() if axis in (None, m.axis)), key=lambda m: (m.axis, m.key))


def get(axis: str, key: str) -> Method:
    """Return one method; raises `UnknownNameError` with near names, also of other axes."""
    if (axis, key) in _METHODS:
        return _METHODS[axis, key]
    elsewhere = [m.axis for m in methods() if m.key == key]
    if elsewhere:
        raise UnknownNameError(
            f"{key!r} is a method of the axis {elsewhere[0]!r}, not {axis!r}: give it as "
            f"{TAGS.get(elsewhere[0], elsewhere[0])}={key}."
        )
    raise UnknownNameError(f"no {axis} is called {key!r}.{did_you_mean(key, [m.key for m in methods(axis)])}")


def build(axis: str, value: Any, **settings: Any) -> MethodSpec:
    """Return a spec from a key, a spec, a mapping with the axis as its tag (`{"delta": "lora", ...}`), or a class."""
    if isinstance(value, MethodSpec):
        if value.method.axis != axis:
            raise ConfigError(f"a {value.method.axis} ({value.key}) was given where a {axis} belongs.")
        return value.replace(**settings) if settings else value
    if isinstance(value, Mapping):
        values, tag = {**value, **settings}, TAGS.get(axis, axis)
        if tag not in values:
            example = methods(axis)[0].key
            raise ConfigError(f"a {axis} is given as a mapping with the key {tag!r}, e.g. {{{tag}: {example}, ...}}.")
        return _read(get(axis, str(values[tag])), values)
    if not isinstance(value, str):
        raise ConfigError(f"a {axis} is a key, a spec or a mapping, not {type(value).__name__}.")
    return _read(get(axis, value), settings)


def _read(method: Method, values: dict[str, Any]) -> MethodSpec:
    route = getattr(method.cls, "route", None)
    return read(method.Spec, route(values) if route else values, f"{method.axis} {method.key}")


if TYPE_CHECKING:  # a field of this type holds a spec; on a delta the same name may then hold the delta made from it
    DeltaSpec = Any
    InitSpec = Any
    RanksSpec = Any
    SelectSpec = Any
    OptimizerSpec = Any
else:
    DeltaSpec = Annotated[SerializeAsAny[MethodSpec], BeforeValidator(lambda value: build("delta", value))]
    OptimizerSpec = Annotated[SerializeAsAny[MethodSpec], BeforeValidator(lambda value: build("optimizer", value))]
    InitSpec = Annotated[SerializeAsAny[MethodSpec], BeforeValidator(lambda value: build("init", value))]
    RanksSpec = Annotated[
        SerializeAsAny[MethodSpec] | None, BeforeValidator(lambda value: value and build("rank", value))
    ]
    SelectSpec = Annotated[
        SerializeAsAny[MethodSpec] | None, BeforeValidator(lambda value: value and build("selection", value))
    ]
