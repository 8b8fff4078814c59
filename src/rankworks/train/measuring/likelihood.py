"""How likely a model finds each of several answers to a prompt, with the prompt computed once.

Scores of an answer a to a prompt p, whose tokens a_1 ... a_k end with the end-of-turn token:

    first   log P(a_1 | p): one pass over the prompt; only where all answers differ in their first token
    sum     log P(a | p) = sum_i log P(a_i | p, a_<i): the probability that the model gives exactly this answer
    mean    sum / k: for answers of very different length

"auto" is "first" where it is decisive and "sum" elsewhere. For "sum" and "mean" the answers continue from the prompt's
key-value cache; a model whose cache is not a plain one (sliding windows, states) reads each prompt with each answer.
What all prompts begin with (the system's turn, the instruction) is likewise computed once for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from rankworks.core.errors import ConfigError
from rankworks.train.losses.heads import SplitModel, evaluating, first_output, split_model

Tokens = Sequence[int]

WORTH = 8
"""Tokens that prompts must share before their start is computed apart."""


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to choose from, as tokens."""

    prompt: Tokens
    answers: Sequence[Tokens]


def decisive(questions: Sequence[Question]) -> bool:
    """Say whether the first token tells the answers of every question apart."""
    return all(len({answer[0] for answer in q.answers}) == len(q.answers) for q in questions)


def answer_scores(
    model: nn.Module, questions: Sequence[Question], scoring: str = "auto", batch_tokens: int = 4096
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the question, scores of its answers (answers,) in float32), shortest prompts first.

    Raises `ConfigError` when scoring is "first" and two answers begin with the same token.
    """
    if scoring == "first" and not decisive(questions):
        raise ConfigError("evaluate.scoring=first needs answers that differ in their first token: use sum or mean.")
    first = scoring == "first" or (scoring == "auto" and decisive(questions))
    scorer = _Scorer(model)
    with evaluating(model), torch.no_grad():
        scorer.begin(questions)
    for chosen in by_length([len(q.prompt) - len(scorer.start) for q in questions], batch_tokens):
        batch = [questions[i] for i in chosen]
        with evaluating(model), torch.no_grad():
            scores = scorer.first(batch) if first else scorer.whole(batch, scoring == "mean")
        yield from zip(chosen, scores, strict=True)


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return batches of indices of similar length whose padded size is at most `batch_tokens` (one at least)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def right_padded(rows: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), each (rows, width): what is behind a row's end is a repetition of its last token."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(width, device=device)[None] < lengths[:, None]).long()


def common_start(rows: Sequence[Tokens]) -> list[int]:
    """Return the tokens that all rows begin with, leaving at least one of every row."""
    listed = [list(row) for row in rows]
    first, last = min(listed), max(listed)  # in the order of words: what these two share, all share
    size = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(size, min(len(row) for row in listed) - 1)]


def is_plain(cache: Any) -> bool:
    """Say whether a cache holds the keys and values of every position and nothing else."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


