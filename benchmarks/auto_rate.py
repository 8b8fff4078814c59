"""How near `optim.lr: auto` comes to a sweep, and at which cost: pairs of a method and a task, some for calibration.

    improvement = held-out loss before - after the run
    sweep       runs in half decades: at the measured rate and on both sides of it, and on until the best of them lies
                inside; its improvement is what the measured rate's is a share of
    cost        forward-backward passes of the measurement over those of a sweep of `TRIALS` runs: of each pair, and of
                all together, where long runs count as much as they cost

Beside it the rates of the sharpness law, lr = c / sqrt(n lambda), at the constant that serves the calibration pairs
best. Every finished run is a line in a file, so a benchmark that was stopped goes on where it was; nothing here
measures time.

    python benchmarks/auto_rate.py [--only minilm,tiny] [--side calibrate|held-out]
    python benchmarks/auto_rate.py --finished      the table of the pairs that are finished
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

TRIALS = 6
"""Runs of the sweep that a measurement saves: the default of `rankworks compare`."""

NEAR = 0.95
"""Share of the best improvement that counts as near."""

ITERATIONS = 6
"""Products with the Hessian for the law."""


class Cells:
    """The file of finished cells."""

    def __init__(self, file: Path, closed: bool = False):
        """`closed`: nothing is run, and what is missing raises `KeyError`."""
        self.file, self.closed = file, closed
        lines = file.read_text().splitlines() if file.exists() else []
        self.known: dict[str, dict[str, Any]] = {(cell := json.loads(line))["cell"]: cell for line in lines}

    def has(self, key: list[Any]) -> bool:
        """Say whether a cell is finished."""
        return json.dumps(key, sort_keys=True) in self.known

    def get(self, key: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a finished cell, made now if it was not before."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.known and self.closed:
            raise KeyError(name)
        if name not in self.known:
            cell = {"cell": name, **make()}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            self.known[name] = cell
        return self.known[name]


def pair(cells: Cells, task: str, method: str) -> dict[str, Any]:
    """Return what came of a pair."""
    import auto_rate_tasks as tasks

    from rankworks.train.rates import rate as rule

    setting = tasks.SETTINGS[task]
    what = [task, asdict(setting), method, tasks.METHODS[method]]
    rules = [rule.ROSE, rule.LEFT, rule.FEWEST, rule.MOST, rule.SHARE]
    found = cells.get(["measure", *what, rules], lambda: measure(task, method))
    law = cells.get(["law", *what], lambda: sharpness_of(task, method))
    sweep: dict[int, float] = {}  # k -> improvement at 10^(k/2)

    def run(k: int) -> None:
        cell = cells.get(["run", *what, k], lambda: train(task, method, float(f"{10 ** (k / 2):.3g}")))
        sweep[k] = -math.inf if cell["after"] is None else cell["before"] - cell["after"]

    at = round(2 * math.log10(found["lr"]))
    for k in range(-12, 4):
        if abs(k - at) <= 1 or cells.has(["run", *what, k]):
            run(k)
    while (best := max(sweep, key=lambda k: sweep[k])) in (min(sweep), max(sweep)) and abs(best - at) < 6:
        run(best - 1 if best == min(sweep) else best + 1)
    return {
        "task": task,
        "method": method,
        "lr": found["lr"],
        "best": float(f"{10 ** (best / 2):.3g}"),
        "improvement": _number(sweep[at]),
        "best_improvement": round(sweep[best], 4),
        "share": round(sweep[at] / sweep[best], 4) if math.isfinite(sweep[at]) else 0.0,
        "passes": found["passes"],
        "cost": round(found["passes"] / (TRIALS * setting.steps), 4),
        "sharpness": law["sharpness"],
        "numbers": law["numbers"],
        "sweep": {
            f"{10 ** (k / 2):.3g}": round(sweep[k], 4) if math.isfinite(sweep[k]) else None for k in sorted(sweep)
        },
    }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def measure(task: str, method: str) -> dict[str, Any]:
    """Return what `lr: auto` finds."""
    import auto_rate_tasks as tasks

    from rankworks.train.config import OptimConfig
    from rankworks.train.rates.rate import measure_rate

    loaded = tasks.load(task)
    with tasks.adapted(loaded, method) as model:
        train, optim = tasks.train_config(task), OptimConfig(lr="auto")
        found = measure_rate(model, loaded.examples, train, optim, pad=loaded.pad, progress=False)
    return asdict(found)


def sharpness_of(task: str, method: str) -> dict[str, Any]:
    """Return the largest eigenvalue of the Hessian at the start, on the run's first batch."""
    import auto_rate_tasks as tasks
    import torch

    from rankworks.core.summary import trained
    from rankworks.train.batching.batches import Collator, Sampler
    from rankworks.train.losses.heads import evaluating
    from rankworks.train.losses.objective import Objective
    from rankworks.train.rates.sharpness import sharpness

    loaded = tasks.load(task)
    first = Sampler(len(loaded.examples)).take(tasks.SETTINGS[task].batch)
    batch = Collator(loaded.pad).batch([loaded.examples[i] for i in first])
    with tasks.adapted(loaded, method) as model, evaluating(model):
        parameters, objective = trained(model), Objective(model)

        def gradient() -> list[torch.Tensor]:
            loss = objective.loss(batch) / batch.learned
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

        found = sharpness(gradient, parameters, iterations=ITERATIONS)
    return {"sharpness": found.value, "numbers": found.numbers}


