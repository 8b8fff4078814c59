"""Selection: which of the targeted sites get a change at all.

A subclass is registered with `@selection`. One that knows from the model alone writes `choose`. One that must search
derives from `Searching`: a run on data (train/searching/search.py) learns a score for every unit (a layer, a module),
lets each change act times the weight that `weights` makes of the scores (core/scaled.py), asks `decide` and fills
`chosen`, so that an adapter file says what was chosen; then the adapter is made and trained afresh.

A layer is the first whole number in a site's name; the layers that are counted together, such as `model.layers` or the
two of an encoder-decoder, are a stack. A selection of layers leaves out what lies in none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from rankworks.core.errors import ConfigError, did_you_mean
from rankworks.core.fields import HasSettings, Setting
from rankworks.core.site import Site


class Layer(NamedTuple):
    """Where in a stack a site stands: `model.layers.3.mlp.up_proj` is ("model.layers", 3, "mlp.up_proj")."""

    stack: str
    number: int
    part: str

    @property
    def name(self) -> str:
        """The layer's own name: `model.layers.3`."""
        return f"{self.stack}.{self.number}".removeprefix(".")


def layer_of(name: str) -> Layer | None:
    """Return the layer of a site or module by its name, or None where it lies in none."""
    words = name.split(".")
    at = next((i for i, word in enumerate(words) if word.isdigit()), None)
    return None if at is None else Layer(".".join(words[:at]), int(words[at]), ".".join(words[at + 1 :]))


def in_words(names: Iterable[str]) -> str:
    """Return names of layers and sites in few words: `model.layers 0-3, 28; q_proj of model.layers 1`."""
    groups: dict[tuple[str, str], list[int]] = {}
    alone: list[str] = []
    for name in names:
        layer = layer_of(name)
        if layer is None:
            alone.append(name)
        else:
            groups.setdefault((layer.part, layer.stack), []).append(layer.number)
    shown = [
        f"{part} of {stack} {_ranges(numbers)}" if part else f"{stack} {_ranges(numbers)}"
        for (part, stack), numbers in groups.items()
    ]
    return "; ".join([*shown, *alone]) or "none"


def _ranges(numbers: Iterable[int]) -> str:
    """Return `0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


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

    def choose(self, sites: Sequence[Site], stacks: Mapping[str, int]) -> list[str]:
        """Return the names of the sites to adapt; `stacks` tells how many layers each stack of the model has.

        Raises `ConfigError`.
        """
        raise TypeError(f"{type(self).__name__} must define choose(sites, stacks)")

    def told(self, sites: Sequence[Site]) -> list[str]:
        """Return what was chosen, given the adapted sites: their layers, unless a search kept something else."""
        layers = (layer_of(site.name) for site in sites)
        return list(dict.fromkeys(layer.name for layer in layers if layer is not None))

    def owners(self, sites: Sequence[Site]) -> Mapping[str, str]:
        """Return {site: the site whose change it shares}, of these adapted sites, for sites of one shape; often {}."""
        return {}


class Searching(Selection):
    """A selection that learns one score per unit on held-out data, while the changes learn on the rest."""

    searches: ClassVar[bool] = True

    chosen: list[str] | None = Setting(None, "what a search found; a run on data fills it in")
    every: int = Setting(1, "steps of the adapter between two steps of the scores", ge=1)
    order: Literal["first", "unrolled"] = Setting(
        "first", "gradient of the scores: at the adapter as it is, or through `unroll` steps of it"
    )
    unroll: int = Setting(1, "steps of gradient descent, at the adapter's rate, that `unrolled` looks through", ge=0)

    def unit(self, site: Site) -> str | None:
        """Return the unit that a site belongs to, or None where it is not to be adapted."""
        raise TypeError(f"{type(self).__name__} must define unit(site)")

    def weights(self, scores: Tensor) -> Tensor:
        """Return the factor on the change of every unit (n,) as a differentiable function of the scores (n,)."""
        raise TypeError(f"{type(self).__name__} must define weights(scores)")

    def decide(self, scores: Mapping[str, float]) -> list[str]:
        """Return the units to keep, given every unit's score in the model's order. Raises `ConfigError`."""
        raise TypeError(f"{type(self).__name__} must define decide(scores)")

    @property
    def depth(self) -> int:
        """How many steps of the adapter the gradient of the scores looks through."""
        return self.unroll if self.order == "unrolled" else 0

    def units(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Return {unit: names of its sites}, in the model's order."""
        found: dict[str, list[str]] = {}
        for site in sites:
            unit = self.unit(site)
            if unit is not None:
                found.setdefault(unit, []).append(site.name)
        return found

    def kept(self, sites: Sequence[Site]) -> list[str]:
        """Return the names of the sites of the chosen units. Raises `ConfigError` where no search was done."""
        units = self.units(sites)
        if self.chosen is None:
            raise ConfigError(
                f"{self.key} chooses by a search on data: train from a configuration (rankworks train, "
                "rankworks.train.run), which searches first, or give select={'select': "
                f"{self.key!r}, 'chosen': [...]}}, as an earlier run's search.json lists it."
            )
        unknown = [name for name in self.chosen if name not in units]
        if unknown:
            raise ConfigError(
                f"{self.key}: chosen names {unknown[0]!r}, which no targeted site belongs to."
                f"{did_you_mean(unknown[0], units)}"
            )
        return [name for unit, names in units.items() if unit in self.chosen for name in names]

    def choose(self, sites: Sequence[Site], stacks: Mapping[str, int]) -> list[str]:
        """Return the sites of the chosen units."""
        return self.kept(sites)

    def told(self, sites: Sequence[Site]) -> list[str]:
        """Return the chosen units."""
        return list(self.chosen or ())
