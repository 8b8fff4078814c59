"""`plan`: what adapting a model costs, or training it as a whole, before a byte of it is loaded.

The adapter is really built, by the same code as for training, but on the meta device: targets, errors, counts and sizes
are those of the real thing, and a traced step (plan/trace.py) gives the memory it takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from rankworks.core.adapt import adapt, detach
from rankworks.core.errors import ConfigError
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.registry import MethodSpec
from rankworks.core.resolve import resolve
from rankworks.core.spec import AdaptSpec
from rankworks.core.start import Init
from rankworks.core.state import state_of
from rankworks.plan.attempt import UntraceableError, attempt
from rankworks.plan.result import NONE, Fit, Plan
from rankworks.plan.source import PACKED, Source, open_source
from rankworks.plan.states import Optimizer, held_bytes, optimizer_bytes, read_optimizer, resting
from rankworks.plan.trace import Trace
from rankworks.plan.units import format_bytes, parse_bytes

ModelLike = str | Path | PretrainedConfig | nn.Module
MOST_ROWS = 1 << 16


class Step:
    """How the model would be trained: the settings of a plan that are not the adapter's."""

    def __init__(
        self,
        optimizer: Optimizer,
        batch_size: int,
        sequence: int,
        checkpointing: bool,
        loss: str = "chunked",
        attention: str = "fused",
        example: Any = None,
        layerwise: bool = False,
    ):
        spec = read_optimizer(optimizer)  # an unknown name is reported before any work
        self.states = optimizer
        if batch_size < 1 or sequence < 1:
            raise ConfigError(f"batch_size and sequence must be at least 1 (given: {batch_size} and {sequence}).")
        if loss not in ("chunked", "full"):
            raise ConfigError(f"loss is 'chunked' (as rankworks trains) or 'full' (all logits), not {loss!r}.")
        if attention not in ("fused", "plain"):
            raise ConfigError(f"attention is 'fused' or 'plain' (the scores are kept), not {attention!r}.")
        method: Any = spec.method.cls
        if layerwise and not method.layerwise:
            raise ConfigError(f"{spec.key} steps on several gradients together: leave layerwise off.")
        self.optimizer, self.layerwise = spec.key, layerwise
        self.evaluations: int = method(spec).evaluations()
        self.batch_size, self.sequence = batch_size, sequence
        self.checkpointing, self.loss, self.fused, self.example = checkpointing, loss, attention == "fused", example


