"""SNELLA and SNELL: a sparse kernel matrix, and the sharing of its non-zeros among layers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import (
    KINDS,
    LAYERS,
    adapted,
    base_of,
    change_of,
    close,
    delta_of,
    kept_for_backward,
    linear,
    quick,
    rank_of,
    shake,
    weight_of,
)
from hypothesis import given
from hypothesis import strategies as st
from learning import losses, tiny_adapted
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ExportError, TargetError
from rankworks.core.forms.sparsity import Allocation, Schedule, deal
from rankworks.core.hooks import Hook, Moment, method_hooks
from rankworks.deltas.snella import threshold
from rankworks.train.api import train
from tiny import byte_tokenizer, tiny_llama


def by_hand(delta: Any) -> Tensor:
    """D (out, in), entry by entry."""
    D = torch.zeros(delta.shape.out, delta.shape.in_)
    for h, c in enumerate((0.1, -0.1)):
        difference = delta.Q[h][:, None, :] - delta.P[h][None, :, :]  # (out, in, q)
        D = D + c * difference.abs().pow(delta.norm).sum(-1).pow(1 / delta.norm)
    if delta.form == "snella":
        scaled = torch.exp(D / delta.g)
        D = D + delta.a * scaled / scaled.sum(0, keepdim=True) + delta.b
    return D.detach()


@pytest.mark.parametrize(
    "settings", [{}, {"form": "snell"}, {"form": "snell", "norm": 1.0}, {"form": "snell", "norm": 3.0}]
)
def test_the_kernel_is_the_definition(settings: dict[str, Any]) -> None:
    model = adapted(linear(9, 8), "snella", rank=4, **settings)
    delta = shake(model)
    close(delta.kernel(), by_hand(delta), 1e-9)


@pytest.mark.parametrize("shrink", ["square", "soft", "hard"])
def test_what_survives_is_shrunk_as_the_setting_says(shrink: str) -> None:
    model = adapted(linear(9, 8), "snella", rank=4, shrink=shrink, initial_sparsity=0.5)
    delta = shake(model)
    D = by_hand(delta)
    theta = D.abs().flatten().sort().values[35]  # 36 of 72 are zero
    wanted = {"square": D * D.abs(), "soft": D * (D.abs() - theta), "hard": D}[shrink] * (D.abs() > theta)
    close(change_of(model), wanted, 1e-8)


def test_without_sparsity_the_hard_form_is_the_dense_kernel_matrix() -> None:
    model = adapted(linear(9, 8), "snella", rank=4, shrink="hard")
    delta = shake(model)
    close(change_of(model), by_hand(delta), 1e-9)
    assert (change_of(model) != 0).all()


@quick
@given(t=st.floats(0, 0.999), n=st.integers(2, 300))
def test_the_share_of_zeros_is_at_least_t_and_within_one_entry(t: float, n: int) -> None:
    model = adapted(linear(n, 2), "snella", rank=2, initial_sparsity=t, shrink="hard")
    shake(model)
    zeros = int((change_of(model) == 0).sum())
    assert zeros >= min(t * 2 * n, 2 * n - 1) - 1e-6
    assert zeros <= t * 2 * n + 1


def test_the_threshold_is_exact_above_the_limit_of_torchs_quantile() -> None:
    n = (1 << 24) + 100
    size = torch.arange(n, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(size, 0.3)
    assert threshold(size, torch.tensor([12_345])) == 12_344
    assert threshold(size, torch.tensor([0])) == -1


def test_the_square_form_holds_its_factor_constant() -> None:
    """dS/dD is |D|, not 2 |D|."""
    model = adapted(linear(9, 8), "snella", rank=4, form="snell")
    delta = shake(model)
    G = torch.randn(8, 9)
    (G * delta.matrix()).sum().backward()
    found = delta.Q.grad.clone()
    delta.Q.grad = None
    D = delta.kernel()
    (G * D.detach().abs() * D).sum().backward()
    close(found, delta.Q.grad)


def test_the_rank_is_not_bounded_by_the_factors() -> None:
    model = adapted(linear(96, 96), "snella", rank=8, initial_sparsity=0.3)
    shake(model)
    assert rank_of(change_of(model)) > 8
    assert rank_of(delta_of(model).kernel().detach()) > 80


def test_the_start_is_tiny_but_not_zero_and_drawn_as_released() -> None:
    torch.set_default_dtype(torch.float32)
    model = adapted(linear(768, 768), "snella", rank=32, form="snell")
    delta = delta_of(model)
    bound = 1 / math.sqrt(768 * 16)
    assert float(delta.P.detach().abs().max()) <= bound
    assert float(delta.P.detach().abs().max()) > 0.99 * bound
    assert abs(float(delta.kernel().detach().abs().max()) - 0.003) < 0.0015
    assert 1e-7 < float(change_of(model).abs().mean()) < 1.6e-6
    x = torch.randn(4, 768)
    assert not torch.equal(model(x), base_of(model, x))
    torch.testing.assert_close(model(x), base_of(model, x), rtol=1e-3, atol=1e-3)


def test_the_count_of_vit() -> None:
    """ViT-B/16, r = 32, q, k, v, proj, fc1, fc2 of 12 blocks: 5,308,416, and three scalars each in SNELLA."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "qkvo":
                setattr(self, name, nn.Linear(768, 768, device="meta"))
            self.fc1, self.fc2 = nn.Linear(768, 3072, device="meta"), nn.Linear(3072, 768, device="meta")

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(self.o(self.v(self.k(self.q(x))))))

    model = nn.Sequential(*[Block() for _ in range(12)])
    for form, more in (("snell", 0), ("snella", 3 * 72)):
        told = rw.plan(model, "snella", rank=32, form=form, example=torch.empty(1, 768))
        assert told.trainable_parameters == 5_308_416 + more


