"""Optimizers that evaluate the loss themselves, as often as they need (`OptimizerMethod.closure`), in the own loop.

    closure()   the mean loss over the global batch of the step, and the hooks' penalties, with the weights as they are

Every evaluation within a step sees the same dropout, so that two of them differ by the weights alone, and every process
gets the same number, so that all decide alike. Whether gradients are recorded is the optimizer's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.hooks import Hook, Moment
from rankworks.train.batching.batches import Batch
from rankworks.train.checkpoint import random_states, restore_random_states
from rankworks.train.losses.objective import Objective

READS_GRADIENTS = ("after_backward", "after_step")
"""The moments of a hook that promise gradients."""


class Evaluating:
    """Makes the closures of a loop. Raises `ConfigError` where a hook acts on gradients, which there will not be."""

    def __init__(self, loop: Any, objective: Objective):
        for hook in loop.hooks:
            if any(getattr(type(hook), moment) is not getattr(Hook, moment) for moment in READS_GRADIENTS):
                raise ConfigError(
                    f"{type(hook).__name__} acts on the gradients of a step, and {loop.optim.name} leaves none: choose "
                    "another optimizer, or an adapter without that schedule."
                )
        self.loop, self.objective = loop, objective
        objective.whole_graph = True

    def step(self, batches: list[Batch], learned: int, moment: Moment) -> float:
        """Let the optimizer take its step; return the loss it gives."""
        return float(self.loop.optimizer.step(self.closure(batches, learned, moment)))

    def closure(self, batches: list[Batch], learned: int, moment: Moment) -> Callable[[], Tensor]:
        """Return the loss on these micro-batches as a function of the weights, a scalar."""
        loop, kept = self.loop, random_states()
        batches = [batch.to(loop.device) for batch in batches]

        def loss() -> Tensor:
            restore_random_states(kept)
            if torch.is_grad_enabled() and loop.world > 1:
                raise TrainingError(
                    f"{loop.optim.name} differentiates the loss itself, which several processes cannot share: run it "
                    "in one process."
                )
            total = torch.zeros((), device=loop.device)
            for batch in batches:
                total = total + self.objective(batch.inputs, batch.labels, batch.documents)
            total = (total if loop.world == 1 else loop.accelerator.reduce(total, "sum")) / learned
            for hook in loop.hooks:
                term = hook.penalty(moment)
                total = total if term is None else total + term
            return total

        return loss