def plan(
    model: ModelLike,
    delta: str | MethodSpec | Mapping[str, Any] | AdaptSpec = "lora",
    *,
    optimizer: Optimizer = "adamw",
    batch_size: int = 1,
    sequence: int = 512,
    dtype: str | None = None,
    fits: str | float | None = None,
    gradient_checkpointing: bool = False,
    layerwise: bool = False,
    loss: str = "chunked",
    attention: str = "fused",
    task: str | None = None,
    example: Tensor | Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Plan:
    """Return what adapting `model` with `delta` and training the adapter costs, without weights.

    delta="none" plans a run without an adapter, in which every weight is trained.

    model: a built-in shape (`shape_names()`), a transformers configuration, a folder with config.json, a hub id, or a
    live model (left as it is). delta, settings: as in `adapt` (`targets`, `init`, `rank`, ...).
    batch_size, sequence: rows and tokens of one micro-batch. dtype: of the base weights: float32, bfloat16, float16,
    int8, nf4; by default a live model's own, else bfloat16. fits: an amount of memory such as "24GB"; the plan then
    says whether it fits and the largest batch that does. layerwise: each gradient is freed in the backward pass, once
    the optimizer has stepped on it (`optim.layerwise` of a run). loss: "chunked" (as rankworks trains), "full" logits.
    attention: "fused", or "plain" where no fused kernel runs. task: what the model is built for, where its
    configuration leaves that open. example: inputs of a model outside transformers.

    Raises `UnknownNameError`, `ConfigError` or `TargetError`.
    """
    memory = None if fits is None else parse_bytes(fits)
    step = Step(optimizer, batch_size, sequence, gradient_checkpointing, loss, attention, example, layerwise)
    if delta == NONE:
        if settings:
            raise ConfigError(f"{', '.join(settings)}: settings of an adapter, and delta none has no adapter.")
        source = open_source(model, dtype, task)
        check_length(source.model, sequence)
        return plan_whole(source, step, memory)
    if isinstance(delta, AdaptSpec):
        if settings:
            raise ConfigError("give either a whole AdaptSpec or single settings, not both.")
        spec = delta
    else:
        spec = AdaptSpec.from_flat({"delta": delta, **settings}, "plan")
    source = open_source(model, dtype, task)
    check_length(source.model, sequence)
    return plan_on(source, spec, step, memory)


@dataclass(frozen=True)
class Change:
    """What is trained on a model: what a plan calls it, and the bytes that it adds."""

    delta: str
    init: str = ""
    settings: Mapping[str, Any] | None = None
    targets: Any = None
    sites: int = 0
    stored: int = 0  # in its file
    held: int = 0  # in memory, beside the base
    ranks: str = ""
    notes: tuple[str, ...] = ()


def plan_on(source: Source, spec: AdaptSpec, step: Step, memory: int | None) -> Plan:
    """Plan one adapter on an opened model, and leave that bare again."""
    model = source.model
    adapt(model, spec)
    try:
        state = state_of(model)
        adapter = state.adapter("default")
        held = [t for d in adapter.deltas.values() for t in [*d.parameters(), *d.buffers()]]
        held += [t for m in [*adapter.full.values(), *state.banks.values()] for t in [*m.parameters(), *m.buffers()]]
        change = Change(
            spec.asked.key,
            spec.init.key,
            spec.asked.model_dump(mode="json", exclude={"delta"}),
            spec.targets,
            len(adapter.sites),
            _sum(adapter.tensors().values()),
            _sum(held),
            spec.ranks.key if spec.ranks else "",
            tuple(_other_ranks(model, spec)),
        )
        return _measure(source, change, step, memory)
    finally:
        detach(model)


def _other_ranks(model: nn.Module, spec: AdaptSpec) -> Iterator[str]:
    """What to know of an adapter whose ranks in a run are others than those of its settings."""
    for other in (spec.init, spec.ranks):
        if other is not None and _of_its_own(other, "allocate"):
            yield f"{other.key} shares the ranks out anew as a run starts, by data or weights: counted as they are set"
    if spec.ranks is not None and _of_its_own(spec.ranks, "largest"):
        largest = spec.ranks.method.cls(spec.ranks).largest(resolve(model, spec))
        if largest:
            total = sum(changes["rank"] for changes in largest.values())
            yield (
                f"{spec.ranks.key} grows during a run and is counted at its largest, {total} ranks at {len(largest)} "
                "sites evenly: which of them grow is only known from data"
            )


def _of_its_own(spec: MethodSpec, name: str) -> bool:
    """Whether a start or schedule does more there than the class it is of, which does nothing."""
    return getattr(spec.method.cls, name) not in (getattr(Init, name, None), getattr(RankSchedule, name))


def plan_whole(source: Source, step: Step, memory: int | None) -> Plan:
    """Plan training every weight of an opened model, and leave it as it was."""
    if source.dtype in PACKED:
        raise ConfigError(
            f"{source.dtype} weights cannot be trained as they are: plan an adapter on them, or dtype bfloat16."
        )
    with _trainable(source.model.parameters(), True):
        return _measure(source, Change(NONE), step, memory)


def _measure(source: Source, change: Change, step: Step, memory: int | None) -> Plan:
    model = source.model
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    whole = change.delta == NONE
    states, asleep = optimizer_bytes(step.states, model), resting(step.states, model)
    weights, unpacked = held_bytes(step.states, model, source.weight_bytes) if whole else (source.weight_bytes, 0)
    fixed = weights + source.unpacked_bytes + unpacked + change.held + states
    notes = list(change.notes)
    trace = fit = None
    if step.evaluations:  # at points around the weights, which are put back from a copy
        copies = _sum(trained)
        asleep, fixed = {id(p) for p in trained}, fixed + copies
        notes.append(
            f"no gradients: a step is {step.evaluations} evaluations of the loss, beside a copy of what is trained "
            f"({format_bytes(copies)})"
        )
    awake = [p for p in trained if id(p) not in asleep]
    gradients = max((p.nbytes for p in awake), default=0) if step.layerwise else _sum(awake)
    with _trainable((p for p in trained if id(p) in asleep), False):
        try:
            trace = _trace(model, step, step.batch_size)
            fit = None if memory is None else _fit(model, step, memory, fixed, gradients, trace)
        except UntraceableError as why:
            if trace is None:
                notes.append(f"no activation estimate: {why}")
            if memory is not None:
                others = "" if trace is None else f" with other batch sizes: {why}"
                notes.append(f"whether it fits is not said, since the step could not be traced{others}")
    return Plan(
        model=source.title,
        delta=change.delta,
        init=change.init,
        settings=dict(change.settings or {}),
        targets=change.targets,
        sites=change.sites,
        dtype=source.dtype,
        optimizer=step.optimizer,
        batch_size=step.batch_size,
        sequence=step.sequence,
        gradient_checkpointing=step.checkpointing,
        layerwise=step.layerwise,
        ranks=change.ranks,
        trainable_parameters=count,
        base_parameters=source.parameters,
        percent=100 * count / (source.parameters if whole else source.parameters + count),
        adapter_bytes=change.stored,
        frozen_bytes=change.held - change.stored,
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=states,
        activation_bytes=trace.activations if trace else 0,
        peak_bytes=fixed + _moving(trace, gradients, step),
        step_flops=trace.flops * max(1, step.evaluations) if trace else 0,
        fit=fit,
        notes=notes,
    )


@contextlib.contextmanager
def _trainable(parameters: Iterable[nn.Parameter], yes: bool) -> Iterator[None]:
    """Within the block these parameters are trained, or are not."""
    before = [(p, p.requires_grad) for p in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(yes)
    try:
        yield
    finally:
        for parameter, was in before:
            parameter.requires_grad_(was)


def _fit(model: nn.Module, step: Step, memory: int, fixed: int, gradients: int, trace: Trace) -> Fit:
    known = {step.batch_size: _moving(trace, gradients, step)}

    def takes(rows: int) -> int:
        if rows not in known:
            known[rows] = _moving(_trace(model, step, rows), gradients, step)
        return known[rows]

    most = largest_batch(takes, memory - fixed)
    return Fit(memory, step.batch_size <= most, most)


def _trace(model: nn.Module, step: Step, rows: int) -> Trace:
    how = (step.loss, step.checkpointing, step.fused, step.layerwise)
    return attempt(model, rows, step.sequence, step.example, *how)


def _moving(trace: Trace | None, gradients: int, step: Step) -> int:
    """The bytes that come and go: of a step's two passes, or of the update (gradients and as much scratch).

    A layer-wise update comes in the middle of the backward pass.
    """
    passes = trace.peak if trace else 0
    return passes + gradients if step.layerwise else max(passes, 2 * gradients)


def _sum(tensors: Any) -> int:
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def largest_batch(takes: Callable[[int], int], free: int) -> int:
    """Return the largest batch of which `takes(batch)`, rising and nearly straight, is at most `free` bytes; 0 if none.

    Every guess lies where a straight line through the last two points says, within what is still open.
    """
    low, high = 1, MOST_ROWS + 1  # low fits; high does not, or is not asked for
    at_low = takes(low)
    if at_low > free:
        return 0
    slope = max(takes(2) - at_low, 1.0)
    while high - low > 1:
        guess = min(max(low + int((free - at_low) / slope), low + 1), high - 1)
        there = takes(guess)
        slope = max((there - at_low) / (guess - low), 1.0)
        if there <= free:
            low, at_low = guess, there
        else:
            high = guess
    return low


def check_length(model: nn.Module, sequence: int) -> None:
    """Raise where the model has fewer positions than the rows would have tokens."""
    config: Any = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if getattr(model, "main_input_name", None) == "input_ids" and isinstance(most, int) and sequence > most:
        raise ConfigError(f"the model takes at most {most} tokens and sequence is {sequence}: lower it.")
