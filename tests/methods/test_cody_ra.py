"""CoDyRA: a threshold that rises after a dense phase, and tasks that add up exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import adapted, change_of, close, delta_of, linear
from runs import falls, resumes_exactly, tiny_run
from torch import Tensor

import rankworks as rw
from rankworks.core.errors import ConfigError, MergeError, TargetError
from rankworks.core.hooks import Moment, method_hooks
from rankworks.core.ranks.surgery import gated_of, pair_of
from rankworks.core.state import state_of
from rankworks.linalg.threshold import released_threshold, soft_threshold
from rankworks.ranks.cody_ra import CoDyRA, Sparsify, history, next_task
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.loop import Loop
from train.training import make_examples


def schedule(**settings: Any) -> CoDyRA:
    return CoDyRA(rw.AdaptSpec(ranks={"ranks": "cody-ra", **settings}).ranks)


def test_kappa_takes_fifty_values_from_zero_to_its_largest_after_the_dense_phase() -> None:
    kappas = [schedule().kappa(t, 1000) for t in range(1, 1001)]
    assert not any(kappas[:500])
    sparse = torch.tensor(kappas[500:])
    close(sparse, torch.linspace(0, 0.005, 50).repeat_interleave(10))


def test_steps_left_over_have_the_largest_kappa_and_short_phases_pass_through_all() -> None:
    long = [schedule().kappa(t, 2 * 119) for t in range(120, 239)]
    close(torch.tensor(long[:100]), torch.linspace(0, 0.005, 50).repeat_interleave(2))
    assert set(long[100:]) == {0.005}
    short = [schedule(dense=0.0).kappa(t, 10) for t in range(1, 11)]
    assert (short[0], short[-1]) == (0.0, 0.005)
    assert short == sorted(short)
    assert schedule(dense=0.0).kappa(1, 1) == 0.0


# ---- one task -------------------------------------------------------------------------------------------------------


def one(delta: str = "lora", rank: int = 5, init: str = "default", **ranks: Any) -> tuple[Any, Sparsify]:
    torch.manual_seed(7)
    settings = {"ranks": "cody-ra", "max_kappa": 0.15, "levels": 5, **ranks}
    model = adapted(linear(9, 8), delta, rank=rank, ranks=settings, init=init)
    return model, hook_of(model)


def hook_of(model: Any) -> Sparsify:
    (hook,) = method_hooks(model)
    assert isinstance(hook, Sparsify)
    return hook


def task(model: Any, steps: int = 20, seed: int = 0, ended: bool = True) -> list[Tensor]:
    """Train one regression; the gates after every step."""
    hook = hook_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, betas=(0.9, 0.9999))
    hook.on_start(Moment(model, optimizer, 0, steps))
    torch.manual_seed(seed)
    x, y = torch.randn(20, 9), torch.randn(20, 8)
    gates = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        hook.after_step(Moment(model, optimizer, step, steps))
        gates.append(gated_of(delta_of(model)).gate.detach().clone())
    if ended:
        hook.on_end(Moment(model, optimizer, steps, steps))
    return gates


@pytest.mark.parametrize("settings", [{}, {"delta": "dora"}, {"init": "gaussian"}])
def test_the_start_leaves_the_output_and_the_multiplier_is_one(settings: dict[str, Any]) -> None:
    model, _ = one(**settings)
    x = torch.randn(4, 9)
    with rw.disabled(model):
        base = model(x)
    assert torch.equal(model(x), base)
    assert pair_of(delta_of(model)).scale == 1.0
    assert gated_of(delta_of(model)).gate.all()


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_multiplier_is_one_at_any_alpha(scaling: str) -> None:
    model = adapted(linear(9, 8), rank=3, alpha=64, scaling=scaling, ranks="cody-ra")
    assert abs(pair_of(delta_of(model)).scale - 1) < 1e-15


def test_the_dense_phase_leaves_no_zero_and_the_sparse_one_does() -> None:
    model, _ = one()
    gates = task(model)
    assert all(g.all() for g in gates[:10])
    assert 0 < int(gates[-1].count_nonzero()) < 5
    assert pair_of(delta_of(model)).rank == int(gates[-1].count_nonzero())


@pytest.mark.parametrize("threshold", ["soft", "released"])
def test_a_step_in_the_sparse_phase_is_the_optimizers_and_then_the_threshold(threshold: str) -> None:
    ends = []
    for kappa in (0.15, 0.0):
        model, _ = one(dense=0.0, levels=2, max_kappa=kappa, threshold=threshold)
        ends.append(task(model, steps=2, ended=False)[-1])  # kappa is 0 after the first step, then its largest
    operator = soft_threshold if threshold == "soft" else released_threshold
    assert torch.equal(ends[0], operator(ends[1], 0.15))


# ---- task after task ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", ["lora", "dora"])
@pytest.mark.parametrize("compact", [True, False])
def test_every_task_begins_where_the_last_ended(delta: str, compact: bool) -> None:
    model, _ = one(delta, compact=compact)
    x, total = torch.randn(6, 9), 0
    for number in range(3):
        gates = task(model, seed=number)
        y = model(x).detach()
        kept = next_task(model)
        assert kept == {"layer": int(gates[-1].count_nonzero())}
        total += kept["layer"]
        close(model(x), y, 1e-14)
        pair, gate = pair_of(delta_of(model)), gated_of(delta_of(model)).gate
        assert (pair.rank, pair.scale, len(gate)) == (5, 1.0, 5)
        assert not pair.B.any()
        assert gate.all()
        found = history(delta_of(model))
        assert found is not None
        assert found.A.shape == (total, 9)
        inner = delta_of(model) if delta == "lora" else delta_of(model).inner
        close(found.B @ found.A, inner.dense(model.layer.weight))
    assert total > 5


def test_the_history_is_the_sum_of_what_the_tasks_changed() -> None:
    model, _ = one()
    before, changes = torch.zeros(8, 9), []
    for number in range(3):
        task(model, seed=number)
        now = change_of(model)
        changes.append(now - before)
        before = now
        next_task(model)
    found = history(delta_of(model))
    assert found is not None
    close(found.B @ found.A, torch.stack(changes).sum(0), 1e-12)
    close(change_of(model), before, 1e-13)


def test_the_history_is_frozen_and_kept_in_the_file(tmp_path: Path) -> None:
    model, _ = one()
    task(model)
    next_task(model)
    behind = history(delta_of(model))
    assert behind is not None
    task(model, seed=1)
    after = history(delta_of(model))
    assert after is not None
    assert torch.equal(behind.B, after.B)
    assert torch.equal(behind.A, after.A)
    again = rw.load(fresh(model), rw.save(model, tmp_path / "a"))
    x = torch.randn(4, 9)
    assert torch.equal(again(x), model(x))
    assert next_task(again) == next_task(model)
    assert torch.equal(again(x), model(x))
    assert torch.equal(pair_of(delta_of(again)).A, pair_of(delta_of(model)).A)


def fresh(model: Any) -> Any:
    """A model of the same base, without adapters."""
    layer = torch.nn.Linear(9, 8)
    layer.load_state_dict({"weight": model.layer.weight, "bias": model.layer.bias})
    return type(model)(layer)


def test_it_merges_detaches_and_exports_exactly(tmp_path: Path) -> None:
    model, _ = one()
    base, x = {k: p.clone() for k, p in fresh(model).state_dict().items()}, torch.randn(4, 9)
    kept = 0
    for number in range(2):
        task(model, seed=number)
        kept += next_task(model)["layer"]
    y = model(x).detach()
    assert rw.export(model, tmp_path / "lora", kind="lora").exact
    close(rw.load(fresh(model), tmp_path / "lora")(x), y, 1e-13)
    task(model, seed=2)
    y = model(x).detach()
    report = rw.export(model, tmp_path / "all", kind="lora")
    assert report.sites[0].rank == min(8, kept + pair_of(delta_of(model)).rank)  # no change needs more than 8
    close(rw.load(fresh(model), tmp_path / "all")(x), y, 1e-12)
    rw.merge(model)
    close(model(x), y, 1e-13)
    with pytest.raises(MergeError, match="begin the next task of"):
        next_task(model)
    rw.detach(model)
    assert all(torch.equal(p, base[k]) for k, p in model.state_dict().items())


def test_gates_that_are_all_closed_leave_the_weight_and_no_history() -> None:
    model, _ = one()
    with torch.no_grad():
        gated_of(delta_of(model)).gate.zero_()
        pair_of(delta_of(model)).B.normal_()
    assert not change_of(model).any()
    assert next_task(model) == {"layer": 0}
    assert history(delta_of(model)) is None
    assert not change_of(model).any()


def test_new_ranks_are_others_than_the_last_tasks_and_have_no_moments() -> None:
    model, _ = one()
    first = pair_of(delta_of(model)).A.detach().clone()
    task(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(torch.randn(3, 9)).sum().backward()
    optimizer.step()
    next_task(model, optimizer=optimizer)
    assert not torch.equal(pair_of(delta_of(model)).A, first)
    assert not optimizer.state
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in delta_of(model).parameters()}


def test_during_a_task_r_in_out_and_one_are_trained_and_nothing_at_inference() -> None:
    model, _ = one(rank=5)
    assert rw.trainable_parameters(model) == 5 * (9 + 8 + 1)
    before = sum(p.numel() for p in fresh(model).parameters())
    task(model)
    next_task(model)
    assert rw.trainable_parameters(model) == 5 * (9 + 8 + 1)
    rw.merge(model)
    assert sum(p.numel() for n, p in model.named_parameters() if "adapters" not in n) == before


def test_ranks_by_pattern_come_back_for_every_task() -> None:
    model: Any = tiny_run(rank=4, ranks="cody-ra", overrides={"v_proj": {"rank": 2}}).model
    next_task(model)
    ranks = {k: pair_of(d).rank for k, d in state_of(model).adapter("default").deltas.items()}
    assert set(ranks.values()) == {2, 4}
    assert all((rank == 2) == k.endswith("v_proj") for k, rank in ranks.items())


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_an_adapter_without_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not go from task to task: adapt with ranks='cody-ra'"):
        next_task(adapted(linear()))


@pytest.mark.parametrize("delta", ["vera", "lora-xs"])
def test_a_change_without_a_trained_pair_is_refused(delta: str) -> None:
    with pytest.raises(TargetError, match=f"{delta}.*use lora"):
        adapted(linear(9, 8), delta, rank=4, ranks="cody-ra")


def test_a_start_taken_out_of_the_base_is_refused() -> None:
    with pytest.raises(TargetError, match="choose init default"):
        adapted(linear(9, 8), rank=4, init="pissa", ranks="cody-ra")


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _single() -> Any:
    torch.set_default_dtype(torch.float32)


RANKS = {"ranks": "cody-ra", "max_kappa": 0.1, "levels": 4}


@pytest.mark.usefixtures("_single")
def test_a_run_cut_off_in_mid_schedule_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model = resumes_exactly(tmp_path, lambda f, **k: tiny_run(f, rank=5, ranks=RANKS, **k), (5, 11))
    assert any(pair_of(d).rank < 5 for d in state_of(model).adapter("default").deltas.values())


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_it_learns_one_task_after_the_other(delta: str) -> None:
    loop = tiny_run(steps=18, delta=delta, rank=5, ranks=RANKS)
    assert falls(loop.run().losses)
    next_task(loop.model)
    train, optim = TrainConfig(steps=18, batch_size=8), OptimConfig(lr=1e-2)
    assert falls(Loop(loop.model, make_examples(seed=4), train, optim, progress=False).run().losses)
