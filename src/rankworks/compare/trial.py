"""One run of an arm: adapt the shared base, train, measure, take everything off again.

The steps are those of `rankworks train` in the same order, so that the recipe of an arm gives the same numbers.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from rankworks.calibrate import needed
from rankworks.compare.arms import Arm
from rankworks.compare.base import Base
from rankworks.compare.config import CompareConfig
from rankworks.compare.quantised import PLAIN
from rankworks.compare.score import Scored, Scorer, Validator
from rankworks.compare.tune import rung
from rankworks.core.adapt import adapt
from rankworks.core.errors import DataError, DivergedError, RankworksError, TrainingError
from rankworks.core.evidence import Evidence
from rankworks.core.hooks import Hook, Moment
from rankworks.core.optim.held import held_bytes
from rankworks.core.spec import AdaptSpec
from rankworks.core.summary import trainable_parameters
from rankworks.train.api import HEADS
from rankworks.train.calibration import measure_evidence
from rankworks.train.config import AUTO, Auto, RunConfig
from rankworks.train.loop import History, Loop
from rankworks.train.prepare import Prepared
from rankworks.train.quantising import products, together
from rankworks.train.rates.rate import MeasuredRate, measure_rate
from rankworks.train.searching.search import chosen_spec, must_search, search, widest
from rankworks.train.sources import Task
from rankworks.train.sources.split import choose

POINTS = 200
"""A loss curve is kept in at most so many points."""

COMPLETE, PRUNED, DIVERGED, MEMORY, FAILED = "complete", "pruned", "diverged", "out of memory", "failed"


class PrunedError(Exception):
    """A trial was stopped since it would not have become the best."""


@dataclass
class Outcome:
    """What came of one run; curves are pairs (step, value)."""

    outcome: str = COMPLETE
    reason: str | None = None
    value: float | None = None
    scored: Scored | None = None
    steps: int = 0
    seconds: float = 0.0
    rate: MeasuredRate | None = None  # where it was to be measured
    step_seconds: float | None = None
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    trainable_parameters: int = 0
    optimizer_bytes: int | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)


def averaged(runs: Sequence[Outcome]) -> Outcome:
    """Return what came of one setting over its seeds; one that did not come to its end speaks for all."""
    last = runs[-1]
    if len(runs) == 1 or last.outcome != COMPLETE:
        return replace(last, seconds=round(sum(run.seconds for run in runs), 3), rate=runs[0].rate)
    return replace(
        runs[0],
        value=fmean(run.value for run in runs if run.value is not None),
        seconds=round(sum(run.seconds for run in runs), 3),
        losses=_mean_curve([run.losses for run in runs]),
        valid=_mean_curve([run.valid for run in runs]),
    )


def _mean_curve(curves: Sequence[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Return the mean of curves over the same steps."""
    return [(points[0][0], round(fmean(y for _, y in points), 6)) for points in zip(*curves, strict=True)]