@pytest.mark.parametrize(
    ("settings", "match"), [({"rank": 3}, "even rank"), ({"norm": 1.0}, "form=snell"), ({"rank": 0}, "rank")]
)
def test_bad_shapes_and_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(TargetError, match=match):
        adapted(linear(), "snella", **{"rank": 2, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged_and_the_sparse_export_is_exact(kind: str) -> None:
    layer, x = LAYERS[kind][0](), LAYERS[kind][1]()
    model = adapted(layer, "snella", rank=2, initial_sparsity=0.6)
    shake(model)
    wanted, weight = model(x), weight_of(model).clone()
    index, values = rw.sparse_entries(model)["layer"]
    assert len(index) == int((change_of(model) != 0).sum())
    flat = weight.reshape(-1).index_add(0, index, values).reshape(weight.shape)
    rw.merge(model)
    close(model(x), wanted)
    assert torch.equal(weight_of(model), flat)


def test_as_plain_lora_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        rw.export(adapted(linear(), "snella", rank=2), tmp_path / "a", "lora")


def test_it_is_switched_in_by_its_entries() -> None:
    model, x = adapted(linear(9, 8), "snella", rank=2, initial_sparsity=0.6), torch.randn(3, 9)
    shake(model)
    wanted, before = model(x), weight_of(model).clone()
    rw.switch(model, "default")
    close(model(x), wanted)
    rw.switch(model, None)
    assert torch.equal(weight_of(model), before)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.5}])
def test_between_the_passes_nothing_of_the_weights_size_is_kept(kind: str, settings: dict[str, Any]) -> None:
    layer = linear(40, 50) if kind == "linear" else nn.Embedding(40, 50)
    x = torch.randn(3, 40) if kind == "linear" else torch.randint(40, (3,))
    model = adapted(layer, "snella", rank=2, **settings).train()
    dense = [s for s in kept_for_backward(model, x) if s.numel() >= 40 * 50]
    assert len(dense) <= 1  # the frozen weight itself, by reference


def test_drop_path_drops_the_change_of_whole_examples() -> None:
    model, x = adapted(linear(9, 8), "snella", rank=2, drop_path=0.5), torch.randn(200, 5, 9)
    shake(model, std=5.0)
    whole = model(x) - base_of(model, x)
    model.train()
    dropped = model(x) - base_of(model, x)
    kept = dropped.abs().amax(dim=(1, 2)) > 1e-12
    assert 60 < int(kept.sum()) < 140
    close(dropped[kept], 2 * whole[kept], 1e-9)


# ---- the allocation ----


@quick
@given(data=st.data(), n=st.integers(1, 8))
def test_budgets_sum_to_the_whole_and_never_exceed_a_layer(data: Any, n: int) -> None:
    most = data.draw(st.lists(st.integers(1, 500), min_size=n, max_size=n))
    scores = data.draw(st.lists(st.floats(0, 1e3), min_size=n, max_size=n))
    budget = data.draw(st.integers(0, sum(most)))
    shares = deal(budget, scores, most)
    assert sum(shares) == budget
    assert all(0 <= share <= top for share, top in zip(shares, most, strict=True))


@quick
@given(scores=st.lists(st.integers(0, 100), min_size=4, max_size=4), power=st.integers(-20, 20))
def test_the_allocation_does_not_depend_on_the_scale_of_the_scores(scores: list[int], power: int) -> None:
    most = [100, 50, 200, 10]
    assert deal(170, scores, most) == deal(170, [s * 2.0**power for s in scores], most)


