"""CoDyRA: gates made sparse task by task; what a task has kept stays, and the next begins with fresh ranks.

    W_t = W_{t-1} + B diag(g) A        A (r, in), B (out, r), g (r,) trained for task t, multiplier 1
    g <- T_kappa(g after the step)     from the dense phase's end on, kappa rising from 0 to `max_kappa`

A task is a run. Its first `dense` share trains plainly; then the soft threshold T_kappa acts after every step, with
`levels` values of kappa evenly from 0 to max_kappa, each for equally many steps (the last also for those left over; in
a phase of fewer steps than levels they are passed through evenly). At the end of the run closed ranks are removed.

`next_task(model)` before the next run puts the ranks of the last behind the adapter's history and starts anew: A
Kaiming, B = 0, g ~ N(0, 1), at the first rank. The history is not folded into the base, which stays as it was loaded:
it stands in the adapter as frozen factors H_B H_A of all ranks kept so far, in the place of a start taken out of the
base with the sign turned, W + s (B diag(g) A - B0 A0) with B0 A0 = -H_B H_A / s. So W_t is rebuilt from W_0 and the
file, merging is exact, detaching gives W_0 back, and the export is a plain LoRA of all ranks that the tasks kept.

Choices. The threshold is the soft one; the released code's is zero below about 2 kappa (`threshold="released"`). As
there, kappa is not multiplied by the learning rate. Settings are those of its runs (500 steps a task, 0.005, half
dense), not the argument defaults. The loss of the paper's CLIP is the user's to give.
Source: arXiv:2412.01004, sections 3.2 and 3.3, and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankworks.core.delta import Delta, Factors
from rankworks.core.draw import Draw
from rankworks.core.errors import ConfigError
from rankworks.core.fields import NonNegative, Probability, Setting
from rankworks.core.forms.lowrank import LowRank
from rankworks.core.hooks import Hook, Moment
from rankworks.core.merge import original, refuse_merged
from rankworks.core.ranks.gates import start_at_random
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.ranks.surgery import cut_closed, gated_of, pair_of, replace_ranks, settle
from rankworks.core.registry import MethodSpec, build, rank
from rankworks.core.resolve import resolve
from rankworks.core.site import Shape, Site
from rankworks.core.start import Place
from rankworks.core.state import Adapter, state_of
from rankworks.linalg.threshold import shrink_


@rank("cody-ra", title="CoDyRA", year=2024, paper="arXiv:2412.01004")
class CoDyRA(RankSchedule):
    """A dense phase, then gates thresholded ever more strongly; one task after another."""

    gates: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian", "eva")  # B = 0: the history has the start's place

    dense: float = Probability(0.5, "share of the steps of a task before the threshold acts")
    max_kappa: float = NonNegative(0.005, "the threshold at the end of a task")
    levels: int = Setting(50, "values of the threshold from 0 to max_kappa", ge=2)
    threshold: Literal["soft", "released"] = Setting("soft", "the soft threshold, or the released code's")
    compact: bool = Setting(True, "remove the closed ranks at the end of a run; the output stays")

    def problems(self, settings: MethodSpec, shape: Shape) -> list[str]:
        """The history needs the place of a start taken out of the base, which LoRA's pair has."""
        spec: Any = settings
        while hasattr(spec, "inner"):
            spec = spec.inner
        if issubclass(spec.method.cls, LowRank):
            return []
        return [f"cody-ra keeps the ranks of earlier tasks in the pair, and {spec.key} has no place for them: use lora"]

    def prepare(self, delta: Delta) -> None:
        """g ~ N(0, 1) and a multiplier of 1."""
        start_at_random(delta)
        settle(delta, pair_of(delta).rank, 1.0)

    def hook(self, deltas: Mapping[str, Delta]) -> Hook:
        """The threshold."""
        return Sparsify(self, deltas)

    def kappa(self, step: int, steps: int) -> float:
        """Return the threshold after a step (from 1) of a task; 0 in the dense phase."""
        begin = int(self.dense * steps)
        done, there = step - begin - 1, steps - begin  # 0 for the first step of the sparse phase
        if done < 0:
            return 0.0
        every = there // self.levels
        level = done // every if every else done * (self.levels - 1) // max(1, there - 1)
        return self.max_kappa * min(level, self.levels - 1) / (self.levels - 1)


