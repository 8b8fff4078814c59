"""`compare`: from a configuration to a leaderboard.

What a comparison leaves in its output folder:

    study.db         every trial and rerun (Optuna's SQLite storage), unless `storage` names another place
    arms/            a recipe per arm with its best setting: `rankworks train` on it repeats a row of the leaderboard
    result.json      the `CompareResult`, whole again after every arm
    result.md        the same for reading
    report.html      the same to look at: it sorts and unfolds, shows curves and costs, and opens offline
    result.svg       the leaderboard as a picture
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rankworks.compare.arms import Arm, Refused, baseline_of, expand
from rankworks.compare.base import Base
from rankworks.compare.budget import Cost, Planner, plan_arms
from rankworks.compare.config import CompareConfig, load_compare_config
from rankworks.compare.leaderboard import Scale, arm_result, edge_notes, in_words, leaderboard
from rankworks.compare.markdown import markdown
from rankworks.compare.result import CompareResult, Skipped
from rankworks.compare.session import Session, Standing, plain, shared_identity
from rankworks.compare.show import Board
from rankworks.compare.study import Ledger, shown
from rankworks.compare.trial import Bench
from rankworks.core.errors import ConfigError
from rankworks.core.files import atomic_write
from rankworks.train.precision import resolved
from rankworks.train.processes import processes
from rankworks.train.report.gather import environment
from rankworks.train.sources import Task, load_task

WRITE_EVERY = 30.0
"""Seconds between two writings of an unfinished result."""


def compare(
    config: CompareConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = True,
    progress: bool = True,
    command: str | None = None,
) -> CompareResult:
    """Tune every arm with the same budget, run its best setting on several seeds, and rank the arms with ties.

    config: a `CompareConfig`, a mapping, or the path of a YAML file; overrides: `key=value`. What an earlier call with
    the same storage has finished is kept, and several processes may work on one storage at a time; resume=False deletes
    the study first. command: how the comparison is called, for its report.

    Raises `RankworksError`s: before anything is loaded for unknown names and settings, before anything is trained for
    a budget that no method meets and a study of another version or other settings.
    """
    config = load_compare_config(config, overrides)
    arms, refused = expand(config)
    task = _prepare(config)
    ledger = Ledger(config.storage or f"sqlite:///{Path(str(config.output)) / 'study.db'}", config.study)
    if not resume:
        ledger.forget()
    named, baseline = config.baseline is not None, baseline_of(config, arms)
    config.baseline = baseline
    ledger.study("reruns", shared_identity(config, task.classes))  # refused before a model is loaded
    base = Base(config, task, config.train.seed)
    bench = Bench(config, task, base, progress)
    planner = Planner(base.model, config, bench.prepared.encoder.max_length, bench.heads)
    kept, costs, unfit = plan_arms(planner, arms, config.budget, baseline)
    refused += unfit
    if not kept:
        raise ConfigError("no method can take the model: " + " ".join(f"{r.label}: {r.reason}" for r in refused))
    if baseline not in costs:
        if named or (config.budget.equal == "time" and config.budget.value is None):
            reason = next(r.reason for r in refused if r.label == baseline)
            raise ConfigError(f"the baseline {baseline} cannot run: {reason} Name another one.")
        config.baseline = kept[0].label
    return _Comparison(config, kept, refused, costs, ledger, bench, command).run(progress)


def _prepare(config: CompareConfig) -> Task:
    """Complete the configuration and load the task. Raises `ConfigError` or `DataError`."""
    missing = [block for block in ("model", "data") if getattr(config, block) is None]
    if missing:
        raise ConfigError(f"a comparison needs {' and '.join(missing)}, e.g. model: {{name: smollm2-135m}}.")
    if processes().num_processes > 1:
        raise ConfigError(
            "a comparison is not one run of several processes: start `rankworks compare` several times with the same "
            "storage, on one machine or many, and they share the work."
        )
    assert config.data is not None
    if config.output is None:
        source = config.data.name or Path(str(config.data.path or config.data.train)).stem
        config.output = f"runs/compare-{source}"
    if config.data.valid is None and config.data.valid_fraction == 0:
        config.data = config.data.model_copy(update={"valid_fraction": config.tune.valid_fraction})
    return load_task(config.data)


class _Comparison:
    """One comparison under way: its session, and the result as far as it is known."""

    def __init__(
        self,
        config: CompareConfig,
        arms: list[Arm],
        refused: list[Refused],
        costs: dict[str, Cost],
        ledger: Ledger,
        bench: Bench,
        command: str | None,
    ):
        self.config, self.arms, self.refused, self.costs = config, arms, refused, costs
        self.ledger, self.bench, self.command = ledger, bench, command or "rw.compare(...)"
        self.output = Path(str(config.output))
        self.scale = Scale(bench.scorer.metric, bench.scorer.higher)
        self.files = _files(arms)
        self.started = self.written = time.monotonic()
        self.untouched: dict[str, float] = {}

    def run(self, progress: bool) -> CompareResult:
        """Do the work and write what there is to keep."""
        config = self.config
        board = Board(self.scale.metric, self.bench.validator.title, config.budget.trials, len(config.seeds), progress)
        self.untouched = self.bench.scorer.measure(self.bench.base.model).metrics
        with board:
            self.session = Session(config, self.arms, self.ledger, self.bench, board, self._arm_done)
            self.session.work()
        result = self._result()
        self._write(result)
        return result

    def _arm_done(self, standing: Standing) -> None:
        self._write_recipe(standing)
        if time.monotonic() - self.written > WRITE_EVERY:
            self._write(self._result())

    def _write(self, result: CompareResult) -> None:
        from rankworks.compare.report import (  # plotly takes a second: not when rankworks is imported
            write_picture,
            write_report,
        )

        atomic_write(self.output / "result.json", json.dumps(result.to_dict(), indent=1, allow_nan=False))
        atomic_write(self.output / "result.md", markdown(result))
        write_report(result, self.output)
        write_picture(result, self.output)
        self.written = time.monotonic()

    def _result(self) -> CompareResult:
        config, bench = self.config, self.bench
        standings = [self.session.standing(arm) for arm in self.arms]
        for standing in standings:
            if standing.done:
                self._write_recipe(standing)
        rows = leaderboard(
            standings, self.costs, self.scale, self.session.baseline, config.confidence, self._row_command
        )
        model: Any = config.model
        device = next(bench.base.model.parameters()).device
        shared = shared_identity(config, bench.task.classes)
        source = config.data.name if config.data is not None and config.data.name else bench.task.title
        arms = [
            arm_result(s, self.costs[s.arm.label], self._recipe_of(s), self._row_command(s.arm.label))
            for s in standings
        ]
        result = CompareResult(
            title=f"{model.name}{', reshaped,' if model.shape else ''} on {source}",
            complete=all(s.done for s in standings),
            model={
                "name": model.name,
                "shape": model.shape,
                "parameters": sum(p.numel() for p in bench.base.model.parameters()),
                "dtype": model.dtype,
                "device": str(device),
                "task": model.task,
            },
            data={
                "title": bench.task.title,
                "kind": bench.task.kind,
                "train": len(bench.task.train),
                "valid": len(bench.task.valid or []),
                "test": bench.scorer.count,
                "classes": bench.task.classes,
            },
            metric=self.scale.metric,
            higher_is_better=self.scale.higher,
            tuned_on=bench.validator.title,
            base=self.untouched,
            confidence=config.confidence,
            baseline=self.session.baseline,
            budget={
                "trials": config.budget.trials,
                "tuning_seeds": config.tune.seeds,
                "steps": config.steps,
                "seeds": config.seeds,
                "equal": config.budget.equal,
                "value": config.budget.value,
            },
            leaderboard=rows,
            arms=arms,
            skipped=[Skipped(r.label, r.key, r.reason) for r in self.refused],
            warnings=self._warnings(standings),
            method=in_words(config.confidence),
            environment=environment(resolved(config.train.precision, device)),
            seconds=round(sum(row.seconds for row in rows), 3),
            command=self.command,
            storage=shown(self.ledger.url),
            fingerprint=hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16],
            output=str(self.output),
            config=_public(config),
        )
        return CompareResult.from_dict(plain(result.to_dict()))

    def _warnings(self, standings: Sequence[Standing]) -> list[str]:
        """Return what concerns the whole, then what concerns single arms."""
        found = []
        if "lr" in self.config.optim.model_fields_set and self.config.optim.lr:
            found.append("optim.lr is not used: every arm's learning rate is tuned (tune.lr sets the range).")
        if len(self.config.seeds) == 1:
            found.append("one seed: the intervals know the chance of the test records alone, not that of training.")
        found += [note for note in self.bench.task.notes if "stand in train too" in note]
        return found + [f"{s.arm.label}: {note}" for s in standings for note in edge_notes(s)]

    # ---- recipes --------------------------------------------------------------------------------------------------

    def _recipe_of(self, standing: Standing) -> str | None:
        return str(self.files[standing.arm.label](self.output)) if standing.best is not None and standing.done else None

    def _row_command(self, label: str) -> str:
        """Return the command that repeats the first rerun of an arm."""
        path = self.files[label](self.output)
        arm = next(a for a in self.arms if a.label == label)
        top = self.session.standing(arm).best
        words = ["rankworks", "train", str(path), *([f"optim.lr={top.lr:g}"] if top else [])]
        words += [f"train.seed={self.config.seeds[0]}", "--output", str(self.output / "again" / path.stem)]
        return shlex.join(words)

    def _write_recipe(self, standing: Standing) -> None:
        """Write the run that the reruns of an arm are, as a file for `rankworks train`."""
        top = standing.best
        if top is None or top.lr is None:
            return
        path = self.files[standing.arm.label](self.output)
        recipe = self.bench.recipe(standing.arm, top.lr, top.settings, self.config.seeds[0], standing.steps)
        values = plain(json.loads(recipe.model_dump_json(exclude_defaults=True)))
        values.pop("output", None)
        seeds = ", ".join(map(str, self.config.seeds))
        text = (
            f"# {self._row_command(standing.arm.label)}\n# The best setting of {standing.arm.label}; seeds {seeds}.\n"
        )
        text += yaml.safe_dump(values, sort_keys=False)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            atomic_write(path, text)


def _files(arms: Sequence[Arm]) -> dict[str, Any]:
    """Return per label a function from the output folder to the arm's recipe; no two arms share a file."""
    taken: set[str] = set()
    files: dict[str, Any] = {}
    for arm in arms:
        name = next(n for n in (arm.slug, *(f"{arm.slug}-{k}" for k in range(2, 10_000))) if n.lower() not in taken)
        taken.add(name.lower())
        files[arm.label] = lambda folder, name=name: folder / "arms" / f"{name}.yaml"
    return files


def _public(config: CompareConfig) -> dict[str, Any]:
    """Return the configuration as plain data, without a password in the storage's URL."""
    values = plain(json.loads(config.model_dump_json()))
    if config.storage is not None:
        values["storage"] = shown(config.storage)
    return values
