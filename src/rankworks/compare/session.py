"""The work of a comparison: which cell is next, who does it, and what is known so far.

Several processes may work on one storage; each goes through the arms, takes the first cell that is free, and waits only
where all that is left is in other hands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna

from rankworks.compare.arms import Arm
from rankworks.compare.config import CompareConfig
from rankworks.compare.result import RerunResult, TrialResult, rerun, trial
from rankworks.compare.study import Cell, Ledger
from rankworks.compare.trial import (
    COMPLETE,
    DIVERGED,
    FAILED,
    MEMORY,
    PRUNED,
    BaseChangedError,
    Bench,
    Outcome,
    PrunedError,
    averaged,
    blame,
)
from rankworks.compare.tune import AGAIN, Agenda, Seen, agenda, best, count_of, distributions, given, pruner, sampler
from rankworks.core.errors import ConfigError
from rankworks.train.config import AUTO, Auto

LOOK = 30.0
"""Seconds between two looks at what other processes did to arms that this one is not at."""

WAIT = 1.0
"""Seconds between two looks at what other processes do."""

HOPELESS = (FAILED, MEMORY)
"""Outcomes that another learning rate does not help."""


@dataclass
class Standing:
    """What is known of an arm: its finished trials and reruns, and what is still to be done."""

    arm: Arm
    steps: int
    trials: dict[str, TrialResult] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # per trial, what was drawn
    reruns: dict[int, RerunResult] = field(default_factory=dict)
    agenda: Agenda | None = None
    reason: str | None = None  # why the arm failed
    done: bool = False

    @property
    def best(self) -> TrialResult | None:
        """The best trial so far among those that ran to their end."""
        top = best(list(self.seen.values()))
        return None if top is None else next(t for t in self.trials.values() if seen_of(t) == top)

    @property
    def seen(self) -> dict[str, Seen]:
        """The trials as the agenda takes them."""
        return {name: seen_of(t) for name, t in self.trials.items()}


def seen_of(result: TrialResult) -> Seen:
    """Return a trial as the agenda takes it."""
    return Seen(result.lr, result.value, result.outcome == PRUNED)


class Session:
    """One process's part in a comparison."""

    def __init__(
        self,
        config: CompareConfig,
        arms: list[Arm],
        ledger: Ledger,
        bench: Bench,
        board: Any,
        finished: Callable[[Standing], None],
    ):
        """`finished` is called with every arm whose last cell was done by this process."""
        self.config, self.arms, self.ledger, self.bench, self.board = config, arms, ledger, bench, board
        self.finished, self._looked = finished, time.monotonic()
        self.shared = ledger.study("reruns", shared_identity(config, bench.task.classes))
        self.studies = {arm.label: ledger.study(f"arm {arm.label}", plain(arm.identity())) for arm in arms}

    def work(self) -> None:
        """Do every cell that is free, and wait for those that others do."""
        self.board.begin([self.standing(arm) for arm in self.arms])
        while True:
            worked = waiting = False
            for arm in self.arms:
                state = self._arm(arm)
                worked, waiting = worked or state == "worked", waiting or state == "waiting"
            if not worked and not waiting:
                return
            if not worked:
                self.board.waiting()
                time.sleep(WAIT)

    def _arm(self, arm: Arm) -> str:
        """Do all free cells of an arm; say "worked", "waiting" for others, or "done"."""
        worked = False
        while True:
            if self.config.budget.equal == "time" and not self._timed(arm):
                return "waiting"
            standing = self.standing(arm)
            self.board.update(standing)
            self._look(arm)
            if standing.done:
                if worked:
                    self.finished(standing)
                return "worked" if worked else "done"
            assert standing.agenda is not None
            opened = [p.name for p in standing.agenda.open(standing.seen)]
            names = opened or [rerun_name(arm, s) for s in self.config.seeds if s not in standing.reruns]
            study = self.studies[arm.label] if opened else self.shared
            busy = self.ledger.busy(study)
            taken = next((n for n in names if n not in busy and self._cell(arm, standing, n, bool(opened))), None)
            if taken is None:
                return "worked" if worked else "waiting"
            worked = True

    def _look(self, at: Arm) -> None:
        """Show what others did meanwhile, now and then."""
        if self.board.show and time.monotonic() - self._looked > LOOK:
            for arm in self.arms:
                if arm is not at:
                    self.board.update(self.standing(arm))
            self._looked = time.monotonic()

    def _cell(self, arm: Arm, standing: Standing, name: str, tuning: bool) -> bool:
        """Do one cell; False where another process was quicker."""
        return self._trial(arm, standing, name) if tuning else self._rerun(arm, standing, name)

    # ---- one cell -------------------------------------------------------------------------------------------------

    def _trial(self, arm: Arm, standing: Standing, name: str) -> bool:
        config, study, steps = self.config, self.studies[arm.label], standing.steps
        assert standing.agenda is not None
        proposal = next(p for p in standing.agenda.proposals if p.name == name)
        trials = count_of(arm.tune, config.budget.trials)
        fixed = given(arm.tune, proposal)
        if name.startswith(("wider", AGAIN)) and standing.best is not None:
            fixed |= standing.best.settings
        study.sampler = sampler(arm.label, name, trials, config.train.seed)
        study.pruner = pruner(steps, arm.tune.prune and not name.startswith(AGAIN))
        claim = self.ledger.claim(study, name, fixed)
        if claim is None:
            return False
        with claim:
            drawn = {path: draw(claim.trial, path, d) for path, d in distributions(arm.tune, proposal).items()}
            lr: float | Auto = float(f"{drawn.pop('lr'):.3g}") if arm.tune.lr != AUTO else AUTO

            def look(step: int, value: float) -> None:
                claim.trial.report(value, step)
                if claim.trial.should_prune():
                    raise PrunedError

            runs: list[Outcome] = []
            for seed in config.tuning_seeds(arm.tune):
                told = name if not runs else f"{name}, seed {seed}"
                self.board.cell(arm.label, told, None if lr == AUTO else lr, steps)
                # The pruner judges the first seed's run; a rate that was measured there holds for the others.
                rate = lr if not runs or runs[0].rate is None else runs[0].rate.lr
                runs.append(self._run(arm, rate, drawn, seed, steps, look=None if runs else look))
                self.board.did()
                if runs[-1].outcome != COMPLETE:
                    break
            outcome = averaged(runs)
            made = TrialResult(
                slot=name,
                number=claim.trial.number,
                lr=lr if lr != AUTO else outcome.rate.lr if outcome.rate is not None else None,
                settings=drawn,
                outcome=outcome.outcome,
                reason=outcome.reason,
                value=outcome.value if outcome.reason is None else None,
                steps=outcome.steps,
                seconds=outcome.seconds,
                losses=outcome.losses,
                valid=outcome.valid,
                rate=None if outcome.rate is None else asdict(outcome.rate),
                values=[run.value for run in runs] if len(runs) > 1 else [],
            )
            claim.finish(plain(asdict(made)), made.value, outcome.outcome == PRUNED)
        return True

    def _rerun(self, arm: Arm, standing: Standing, name: str) -> bool:
        claim = self.ledger.claim(self.shared, name)
        if claim is None:
            return False
        top, steps, seed = standing.best, standing.steps, int(name.rpartition(" ")[2])
        assert top is not None
        assert top.lr is not None  # a trial that came to its end had a rate
        with claim:
            self.board.cell(arm.label, f"seed {seed}", top.lr, steps)
            outcome = self._run(arm, top.lr, top.settings, seed, steps, test=True)
            scored = outcome.scored
            made = RerunResult(
                seed=seed,
                outcome=outcome.outcome,
                reason=outcome.reason,
                metrics=scored.metrics if scored else {},
                outcomes=[round(o, 6) for o in scored.outcomes] if scored else [],
                weights=scored.weights if scored else None,
                confusion=scored.confusion if scored else None,
                steps=outcome.steps,
                seconds=outcome.seconds,
                step_seconds=outcome.step_seconds,
                tokens_per_second=outcome.tokens_per_second,
                peak_memory_bytes=outcome.peak_memory_bytes,
                trainable_parameters=outcome.trainable_parameters,
                optimizer_bytes=outcome.optimizer_bytes,
                losses=outcome.losses,
                valid=outcome.valid,
            )
            value = scored.metrics[self.bench.scorer.metric] if scored else None
            claim.finish(plain(asdict(made)), value)
        self.board.did()
        return True

    def _run(
        self, arm: Arm, lr: float | Auto, settings: Mapping[str, Any], seed: int, steps: int, **options: Any
    ) -> Outcome:
        try:
            recipe = self.bench.recipe(arm, lr, settings, seed, steps)
        except ConfigError as error:  # a drawn setting that does not go with the others
            return Outcome(FAILED, str(error))
        return self.bench.run(arm, recipe, tick=self.board.tick, **options)

    # ---- equal time -----------------------------------------------------------------------------------------------

    def _timed(self, arm: Arm) -> bool:
        """Measure the time of a step of every arm, each once for all processes; False while another one does so."""
        for each in self.arms:
            name = clock_name(each)
            if name in self.ledger.finished(self.shared) or name in self.ledger.busy(self.shared):
                continue
            claim = self.ledger.claim(self.shared, name)
            if claim is None:
                continue
            with claim:
                self.board.cell(each.label, "step time", None, 0)
                try:
                    recipe = self.bench.recipe(each, 1e-6, {}, self.config.train.seed, self.config.steps)
                    record: dict[str, Any] = {"step_seconds": self.bench.step_seconds(each, recipe)}
                except BaseChangedError:
                    raise
                except Exception as error:  # a result of this arm, as in its runs
                    record = {"reason": blame(error)[1]}
                claim.finish(record, record.get("step_seconds"))
        return all(clock_name(each) in self.ledger.finished(self.shared) for each in self.arms)

    def _steps(self, arm: Arm, cells: Mapping[str, Cell], baseline: str) -> tuple[int, str | None]:
        """Return the steps of an arm's runs, and why it has none."""
        if self.config.budget.equal != "time":
            return self.config.steps, None
        if clock_name(arm) not in cells:
            return 0, None
        measured = cells[clock_name(arm)].record
        if "reason" in measured:
            return 0, measured["reason"]
        value = self.config.budget.value
        if value is None:
            base = next(a for a in self.arms if a.label == baseline)
            own = cells[clock_name(base)].record
            if "reason" in own:
                return 0, f"the baseline sets the time and failed: {own['reason']}"
            value = own["step_seconds"] * self.config.steps
        steps = int(float(value) / measured["step_seconds"])
        if steps < 1:
            return 0, f"one step takes {measured['step_seconds']:.3g} s, more than the {float(value):.3g} s of a run."
        return steps, None

    # ---- what is known --------------------------------------------------------------------------------------------

    def standing(self, arm: Arm) -> Standing:
        """Return what is known of an arm now."""
        shared = self.ledger.finished(self.shared)
        steps, reason = self._steps(arm, shared, self.baseline)
        state = Standing(arm, steps, reason=reason, done=reason is not None)
        if reason is not None:
            return state
        for name, cell in self.ledger.finished(self.studies[arm.label]).items():
            state.trials[name] = trial(cell.record)
        for seed in self.config.seeds:
            if (cell := shared.get(rerun_name(arm, seed))) is not None:
                state.reruns[seed] = rerun(cell.record)
        state.agenda = agenda(arm.tune, self.config.budget.trials, state.seen)
        hopeless = next((t for t in state.trials.values() if t.outcome in HOPELESS), None)
        if hopeless is not None:
            state.reason, state.done = hopeless.reason, True
        elif not state.agenda.open(state.seen):
            if state.best is None:
                why = next((t.reason for t in state.trials.values() if t.outcome == DIVERGED), "none ran to its end")
                state.reason, state.done = f"every trial diverged: {why}", True
            else:
                state.done = len(state.reruns) == len(self.config.seeds)
        return state

    @property
    def baseline(self) -> str:
        """Label of the baseline."""
        return self.config.baseline or self.arms[0].label