def train(task: str, method: str, rate: float) -> dict[str, Any]:
    """Return the held-out loss before and after a run; `after` is None where it diverged."""
    import auto_rate_tasks as tasks
    import torch

    from rankworks.core.errors import TrainingError
    from rankworks.train.config import OptimConfig
    from rankworks.train.loop import Loop

    loaded = tasks.load(task)
    with tasks.adapted(loaded, method) as model:
        before, after = tasks.held_out_loss(loaded), None
        optim, settings = OptimConfig(lr=rate), tasks.train_config(task)
        loop = Loop(model, loaded.examples, settings, optim, pad=loaded.pad, progress=False)
        torch.manual_seed(0)
        try:
            loop.run()
            after = tasks.held_out_loss(loaded)
        except TrainingError:
            pass  # it diverged: that is what is recorded
    finite = after is not None and math.isfinite(after)
    return {"before": before, "after": after if finite else None}


def interpolated(row: dict[str, Any], rate: float) -> float:
    """Return the share of the best improvement at a rate between those of the sweep; 0 outside of it."""
    points = sorted((math.log10(float(r)), max(0.0, v or 0.0)) for r, v in row["sweep"].items())
    x = math.log10(rate)
    for (a, low), (b, high) in itertools.pairwise(points):
        if a <= x <= b:
            return (low + (high - low) * (x - a) / (b - a)) / row["best_improvement"]
    return 0.0


def of_law(row: dict[str, Any], c: float) -> float:
    """Return the share that the law's rate reaches, 0 where the sharpness is not positive."""
    product = row["numbers"] * row["sharpness"]
    return interpolated(row, c / math.sqrt(product)) if product > 0 else 0.0


def summary(rows: list[dict[str, Any]], share: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """Return how many pairs are near their best, and how near the middle one is."""
    shares = sorted(share(row) for row in rows)
    near = sum(s >= NEAR for s in shares)
    return {
        "pairs": len(rows),
        "near": near,
        "near_share": round(near / len(rows), 3),
        "median": round(shares[len(shares) // 2], 3),
        "worst": round(shares[0], 3),
    }


def spent(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the measurements cost beside the sweeps: all together, the middle one, and the mean of the shares."""
    costs, swept = sorted(row["cost"] for row in rows), sum(row["passes"] / row["cost"] for row in rows)
    return {
        "cost_together": round(sum(row["passes"] for row in rows) / swept, 4),
        "cost_median": costs[len(costs) // 2],
        "cost_mean": round(sum(costs) / len(costs), 4),
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the summaries of both sides: of the measured rate, and of the law at its calibrated constant."""
    known = rows["calibrate"]
    constants = [10 ** (k / 20) for k in range(-20, 41)]
    c = max(constants, key=lambda c: (sum(of_law(r, c) >= NEAR for r in known), sum(of_law(r, c) for r in known)))
    made: dict[str, Any] = {"law_constant": round(c, 3)}
    for side, found in rows.items():
        if found:
            made[side] = {
                "auto": summary(found, lambda row: row["share"]) | spent(found),
                "law": summary(found, lambda row: of_law(row, c)),
            }
    return made


def main() -> None:
    """Run what is missing, write the table when everything is there."""
    asked = _asked()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(asked.threads)  # before torch is imported
    import auto_rate_tasks as tasks
    import common
    import torch

    torch.set_num_threads(asked.threads)
    cells = Cells(asked.cells, asked.finished)
    sides = {"calibrate": tasks.CALIBRATE, "held-out": tasks.HELD_OUT}
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    unfinished: list[str] = []
    for side, which in sides.items():
        for task, method in tasks.pairs(which):
            if asked.side in (side, "both") and chosen(asked.only, task) and chosen(asked.methods, method):
                try:
                    row = pair(cells, task, method)
                except KeyError:  # with --finished
                    unfinished.append(f"{task} {method}")
                    continue
                rows[side].append(row)
                common.note(
                    f"{side}: {task} {method}: {row['lr']:g} of {row['best']:g}, {row['share']:.1%} {row['sweep']}"
                )
    if rows["calibrate"]:
        result = {"benchmark": "auto_rate", "environment": common.environment("none"), "trials": TRIALS}
        result |= {"settings": {task: asdict(s) for task, s in tasks.SETTINGS.items()}, "methods": tasks.METHODS}
        told = [{"side": side, **row} for side, found in rows.items() for row in found]
        result |= {"summary": table(rows), "pairs": told, "unfinished": unfinished}
        whole = asked.side == "both" and asked.only is None and asked.methods is None
        common.finish(result, asked.output or (common.RESULTS / "auto_rate.json" if whole else None))


def chosen(names: str | None, name: str) -> bool:
    """Say whether a name is among those asked for."""
    return names is None or name in names.split(",")


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The measured learning rate against a sweep.")
    parser.add_argument("--side", default="both", choices=("calibrate", "held-out", "both"))
    parser.add_argument("--only", help="some of the tasks, with commas")
    parser.add_argument("--methods", help="some of the methods, with commas")
    parser.add_argument("--finished", action="store_true", help="run nothing, tell what is finished")
    parser.add_argument("--threads", type=int, default=1)
    default = Path(__file__).parent / "results" / "auto_rate_cells.jsonl"
    parser.add_argument("--cells", type=Path, default=default, help="where finished runs are kept")
    parser.add_argument("--output", type=Path, help="default: results/auto_rate.json when everything is measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
