"""The leading principal directions of rows that come in batches, with a state of k (in + 1) numbers.

    first batch X (m, in)    S, C = SVD of X - mean(X), the first k
    next batch               S, C = SVD of [diag(S) C ; X - m_b ; sqrt(n m / (n + m)) (mu - m_b)], the first k

S (k,) singular values and C (k, in) orthonormal rows, those of all rows seen less their common mean mu; m_b is the
batch's mean, n the rows seen before. The last stacked row carries what the shift of the mean adds to the scatter: over
both parts, sum_t (x_t - mu')(x_t - mu')^T is the sum of their own and n m / (n + m) (mu - m_b)(mu - m_b)^T.
Exact where all rows seen have at most k directions around their mean; otherwise what a batch has beyond the k kept is
lost, the leading ones least.
Source: Ross, Lim, Lin and Yang (2008), "Incremental learning for robust visual tracking".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankworks.linalg.svd import fix_signs, randomised_svd

SEED = 42  # of the randomised SVD's probe, which is drawn anew for every batch: equal batches are treated equally


class IncrementalSVD:
    """k directions of rows (., in), at least float32, on the device of the first batch.

    `iterations` > 0 uses a randomised SVD of width 2k in place of the exact one. `spread` is the total scatter
    sum_t ||x_t - mu||^2, of which S_i^2 is the share of direction i.
    """

    def __init__(self, k: int, iterations: int = 0):
        self.k, self.iterations = k, iterations
        self.count = 0
        self.components: Tensor | None = None  # (k, in)
        self.values: Tensor  # (k,)
        self.mean: Tensor  # (in,)
        self.spread: Tensor  # ()

    def update(self, rows: Tensor) -> Tensor | None:
        """Take a batch (m, in), the first with m >= k; return |cos| (k,) between old and new directions.

        None for the first.
        """
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        m, before = len(rows), self.components
        mean = rows.mean(0)
        centred = rows - mean
        spread = centred.square().sum()
        if before is not None:
            shift, weight = self.mean - mean, self.count * m / (self.count + m)
            spread = self.spread + spread + weight * shift.square().sum()
            mean = mean + shift * (self.count / (self.count + m))
            centred = torch.cat([self.values.unsqueeze(1) * before, centred, (weight**0.5 * shift).unsqueeze(0)])
        self.values, self.components = self._leading(centred)
        self.mean, self.spread, self.count = mean, spread, self.count + m
        return None if before is None else (before * self.components).sum(1).abs()

    def _leading(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """S (k,) and C (k, in), the largest entry of every direction positive."""
        if self.iterations:
            generator = torch.Generator().manual_seed(SEED)
            _, s, vh = randomised_svd(rows, self.k, self.iterations, self.k, generator)
            return s, vh
        u, s, vh = torch.linalg.svd(rows, full_matrices=False)
        return s[: self.k], fix_signs(u[:, : self.k], vh[: self.k])[1]


METRICS = ("ratio", "variance", "sum", "max")


def worth(metric: str, values: Tensor, spread: Tensor, count: Tensor | int) -> Tensor:
    """Return what each direction explains, (k,), from its S (k,), the total scatter and the number of rows.

    variance: S_i^2 / (n - 1); ratio: S_i^2 / scatter, in [0, 1]; sum, max: S_i^2 by the sum or maximum of the k.
    """
    squares = values.square()
    if metric == "variance":
        return squares / (count - 1)
    whole = {"ratio": spread, "sum": squares.sum(), "max": squares.max()}[metric]
    return squares / whole.clamp_min(torch.finfo(squares.dtype).tiny)


def share_out(worths: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return how many of the `budget` largest numbers each name holds, equal ones in the order of the names."""
    order = sorted(worths)
    names = [name for name in order for _ in range(len(worths[name]))]
    pooled = torch.cat([worths[name].detach().cpu().double() for name in order])
    ranks = dict.fromkeys(worths, 0)
    for place in pooled.argsort(descending=True, stable=True)[:budget].tolist():
        ranks[names[place]] += 1
    return ranks
