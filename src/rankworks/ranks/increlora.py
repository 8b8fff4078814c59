"""IncreLoRA: start with few ranks everywhere and give more, round by round, to the weights that the loss depends on.

    W' = W + s_k B diag(g) A        A, B, g as in AdaLoRA;  s_k = alpha/k with the k ranks that are active now

Every weight has one score. With dW its change and G = dL/dW', I = sum |dW G| / sqrt(numel), averaged over steps as
I' <- b1 I' + (1 - b1) I, U' <- b2 U' + (1 - b2) |I - I'|, the score is I' U'. After `warmup` steps, every `interval`
steps, the `top` sites by score get `add` ranks each, until there are `target` per site on average; growth is clipped to
that budget, where the released code can step over it and then never ends. G is formed at one site at a time on the way
of the backward pass (core/ranks/watch.py), a product as large as the layer's own, of the first micro-batch, in the last
`window` steps before a round: 0.85^40 is 0.0015 of an average's weight. `score="gates"`, sum |g dL/dg|, costs nothing.

Advance learning: behind its active ranks every site has `add` more, whose gates are held at 1e-5 while A and B already
train. A round makes these gates trained and puts new ranks behind them; when the budget is reached, or the run ends,
they are cut. Without it (`advance=False`) new ranks come with A, B ~ N(0, 0.02^2) and g = 0. The start is the same with
the ranks the delta has (rank=1 in the paper), exact; the reserve joins at a run's first step.

The multiplier alpha/k follows k, as in the released code: a site that grows has its older ranks scaled down by
k/(k + add). `rescale=False` keeps the multiplier it starts with. New ranks have a learning rate of their own
(`rate="restart"`): it rises over `rise` of the steps left and falls linearly to the run's end, for the gates that were
held until now and for the A and B that are new. The tensors of a site are one parameter each, whatever the rank, so
this is a factor per rank (core/ranks/pace.py) and not a parameter group per round: groups and names never change.

Choices. sqrt(numel) is what the released code divides by; the paper's symbol is not legible, and "mean" takes away the
bonus large matrices have. The penalty for factors that are not orthonormal is taken over all ranks of a site (the
paper's formula); `penalty_over="chunks"` is the released code's, of each round's ranks by themselves. `add` is half of
the target, like the released table 2:1, 4:2, 6:3, 8:4. Without numbers `top` is an eighth of the sites (9 of 72 there)
and `interval` such that growth takes half of the run. s is alpha/k, without the code's 1e-5.
Source: arXiv:2308.12043 and its released code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError
from rankworks.core.fields import NonNegative, Setting
from rankworks.core.forms.lowrank import scale_of
from rankworks.core.hooks import Hook, Moment
from rankworks.core.ranks.gates import STD, start_as_svd, steps_of
from rankworks.core.ranks.orthogonal import Form, departure
from rankworks.core.ranks.pace import Pace
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.ranks.surgery import gated_of, grow_ranks, keep_ranks, pair_of, refuse_several_processes, settle
from rankworks.core.rates import learning_rate_factor
from rankworks.core.registry import MethodSpec, rank
from rankworks.core.site import Site

HELD = 1e-5
"""The gate of a rank in reserve."""


@rank("increlora", title="IncreLoRA", year=2023, paper="arXiv:2308.12043")
class IncreLoRA(RankSchedule):
    """Ranks added where the scores are highest, up to a budget."""

    gates: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian", "eva")  # a start in the base would be rescaled too

    target: float = Setting(8.0, "average number of ranks per site at the end", gt=0)
    add: int | None = Setting(None, "ranks a site gets at once; None: half of target", ge=1)
    top: int | None = Setting(None, "sites that grow in a round; None: an eighth of them", ge=1)
    warmup: float = Setting(0.1, "steps before the first round: a share of all below 1, else a number", ge=0)
    interval: int | None = Setting(None, "steps from one round to the next; None: all within half of the run", ge=1)
    advance: bool = Setting(True, "train the factors of the next ranks before they are active")
    score: Literal["dense", "gates"] = Setting("dense", "sum |dW G| of the whole change, or sum |g dL/dg|")
    normaliser: Literal["sqrt", "mean", "none"] = Setting("sqrt", "what a dense score is divided by")
    window: int = Setting(40, "steps before a round in which scores are measured; 0: in all", ge=0)
    beta1: float = Setting(0.85, "decay of the averaged score", ge=0, lt=1)
    beta2: float = Setting(0.85, "decay of its averaged uncertainty", ge=0, lt=1)
    rescale: bool = Setting(True, "multiplier alpha/k of the active ranks; False: the one it starts with")
    rate: Literal["restart", "common"] = Setting("restart", "the learning rate of new ranks: their own, or the run's")
    rise: float = Setting(0.1, "steps over which their own rises: a share of those left below 1, else a number", ge=0)
    orthogonal: float = NonNegative(0.1, "weight of the penalty for factors that are not orthonormal")
    penalty: Form = Setting("released", "the penalty: mean of norms (released code) or sum of their squares (paper)")
    penalty_over: Literal["site", "chunks"] = Setting("site", "all ranks of a site, or those of a round by themselves")

    def check(self, resolved: Sequence[tuple[Site, MethodSpec]]) -> None:
        """Raise `ConfigError` where the budget is less than the start."""
        start = _ranks(resolved)
        if self.budget(len(resolved)) < start:
            raise ConfigError(
                f"increlora starts with {start} ranks at {len(resolved)} sites and ranks.target = {self.target:g} at "
                f"each is {self.budget(len(resolved))}: lower rank (the paper starts with 1), raise "
                "ranks.target, or prune with ranks=adalora."
            )

    def largest(self, resolved: Sequence[tuple[Site, MethodSpec]]) -> Mapping[str, Mapping[str, Any]]:
        """Before the last round every site has a reserve beside the ranks of all rounds but that; or at the end."""
        sites, start = len(resolved), _ranks(resolved)
        rounds = self.rounds(start, sites)
        if not rounds:
            return {}
        last = start + (rounds - 1) * self.sites_a_round(sites) * self.ranks_a_site()
        total = max(self.budget(sites), last + sites * self.ranks_a_site() * self.advance)
        each, more = divmod(total, sites)
        return {site.name: {"rank": each + (place < more)} for place, (site, _) in enumerate(resolved)}

    def budget(self, sites: int) -> int:
        """Return how many ranks the sites have between them at the end."""
        return round(self.target * sites)

    def ranks_a_site(self) -> int:
        """Return how many ranks a site gets at once."""
        return self.add or max(1, int(self.target) // 2)

    def sites_a_round(self, sites: int) -> int:
        """Return how many sites grow in a round."""
        return min(self.top or max(1, round(sites / 8)), sites)

    def rounds(self, start: int, sites: int) -> int:
        """Return how many rounds it takes from so many ranks to the budget."""
        return math.ceil((self.budget(sites) - start) / (self.sites_a_round(sites) * self.ranks_a_site()))

    def prepare(self, delta: Delta) -> None:
        """Gates of zero between two live factors."""
        start_as_svd(delta, self.init)

    def hook(self, deltas: Mapping[str, Delta]) -> Hook:
        """The growth."""
        return Growth(self, deltas)


def _ranks(resolved: Sequence[tuple[Site, MethodSpec]]) -> int:
    return sum(settings.method.cls.factored_rank(settings) for _, settings in resolved)  # type: ignore[attr-defined]


class Growth(Hook):
    """Scores the sites, and grows the best of them until the budget is spent."""

    def __init__(self, schedule: IncreLoRA, deltas: Mapping[str, Delta]):
        self.schedule, self.deltas = schedule, deltas
        self.gated: dict[str, Any] = {key: gated_of(delta) for key, delta in deltas.items()}
        self.active = {key: pair_of(delta).rank for key, delta in deltas.items()}
        self.alpha = {key: pair_of(delta).alpha for key, delta in deltas.items()}
        self.first = dict(self.active)
        self.target = schedule.budget(len(deltas))
        self.add = schedule.ranks_a_site()
        self.top = schedule.sites_a_round(len(deltas))
        self.seen: dict[str, Tensor] = {}
        self.mean, self.spread = (torch.zeros(len(deltas), dtype=torch.float64) for _ in range(2))
        self.fresh: list[dict[str, Any]] = []  # ranks with a learning rate of their own
        self.begun, self.pace, self.batches = False, Pace(), 0
        self.warmup = self.interval = 1

    @property
    def total(self) -> int:
        """The active ranks of all sites."""
        return sum(self.active.values())

    @property
    def growing(self) -> bool:
        """Whether the budget is not spent."""
        return self.total < self.target

    # ---- moments --------------------------------------------------------------------------------------------------

    def on_start(self, moment: Moment) -> None:
        """Lay out the rounds, and put the first reserve behind the ranks of a new run."""
        self.batches = 0
        if not self.growing and not self.begun:
            warnings.warn(
                f"increlora starts with its whole budget of {self.target} ranks and has nothing to grow: start with "
                "rank=1, or raise ranks.target.",
                stacklevel=2,
            )
            return
        refuse_several_processes("increlora")
        schedule, steps = self.schedule, moment.steps
        self.warmup = steps_of("ranks.warmup", schedule.warmup, steps)
        begin = sum(self.first.values())
        rounds = schedule.rounds(begin, len(self.deltas))
        self.interval = schedule.interval or max(1, (steps // 2 - self.warmup) // rounds)
        possible = steps // self.interval - self.warmup // self.interval
        if possible < rounds:
            warnings.warn(
                f"increlora needs {rounds} rounds to grow from {begin} to {self.target} ranks and this run has room "
                f"for {possible}: shorten ranks.warmup or ranks.interval, or raise ranks.top or ranks.add.",
                stacklevel=2,
            )
        if not self.begun:
            self.begun = True
            for key in self.deltas:
                self._reserve(key, moment)
        self._hold()

    def before_forward(self, moment: Moment) -> None:
        """Watch the changes in a step's first micro-batch, where the scores of this step count."""
        self.batches += 1
        on = self.batches == 1 and self.schedule.score == "dense" and self._measures(moment.step)
        self._watch(on)

    def penalty(self, moment: Moment) -> Tensor | None:
        """The factors' departure from orthonormality."""
        if not self.schedule.orthogonal:
            return None
        pairs = {key: pair_of(delta) for key, delta in self.deltas.items()}
        parts = [(pair, part) for key, pair in pairs.items() for part in self._chunks(key, len(pair.A))]
        term = departure(
            [pair.A[part] for pair, part in parts], [pair.B[:, part] for pair, part in parts], self.schedule.penalty
        )
        return None if term is None else self.schedule.orthogonal * term

    @torch.no_grad()
    def after_backward(self, moment: Moment) -> None:
        """Take in the scores, grow where it is due, and let new ranks have their learning rate."""
        self._watch(False)
        if self._measures(moment.step):
            self._score()
        if self._due(moment.step):
            self._grow(moment)
        for new in self.fresh:
            self._pace(new, moment)

    def after_step(self, moment: Moment) -> None:
        """Correct what has a learning rate of its own."""
        self.batches = 0
        self.pace.correct()

    def on_end(self, moment: Moment) -> None:
        """Cut the reserves that are left."""
        self._finish(moment)

    # ---- scores ---------------------------------------------------------------------------------------------------

    def _due(self, step: int) -> bool:
        return self.growing and step > self.warmup and step % self.interval == 0

    def _measures(self, step: int) -> bool:
        """Whether a step's scores count: it is one of the last before a round."""
        ahead = -step % self.interval  # steps to the next multiple of the interval
        ahead += max(0, (self.warmup - step - ahead) // self.interval + 1) * self.interval
        return self.growing and (not self.schedule.window or ahead < self.schedule.window)

    def _watch(self, on: bool) -> None:
        for key, gated in self.gated.items():
            gated.watch = (lambda G, key=key: self._note(key, G)) if on else None

    @torch.no_grad()
    def _note(self, key: str, G: Tensor) -> None:
        """Add sum |dW G| of one backward pass through a site."""
        B, A = self.gated[key].factors()
        size = (B @ A).mul_(G).abs_().sum()
        self.seen[key] = self.seen.get(key, 0.0) + size

    def _score(self) -> None:
        """Average this step's I into the scores."""
        found = []
        for key, gated in self.gated.items():
            gate = gated.gate
            if self.schedule.score == "gates":
                now = torch.zeros(()) if gate.grad is None else (gate * gate.grad).abs().sum()
            else:
                now, count = self.seen.get(key, torch.zeros(())), math.prod(gated.shape[:2])
                now = now / {"sqrt": math.sqrt(count), "mean": count, "none": 1}[self.schedule.normaliser]
            found.append(now.to(gate.device))
        now = torch.stack([n.to(found[0].device) for n in found]).cpu().double()  # a number per site
        self.mean.lerp_(now, 1 - self.schedule.beta1)
        self.spread.lerp_((now - self.mean).abs(), 1 - self.schedule.beta2)
        self.seen = {}

    # ---- growth ---------------------------------------------------------------------------------------------------

    def _grow(self, moment: Moment) -> None:
        """One round: the best `top` sites, equal ones in their order, each `add` ranks as far as the budget goes."""
        order = (self.mean * self.spread).argsort(descending=True, stable=True).tolist()
        keys = list(self.deltas)
        for key in [keys[i] for i in order[: self.top]]:
            count = min(self.add, self.target - self.total)
            if count > 0:
                active = self.active[key]
                self.active[key] = active + count
                rows = self._reserve(key, moment)
                self.fresh.append({"site": key, "gates": [active, active + count], "rows": rows, "since": moment.step})
                self._settle(key)
        if not self.growing:
            self._finish(moment)
        self._hold()

    def _reserve(self, key: str, moment: Moment) -> list[int]:
        """Make the rows there should be: the active ones and, with advance learning, `add` more; return the new."""
        delta, pair = self.deltas[key], pair_of(self.deltas[key])
        have, want = len(pair.A), self.active[key] + (self.add if self.schedule.advance else 0)
        draw = pair.draw.seeded((pair.draw.generator.initial_seed() + have) % 2**62)
        A, B = draw.normal(want - have, pair.shape.in_, std=STD), draw.normal(pair.shape.out, want - have, std=STD)
        more = {"A": A, "B": B, "gate": A.new_full((want - have,), HELD if self.schedule.advance else 0.0)}
        grow_ranks(delta, more, moment.optimizer)
        self._settle(key)
        return [have, want]

    def _settle(self, key: str) -> None:
        """Give the change the multiplier of its active ranks, or the one it started with."""
        pair = pair_of(self.deltas[key])
        count = self.active[key] if self.schedule.rescale else self.first[key]
        settle(self.deltas[key], len(pair.A), scale_of(self.alpha[key], count, pair.scaling))

    def _hold(self) -> None:
        """Let the active gates be trained and the others not."""
        for key, gated in self.gated.items():
            gated.trained_gates = self.active[key] if len(gated.gate) > self.active[key] else None

    def _finish(self, moment: Moment) -> None:
        """Cut what is not active."""
        for key, delta in self.deltas.items():
            if len(pair_of(delta).A) > self.active[key]:
                keep_ranks(delta, torch.arange(self.active[key]), moment.optimizer)
                self._settle(key)
        self._watch(False)
        self._hold()

    def _chunks(self, key: str, rows: int) -> list[slice]:
        """The ranks that the penalty takes together."""
        if self.schedule.penalty_over == "site":
            return [slice(0, rows)]
        edges = [0, *range(self.first[key], rows, self.add), rows]
        return [slice(a, b) for a, b in pairwise(edges) if b > a]

    # ---- the learning rate of new ranks ---------------------------------------------------------------------------

    def _pace(self, new: Mapping[str, Any], moment: Moment) -> None:
        """Let the gates and rows of one round move at the rate they have now."""
        if self.schedule.rate == "common":
            return
        done, left = moment.step - new["since"], moment.steps - new["since"] + 1
        own = learning_rate_factor("linear", done, left, self.schedule.rise)
        pair, gate = pair_of(self.deltas[new["site"]]), self.gated[new["site"]].gate
        group = moment.optimizer.param_groups[0]
        rate = group["lr"] / group.get("initial_lr", moment.optimizer.defaults["lr"])
        rows = slice(*new["rows"])
        self.pace.hold([pair.A[rows], pair.B[:, rows], gate[slice(*new["gates"])]], own / rate if rate else 0.0)

    # ---- resuming -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """How far every site has grown, the averages, and which ranks are new."""
        return {
            "active": dict(self.active),
            "first": dict(self.first),
            "alpha": dict(self.alpha),
            "begun": self.begun,
            "fresh": [dict(new) for new in self.fresh],
            "mean": self.mean,
            "spread": self.spread,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; the ranks themselves come with the sites' settings."""
        self.active, self.first, self.alpha = dict(state["active"]), dict(state["first"]), dict(state["alpha"])
        self.begun, self.fresh = state["begun"], [dict(new) for new in state["fresh"]]
        self.mean, self.spread = state["mean"].clone(), state["spread"].clone()