def rerun_name(arm: Arm, seed: int) -> str:
    """Return the name of a rerun's cell."""
    return f"{arm.label}: seed {seed}"


def clock_name(arm: Arm) -> str:
    """Return the name of the cell that holds an arm's time of a step."""
    return f"{arm.label}: step time"


def draw(drawn: optuna.Trial, name: str, distribution: Any) -> Any:
    """Return the value of a setting: the given one, or what the sampler draws."""
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return drawn.suggest_categorical(name, distribution.choices)
    return drawn.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def shared_identity(config: CompareConfig, classes: list[str] | None) -> dict[str, Any]:
    """Return what decides the numbers of all arms: cells of another identity are not mixed with these."""
    blocks = config.model_dump(mode="json", include={"model", "data", "calibrate", "search", "evaluate"})
    train = {k: v for k, v in config.train.model_dump().items() if k not in FREE}
    tune = {"metric": config.tune.metric, "valid_limit": config.tune.valid_limit}
    budget = {"equal": config.budget.equal, "steps": config.steps}
    if config.budget.equal == "time":
        budget |= {"value": config.budget.value, "baseline": config.baseline}
    return plain({**blocks, "train": train, "tune": tune, "budget": budget, "classes": classes})


FREE = ("steps", "epochs", "eval_every", "save_every", "keep", "log_every", "tensorboard")
"""Settings of a run that do not decide a comparison's numbers, or are set by it."""


def plain(value: Any) -> Any:
    """Return plain data as JSON gives it back: tuples as lists, numbers that JSON cannot hold as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    return value
