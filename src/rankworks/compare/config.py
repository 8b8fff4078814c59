"""The configuration of a comparison: a run's blocks, and beside them what is compared, at what cost, tuned how.

model: {name: minilm-l6, task: classification}
data: {name: bbc-news, max_length: 64}
adapt: {rank: 8}                              # for every arm that has such a setting
methods: [lora, pissa, vera, {delta: lora, init: pissa, optimizer: galore, label: both}]
baseline: lora
budget: {trials: 6, steps: 100, seeds: 3}
output: runs/compare
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rankworks.core.config import Config, read
from rankworks.train.config import AUTO, RunConfig, read_values

HALF_DECADE = math.sqrt(10)

FAR = 10_000
"""Between the seeds of trials and those of reruns, of which there may be more later."""


class Range(Config):
    """An interval that values are drawn from."""

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(default=True, description="drawn evenly on a logarithmic scale")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low must be below high (given: {self.low:g} and {self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range begins above 0: raise low, or set log: false")
        return self

    @property
    def middle(self) -> float:
        """The value that the first trials take."""
        return math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2


Choices = Range | list[Any]


class TuneConfig(Config):
    """What is tuned for every arm: the learning rate always, other settings on request."""

    lr: Range | list[float] | float | Literal["auto"] = Field(
        default_factory=lambda: Range(low=1e-4, high=3.2e-2),
        description="learning rates: a range, searched first in half decades; a list to try; one for all; or auto: "
        "each arm's measured at its start, in one trial (see docs/auto-rate.md)",
    )
    also: dict[str, Choices] = Field(
        default_factory=dict, description="further settings: {adapt.alpha: [8, 32], optim.warmup: {low: 0.01, high: 1}}"
    )
    metric: Literal["loss", "score"] = Field(
        default="loss", description="what is tuned on the validation data: their loss, or accuracy or exact match"
    )
    seeds: int = Field(
        default=1, ge=1, description="runs of every trial, their mean decides; one can be luck with few records"
    )
    prune: bool = Field(default=True, description="stop hopeless trials at a quarter and a half (successive halving)")
    widen: int = Field(default=2, ge=0, description="decades by which a range may grow where the best lies on its edge")
    valid_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="share of the data held out for tuning, where they bring no such split"
    )
    valid_limit: int | None = Field(default=200, ge=1, description="validation records, each class in its share")

    @field_validator("lr")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value == AUTO:
            return value
        rates = [value.low] if isinstance(value, Range) else value if isinstance(value, list) else [value]
        if not rates or min(rates) <= 0:
            raise ValueError("a learning rate is above 0, and at least one is needed")
        return sorted(set(value)) if isinstance(value, list) else value

    @field_validator("also")
    @classmethod
    def _known_blocks(cls, value: dict[str, Choices]) -> dict[str, Choices]:
        for path, choices in value.items():
            block, dot, name = path.partition(".")
            if not dot or block not in ("adapt", "optim", "train") or path == "optim.lr" or not name:
                raise ValueError(f"{path!r}: give a setting of adapt, optim or train, e.g. adapt.alpha (not optim.lr)")
            if name in ("steps", "epochs", "seed"):
                raise ValueError(f"{path!r} is part of the budget, which is equal for all arms")
            if isinstance(choices, list) and not choices:
                raise ValueError(f"{path!r}: the list of choices is empty")
        return value


class BudgetConfig(Config):
    """What every arm gets."""

    trials: int = Field(default=6, ge=1, description="tuning runs per arm")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps of every run; null: train.steps, or 100")
    seeds: int | list[int] = Field(default=3, description="reruns of the best setting: how many, or which seeds")
    equal: Literal["none", "parameters", "memory", "time"] = Field(
        default="none", description="what is made equal: trained numbers or planned peak memory (by the rank), or time"
    )
    value: float | str | None = Field(
        default=None, description="parameters, memory such as 2GB, or seconds of a run; null: the baseline's own"
    )
    tolerance: float = Field(default=0.25, gt=0, lt=1, description="how far off an arm may be (parameters)")

    @field_validator("seeds")
    @classmethod
    def _some(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, int) and value < 1:
            raise ValueError("at least one seed is needed")
        if isinstance(value, list) and (not value or len(set(value)) < len(value) or min(value) < 0):
            raise ValueError("a list of different seeds, none below 0, is needed")
        return value

    @model_validator(mode="after")
    def _value_of_something(self) -> BudgetConfig:
        if self.value is not None and self.equal == "none":
            raise ValueError("value says how much of what is equal: give equal: parameters, memory or time with it")
        if isinstance(self.value, str) and self.equal != "memory":
            raise ValueError(f"the value of equal: {self.equal} is a number (given: {self.value!r})")
        return self


class CompareConfig(RunConfig):
    """Everything a comparison needs; the blocks of a run are shared by all arms."""

    methods: str | list[str | dict[str, Any]] = Field(
        default_factory=lambda: ["lora"],
        description="names, `all`, an axis (deltas, inits, ranks, selections, optimizers), or mappings of settings",
    )
    baseline: str | None = Field(default=None, description="label of the arm others are compared to; null: the first")
    budget: BudgetConfig = Field(default_factory=lambda: BudgetConfig())
    tune: TuneConfig = Field(default_factory=lambda: TuneConfig())
    storage: str | None = Field(
        default=None, description="where trials are kept: an Optuna storage URL; null: study.db in the output folder"
    )
    study: str = Field(default="compare", min_length=1, description="name of the study within the storage")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="of intervals and ties")

    @field_validator("methods")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        entries = [value] if isinstance(value, str) else value
        if not entries:
            raise ValueError("name at least one method")
        return entries

    @property
    def steps(self) -> int:
        """Steps of every run."""
        return self.budget.steps or self.train.steps or 100

    @property
    def seeds(self) -> list[int]:
        """Seeds of the reruns; the one of the trials is not among them unless it was asked for."""
        seeds = self.budget.seeds
        return list(seeds) if isinstance(seeds, list) else [self.train.seed + 1 + i for i in range(seeds)]

    def tuning_seeds(self, tune: TuneConfig) -> list[int]:
        """Seeds of every trial of an arm: the run's own first, and others far from those of the reruns."""
        return [self.train.seed, *(self.train.seed + FAR + i for i in range(1, tune.seeds))]


def load_compare_config(
    source: CompareConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()
) -> CompareConfig:
    """Return the configuration of a YAML file, a mapping or a `CompareConfig`, with `key=value` overrides applied.

    Raises `ConfigError` with every problem at once.
    """
    if isinstance(source, CompareConfig):
        source = source.model_dump(exclude_unset=True)  # what was left to its default stays so
    values, where = read_values(source, overrides)
    return read(CompareConfig, values, where)