def test_what_a_full_layer_leaves_is_dealt_in_proportion() -> None:
    assert deal(100, [8, 1, 1], [20, 100, 100]) == [20, 40, 40]
    assert deal(100, [0, 0, 0, 0], [100, 100, 100, 100]) == [25, 25, 25, 25]
    assert deal(90, [1, 0, 0], [30, 30, 30]) == [30, 30, 30]


def test_the_schedule_hits_both_ends_and_is_cubic_between() -> None:
    schedule = Schedule({"a": 1000, "b": 500}, {"a": 200, "b": 100}, 10)
    assert schedule.budget(0) == 1500
    assert schedule.budget(1) == 300
    assert schedule.budget(0.5) == 300 + 1200 // 8
    rounds = [schedule.round_at(step, 40) for step in range(41)]
    assert rounds[0] == 0
    assert rounds[-1] == 10
    assert sum(after != before for before, after in itertools.pairwise(rounds)) == 10


def two_layers(**settings: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 6)).eval()
    return rw.adapt(model, "snella", rank=2, **{"rounds": 4, "sparsity": 0.5, **settings})


def run(model: nn.Module, steps: int) -> Allocation:
    (hook,) = method_hooks(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        model(torch.randn(16, 9)).square().mean().backward()
        optimiser.step()
        hook.after_step(Moment(model, optimiser, step, steps))
    assert isinstance(hook, Allocation)
    return hook


@pytest.mark.parametrize("allocation", ["sensitivity", "magnitude", "even"])
def test_after_the_last_step_the_target_share_is_zero(allocation: str) -> None:
    model = two_layers(allocation=allocation)
    run(model, 8)
    changes = rw.delta_weights(model)
    zeros = sum(int((c == 0).sum()) for c in changes.values())
    assert abs(zeros - 60) <= 2
    if allocation == "even":
        assert [int((c == 0).sum()) for c in changes.values()] == [36, 24]


def test_the_importance_is_the_running_mean_and_deviation_written_out() -> None:
    model = two_layers()
    (hook,) = method_hooks(model)
    delta = rw.get_delta(model, "0")
    mean = spread = torch.zeros_like(delta.P)
    for step in range(1, 4):
        delta.P.grad = torch.randn_like(delta.P)
        if step == 2:
            delta.P.grad[0, 0, 0] = float("nan")
        hook.after_step(Moment(model, None, step, 1000))  # type: ignore[arg-type]
        importance = (delta.P * delta.P.grad).abs().detach().nan_to_num(0.0)
        mean = 0.85 * mean + 0.15 * importance
        spread = 0.85 * spread + 0.15 * (importance - mean).abs()
    close(hook.means["0"][0], mean)  # type: ignore[attr-defined]
    close(hook.spreads["0"][0], spread)  # type: ignore[attr-defined]
    scores = hook.scores()  # type: ignore[attr-defined]
    assert abs(sum(scores.values()) - 1) < 1e-12
    assert scores["2"] == 0


def test_the_more_important_layer_gets_more() -> None:
    model = two_layers()
    (hook,) = method_hooks(model)
    for step in range(1, 9):
        for name, size in (("0", 1.0), ("2", 1e-3)):
            for p in rw.get_delta(model, name).parameters():
                p.grad = size * torch.rand(p.shape)
        hook.after_step(Moment(model, None, step, 8))  # type: ignore[arg-type]
    kept = {k: int((c != 0).sum()) for k, c in rw.delta_weights(model).items()}
    assert kept["0"] > kept["2"]
    assert kept["0"] <= 72


class StopHere(Exception):  # noqa: N818
    pass


class Stopper(Hook):
    def __init__(self, at: int):
        self.at = at

    def after_step(self, moment: Moment) -> None:
        if moment.step == self.at:
            raise StopHere


def test_a_run_resumed_in_mid_schedule_ends_with_the_same_bits(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    rows = [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("good", "bad")]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))

    def go(folder: str, stop: int) -> nn.Module:
        model = rw.adapt(tiny_llama(), "snella", rank=2, rounds=4, sparsity=0.6, targets=["q_proj", "down_proj"])
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
    zeros = sum(int((c == 0).sum()) for c in got.values()) / sum(c.numel() for c in got.values())
    assert abs(zeros - 0.6) < 0.01


@pytest.mark.parametrize("settings", [{}, {"form": "snell", "shrink": "hard"}])
def test_it_learns(settings: dict[str, Any]) -> None:
    seen = losses(tiny_adapted("snella", rank=8, **settings), steps=25)
    assert seen[-1] < 0.9 * seen[0]
