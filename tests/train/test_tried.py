"""What a model can do is tried once, and again when the model has become another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import rankworks as rw
from rankworks.train.batching.batches import Example
from rankworks.train.batching.packing import separates_documents
from rankworks.train.losses.heads import split_model
from rankworks.train.measuring.evaluate import mean_loss
from tiny import tiny_llama

EXAMPLES = [Example((5, 6, 7, 8), (5, 6, 7, 8)), Example((9, 8, 7), (9, 8, 7))]


@contextmanager
def calls(model: torch.nn.Module) -> Iterator[list[int]]:
    """Within the block every forward pass of the backbone is written down."""
    seen: list[int] = []
    hook = model.get_submodule("model").register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        hook.remove()


def test_an_evaluation_that_follows_another_is_one_pass() -> None:
    model = tiny_llama()
    with calls(model) as first:
        loss = mean_loss(model, EXAMPLES, pad=0)
    with calls(model) as second:
        assert mean_loss(model, EXAMPLES, pad=0) == loss
    assert len(first) > 1
    assert len(second) == 1


@pytest.mark.parametrize("change", ["adapt", "detach", "attention", "dtype", "config"])
def test_another_model_is_asked_again(change: str) -> None:
    model = tiny_llama()
    if change == "detach":
        rw.adapt(model, "lora", rank=2)
    assert separates_documents(model)
    with calls(model) as same:
        assert separates_documents(model)
    assert not same
    if change == "adapt":
        rw.adapt(model, "lora", rank=2)
    elif change == "detach":
        rw.detach(model)
    elif change == "attention":
        model.set_attn_implementation("eager")
    elif change == "dtype":
        model.double()
    else:
        model.config.sliding_window = 2
    with calls(model) as other:
        assert separates_documents(model)
    assert other


def test_a_no_is_remembered_too() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert not separates_documents(mamba)
    seen: list[int] = []
    mamba.backbone.register_forward_pre_hook(lambda *_: seen.append(1))
    assert not separates_documents(mamba)
    assert not seen


def test_a_split_is_of_the_model_as_it_is() -> None:
    """What is remembered is the answer, not the modules: a head that was exchanged is the one that is used."""
    model = tiny_llama()
    assert split_model(model) is not None
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    split = split_model(model)
    assert split is not None
    assert split.projection is model.lm_head
