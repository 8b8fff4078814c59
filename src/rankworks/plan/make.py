"""`plan`: what adapting a model costs, before a byte of it is loaded.

The adapter is really built, by the same code as for training, but on the meta device: targets, errors, counts and sizes
are those of the real thing, and a traced step (plan/trace.py) gives the memory it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from rankworks.core.adapt import adapt, detach
from rankworks.core.errors import ConfigError
from rankworks.core.registry import MethodSpec
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import state_of
from rankworks.plan.attempt import UntraceableError, attempt
from rankworks.plan.result import Fit, Plan
from rankworks.plan.source import Source, open_source
from rankworks.plan.states import Optimizer, optimizer_bytes, read_optimizer
from rankworks.plan.trace import Trace
from rankworks.plan.units import parse_bytes

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
    ):
        spec = read_optimizer(optimizer)  # an unknown name is reported before any work
        self.states = optimizer
        if batch_size < 1 or sequence < 1:
            raise ConfigError(f"batch_size and sequence must be at least 1 (given: {batch_size} and {sequence}).")
        if loss not in ("chunked", "full"):
            raise ConfigError(f"loss is 'chunked' (as rankworks trains) or 'full' (all logits), not {loss!r}.")
        if attention not in ("fused", "plain"):
            raise ConfigError(f"attention is 'fused' or 'plain' (the scores are kept), not {attention!r}.")
        self.optimizer = spec.key
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
    loss: str = "chunked",
    attention: str = "fused",
    task: str | None = None,
    example: Tensor | Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Plan:
    """Return what adapting `model` with `delta` and training the adapter costs, without weights.

    model: a built-in shape (`shape_names()`), a transformers configuration, a folder with config.json, a hub id, or a
    live model (left as it is). delta, settings: as in `adapt` (`targets`, `init`, `rank`, ...).
    batch_size, sequence: rows and tokens of one micro-batch. dtype: of the base weights: float32, bfloat16, float16,
    int8, nf4; by default a live model's own, else bfloat16. fits: an amount of memory such as "24GB"; the plan then
    says whether it fits and the largest batch that does. loss: "chunked" (as rankworks trains) or "full" logits.
    attention: "fused", or "plain" where no fused kernel runs. task: what the model is built for, where its
    configuration leaves that open. example: inputs of a model outside transformers.

    Raises `UnknownNameError`, `ConfigError` or `TargetError`.
    """
    memory = None if fits is None else parse_bytes(fits)
    step = Step(optimizer, batch_size, sequence, gradient_checkpointing, loss, attention, example)
    if isinstance(delta, AdaptSpec):
        if settings:
            raise ConfigError("give either a whole AdaptSpec or single settings, not both.")
        spec = delta
    else:
        spec = AdaptSpec.from_flat({"delta": delta, **settings}, "plan")
    source = open_source(model, dtype, task)
    check_length(source.model, sequence)
    return plan_on(source, spec, step, memory)


def plan_on(source: Source, spec: AdaptSpec, step: Step, memory: int | None) -> Plan:
    """Plan one adapter on an opened model, and leave that bare again."""
    model = source.model
    adapt(model, spec)
    try:
        return _measure(source, spec, step, memory)
    finally:
        detach(model)


def _measure(source: Source, spec: AdaptSpec, step: Step, memory: int | None) -> Plan:
    model = source.model
    state = state_of(model)
    adapter = state.adapter("default")
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    stored = _sum(adapter.tensors().values())
    held = [t for d in adapter.deltas.values() for t in [*d.parameters(), *d.buffers()]]
    held += [t for m in [*adapter.full.values(), *state.banks.values()] for t in [*m.parameters(), *m.buffers()]]
    gradients, states = _sum(trained), optimizer_bytes(step.states, model)
    fixed = source.weight_bytes + source.unpacked_bytes + _sum(held) + states
    notes: list[str] = []
    trace = fit = None
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
        delta=spec.delta.key,
        init=spec.init.key,
        settings=spec.delta.model_dump(mode="json", exclude={"delta"}),
        targets=spec.targets,
        sites=len(adapter.sites),
        dtype=source.dtype,
        optimizer=step.optimizer,
        batch_size=step.batch_size,
        sequence=step.sequence,
        gradient_checkpointing=step.checkpointing,
        trainable_parameters=count,
        base_parameters=source.parameters,
        percent=100 * count / (source.parameters + count),
        adapter_bytes=stored,
        frozen_bytes=_sum(held) - stored,
        weight_bytes=source.weight_bytes,
        gradient_bytes=gradients,
        optimizer_bytes=states,
        activation_bytes=trace.activations if trace else 0,
        peak_bytes=fixed + _moving(trace, gradients),
        step_flops=trace.flops if trace else 0,
        fit=fit,
        notes=notes,
    )


def _fit(model: nn.Module, step: Step, memory: int, fixed: int, gradients: int, trace: Trace) -> Fit:
    known = {step.batch_size: _moving(trace, gradients)}

    def takes(rows: int) -> int:
        if rows not in known:
            known[rows] = _moving(_trace(model, step, rows), gradients)
        return known[rows]

    most = largest_batch(takes, memory - fixed)
    return Fit(memory, step.batch_size <= most, most)


def _trace(model: nn.Module, step: Step, rows: int) -> Trace:
    return attempt(model, rows, step.sequence, step.example, step.loss, step.checkpointing, step.fused)


def _moving(trace: Trace | None, gradients: int) -> int:
    """The bytes that come and go: of a step's two passes, or of the update (gradients and as much scratch)."""
    return max(trace.peak if trace else 0, 2 * gradients)


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
