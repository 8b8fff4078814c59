"""DiffoRA: learn on held-out data which modules of every layer deserve a change of their own.

    W'_lm = W_lm + Gamma_lm dW_lm        Gamma (L, M) of zeros and ones, in the search sigmoid(theta_lm), theta = 0

The search alternates `every` steps of the changes on training data with one step of theta on held-out data (the block
`search:` of a run); then the ceil(rho M) best modules of every layer (of the model, with scope="global") keep a change
of their own, and all is trained afresh. What was not chosen shares one change per (module type, shape), or with
`share=False` has none. dL/dtheta = sigmoid'(theta) <dL/dW', dW>.

The paper names three parts: continuous relaxation, discretisation, weight sharing to repair what that breaks. How each
is done is not told by what we could read of it, so this is the plainest search with all three: a sigmoid, first-order
alternating steps (`order="unrolled"` looks through steps of the changes, as in `flexora`), an exact budget of
ceil(rho M) per layer, and a shared change of the same rank for the rest: of a type, the part of a module's name behind
its layer's number. r (in + out) numbers per chosen module, and as many once per type and shape of the others. Only a
change no tensor of which depends on its weight can be shared (LoRA, VeRA, ...). What lies in no layer is left out.
Source: arXiv:2502.08905.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from rankworks.core.fields import Setting
from rankworks.core.registry import selection
from rankworks.core.select import Searching, layer_of
from rankworks.core.site import Site


@selection("diffora", title="DiffoRA", year=2025, paper="arXiv:2502.08905")
class DiffoRA(Searching):
    """A sigmoid gate per module."""

    rho: float = Setting(0.5, "share of the modules that keep a change of their own", ge=0, le=1)
    scope: Literal["layer", "global"] = Setting("layer", "where the share is taken: of each layer, or of the model")
    share: bool = Setting(True, "let the other modules share one change per type and shape")
    every: int = Setting(10, "steps of the adapter between two steps of the gates", ge=1)

    def unit(self, site: Site) -> str | None:
        """The module itself."""
        return None if layer_of(site.name) is None else site.name

    def weights(self, scores: Tensor) -> Tensor:
        """sigmoid(theta), (n,)."""
        return scores.sigmoid()

    def decide(self, scores: Mapping[str, float]) -> list[str]:
        """The best ceil(rho M) of every layer, or of all."""
        groups: dict[Any, list[str]] = {}
        for name in scores:
            layer = layer_of(name)
            groups.setdefault(layer and layer[:2] if self.scope == "layer" else None, []).append(name)
        kept = {
            name
            for names in groups.values()
            for name in sorted(names, key=lambda n: -scores[n])[: math.ceil(self.rho * len(names) - 1e-9)]
        }
        return [name for name in scores if name in kept]

    def choose(self, sites: Sequence[Site], stacks: Mapping[str, int]) -> list[str]:
        """The chosen modules, and those that share a change."""
        kept = self.kept(sites)
        return [name for names in self.units(sites).values() for name in names] if self.share else kept

    def owners(self, sites: Sequence[Site]) -> dict[str, str]:
        """The first of every type and shape that was not chosen owns what the others use."""
        owners: dict[tuple[Any, ...], str] = {}
        shared: dict[str, str] = {}
        for site in sites if self.share else ():
            layer = layer_of(site.name)
            if layer is None or site.name in (self.chosen or ()):
                continue
            kind = (layer.stack, layer.part, site.kind, *site.shape, *site.shape.kernel)
            owner = owners.setdefault(kind, site.name)
            if owner != site.name:
                shared[site.name] = owner
        return shared
