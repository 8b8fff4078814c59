"""Equal budgets: what every arm costs by `plan`, and the ranks at which they cost the same.

Parameters: the rank at which a method trains a number nearest to the budget. Memory: the highest rank whose planned
peak is within it. Both go by the adapter's own numbers; a head that is trained in full is the same for all and is left
out. An arm that cannot meet the budget is left out with the distance; if none can, the command is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankworks.compare.arms import Arm, Refused
from rankworks.compare.config import BudgetConfig
from rankworks.core.errors import ConfigError, RankworksError
from rankworks.core.progress import track
from rankworks.core.spec import AdaptSpec
from rankworks.core.targets import find_modules
from rankworks.plan import Plan, format_bytes, parse_bytes, rank_for_budget
from rankworks.plan.compared import HIGHEST_RANK, with_rank
from rankworks.plan.make import Step, plan_on, plan_whole
from rankworks.plan.source import Source, open_source
from rankworks.train.config import OptimConfig, RunConfig
from rankworks.train.quantising import products
from rankworks.train.searching.search import must_search, widest


@dataclass(frozen=True)
class Cost:
    """What an arm takes by its plan: parameters trained, the head's left out of the second; bytes; operations."""

    trainable: int
    adapter: int
    peak_bytes: int
    flops: float


class Planner:
    """Plans arms on one model, of which it keeps a copy without numbers."""

    def __init__(self, model: nn.Module, config: RunConfig, sequence: int, heads: list[str]):
        self.source: Source = open_source(model)
        self.config, self.sequence, self.heads = config, sequence, heads
        self.of_heads = sum(p.numel() for m in find_modules(self.source.model, heads).values() for p in m.parameters())

    def cost(self, arm: Arm) -> Cost:
        """Return what an arm costs. Raises `RankworksError` where its method cannot take the model."""
        if arm.adapt is None:
            whole = plan_whole(self.source, self._step(arm), None)
            return Cost(whole.trainable_parameters, whole.trainable_parameters, whole.peak_bytes, whole.step_flops)
        spec = arm.spec(full=self.heads)
        if must_search(spec):
            spec = widest(self.source.model, spec)
        self._check_base(spec)
        plan: Plan = plan_on(self.source, spec, self._step(arm), None)
        adapter = plan.trainable_parameters - (self.of_heads if arm.adapt.get("full") is None else 0)
        return Cost(plan.trainable_parameters, adapter, plan.peak_bytes, plan.step_flops)

    def _check_base(self, spec: AdaptSpec) -> None:
        """Raise where a start makes good what quantising the base lost, and the base is not quantised."""
        quantised = self.config.model is not None and self.config.model.quantise is not None
        if not quantised and products(self.source.model, spec):
            raise ConfigError(
                f"{spec.init.key} starts from what quantising the base lost, and this base is not quantised: give "
                "model: {quantise: nf4}, for all methods."
            )

    def _step(self, arm: Arm) -> Step:
        optim, train = OptimConfig(**arm.optim), self.config.train
        method: Any = {"optimizer": optim.name, **optim.settings()}
        return Step(method, train.batch_size, self.sequence, train.gradient_checkpointing, layerwise=optim.layerwise)

    def at_rank(self, arm: Arm, rank: int) -> dict[str, Any]:
        """Return the adapt block of an arm at another rank."""
        spec = arm.spec()
        changed = spec.model_copy(update={"delta": with_rank(spec.delta, rank)}).flat()
        return {k: v for k, v in changed.items() if k != "seed"}

    def nearest_rank(self, arm: Arm, count: int) -> int:
        """Return the rank at which an arm trains a number of parameters nearest to `count`."""
        settings = {k: v for k, v in (arm.adapt or {}).items() if k != "delta"}
        delta: Any = (arm.adapt or {})["delta"]
        return rank_for_budget(self.source.model, delta, count, **settings)

    def highest_rank(self, arm: Arm, fits: Callable[[Cost], bool]) -> int:
        """Return the highest rank whose cost fits, 0 if none does, by halving: peaks rise with the rank."""
        low, high = 0, 1
        while high <= HIGHEST_RANK and self._fits(arm, high, fits):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(arm, middle, fits) else (low, middle)
        return low

    def _fits(self, arm: Arm, rank: int, fits: Callable[[Cost], bool]) -> bool:
        try:
            return fits(self.cost(_changed(arm, self.at_rank(arm, rank))))
        except RankworksError:  # a rank that the sites do not have
            return False


