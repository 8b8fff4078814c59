"""A run's calibration: batches of its own training data, and its own loss, for methods that ask to know something."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rankworks.calibrate import calibrate
from rankworks.core.evidence import Evidence, Need
from rankworks.core.spec import AdaptSpec
from rankworks.train.batches import Batch, Collator, Sampler
from rankworks.train.objective import Objective
from rankworks.train.prepare import Prepared

WHOLE = 1 << 62
"""Bytes of logits at once: all, so that a head of words is used once per batch."""


def measure_evidence(
    model: nn.Module,
    prepared: Prepared,
    spec: AdaptSpec,
    needs: Sequence[str | Need],
    *,
    batches: int,
    batch_size: int,
    seed: int = 0,
    progress: bool = True,
) -> Evidence:
    """Return what `spec` needs at its sites, measured on `batches` batches of the task's training records.

    The records are those a run of this seed sees first (each once), and the loss is the mean over a batch's labels.
    """
    records = prepared.task.train
    count = min(batches * batch_size, len(records))
    chosen = [records[i] for i in Sampler(len(records), seed).take(count)] if count else []
    examples = prepared.examples(chosen, "calibration")
    collate = Collator(prepared.pad).batch
    data = [collate(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]
    objective = Objective(model, WHOLE)

    def loss(_: nn.Module, batch: Batch):
        return objective.loss(batch) / max(1, batch.learned)

    return calibrate(model, data, needs, targets=spec.targets, exclude=spec.exclude, loss=loss, progress=progress)
