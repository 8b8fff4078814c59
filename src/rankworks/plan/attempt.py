"""A step traced where the model allows it, and the reason where it does not.

A model of an unknown architecture may be unable to run without values. A method that is put on it may not: so a trace
that fails is tried once more on the bare base, and only what fails there too is the model's own. Any other error is a
fault of the change, and is raised as it came.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rankworks.core.adapt import disabled
from rankworks.core.errors import RankworksError
from rankworks.plan.trace import Trace, step_inputs, trace_step

WITHOUT_VALUES = (NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot run on torch's meta device.

NotImplementedError: an operation without a meta kernel, or a copy of numbers that are not there. RuntimeError: a
question about values, or shapes that follow from one stood in for. TypeError: `.numpy()` of such a tensor, or an input
that the model's configuration does not tell of. ValueError: its own check of its inputs.
"""


class UntraceableError(Exception):
    """The model itself cannot be traced; the message says why."""


def attempt(
    model: nn.Module,
    batch: int,
    sequence: int,
    example: Any,
    loss: str,
    checkpointing: bool,
    fused: bool,
    layerwise: bool = False,
) -> Trace:
    """Return the trace of a step of an adapted model on so many rows; the arguments are those of `trace_step`.

    Raises `UntraceableError` where the base model cannot be traced, and whatever the adapter raises where it can.
    """
    inputs = step_inputs(model, batch, sequence, example)
    if inputs is None:
        raise UntraceableError("the model does not say what it takes; give example=")
    try:
        return trace_step(model, inputs, loss, checkpointing, fused, layerwise)
    except RankworksError:
        raise
    except WITHOUT_VALUES:
        reason = _of_the_base(model, inputs, loss, checkpointing, fused)
        if reason is None:
            raise
        raise UntraceableError(reason) from None


def _of_the_base(model: nn.Module, *step: Any) -> str | None:
    """Return why the bare base cannot be traced, or None where it can; all its weights learn meanwhile."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    with disabled(model):
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            trace_step(model, *step)
        except WITHOUT_VALUES as error:
            told = " ".join(str(error).split())[:160]
            return f"the model does not run without values ({type(error).__name__}: {told})"
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    return None
