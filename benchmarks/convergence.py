"""How fast methods learn: every contender at its own best rate out of one grid, over several seeds, on real tasks.

Used by inits_convergence.py and ranks.py. A cell is one run: (contender, learning rate, seed). The grid is
run with the first seed; a contender's best rate is the one with the lowest held-out loss at the end, and the other
seeds are run at that rate. Where the best lies at an edge of the grid, that contender's goes on beyond it by the same
factor until the best lies inside. Batches, their order and the held-out records are the same for all contenders of a
seed, so losses are compared seed by seed. Every finished cell is a line in a file, so a benchmark that was stopped goes
on where it was; nothing here measures time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

MODEL = "smollm2-135m"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a two-sided 95 % interval of a mean, by the number of seeds."""

DIVERGED = 1e9
"""The end loss of a run that was stopped because its loss was not finite."""

TASKS: dict[str, dict[str, Any]] = {
    "bbc": {"data": {"name": "bbc-news", "max_length": 64}},
    "stdlib": {"data": {"name": "python-stdlib", "max_length": 64}},
}


@dataclass(frozen=True)
class Setting:
    """What all cells of a benchmark have in common."""

    steps: int = 24
    batch: int = 8
    every: int = 6  # steps between measurements of the held-out loss
    held_out: int = 32  # examples
    precision: Literal["float32", "bf16"] = "bf16"  # products; the model, the starts and the adapters are float32
    rates: tuple[float, ...] = (2e-4, 8e-4, 3.2e-3)
    seeds: tuple[int, ...] = (0, 1, 2)


