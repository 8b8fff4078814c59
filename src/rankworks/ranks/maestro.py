"""Maestro's schedule: ordered dropout over (layer, b), a hierarchical group lasso, and shrinking of what it empties.

    L(one layer cut to its first b ranks)  +  penalty sum_layers sum_{b<r} (||B[:, b:]||_F + ||A[b:]||_F)

In every step one layer alone acts with its first b ranks, unscaled, and the others with all they have. The pairs
(layer, b), b = 1..r, are shuffled and gone through to the last before they are shuffled again, so a layer with more
ranks is cut more often. (`sampler="all"` draws a b for every layer by itself, "none" cuts none.) Later ranks act more
seldom and are in more of the lasso's norms: they carry less, and a layer's tail goes to zero. `hierarchical=False`
takes the norm of every rank by itself.

importance_b = ||B[:, b:]||_F ||A[b:]||_F falls with b, so what is below `threshold` is a suffix. It is cut once per
epoch (or every `every` steps) and at the end, moments with it, and the pairs are then counted anew. Several processes
cannot change shapes in a run: there the suffix is left out of the products at once and cut at the end.

The factors are those of `maestro` (deltas/maestro.py), or of any trained pair: a LoRA then learns its rank. Any first b
ranks are a model: `rw.set_rank(model, {"q_proj": 16})`. The released scripts have penalty 1e-6 (the argument's default,
5e-3, is far more than the loss of wide layers can hold against), threshold 1e-5. The tail's norm is taken of
max(sum of squares, 1e-24), whose gradient is zero where the suffix is, and not NaN.

The cut model learns the labels (`no_full_pass` of the released scripts). With `full_pass=True` the whole model learns
them, and the cut one the probabilities that the whole one gives (both losses are added and reported as one):

    L(whole, labels) + L(cut, softmax(whole))  +  penalty ...

in the own loop, at twice the work. A fixed share of the ranks in all layers (the released `pufferfish`) is a smaller
`rank` and sampler="none". Batch-norm statistics are those of cut layers: recompute them before evaluation
(`torch.optim.swa_utils.update_bn`).
Source: arXiv:2308.14929, sections 3 and 4, and the released code.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rankworks.core.delta import Delta
from rankworks.core.draw import Draw
from rankworks.core.fields import NonNegative, Setting
from rankworks.core.forms.lowrank import Nested
from rankworks.core.hooks import Hook, Moment
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.ranks.surgery import keep_ranks, pair_of
from rankworks.core.registry import MethodSpec, rank
from rankworks.core.site import Shape

TINY = 1e-24  # the smallest sum of squares a norm is taken of


@rank("maestro", title="Maestro", year=2023, paper="arXiv:2308.14929")
class MaestroRanks(RankSchedule):
    """Ordered ranks, fewer with every epoch."""

    ordered: ClassVar[bool] = True
    rescaled: ClassVar[bool] = False

    penalty: float = NonNegative(1e-6, "weight of the group lasso")
    hierarchical: bool = Setting(True, "norms of tails, each rank in all that begin before it; False: of single ranks")
    threshold: float = NonNegative(1e-5, "importance below which a tail is cut")
    every: int | None = Setting(None, "steps between cuts; None: once per epoch", ge=1)
    sampler: Literal["one", "all", "none"] = Setting("one", "which layers are cut to a drawn b in a step")
    full_pass: bool = Setting(False, "the whole model learns the labels, and the cut one what the whole one says")
    seed: int = Setting(0, "seed of the draws", ge=0)

    def problems(self, settings: MethodSpec, shape: Shape) -> list[str]:
        """There must be a trained pair."""
        if settings.method.cls.pair_rank(settings, shape) is None:  # type: ignore[attr-defined]
            return [
                f"maestro orders the ranks of a trained pair of factors, which {settings.key} lacks: choose maestro, "
                "lora or dora"
            ]
        return []

    def hook(self, deltas: Mapping[str, Delta]) -> Hook:
        """The sampler, the lasso and the cuts."""
        return OrderedDropout(self, deltas)


class OrderedDropout(Hook):
    """Its state: how far the shuffled pairs were gone through, and how many ranks of every layer are left."""

    def __init__(self, schedule: MaestroRanks, deltas: Mapping[str, Delta]):
        self.schedule, self.deltas, self.teaches = schedule, list(deltas.values()), schedule.full_pass
        self.layers = [pair_of(d) for d in self.deltas]
        self.widths = [pair.rank for pair in self.layers]
        self.pairs = Pairs(schedule.seed, self.widths)
        self.step, self.drawn = -1, {}  # a step, and {layer: b} of it
        self._rest()

    def before_forward(self, moment: Moment) -> None:
        """Cut a layer for the step; its micro-batches see the same."""
        if moment.step != self.step:
            self.step, self.drawn = moment.step, self._draw(moment.step)
        for i, b in self.drawn.items():
            self.layers[i].nested = Nested(b, rescaled=False)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """The whole model."""
        cuts = [pair.nested for pair in self.layers]
        self._rest()
        try:
            yield
        finally:
            for pair, cut in zip(self.layers, cuts, strict=True):
                pair.nested = cut

    def penalty(self, moment: Moment) -> Tensor | None:
        """The lasso over the ranks that are left."""
        if not self.schedule.penalty or not any(self.widths):
            return None
        tails, found = self.schedule.hierarchical, zip(self.layers, self.widths, strict=True)
        norms = [n.sum() for pair, w in found if w for n in group_norms(pair.B[:, :w], pair.A[:w], tails)]
        return self.schedule.penalty * torch.stack(norms).sum()

    def after_step(self, moment: Moment) -> None:
        """All ranks act again; cut what has become unimportant, when it is time."""
        self._rest()
        every = self.schedule.every or moment.epoch
        if every and int(moment.step / every) > int((moment.step - 1) / every):
            self._cut(moment)

    def on_end(self, moment: Moment) -> None:
        """Cut for good what was left out."""
        self._rest()
        self._cut(moment, for_good=True)

    @torch.no_grad()
    def _cut(self, moment: Moment, for_good: bool = False) -> None:
        for i, (delta, pair) in enumerate(zip(self.deltas, self.layers, strict=True)):
            left = importance(pair.B[:, : self.widths[i]], pair.A[: self.widths[i]])
            self.widths[i] = int((left >= self.schedule.threshold).sum())
            if (for_good or not _several_processes()) and self.widths[i] < pair.rank:
                pair.nested = None
                keep_ranks(delta, torch.arange(self.widths[i]), moment.optimizer)
        self._rest()
        if self.pairs.ranks != self.widths:
            self.pairs.restart(self.widths)

    def _draw(self, step: int) -> dict[int, int]:
        """Return the layers that a step cuts, and to how many ranks."""
        if self.schedule.sampler == "one":
            return self.pairs.take()
        if self.schedule.sampler == "none":
            return {}
        generator = Draw(self.schedule.seed, f"maestro:step {step}").generator
        drawn = torch.rand(len(self.widths), generator=generator, dtype=torch.float64).tolist()
        return {i: 1 + int(u * w) for i, (u, w) in enumerate(zip(drawn, self.widths, strict=True)) if w}

    def _rest(self) -> None:
        """Let every layer act with the ranks that are left to it."""
        for pair, w in zip(self.layers, self.widths, strict=True):
            pair.nested = None if w >= pair.rank else Nested(w, rescaled=False)

    def state_dict(self) -> dict[str, Any]:
        """The place in the pairs, and the ranks left."""
        return {"widths": list(self.widths), "pairs": self.pairs.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.widths = list(state["widths"])
        self.pairs.load_state_dict(state["pairs"])
        self._rest()


class Pairs:
    """All (layer, b) in a random order, again and again; the order follows from the seed and the round."""

    def __init__(self, seed: int, ranks: Sequence[int]):
        self.seed, self.round, self.place, self.ranks = seed, 0, 0, list(ranks)
        self._shuffle()

    def restart(self, ranks: Sequence[int]) -> None:
        """Count anew, with other ranks."""
        self.round, self.place, self.ranks = self.round + 1, 0, list(ranks)
        self._shuffle()

    def take(self) -> dict[int, int]:
        """Return the next pair, {layer: b}; none where no layer has ranks."""
        if not self.ends or not self.ends[-1]:
            return {}
        if self.place == self.ends[-1]:
            self.restart(self.ranks)
        number = int(self.order[self.place])
        self.place += 1
        layer = bisect_right(self.ends, number)
        return {layer: 1 + number - (self.ends[layer] - self.ranks[layer])}

    def _shuffle(self) -> None:
        self.ends = list(accumulate(self.ranks))
        generator = Draw(self.seed, f"maestro:{self.round}").generator
        self.order = torch.randperm(self.ends[-1] if self.ends else 0, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """What the order and the place in it follow from."""
        return {"round": self.round, "place": self.place, "ranks": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.round, self.place, self.ranks = state["round"], state["place"], list(state["ranks"])
        self._shuffle()


def group_norms(B: Tensor, A: Tensor, tails: bool = True) -> tuple[Tensor, Tensor]:
    """Return ||B[:, b:]||_F and ||A[b:]||_F for b = 0..r-1 (or the norms of single ranks): two of (r,)."""
    squares = (B.square().sum(0), A.square().sum(1))
    first, second = (s.flip(0).cumsum(0).flip(0) if tails else s for s in squares)
    return first.clamp_min(TINY).sqrt(), second.clamp_min(TINY).sqrt()


def importance(B: Tensor, A: Tensor) -> Tensor:
    """Return ||B[:, b:]||_F ||A[b:]||_F for b = 0..r-1, never rising: (r,)."""
    first, second = group_norms(B, A)
    return first * second


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
