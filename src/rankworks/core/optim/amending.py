"""PerStep: a hook that amends the change of every trained pair (core/amend.py) for the length of a step.

The amendments are made before the first micro-batch and stay for the others, so that several micro-batches act as one
large batch; they go when the step is taken, so that nothing is left on a model between steps.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from rankworks.core.amend import Amendment
from rankworks.core.errors import TrainingError
from rankworks.core.forms.lowrank import Factored, Pair
from rankworks.core.hooks import Hook, Moment
from rankworks.core.optim.pairs import TrainedPair, checked_pairs
from rankworks.core.site import Site
from rankworks.core.state import state_of


class Place(NamedTuple):
    """A trained pair, what applies its factors (itself, or the gates around it), and the site it changes."""

    name: str
    pair: Pair
    factored: Factored
    gate: nn.Parameter | None
    site: Site

    @property
    def gated(self) -> Tensor:
        """diag(g) A (r, in), or A without gates; a constant."""
        A = self.pair.A.detach()
        return A if self.gate is None else self.gate.detach().unsqueeze(1) * A


def places(model: nn.Module, title: str) -> list[Place]:
    """Return the trained pairs with what amendments need. Raises `TrainingError` where the forward pass has no room."""
    pairs, found = checked_pairs(model, title, gates=True), []
    sites: dict[int, Site] = {}
    for adapter in state_of(model).adapters_by_name.values():
        for key, delta in adapter.deltas.items():
            sites.setdefault(id(delta), adapter.sites[key])
    for pair in pairs:
        host, site = _host(pair), sites[id(pair.delta)]
        whole = site.expert is not None or getattr(site.module, "groups", 1) != 1  # the change is applied as a matrix
        if host is None or (whole and host is not pair.delta):
            raise TrainingError(
                f"{title} acts on a low-rank change on its way through the forward pass, and {pair.delta.spec.key} at "
                f"{site.name} leaves no room for that: adapt with lora there, exclude it, or choose adamw."
            )
        found.append(Place(pair.name, pair.pair, host, pair.gate, site))
    return found


def _host(found: TrainedPair) -> Factored | None:
    return next((m for m in found.delta.modules() if isinstance(m, Factored) and m.pair is found.pair), None)


class PerStep(Hook):
    """A subclass writes `amendment`."""

    def __init__(self, model: nn.Module, title: str):
        self.places = places(model, title)
        self.acts = False

    def amendment(self, place: Place, moment: Moment) -> Amendment | None:
        """Return what acts on a place's change during the step that begins, or None."""
        raise TypeError(f"{type(self).__name__} must define amendment(place, moment)")

    def before_forward(self, moment: Moment) -> None:
        """Amend every change, before the first micro-batch of a step."""
        if not self.acts:
            self.acts = True
            for place in self.places:
                place.factored.amended = self.amendment(place, moment)

    def after_step(self, moment: Moment) -> None:
        """Leave the changes as they are."""
        self._let_go()

    def on_end(self, moment: Moment) -> None:
        """Leave the changes as they are."""
        self._let_go()

    def _let_go(self) -> None:
        self.acts = False
        for place in self.places:
            place.factored.amended = None
