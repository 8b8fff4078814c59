"""The words a method uses to declare its settings: `rank: int = Rank(16)`.

Each returns a pydantic field with a range and a description; `registry.register` gathers them from the class and its
bases into the method's Spec.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from pydantic import Field
from pydantic.fields import FieldInfo


def Setting(default: Any, help: str = "", **limits: Any) -> Any:
    """Any setting with a default, a sentence of help and pydantic limits (ge, gt, le, lt)."""
    return Field(default, description=help, **limits)


def Rank(default: int, help: str = "rank of the change") -> Any:
    """A rank. Zero is read here (rank schedules produce it); `adapt` refuses it from a user."""
    return Field(default, ge=0, le=65536, description=help)


def Positive(default: float, help: str = "") -> Any:
    """A number above zero."""
    return Field(default, gt=0, description=help)


def NonNegative(default: float, help: str = "") -> Any:
    """A number not below zero."""
    return Field(default, ge=0, description=help)


def Probability(default: float, help: str = "") -> Any:
    """A probability below one."""
    return Field(default, ge=0, lt=1, description=help)


class HasSettings:
    """A class whose annotated settings are gathered when it is defined, its bases' first.

    They leave the class's namespace, so that an instance's tensor or submodule of the same name is found.
    """

    settings: ClassVar[dict[str, tuple[Any, FieldInfo]]] = {}

    @classmethod
    def agree(cls, spec: Any) -> None:
        """Raise `ConfigError` where settings, each good by itself, do not go together; asked of every spec made."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        gathered: dict[str, tuple[Any, FieldInfo]] = {}
        for base in reversed(cls.__mro__[1:]):
            gathered |= vars(base).get("settings", {})
        space = vars(sys.modules[cls.__module__])
        for name, field in [(k, v) for k, v in vars(cls).items() if isinstance(v, FieldInfo)]:
            note = cls.__annotations__[name]
            gathered[name] = (
                eval(note, space) if isinstance(note, str) else note,
                field,
            )  # the module's own annotation
            delattr(cls, name)
        cls.settings = gathered
