"""Hooks: how methods that do something during training (schedules, freezing, proximal steps) act on a run.

A hook subclasses `Hook` and overrides what it needs. A delta that needs one returns it from `training_hook`; the own
loop calls it, and `train.HookCallback` carries it into the HF Trainer and TRL's trainers, at the same moments:

    before_forward   before the forward pass of every micro-batch
    penalty          once per optimizer step: a term of the weights that is added to the loss, before clipping
    after_backward   once per optimizer step, when the gradients are complete and clipped, before the optimizer acts
    after_step       once per optimizer step, after the optimizer acted, gradients still there

and, in the own loop alone, `teacher`: what the model learns from in place of the labels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from rankworks.core.state import NAME, State


@dataclass
class Moment:
    """Where a run stands when a hook is called: `step` counts optimizer steps from 1, `steps` is how many there are.

    `epoch` is how many steps one pass over the data takes, None where that is not known.
    """

    model: nn.Module
    optimizer: Optimizer
    step: int
    steps: int
    epoch: float | None = None


class Hook:
    """Base of all hooks: every method does nothing. State is a tree of tensors, numbers, strings, lists and dicts."""

    freezes: ClassVar[bool] = False
    """Whether parameters stop and start to require a gradient; a sum over processes must not wait for theirs."""

    teaches: bool = False
    """Whether the model learns from a teacher: twice the work of a step, and only the own loop can do it."""

    def on_start(self, moment: Moment) -> None:
        """Act once before the first step (also of a resumed run, after the state is restored)."""

    def before_forward(self, moment: Moment) -> None:
        """Act before the forward pass of every micro-batch."""

    def teacher(self) -> AbstractContextManager[None]:
        """Return a context in which the model is its own teacher, where `teaches` holds.

        The teacher learns the labels, and the model outside of the context learns the probabilities that the teacher
        gives; both losses are added. The context is entered several times in a forward pass.
        """
        return nullcontext()

    def penalty(self, moment: Moment) -> Tensor | None:
        """Return a term to add to the loss, of the weights alone, or None; asked once per step."""
        return None

    def after_backward(self, moment: Moment) -> None:
        """Act on complete, clipped gradients, before the optimizer."""

    def after_step(self, moment: Moment) -> None:
        """Act after the optimizer; gradients are still there."""

    def on_end(self, moment: Moment) -> None:
        """Act once after the last step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def method_hooks(model: nn.Module) -> list[Hook]:
    """Return the hooks that the methods of the active adapters ask for, in a fixed order; often none."""
    state: State | None = getattr(model, NAME, None)
    found: list[Hook] = []
    for name in state.active if state is not None else ():
        adapter = state.adapter(name)  # type: ignore[union-attr]
        cls = adapter.spec.delta.method.cls
        deltas = {key: d for key, d in adapter.deltas.items() if isinstance(d, cls)}  # not the transposes of tied twins
        once = {id(d): key for key, d in reversed(deltas.items())}
        own = {k: d for k, d in deltas.items() if once[id(d)] == k}
        schedule = adapter.spec.ranks
        hooks = [cls.training_hook(adapter.spec.delta, own)]
        hooks += [] if schedule is None else [schedule.method.cls(schedule).hook(own)]  # type: ignore[call-arg]
        found += [hook for hook in hooks if hook is not None]
    return found


def optimizer_hooks(optimizer: Optimizer | None) -> list[Hook]:
    """Return what an optimizer of `make_optimizer` does during training besides its steps; often nothing."""
    return list(getattr(optimizer, "method_hooks", ()))
