"""LIFT: trained entries at the largest places of the weight's low-rank part, chosen anew during training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import adapted, best_of_rank, change_of, close, delta_of, linear, shake, weight_of
from learning import losses, tiny_adapted
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.hooks import Moment, method_hooks
from rankworks.deltas.lift import rearrange
from rankworks.linalg.svd import randomised_svd
from rankworks.train.api import train
from tiny import byte_tokenizer, tiny_llama


def mask_of(delta: Any) -> Tensor:
    mask = torch.zeros(delta.shape.out * delta.shape.in_, dtype=torch.bool)
    mask[delta.index.long()] = True
    return mask.reshape(delta.shape)


def largest(scores: Tensor, k: int) -> Tensor:
    flat = scores.flatten().tolist()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k]] = True
    return mask.reshape(scores.shape)


def one(layer: nn.Module | None = None, **settings: Any) -> nn.Module:
    return adapted(layer or linear(9, 8), "lift", **{"rank": 1, "filter_rank": 2, "every": 3, **settings})


def run(
    model: nn.Module, steps: int, optimiser: torch.optim.Optimizer, start: int = 0, total: int = 100
) -> list[Tensor]:
    """Train as the loop does, with the method's hooks; returns the weight after each step."""
    (hook,) = method_hooks(model)
    seen = []
    for step in range(start + 1, start + steps + 1):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 9, generator=generator), torch.randn(16, 8, generator=generator)
        optimiser.zero_grad()
        (model(x) - y).square().mean().backward()
        optimiser.step()
        hook.after_step(Moment(model, optimiser, step, total))
        seen.append(weight_of(model) + change_of(model))
    return seen


