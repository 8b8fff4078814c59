"""Blocks: which of several weight tensors are in turn, in every period, as a function of seed, period and names alone.

    random       `count` of them, drawn anew in every period
    ascending    `count` after the last ones, in order and round again; descending: from the end
    mirror       as many from the front as from the end: pairs (i, N - 1 - i), ascending in i

No gradient is looked at and nothing is remembered, so processes and resumed runs agree, and a parameter can take its
step before the gradients of the others are there. With an odd number of tensors `mirror` never comes to the middle one.
Source: arXiv:2404.02827 (BAdam) and the released code of arXiv:2411.07837.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rankworks.core.draw import Draw
from rankworks.core.errors import ConfigError

Order = Literal["random", "ascending", "descending", "mirror"]


class Blocks:
    """The turns of tensors with these names, of which `count` are active in each period.

    Raises `ConfigError` where `mirror` is to pair an odd number of them.
    """

    def __init__(self, names: Sequence[str], count: int, order: Order = "random", seed: int = 0):
        if order == "mirror" and count % 2:
            raise ConfigError(
                f"order='mirror' activates pairs, and {count} of {len(names)} tensors were asked for: choose a density "
                f"that makes it an even number, for example {(count + 1) / len(names):.4g}, or another order."
            )
        self.names, self.count, self.order, self.seed = tuple(names), count, order, seed
        self._active: dict[int, frozenset[str]] = {}
        self._since: dict[str, tuple[int, int]] = {}

    def active(self, period: int) -> frozenset[str]:
        """Return the names of those whose turn it is, in periods from 0."""
        if period not in self._active:
            if len(self._active) > 8:  # neighbouring periods are asked for again and again, distant ones hardly
                self._active.clear()
            self._active[period] = frozenset(self.names[i] for i in self._places(period))
        return self._active[period]

    def since(self, name: str, period: int) -> int:
        """Return the period since which an active tensor has been so without a break."""
        seen, first = self._since.get(name, (-1, -1))
        if seen != period:
            start = period
            while start > 0 and name in self.active(start - 1):
                start -= 1
                if start == seen:  # known from there on
                    start = first
                    break
            self._since[name] = (period, start)
        return self._since[name][1]

    def _places(self, period: int) -> list[int]:
        total, count = len(self.names), self.count
        if not total or not count:
            return []
        if self.order == "random":
            return Draw(self.seed, f"blocks of period {period}").choice(total, count).tolist()
        if self.order == "mirror":
            half = max(total // 2, 1)
            fronts = [(period * (count // 2) + i) % half for i in range(count // 2)]
            return [*fronts, *(total - 1 - i for i in fronts)]
        places = [(period * count + i) % total for i in range(count)]
        return places if self.order == "ascending" else [total - 1 - i for i in places]
