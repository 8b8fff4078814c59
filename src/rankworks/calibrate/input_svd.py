"""The principal directions of a layer's inputs, tracked until they stand still, with ranks shared out meanwhile.

Every site asks for `rank` directions and `limit` >= rank of them are tracked (linalg/incremental.py). After a batch the
pooled worths of all sites' directions are compared, and a site wants as many as it holds of the `sum of rank` largest.
A direction stands still when |cos| between it and itself before the last batch is at least `tau`; a statistic whose
wanted directions all do is done and takes no more data, until it wants more. (|cos|, not cos: the sign is a
convention, and near a tie of the two largest entries it may turn while the direction stays. The released code takes
such a turn for a movement.)
A batch with fewer tokens than directions (a layer behind an encoder's pooling reads one per row) waits for the next.
Source: arXiv:2410.07170 and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rankworks.calibrate.statistic import UNUSED, Statistic, Tokens
from rankworks.core.site import Shape
from rankworks.linalg.incremental import IncrementalSVD, share_out, worth


class InputSVD(Statistic):
    """components (k, in), values (k,), mean (in,), spread () and count () of the inputs; k = min(limit, in)."""

    def __init__(
        self,
        rank: int = 8,
        limit: int = 8,
        tau: float = 0.99,
        metric: Literal["ratio", "variance", "sum", "max"] = "ratio",
        iterations: int = 0,
        tokens: Tokens = "attended",
        passes: int = 1,
    ):
        self.rank, self.limit, self.tau, self.metric = rank, limit, tau, metric
        self.iterations, self.tokens, self.passes = iterations, tokens, passes
        self.svd: IncrementalSVD | None = None
        self.still: Tensor | None = None  # (k,) whether a direction stood still over the last batch
        self.waiting: Tensor | None = None  # (m, in), m < k: tokens that wait for more

    def read(self, x: Tensor, samples: Tensor) -> None:
        """Take one use's inputs."""
        k = min(self.limit, x.shape[1])
        if self.waiting is not None:
            x = torch.cat([self.waiting, x])
        self.waiting = x.clone() if len(x) < k else None
        if self.waiting is not None:
            return
        if self.svd is None:
            self.svd = IncrementalSVD(k, self.iterations)
        cosines = self.svd.update(x)
        self.still = torch.zeros(k, dtype=torch.bool) if cosines is None else (cosines >= self.tau).cpu()

    @classmethod
    def settle(cls, statistics: Mapping[str, InputSVD]) -> None:
        """Share the ranks out over all sites; those whose share stands still are done."""
        worths = {name: w for name, s in statistics.items() if (w := s.worth()) is not None}
        if len(worths) < len(statistics):
            return  # some site has seen nothing yet
        ranks = share_out(worths, sum(s.rank for s in statistics.values()))
        wanted: dict[int, int] = {}
        for name, statistic in statistics.items():  # sites that share one ask for the largest of their shares
            wanted[id(statistic)] = max(ranks[name], wanted.get(id(statistic), 0))
        for statistic in statistics.values():
            assert statistic.still is not None
            statistic.done = bool(statistic.still[: wanted[id(statistic)]].all())

    def worth(self) -> Tensor | None:
        """What each direction explains, by the metric, (k,)."""
        if self.svd is None:
            return None
        return worth(self.metric, self.svd.values, self.svd.spread, self.svd.count)

    def lacks(self) -> str | None:
        """No input came, or too little at once."""
        if self.svd is not None:
            return None
        if self.waiting is None:
            return UNUSED
        return (
            f"reads {len(self.waiting)} tokens of these data that count, and {self.limit} directions of its inputs are "
            "sought: give more data (calibrate.batches), a smaller rank (or rho), or let all tokens count that are no "
            "padding (eva's label_mask: false)"
        )

    def result(self) -> dict[str, Tensor]:
        """On the CPU."""
        svd = self.svd
        assert svd is not None
        if self.waiting is not None:  # the last of the data
            svd.update(self.waiting)
            self.waiting = None
        assert svd.components is not None
        parts = {"components": svd.components, "values": svd.values, "mean": svd.mean, "spread": svd.spread}
        return {name: t.cpu() for name, t in parts.items()} | {"count": torch.tensor(svd.count)}

    def example(self, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        """Of a few random inputs."""
        made = InputSVD(self.rank, self.limit)
        scale = torch.rand((), generator=generator) + 0.5
        x = scale * torch.randn(shape.in_ + self.limit, shape.in_, generator=generator)
        made.read(x, torch.zeros(len(x), dtype=torch.long))
        return made.result()