def adam(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(delta_of(model).parameters(), lr=0.05, weight_decay=0.0, **settings)


def test_the_mask_is_brute_force_on_the_low_rank_part() -> None:
    model = one()
    wanted = largest(best_of_rank(weight_of(model), 2).abs(), 17)
    assert torch.equal(mask_of(delta_of(model)), wanted)


def test_the_released_selection_is_the_smallest() -> None:
    model = one(order="smallest")
    wanted = largest(-best_of_rank(weight_of(model), 2).abs(), 17)
    assert torch.equal(mask_of(delta_of(model)), wanted)


def test_a_full_filter_is_magnitude_selection() -> None:
    model = one(filter_rank=8)
    assert torch.equal(mask_of(delta_of(model)), largest(weight_of(model).abs(), 17))


def test_the_random_filter_has_twice_the_vectors() -> None:
    layer = linear(40, 30)
    model = one(layer, filter="random", filter_rank=4)
    u, s, vh = randomised_svd(layer.weight.detach(), 4, 2, 4)
    assert torch.equal(mask_of(delta_of(model)), largest(((u * s) @ vh).abs(), 70))


def test_the_signs_of_the_singular_vectors_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(9, 8)
    plain = mask_of(delta_of(one(copy.deepcopy(layer))))
    from rankworks.deltas import lift

    def turned(matrix: Tensor, rank: int) -> Any:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        signs = torch.tensor([-1.0, 1.0])
        return u[:, :rank] * signs, s[:rank], vh[:rank] * signs[:, None]

    monkeypatch.setattr(lift, "truncated_svd", turned)
    assert torch.equal(mask_of(delta_of(one(layer))), plain)


def test_counts() -> None:
    """4096 x 4096, r = 128: 1,048,576 = 6.25 %; and never more than there are."""
    layer = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta"))
    assert rw.plan(layer, "lift", targets="0", example=torch.empty(1, 4096)).trainable_parameters == 1_048_576
    assert 1_048_576 / 4096**2 == 0.0625
    small = nn.Sequential(nn.Linear(9, 8, device="meta"))
    assert rw.plan(small, "lift", targets="0", example=torch.empty(1, 9)).trainable_parameters == 72


def test_between_choices_exactly_k_entries_change_and_the_rest_is_bit_identical() -> None:
    model = one(every=100)
    before = weight_of(model).clone()
    optimiser = adam(model)
    run(model, 3, optimiser)
    rw.merge(model)
    moved = model.layer.weight.detach() != before
    assert int(moved.sum()) == 17
    assert torch.equal(moved, mask_of(delta_of(model)))
    state = optimiser.state[delta_of(model).values]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (17,)


def test_a_choice_is_made_where_the_next_step_is_a_multiple() -> None:
    model = one(every=3)
    masks = []
    (hook,) = method_hooks(model)
    optimiser = adam(model)
    for step in range(1, 9):
        with torch.no_grad():
            delta_of(model).values.add_(torch.randn(17))
        before = mask_of(delta_of(model))
        hook.after_step(Moment(model, optimiser, step, 8))
        masks.append(not torch.equal(before, mask_of(delta_of(model))))
    assert [i for i, changed in enumerate(masks, start=1) if changed] == [2, 5]  # 8 + 1 too, but 8 is the last step


def test_a_refresh_chooses_by_the_present_weight_and_changes_no_entry_of_it() -> None:
    model = one(every=2)
    shake(model)
    present = weight_of(model) + change_of(model)
    (hook,) = method_hooks(model)
    hook.after_step(Moment(model, adam(model), 1, 9))
    assert torch.equal(mask_of(delta_of(model)), largest(best_of_rank(present, 2).abs(), 17))
    assert torch.equal(weight_of(model) + change_of(model), present)


def test_two_refreshes_with_the_weight_unchanged_give_the_same_mask() -> None:
    model = one(every=1)
    shake(model)
    (hook,) = method_hooks(model)
    hook.after_step(Moment(model, adam(model), 1, 9))
    first, change = mask_of(delta_of(model)), change_of(model)
    hook.after_step(Moment(model, adam(model), 2, 9))
    assert torch.equal(mask_of(delta_of(model)), first)
    assert torch.equal(change_of(model), change)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.05),
        lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ],
    ids=["adamw", "amsgrad", "fused", "sgd"],
)
def test_moments_stay_where_the_masks_overlap_and_start_at_zero_elsewhere(make: Any) -> None:
    model = one(every=4)
    optimiser = make(list(delta_of(model).parameters()))
    run(model, 2, optimiser)
    with torch.no_grad():
        delta_of(model).values.add_(torch.randn(17))  # so that the next choice is another
    delta, state = delta_of(model), optimiser.state[delta_of(model).values]
    before = {k: dict(zip(delta.index.tolist(), t.tolist(), strict=True)) for k, t in state.items() if t.shape == (17,)}
    step = state["step"].clone() if "step" in state else None
    old = set(delta.index.tolist())
    (hook,) = method_hooks(model)
    hook.after_step(Moment(model, optimiser, 3, 9))
    new = set(delta.index.tolist())
    assert old & new
    assert new - old
    assert before
    for key, numbers in before.items():
        for place, number in zip(delta.index.tolist(), state[key].tolist(), strict=True):
            assert number == numbers.get(place, 0.0), f"{key} of entry {place}"
    assert step is None or torch.equal(state["step"], step)


def test_a_state_of_one_entry_keeps_its_step_count() -> None:
    values = torch.zeros(1)
    state = {"step": torch.ones(1), "exp_avg": torch.ones(1)}
    rearrange(state, values, (torch.tensor([0]), torch.tensor([False])))
    assert state["step"] == 1
    assert state["exp_avg"] == 0


def test_it_is_the_reference_algorithm_on_the_weight_itself() -> None:
    """Adam on masked entries of W with moments scattered and gathered at each refresh, written out."""
    layer = linear(9, 8)
    model = one(copy.deepcopy(layer), every=3)
    seen = run(model, 11, adam(model))
    W, bias = layer.weight.detach().clone(), layer.bias.detach()
    mask = largest(best_of_rank(W, 2).abs(), 17)
    m = v = torch.zeros(17)
    choices = 0
    for t in range(1, 12):
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(16, 9, generator=generator), torch.randn(16, 8, generator=generator)
        G = 2 / (16 * 8) * (x @ W.t() + bias - y).t() @ x
        g = G[mask]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        W[mask] -= 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        close(seen[t - 1], W, 1e-9)
        if (t + 1) % 3 == 0:
            M, V = torch.zeros_like(W), torch.zeros_like(W)
            M[mask], V[mask] = m, v
            earlier, mask = mask, largest(best_of_rank(W, 2).abs(), 17)
            choices += not torch.equal(earlier, mask)
            m, v = M[mask], V[mask]
    assert choices >= 2


