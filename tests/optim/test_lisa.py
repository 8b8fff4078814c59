"""LISA: a few random blocks are trained at a time, and what surrounds them always."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import check_falls, check_resumes, whole_loop
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.hooks import Hook, Moment, optimizer_hooks
from rankworks.core.optim.stack import stacked_blocks
from rankworks.optim.lisa import Switching
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_moe, token_batch

IDS = token_batch(vocab=320)
LAYERS = 5


def number_of(name: str) -> int | None:
    """The block of a parameter of a tiny Llama."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


class Run:
    """Steps on one batch, with the hooks of the optimizer, as the loop calls them."""

    def __init__(self, model: nn.Module | None = None, lr: float = 1e-2, **settings: Any):
        self.model: Any = tiny_llama(layers=LAYERS) if model is None else model
        self.optimizer = rw.make_optimizer(self.model, "lisa", lr=lr, **settings)
        self.hooks, self.done = optimizer_hooks(self.optimizer), 0
        self.call("on_start")

    def call(self, name: str) -> None:
        for hook in self.hooks:
            getattr(hook, name)(Moment(self.model, self.optimizer, self.done, 99))

    def step(self) -> list[int]:
        """One step; returns the blocks that were trained in it."""
        self.done += 1
        self.call("before_forward")
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_ids=IDS, labels=IDS).loss.backward()
        self.optimizer.step()
        found = [(number_of(n), p.requires_grad) for n, p in self.model.named_parameters()]
        assert all(on for block, on in found if block is None)
        blocks = sorted({block for block, on in found if block is not None and on})
        assert all(on == (block in blocks) for block, on in found if block is not None), "a block is trained whole"
        return blocks

    def held(self) -> int:
        """The bytes of the state, step counters left out."""
        return sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for name, value in state.items()
            if name != "step"
        )


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("blocks", [1, 2])
def test_so_many_blocks_are_trained_and_change_at_multiples_of_the_period(blocks: int) -> None:
    run = Run(blocks=blocks, refresh=3)
    trained = [run.step() for _ in range(24)]
    assert all(len(active) == blocks for active in trained)
    periods = [trained[i : i + 3] for i in range(0, 24, 3)]
    assert all(period[0] == period[1] == period[2] for period in periods)
    assert sum(a[0] != b[0] for a, b in itertools.pairwise(periods)) >= 3


def test_what_rests_is_as_it_was_and_keeps_nothing() -> None:
    run = Run(blocks=2, refresh=4, weight_decay=0.1)
    for _ in range(3):
        before = numbers(run.model)
        seen = [run.step() for _ in range(4)]
        for name, parameter in run.model.named_parameters():
            moved = not torch.equal(parameter.detach(), before[name])
            rests = number_of(name) is not None and number_of(name) not in seen[0]
            assert moved != rests, name
            assert (parameter.grad is None) == rests
            assert (parameter in run.optimizer.state) != rests


def test_every_block_has_its_turn_equally_often() -> None:
    """2000 draws of 2 of 5: frequencies 0.4, standard deviation 0.011."""
    hook, counts = Switching(2, 1, True, 3), torch.zeros(LAYERS)
    for period in range(2000):
        active = hook.active(period, LAYERS)
        assert len(set(active)) == 2
        counts[active] += 1
    assert ((counts / 2000 - 0.4).abs() < 0.05).all()


