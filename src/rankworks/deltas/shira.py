"""SHiRA: train a fixed, very sparse set of the weight's own entries.

    W' = W + s S        S (out, in) zero but for K entries at `index`, whose values v (K,) are trained, zero at start

No low rank: the change has high rank and few entries, so switching adapters overwrites K numbers
(`rankworks.switch`). By default K = rank (in + out), LoRA's count; `density` gives a share of the entries instead.
Which entries (`mask`), in every layer K of its own, equal scores by their number:

    rand     K drawn without replacement from the seed          wm       the K of largest |W|
    struct   the main diagonal and evenly spaced whole rows, the last of them only as far as K reaches
    grad     the K of largest |g|                                snip     the K of largest |g W|

g is measured on data before the start (`rankworks.calibrate`, or a recipe by itself). The paper says "highest gradient
magnitudes" and leaves the sum over the batches open: `gradient="sum"` takes |mean over batches of g|, which is the
gradient of the calibration loss and what SNIP defines; "absolute" takes the mean of |g|, in which batches that
disagree do not cancel. `task_index` t takes ranks (t-1) K + 1 to t K of the same order, so that the masks of several
tasks do not overlap. The paper's struct rows are not given exactly; ours are those that come closest to evenly spaced.

The entries are stored with the values (random streams differ between devices and versions), as int32 where that
numbers them all. The gradient of v is the gradient of W at `index`, so training v is training W under a gradient mask.
Source: arXiv:2406.13175, section 3.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.forms.sparse import SparseDelta
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.linalg.select import top_entries

SCORES = {"sum": "gradient", "absolute": "gradient_magnitude"}
"""What is measured for each reduction over the batches."""


def _entries(spec: Any, shape: Shape) -> int:
    """K, the number of trained entries."""
    if spec.density is not None:
        return max(1, round(spec.density * shape.out * shape.in_))
    return spec.rank * (shape.in_ + shape.out)


@delta("shira", title="SHiRA", year=2024, paper="arXiv:2406.13175")
class SHiRA(SparseDelta):
    """Trained values at fixed places."""

    rank: int = Rank(32, "K = rank (in + out) entries, as many as LoRA of this rank trains")
    density: float | None = Setting(None, "share of the entries to train, in place of rank", gt=0, le=1)
    scale: float = Positive(1.0, "multiplier of the change")
    mask: Literal["rand", "wm", "struct", "grad", "snip"] = Setting(
        "rand", "which entries: rand, wm (largest |W|), struct (diagonal and rows), grad (largest |g|), snip (|g W|)"
    )
    gradient: Literal["sum", "absolute"] = Setting(
        "sum", "g of grad and snip over the batches: sum (they may cancel) or absolute (sum of |g|)"
    )
    task_index: int = Setting(1, "task t takes the t-th K entries of the order, so that tasks do not overlap", ge=1)

    def setup(self, weight: Tensor) -> None:
        """Choose the entries, as ascending row-major numbers, and start their values at zero."""
        self.place(weight, self._choose(weight))

    def _choose(self, weight: Tensor) -> Tensor:
        k, skip = _entries(self, self.shape), (self.task_index - 1) * _entries(self, self.shape)
        known = [what for what in self.needs(self) if what in self.evidence]
        if self.mask == "struct":
            return _strips(self.shape, k)
        if self.mask == "rand":
            return _drawn(self.draw, self.shape.out * self.shape.in_, k, self.task_index)
        if self.mask == "wm":
            return top_entries(weight.abs(), k, skip)
        if not known:  # a file brings the entries
            return torch.arange(k)
        g = self.evidence[known[0]].to(weight.device).abs()  # (out, in)
        return top_entries(g if self.mask == "grad" else g * weight.to(g.dtype).abs(), k, skip)

    @classmethod
    def needs(cls, spec: Any) -> tuple[str, ...]:
        """The gradient of the weight, for the masks made from it."""
        return (SCORES[spec.gradient],) if spec.mask in ("grad", "snip") else ()

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """K."""
        return _entries(spec, shape)

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """There are out * in entries and no more."""
        found = super().problems(spec, shape) if spec.density is None else []
        k, most = _entries(spec, shape), shape.out * shape.in_
        if k > most:
            found.append(
                f"shira would train {k:,} entries of a weight that has {most:,}: lower rank there, or set density"
            )
        elif k * spec.task_index > most:
            found.append(
                f"shira's task {spec.task_index} would need {k * spec.task_index:,} entries, {k:,} for each task so "
                f"far, of a weight that has {most:,}: lower rank, density or task_index"
            )
        if spec.task_index > 1 and spec.mask == "struct":
            found.append(
                "shira's mask 'struct' has one pattern and no order for later tasks to go on in: leave task_index at "
                "1, or choose the mask 'rand', 'wm', 'grad' or 'snip'"
            )
        return found


def _drawn(draw: Draw, population: int, k: int, task: int) -> Tensor:
    """Return the task's K sorted numbers below `population`: each task draws from what earlier ones left."""
    chosen = draw.choice(population, k)
    if chosen.is_meta:
        return chosen
    taken = torch.empty(0, dtype=torch.int64, device=chosen.device)
    for _ in range(task - 1):
        taken = torch.cat([taken, chosen]).sort().values
        free = draw.choice(population - len(taken), k)  # the place among the numbers that are left
        before = torch.searchsorted(taken - torch.arange(len(taken), device=taken.device), free, right=True)
        chosen = free + before
    return chosen


def _strips(shape: Shape, k: int) -> Tensor:
    """Return K sorted row-major numbers: the main diagonal, then evenly spaced whole rows, the last one in part.

    n rows spaced over all `out` cross the diagonal, of length d, in ceil(n d / out) places, so they add
    n in - ceil(n d / out) entries; that reaches the missing K - d from n = ceil((K - d) out / (out in - d)) on.
    """
    out, in_ = shape
    chosen = torch.zeros(out * in_, dtype=torch.bool)
    chosen[: min(out, in_) * (in_ + 1) : in_ + 1] = True
    diagonal = chosen.nonzero().squeeze(1)  # (d,)
    missing = k - len(diagonal)
    if missing <= 0:
        return diagonal[:k]
    rows = -(-missing * out // (out * in_ - len(diagonal)))
    starts = torch.arange(rows) * out // rows * in_  # (rows,)
    entries = (starts.unsqueeze(1) + torch.arange(in_)).flatten()
    chosen[entries[~chosen[entries]][:missing]] = True
    return chosen.nonzero().squeeze(1)
