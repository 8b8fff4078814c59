"""The chunked loss equals the full-logit loss, gradients included, for plain, scaled, capped and adapted heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from rankworks.train.losses.heads import evaluating, split_model
from rankworks.train.losses.loss import IGNORE, chunk_rows, chunked_cross_entropy
from rankworks.train.losses.objective import Objective
from tiny import tiny_gemma3, tiny_gpt2, tiny_llama, token_batch

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def test_gradcheck_in_float64():
    torch.manual_seed(0)
    head = nn.Linear(6, 11).double()
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (7,))

    def loss(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(h, targets, lambda x: torch.tanh(F.linear(x, w, b)), [w, b], 3)

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_equals_cross_entropy(rows: int):
    torch.manual_seed(1)
    head = nn.Linear(8, 20)
    hidden, targets = torch.randn(13, 8, requires_grad=True), torch.randint(0, 20, (13,))
    full = F.cross_entropy(head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(full, [hidden, head.weight, head.bias])
    ours = chunked_cross_entropy(hidden, targets, head, list(head.parameters()), rows)
    torch.testing.assert_close(ours, full)
    torch.testing.assert_close(
        torch.autograd.grad(3 * ours, [hidden, head.weight, head.bias]), tuple(3 * g for g in wanted)
    )


def test_only_a_chunk_of_logits_exists():
    seen: list[int] = []
    head = nn.Linear(8, 50)
    hidden = torch.randn(40, 8, requires_grad=True)

    def watched(h: torch.Tensor) -> torch.Tensor:
        seen.append(h.shape[0])
        return head(h)

    chunked_cross_entropy(
        hidden, torch.zeros(40, dtype=torch.long), watched, [], chunk_rows(50, 4 * 50 * 16)
    ).backward()
    assert seen == [16, 16, 8]
    assert hidden.grad is not None
    assert head.weight.grad is None


def families():
    gemma2 = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)
    return {
        "llama": tiny_llama,
        "tied": lambda: tiny_llama(tie=True),
        "gpt2": tiny_gpt2,
        "gemma3": tiny_gemma3,
        "gemma2-capped": lambda: Gemma2ForCausalLM(gemma2),
        "cohere-scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
        "granite-scaled": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    }


@pytest.mark.parametrize("family", sorted(families()))
def test_equals_the_models_own_loss(family: str):
    torch.manual_seed(0)
    model = families()[family]()
    ids = token_batch(vocab=100, batch=3, length=9)
    labels = ids.clone()
    labels[:, :4] = IGNORE
    labels[1, 7] = IGNORE
    count = int((labels[:, 1:] != IGNORE).sum())
    theirs = model(input_ids=ids, labels=labels).loss
    theirs.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    objective = Objective(model, chunk_bytes=4 * 100 * 2)
    assert objective.split is not None
    ours = objective({"input_ids": ids}, labels) / count
    ours.backward()
    torch.testing.assert_close(ours, theirs)
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_a_head_that_cannot_be_split_keeps_the_models_own_forward():
    class Odd(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * torch.arange(outputs.logits.shape[-1])
            return outputs

    model = Odd(tiny_llama().config)
    assert split_model(model) is None
    ids = token_batch(batch=2, length=6)
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(Objective(model)({"input_ids": ids}, ids), expected)


def test_the_wrapped_head_counts():
    model = tiny_llama()
    inner = model.lm_head

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.change = inner, nn.Parameter(torch.full((inner.out_features,), 0.5))

        def forward(self, x):
            return self.inner(x) * self.change

    model.requires_grad_(False)
    model.lm_head = Wrapped()
    ids = token_batch(batch=2, length=6)
    loss = Objective(model)({"input_ids": ids}, ids)
    loss.backward()
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected, [model.lm_head.change])[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.lm_head.change.grad, wanted)


def test_no_labels_in_a_micro_batch_is_zero():
    model = tiny_llama()
    ids = token_batch(batch=1, length=4)
    loss = Objective(model)({"input_ids": ids}, torch.full_like(ids, IGNORE))
    loss.backward()
    assert loss.item() == 0


def test_evaluating_restores_each_modules_mode():
    model = tiny_llama()
    model.train()
    model.model.norm.eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert model.training
    assert not model.model.norm.training


def test_a_second_derivative_is_refused_and_not_wrong():
    head = nn.Linear(6, 11)
    hidden, targets = torch.randn(5, 6, requires_grad=True), torch.tensor([1, 2, 3, 4, 5])
    loss = chunked_cross_entropy(hidden, targets, head, list(head.parameters()), 2)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
