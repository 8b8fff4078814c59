"""LoRA-Squeeze in training (In-Squeeze): stages of falling rank, the change squeezed at every boundary.

    r_0 > r_1 > ... > k        at the end of stage j:  s B A  <-  svd_{r_{j+1}}(s B A),  s = alpha/r constant

By default the rank halves down to `target` (64, 32, 16, 8: four stages, the last one trains at the target), in stages
of equal length that sum to the run's steps. `weighting` makes a stage's share proportional to its rank, the root of
it, or the inverse of either; no stage is shorter than `floor`, 200 steps in the paper (left out, it is 200 or, in a run
too short for that, an equal share). With `final=False` there is no stage at the target: the last squeeze is at the end
of the run, and with `through=[]` this is Post-Squeeze (`rw.squeeze` does the same to a finished adapter).

The paper says nothing of alpha and of the optimizer. alpha follows the rank, since only a constant s leaves the
function continuous at a boundary; moments are those of coordinates that are gone, so they are reset, or carried over
with `moments="rotate"` (core/ranks/); the learning-rate schedule runs on. A start taken out of the base is a part
of the change and gone after the first squeeze, whose moments are reset.
Source: arXiv:2602.10993; stage weightings are those of an independent implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

from rankworks.core.delta import Delta
from rankworks.core.errors import TrainingError
from rankworks.core.fields import Setting
from rankworks.core.hooks import Hook, Moment
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.ranks.squeeze import Squeezer
from rankworks.core.ranks.surgery import pair_of, refuse_several_processes
from rankworks.core.registry import MethodSpec, rank
from rankworks.core.site import Shape

FLOOR = 200  # steps of the paper's shortest stage
WEIGHTS = {"equal": 0.0, "rank": 1.0, "sqrt": 0.5, "inverse": -1.0, "inverse-sqrt": -0.5}
"""A stage's share of the run is proportional to its rank to this power."""


