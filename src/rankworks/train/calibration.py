"""A run's calibration: batches of its own training data, and its own loss, for methods that ask to know something."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rankworks.calibrate import Masks, calibrate
from rankworks.core.evidence import Evidence
from rankworks.core.spec import AdaptSpec
from rankworks.train.batching.batches import Batch, Collator, Example, Sampler
from rankworks.train.losses.loss import IGNORE
from rankworks.train.losses.objective import Objective
from rankworks.train.prepare import Prepared

WHOLE = 1 << 62
"""Bytes of logits at once: all, so that a head of words is used once per batch."""


def measure_evidence(
    model: nn.Module,
    prepared: Prepared,
    spec: AdaptSpec,
    *,
    batches: int,
    batch_size: int,
    seed: int = 0,
    given: Evidence | None = None,
    progress: bool = True,
) -> Evidence:
    """Return what `spec` needs at its sites, measured on `batches` batches of the task's training records.

    The records are those a run of this seed sees first (each once), and the loss is the mean over a batch's labels.
    Plain text is cut into many more examples than it has records: then that many of them are drawn.
    given: what is known already, and is not measured.
    """
    records = prepared.task.train
    count = min(batches * batch_size, len(records))
    chosen = [records[i] for i in Sampler(len(records), seed).take(count)] if count else []
    examples = prepared.examples(chosen, "calibration")
    if len(examples) > count:
        examples = [examples[i] for i in Sampler(len(examples), seed).take(count)]
    collate = Collator(prepared.pad).batch
    parts = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    data = [(batch := collate(part), masks_of(part, batch)) for part in parts]
    objective = Objective(model, WHOLE)

    def loss(_: nn.Module, item: tuple[Batch, Masks]):
        return objective.loss(item[0]) / max(1, item[0].learned)

    return calibrate(model, data, spec, loss=loss, masks=lambda item: item[1], given=given, progress=progress)


def masks_of(examples: Sequence[Example], batch: Batch) -> Masks:
    """Return which tokens of a batch, one example a row, are no padding, and which of them are learned.

    A language model's batch is padded behind its tokens without a mask, which no causal attention needs.
    """
    lengths = torch.tensor([len(e.input_ids) for e in examples])
    attended = torch.arange(batch.inputs["input_ids"].shape[1]) < lengths.unsqueeze(1)  # (rows, width)
    return Masks(attended, batch.labels != IGNORE if batch.labels.dim() == 2 else None)
