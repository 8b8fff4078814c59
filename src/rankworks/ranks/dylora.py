"""DyLoRA: train every rank up to r at once, so that the adapter can be cut to any of them afterwards.

    W' = W + s_b B[:, :b] A[:b]         b drawn anew for every step, one for the whole model;  s_b = alpha/b

The first b ranks act: they must do without the later ones, so the ranks become ordered by importance. `frozen` gives
a gradient to rank b alone (the b - 1 before it act, held still), else to all b. b is uniform on lowest..highest, or
geometric, P(b) ~ (1 - p)^(b - 1); a site of a smaller rank lets all its ranks act where b is larger. b is a function
of the seed and the step alone, so that micro-batches, processes and resumed runs agree without a state.

The released training script freezes, and so does the default. Its code multiplies A and B by sqrt(r/b) each and their
product by alpha/r, which is s_b (a common port has sqrt(r/b) once): `rw.set_rank(model, b)` gives that scale in
inference, and all exports then hold rank b.

A and B are single tensors, so momentum and weight decay would move also rows that no gradient reached. With `strict`
a step changes the trained rows alone: the others' numbers and moments are put back as they were.
Source: arXiv:2210.07558, section 4 and algorithm 1; the geometric law with p = 0.15 is its appendix's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankworks.core.delta import Delta
from rankworks.core.draw import Draw
from rankworks.core.fields import Setting
from rankworks.core.forms.lowrank import Nested
from rankworks.core.hooks import Hook, Moment
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.ranks.surgery import pair_of, ranked
from rankworks.core.registry import MethodSpec, rank
from rankworks.core.site import Shape


@rank("dylora", title="DyLoRA", year=2022, paper="arXiv:2210.07558")
class DyLoRA(RankSchedule):
    """Nested dropout over the ranks."""

    pairs: ClassVar[bool] = True
    ordered: ClassVar[bool] = True
    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian", "eva")  # B = 0: no change at the start for any b

    frozen: bool = Setting(True, "train rank b alone in a step; False trains all of the first b")
    distribution: Literal["uniform", "geometric"] = Setting("uniform", "how b is drawn")
    p: float = Setting(0.15, "success probability of the geometric law", gt=0, lt=1)
    lowest: int = Setting(1, "smallest b", ge=1)
    highest: int | None = Setting(None, "largest b; None: the largest rank of any site", ge=1)
    strict: bool = Setting(True, "keep momentum and weight decay from moving ranks that got no gradient")
    seed: int = Setting(0, "seed of the draws", ge=0)

    def problems(self, settings: MethodSpec, shape: Shape) -> list[str]:
        """The range of b must be one, within the rank."""
        top = settings.method.cls.factored_rank(settings)  # type: ignore[attr-defined]
        if self.highest is not None and self.lowest > self.highest:
            return [f"dylora draws b from lowest {self.lowest} to highest {self.highest}: exchange the two"]
        if top is not None and self.lowest > top:
            return [
                f"dylora draws b from {self.lowest} on and the rank is {top}: lower ranks.lowest, or raise the rank"
            ]
        return []

    def hook(self, deltas: Mapping[str, Delta]) -> Hook:
        """The sampler."""
        return NestedDropout(self, deltas)


class NestedDropout(Hook):
    """Draws b before every step, lets it act during the step, and gives the whole adapter back after it."""

    def __init__(self, schedule: DyLoRA, deltas: Mapping[str, Delta]):
        self.schedule, self.deltas = schedule, list(deltas.values())
        self.kept: list[_Still] = []
        self._let_go()  # a run that was cut short may have left a rank set

    def rank_at(self, step: int) -> int:
        """Return b of a step (from 1): a function of the seed and the step."""
        top = self.schedule.highest or max((pair_of(d).rank for d in self.deltas), default=1)
        choices = torch.arange(self.schedule.lowest, max(top, self.schedule.lowest) + 1)
        draw = Draw(self.schedule.seed, f"dylora:{step}")
        if self.schedule.distribution == "uniform":
            return int(choices[torch.randint(len(choices), (1,), generator=draw.generator)])
        weights = (1 - self.schedule.p) ** (choices - 1).double()
        return int(choices[torch.multinomial(weights, 1, generator=draw.generator)])

    def before_forward(self, moment: Moment) -> None:
        """Let the first b ranks act; every micro-batch of a step has the same b."""
        b = self.rank_at(moment.step)
        for pair in map(pair_of, self.deltas):
            width = min(b, pair.rank)
            pair.nested = Nested(width, min(b - 1, width) if self.schedule.frozen else 0)

    @torch.no_grad()
    def after_backward(self, moment: Moment) -> None:
        """Remember what the step must not move."""
        self.kept = []
        for delta in self.deltas if self.schedule.strict else ():
            nested = pair_of(delta).nested
            if nested is not None:
                trained = slice(nested.still, nested.width)
                for name, (_, tensor) in ranked(delta).items():
                    self.kept.append(_Still(tensor, trained, name == "B", moment.optimizer))

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Put it back, and let all ranks act again."""
        for still in self.kept:
            still.put_back(moment.optimizer)
        self.kept = []
        self._let_go()

    def on_end(self, moment: Moment) -> None:
        """All ranks act."""
        self._let_go()

    def _let_go(self) -> None:
        for pair in map(pair_of, self.deltas):
            pair.nested = None


class _Still:
    """The ranks of one tensor (rows, or columns) that a step must leave as they are, with their moments."""

    def __init__(self, tensor: Tensor, trained: slice, columns: bool, optimizer: Optimizer):
        self.tensor, self.trained, self.columns = tensor, trained, columns
        self.numbers = {key: [p.clone() for p in self._parts(t)] for key, t in self._held(optimizer).items()}

    def put_back(self, optimizer: Optimizer) -> None:
        """Undo what the optimizer did to them; moments that it has made in this step begin at zero there."""
        for key, tensor in self._held(optimizer).items():
            before = self.numbers.get(key)
            for i, part in enumerate(self._parts(tensor)):
                part.copy_(before[i]) if before is not None else part.zero_()

    def _held(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The tensor, and what the optimizer keeps per number of it."""
        kept = optimizer.state.get(self.tensor, {}).items()  # type: ignore[call-overload]
        moments = {k: t for k, t in kept if isinstance(t, Tensor) and t.shape == self.tensor.shape}
        return {"": self.tensor.detach(), **moments}

    def _parts(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the ranks before and behind the trained ones."""
        rows = tensor.t() if self.columns and tensor.dim() > 1 else tensor
        return rows[: self.trained.start], rows[self.trained.stop :]
