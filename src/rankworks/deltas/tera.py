"""TeRA: the change as a random Tucker network of which only diagonal factors are trained.

    W' = W + s T        T = G x_1 (A_1 diag d_1) x_2 ... x_N (A_N diag d_N),  read as a matrix (out, in)

The rows of T are numbered by p modes, out = o_1 ... o_p, and its columns by p more, in = i_1 ... i_p. The core
G (R_1, ..., R_N) and the factors A_n (I_n, R_n) are random, frozen, and shared by all sites of one shape; d_n (R_n) are
trained: sum of R_n numbers per site, whatever out * in (96 for 4096 x 4096). With L_n = A_n diag d_n and G as a matrix,
T = (L_1 x ... x L_p) G (L_p+1 x ... x L_N)^T in Kronecker products, which are applied mode by mode and never formed.
The first d_n starts at zero, every other at one: T is linear in each, so one zero leaves the output unchanged, a second
would leave nothing a gradient, and smaller ones would shrink the first gradient N - 1 times over.

Only the paper's abstracts were at hand. They fix a Tucker-like network, random core and factors frozen and shared, and
trained diagonals per layer; what follows is our reading. The diagonal stands between core and factor
(`diag_side="rank"`; "mode" has diag(d_n) A_n, "both" the two). R_n = I_n, so that the rank of the change is not bound
to the count, as the abstract says, and the count is the same for both sides; `mode_rank` bounds R_n. Mode sizes are the
factors of out and in nearest to each other, the largest at most four times the smallest; a size without such factors is
padded to the next that has them. A_n ~ N(0, 1/R_n), G ~ N(0, 1/in): at d = 1 an entry of T has variance 1/in. s = 1.

Cost: a token costs the core's out * in and the modes; the whole change costs the modes on each of its rows and columns,
once. The cheaper of the two is taken.
Source: arXiv:2509.03234, abstract; the algebra, scale and start were checked numerically.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankworks.core.delta import Base, Factors
from rankworks.core.draw import Draw
from rankworks.core.fields import Positive, Probability, Setting
from rankworks.core.forms.whole import Whole
from rankworks.core.inputs import Input
from rankworks.core.kernels.mode import compute_dtype, no_autocast
from rankworks.core.registry import delta
from rankworks.core.site import Shape

UNEVEN = 4  # the largest mode is at most so many times the smallest


@delta("tera", title="TeRA", year=2025, paper="arXiv:2509.03234")
class TeRA(Whole):
    """Trained diagonals in a random tensor network."""

    modes: int = Setting(3, "modes p of either side", ge=1, le=8)
    mode_rank: int | None = Setting(None, "most that R_n may be; None: R_n = I_n, of full rank", ge=1)
    diag_side: Literal["rank", "mode", "both"] = Setting(
        "rank", "where the diagonals stand: at the core, outside, or both"
    )
    scale: float = Positive(1.0, "multiplier of the change")
    dropout: float = Probability(0.0, "probability of dropping an input in training")
    projection_seed: int = Setting(0, "seed of the shared core and factors, whatever the adapter's own seed", ge=0)

    @classmethod
    def bank(cls, spec: Any, shapes: Sequence[Shape], draw: Draw) -> dict[str, Tensor]:
        """A core (R_1 ... R_p, R_p+1 ... R_N) and N factors (I_n, R_n) for every shape, from a generator of its own."""
        tensors = {}
        for out, in_ in sorted(set(shapes)):
            own = Draw(spec.projection_seed, f"tera {out}x{in_}", draw.device, draw.dtype)
            sides = _sides(spec, out, in_)
            rows, columns = (math.prod(r for _, r in side) for side in sides)
            tensors[f"G_{out}x{in_}"] = own.normal(rows, columns, std=in_**-0.5)
            for n, (size, rank) in enumerate(sides[0] + sides[1]):
                tensors[f"A{n}_{out}x{in_}"] = own.normal(size, rank, std=rank**-0.5)
        return tensors

    @classmethod
    def bank_size(cls, shapes: Sequence[Shape]) -> list[Any]:
        """The distinct shapes."""
        return sorted([s.out, s.in_] for s in set(shapes))

    def setup(self, weight: Tensor) -> None:
        """All d_n in one vector: those at the core, then those outside, mode by mode; the first starts at zero."""
        sides = _sides(self, *self.shape)
        rows, columns = (math.prod(r for _, r in side) for side in sides)
        lengths = _lengths(self, *self.shape)
        self._split = tuple(lengths)
        self._padded = math.prod(size for size, _ in sides[1])  # inputs
        self._costs = _chain(sides[0]), _chain(sides[1]), rows, columns  # of the modes for one column; of the core
        d = self.trainable(sum(lengths), fill=1.0)
        with torch.no_grad():
            d[: lengths[0]] = 0
        self.d = d

    def _links(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """L_n (I_n, R_n) of the output modes, with the scale, and of the input modes; and the core as a matrix."""
        assert self.shared is not None
        out, in_ = self.shape
        count, parts = 2 * self.modes, self.d.split(self._split)
        links = []
        for n in range(count):
            A = self.shared[f"A{n}_{out}x{in_}"].to(self.d.dtype)
            at_core = parts[n] if self.diag_side != "mode" else 1.0
            if n == 0:
                at_core = at_core * self.scale
            link = A * at_core
            links.append(link if self.diag_side == "rank" else parts[n - count].unsqueeze(1) * link)
        return links[: self.modes], links[self.modes :], self.shared[f"G_{out}x{in_}"].to(self.d.dtype)

    def matrix(self) -> Tensor:
        """The change (out, in)."""
        rows, columns, core = self._links()
        half = _through(core, rows)[: self.shape.out]  # (out, R of the columns)
        return _through(half.t(), columns)[: self.shape.in_].t()

    def branch(self, x: Input) -> Tensor:
        """The change times x, mode by mode where that is cheaper than forming it."""
        if not isinstance(x, Tensor) or self._cost_modes(_tokens(x)) > self._cost_apart(_tokens(x)):
            return super().branch(x)
        rows, columns, core = self._links()
        dropped = self._dropped(x)
        assert isinstance(dropped, Tensor)
        with no_autocast(x):
            z = dropped.reshape(-1, self.shape.in_).t().to(self.d.dtype)  # (in, t)
            z = F.pad(z, (0, 0, 0, self._padded - self.shape.in_))
            z = core @ _through(z, [link.t() for link in columns])  # (R of the rows, t)
            y = _through(z, rows)[: self.shape.out].t()
        return y.to(compute_dtype(x)).reshape(*x.shape[:-1], self.shape.out)

    def forward(self, x: Input, base: Base) -> Tensor:
        """One product with the changed weight where that is cheaper, else base(x) + branch(x)."""
        if isinstance(x, Tensor) and not (self.training and self.dropout):
            cost = self._cost_apart if compute_dtype(x).itemsize < 4 else self._cost_one
            if base.linear is not None and cost(_tokens(x)) < self._cost_modes(_tokens(x)):
                return super().forward(x, base)
        return base(x) + self.branch(x)

    def factors(self) -> Factors | None:
        """Exact at the product of one side's mode ranks, where that is below both sides of the weight."""
        rows, columns, core = self._links()
        if min(core.shape) >= min(self.shape):
            return None
        out, in_ = self.shape
        eye = torch.eye(min(core.shape), device=core.device, dtype=core.dtype)
        if core.shape[1] <= core.shape[0]:
            return Factors(_through(core, rows)[:out], _through(eye, columns)[:in_].t())
        return Factors(_through(eye, rows)[:out], _through(core.t(), columns)[:in_].t())

    # Multiplications of one call, its backward pass included where there will be one.

    def _cost_modes(self, tokens: int) -> int:
        """Mode by mode: once, and twice more for the modes and once more for the frozen core in backward."""
        out_side, in_side, rows, columns = self._costs
        modes, core = out_side + in_side, rows * columns
        return tokens * (3 * modes + 2 * core if torch.is_grad_enabled() else modes + core)

    def _cost_one(self, tokens: int) -> int:
        """The change added to the weight: formed, and in backward formed again and differentiated."""
        out_side, in_side, _, columns = self._costs
        formed = out_side * columns + in_side * self.shape.out
        return 4 * formed + tokens * self.shape.out * self.shape.in_ if torch.is_grad_enabled() else formed

    def _cost_apart(self, tokens: int) -> int:
        """The change applied beside the weight."""
        return self._cost_one(tokens) + tokens * self.shape.out * self.shape.in_ * (2 if torch.is_grad_enabled() else 1)

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """The sum of the R_n, of the I_n, or of both."""
        return sum(_lengths(spec, *shape))