class Sparsify(Hook):
    """Thresholds the gates; a pure function of the step, so there is no state to keep."""

    def __init__(self, schedule: CoDyRA, deltas: Mapping[str, Delta]):
        self.schedule, self.deltas = schedule, deltas
        self.gated = [gated_of(delta) for delta in deltas.values()]

    def after_step(self, moment: Moment) -> None:
        """The proximal step of kappa |g|."""
        kappa = self.schedule.kappa(moment.step, moment.steps)
        shrink_([gated.gate for gated in self.gated], kappa, self.schedule.threshold == "released")

    def on_end(self, moment: Moment) -> None:
        """Cut what is closed."""
        for delta in self.deltas.values() if self.schedule.compact else ():
            cut_closed(delta, moment.optimizer)


@torch.no_grad()
def next_task(model: nn.Module, name: str = "default", optimizer: Optimizer | None = None) -> dict[str, int]:
    """Put what the last task kept behind the history and begin the next with fresh ranks; return what was kept.

    The model's output is the same before and after. Make the optimizer anew for the next run, or give the present one.
    Raises `ConfigError` for an adapter without `ranks="cody-ra"`, and `MergeError` while adapters are merged.
    """
    state = state_of(model)
    refuse_merged(state, "begin the next task of")
    adapter = state.adapter(name)
    if adapter.spec.ranks is None or adapter.spec.ranks.key != "cody-ra":
        raise ConfigError(
            f"the adapter {name!r} does not go from task to task: adapt with ranks='cody-ra', or put an adapter of its "
            "own on the model for every task and activate them together."
        )
    settings = {site.name: own for site, own in resolve(model, adapter.spec)}
    kept: dict[str, int] = {}
    seen: dict[int, str] = {}
    for key, delta in adapter.deltas.items():
        first = seen.setdefault(id(delta), key)
        if first == key:
            kept[key] = _remember(delta, optimizer)
            rank = settings[key].method.cls.factored_rank(settings[key])  # type: ignore[attr-defined]
            _begin(delta, rank, original(state, adapter.sites[key]), adapter, optimizer)
        else:
            kept[key] = kept[first]
    return kept


def history(delta: Delta) -> Factors | None:
    """Return the factors H_B (out, k), H_A (k, in) of all that earlier tasks kept, or None before the second."""
    pair = pair_of(delta)
    if pair.A0 is None or pair.B0 is None:
        return None
    return Factors(-pair.scale * pair.B0, pair.A0)


def _remember(delta: Delta, optimizer: Optimizer | None) -> int:
    """Put the open ranks behind the history; return how many they are."""
    cut_closed(delta, optimizer)
    pair, gate = pair_of(delta), gated_of(delta).gate
    if not len(gate):
        return 0
    B, A = -pair.B, gate.to(pair.A.dtype).unsqueeze(1) * pair.A
    pair.B0 = pair.stored(B if pair.B0 is None else torch.cat([pair.B0, B], dim=1))
    pair.A0 = pair.stored(A if pair.A0 is None else torch.cat([pair.A0, A]))
    return len(gate)


def _begin(delta: Delta, rank: int, site: Site, adapter: Adapter, optimizer: Optimizer | None) -> None:
    """Start fresh ranks, whose numbers depend on the seed, the site and how much is behind them."""
    pair = pair_of(delta)
    behind = 0 if pair.A0 is None else len(pair.A0)
    draw = Draw(adapter.spec.seed, f"{site.name}: behind {behind}", pair.A.device, pair.A.dtype)
    key = adapter.spec.init.key if adapter.spec.init.key == "gaussian" else "default"  # no data is measured again
    init: Any = build("init", key)
    start = init.method.cls(init).start(Place(site.weight, rank, 1.0, draw, delta.kind))
    fresh: dict[str, Tensor] = {"A": start.A, "B": start.B, "gate": draw.normal(rank)}
    replace_ranks(delta, fresh, optimizer)
    settle(delta, rank, 1.0)
