"""RankSchedule: how rank is spread over the sites before training, and changed during it.

A subclass is registered with `@rank` and writes what it needs of

    check       why the sites' ranks together are not what it can begin with
    allocate    other ranks for some sites, before anything is made (from the weights, or from evidence)
    largest     the ranks at its largest, where it grows: what a run of it takes
    prepare     what a delta needs besides, right after its start
    hook        what happens during training (core/hooks.py); its state must make a resumed run go on bit for bit

With `gates = True` every change gets a trained gate per rank, B diag(g) A, before it is prepared: the delta is wrapped
in `gated` (inside DoRA, where there is one). `core/ranks/surgery.py` removes, adds and replaces ranks, the optimizer's
moments with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rankworks.core.delta import Delta
from rankworks.core.evidence import Evidence, Need
from rankworks.core.fields import HasSettings
from rankworks.core.hooks import Hook
from rankworks.core.registry import MethodSpec
from rankworks.core.site import Shape, Site


class RankSchedule(HasSettings):
    """How rank is spread and changed."""

    Spec: ClassVar[Any]
    spec: Any
    gates: ClassVar[bool] = False  # acts through a gate per rank
    pairs: ClassVar[bool] = False  # needs a trained pair of factors B A (core/forms/lowrank.py), to cut or to grow
    inits: ClassVar[tuple[str, ...] | None] = None  # the initialisers it goes with; None: any
    ordered: ClassVar[bool] = False  # the first b ranks are a change by themselves, for every b (`rankworks.set_rank`)
    rescaled: ClassVar[bool] = True  # and it has the scale of a change of rank b, rather than that of the whole
    init: str = "default"  # the key of the initialiser that went before `prepare`
    exact_gradient: ClassVar[bool] = True  # backward is the derivative of forward while it prepares nothing else

    def __init__(self, spec: Any):
        self.spec, self.key = spec, spec.key
        for name in type(spec).model_fields:
            if name != "ranks":
                setattr(self, name, getattr(spec, name))

    def problems(self, settings: MethodSpec, shape: Shape) -> list[str]:
        """Return why it cannot act on a change of these settings at a weight of this shape."""
        return []

    def check(self, resolved: Sequence[tuple[Site, MethodSpec]]) -> None:
        """Raise `ConfigError` where the ranks of all sites together are not what it can begin with."""

    def allocate(
        self, resolved: Sequence[tuple[Site, MethodSpec]], evidence: Evidence
    ) -> Mapping[str, Mapping[str, Any]]:
        """Return settings to change before the start, {site name: {"rank": 5, "alpha": 2.5}}; often none."""
        return {}

    def largest(self, resolved: Sequence[tuple[Site, MethodSpec]]) -> Mapping[str, Mapping[str, Any]]:
        """Return settings with which the changes are as large as a run makes them, {site name: {"rank": 9}}.

        Often none: most start at their largest. Asked for where there are only shapes, to tell what a run takes. Where
        it is not known which sites grow, an even spread.
        """
        return {}

    def prepare(self, delta: Delta) -> None:
        """Set what the delta starts with besides its initialiser's factors; not called when an adapter is loaded."""

    def hook(self, deltas: Mapping[str, Delta]) -> Hook | None:
        """Return what it does during training, on all of an adapter's deltas by site name, or None."""
        return None

    @classmethod
    def needs(cls, spec: Any) -> tuple[str | Need, ...]:
        """Return what must be measured on data before the start."""
        return ()
