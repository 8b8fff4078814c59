"""Attention that goes by document computes what attention over padded rows does, and never where a model cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from training import make_loop
from transformers import MambaConfig, MambaForCausalLM

import rankworks as rw
from rankworks.train.batching.batches import Batch, Collator, Example
from rankworks.train.batching.documents import NAME, SHORT, by_document, document_attention
from rankworks.train.loop import Loop
from rankworks.train.losses.loss import IGNORE
from rankworks.train.losses.objective import Objective
from tiny import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_moe

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3, "moe": tiny_moe}
LENGTHS = (20, 3, 90, 14, 5)


def batches(model: torch.nn.Module) -> tuple[Batch, Batch, bool]:
    """The same documents padded, and in one row where the model can."""
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(3, 250, (n,), generator=generator).tolist()) for n in LENGTHS]
    docs = [Example(i, (IGNORE, *i[1:])) for i in ids]
    with by_document(model) as works:
        return Collator().batch(docs), Collator(packing=True, by_document=works).batch(docs), works


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_loss_and_gradients_are_those_of_padded_rows(name: str, checkpointing: bool) -> None:
    exact = name != "moe"  # torch multiplies groups of experts in float32 at most
    model = MODELS[name]().double() if exact else MODELS[name]()
    model = rw.adapt(model, "lora", rank=4, init="gaussian", targets="all-linear")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    padded, packed, works = batches(model)
    assert works or name == "gpt2"  # the one of these that hands nothing on to its attention
    if works:
        assert packed.documents == LENGTHS
        assert packed.inputs["input_ids"].shape == (1, sum(LENGTHS))
    objective = Objective(model)
    found = []
    for batch in (padded, packed):
        with by_document(model):
            loss = objective.loss(batch)
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad(set_to_none=True)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9 if exact else 1e-5, rtol=1e-9 if exact else 1e-5)


def test_a_window_is_kept_within_a_long_document() -> None:
    """Gemma's local layers look back a few tokens only; 90 tokens are more than the tiny model's window."""
    model = tiny_gemma3()
    assert max(LENGTHS) > model.config.sliding_window
    padded, packed, works = batches(model)
    assert works
    objective = Objective(model)
    with torch.no_grad(), by_document(model):
        torch.testing.assert_close(objective.loss(packed), objective.loss(padded))
    wide = copy.deepcopy(model)
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = None
    with torch.no_grad(), by_document(wide):
        assert not torch.allclose(Objective(wide).loss(packed), objective.loss(padded), rtol=1e-6)


def test_segments_of_an_example_are_documents() -> None:
    docs = [Example((5, 6, 7, 8, 9), (5, 6, 7, 8, 9), segments=(2, 3)), Example((4, 3), (4, 3))]
    batch = Collator(packing=True, by_document=True).batch(docs)
    assert batch.documents == (2, 3, 2)
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[IGNORE, 6, IGNORE, 8, 9, IGNORE, 3]]


def test_the_model_has_its_own_attention_again_afterwards() -> None:
    model = tiny_llama()
    with by_document(model) as works:
        assert works
        assert model.config._attn_implementation == NAME
        with by_document(model) as again:
            assert again
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), by_document(model):
        _ = 1 / 0
    assert model.config._attn_implementation == "sdpa"


def test_generation_within_the_block_is_the_same() -> None:
    model = tiny_llama()
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    settings = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, **settings)
    with by_document(model):
        assert torch.equal(model.generate(ids, **settings), alone)


def test_models_that_cannot_are_left_alone() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, state_size=4))
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    for model in (mamba, eager):
        with by_document(model) as works:
            assert not works
    assert eager.config._attn_implementation == "eager"


def test_a_run_goes_by_document_and_ends_at_the_same_weights() -> None:
    ends = []
    for packing in (True, False):
        model = rw.adapt(tiny_llama().double(), "lora", rank=4, targets="all-linear", seed=3)
        loop: Loop = make_loop(model, steps=3, packing=packing)
        loop.run()
        assert loop.collator.by_document is packing
        ends.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        assert model.config._attn_implementation == "sdpa"
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], atol=1e-9, rtol=1e-9)


def test_a_batch_in_one_row_is_refused_outside_the_block() -> None:
    model = tiny_llama()
    _, packed, _ = batches(model)
    with pytest.raises(RuntimeError, match="within `by_document`"):
        Objective(model).loss(packed)


def test_short_documents_in_bfloat16_attend_in_float32_on_a_cpu() -> None:
    """What autocast would round goes through attention as it is, and comes out in autocast's type."""
    attend: Any = document_attention
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, generator=generator, requires_grad=True) for _ in range(3))
    exact, _ = attend(torch.nn.Module(), q, k, v, None, documents=[4, 5])
    wanted = torch.autograd.grad(exact.square().sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = attend(torch.nn.Module(), q, k, v, None, documents=[4, 5])
        long = [SHORT + 1]
        q_long = torch.randn(1, 2, SHORT + 1, 4, generator=generator, requires_grad=True)
        assert attend(torch.nn.Module(), q_long, q_long, q_long, None, documents=long)[0].dtype == rounded.dtype
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, exact.bfloat16(), atol=0, rtol=0)
    for one, other in zip(torch.autograd.grad(rounded.float().square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)