def test_draws_follow_seed_and_period_alone() -> None:
    draws = [[Switching(2, 1, True, seed).active(i, LAYERS) for i in range(20)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("blocks", [1, 3])
def test_after_a_switch_the_state_is_that_of_so_many_blocks(blocks: int) -> None:
    """2 (what surrounds them + gamma blocks) numbers, which is what state_bytes says."""
    model = tiny_llama(layers=LAYERS)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    around = sum(p.numel() for n, p in model.named_parameters() if number_of(n) is None)
    told = optimizer_bytes({"optimizer": "lisa", "blocks": blocks}, model)
    run = Run(model, blocks=blocks, refresh=2)
    assert told == 4 * 2 * (around + blocks * block)
    for _ in range(7):
        run.step()
        assert run.held() == told


def test_kept_state_is_met_again() -> None:
    """Moments go on where they were; in the end there is a state for every block."""
    turns = [Switching(1, 1, True, 0).active(i, LAYERS)[0] for i in range(20)]
    assert set(turns) == set(range(LAYERS))
    for at_switch in ("keep", "drop"):
        run = Run(blocks=1, refresh=1, at_switch=at_switch)
        assert [run.step() for _ in range(20)] == [[block] for block in turns]
        counts = {
            number_of(n): run.optimizer.state[p]["step"].item()
            for n, p in run.model.named_parameters()
            if p.grad is not None
        }
        last = len(list(itertools.takewhile(lambda block: block == turns[-1], reversed(turns))))
        assert counts == {None: 20, turns[-1]: turns.count(turns[-1]) if at_switch == "keep" else last}
        assert turns.count(turns[-1]) > last
        told = optimizer_bytes({"optimizer": "lisa", "blocks": 1, "at_switch": at_switch}, tiny_llama(layers=LAYERS))
        assert run.held() == told
    assert optimizer_bytes({"optimizer": "lisa", "at_switch": "keep"}, tiny_llama()) == optimizer_bytes(
        "adamw", tiny_llama()
    )


def test_all_blocks_are_the_base_bit_for_bit() -> None:
    run, plain = Run(blocks=LAYERS, refresh=2, betas=(0.8, 0.9)), tiny_llama(layers=LAYERS)
    optimizer = rw.make_optimizer(plain, "adamw", lr=1e-2, betas=(0.8, 0.9))
    for _ in range(5):
        run.step()
        optimizer.zero_grad()
        plain(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for one, other in zip(run.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_no_blocks_train_what_surrounds_them() -> None:
    run = Run(blocks=0, refresh=2)
    before = numbers(run.model)
    assert [run.step() for _ in range(3)] == [[], [], []]
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.detach(), before[name]) == (number_of(name) is not None)


def test_a_user_frozen_parameter_stays_frozen() -> None:
    model = tiny_llama(layers=LAYERS)
    model.model.layers[2].mlp.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    run = Run(model, blocks=LAYERS - 1, refresh=1)
    for _ in range(6):
        run.done += 1
        run.call("before_forward")
        assert not model.model.embed_tokens.weight.requires_grad
        assert not model.model.layers[2].mlp.up_proj.weight.requires_grad
    run.call("on_end")
    assert not model.model.layers[2].mlp.up_proj.weight.requires_grad
    assert model.model.layers[2].self_attn.q_proj.weight.requires_grad


def test_a_run_that_was_cut_short_leaves_nothing_frozen_behind() -> None:
    """The next optimizer, of any kind, finds everything it may train."""
    model = tiny_llama(layers=LAYERS)
    Run(model, blocks=1).step()
    assert not all(p.requires_grad for p in model.parameters())
    optimizer = rw.make_optimizer(model, "adamw")
    assert all(p.requires_grad for p in model.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_any_base_takes_the_steps() -> None:
    run = Run(blocks=1, refresh=2, base="galore", rank=4, lr=1e-2)
    run.step()
    assert any("Q" in state or "P" in state for state in run.optimizer.state.values())
    run = Run(blocks=1, refresh=2, base={"optimizer": "sgd", "momentum": 0.9}, weight_decay=0.3)
    assert isinstance(run.optimizer, torch.optim.SGD)
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0, 0.3}


def test_adapters_are_trained_block_by_block_too() -> None:
    model = rw.adapt(tiny_llama(layers=3), "lora", rank=2)
    optimizer = rw.make_optimizer(model, "lisa", blocks=1)
    (hook,) = optimizer_hooks(optimizer)
    hook.before_forward(Moment(model, optimizer, 1, 9))
    owners = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert len(owners) == 1


def test_the_numbers_of_llama_7b() -> None:
    """E+H+2L trains 666,914,816 numbers with the last norm; Adam keeps two for each."""
    model = open_source("llama-7b", "bfloat16").model.requires_grad_(True)
    blocks = stacked_blocks(model)
    assert {sum(p.numel() for p in block.parameters()) for block in blocks.values()} == {202_383_360}
    assert len(blocks) == 32
    assert 2 * 32000 * 4096 == 262_144_000
    assert optimizer_bytes({"optimizer": "lisa", "blocks": 2}, model) == 2 * 1_333_829_632
    assert optimizer_bytes({"optimizer": "lisa", "blocks": 0}, model) == 2 * 2 * (262_144_000 + 4096)
    for count in (1, 3, 32):
        told = optimizer_bytes({"optimizer": "lisa", "blocks": count}, model)
        assert told == 2 * 2 * (262_144_000 + 4096 + count * 202_383_360)


def test_blocks_are_found_in_any_family() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    assert list(stacked_blocks(tiny_gpt2())) == ["transformer.h.0", "transformer.h.1"]
    assert list(stacked_blocks(tiny_bert_classifier())) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert list(stacked_blocks(tiny_moe())) == ["model.layers.0", "model.layers.1"], "experts are no blocks"
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    assert list(stacked_blocks(t5)) == [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)]
    assert list(stacked_blocks(t5, "decoder.block")) == ["decoder.block.0", "decoder.block.1"]


class Heads(nn.Module):
    """A list of plain layers is no stack; blocks may lie in any container that is named."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def test_where_no_blocks_are_it_says_so() -> None:
    with pytest.raises(ConfigError, match="no list of blocks"):
        rw.make_optimizer(Heads(), "lisa")
    assert list(stacked_blocks(Heads(), "body")) == ["body.0", "body.1", "body.2"]
    with pytest.raises(ConfigError, match=r"no module 'model\.layer'.*model\.layers"):
        rw.make_optimizer(tiny_llama(), "lisa", stack="model.layer")
    with pytest.raises(ConfigError, match="the model has 2"):
        rw.make_optimizer(tiny_llama(), "lisa", blocks=3)
    with pytest.raises(ConfigError, match="blocks"):
        rw.make_optimizer(tiny_llama(), "lisa", blocks=-1)


def test_a_run_lowers_the_loss_and_ends_with_everything_trainable() -> None:
    loop = check_falls("lisa", {"blocks": 1, "refresh": 3})
    assert all(p.requires_grad for p in loop.model.parameters())


@pytest.mark.parametrize("refresh", [2, 3])
@pytest.mark.parametrize("at_switch", ["drop", "keep"])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, at_switch: str, refresh: int) -> None:
    """In the middle of a period (left after step 4 of periods of 3), and at its end."""
    check_resumes(tmp_path, "lisa", {"blocks": 1, "refresh": refresh, "at_switch": at_switch}, stop=6)


@pytest.mark.parametrize("layerwise", [False, True])
def test_in_the_loop_what_rests_has_neither_gradient_nor_state(layerwise: bool) -> None:
    seen = []

    class Looks(Hook):
        """Looks at the start of every step, when the steps before it are taken."""

        def before_forward(self, moment: Moment) -> None:
            """Note the blocks that have a state, and those that are trained now."""
            named = list(moment.model.named_parameters())
            kept = {number_of(n) for n, p in named if moment.optimizer.state.get(p)} - {None}
            seen.append((kept, {number_of(n) for n, p in named if p.requires_grad} - {None}))

    options = {"blocks": 1, "refresh": 2}
    whole_loop("lisa", options, hooks=[Looks()], layerwise=layerwise, clip=None, steps=9).run()
    for step, (kept, active) in enumerate(seen):
        assert len(active) == 1
        assert kept == (active if step % 2 else kept & active), "after a switch nothing but the new block's own"
    assert len({tuple(active) for _, active in seen}) == 2


def test_layerwise_updates_are_the_same() -> None:
    ends = []
    for layerwise in (False, True):
        loop = whole_loop("lisa", {"blocks": 1, "refresh": 2, "eps": 1e-3}, layerwise=layerwise, steps=6)
        loop.run()
        ends.append(numbers(loop.model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=2e-6, rtol=0)
