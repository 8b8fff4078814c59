"""The search of a selection that learns what to adapt: before the run itself, on its training data.

    hold out a share of the training data
    adapt every unit, each change times a weight of its score        core/scaled.py, core/select.py
    train the changes on the rest, the scores on what is held out    train/searching/relax.py
    let the selection decide, take everything off again

The adapter that is then made starts afresh and is trained on all the data. What was found stands in `search.json` of
the output folder, as {"select", "chosen", "sites", "scores", "weights", "steps", "loss"}; checkpoints and metrics of
the search lie in `search/`. A search that was stopped goes on bit for bit, one that was finished is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from rankworks.core.adapt import adapt, detach
from rankworks.core.build import sharing
from rankworks.core.errors import ConfigError, DataError
from rankworks.core.evidence import Evidence
from rankworks.core.files import atomic_write
from rankworks.core.refuse import check
from rankworks.core.resolve import resolve
from rankworks.core.scaled import refuse_weightless, scaled
from rankworks.core.select import Searching
from rankworks.core.spec import AdaptSpec
from rankworks.core.targets import find_sites
from rankworks.train.batching.batches import Example
from rankworks.train.checkpoint import Checkpoints
from rankworks.train.config import AUTO, RunConfig, TrainConfig
from rankworks.train.loop import Loop
from rankworks.train.losses.objective import Objective
from rankworks.train.processes import processes
from rankworks.train.searching.relax import Relaxed, ScoreSteps, WholeObjective
from rankworks.train.sources.split import hold_out
from rankworks.train.standing import record, same

FOUND = "search.json"
NAME = "search"


@dataclass(frozen=True)
class Found:
    """What a search found: the units that were chosen, their sites, and every unit's score and last weight."""

    select: str
    chosen: list[str]
    sites: list[str]
    scores: dict[str, float]
    weights: dict[str, float]
    steps: int
    loss: float | None


def must_search(spec: AdaptSpec) -> bool:
    """Say whether the adapter's selection has yet to search."""
    cls: Any = None if spec.select is None else spec.select.method.cls
    return cls is not None and cls.searches and spec.select.chosen is None  # type: ignore[union-attr]


def widest(model: nn.Module, spec: AdaptSpec) -> AdaptSpec:
    """Return the spec of the search's adapter: every unit chosen, and no rank schedule, whose cuts are for the run."""
    return chosen_spec(spec, list(_units(model, spec))).model_copy(update={"ranks": None})


def chosen_spec(spec: AdaptSpec, chosen: Sequence[str]) -> AdaptSpec:
    """Return the spec with what a search chose."""
    assert spec.select is not None
    return spec.model_copy(update={"select": spec.select.replace(chosen=list(chosen))})


