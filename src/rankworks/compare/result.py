"""What a comparison gives back: a leaderboard, and everything it was made of, as plain data.

    CompareResult
      leaderboard    a Row per arm that ran, best first; arms that failed stand at the end with their reason
      arms           an ArmResult per row, by the same label: its recipe, every trial and every rerun with its curves
      skipped        arms that were not run, with the reason

Rates and shares are fractions (accuracy 0.93), sizes bytes, times seconds. A number that was not measured is None, and
so is a loss that was not finite: every field stands in JSON as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankworks.compare.words import unit
from rankworks.core.errors import StoreError
from rankworks.core.hub.byte_level import BYTES
from rankworks.core.version import __version__
from rankworks.train.result import Confusion

FORMAT = 1
"""Version of result.json; a reader refuses another one."""


@dataclass
class Row:
    """One line of the leaderboard.

    method: the arm's label. rank: 1 is best; arms that cannot be told apart from the best share rank 1 (`tie`), the
    others stand behind as many arms as are shown to be better. None for an arm that failed.
    mean, low, high: the test metric over seeds and test records, with its interval. difference (low, high): paired
    difference to the baseline, positive is better than the baseline whatever the metric; p: its two-sided p-value,
    p_corrected: after Holm's correction over all rows. lr: the tuned learning rate.
    memory_bytes: measured peak of a rerun; planned_bytes: the peak that `plan` estimates. optimizer_bytes: what the
    optimizer kept at the end of a rerun, all tensors of its state but step counters. step_seconds: median time of
    a training step; seconds: everything that was spent on the arm. trials, pruned, diverged: how the tuning went.
    """

    method: str
    rank: int | None
    tie: bool
    mean: float | None
    low: float | None
    high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    p: float | None
    p_corrected: float | None
    status: str  # "ok" | "failed"
    reason: str | None
    lr: float | None
    trainable_parameters: int
    memory_bytes: int | None
    planned_bytes: int
    step_seconds: float | None
    seconds: float
    trials: int
    pruned: int
    diverged: int
    seeds: int
    command: str
    optimizer_bytes: int | None = None  # None in results of earlier versions too


@dataclass
class TrialResult:
    """One tuning run of an arm.

    lr: None where it was to be measured and that failed; rate: what `lr: auto` measured (a `train.rate.MeasuredRate`).
    slot: its name within the arm ("trial 3", "wider 1"). settings: what was varied besides the learning rate.
    outcome: "complete", "pruned", "diverged", "out of memory" or "failed". value: what was minimised (the validation
    loss, or minus the validation score); where the trial was pruned, the last one seen. losses, valid: pairs
    (step, value); losses are thinned to a few hundred points. values: of each seed, where there were several: `value`
    and the curves are their means.
    """

    slot: str
    number: int
    lr: float | None
    settings: dict[str, Any]
    outcome: str
    reason: str | None
    value: float | None
    steps: int
    seconds: float
    losses: list[tuple[int, float]] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)
    rate: dict[str, Any] | None = None
    values: list[float | None] = field(default_factory=list)


@dataclass
class RerunResult:
    """The best setting of an arm, trained with one more seed and measured on the test records.

    metrics: as in a run's `after`. outcomes: per test record 1 for right and 0 for wrong, or its loss; in the order of
    the records, which is the same for all arms and seeds. weights: how much each record counts, None for alike.
    """

    seed: int
    outcome: str
    reason: str | None
    metrics: dict[str, float]
    outcomes: list[float]
    weights: list[float] | None
    confusion: Confusion | None
    steps: int
    seconds: float
    step_seconds: float | None
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)
    optimizer_bytes: int | None = None


@dataclass
class ArmResult:
    """Everything about one arm.

    title: of its method; axis, key: what the entry named. adapt, optim: its blocks of the recipe, with the tuned
    values. recipe: path of that file. searched: the range of learning rates in the end, after widening.
    best: the slot of the best trial. notes: what a reader should know (a setting the method has not, a rank that was
    solved, a best rate at the edge). trainable_parameters counts the classification head where one is trained;
    adapter_parameters does not.
    """

    label: str
    axis: str
    key: str
    title: str
    paper: str
    adapt: dict[str, Any]
    optim: dict[str, Any]
    steps: int
    recipe: str | None
    command: str
    trainable_parameters: int
    adapter_parameters: int
    planned_bytes: int
    planned_flops: float
    searched: tuple[float, float] | None  # None where the rate was measured
    best: str | None
    notes: list[str]
    trials: list[TrialResult]
    reruns: list[RerunResult]


@dataclass
class Skipped:
    """An arm that was not run."""

    label: str
    key: str
    reason: str


@dataclass
class CompareResult:
    """The result of a comparison.

    complete: False while it still runs (result.json is written after every arm). metric: of the test data
    ("accuracy", "exact_match" or "loss"); higher_is_better: its direction. tuned_on: what the trials minimised.
    base: the metric of the untouched model. budget: trials, steps, seeds, equal, value. method: how intervals,
    p-values and ranks were made, in words. storage: where the study lies, without a password. fingerprint: of
    everything that all arms share. config: the whole configuration as given, to run it again.
    """

    title: str
    complete: bool
    model: dict[str, Any]
    data: dict[str, Any]
    metric: str
    higher_is_better: bool
    tuned_on: str
    base: dict[str, float]
    confidence: float
    baseline: str | None
    budget: dict[str, Any]
    leaderboard: list[Row]
    arms: list[ArmResult]
    skipped: list[Skipped]
    warnings: list[str]
    method: str
    environment: dict[str, Any]
    seconds: float
    command: str
    storage: str
    fingerprint: str
    output: str | None
    config: dict[str, Any]
    version: str = __version__
    format: int = FORMAT

    @property
    def compares_optimizers(self) -> bool:
        """Whether arms differ in their optimizers, settings but the learning rate counted in."""
        known = [{k: v for k, v in arm.optim.items() if k != "lr"} for arm in self.arms]
        return any(optim != known[0] for optim in known)

    @property
    def tells_trained(self) -> bool:
        """Whether a column of trained numbers tells something: among optimizers of one model it does not."""
        return not self.compares_optimizers or len({row.trainable_parameters for row in self.leaderboard}) > 1

    @property
    def loss_unit(self) -> str:
        """What a loss is counted in: a classifier's is that of a record, a language model's that of a token."""
        of = self.config.get("model") or {}
        if of.get("task") == "classification":
            return "nats per record"
        return "nats per byte" if of.get("tokenizer") == BYTES else "nats per token"

    @property
    def unit(self) -> str:
        """The metric with its unit, for heads and axes."""
        return f"loss, {self.loss_unit}" if self.metric == "loss" else unit(self.metric)

    def arm(self, label: str) -> ArmResult:
        """Return one arm by its label."""
        return next(arm for arm in self.arms if arm.label == label)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompareResult:
        """Return the result that `to_dict` gave. Raises `StoreError` for one of another format."""
        values = dict(values)
        if values.get("format") != FORMAT:
            raise StoreError(
                f"this comparison was written in format {values.get('format')} and this version reads {FORMAT}: open "
                f"it with rankworks {values.get('version', 'of its time')}, or run `rankworks compare` again."
            )
        rows = [Row(**row) for row in values.pop("leaderboard")]
        arms = [_arm(arm) for arm in values.pop("arms")]
        skipped = [Skipped(**arm) for arm in values.pop("skipped")]
        return cls(**values, leaderboard=rows, arms=arms, skipped=skipped)

    @classmethod
    def from_file(cls, path: str | Path) -> CompareResult:
        """Read a result.json."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read as the result of a comparison: {error}.") from None
        return cls.from_dict(values)


def _arm(values: Mapping[str, Any]) -> ArmResult:
    values = dict(values)
    trials = [trial(each) for each in values.pop("trials")]
    reruns = [rerun(each) for each in values.pop("reruns")]
    searched = values.pop("searched")
    return ArmResult(**values, searched=tuple(searched) if searched else None, trials=trials, reruns=reruns)


def trial(values: Mapping[str, Any]) -> TrialResult:
    """Return a trial from plain data."""
    return TrialResult(**_curves(values))


def rerun(values: Mapping[str, Any]) -> RerunResult:
    """Return a rerun from plain data."""
    values = _curves(values)
    confusion = values.pop("confusion")
    return RerunResult(**values, confusion=Confusion(**confusion) if confusion else None)


def _curves(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give curves, lists of lists in JSON, their pairs back."""
    return {**values, **{key: [tuple(point) for point in values[key]] for key in ("losses", "valid")}}
