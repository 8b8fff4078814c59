"""Whole runs: `train` on a model that is there, `run` from a configuration alone.

What a run leaves in its output folder:

    config.yaml      the configuration, written first: it tells a resumed run from another one
    search.json      what a selection that searches chose, with every score; search/ holds that search
    before.json      the measurement of the base model
    rate.json        what `lr: auto` measured at the first start; a resumed run keeps it
    metrics.jsonl    one line per step
    checkpoints/     the newest whole checkpoints
    adapter/         the trained adapter; model/ in its place where the whole model was trained
    result.json      the `RunResult`, written last: a folder without it holds an unfinished run
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from rankworks.calibrate import needed
from rankworks.core.adapt import active, adapt, disabled
from rankworks.core.errors import ConfigError
from rankworks.core.evidence import Evidence
from rankworks.core.files import atomic_write
from rankworks.core.hooks import Hook
from rankworks.core.hub import load_model
from rankworks.core.optim.held import held_bytes
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import state_of
from rankworks.core.store import TENSORS, adapter_state, save
from rankworks.core.summary import trainable_parameters
from rankworks.train.batching.batches import Example
from rankworks.train.calibration import measure_evidence
from rankworks.train.checkpoint import Checkpoints
from rankworks.train.config import AUTO, OptimConfig, RunConfig, load_config
from rankworks.train.loop import Loop
from rankworks.train.measuring.measure import Evaluator, Measured
from rankworks.train.precision import resolved
from rankworks.train.prepare import Prepared
from rankworks.train.processes import processes
from rankworks.train.quantising import products, quantise_base, together
from rankworks.train.rates.rate import FILE as RATE
from rankworks.train.rates.rate import MeasuredRate, measure_rate, read_rate
from rankworks.train.result import Confusion, RunResult, Shown
from rankworks.train.searching.search import FOUND, chosen_spec, must_search, search, widest
from rankworks.train.sources import DataConfig, Task, load_task
from rankworks.train.standing import record, unfinished
from rankworks.train.whole import save_model, train_whole

Source = RunConfig | Mapping[str, Any] | str | Path

HEADS = ("classifier", "score", "classification_head")
"""What transformers calls a classification head: new and random, so `run` trains it in full unless told otherwise."""


def run(
    config: Source,
    overrides: Sequence[str] = (),
    *,
    hooks: Sequence[Hook] = (),
    resume: bool = True,
    progress: bool = True,
) -> RunResult:
    """Load the model and the data of a configuration, measure, adapt, train, measure again and save the adapter.

    With `adapt: none` the whole model is trained and saved.

    config: a `RunConfig`, a mapping, or the path of a YAML file; overrides: `key=value`, e.g. "optim.lr=1e-3".
    resume: go on with an unfinished run that the output folder holds; False starts over. Raises `RankworksError`s.
    """
    config = load_config(config, overrides)
    if config.model is None or config.data is None:
        raise ConfigError("a run needs model and data, e.g. model: {name: smollm2-135m} and data: {name: bbc-news}.")
    state = processes()
    with state.local_main_process_first():
        task = load_task(config.data)
        labels = task.classes if config.model.task == "classification" else None
        device = config.model.device or state.device
        settings = config.model
        model, tokenizer = load_model(
            settings.name,
            settings.dtype,
            device,
            settings.task,
            labels=labels,
            seed=config.train.seed,
            start=settings.start,
            tokenizer=settings.tokenizer,
            shape=settings.shape,
        )
    if config.output is None:
        what = config.optim.name if config.adapt is None else config.adapt.get("delta", "lora")
        config.output = f"runs/{task.title}-{what}".replace(" ", "-").lower()
    if config.adapt is None:
        return _Job(train_whole(model), tokenizer, task, config, resume, progress).run(hooks, progress)
    heads = [n for n, _ in model.named_children() if n in HEADS] if settings.task == "classification" else []
    spec = AdaptSpec.from_flat({"delta": "lora", "seed": config.train.seed, "full": heads, **config.adapt})
    searching = must_search(spec)
    evidence = _evidence(model, tokenizer, task, config, widest(model, spec) if searching else spec, progress)
    examples = None
    if searching:
        prepared = Prepared(task, model, tokenizer, progress and state.is_main_process)
        examples, pad = prepared.examples(task.train, "train"), prepared.pad
        found = search(model, examples, spec, config, evidence=evidence, pad=pad, resume=resume, progress=progress)
        spec = chosen_spec(spec, found.chosen)
    adapt(model, spec, evidence=evidence)
    with disabled(model):  # before: the base model itself
        job = _Job(model, tokenizer, task, config, resume, progress, examples)
    return job.run(hooks, progress)


def _evidence(
    model: nn.Module, tokenizer: Any, task: Task, config: RunConfig, spec: AdaptSpec, progress: bool
) -> Evidence | None:
    """Quantise the base where the run says so, and measure on the training data what else the method asks to know.

    None where there is nothing to know.
    """
    show, known = progress and processes().is_main_process, None
    if config.model is not None and config.model.quantise is not None:
        known = quantise_base(model, config.model.quantise, products(model, spec), show)
    if not needed(model, spec, known):
        return known
    prepared = Prepared(task, model, tokenizer, show)
    measured = measure_evidence(
        model,
        prepared,
        spec,
        batches=config.calibrate.batches,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        given=known,
        progress=show,
    )
    return together(known, measured)


def train(
    model: nn.Module,
    tokenizer: Any,
    data: Task | DataConfig | Mapping[str, Any] | str,
    config: Source | None = None,
    hooks: Sequence[Hook] = (),
    *,
    resume: bool = True,
    progress: bool = True,
) -> RunResult:
    """Train the parameters of `model` that require a gradient (after `adapt`, an adapter's); measure before and after.

    data: a `Task`, the `data:` block of a configuration or a sample's name; config: its optim, train, evaluate and
    output blocks are used. With config.output, files are written there, and an unfinished run is continued.

    Raises `RankworksError`s.
    """
    config = load_config(config if config is not None else {})
    task = data if isinstance(data, Task) else load_task(data)
    return _Job(model, tokenizer, task, config, resume, progress).run(hooks, progress)


class _Job:
    """One run on a model and a task: everything is read and measured when it is made, trained and written by `run`."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        task: Task,
        config: RunConfig,
        resume: bool,
        progress: bool,
        examples: list[Example] | None = None,
    ):
        self.model, self.config, self.searched = model, config, examples is not None
        self.folder = Path(config.output) if config.output else None
        self.continued = resume and unfinished(config)
        self.main = processes().is_main_process
        self.prepared = Prepared(task, model, tokenizer, progress and self.main)
        self.examples = self.prepared.examples(task.train, "train") if examples is None else examples
        precision = config.train.precision
        held_out, where = (task.test, "test") if task.test else (task.train, "train")
        self.evaluator = Evaluator(self.prepared, held_out, config.evaluate, where, precision)
        self.validator = None
        if config.train.eval_every:
            self.validator = Evaluator(self.prepared, task.valid or held_out, config.evaluate, "valid", precision)
        self.before = self._read_before() if self.continued else self.evaluator.measure(model)

    def run(self, hooks: Sequence[Hook], progress: bool) -> RunResult:
        """Train, measure again, and write what there is to keep."""
        model, config, validator = self.model, self.config, self.validator
        rate, optim = self._rate(progress)
        loop = Loop(
            model,
            self.examples,
            config.train,
            optim,
            hooks=hooks,
            folder=self.folder,
            evaluate=(lambda: validator.measure(model, quick=True).metrics) if validator is not None else None,
            pad=self.prepared.pad,
            progress=progress,
        )
        if not (self.continued and loop.restore()):
            set_seed(config.train.seed, device_specific=True)
            if self.folder is not None and self.main:
                _start(self.folder, config, self.before, self.searched, rate)
        processes().wait_for_everyone()
        loop.run()
        result = _result(model, loop, self.before, self.evaluator.measure(model), self.folder)
        result.rate = None if rate is None else asdict(rate)
        if self.folder is not None and not result.adapter:
            result.model = str(self.folder / "model")
            if self.main:
                result.model_bytes = save_model(model, self.prepared.tokenizer, self.folder / "model")
        if self.folder is not None and self.main:
            atomic_write(self.folder / "result.json", json.dumps(result.to_dict(), indent=1))
        processes().wait_for_everyone()
        return result

    def _rate(self, progress: bool) -> tuple[MeasuredRate | None, OptimConfig]:
        """Return what `lr: auto` measured, now or at the first start, and the optimizer's settings with a number."""
        optim = self.config.optim
        if optim.lr != AUTO:
            return None, optim
        rate = read_rate(self.folder) if self.continued and self.folder is not None else None
        if rate is None:
            show, pad = progress and self.main, self.prepared.pad
            rate = measure_rate(self.model, self.examples, self.config.train, optim, pad=pad, progress=show)
        if progress and self.main:
            print(f"learning rate {rate}", file=sys.stderr, flush=True)
        return rate, optim.model_copy(update={"lr": rate.lr})

    def _read_before(self) -> Measured:
        assert self.folder is not None
        values = json.loads((self.folder / "before.json").read_text(encoding="utf-8"))
        confusion = values["confusion"]
        answers = [tuple(answer) for answer in values["answers"]]
        return Measured(values["metrics"], answers, Confusion(**confusion) if confusion else None)


