"""Weights that several modules share (a language model's head is often its embedding table), told by storage.

An adapter on one of the twins changes that twin alone; merging then gives it a weight of its own first. With
`tied="shared"` one delta serves both: the embedding sees the weight as (dimension, vocabulary), the head as
(vocabulary, dimension), so the head applies the transposed change: with change B A of the table's matrix, the head
adds A^T B^T x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta, Factors
from rankworks.core.errors import TargetError
from rankworks.core.inputs import Input, linear
from rankworks.core.site import Site


def holders(model: nn.Module, site: Site) -> list[tuple[str, str]]:
    """Return (module path, parameter name) of every other place in the model that holds this site's storage."""
    pointer = site.tensor.data_ptr()
    found = []
    for path, module in model.named_modules():
        if module is site.module or ".adapters" in path or ".copies" in path:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and (parameter is site.tensor or (pointer and parameter.data_ptr() == pointer)):
                found.append((path, name))
    return found


def twins(model: nn.Module, sites: Sequence[Site]) -> dict[str, str]:
    """Return {site name: owner's name} for targeted sites that share a weight with an earlier targeted site."""
    owners: dict[int, Site] = {}
    shared: dict[str, str] = {}
    for site in sorted(sites, key=lambda s: s.kind != "embedding"):  # the embedding owns the pair
        if site.rows is None and site.expert is None:
            owner = owners.setdefault(id(site.tensor), site)
            if owner is not site:
                shared[site.name] = owner.name
    return shared


def share(owner: Delta, site: Site) -> Delta:
    """Return the delta by which `site` uses its twin's: the same delta, or its transpose where the shape is turned."""
    if site.shape == owner.shape and site.kind == owner.kind:
        return owner
    if not owner.additive:
        raise TargetError(
            f"{site.name} shares its weight with an embedding, and {owner.spec.key}, being multiplicative, has no "
            "transpose: use tied='separate' or an additive delta."
        )
    return Transposed(owner)


class Transposed(Delta):
    """The transposed change of another delta, sharing its tensors."""

    owner: Delta

    def __init__(self, owner: Delta):
        super().__init__(owner.spec, type(owner.shape)(owner.shape.in_, owner.shape.out), owner.draw, owner.shared)
        object.__setattr__(self, "owner", owner)  # its tensors are stored and moved once, with the owner

    def branch(self, x: Input) -> Tensor:
        """The transposed change applied to x."""
        factors = self.owner.acting_factors()
        if factors is None:
            return linear(x, self.owner.dense(torch.empty(self.owner.shape, device="meta")).t())
        return linear(linear(x, factors.B.t()), factors.A.t())

    def dense(self, weight: Tensor) -> Tensor:
        """The transposed change."""
        return self.owner.dense(weight.t()).t()

    def factors(self) -> Factors | None:
        """The owner's factors, turned."""
        factors = self.owner.factors()
        return None if factors is None else Factors(factors.A.t(), factors.B.t())

    def extra_repr(self) -> str:
        """Say whose transpose it is."""
        return f"transpose of {self.owner.spec.key}"