class _Scorer:
    """Scores answers with one model; logits are made at the positions that are asked for only."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.split: SplitModel | None = split_model(model)
        self.device = next(model.parameters()).device
        self.start: list[int] = []
        self._start_cache: Any = None

    def begin(self, questions: Sequence[Question]) -> None:
        """Compute what all prompts begin with, where that is worth it and the model's cache allows it."""
        shared = common_start([q.prompt for q in questions]) if len(questions) > 1 else []
        if len(shared) >= WORTH:
            _, cache = self._run(input_ids=torch.tensor([shared], device=self.device), use_cache=True)
            if is_plain(cache):
                self.start, self._start_cache = shared, cache

    def _read(self, batch: Sequence[Question], keep: bool) -> tuple[Tensor, Tensor, Any]:
        """Read the prompts behind their common start; return (states at their ends, mask of prompts, cache).

        keep: the cache is wanted afterwards.
        """
        ids, mask = right_padded([q.prompt[len(self.start) :] for q in batch], self.device)
        ends = torch.arange(len(batch), device=self.device), mask.sum(1) - 1
        mask = torch.cat([mask.new_ones(len(batch), len(self.start)), mask], dim=1)  # (prompts, whole width)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": keep}
        if self.start:
            cache = copy.deepcopy(self._start_cache)
            cache.batch_repeat_interleave(len(batch))
            places = torch.arange(ids.shape[1], device=self.device)[None] + len(self.start)
            inputs |= {"past_key_values": cache, "use_cache": True, "position_ids": places.expand(len(batch), -1)}
        states, cache = self._run(**inputs)  # causal: what is behind a prompt is not seen by it
        return states[ends], mask, cache

    def _run(self, **inputs: Any) -> tuple[Tensor, Any]:
        """Return hidden states (rows, width, d), or logits where the model has no split, and the cache."""
        call = self.model if self.split is None else self.split.backbone
        outputs = call(**inputs)
        states = outputs.logits if self.split is None else first_output(outputs)
        return states, getattr(outputs, "past_key_values", None)

    def _log_probs(self, states: Tensor) -> Tensor:
        """Turn states at chosen positions (n, d) into log probabilities (n, vocabulary)."""
        logits = states if self.split is None else self.split.head(states)
        return logits.float().log_softmax(-1)

    def first(self, batch: Sequence[Question]) -> list[Tensor]:
        states, _, _ = self._read(batch, keep=False)
        log_probs = self._log_probs(states)  # (questions, vocabulary)
        return [row[[a[0] for a in q.answers]].cpu() for row, q in zip(log_probs, batch, strict=True)]

    def whole(self, batch: Sequence[Question], mean: bool) -> list[Tensor]:
        states, mask, cache = self._read(batch, keep=True)
        totals = self._continued(batch, mask, states, cache) if is_plain(cache) else self._apart(batch)
        sizes = [torch.tensor([len(a) for a in q.answers]) for q in batch]
        return [t / n if mean else t for t, n in zip(totals, sizes, strict=True)]

    def _continued(self, batch: Sequence[Question], mask: Tensor, states: Tensor, cache: Any) -> list[Tensor]:
        """Score all answers of all prompts in one pass that goes on from the prompts' cache."""
        counts = torch.tensor([len(q.answers) for q in batch], device=self.device)
        lengths = mask.sum(1)  # (prompts,)
        opening = self._log_probs(states)  # (prompts, vocabulary)
        answers, seen = right_padded([a for q in batch for a in q.answers], self.device)  # (all answers, k)
        owner = torch.repeat_interleave(torch.arange(len(batch), device=self.device), counts)  # (all answers,)
        total = opening[owner, answers[:, 0]]
        if answers.shape[1] > 1:
            cache.batch_select_indices(owner)
            known = torch.cat([mask[owner], seen[:, :-1]], dim=1)
            places = lengths[owner, None] + torch.arange(answers.shape[1] - 1, device=self.device)
            states, _ = self._run(
                input_ids=answers[:, :-1],
                attention_mask=known,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            )
            where = seen[:, 1:].bool()
            steps = torch.zeros(where.shape, device=self.device)
            steps[where] = self._log_probs(states[where]).gather(1, answers[:, 1:][where][:, None])[:, 0]
            total = total + steps.sum(1)
        return list(total.cpu().split(counts.tolist()))

    def _apart(self, batch: Sequence[Question]) -> list[Tensor]:
        """Score every answer by reading its prompt again."""
        totals = []
        for question in batch:
            start = len(question.prompt) - 1
            ids, mask = right_padded([[*question.prompt, *answer] for answer in question.answers], self.device)
            states, _ = self._run(input_ids=ids, use_cache=False)
            where = mask[:, start + 1 :].bool()  # (answers, k)
            steps = torch.zeros(where.shape, device=self.device)
            targets = ids[:, start + 1 :][where][:, None]
            steps[where] = self._log_probs(states[:, start:-1][where]).gather(1, targets)[:, 0]
            totals.append(steps.sum(1).cpu())
        return totals