def search(
    model: nn.Module,
    examples: Sequence[Example],
    spec: AdaptSpec,
    config: RunConfig,
    *,
    evidence: Evidence | None = None,
    pad: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> Found:
    """Search on the examples, and leave the model as it was.

    config: its search, train, optim and output blocks are used; with output, files are written there and a search that
    was stopped is continued. Raises `RankworksError`s, before any work where the spec itself is at fault.
    """
    units = _units(model, spec)
    selection = _selection(spec)
    _refuse(model, spec, units)
    search_rate(config)
    folder = Path(config.output) if config.output else None
    if folder is not None and _begun(folder, config, resume):
        found = _read(folder)
        if found is not None:
            return found
    parts: Any = hold_out(list(examples), config.search.valid, config.train.seed)  # type: ignore[arg-type]
    rest, held = parts
    if not held:
        raise DataError(
            f"{spec.select.key} holds out a share of the training data, and there is one example: give more data."  # type: ignore[union-attr]
        )
    adapt(model, widest(model, spec), name=NAME, evidence=evidence)
    try:
        with scaled(model, NAME) as changes:
            relaxed = Relaxed(selection, units, changes)
            loop = _loop(model, relaxed, rest, held, config, folder, pad, progress)
            if not loop.restore():
                set_seed(config.train.seed, device_specific=True)
            losses = loop.run().losses
    finally:
        detach(model, NAME)
    found = _found(relaxed, losses)
    if folder is not None and processes().is_main_process:
        atomic_write(folder / FOUND, json.dumps(asdict(found), indent=1))
        Checkpoints(folder / NAME / "checkpoints").clear()
    processes().wait_for_everyone()
    return found


def _selection(spec: AdaptSpec) -> Searching:
    assert spec.select is not None
    return spec.select.method.cls(spec.select)  # type: ignore[call-arg,return-value]


def _units(model: nn.Module, spec: AdaptSpec) -> dict[str, list[str]]:
    """Return the units among the spec's targets."""
    refuse_weightless(spec.delta)
    sites = find_sites(model, spec.targets, spec.exclude, spec.delta.method.cls.kinds)
    units = _selection(spec).units(sites)
    if not units:
        raise ConfigError(f"{spec.select.key} chooses among layers, and none of the targeted sites lies in one.")  # type: ignore[union-attr]
    return units


def _refuse(model: nn.Module, spec: AdaptSpec, units: dict[str, list[str]]) -> None:
    """Raise for what would fail after the search: a change that cannot be shared, nothing to keep, ..."""
    chosen = _selection(spec).decide(dict.fromkeys(units, 0.0))
    outcome = chosen_spec(spec, chosen)
    resolved = resolve(model, outcome)
    check(resolved, outcome)
    sharing(resolved, outcome)


def _loop(
    model: nn.Module,
    relaxed: Relaxed,
    rest: Sequence[Example],
    held: Sequence[Example],
    config: RunConfig,
    folder: Path | None,
    pad: int,
    progress: bool,
) -> Loop:
    """Return the loop that trains the changes, with the hook that trains the scores."""
    train, settings = config.train, config.search
    steps = settings.steps or train.total_steps(len(rest))
    plain = {"steps": steps, "epochs": None, "compile": False, "eval_every": None, "tensorboard": False}
    train = TrainConfig(**{**train.model_dump(), **plain})
    optim = config.optim.model_copy(update={"lr": search_rate(config)})
    deep = relaxed.selection.depth > 0
    chunk = train.loss_chunk_mib * 2**20
    objective = WholeObjective(model, train.precision) if deep else Objective(model, chunk, train.precision)
    hook = ScoreSteps(
        relaxed,
        objective,
        held,
        rest,
        rate=settings.scores_lr,
        batch_size=train.batch_size,
        count=settings.batches,
        seed=train.seed,
    )
    loop = Loop(
        model,
        rest,
        train,
        optim,
        hooks=[hook],
        folder=None if folder is None else folder / NAME,
        pad=pad,
        progress=progress,
        title="searching",
    )
    hook.batches = lambda examples: loop.collator.micro_batches(examples)
    return loop


def search_rate(config: RunConfig) -> float:
    """Return the rate of the search's adapter. Raises `ConfigError` where it is left to a rate not yet measured."""
    if config.search.lr is None and config.optim.lr == AUTO:
        raise ConfigError(
            "optim.lr: auto is measured on the adapter that the search chooses, so the search itself needs a number: "
            "give search.lr, e.g. 2e-4."
        )
    return config.search.lr or config.optim.rate


def _begun(folder: Path, config: RunConfig, resume: bool) -> bool:
    """Say whether the folder holds a search of this run, begun or finished; make it a new run's where it does not.

    Raises `ConfigError` where it holds an unfinished run of another configuration.
    """
    recorded = folder / NAME / "config.yaml"
    if resume and not (folder / "result.json").exists() and same(config, recorded, "an unfinished search"):
        return True
    processes().wait_for_everyone()
    if processes().is_main_process:
        for path in (folder / NAME / "checkpoints", folder / "checkpoints"):
            Checkpoints(path).clear()
        for name in ("result.json", "metrics.jsonl", FOUND, f"{NAME}/metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)
        record(config, recorded)
    processes().wait_for_everyone()
    return False


def _read(folder: Path) -> Found | None:
    """Return what a finished search found, or None."""
    try:
        return Found(**json.loads((folder / FOUND).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _found(relaxed: Relaxed, losses: Sequence[float]) -> Found:
    values = [round(x, 6) for x in relaxed.scores.tolist()]
    weights = [round(x, 6) for x in relaxed.selection.weights(relaxed.scores).tolist()]
    units = list(relaxed.units)
    chosen = relaxed.selection.decide(dict(zip(units, relaxed.scores.tolist(), strict=True)))
    return Found(
        select=relaxed.selection.key,
        chosen=chosen,
        sites=[site for unit in chosen for site in relaxed.units[unit]],
        scores=dict(zip(units, values, strict=True)),
        weights=dict(zip(units, weights, strict=True)),
        steps=len(losses),
        loss=losses[-1] if losses else None,
    )
