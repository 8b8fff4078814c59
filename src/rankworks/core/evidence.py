"""Evidence: what a method asks to know from data before it starts, and what was measured.

A method names what it needs; `rankworks.calibrate` measures it at every site; `adapt(..., evidence=...)` hands it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rankworks.core.errors import ConfigError

Evidence = Mapping[str, Mapping[str, Tensor]]
"""What was measured on data: {site name: {"gradient": (out, in), ...}}; parts of a statistic are "name.part"."""

MEASURED = (
    "measured on data: give evidence=rankworks.calibrate(model, data, spec), or train from a recipe, which measures it "
    "first"
)


@dataclass(frozen=True)
class Need:
    """A statistic by its name (`calibrate.STATISTICS`) and the settings it is measured with.

    What is not measured on data says in `source` where else it comes from, and makes up an `example` for tests.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = MEASURED
    example: Callable[..., Mapping[str, Tensor]] | None = None

    def met(self, known: Iterable[str]) -> bool:
        """Whether evidence of these names holds it."""
        return any(key == self.name or key.startswith(self.name + ".") for key in known)


def as_needs(wanted: Iterable[str | Need]) -> tuple[Need, ...]:
    """Return the needs, each once, by name. Raises `ConfigError` where one is wanted with two sets of options."""
    found: dict[str, Need] = {}
    for each in wanted:
        need = each if isinstance(each, Need) else Need(each)
        if dict(found.setdefault(need.name, need).options) != dict(need.options):
            raise ConfigError(
                f"the statistic {need.name!r} is asked for with {dict(found[need.name].options)} and with "
                f"{dict(need.options)}: give the delta and the initialiser the same settings."
            )
    return tuple(found[name] for name in sorted(found))