class Bench:
    """The base and the data of a comparison, tokenised once, on which any arm is run."""

    def __init__(self, config: CompareConfig, task: Task, base: Base, progress: bool = True):
        self.config, self.task, self.base = config, task, base
        model, tokenizer = base.model, base.tokenizer
        self.prepared = Prepared(task, model, tokenizer, progress)
        if not task.valid or not task.test:
            raise DataError(
                "a comparison tunes on validation data and is decided on test data: give data.valid and data.test "
                "files, or leave data.test_fraction and tune.valid_fraction above 0."
            )
        self.examples = self.prepared.examples(task.train, "train")
        by = "label" if task.kind == "classification" else None
        records = choose(task.valid, config.tune.valid_limit, seed=0, by=by)
        self.validator = Validator(self.prepared, records, config.evaluate, config.tune.metric, config.train.precision)
        self.scorer = Scorer(self.prepared, config.evaluate, config.train.precision)
        self.prepared.progress = False  # from here on the comparison's own display speaks
        classifies = config.model is not None and config.model.task == "classification"
        self.heads = [n for n, _ in model.named_children() if n in HEADS] if classifies else []
        self._evidence: tuple[Any, Evidence | None] | None = None

    def recipe(self, arm: Arm, lr: float | Auto, settings: Mapping[str, Any], seed: int, steps: int) -> RunConfig:
        """Return the configuration of a run of an arm."""
        blocks: dict[str, dict[str, Any]] = {"adapt": {}, "optim": {}, "train": {}}
        for path, value in settings.items():
            block, _, name = path.partition(".")
            blocks[block][name] = value
        config = self.config
        train = {k: v for k, v in config.train.model_dump().items() if k in config.train.model_fields_set}
        train |= {"steps": steps, "seed": seed, **blocks["train"]}
        train.pop("epochs", None)
        return RunConfig(
            model=config.model,
            data=config.data,
            adapt=None if arm.adapt is None else {**arm.adapt, **blocks["adapt"]},  # type: ignore[arg-type]
            calibrate=config.calibrate,
            search=config.search,
            optim={**arm.optim, **blocks["optim"], "lr": lr},  # type: ignore[arg-type]
            train=train,  # type: ignore[arg-type]
            evaluate=config.evaluate,
        )

    def run(
        self,
        arm: Arm,
        recipe: RunConfig,
        *,
        test: bool = False,
        look: Callable[[int, float], None] | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> Outcome:
        """Run an arm and give the base back. Only a base that an arm changed, or Ctrl-C, is raised.

        test: measure on the test records in the end. look: called with (step, validation value); it may raise
        `PrunedError`. tick: called with the number of every step.
        """
        outcome, started = Outcome(), time.monotonic()
        try:
            with self._adapted(arm, recipe) as model:
                self._train(model, recipe, outcome, look, tick)
                outcome.value = outcome.valid[-1][1]
                if test:
                    outcome.scored = self.scorer.measure(model)
        except PrunedError:
            outcome.outcome, outcome.value = PRUNED, outcome.valid[-1][1]
        except BaseChangedError:
            raise
        except Exception as error:  # one arm's trouble is a result of that arm; the others go on
            outcome.outcome, outcome.reason = blame(error)
        if outcome.outcome == MEMORY:  # what the broken step held is for the next arm
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        outcome.seconds = round(time.monotonic() - started, 3)
        return outcome

    @contextmanager
    def _adapted(self, arm: Arm, recipe: RunConfig) -> Iterator[nn.Module]:
        spec = wide = None
        if recipe.adapt is not None:
            spec = AdaptSpec.from_flat({"delta": "lora", "seed": recipe.train.seed, "full": self.heads, **recipe.adapt})
            wide = widest(self.base.model, spec) if must_search(spec) else spec
        wanted = PLAIN if self.base.quantised is None else products(self.base.model, wide)
        model = self.base.use(recipe.train.seed, wanted)
        try:
            if spec is None or wide is None:
                self.base.keep()
                model.requires_grad_(True)
            else:
                evidence = self._evidence_of(model, wide, recipe)
                if wide is not spec:
                    found = search(
                        model, self.examples, spec, recipe, evidence=evidence, pad=self.prepared.pad, progress=False
                    )
                    spec = chosen_spec(spec, found.chosen)
                adapt(model, spec, evidence=evidence)
            yield model
        finally:
            try:
                self.base.restore(arm.label)
            except TrainingError as error:
                raise BaseChangedError(str(error)) from None

    def _evidence_of(self, model: nn.Module, spec: AdaptSpec, recipe: RunConfig) -> Evidence | None:
        """Return what the method asks to know of the base and the data; the last is kept, since no rate changes it."""
        known = self.base.evidence
        if not needed(model, spec, known):
            return known
        key = (spec.flat(), recipe.train.seed, recipe.train.batch_size)
        if self._evidence is None or self._evidence[0] != key:
            found = measure_evidence(
                model,
                self.prepared,
                spec,
                batches=recipe.calibrate.batches,
                batch_size=recipe.train.batch_size,
                seed=recipe.train.seed,
                given=known,
                progress=False,
            )
            self._evidence = key, found
        return together(known, self._evidence[1])

    def _train(
        self,
        model: nn.Module,
        recipe: RunConfig,
        outcome: Outcome,
        look: Callable[[int, float], None] | None,
        tick: Callable[[int], None] | None,
    ) -> None:
        """Train, and write into `outcome` as it goes: a run that breaks leaves its curve."""
        outcome.trainable_parameters = trainable_parameters(model)
        steps = recipe.train.total_steps(len(self.examples))

        def evaluate() -> dict[str, float]:
            value = self.validator.value(model)
            outcome.valid.append((loop.step, round(value, 6)))
            _note(outcome, loop.history, loop.step)
            if value != value:
                raise DivergedError(f"the validation loss became {value} at step {loop.step}.")
            if look is not None and loop.step < steps:
                look(loop.step, value)
            return {"value": value}

        optim, pad = recipe.optim, self.prepared.pad
        if optim.lr == AUTO:
            outcome.rate = measure_rate(model, self.examples, recipe.train, optim, pad=pad, progress=False)
            optim = optim.model_copy(update={"lr": outcome.rate.lr})
        settings = recipe.train.model_copy(update={"eval_every": rung(steps), "save_every": None})
        loop = Loop(
            model,
            self.examples,
            settings,
            optim,
            evaluate=evaluate,
            pad=pad,
            progress=False,
            hooks=[] if tick is None else [Ticks(tick)],
        )
        set_seed(recipe.train.seed, device_specific=True)
        try:
            loop.run()
            outcome.optimizer_bytes = held_bytes(loop.optimizer)
        finally:
            _note(outcome, loop.history, loop.step)
        if not outcome.valid or outcome.valid[-1][0] != steps:
            evaluate()

    def step_seconds(self, arm: Arm, recipe: RunConfig, warm: int = 2, steps: int = 6) -> float:
        """Return the mean seconds of a training step, the first ones left out. Raises what the run raises."""
        with self._adapted(arm, recipe) as model:
            for count in (warm, steps):
                settings = recipe.train.model_copy(update={"steps": count, "eval_every": None, "save_every": None})
                loop = Loop(model, self.examples, settings, recipe.optim, pad=self.prepared.pad, progress=False)
                history = loop.run()
        return history.seconds / steps


class BaseChangedError(TrainingError):
    """An arm left the base changed: what comes after it could not be trusted."""


class Ticks(Hook):
    """Tells of every step, for the display."""

    def __init__(self, tick: Callable[[int], None]):
        self.tick, self.last = tick, 0

    def before_forward(self, moment: Moment) -> None:
        """Tell of a step once, at its first micro-batch."""
        if moment.step != self.last:
            self.last = moment.step
            self.tick(moment.step)


def blame(error: Exception) -> tuple[str, str]:
    """Return the outcome and the reason that an error of a run stands for."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in text:
        return MEMORY, f"the device ran out of memory: {text[:300]}"
    if isinstance(error, TrainingError):
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            return MEMORY, text
        return (DIVERGED if isinstance(error, DivergedError) else FAILED), text
    if isinstance(error, torch.linalg.LinAlgError):
        return DIVERGED, f"a decomposition did not converge: {text[:300]}"
    if isinstance(error, RankworksError):
        return FAILED, text
    where = traceback.extract_tb(error.__traceback__)[-1]
    return FAILED, f"{type(error).__name__} in {where.filename.rpartition('/')[2]}:{where.lineno}: {text[:300]}"


def _note(outcome: Outcome, history: History, step: int) -> None:
    outcome.steps = len(history.losses)
    outcome.losses = thinned([(i, round(loss, 6)) for i, loss in enumerate(history.losses, start=1)])
    outcome.tokens_per_second = round(history.tokens_per_second, 1)
    outcome.peak_memory_bytes = history.peak_memory_bytes
    outcome.step_seconds = history.seconds / len(history.losses) if history.losses else None


def thinned(curve: list[tuple[int, float]], points: int = POINTS) -> list[tuple[int, float]]:
    """Return at most so many points of a curve, the last among them."""
    stride = -(-len(curve) // points)
    return curve if stride <= 1 else curve[::-1][::stride][::-1]