class Bench:
    """One task: the model and the examples, and the file of finished cells."""

    def __init__(
        self,
        task: str,
        setting: Setting,
        file: Path,
        contenders: Mapping[str, dict[str, Any]],
        finish: Mapping[str, Callable[[Any], object]] | None = None,
    ):
        """`finish`: by contender, a function of the trained model that runs before it is measured at the end."""
        self.task, self.setting, self.file, self.contenders = task, setting, file, contenders
        self.finish = finish or {}
        self.cells: dict[str, dict[str, Any]] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                cell = json.loads(line)
                self.cells[cell["cell"]] = cell
        self._loaded: Any = None
        self._measured: tuple[Any, Any] = (None, None)  # the last contender and seed, and what was measured for them

    def run(self) -> dict[str, Any]:
        """Run what is missing and return the table of contenders."""
        import common

        rows = {}
        first, *others = self.setting.seeds
        for number, name in enumerate(self.contenders, start=1):
            grid = self._grid(name, first)
            best = min(grid, key=lambda rate: grid[rate]["end"])
            cells = [grid[best], *(self.cell(name, best, seed) for seed in others)]
            rows[name] = {"rate": best, "ends": [c["end"] for c in cells], "cells": cells, "grid": grid}
            common.note(
                f"{self.task}: {name} ({number} of {len(self.contenders)}), rate {best:g}: {rows[name]['ends']}"
            )
        return rows

    def _grid(self, name: str, seed: int) -> dict[float, dict[str, Any]]:
        """Return the runs of one seed by rate, over the setting's rates and beyond until the best lies inside."""
        grid = {rate: self.cell(name, rate, seed) for rate in self.setting.rates}
        factor = self.setting.rates[1] / self.setting.rates[0]
        while True:
            best = min(grid, key=lambda rate: grid[rate]["end"])
            if best not in (min(grid), max(grid)):
                return grid
            beyond = float(f"{best / factor if best == min(grid) else best * factor:.6g}")
            grid[beyond] = self.cell(name, beyond, seed)

    def cell(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Return one finished run, made now if it was not before."""
        what = [self.task, self.contenders[name], rate, seed, _plain(self.setting)]
        if name in self.finish:
            what.append(self.finish[name].__name__)
        key = json.dumps(what, sort_keys=True)
        if key not in self.cells:
            cell = {"cell": key, "name": name, "rate": rate, "seed": seed, **self._train(name, rate, seed)}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            self.cells[key] = cell
        return self.cells[key]

    def _train(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        import rankworks as rw
        from rankworks.calibrate import needed
        from rankworks.core.errors import TrainingError
        from rankworks.core.spec import AdaptSpec
        from rankworks.train.calibration import measure_evidence
        from rankworks.train.config import OptimConfig, TrainConfig
        from rankworks.train.loop import Loop
        from rankworks.train.measuring.evaluate import mean_loss
        from rankworks.train.precision import autocast

        model, prepared, examples, held_out = self._load()
        setting, pad = self.setting, prepared.pad
        spec = AdaptSpec.from_flat({"seed": seed, **self.contenders[name]})
        if needed(model, spec) and self._measured[0] != (name, seed):  # the rates of a seed start from the same
            how: dict[str, Any] = {"batches": 8, "batch_size": setting.batch, "seed": seed, "progress": False}
            self._measured = (name, seed), measure_evidence(model, prepared, spec, **how)
        rw.adapt(model, spec, evidence=self._measured[1] if needed(model, spec) else None)
        try:
            how = {"batch_size": setting.batch, "precision": setting.precision, "eval_every": setting.every}
            train = TrainConfig(steps=setting.steps, seed=seed, **how)
            optim = OptimConfig(lr=rate, schedule="linear", warmup=0.1)

            def measure() -> dict[str, float]:
                with autocast(model, setting.precision):
                    return mean_loss(model, held_out, pad)

            start, left = measure()["loss"], dict[str, Any]()
            loop = Loop(model, examples, train, optim, evaluate=measure, pad=pad, progress=False)
            try:
                loop.run()
                left["ranks_trained"] = ranks(model)
                if name in self.finish:
                    self.finish[name](model)
                end = measure()["loss"]
            except TrainingError:  # it diverged
                end = DIVERGED
            left |= {"trained": rw.trainable_parameters(model), "ranks": ranks(model)}
        finally:
            rw.detach(model)
        return {"start": start, "valid": [[v["step"], v["loss"]] for v in loop.history.valid], "end": end, **left}

    def _load(self) -> Any:
        if self._loaded is None:
            import rankworks as rw
            from rankworks.train.prepare import Prepared
            from rankworks.train.sources import load_task

            model, tokenizer = rw.load_model(MODEL, dtype="float32")
            task = load_task(TASKS[self.task]["data"])
            prepared = Prepared(task, model, tokenizer, progress=False)
            records = task.train[: 40 * self.setting.batch * self.setting.steps]
            examples = prepared.examples(records, "train")
            held_out = prepared.examples((task.test or task.valid or [])[: self.setting.held_out * 2], "test")
            self._loaded = model, prepared, examples, held_out[: self.setting.held_out]
        return self._loaded


def command(
    name: str, says: str, contenders: Mapping[str, dict[str, Any]], plain: str, setting: Setting, **options: Any
) -> None:
    """Run a benchmark of learning from the command line: choose, run what is missing, write `results/<name>.json`.

    plain: the contender that all others are held against, which always runs; options: for `Bench`.
    """
    asked = _asked(name, says, setting)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(asked.threads)  # before torch is imported
    import common
    import torch

    torch.set_num_threads(asked.threads)
    names = list(contenders) if asked.only == "all" else list(dict.fromkeys([plain, *asked.only.split(",")]))
    setting = replace(setting, steps=asked.steps)
    cells = asked.cells or common.RESULTS / f"{name}_cells.jsonl"
    result: dict[str, Any] = {"benchmark": name, "environment": common.environment("none")}
    result["setting"] = {"model": MODEL, "tasks": TASKS, **asdict(setting)}
    for task in asked.tasks.split(","):
        rows = Bench(task, setting, cells, {name: contenders[name] for name in names}, **options).run()
        result[task] = against(rows, plain)
    everything = asked.only == "all" and asked.tasks == ",".join(TASKS)
    common.finish(result, asked.output or (common.RESULTS / f"{name}.json" if everything else None))


def _asked(name: str, says: str, setting: Setting) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=says)
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of the tasks, with commas")
    parser.add_argument("--only", default="all", help="some of the contenders, with commas")
    parser.add_argument("--steps", type=int, default=setting.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=Path, help=f"where finished runs are kept; default: results/{name}_cells.jsonl")
    parser.add_argument("--output", type=Path, help=f"default: results/{name}.json when everything is measured")
    return parser.parse_args()


def steps_to(valid: Sequence[Sequence[float]], start: float, target: float) -> float | None:
    """Return the step at which a run's held-out loss first is `target`, between measurements; None if it never is."""
    at, loss = 0.0, start
    for step, value in valid:
        if value <= target:
            return at + (step - at) * ((loss - target) / (loss - value) if loss > value else 1.0)
        at, loss = step, value
    return None


def ranks(model: Any) -> dict[str, float]:
    """Return the mean, the least and the largest rank that acts at the adapter's sites."""
    from rankworks.core.state import state_of

    adapter = state_of(model).adapter("default")
    found = []
    for key, delta in adapter.deltas.items():
        factors = delta.factors_on(adapter.sites[key].weight)
        start = getattr(delta.pair, "A0", None)
        found.append(0 if factors is None or delta.empty else factors.A.shape[0] - (0 if start is None else len(start)))
    return {"mean": round(statistics.fmean(found), 3), "least": min(found), "largest": max(found)}


def against(rows: Mapping[str, Any], plain: str) -> dict[str, Any]:
    """Return per contender: its best rate, mean end loss, how far it ends below the plain one, and steps to its end.

    The target is the plain contender's end loss with the same seed; a run that never reaches it counts as more than all
    steps, and then no mean of steps is given. `at_rate` says the same of runs at one rate for both, by the first seed.
    """
    table = {}
    for name, row in rows.items():
        reached = [_steps_between(c, other) for c, other in zip(row["cells"], rows[plain]["cells"], strict=True)]
        known = [r for r in reached if r is not None]
        table[name] = {
            "rate": row["rate"],
            "trained": row["cells"][0]["trained"],
            **{what: [c[what] for c in row["cells"]] for what in ("ranks_trained", "ranks") if what in row["cells"][0]},
            "loss": interval(row["ends"]),
            "below_plain": interval([a - b for a, b in zip(rows[plain]["ends"], row["ends"], strict=True)]),
            "steps": reached,
            "steps_mean": interval(known) if len(known) == len(reached) else None,
            "at_rate": {
                f"{rate:g}": {"loss": round(cell["end"], 4), "steps": _steps_between(cell, rows[plain]["grid"][rate])}
                for rate, cell in sorted(row["grid"].items())
                if rate in rows[plain]["grid"]
            },
        }
    return table


def _steps_between(cell: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Return the steps a run takes to the end loss of another."""
    reached = steps_to(cell["valid"], cell["start"], other["end"])
    return None if reached is None else round(reached, 1)


def interval(numbers: Sequence[float]) -> dict[str, float]:
    """Return the mean and its 95 % interval."""
    mean = statistics.fmean(numbers)
    half = T95[len(numbers)] * statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def _plain(setting: Setting) -> dict[str, Any]:
    """What decides a cell's numbers, without what only says how many cells there are."""
    return {k: v for k, v in asdict(setting).items() if k not in ("rates", "seeds")}