def plan_arms(
    planner: Planner, arms: list[Arm], budget: BudgetConfig, baseline: str
) -> tuple[list[Arm], dict[str, Cost], list[Refused]]:
    """Return the arms that can run, at the ranks the budget asks for, their costs, and the others with the reason."""
    kept: list[Arm] = []
    costs: dict[str, Cost] = {}
    refused: list[Refused] = []
    for arm in track(arms, "planning the arms"):
        try:
            costs[arm.label] = planner.cost(arm)
            kept.append(arm)
        except RankworksError as error:
            refused.append(Refused(arm.label, arm.key, str(error)))
    if budget.equal not in ("parameters", "memory") or not kept:
        return kept, costs, refused
    if budget.value is None and baseline not in costs:
        reason = next(r.reason for r in refused if r.label == baseline)
        raise ConfigError(f"budget: the baseline {baseline} sets its value and cannot run: {reason} Give budget.value.")
    make = _equal_parameters if budget.equal == "parameters" else _equal_memory
    equal: list[Arm] = []
    for arm in track(kept, f"ranks of equal {budget.equal}"):
        if budget.value is None and arm.label == baseline:
            equal.append(arm)
            continue
        try:
            same = make(planner, arm, budget, costs, baseline)
            costs[arm.label] = planner.cost(same)
            equal.append(same)
        except RankworksError as error:
            refused.append(Refused(arm.label, arm.key, str(error)))
    if not equal:
        told = " ".join(f"{r.label}: {r.reason}" for r in refused)
        raise ConfigError(f"budget: no method meets {_shown(budget)}. {told}")
    return equal, costs, refused


def _equal_parameters(planner: Planner, arm: Arm, budget: BudgetConfig, costs: dict[str, Cost], baseline: str) -> Arm:
    """Return the arm at the rank that trains a number nearest to the budget."""
    wanted = int(budget.value) if budget.value is not None else costs[baseline].adapter
    try:
        if arm.adapt is None:
            raise ConfigError("the whole model has no rank.")
        rank = planner.nearest_rank(arm, wanted)
        changed = _changed(arm, planner.at_rank(arm, rank))
        note = f"rank {rank}"
    except ConfigError:  # no rank: as it is, where that is near enough
        changed, note = _changed(arm, arm.adapt), "no rank to choose"
    count = planner.cost(changed).adapter
    off = count / wanted - 1
    if abs(off) > budget.tolerance:
        raise ConfigError(
            f"the nearest to {wanted:,} parameters that {arm.label} trains is {count:,} ({note}), {off:+.0%}; "
            f"budget.tolerance is {budget.tolerance:.0%}."
        )
    changed.notes.append(f"{note}: {count:,} parameters, {off:+.1%} of the {wanted:,} asked for")
    return changed


def _equal_memory(planner: Planner, arm: Arm, budget: BudgetConfig, costs: dict[str, Cost], baseline: str) -> Arm:
    """Return the arm at the highest rank whose planned peak is within the budget."""
    wanted = parse_bytes(budget.value) if budget.value is not None else costs[baseline].peak_bytes
    if arm.adapt is None or not _ranked(arm):
        peak = planner.cost(arm).peak_bytes
        if arm.adapt is None or peak > wanted:
            raise ConfigError(f"{arm.label} has no rank to lower and would take {format_bytes(peak)} at its peak.")
        return _changed(arm, arm.adapt)
    rank = planner.highest_rank(arm, lambda cost: cost.peak_bytes <= wanted)
    if rank == 0:
        least = planner.cost(_changed(arm, planner.at_rank(arm, 1))).peak_bytes
        raise ConfigError(
            f"{arm.label} takes {format_bytes(least)} at its peak with rank 1, more than {format_bytes(wanted)}."
        )
    changed = _changed(arm, planner.at_rank(arm, rank))
    peak = planner.cost(changed).peak_bytes
    changed.notes.append(f"rank {rank}: {format_bytes(peak)} planned, of {format_bytes(wanted)} allowed")
    return changed


def _ranked(arm: Arm) -> bool:
    delta: Any = arm.spec().delta
    while delta is not None:
        if "rank" in type(delta).model_fields:
            return True
        delta = getattr(delta, "inner", None)
    return False


def _changed(arm: Arm, adapt: dict[str, Any] | None) -> Arm:
    return Arm(arm.label, arm.axis, arm.key, arm.title, arm.paper, adapt, arm.optim, arm.tune, list(arm.notes))


def _shown(budget: BudgetConfig) -> str:
    if budget.value is None:
        return f"the baseline's {budget.equal}"
    if budget.equal == "memory":
        return f"{format_bytes(parse_bytes(budget.value))} of memory"
    return f"{float(budget.value):,.0f} {budget.equal}"
