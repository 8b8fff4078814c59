"""One base in memory, quantised anew for every arm that needs another one, and given back in between.

Most adapters stand on the plainly quantised base. A start that makes good what was lost has one of its own: PiSSA's
order quantises what its product leaves, so the base depends on its rank. The exact weights are kept, on the CPU.
"""

from __future__ import annotations

import torch
from torch import nn

from rankworks.core.errors import ConfigError
from rankworks.core.evidence import Evidence
from rankworks.core.site import Site
from rankworks.core.targets import find_sites
from rankworks.train.quantising import Products, QuantiseConfig, quantise_base

PLAIN: Products = {}


class QuantisedBase:
    """The quantised weights of a bare model."""

    def __init__(self, model: nn.Module, config: QuantiseConfig):
        if config.holder != "dense":
            raise ConfigError(
                "model.quantise.holder: the methods of a comparison share one base, whose weights may differ from one "
                "to the next: use holder: dense, which has the same numbers."
            )
        self.model, self.config = model, config
        self.take(PLAIN)

    def take(self, wanted: Products) -> None:
        """Keep the exact weights, which stand in the model now, and quantise."""
        self._exact = {site.name: site.weight.detach().to("cpu", copy=True) for site in self._sites()}
        self._quantise(wanted)

    def switch(self, wanted: Products) -> None:
        """Quantise as these products ask; at no cost where that is how the base stands."""
        if wanted != self.wanted:
            self.give_back()
            self._quantise(wanted)

    @torch.no_grad()
    def give_back(self) -> None:
        """Put the exact weights into the model."""
        for site in self._sites():
            site.write(self._exact[site.name].to(site.tensor.device))

    def _quantise(self, wanted: Products) -> None:
        self.wanted = dict(wanted)
        self.evidence: Evidence = quantise_base(self.model, self.config, wanted, progress=False)

    def _sites(self) -> list[Site]:
        return find_sites(self.model, self.config.targets, self.config.exclude)

    @property
    def state(self) -> tuple[tuple[str, str, int], ...]:
        """How the base stands, to remember its checksum by."""
        return tuple((name, order, rank) for name, (order, rank) in sorted(self.wanted.items()))
