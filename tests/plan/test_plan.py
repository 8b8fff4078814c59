"""The verb itself: live models, comparisons, budgets, what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

import rankworks as rw
import rankworks.plan as room
from rankworks.core.errors import ConfigError, TargetError, UnknownNameError
from rankworks.core.registry import methods
from rankworks.plan import Comparison, Plan, compare, rank_for_budget
from tiny import tiny_llama, token_batch

OURS = [m.key for m in methods("delta") if m.origin.startswith("rankworks.")]


def test_the_package_is_the_verb() -> None:
    told = rw.plan("smollm2-135m", "lora", rank=2, sequence=8)
    assert isinstance(told, Plan)
    assert room.plan is not None
    assert rw.plan is room


def test_a_live_model_is_left_bit_for_bit_and_its_adapters_do_not_count() -> None:
    model = tiny_llama(tie=True)
    tokens = token_batch()
    bare = rw.plan(model, "lora", rank=4, sequence=8)
    rw.adapt(model, "dora", rank=2, name="mine")
    rw.adapt(model, "vera", rank=2, name="other")
    before, out = {k: v.clone() for k, v in model.state_dict().items()}, model(tokens).logits
    told = rw.plan(model, "lora", rank=4, sequence=8)
    assert told.to_dict() == bare.to_dict()
    assert rw.adapters(model) == ["mine", "other"]
    assert rw.active(model) == ["other"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(tokens).logits, out)
    assert told.base_parameters == sum(p.numel() for n, p in tiny_llama(tie=True).named_parameters())
    assert told.dtype == "float32"
    assert rw.plan(model, "lora", dtype="bfloat16", sequence=8).weight_bytes < 0.6 * told.weight_bytes


def test_a_quantised_live_model_keeps_its_own_bytes() -> None:
    model = tiny_llama()
    full = rw.plan(model, "lora", rank=4, sequence=8)
    for layer in [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]:
        layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    packed = rw.plan(model, "lora", rank=4, sequence=8)
    numbers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert full.weight_bytes - packed.weight_bytes == 3 * numbers
    assert packed.trainable_parameters == full.trainable_parameters
    assert packed.activation_bytes == full.activation_bytes
    assert packed.dtype == "quantised"


def test_settings_reach_the_adapter() -> None:
    one = rw.plan("llama-3.2-1b", rw.LoRA(rank=4), targets=["q_proj"], sequence=8)
    two = rw.plan("llama-3.2-1b", {"delta": "lora", "rank": 4}, targets="q_proj", sequence=8)
    whole = rw.plan(
        "llama-3.2-1b", rw.AdaptSpec.from_flat({"delta": "lora", "rank": 4, "targets": "q_proj"}), sequence=8
    )
    assert one.trainable_parameters == two.trainable_parameters == whole.trainable_parameters == 16 * 4 * 4096
    more = rw.plan("llama-3.2-1b", rank=4, targets="q_proj", overrides={"q_proj@0:1": {"rank": 8}}, sequence=8)
    assert more.trainable_parameters == one.trainable_parameters + 4 * 4096
    shared = rw.plan("llama-3.2-1b", rank=4, targets="lm_head,embed_tokens", tied="shared", sequence=8)
    assert shared.trainable_parameters == 4 * (2048 + 128256)
    full = rw.plan("llama-3.2-1b", rank=4, targets="q_proj", full="lm_head", sequence=8)
    assert full.trainable_parameters == one.trainable_parameters + 2048 * 128256


def test_frozen_banks_are_in_memory_and_not_on_disk() -> None:
    told = rw.plan("llama-3.2-1b", "vera", rank=64, targets="q_proj,v_proj", sequence=8)
    assert told.trainable_parameters == 16 * (2048 + 512 + 2 * 64)
    assert told.adapter_bytes == 4 * told.trainable_parameters
    assert told.frozen_bytes == 4 * 64 * (2048 + 2048), "one pair for the whole model"
    shifted = rw.plan("llama-3.2-1b", "lora", rank=4, init="pissa", targets="q_proj", sequence=8)
    assert shifted.adapter_bytes == 2 * 4 * shifted.trainable_parameters, "the factors and where they began"


def test_all_methods_side_by_side() -> None:
    model = tiny_llama(hidden=64)
    told = compare(model, targets="q_proj,v_proj", sequence=8, fits="2MB", rank=16)
    assert isinstance(told, Comparison)
    assert sorted([p.delta for p in told.plans] + list(told.skipped)) == sorted(OURS)
    counts = [p.trainable_parameters for p in told.plans]
    assert counts == sorted(counts)
    single = rw.plan(model, "dora", targets="q_proj,v_proj", sequence=8, fits="2MB", rank=16)
    assert next(p for p in told.plans if p.delta == "dora") == single
    table = str(told)
    assert all(p.delta in table and f"{p.trainable_parameters:,}" in table for p in told.plans)
    assert "largest batch" in table
    json.dumps(told.to_dict())


def test_a_method_that_cannot_take_the_model_is_named_with_the_reason() -> None:
    model = tiny_llama()
    told = compare(model, rank=7, targets="q_proj", sequence=8)
    assert "must divide" in told.skipped["bone-bat"]
    with pytest.raises(TargetError, match="must divide"):
        compare(model, ["lora", "bone-bat"], rank=7, targets="q_proj", sequence=8)


def test_methods_at_an_equal_budget() -> None:
    budget = 9_175_040
    told = compare(
        "llama-3.2-3b", ["lora", "dora", "shira", "bone"], budget=budget, targets="q_proj,v_proj", sequence=8
    )
    assert {p.delta: p.trainable_parameters for p in told.plans} == {
        "lora": budget,
        "shira": budget,
        "bone": budget,
        "dora": budget + 28 * 4096,
    }
    with pytest.raises(ConfigError, match="either a budget"):
        compare("llama-3.2-3b", budget=budget, rank=4)


RANKED = [m.key for m in methods("delta") if m.key in OURS and "rank" in m.cls.accepted({})]  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", sorted({*OURS} - {*RANKED}))
def test_a_method_without_a_rank_meets_no_budget(key: str) -> None:
    with pytest.raises(ConfigError, match="has no rank"):
        rank_for_budget(tiny_llama(), key, 5000)


@pytest.mark.parametrize("key", RANKED)
def test_no_rank_comes_nearer_to_the_budget(key: str) -> None:
    model, budget = tiny_llama(), 5000
    best = rank_for_budget(model, key, budget)

    def miss(rank: int) -> int:
        try:
            return abs(rw.plan(model, key, rank=rank, sequence=4).trainable_parameters - budget)
        except (TargetError, ConfigError):
            return 10**9

    assert miss(best) <= min(miss(rank) for rank in [*range(1, 17), best - 1, best + 1] if rank > 0)


def test_a_plan_reads_well_and_is_plain_data() -> None:
    told = rw.plan("llama-60m", "lora", rank=8, init="olora", fits="500MB", sequence=512, gradient_checkpointing=True)
    text = str(told)
    for piece in ("llama-60m (bfloat16), lora from olora on 56 sites", "624,640 of 58,073,600", "fits in 500 MB"):
        assert piece in text
    assert "gradient checkpointing" in text
    data = json.loads(json.dumps(told.to_dict()))
    wanted = {"trainable_parameters", "adapter_bytes", "optimizer_bytes", "weight_bytes", "gradient_bytes"}
    assert wanted | {"activation_bytes", "peak_bytes"} <= data.keys()
    assert data["fit"]["fits"] is True


def test_bad_input_is_answered_with_the_remedy() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'lora'"):
        rw.plan("gpt2", "lorra")
    with pytest.raises(TargetError, match=r"c_atn.*c_attn"):
        rw.plan("gpt2", targets="c_atn")
    with pytest.raises(ConfigError, match=r"unknown key 'rnk'.*rank"):
        rw.plan("gpt2", rnk=8)
    with pytest.raises(ConfigError, match="at least 1"):
        rw.plan("gpt2", rank=0)
    with pytest.raises(ConfigError, match="at most 1024 tokens"):
        rw.plan("gpt2", sequence=2048)
    with pytest.raises(ConfigError, match="batch_size and sequence"):
        rw.plan("gpt2", batch_size=0)
    with pytest.raises(ConfigError, match=r"bfloat61.*bfloat16"):
        rw.plan("gpt2", dtype="bfloat61")
    with pytest.raises(ConfigError, match="'chunked'"):
        rw.plan("gpt2", loss="small")
    with pytest.raises(ConfigError, match="'fused'"):
        rw.plan("gpt2", attention="flash")
    with pytest.raises(ConfigError, match="AdaptSpec"):
        rw.plan("gpt2", rw.AdaptSpec(), rank=4)
    with pytest.raises(ConfigError, match="no gradient checkpointing"):
        rw.plan(nn.Sequential(nn.Linear(4, 4)), rank=1, example=torch.empty(1, 4), gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="cannot be built"):
        rw.plan(PretrainedConfig(), task="causal-lm")
    with pytest.raises(ConfigError, match="a budget"):
        rank_for_budget("gpt2", "lora", 0)
