"""A task in tokens, for one model: examples to learn from, and questions and prompts to be measured by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rankworks.core.errors import DataError, did_you_mean
from rankworks.train.batching.batches import Example
from rankworks.train.batching.data import Encoder, join_documents
from rankworks.train.measuring.likelihood import Question
from rankworks.train.progress import tracked
from rankworks.train.sources.task import Task

Record = dict[str, Any]


class Prepared:
    """The records of `task` as tokens of `tokenizer` for `model`.

    A causal model learns classification as the completion of a label, a sequence classifier as a class. Raises
    `DataError` when the model and the data do not go together.
    """

    def __init__(self, task: Task, model: nn.Module, tokenizer: Any, progress: bool = True):
        self.task, self.tokenizer, self.progress = task, tokenizer, progress
        self.context = context_length(model, tokenizer)
        # A label as the next word of a plain prompt is what a small model knows best: on BBC News SmolLM2-135M names
        # the topic of about twice as many articles as in its chat template, where it nearly always says "business".
        chat = False if task.chat is None and task.kind == "classification" else task.chat
        self.encoder = Encoder(tokenizer, min(task.max_length, self.context), chat)
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.encoder.eos
        self.classes = list(task.classes or ())
        self._fixed: int | None = None  # tokens of the classification prompt without a text
        self._lengths: dict[str, int] = {}  # tokens of each label with its end
        self.classifier = is_classifier(model)
        if self.classifier and task.kind != "classification":
            raise DataError(f"{type(model).__name__} has a head of classes, but the data are {task.kind} records.")
        labels = int(getattr(model.config, "num_labels", 0))  # type: ignore[union-attr]
        if self.classifier and labels != len(self.classes):
            raise DataError(f"the model has {labels} classes, the data {len(self.classes)}: {', '.join(self.classes)}.")

    def examples(self, records: Sequence[Record], where: str) -> list[Example]:
        """Return what is learned from the records; `where` names them in messages, e.g. "train"."""
        if not records:
            raise DataError(f"the {where} data are empty: give at least one record.")
        shown = tracked(records, "tokenising", len(records), self.progress)
        if self.task.kind == "text":
            documents = [self.encoder.tokens(record["text"]) for record in shown]
            return join_documents(documents, self.encoder.eos, self.encoder.max_length)
        numbered = enumerate(shown, start=1)
        return [self._example(record, f"{where} record {number}") for number, record in numbered]

    def _example(self, record: Record, where: str) -> Example:
        template = self.task.template
        if self.classifier:
            return self.classified(record, where)
        if "messages" in record:
            return self.encoder.conversation(record["messages"], where)
        if self.task.kind == "classification":
            self.class_index(record, where)
            answer = template.answer(record)
            text = self._head(record, [answer], where)
            return self.encoder.completion(template.messages(record, text), answer, where)
        return self.encoder.completion(template.messages(record), template.answer(record), where)

    def classified(self, record: Record, where: str) -> Example:
        """Return an example of a sequence classifier: the head of the text that fits, and the class."""
        ids = self.tokenizer(record["text"], truncation=True, max_length=self.encoder.max_length)["input_ids"]
        return Example(tuple(ids), label=self.class_index(record, where))

    def question(self, record: Record, where: str) -> Question:
        """Return a classification record as a prompt and the answers to choose from."""
        messages = self.task.template.messages(record, self._head(record, self.classes, where))
        both = [self.encoder.answer(messages, label) for label in self.classes]
        return Question(both[0][0], [answer for _, answer in both])

    def prompt(self, record: Record, where: str, answer_room: int) -> list[int]:
        """Return the tokens to generate an answer to; raises `DataError` where no room for one is left."""
        tokens = self.encoder.prompt(self.task.template.messages(record))
        if len(tokens) + answer_room > self.context:
            raise DataError(
                f"{where}: the prompt has {len(tokens)} tokens, which with {answer_room} for the answer is more than "
                f"the model's context of {self.context}: shorten the prompt or lower evaluate.max_new_tokens."
            )
        return tokens

    def class_index(self, record: Record, where: str) -> int:
        """Return the place of the record's label among the classes."""
        label = str(record["label"])
        if label not in self.classes:
            raise DataError(f"{where} has the label {label!r}, which is no class.{did_you_mean(label, self.classes)}")
        return self.classes.index(label)

    def stop_tokens(self, model: nn.Module) -> list[int]:
        """Return the tokens that end an answer: the tokenizer's, the model's, and that of learned answers."""
        settings = getattr(model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        _, answer = self.encoder.answer([{"role": "user", "content": "a"}], "a")
        return sorted({self.encoder.eos, answer[-1], *ends})

    def _head(self, record: Record, answers: Sequence[str], where: str) -> str:
        """Return the head of the record's text that leaves room for the instruction and the longest answer."""
        template, encoder = self.task.template, self.encoder

        def prompt(text: str) -> list[int]:
            return encoder.prompt(template.messages(record, text))

        for answer in answers:
            if answer not in self._lengths:
                self._lengths[answer] = len(encoder.tokens(answer)) + 2  # its end of turn, and a joint at the border
        if self._fixed is None:
            self._fixed = len(prompt(""))
        room = encoder.max_length - max(self._lengths[answer] for answer in answers)
        return encoder.shortened(prompt, self._fixed, record["text"], room, where)


def is_classifier(model: nn.Module) -> bool:
    """Say whether a model has a head of classes in place of one of words."""
    return type(model).__name__.endswith("ForSequenceClassification")


def context_length(model: nn.Module, tokenizer: Any) -> int:
    """Return how many tokens the model takes: the smaller of its positions and the tokenizer's limit."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return min(int(limit) for limit in (positions, tokenizer.model_max_length, 10**9) if limit)