def _start(folder: Path, config: RunConfig, before: Measured, searched: bool, rate: MeasuredRate | None = None) -> None:
    """Make the output folder a new run's: earlier checkpoints and metrics go, the adapter stays till the end."""
    Checkpoints(folder / "checkpoints").clear()
    for name in ("result.json", "metrics.jsonl", RATE, *([] if searched else [FOUND])):
        (folder / name).unlink(missing_ok=True)
    if rate is not None:
        atomic_write(folder / RATE, rate.to_json())
    atomic_write(folder / "before.json", json.dumps(asdict(before)))
    record(config, folder / "config.yaml")


def _result(model: nn.Module, loop: Loop, before: Measured, after: Measured, folder: Path | None) -> RunResult:
    names, history = active(model), loop.history
    adapter = None
    if folder is not None and names:
        adapter = folder / "adapter"
        if loop.main:
            for name in names:
                save(model, adapter if len(names) == 1 else adapter / name, name)
        processes().wait_for_everyone()
        size = sum(file.stat().st_size for file in adapter.rglob(TENSORS))
    else:
        size = sum(t.numel() * t.element_size() for name in names for t in adapter_state(model, name).values())
    pairs = zip(before.answers, after.answers, strict=True)
    return RunResult(
        before=before.metrics,
        after=after.metrics,
        trainable_parameters=trainable_parameters(model),
        total_parameters=sum(p.numel() for p in model.parameters()),
        adapter_bytes=size,
        tokens_per_second=round(history.tokens_per_second, 1),
        peak_memory_bytes=history.peak_memory_bytes,
        adapter=str(adapter) if adapter is not None else None,
        steps=loop.step,
        seconds=round(history.seconds, 3),
        losses=history.losses,
        valid=history.valid,
        examples=[Shown(prompt, expected, first, second) for (prompt, expected, first), (_, _, second) in pairs],
        confusion=after.confusion,
        output=str(folder) if folder is not None else None,
        chosen=_chosen(model, names),
        optimizer_bytes=held_bytes(loop.optimizer),
        precision=resolved(loop.train.precision, next(model.parameters()).device),
        judged=len(after.right),
    )


def _chosen(model: nn.Module, names: Sequence[str]) -> list[str] | None:
    """Return what the selection of the one adapter that acts chose, or None."""
    adapter = state_of(model).adapter(names[0]) if len(names) == 1 else None
    if adapter is None or adapter.spec.select is None:
        return None
    select: Any = adapter.spec.select
    return select.method.cls(select).told(list(adapter.sites.values()))
