"""AdaLoRA: a shrinking budget of ranks for the whole model, kept by those that the loss depends on.

    W' = W + s B diag(g) A        A (r, in), B (out, r), g (r,) trained;  s = alpha/r of the start, constant

Every rank has a score S_i = s(g_i) + mean_j s(B_ji) + mean_j s(A_ij), s(w) = I'(w) U'(w) (core/ranks/). After a
step the gates of all but the b(t) highest of the whole model are set to zero; they still get a gradient and may come
back at the next masking. With n ranks at the start, m at the end and the steps counted from 1,

    b(t) = n                                                                 t <= warmup
    b(t) = floor(m + (n - m) (1 - (t - warmup)/(steps - final - warmup))^3)  every `interval` steps
    b(t) = m                                                                 t >= steps - final: a mask that stays

Added to the loss is `orthogonal` times what the factors lack of orthonormality (core/ranks/). The start is g = 0
and A, B ~ N(0, 0.02^2); an initialiser that gives a factor keeps it, and one that takes its start out of the base
keeps both with g = 1, as do factors that are not a trained pair (vera, lora-xs): their gates alone are scored.

Choices. The cubic is the code's: the one printed in the paper's appendix begins above n. It is computed in integers, so
b(t) is exact. Scores use the weights after the step and the gradient from before it, as both codes do, and clipped
gradients, as any run of theirs. Equal scores are ordered by site and index, so that exactly b(t) gates survive; the
released code drops all that are equal. s is alpha/r, without the code's 1e-5. The penalty is the released codes' mean
of norms; the paper's sum of squares grows with the model, `penalty="paper"`. Without settings 0.1 of the steps
precede the pruning and half of them follow it, like the paper's tables; the common library has 0 for both.
`score="sensitivity"` is I' alone, for which a mean per rank is kept and nothing per number, `"magnitude"` |g|.
Source: arXiv:2303.10512, equations 3 to 13 and section 3.3, and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError
from rankworks.core.fields import NonNegative, Setting
from rankworks.core.hooks import Hook, Moment
from rankworks.core.ranks.gates import start_as_svd, steps_of
from rankworks.core.ranks.orthogonal import Form, departure
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.ranks.sensitivity import Smoothed, per_rank, slopes
from rankworks.core.ranks.surgery import cut_closed, gated_of, ranked
from rankworks.core.registry import MethodSpec, rank
from rankworks.core.site import Site


@rank("adalora", title="AdaLoRA", year=2023, paper="arXiv:2303.10512")
class AdaLoRA(RankSchedule):
    """A global budget of gates, pruned by importance along a cubic."""

    gates: ClassVar[bool] = True

    target: float = Setting(
        2 / 3, "ranks at the end: a share of those at the start below 1, else their average number per site", gt=0
    )
    warmup: float = Setting(0.1, "steps without pruning at first: a share of all below 1, else a number", ge=0)
    final: float = Setting(0.5, "steps with a fixed mask at the end: a share of all below 1, else a number", ge=0)
    interval: int = Setting(1, "steps from one masking to the next", ge=1)
    beta1: float = Setting(0.85, "decay of the averaged sensitivity", ge=0, lt=1)
    beta2: float = Setting(0.85, "decay of its averaged uncertainty", ge=0, lt=1)
    score: Literal["uncertainty", "sensitivity", "magnitude"] = Setting("uncertainty", "what makes a rank important")
    orthogonal: float = NonNegative(0.1, "weight of the penalty for factors that are not orthonormal")
    penalty: Form = Setting("released", "the penalty: mean of norms (released code) or sum of their squares (paper)")
    compact: bool = Setting(True, "remove the pruned ranks at the end of a run; the output stays")

    def check(self, resolved: Sequence[tuple[Site, MethodSpec]]) -> None:
        """Raise `ConfigError` where the budget would have to grow."""
        start, sites = sum(_gates(settings, site) for site, settings in resolved), len(resolved)
        if self.budget(start, sites) > start:
            raise ConfigError(
                f"adalora prunes from {start} ranks at {sites} sites to ranks.target = {self.target:g} at each, which "
                f"would be {self.budget(start, sites)}: raise rank, lower ranks.target, or grow with ranks=increlora."
            )

    def budget(self, start: int, sites: int) -> int:
        """Return how many ranks the sites have between them at the end, at least one."""
        return max(1, round(self.target * (start if self.target < 1 else sites)))

    def prepare(self, delta: Delta) -> None:
        """Gates of zero between two live factors."""
        start_as_svd(delta, self.init)

    def hook(self, deltas: Mapping[str, Delta]) -> Hook:
        """The budget."""
        return Budget(self, deltas)


def _gates(settings: MethodSpec, site: Site) -> int:
    """How many gates a site of these settings has."""
    spec: Any = settings
    while spec.key != "gated":
        spec = spec.inner
    return spec.method.cls.gates(spec, site.shape)


def budget_at(step: int, start: int, end: int, warmup: int, final: int, steps: int) -> int:
    """Return b(step), how many of `start` ranks a model may have after it; `end` of them at last. In integers."""
    last = steps - final
    if step <= warmup:
        return start
    if step >= last:
        return end
    whole, left = last - warmup, last - step
    return (end * whole**3 + (start - end) * left**3) // whole**3


class Budget(Hook):
    """Scores every rank in every step, and masks those beyond the budget."""

    def __init__(self, schedule: AdaLoRA, deltas: Mapping[str, Delta]):
        self.schedule, self.deltas = schedule, deltas
        self.gated = {key: gated_of(delta) for key, delta in deltas.items()}
        self.holders = {key: _scored(delta) for key, delta in deltas.items()}
        self.smoothed = Smoothed(schedule.beta1, schedule.beta2)
        self.sensitivity: dict[str, Tensor] = {}  # I' by site, (ranks,), where that is all a score needs
        self.mask: Tensor | None = None  # (all ranks,) in the final phase
        self.start = sum(len(gated.gate) for gated in self.gated.values())
        self.end = schedule.budget(self.start, len(deltas))
        self.warmup = self.last = 0

    def on_start(self, moment: Moment) -> None:
        """Lay out the phases. Raises `ConfigError` where they do not fit the run."""
        self.warmup = steps_of("ranks.warmup", self.schedule.warmup, moment.steps)
        self.last = moment.steps - steps_of("ranks.final", self.schedule.final, moment.steps)
        if self.warmup >= self.last:
            raise ConfigError(
                f"adalora has {self.warmup} steps of warmup and a fixed mask from step {self.last} on, in a run of "
                f"{moment.steps}: shorten ranks.warmup or ranks.final, or train longer, so that it can prune between."
            )

    def penalty(self, moment: Moment) -> Tensor | None:
        """The factors' departure from orthonormality."""
        weight = self.schedule.orthogonal
        pairs: list[Any] = [d.pair for d in self.deltas.values() if d.pair is not None]
        term = departure([p.A for p in pairs], [p.B for p in pairs], self.schedule.penalty) if weight else None
        return None if term is None else weight * term

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Score, and mask where it is due."""
        step, steps = moment.step, moment.steps
        if self.mask is None and (step < self.last or step == 1):
            self._score()
        if step >= self.last:
            if self.mask is None:
                self.mask = self._mask(self.end)
                self.smoothed, self.sensitivity = Smoothed(0, 0), {}
            self._apply(self.mask)
        elif step > self.warmup and step % self.schedule.interval == 0:
            self._apply(self._mask(budget_at(step, self.start, self.end, self.warmup, steps - self.last, steps)))

    def on_end(self, moment: Moment) -> None:
        """Cut what the mask closed."""
        for delta in self.deltas.values() if self.schedule.compact else ():
            cut_closed(delta, moment.optimizer)

    # ---- scores ---------------------------------------------------------------------------------------------------

    def _named(self) -> dict[str, Tensor]:
        """Every scored tensor as it is now."""
        return {f"{key}.{n}": m.get_parameter(n) for key, held in self.holders.items() for n, m in held.items()}

    def _score(self) -> None:
        if self.schedule.score == "uncertainty":
            self.smoothed.update(self._named())
        elif self.schedule.score == "sensitivity":
            named = self._named()
            found = dict(zip(named, slopes(list(named.values())), strict=True))
            for key, held in self.holders.items():
                now = torch.stack([per_rank(found[f"{key}.{name}"], name) for name in held]).sum(dim=0)
                self.sensitivity.setdefault(key, torch.zeros_like(now)).lerp_(now, 1 - self.schedule.beta1)

    def scores(self) -> list[Tensor]:
        """Return S (ranks,) of every site as it stands."""
        if self.schedule.score == "uncertainty":
            return [self.smoothed.scores(key, list(names)) for key, names in self.holders.items()]
        if self.schedule.score == "sensitivity":
            return [self.sensitivity[key] for key in self.holders]
        return [gated.gate.detach().abs() for gated in self.gated.values()]

    def _mask(self, keep: int) -> Tensor:
        """Return which ranks survive, (all ranks,): the `keep` highest scores, of equal ones the first."""
        scores = self.scores()
        flat = torch.cat([score.to(scores[0].device) for score in scores])
        mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        mask[flat.argsort(descending=True, stable=True)[:keep]] = True
        return mask

    def _apply(self, mask: Tensor) -> None:
        gates = [gated.gate.detach() for gated in self.gated.values()]
        closed = (~mask).split([len(gate) for gate in gates])
        for gate, shut in zip(gates, closed, strict=True):
            gate.masked_fill_(shut.to(gate.device), 0.0)

    # ---- resuming -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The averages, or the mask once it is fixed."""
        return {"smoothed": self.smoothed.state_dict(), "sensitivity": dict(self.sensitivity), "mask": self.mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.smoothed.load_state_dict(state["smoothed"], self._named())
        self.sensitivity = {key: t.to(self.gated[key].gate.device) for key, t in state["sensitivity"].items()}
        self.mask = state["mask"]


def _scored(delta: Delta) -> dict[str, nn.Module]:
    """The tensors whose sensitivity counts, with their holders: a trained pair's and its gates, else the gates."""
    if delta.pair is not None:
        return {name: module for name, (module, _) in ranked(delta).items()}
    return {"gate": gated_of(delta)}
