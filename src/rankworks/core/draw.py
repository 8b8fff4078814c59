"""Random numbers that depend on a seed and a name, and on nothing else.

Every site draws from its own generator, seeded by (seed, site name): the order in which sites are built, the other
adapters on the model and the global random state do not matter, and a CPU generator gives every device the same
numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """Return the seed of a generator, below 2^63, that stands for these parts: a seed, a name, the number of a step."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Draw:
    """A private source of random tensors. Numbers are drawn in float32 on the CPU, then moved.

    On the meta device, which holds shapes and no numbers, nothing is drawn.
    """

    def __init__(
        self, seed: int, name: str = "", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.generator = torch.Generator().manual_seed(seed_of(seed, name))
        self.device, self.dtype = torch.device(device), dtype

    def seeded(self, seed: int) -> Draw:
        """Return a source whose generator starts at exactly `seed`, for streams another library must repeat."""
        other = Draw(0, "", self.device, self.dtype)
        other.generator.manual_seed(seed)
        return other

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Independent N(0, std^2)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._move(torch.randn(shape, generator=self.generator, dtype=torch.float32) * std)

    def uniform(self, *shape: int, bound: float = 1.0) -> Tensor:
        """Independent U(-bound, bound)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._move(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=self.generator))

    def choice(self, population: int, k: int) -> Tensor:
        """`k` distinct integers below `population`, sorted, int64."""
        if k > population:
            raise ValueError(f"cannot choose {k} distinct of {population}")
        if self.device.type == "meta":
            return torch.empty(k, dtype=torch.int64, device=self.device)
        if population < 4 * k or population < 1 << 16:
            picked = torch.randperm(population, generator=self.generator)[:k]
        else:  # rejection: a permutation of a large matrix's entries would cost far more than the few we keep
            picked = torch.empty(0, dtype=torch.int64)
            while len(picked) < k:
                more = torch.randint(population, (k - len(picked) + 16,), generator=self.generator)
                merged = torch.cat([picked, more])
                unique, first = _first_occurrences(merged)
                picked = unique[first.argsort()][:k]
        return picked.sort().values.to(self.device)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)


def _first_occurrences(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values and the position at which each first stands."""
    unique, inverse = values.unique(return_inverse=True)
    first = torch.full_like(unique, len(values)).scatter_reduce_(0, inverse, torch.arange(len(values)), "amin")
    return unique, first
