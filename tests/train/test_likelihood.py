"""Label likelihood with a shared prompt equals the likelihood read off the whole sequence."""

from __future__ import annotations

import pytest
import torch

from rankworks.core.errors import ConfigError
from rankworks.train.measuring.likelihood import Question, answer_scores, by_length, common_start, decisive
from tiny import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_moe

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3, "moe": tiny_moe}


def questions(same_start: bool = False, instruction: int = 0) -> list[Question]:
    made = []
    for i, length in enumerate([5, 90, 12, 7]):
        prompt = [*range(100, 100 + instruction), *[3 + (7 * i + 11 * t) % 240 for t in range(length)]]
        answers = [[40, 41, 2], [40 if same_start else 50, 2], [60, 7, 8, 9, 2]]
        made.append(Question(prompt, answers))
    return made


def by_hand(model: torch.nn.Module, question: Question) -> torch.Tensor:
    totals = []
    for answer in question.answers:
        ids = torch.tensor([[*question.prompt, *answer]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(question.prompt) - 1
        totals.append(sum(log_probs[start + i, token] for i, token in enumerate(answer)))
    return torch.stack(totals)


@pytest.mark.parametrize("batch_tokens", [1, 200, 4096])
@pytest.mark.parametrize("instruction", [0, 20])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_sum_equals_the_whole_sequences(name: str, instruction: int, batch_tokens: int):
    model, asked = MODELS[name](), questions(same_start=True, instruction=instruction)
    scores = dict(answer_scores(model, asked, "sum", batch_tokens))
    assert sorted(scores) == [0, 1, 2, 3]
    for i, question in enumerate(asked):
        torch.testing.assert_close(scores[i], by_hand(model, question), atol=1e-4, rtol=1e-4)


def test_mean_divides_by_the_length():
    model, asked = tiny_llama(), questions()
    total, mean = dict(answer_scores(model, asked, "sum")), dict(answer_scores(model, asked, "mean"))
    torch.testing.assert_close(mean[1] * torch.tensor([3, 2, 5]), total[1])


@pytest.mark.parametrize("instruction", [0, 20])
def test_first_needs_one_pass_and_is_taken_only_where_it_decides(instruction: int):
    model, asked = tiny_llama(), questions(instruction=instruction)
    first = dict(answer_scores(model, asked, "auto"))
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([asked[2].prompt])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(first[2], log_probs[[40, 50, 60]])
    shared = questions(same_start=True)
    assert not decisive(shared)
    scores = dict(answer_scores(model, shared, "auto"))
    torch.testing.assert_close(scores[2], by_hand(model, shared[2]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="sum or mean"):
        dict(answer_scores(model, shared, "first"))


def test_batches_are_of_similar_length():
    assert by_length([5, 100, 6, 90, 7], 200) == [[0, 2, 4], [3, 1]]
    assert by_length([500], 10) == [[0]]


def test_the_common_start_leaves_a_token_of_every_prompt():
    assert common_start([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 9]]) == [1, 2]
    assert common_start([[1, 2], [1, 2, 3]]) == [1]
    assert common_start([[1, 2], [1, 2]]) == [1]
    assert common_start([[1], [2]]) == []
