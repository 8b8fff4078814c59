"""Selection: which of the targeted sites get a change at all.

A subclass is registered with `@selection`. One that knows from the model alone writes `choose`. One that must search
(`searches = True`) has a setting `chosen: list[str] | None`, which a run on data fills before the adapter is made
(train/search.py), so that an adapter file says what was chosen; `choose` then returns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rankworks.core.fields import HasSettings
from rankworks.core.site import Site


class Selection(HasSettings):
    """Which sites are adapted."""

    Spec: ClassVar[Any]
    spec: Any
    searches: ClassVar[bool] = False  # chooses by a run on data

    def __init__(self, spec: Any):
        self.spec, self.key = spec, spec.key
        for name in type(spec).model_fields:
            if name != "select":
                setattr(self, name, getattr(spec, name))

    def choose(self, sites: Sequence[Site], depth: int) -> list[str]:
        """Return the names of the sites to adapt, of a model with so many layers. Raises `ConfigError`."""
        raise TypeError(f"{type(self).__name__} must define choose(sites, depth)")

    def owners(self, sites: Sequence[Site]) -> Mapping[str, str]:
        """Return {site name: the site whose change it shares}, for sites of one shape; often empty."""
        return {}
