"""Evaluation: batched measures equal those of one item at a time."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F
from training import make_examples

from rankworks.train.batching.batches import Example
from rankworks.train.measuring.evaluate import (
    choose_answers,
    choose_classes,
    confusion_counts,
    generate_answers,
    last_number,
    mean_loss,
    same_answer,
)
from rankworks.train.measuring.likelihood import Question
from tiny import byte_tokenizer, tiny_bert_classifier, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("batch_tokens", [1, 120, 4096])
def test_perplexity_weighs_every_label_alike(batch_tokens: int):
    model, examples = tiny_llama(), make_examples(9)
    examples.append(Example(tuple(range(3, 23)), tuple(range(3, 23)), segments=(12, 8)))
    total, count = 0.0, 0
    for example in examples:
        start = 0
        for length in example.segments or (len(example.input_ids),):
            ids = torch.tensor([example.input_ids[start : start + length]])
            labels = torch.tensor([example.labels[start : start + length]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            total += float(F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
            count += int((labels[0, 1:] != -100).sum())
            start += length
    measured = mean_loss(model, examples, 0, batch_tokens)
    assert measured["loss"] == pytest.approx(total / count, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_the_likeliest_answer_is_chosen():
    model = tiny_llama()
    prompts = [[5, 6, 7], [9, 10], [30, 31, 32, 33]]
    with torch.no_grad():
        best = [int(model(input_ids=torch.tensor([p])).logits[0, -1, 40:60].argmax()) for p in prompts]
    questions = [Question(p, [[40 + i, 2] for i in range(20)]) for p in prompts]
    assert choose_answers(model, questions) == best


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_classes_are_those_of_one_row_at_a_time(batch_tokens: int):
    model = tiny_bert_classifier()
    examples = [Example(tuple(range(3, 8 + 3 * i)), label=0) for i in range(8)]
    with torch.no_grad():
        alone = [int(model(input_ids=torch.tensor([e.input_ids])).logits.argmax()) for e in examples]
    assert choose_classes(model, examples, 0, batch_tokens) == alone


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_batched_generation_equals_one_prompt_at_a_time(build):
    model, tokenizer = build(), byte_tokenizer()
    prompts = [[50, 51, 52, 53, 54, 55, 56], [60], [70, 71, 72]]
    batched = generate_answers(model, tokenizer, prompts, [2], 8)
    alone = [generate_answers(model, tokenizer, [prompt], [2], 8)[0] for prompt in prompts]
    assert batched == alone
    assert any(batched)


def test_generation_stops_at_every_stop_token():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    whole = generate_answers(model, tokenizer, [[50, 51]], [2], 6)[0]
    first = model.generate(torch.tensor([[50, 51]]), max_new_tokens=1, do_sample=False)[0, -1].item()
    assert len(generate_answers(model, tokenizer, [[50, 51]], [2, first], 6)[0]) <= 1 < len(whole)


def test_answers_are_compared_as_their_data_ask():
    assert same_answer(" yes\n", "yes")
    assert not same_answer("yes.", "yes", "whole")
    assert same_answer("so 3 + 4 = 7.", "7", "last-number")
    assert same_answer("#### 1,200", "we get 30\n#### 1200")
    assert not same_answer("1200 #### 7", "#### 1200")
    assert not same_answer("none", "7", "last-number")
    assert same_answer("I think.\nAnswer: 42.", "6 * 7 = 42\nAnswer: 42")
    assert not same_answer("42", "6 * 7 = 42\nAnswer: 42")
    assert not same_answer("x", "y", "final")
    assert last_number("-3.50 apples") == Decimal("-3.5")
    assert last_number("no") is None


def test_confusion():
    assert confusion_counts([0, 0, 1, 2], [0, 1, 1, 0], 3) == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_evaluation_leaves_mode_and_random_state_alone():
    model = tiny_llama(attention_dropout=0.5).train()
    before = torch.get_rng_state()
    first = mean_loss(model, make_examples(4), 0)
    assert mean_loss(model, make_examples(4), 0) == first
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
