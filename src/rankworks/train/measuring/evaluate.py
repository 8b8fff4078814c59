"""Evaluation: accuracy by label likelihood or of a classifier, exact match by generation, perplexity.

Every measure gives one value per item, computed in batches of similar length; with several processes each takes its
share and all get the whole. The model is put in eval mode for the time, and no random number is drawn.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import nn

from rankworks.train.batching.batches import Collator, Example
from rankworks.train.batching.documents import by_document
from rankworks.train.batching.packing import separates_documents
from rankworks.train.losses.heads import evaluating
from rankworks.train.losses.objective import Objective
from rankworks.train.measuring.likelihood import Question, answer_scores, by_length, decisive
from rankworks.train.processes import processes
from rankworks.train.progress import tracked
from rankworks.train.sources.template import final_answer

T = TypeVar("T")
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*")


def choose_answers(
    model: nn.Module,
    questions: Sequence[Question],
    scoring: str = "auto",
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[int]:
    """Return for every question the index of its likeliest answer (see `train.likelihood`)."""
    if scoring == "auto":  # decided over all questions, so that every process decides alike
        scoring = "first" if decisive(questions) else "sum"
    mine, places = _share(questions)
    scores = answer_scores(model, mine, scoring, batch_tokens)
    chosen = ((places[i], int(s.argmax())) for i, s in tracked(scores, "evaluating", len(mine), progress))
    return _gathered(chosen)


def choose_classes(
    model: nn.Module, examples: Sequence[Example], pad: int, batch_tokens: int = 4096, progress: bool = False
) -> list[int]:
    """Return for every example the class a sequence classifier finds likeliest."""
    mine, places = _share(examples)

    def chosen() -> Iterator[tuple[int, int]]:
        device, collator = next(model.parameters()).device, Collator(pad)
        for indices in by_length([len(e.input_ids) for e in mine], batch_tokens):
            batch = collator.batch([mine[i] for i in indices]).to(device)
            with evaluating(model), torch.no_grad():
                logits = model(**batch.inputs).logits  # (rows, classes)
            yield from zip([places[i] for i in indices], logits.argmax(-1).tolist(), strict=True)

    return _gathered(tracked(chosen(), "evaluating", len(mine), progress))


def mean_loss(
    model: nn.Module, examples: Sequence[Example], pad: int, batch_tokens: int = 4096, progress: bool = False
) -> dict[str, float]:
    """Return {"loss", "perplexity"} over all labels of the examples, every label with the same weight."""
    mine, places = _share(examples)
    several = any(len(e.segments) > 1 for e in examples)
    packing = examples[0].label is None and (several or separates_documents(model))

    def sums(apart: bool) -> Iterator[tuple[int, tuple[float, int]]]:
        objective, collator = Objective(model), Collator(pad, packing, by_document=apart)
        for indices in by_length([len(e.input_ids) for e in mine], batch_tokens):
            batch = collator.batch([mine[i] for i in indices])
            with evaluating(model), torch.no_grad():
                total = float(objective.loss(batch))
            share = [(total, batch.learned), *[(0.0, 0)] * (len(indices) - 1)]
            yield from zip([places[i] for i in indices], share, strict=True)

    with by_document(model) if packing else contextlib.nullcontext(False) as apart:
        pairs = _gathered(tracked(sums(apart), "evaluating", len(mine), progress))
    loss = math.fsum(total for total, _ in pairs) / max(1, sum(count for _, count in pairs))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[int],
    max_new_tokens: int = 64,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[str]:
    """Return the greedy answer to every prompt: batched by length, padded on the left, ended by a token of `stop`."""
    mine, places = _share(prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0]
    device = next(model.parameters()).device
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}

    def answers() -> Iterator[tuple[int, str]]:
        for indices in by_length([len(p) + max_new_tokens for p in mine], batch_tokens):
            rows = [list(mine[i]) for i in indices]
            width = max(len(row) for row in rows)
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            with evaluating(model), torch.no_grad():
                made = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad,
                    eos_token_id=list(stop),
                    use_cache=True,
                    **greedy,
                )
            texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
            yield from zip([places[i] for i in indices], (text.strip() for text in texts), strict=True)

    return _gathered(tracked(answers(), "answering", len(mine), progress))


def same_answer(answer: str, expected: str, compare: str = "auto") -> bool:
    """Say whether an answer is right.

    "whole": equal texts, but for white space around them. "last-number": equal numbers, taken behind "####" where
    there is one, else the last number of the text. "final": what the last line "Answer: ..." says. "auto" takes
    "final" or "last-number" where the expected answer has such a line or "####", and "whole" elsewhere.
    """
    if compare == "auto":
        compare = "final" if final_answer(expected) else "last-number" if "####" in expected else "whole"
    if compare == "final":
        return final_answer(expected) is not None and final_answer(answer) == final_answer(expected)
    if compare == "whole":
        return answer.strip() == expected.strip()
    given, wanted = last_number(answer), last_number(expected)
    return given is not None and given == wanted


def last_number(text: str) -> Decimal | None:
    """Return the number that a text ends its reasoning with, or None."""
    found = NUMBER.findall(text.rsplit("####", 1)[-1])
    try:
        return Decimal(found[-1].replace(",", "").rstrip(".")) if found else None
    except InvalidOperation:
        return None


def confusion_counts(true: Sequence[int], chosen: Sequence[int], classes: int) -> list[list[int]]:
    """Return counts[i][j]: how often class i was taken for class j."""
    counts = [[0] * classes for _ in range(classes)]
    for i, j in zip(true, chosen, strict=True):
        counts[i][j] += 1
    return counts


def _share(items: Sequence[T]) -> tuple[list[T], list[int]]:
    """Return this process's items and their places in the whole."""
    state = processes()
    places = list(range(state.process_index, len(items), state.num_processes))
    return [items[i] for i in places], places


def _gathered(pairs: Iterable[tuple[int, T]]) -> list[T]:
    """Collect (place, value) of all processes, in the order of places."""
    return [value for _, value in sorted(gather_object(list(pairs)), key=lambda pair: pair[0])]
