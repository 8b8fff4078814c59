"""A few steps of a run before the run: its own optimizer on its first examples, and everything put back.

    steps      of the optimizer at rates given one by one, each on a batch that follows in the run's order
    loss       on examples that none of the steps used

Dropout is off and hooks of methods (rank schedules, penalties) do not act, so that what differs between two probes is
their rate alone. Costs are counted in forward-backward passes over a batch of the run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rankworks.core.summary import trained
from rankworks.train.batching.batches import Batch, Collator, Example, Sampler
from rankworks.train.batching.documents import by_document
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.loop import packs
from rankworks.train.losses.heads import evaluating
from rankworks.train.losses.objective import Objective
from rankworks.train.optim import make_optimizer

FORWARD = 1 / 3
"""What a forward pass alone is of a forward-backward pass."""

HELD = 16
"""Examples on which a loss is measured, or a batch of the run where that is more."""


class Probe:
    """Steps and losses on a model, which is left as it was found.

    A step is taken on half a batch of the run, eight examples or more where a batch has them. passes: what was computed
    so far, in forward-backward passes over a batch of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        train: TrainConfig,
        *,
        steps: int,
        pad: int = 0,
        by_documents: bool = False,
    ):
        self.model, self.parameters, self.train = model, trained(model), train
        self.objective = Objective(model, train.loss_chunk_mib * 2**20, train.precision)
        self.collator = Collator(pad, packs(model, examples, train), by_document=by_documents)
        self.whole = train.batch_size * train.accumulate
        self.size = max(min(self.whole, 8), self.whole // 2)
        order = Sampler(len(examples), train.seed)
        self.order = [[examples[i] for i in order.take(self.size)] for _ in range(steps)]
        held = min(max(HELD, self.whole), len(examples))
        self.held = self._batches([examples[i] for i in order.take(held)])
        self.kept = [p.detach().clone() for p in self.parameters]
        self.passes = 0.0

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        """Cut examples into micro-batches of the run's size."""
        size = min(self.train.batch_size, len(examples))
        return [self.collator.batch(examples[i : i + size]) for i in range(0, len(examples), size)]

    @torch.no_grad()
    def loss(self) -> float:
        """Return the mean loss on the examples that no step uses."""
        total = sum(float(self.objective.loss(batch)) for batch in self.held)
        learned = sum(batch.learned for batch in self.held)
        self.passes += FORWARD * sum(len(batch.labels) for batch in self.held) / self.whole
        return total / learned

    @contextlib.contextmanager
    def start(self, optim: OptimConfig, again: bool = False) -> Iterator[Callable[[float], float]]:
        """From the start on: yields a function that takes the next step at a rate; in the end all of them are undone.

        again: every step on the same quarter of a batch, four examples or more, so that losses differ by the weights
        alone. The function returns the loss of the step's batch before the step, which is not taken where that or its
        gradient is not finite: then it returns NaN.
        """
        optimizer = make_optimizer(self.model, optim.name, 1.0, **optim.settings())
        factors = [group["lr"] for group in optimizer.param_groups]  # of methods that have rates of their own
        order, quarter = iter(self.order), self.order[0][: max(4, self.size // 2)]

        def step(rate: float) -> float:
            loss = self._gather(quarter if again else next(order))
            if not (math.isfinite(loss) and self._clip(optim.clip)):
                return math.nan
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            return loss

        try:
            yield step
        finally:
            put(self.parameters, self.kept)
            for parameter in self.parameters:
                parameter.grad = None

    def _gather(self, examples: Sequence[Example]) -> float:
        """Gather the gradient of the mean loss; return that loss."""
        for parameter in self.parameters:
            parameter.grad = None
        batches = self._batches(examples)
        learned, total = sum(batch.learned for batch in batches), 0.0
        for batch in batches:
            loss = self.objective.loss(batch) / max(1, learned)
            loss.backward()
            total += float(loss.detach())
        self.passes += len(examples) / self.whole
        return total

    def _clip(self, clip: float | None) -> bool:
        """Clip the gradient as the run does; say whether it is finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if clip is not None and math.isfinite(float(norm)):
            nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        return math.isfinite(float(norm))


@contextlib.contextmanager
def probing(
    model: nn.Module, examples: Sequence[Example], train: TrainConfig, *, steps: int, pad: int = 0
) -> Iterator[Probe]:
    """A `Probe` of up to `steps` steps on the model in eval mode, attending by document where rows hold several."""
    with evaluating(model), contextlib.ExitStack() as stack:
        apart = stack.enter_context(by_document(model)) if packs(model, examples, train) else False
        yield Probe(model, examples, train, steps=steps, pad=pad, by_documents=apart)


@torch.no_grad()
def put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copy values into parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
