"""One measurement of a model on a task: the metrics that its kind asks for, and a few answers to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rankworks.train.config import EvaluateConfig
from rankworks.train.measuring.evaluate import (
    choose_answers,
    choose_classes,
    confusion_counts,
    generate_answers,
    mean_loss,
    same_answer,
)
from rankworks.train.precision import Precision, autocast
from rankworks.train.prepare import Prepared, Record
from rankworks.train.result import Confusion
from rankworks.train.sources.split import choose

SHOWN = 400
"""Characters of a prompt that are kept for showing."""

CONTINUED = 32
"""Tokens of a plain text that are given, and continued, for showing."""


@dataclass
class Measured:
    """metrics; per shown record (prompt, expected, answer); the confusion matrix of a classification.

    right: for every record whether it was answered rightly, where answers are compared at all.
    """

    metrics: dict[str, float]
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    confusion: Confusion | None = None
    right: list[bool] = field(default_factory=list)


class Evaluator:
    """Measures models on the same records again and again; the records are tokenised once."""

    def __init__(
        self,
        prepared: Prepared,
        records: list[Record],
        config: EvaluateConfig,
        where: str = "test",
        precision: Precision = "float32",
    ):
        self.prepared, self.config = prepared, config
        self.precision: Precision = precision
        kind = prepared.task.kind
        # Every class in its share: equal strides would fall in step with the classes, which take turns in a task.
        self.records = choose(records, config.limit, seed=0, by="label" if kind == "classification" else None)
        self.shown = self.records[: config.examples]
        self.where = where
        names = [f"{where} record {i}" for i in range(1, len(self.records) + 1)]
        named = list(zip(self.records, names, strict=True))
        if kind == "classification":
            self.true = [prepared.class_index(record, name) for record, name in named]
            if prepared.classifier:
                self.examples = [prepared.classified(record, name) for record, name in named]
            else:
                self.questions = [prepared.question(record, name) for record, name in named]
        else:
            self.examples = prepared.examples(self.records, where)

    def measure(self, model: nn.Module, quick: bool = False) -> Measured:
        """Return the metrics of `model`; quick: without generating answers."""
        if self.prepared.task.kind == "classification":
            return self._classification(model)
        show = self.prepared.progress and not quick
        with autocast(model, self.precision):
            metrics = mean_loss(model, self.examples, self.prepared.pad, self.config.batch_tokens, show)
        if quick:
            return Measured(metrics)
        if self.prepared.task.kind == "text":
            return Measured(metrics, self._continuations(model))
        return self._completion(model, metrics)

    def _classification(self, model: nn.Module) -> Measured:
        size, show = self.config.batch_tokens, self.prepared.progress
        with autocast(model, self.precision):
            if self.prepared.classifier:
                chosen = choose_classes(model, self.examples, self.prepared.pad, size, show)
            else:
                chosen = choose_answers(model, self.questions, self.config.scoring, size, show)
        classes = self.prepared.classes
        right = [a == b for a, b in zip(self.true, chosen, strict=True)]
        answers = [
            (record["text"][:SHOWN], classes[true], classes[answer])
            for record, true, answer in zip(self.records, self.true, chosen, strict=True)
            if any(record is shown for shown in self.shown)
        ]
        confusion = Confusion(classes, confusion_counts(self.true, chosen, len(classes)))
        return Measured({"accuracy": sum(right) / len(chosen)}, answers, confusion, right)

    def _completion(self, model: nn.Module, metrics: dict[str, float]) -> Measured:
        records = self.records if self.config.exact_match else self.shown
        if not records:
            return Measured(metrics)
        room, template = self.config.max_new_tokens, self.prepared.task.template
        prompts = [self.prepared.prompt(r, f"{self.where} record {i}", room) for i, r in enumerate(records, start=1)]
        answers = self._generate(model, prompts, room)
        expected = [template.answer(record).strip() for record in records]
        right: list[bool] = []
        if self.config.exact_match:
            right = [same_answer(a, e, self.config.compare) for a, e in zip(answers, expected, strict=True)]
            metrics = {"exact_match": sum(right) / len(right), **metrics}
        rows = [
            (template.prompt(record)[:SHOWN], wanted, answer)
            for record, wanted, answer in zip(records, expected, answers, strict=True)
            if any(record is shown for shown in self.shown)
        ]
        return Measured(metrics, rows, right=right)

    def _continuations(self, model: nn.Module) -> list[tuple[str, str, str]]:
        texts = [self.prepared.encoder.tokens(record["text"]) for record in self.shown]
        texts = [tokens for tokens in texts if len(tokens) > 1]
        heads = [tokens[: min(CONTINUED, len(tokens) // 2)] for tokens in texts]
        answers = self._generate(model, heads, CONTINUED) if heads else []
        decode: Any = self.prepared.tokenizer.decode
        return [
            (decode(head), decode(tokens[len(head) : len(head) + CONTINUED]), answer)
            for tokens, head, answer in zip(texts, heads, answers, strict=True)
        ]

    def _generate(self, model: nn.Module, prompts: list[list[int]], room: int) -> list[str]:
        prepared = self.prepared
        stop, size, show = prepared.stop_tokens(model), self.config.batch_tokens, prepared.progress
        return generate_answers(model, prepared.tokenizer, prompts, stop, room, size, show)