@rank("lora-squeeze", title="LoRA-Squeeze", year=2026, paper="arXiv:2602.10993")
class LoRASqueeze(RankSchedule):
    """Falling ranks, each stage started from the best approximation of the one before."""

    pairs: ClassVar[bool] = True

    target: int | None = Setting(None, "rank at the end; None: an eighth of the largest", ge=1)
    through: list[int] | None = Setting(None, "ranks between the first and the target, falling; None: halves")
    final: bool = Setting(True, "train a last stage at the target; False squeezes to it at the end of the run")
    weighting: Literal["equal", "rank", "sqrt", "inverse", "inverse-sqrt"] = Setting(
        "equal", "what a stage's length is proportional to, as a function of its rank"
    )
    floor: int | None = Setting(None, "fewest steps of a stage; None: 200, or less where the run is short", ge=1)
    svd: Literal["exact", "randomised"] = Setting("exact", "how the singular vectors are found")
    oversample: int = Setting(10, "test vectors beyond the rank, when randomised", ge=0)
    iterations: int = Setting(2, "power iterations, when randomised", ge=0)
    moments: Literal["reset", "rotate"] = Setting("reset", "what becomes of the optimizer's moments")
    seed: int = Setting(0, "seed of test vectors and of ranks that have nothing to hold", ge=0)

    def path(self, source: int) -> list[int]:
        """Return the ranks from the largest site's on down to the target."""
        target = self.target or max(1, source // 8)
        if self.through is not None:
            between = list(self.through)
        else:
            between = [r for r in (source >> j for j in range(1, source.bit_length())) if r > target]
        return [source, *between, target] if source > target else [source]

    def problems(self, settings: MethodSpec, shape: Shape) -> list[str]:
        """The ranks must fall."""
        source = settings.method.cls.factored_rank(settings)  # type: ignore[attr-defined]
        if source is None:
            return []
        if self.target is not None and source < self.target:
            return [
                f"lora-squeeze starts from rank {source}, below its target {self.target}: raise the rank, or lower "
                "ranks.target"
            ]
        given = [*(self.through or []), self.target or 1]
        if self.through and (self.target is None or any(a <= b for a, b in pairwise(given))):
            return [
                f"lora-squeeze goes through falling ranks down to ranks.target, and is given {self.through} and "
                f"{self.target}: order them, and give the target"
            ]
        return []

    def hook(self, deltas: Mapping[str, Delta]) -> Hook:
        """The stages."""
        return Stages(self, deltas)


class Stages(Hook):
    """Squeezes at every boundary. Its state is where it began and how many squeezes are done."""

    def __init__(self, schedule: LoRASqueeze, deltas: Mapping[str, Delta]):
        self.schedule, self.deltas = schedule, dict(deltas)
        self.source = max((pair_of(d).rank for d in deltas.values()), default=0)
        self.done = 0
        self.squeezer = Squeezer(
            schedule.svd, schedule.oversample, schedule.iterations, schedule.moments, schedule.seed
        )

    @property
    def ranks(self) -> list[int]:
        """The ranks of all stages, the target included where it has none."""
        return self.schedule.path(self.source)

    def lengths(self, steps: int) -> list[int]:
        """Return the steps of every stage of a run of so many."""
        trained = self.ranks if self.schedule.final or len(self.ranks) == 1 else self.ranks[:-1]
        return stage_lengths(steps, trained, self.schedule.weighting, self.schedule.floor)

    def on_start(self, moment: Moment) -> None:
        """Refuse a run too short for its stages, and one whose tensors cannot change shape."""
        if len(self.ranks) > 1:
            refuse_several_processes("lora-squeeze")
        self.lengths(moment.steps)

    def after_step(self, moment: Moment) -> None:
        """Squeeze at the end of a stage."""
        ends = list(accumulate(self.lengths(moment.steps)))
        if self.done + 1 < len(self.ranks) and self.done < len(ends) and moment.step == ends[self.done] < moment.steps:
            self._squeeze(moment)

    def on_end(self, moment: Moment) -> None:
        """Squeeze to a target at which no stage trains."""
        if not self.schedule.final and self.done + 1 < len(self.ranks):
            self._squeeze(moment)

    def _squeeze(self, moment: Moment) -> None:
        self.done += 1
        for name, delta in self.deltas.items():
            rank = min(pair_of(delta).rank, self.ranks[self.done])
            if rank < pair_of(delta).rank:
                self.squeezer.squeeze(delta, rank, name, moment.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The first rank, and how many squeezes are done."""
        return {"source": self.source, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a start taken out of the base was gone with the first squeeze."""
        self.source, self.done = state["source"], state["done"]
        for pair in map(pair_of, self.deltas.values()) if self.done else ():
            pair.A0 = pair.B0 = None


def stage_lengths(steps: int, ranks: Sequence[int], weighting: str = "equal", floor: int | None = None) -> list[int]:
    """Return whole numbers of steps that sum to `steps`, none below the floor, as near as can be to their shares.

    Raises `TrainingError` where the run is too short.
    """
    count = len(ranks)
    least = min(FLOOR, steps // count) if floor is None else floor
    if steps < count * max(least, 1):
        raise TrainingError(
            f"the run has {steps} steps, too few for {count} stages of at least {max(least, 1)} (ranks "
            f"{', '.join(map(str, ranks))}): train longer, lower ranks.floor, or give fewer ranks in ranks.through."
        )
    weights = [float(r) ** WEIGHTS[weighting] for r in ranks]
    free, held = set(range(count)), 0
    while free:  # stages whose share is below the floor get the floor, and the others share what is left
        total = sum(weights[i] for i in free)
        short = {i for i in free if (steps - held) * weights[i] / total < least}
        if not short:
            break
        free -= short
        held += least * len(short)
    total = sum(weights[i] for i in free)
    exact = [(steps - held) * w / total if i in free else float(least) for i, w in enumerate(weights)]
    lengths = [int(e) for e in exact]
    by_rest = sorted(range(count), key=lambda i: (lengths[i] - exact[i], i))
    for i in by_rest[: steps - sum(lengths)]:
        lengths[i] += 1
    return lengths
