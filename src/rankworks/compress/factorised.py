"""Which form of a changed layer is cheaper to run: two factors, or the one product.

    r (in + out)  against  out in        numbers, and products per token (per position for a convolution)

A layer whose weight was replaced by B A (maestro) may be run either way; one that has a low-rank change beside its
weight needs both, or is merged. `rw.export(model, path, kind="merged")` writes the product everywhere; it is the
smaller file where this count says so.
Source: the deployment rule of arXiv:2308.14929.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from rankworks.core.errors import ConfigError
from rankworks.core.forms.lowrank import Pair
from rankworks.core.state import state_of


@dataclass(frozen=True)
class Form:
    """One layer: the ranks it acts with, its numbers as two factors and as one matrix, and which are fewer."""

    site: str
    rank: int
    factored: int
    dense: int

    @property
    def cheaper(self) -> Literal["factored", "dense"]:
        """The form with fewer numbers; one matrix where they are equal."""
        return "factored" if self.factored < self.dense else "dense"


@dataclass(frozen=True)
class Factorised:
    """All layers; numbers as they were, as factors everywhere, and in the cheaper form of each; `str()` is a table."""

    layers: list[Form]

    @property
    def dense(self) -> int:
        """Numbers of the layers as matrices."""
        return sum(form.dense for form in self.layers)

    @property
    def factored(self) -> int:
        """Numbers of the layers as factors."""
        return sum(form.factored for form in self.layers)

    @property
    def best(self) -> int:
        """Numbers with every layer in its cheaper form."""
        return sum(min(form.factored, form.dense) for form in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        layers = [{**asdict(form), "cheaper": form.cheaper} for form in self.layers]
        return {"layers": layers, "dense": self.dense, "factored": self.factored, "best": self.best}

    def __str__(self) -> str:
        lines = [f"{f.site:<52} rank {f.rank:<5} {f.factored:>12,} of {f.dense:>12,}  {f.cheaper}" for f in self.layers]
        return "\n".join([*lines, f"{self.dense:,} numbers, {self.factored:,} as factors, {self.best:,} at best"])


def factorised(model: nn.Module, name: str | None = None) -> Factorised:
    """Return the count for an adapter whose layers stand as factors (maestro), with the ranks that act now.

    Raises `ConfigError` for an adapter that stands beside the weights, which are then needed too.
    """
    state = state_of(model)
    adapter = state.adapter(name or (state.active or tuple(state.adapters_by_name))[0])
    layers = []
    for key, delta in adapter.deltas.items():
        if not isinstance(delta, Pair) or delta.additive:
            raise ConfigError(
                f"{delta.spec.key} at {key} changes a weight that stays beside it, so there is no factored form to "
                "count: merge it, or train the factors themselves with delta='maestro'."
            )
        width = len(delta.acting()[1])
        layers.append(Form(key, width, width * (delta.shape.out + delta.shape.in_), delta.shape.out * delta.shape.in_))
    return Factorised(layers)