@lru_cache
def mode_sizes(size: int, modes: int) -> tuple[int, ...]:
    """Return `modes` ascending integers near each other whose product is `size`, or the next above that has such."""
    while True:
        even = [f for f in _factorings(size, modes, 1) if f[-1] <= UNEVEN * f[0]]
        if even:
            return min(even, key=lambda f: (sum(f), f))
        size += 1


def _factorings(size: int, parts: int, least: int) -> Iterator[tuple[int, ...]]:
    """Yield every ascending tuple of `parts` integers from `least` on whose product is `size`."""
    if parts == 1:
        yield (size,)
        return
    for first in range(least, int(size ** (1 / parts) + 1e-9) + 1):
        if size % first == 0:
            yield from ((first, *rest) for rest in _factorings(size // first, parts - 1, first))


def _sides(spec: Any, out: int, in_: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return (I_n, R_n) of the output modes and of the input modes."""
    rows, columns = (
        [(size, min(size, spec.mode_rank or size)) for size in mode_sizes(side, spec.modes)] for side in (out, in_)
    )
    return rows, columns


def _lengths(spec: Any, out: int, in_: int) -> list[int]:
    """Return the lengths of the trained vectors."""
    rows, columns = _sides(spec, out, in_)
    inner, outer = [r for _, r in rows + columns], [size for size, _ in rows + columns]
    return {"rank": inner, "mode": outer, "both": inner + outer}[spec.diag_side]


def _through(z: Tensor, links: Sequence[Tensor]) -> Tensor:
    """Apply the Kronecker product of links (I_n, R_n) to z (product of R_n, c): (product of I_n, c)."""
    columns, left = z.shape[1], 1
    for link in links:
        # not matmul, which on three dimensions chooses its kernel by which operand needs a gradient
        z = torch.bmm(link.expand(left, *link.shape), z.reshape(left, link.shape[1], -1))  # (left, I_n, the rest)
        left *= link.shape[0]
    return z.reshape(left, columns)


def _chain(side: Sequence[tuple[int, int]]) -> int:
    """Return the multiplications of `_through` for one column."""
    sizes = [math.prod(i for i, _ in side[:n]) * math.prod(r for _, r in side[n:]) for n in range(len(side) + 1)]
    return sum(before * i for (before, _), (i, _) in zip(pairwise(sizes), side, strict=True))


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()