def test_with_every_entry_it_is_dense_adam() -> None:
    layer = linear(9, 8)
    model = one(copy.deepcopy(layer), rank=5, every=2)
    seen = run(model, 6, adam(model))
    twin = adapted(copy.deepcopy(layer), "shira", density=1.0)
    optimiser = adam(twin)
    for step in range(1, 7):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 9, generator=generator), torch.randn(16, 8, generator=generator)
        optimiser.zero_grad()
        (twin(x) - y).square().mean().backward()
        optimiser.step()
        close(seen[step - 1], weight_of(twin) + change_of(twin))


def test_earlier_entries_stay_in_the_change_and_are_exported(tmp_path: Path) -> None:
    model = one(every=2)
    run(model, 7, adam(model))
    delta = delta_of(model)
    assert delta.past_index is not None
    assert len(delta.past_index) > 0
    assert not set(delta.past_index.tolist()) & set(delta.index.tolist())
    index, values = rw.sparse_entries(model)["layer"]
    assert len(index) == 17 + len(delta.past_index)
    close(torch.zeros(72).index_add(0, index, values).reshape(8, 9), change_of(model))
    rw.save(model, tmp_path / "a")
    again = rw.load(type(model)(copy.deepcopy(linear(9, 8))).eval(), tmp_path / "a", check_base=False)
    assert torch.equal(change_of(again), change_of(model))
    with pytest.raises(rw.RankworksError, match="rank"):
        rw.export(model, tmp_path / "lora", "lora")


def test_a_plain_state_dict_carries_the_earlier_entries() -> None:
    layer = linear(9, 8)
    model = one(copy.deepcopy(layer), every=2)
    run(model, 7, adam(model))
    fresh = one(copy.deepcopy(layer), every=2)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(change_of(fresh), change_of(model))


@pytest.mark.parametrize("delta", ["lift", "dora"])
def test_a_run_resumed_in_mid_schedule_ends_with_the_same_bits(delta: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    rows = [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("good", "bad")]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))

    class StopHere(Exception):  # noqa: N818
        pass

    from rankworks.core.hooks import Hook

    class Stopper(Hook):
        def __init__(self, at: int):
            self.at = at

        def after_step(self, moment: Moment) -> None:
            if moment.step == self.at:
                raise StopHere

    def go(folder: str, stop: int) -> nn.Module:
        inner = {"inner": "lift"} if delta == "dora" else {}
        model = rw.adapt(tiny_llama(), delta, rank=1, filter_rank=4, every=2, targets=["q_proj", "down_proj"], **inner)
        config = {
            "train": {"steps": 8, "batch_size": 4, "save_every": 3},
            "optim": {"lr": 0.05},
            "evaluate": {"limit": 4},
            "output": str(tmp_path / folder),
        }
        train(model, byte_tokenizer(), {"path": str(tmp_path / "data.jsonl")}, config, [Stopper(stop)], progress=False)
        return model

    whole = go("whole", 99)
    with pytest.raises(StopHere):
        go("parts", 5)
    resumed = go("parts", 99)
    wanted, got = (rw.delta_weights(m) for m in (whole, resumed))
    assert all(torch.equal(wanted[k], got[k]) for k in wanted)
    inner = rw.get_delta(resumed, "model.layers.0.self_attn.q_proj")
    inner = inner.inner if delta == "dora" else inner
    assert len(inner.past_index) > 0


def test_it_learns() -> None:
    seen = losses(tiny_adapted("lift", rank=4, filter_rank=4))
    assert seen[-1] < 0.8 * seen[0]
