"""The loss of a run's first batches, and its gradient, as functions of the trained numbers as they stand.

For measurements before a run: the same function at every call (dropout off, the same examples), counted in
forward-backward passes over a batch of the run, which is what a measurement costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rankworks.core.summary import trained
from rankworks.train.batches import Collator, Example, Sampler
from rankworks.train.config import TrainConfig
from rankworks.train.documents import by_document
from rankworks.train.heads import evaluating
from rankworks.train.loop import packs
from rankworks.train.objective import Objective

FORWARD = 1 / 3
"""What a forward pass alone is of a forward-backward pass."""


class Probe:
    """The first `count` examples that a run of these settings sees, as its micro-batches, on the model as it is.

    parameters: what the run trains. passes: what was computed so far, in forward-backward passes over
    `batch_size x accumulate` examples; told to `tick` after every evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        train: TrainConfig,
        *,
        count: int | None = None,
        pad: int = 0,
        by_documents: bool = False,
        tick: Callable[[], None] = lambda: None,
    ):
        self.model, self.parameters, self.tick = model, trained(model), tick
        whole = train.batch_size * train.accumulate
        count = min(count or whole, len(examples))
        first = [examples[i] for i in Sampler(len(examples), train.seed).take(count)]
        collator = Collator(pad, packs(model, examples, train), by_document=by_documents)
        size = min(count, train.batch_size)
        self.batches = [collator.batch(first[i : i + size]) for i in range(0, count, size)]
        self.learned = sum(batch.learned for batch in self.batches)
        self.objective = Objective(model, train.loss_chunk_mib * 2**20, train.precision)
        self.passes, self._share = 0.0, count / whole

    def gradient(self) -> list[Tensor]:
        """Return the gradient of the mean loss by every trained tensor, zeros where it does not depend on one."""
        total = [torch.zeros_like(p) for p in self.parameters]
        for batch in self.batches:
            loss = self.objective.loss(batch) / self.learned
            for t, g in zip(total, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
                if g is not None:
                    t += g
        self._count(1.0)
        return total

    @torch.no_grad()
    def loss(self) -> float:
        """Return the mean loss."""
        value = sum(float(self.objective.loss(batch)) for batch in self.batches) / self.learned
        self._count(FORWARD)
        return value

    def _count(self, passes: float) -> None:
        self.passes += passes * self._share
        self.tick()


@contextlib.contextmanager
def probing(
    model: nn.Module, examples: Sequence[Example], train: TrainConfig, *, count: int | None = None, pad: int = 0, **more
) -> Iterator[Probe]:
    """A `Probe` on the model in eval mode, attending document by document where rows hold several."""
    with evaluating(model), contextlib.ExitStack() as stack:
        apart = stack.enter_context(by_document(model)) if packs(model, examples, train) else False
        yield Probe(model, examples, train, count=count, pad=pad, by_documents=apart, **more)
