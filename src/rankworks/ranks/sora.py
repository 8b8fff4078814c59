"""SoRA: a gate per rank, made sparse by a proximal step after every update.

    W' = W + s B diag(g) A        A (r, in), B (out, r), g (r,) trained;  s = alpha/r of the start, constant
    g <- T_xi(g after the step)   T_xi(x) = sign(x) max(|x| - xi, 0),  xi = strength * the gates' learning rate

so that gates become zero to the bit: gradient steps on the loss alone, proximal ones on strength ||g||_1. A closed
gate still gets a gradient and may open again; at the end of a run the closed ranks are removed, the output unchanged.
The start is A Kaiming, B = 0, g ~ N(0, 1); a start that lies elsewhere than in a factor of zeros (PiSSA) has g = 1.

`stages` > 1 trains at one strength after another, from `strength` to `strongest`, each from where the last ended and
with the learning rate begun anew: the first for the share `first` of the steps, the others for equal parts of the rest.
With `keep` the adapter at the end of every stage is saved in a folder `stage-1`, ...: one model per sparsity.

Choices. The threshold is the operator the paper writes; the released code's is zero below about 2 xi
(`threshold="released"`, linalg/threshold.py). The paper multiplies xi by the learning rate, the released optimizer does
not (`times_rate=False`), and adds an L1 term to the loss: `l1` times the mean of |g|, off by default, since the
proximal step is that term. Without a number `strength` is the released code's 1e-3 without the rate, and 1 with it: at
the released rate of 8e-4 its 3e-4 to 7e-4 without the rate are 0.4 to 0.9 with it. The gates' learning rate is
`gate_rate` times the run's, without a parameter group of their own (core/ranks/). The released code goes through its
strengths with the learning rate it ended with; here every stage has the schedule `restart` ("constant" leaves the
run's own schedule alone).
Source: arXiv:2311.11696, sections 3.2 and 3.3, algorithm 1, and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError
from rankworks.core.fields import NonNegative, Positive, Setting
from rankworks.core.hooks import Hook, Moment
from rankworks.core.ranks.gates import start_at_random
from rankworks.core.ranks.pace import Pace
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.ranks.surgery import cut_closed, gated_of
from rankworks.core.rates import learning_rate_factor
from rankworks.core.registry import rank
from rankworks.core.state import state_of
from rankworks.core.store import save
from rankworks.linalg.threshold import shrink_


@rank("sora", title="SoRA", year=2023, paper="arXiv:2311.11696")
class SoRA(RankSchedule):
    """Gates thresholded after every step."""

    gates: ClassVar[bool] = True

    strength: float | None = Setting(
        None, "lambda, weight of ||g||_1: the threshold, or that per unit of learning rate; None: 1e-3, or 1", ge=0
    )
    threshold: Literal["soft", "released"] = Setting("soft", "the soft threshold, or the released code's")
    times_rate: bool = Setting(True, "multiply the threshold by the gates' learning rate, as the paper does")
    l1: float = NonNegative(0.0, "weight of the mean of |g| in the loss, as the released code adds it")
    gate_rate: float = Positive(1.0, "learning rate of the gates, as a multiple of the run's")
    stages: int = Setting(1, "strengths, one after another", ge=1)
    strongest: float | None = Setting(None, "strength of the last stage; with several stages", gt=0)
    spacing: Literal["linear", "geometric", "log"] = Setting("linear", "how the strengths between lie")
    first: float = Setting(0.5, "share of the steps for the first of several stages", gt=0, lt=1)
    restart: Literal["linear", "cosine", "constant"] = Setting("linear", "how the rate falls within every stage")
    keep: str | None = Setting(None, "folder in which the adapter is saved at the end of every stage")
    compact: bool = Setting(True, "remove the closed ranks at the end of a run; the output stays")

    def prepare(self, delta: Delta) -> None:
        """g ~ N(0, 1)."""
        start_at_random(delta)

    def strengths(self) -> list[float]:
        """Return the strength of every stage. Raises `ConfigError` where the last is missing or no larger."""
        weakest = self.strength if self.strength is not None else 1.0 if self.times_rate else 1e-3
        if self.stages == 1:
            return [weakest]
        if self.strongest is None or self.strongest <= weakest:
            raise ConfigError(
                f"sora goes from ranks.strength {weakest:g} to ranks.strongest {self.strongest} in {self.stages} "
                "stages: give a strongest that is larger."
            )
        if self.spacing == "geometric" and not weakest:
            raise ConfigError(
                "no geometric sequence starts at 0: give ranks.strength above 0, or ranks.spacing='linear'."
            )
        return spaced(weakest, self.strongest, self.stages, self.spacing)

    def hook(self, deltas: Mapping[str, Delta]) -> Hook:
        """The proximal steps."""
        return Proximal(self, deltas)


def spaced(low: float, high: float, count: int, spacing: str) -> list[float]:
    """Return `count` rising numbers from low to high: equal steps, equal ratios, or steps that shrink as log does."""
    parts = [i / (count - 1) for i in range(count)]
    if spacing == "linear":
        return [low + (high - low) * p for p in parts]
    if spacing == "geometric":
        return [low * (high / low) ** p for p in parts]
    low_exp, high_exp = math.exp(low), math.exp(high)
    return [math.log(low_exp + (high_exp - low_exp) * p) for p in parts]


class Proximal(Hook):
    """Shrinks the gates after every step; a pure function of the step, so there is no state to keep."""

    def __init__(self, schedule: SoRA, deltas: Mapping[str, Delta]):
        self.schedule, self.deltas = schedule, deltas
        self.gated = [gated_of(delta) for delta in deltas.values()]
        self.strengths, self.pace, self.rate = schedule.strengths(), Pace(), 0.0

    def on_start(self, moment: Moment) -> None:
        """Raise `ConfigError` where the run is too short for its stages."""
        if len(set(self.ends(moment.steps))) < len(self.strengths) or self.ends(moment.steps)[0] < 1:
            raise ConfigError(
                f"{self.schedule.stages} stages do not fit into {moment.steps} steps: lower ranks.stages or "
                "ranks.first, or train longer."
            )

    def ends(self, steps: int) -> list[int]:
        """Return the last step of every stage."""
        count = len(self.strengths)
        if count == 1:
            return [steps]
        first = int(self.schedule.first * steps)
        return [first + (steps - first) * i // (count - 1) for i in range(count)]

    def stage(self, step: int, steps: int) -> tuple[int, int, int]:
        """Return the stage (from 0) of a step, the step within it (from 0) and its number of steps."""
        ends = self.ends(steps)
        number = next(i for i, end in enumerate(ends) if step <= end)
        begin = ends[number - 1] if number else 0
        return number, step - begin - 1, ends[number] - begin

    def penalty(self, moment: Moment) -> Tensor | None:
        """l1 times the mean of |g|."""
        gates = [gated.gate for gated in self.gated if len(gated.gate)]
        if not self.schedule.l1 or not gates:
            return None
        return self.schedule.l1 * torch.cat([g.to(gates[0].device) for g in gates]).abs().mean()

    def after_backward(self, moment: Moment) -> None:
        """Set the stage's learning rate, and let the gates have theirs."""
        optimizer, schedule = moment.optimizer, self.schedule
        if len(self.strengths) > 1 and schedule.restart != "constant":
            _, done, steps = self.stage(moment.step, moment.steps)
            factor = learning_rate_factor(schedule.restart, done, steps)
            for group in optimizer.param_groups:
                group["lr"] = group.get("initial_lr", optimizer.defaults["lr"]) * factor
        gates = [gated.gate for gated in self.gated]
        group = next(g for g in optimizer.param_groups if any(p is gates[0] for p in g["params"]))
        self.rate = float(group["lr"]) * schedule.gate_rate
        self.pace.hold(gates, schedule.gate_rate)

    def after_step(self, moment: Moment) -> None:
        """The proximal step; at the end of a stage its adapter may be kept."""
        self.pace.correct()
        number, done, steps = self.stage(moment.step, moment.steps)
        xi = self.strengths[number] * (self.rate if self.schedule.times_rate else 1.0)
        shrink_([gated.gate for gated in self.gated], xi, self.schedule.threshold == "released")
        if self.schedule.keep is not None and done == steps - 1:
            save(moment.model, Path(self.schedule.keep) / f"stage-{number + 1}", self._name(moment))

    def _name(self, moment: Moment) -> str:
        """The name of the adapter that the hook's deltas belong to."""
        mine = {id(delta) for delta in self.deltas.values()}
        adapters = state_of(moment.model).adapters_by_name
        return next(n for n, a in adapters.items() if any(id(d) in mine for d in a.deltas.values()))

    def on_end(self, moment: Moment) -> None:
        """Cut what is closed."""
        for delta in self.deltas.values() if self.schedule.compact else ():
            cut_closed(delta, moment.optimizer)
