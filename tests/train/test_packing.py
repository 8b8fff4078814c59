"""Packed documents do not see each other, and packing wastes little."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from rankworks.core.errors import ConfigError
from rankworks.train.batching.batches import Collator, Example
from rankworks.train.batching.packing import cheapest_rows, first_fit, separates_documents
from rankworks.train.config import TrainConfig
from rankworks.train.loop import packs
from rankworks.train.losses.loss import IGNORE
from rankworks.train.losses.objective import Objective
from tiny import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_moe

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3, "moe": tiny_moe}


def documents(lengths: list[int], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        ids = tuple(torch.randint(3, 250, (n,), generator=generator).tolist())
        made.append(Example(ids, (IGNORE, *ids[1:])))
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_packed_logits_equal_those_of_the_document_alone(name: str, attention: str):
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    docs = documents([9, 5, 3, 7, 80, 2])
    row = Example(
        tuple(t for d in docs for t in d.input_ids),
        tuple(t for d in docs for t in d.labels),
        segments=tuple(len(d.input_ids) for d in docs),
    )
    batch = Collator(packing=True, multiple=16).batch([row])
    assert batch.inputs["input_ids"].shape == (1, 112)
    with torch.no_grad():
        packed = model(**batch.inputs, use_cache=False).logits[0]
        at = 0
        for doc in docs:
            alone = model(input_ids=torch.tensor([doc.input_ids])).logits[0]
            torch.testing.assert_close(packed[at : at + len(alone)], alone, atol=1e-5, rtol=1e-5)
            at += len(alone)


def test_changing_one_document_changes_no_other():
    model = tiny_llama()
    docs, other = documents([6, 8, 4]), documents([8], seed=5)
    collator = Collator(packing=True)

    def logits(middle: Example) -> torch.Tensor:
        rows = [docs[0], middle, docs[2]]
        ids = tuple(t for d in rows for t in d.input_ids)
        with torch.no_grad():
            return model(**collator.batch([Example(ids, ids, segments=(6, 8, 4))]).inputs, use_cache=False).logits[0]

    first, second = logits(docs[1]), logits(other[0])
    assert torch.equal(first[:6], second[:6])
    assert torch.equal(first[14:], second[14:])
    assert not torch.allclose(first[6:14], second[6:14])


def test_packing_does_not_change_the_loss():
    model, docs = tiny_llama(), documents([20, 3, 9, 14, 5, 6])
    objective = Objective(model)
    padded, packed = Collator().batch(docs), Collator(packing=True).batch(docs)
    assert packed.inputs["input_ids"].numel() < padded.inputs["input_ids"].numel()
    assert packed.learned == padded.learned == sum(d.learned for d in docs)
    torch.testing.assert_close(objective.loss(packed), objective.loss(padded))


def test_no_label_crosses_a_border():
    docs = [Example((5, 6, 7), (5, 6, 7)), Example((8, 9), (8, 9))]
    batch = Collator(packing=True).batch(docs)
    assert batch.labels.tolist() == [[IGNORE, 6, 7, IGNORE, 9]] or batch.labels.shape[0] == 2
    assert batch.learned == 3 == sum(d.learned for d in docs)


def test_first_fit():
    assert first_fit([5, 3, 2, 4, 1], 6) == [[0, 4], [3, 2], [1]]
    assert first_fit([10], 6) == [[0]]
    rows = cheapest_rows([128, 60, 64, 30, 100, 28, 120, 5])
    assert sorted(i for row in rows for i in row) == list(range(8))
    width = max(sum([128, 60, 64, 30, 100, 28, 120, 5][i] for i in row) for row in rows)
    assert len(rows) * width < 1.15 * 535


def test_a_model_that_mixes_documents_is_found_out():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert not separates_documents(mamba)
    docs = documents([4, 5])
    assert packs(tiny_llama(), docs, TrainConfig(packing="auto"))
    assert not packs(mamba, docs, TrainConfig(packing="auto"))
    assert not packs(tiny_llama(), docs, TrainConfig(packing=False))
    with pytest.raises(ConfigError, match=r"train\.packing=false"):
        packs(mamba, docs, TrainConfig(packing=True))


def test_the_probe_leaves_the_random_state_and_the_modes_alone():
    model = tiny_llama().train()
    before = torch.get_rng_state()
    assert separates_documents(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
