"""What is measured of a trained arm: one loss on the validation data, and an outcome for every test record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rankworks.train.batching.batches import Collator, Example
from rankworks.train.batching.documents import by_document
from rankworks.train.batching.packing import separates_documents
from rankworks.train.config import EvaluateConfig
from rankworks.train.losses.heads import evaluating
from rankworks.train.losses.objective import Objective
from rankworks.train.measuring.evaluate import mean_loss
from rankworks.train.measuring.measure import Evaluator
from rankworks.train.precision import Precision, autocast
from rankworks.train.prepare import Prepared
from rankworks.train.result import Confusion
from rankworks.train.sources import Task


@dataclass
class Scored:
    """metrics as a run has them; outcomes per test record, with their weights where they do not count alike."""

    metrics: dict[str, float]
    outcomes: list[float]
    weights: list[float] | None
    confusion: Confusion | None


def metric_of(task: Task, config: EvaluateConfig) -> tuple[str, bool]:
    """Return the metric that arms are compared by, and whether higher is better."""
    if task.kind == "classification":
        return "accuracy", True
    return ("exact_match", True) if task.kind == "completion" and config.exact_match else ("loss", False)


class Scorer:
    """Measures arms on the same test records."""

    def __init__(self, prepared: Prepared, config: EvaluateConfig, precision: Precision = "float32"):
        self.prepared = prepared
        self.precision: Precision = precision
        self.metric, self.higher = metric_of(prepared.task, config)
        self.evaluator = Evaluator(prepared, prepared.task.test, config, "test", precision)
        self.count = len(self.evaluator.records if self.metric != "loss" else self.evaluator.examples)

    def measure(self, model: nn.Module) -> Scored:
        """Return the metrics and the outcome of every record."""
        if self.metric != "loss":
            measured = self.evaluator.measure(model)
            return Scored(measured.metrics, [float(r) for r in measured.right], None, measured.confusion)
        metrics = self.evaluator.measure(model, quick=True).metrics
        with autocast(model, self.precision):
            pairs = losses(model, self.evaluator.examples, self.prepared.pad)
        return Scored(metrics, [total / count for total, count in pairs], [float(c) for _, c in pairs], None)


class Validator:
    """What trials are judged by: the loss on the validation records, or minus their score."""

    def __init__(
        self,
        prepared: Prepared,
        records: list[dict],
        config: EvaluateConfig,
        metric: str,
        precision: Precision = "float32",
    ):
        self.prepared, self.metric, self.size = prepared, metric, config.batch_tokens
        self.precision: Precision = precision
        name, self.higher = metric_of(prepared.task, config)
        self.score = name if metric == "score" and name != "loss" else None
        self.title = f"validation {name.replace('_', ' ') if self.score else 'loss'}"
        if self.score:
            unlimited = config.model_copy(update={"limit": None})
            self.evaluator = Evaluator(prepared, records, unlimited, "valid", precision)
        else:
            self.examples = prepared.examples(records, "valid")

    def value(self, model: nn.Module) -> float:
        """Return a number of which less is better."""
        if self.score:
            return -self.evaluator.measure(model).metrics[self.score]
        with autocast(model, self.precision):
            return mean_loss(model, self.examples, self.prepared.pad, self.size)["loss"]


def losses(model: nn.Module, examples: Sequence[Example], pad: int) -> list[tuple[float, int]]:
    """Return the summed loss and the number of labels of every example, each in a batch of its own."""
    several = any(len(e.segments) > 1 for e in examples)
    packing = examples[0].label is None and (several or separates_documents(model))
    found = []
    objective = Objective(model)
    with by_document(model) as apart:
        collator = Collator(pad, packing, by_document=packing and apart)
        for example in examples:
            batch = collator.batch([example])
            with evaluating(model), torch.no_grad():
                found.append((float(objective.loss(batch)), max(1, batch.learned)))
    return found
