"""LaMDA: W' = W + s (B S - U_r S_r) A with A frozen, S trained, and B freezing column by column during a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import (
    KINDS,
    adapted,
    backward,
    best_of_rank,
    change_of,
    close,
    delta_of,
    kept_for_backward,
    layer_and_input,
    linear,
    rank_of,
    shake,
    singular,
    weight_of,
    with_change,
)
from learning import losses, tiny_adapted
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import rankworks as rw
from rankworks.core.errors import ExportError, TargetError
from rankworks.core.hooks import Hook, Moment
from rankworks.core.store import adapter_state
from rankworks.export import export
from rankworks.train.batching.batches import Example
from rankworks.train.checkpoint import trained_tensors
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.hooks import HookCallback
from rankworks.train.loop import Loop
from tiny import tiny_llama

STARTS = ["residual", "zero-core", "code"]
SITE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_leaves_the_output_bit_identical(kind: str, start: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    assert torch.equal(adapted(layer, "lamda", rank=3, start=start)(x), plain)


@pytest.mark.parametrize("start", ["residual", "zero-core"])
def test_the_projections_are_orthonormal_singular_vectors_at_the_start(start: str) -> None:
    model = adapted(linear(9, 8), "lamda", rank=3, start=start)
    delta = delta_of(model)
    close(delta.A @ delta.A.t(), torch.eye(3))
    close(delta.B.t() @ delta.B, torch.eye(3))
    close(delta.B * singular(weight_of(model))[:3] @ delta.A, best_of_rank(weight_of(model), 3))


def test_the_core_starts_at_the_singular_values_or_at_zero_or_random() -> None:
    layer = linear(9, 8)
    S = {start: delta_of(adapted(copy.deepcopy(layer), "lamda", rank=3, start=start)).S for start in STARTS}
    close(S["residual"], torch.diag(singular(layer.weight.detach())[:3]))
    assert torch.equal(S["zero-core"], torch.zeros(3, 3))
    assert (S["code"] != 0).all()
    assert S["code"].abs().max() <= 3**-0.5


def test_the_released_start_has_loras_factors() -> None:
    delta = delta_of(adapted(linear(9, 8), "lamda", rank=3, start="code"))
    assert torch.equal(delta.B, torch.zeros(8, 3))
    assert (delta.A != 0).all()
    assert delta.A.abs().max() <= 1 / 3
    assert delta.scale == 16 / 3
    other = delta_of(adapted(linear(9, 8), "lamda", rank=3, start="code", alpha=6))
    assert other.scale == 2


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_w_main_and_b_s_a(kind: str, start: str, alpha: float | None) -> None:
    layer, x = layer_and_input(kind)
    plain = copy.deepcopy(layer)
    model = adapted(layer, "lamda", rank=3, start=start, alpha=alpha)
    delta = shake(model)
    s = alpha / 3 if alpha else 16 / 3 if start == "code" else 1
    taken = s * best_of_rank(weight_of(model), 3) if start == "residual" else 0
    change = s * delta.B @ delta.S @ delta.A - taken
    close(change_of(model), change)
    close(model(x), with_change(plain, change)(x))


@pytest.mark.parametrize("start", STARTS)
def test_the_gradients_of_both_matrices(start: str) -> None:
    model = adapted(linear(9, 8), "lamda", rank=3, start=start, alpha=6)
    delta = delta_of(model)
    for moved in (False, True):
        if moved:
            shake(model)
        _, G = backward(model, torch.randn(4, 9))
        H = 2 * G @ delta.A.t()
        close(delta.S.grad, delta.B.t() @ H)
        close(delta.B.grad, H @ delta.S.t())
        if not moved:  # which of them has one at the first step
            assert (delta.B.grad != 0).any() == (start != "zero-core")
            assert (delta.S.grad != 0).any() == (start != "code")


def test_with_s_from_zero_it_is_lora_xs_up_to_where_the_singular_values_sit() -> None:
    """With B = U_r still frozen, the core S is R S_r, and its gradient is R's by S_r^-1."""
    layer, x = linear(9, 8), torch.randn(4, 9)
    mine = adapted(copy.deepcopy(layer), "lamda", rank=3, start="zero-core", freeze=0.0)
    theirs = adapted(layer, "lora-xs", rank=3, alpha=3)
    R, sigma = delta_of(theirs).R, singular(weight_of(theirs))[:3]
    with torch.no_grad():
        R.normal_()
        delta_of(mine).S.copy_(R * sigma)
    close(change_of(mine), change_of(theirs))
    torch.manual_seed(1)
    backward(mine, x)
    torch.manual_seed(1)
    backward(theirs, x)
    close(delta_of(mine).S.grad * sigma, R.grad)


def test_its_rank_is_at_most_r() -> None:
    model = adapted(linear(9, 8), "lamda", rank=3)
    shake(model)
    assert rank_of(change_of(model)) == 3


def test_neither_the_input_nor_a_product_of_the_outputs_size_is_kept_for_backward() -> None:
    x = torch.randn(11, 9, requires_grad=True)
    kept = kept_for_backward(adapted(linear(9, 8), "lamda", rank=3), x)
    assert (11, 9) not in kept
    assert (11, 8) not in kept
    assert (11, 3) in kept


# ---- the schedule ----


@pytest.mark.parametrize(("steps", "freeze", "rank"), [(10, 0.3, 4), (100, 0.3, 7), (50, 1.0, 3), (3, 0.1, 2)])
def test_after_t_steps_the_first_floor_of_r_t_over_eta_t_columns_are_held(steps: int, freeze: float, rank: int) -> None:
    delta = delta_of(adapted(linear(9, 8), "lamda", rank=rank, freeze=freeze))
    counts = [delta.frozen_columns(t, steps).stop for t in range(steps + 1)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    share = round(freeze * 100)  # in whole numbers: rank t / (share steps / 100)
    assert counts == [min(rank, 100 * rank * t // (share * steps)) for t in range(steps + 1)]


def test_the_smallest_may_freeze_first() -> None:
    delta = delta_of(adapted(linear(9, 8), "lamda", rank=4, freeze_order="smallest_first"))
    assert [delta.frozen_columns(t, 10) for t in (0, 1, 2, 3)] == [slice(4, 4), slice(3, 4), slice(2, 4), slice(0, 4)]


# ---- in a run ----


class Watch(Hook):
    """Copies one site's tensors before the first step and after every step; may stop the run."""

    def __init__(self, model: nn.Module, stop: int = 0):
        self.delta, self.stop = rw.get_delta(model, SITE), stop
        self.B: list[Tensor] = []
        self.S: list[Tensor] = []
        self.moments: list[dict[str, Tensor]] = []
        self.flags: list[bool] = []
        self.norms: list[Tensor] = []

    def on_start(self, moment: Moment) -> None:
        self._note(moment)

    def after_backward(self, moment: Moment) -> None:
        self.flags.append(self.delta.B.requires_grad)
        grad = self.delta.B.grad
        self.norms.append(torch.zeros(4) if grad is None else grad.norm(dim=0))

    def after_step(self, moment: Moment) -> None:
        self._note(moment)
        if moment.step == self.stop:
            raise KeyboardInterrupt

    def _note(self, moment: Moment) -> None:
        self.B.append(self.delta.B.detach().clone())
        self.S.append(self.delta.S.detach().clone())
        state = moment.optimizer.state.get(self.delta.B, {})
        self.moments.append({k: v.clone() for k, v in state.items() if v.shape == self.delta.B.shape})


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(torch.randint(3, 250, (12,), generator=generator).tolist()) for _ in range(24)]
    return [Example(ids, ids) for ids in drawn]


def make_loop(folder: Path | None = None, stop: int = 0, optim: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A loop of ten steps (B frozen over the first five) with weight decay, and its watch."""
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float32)
        model = rw.adapt(tiny_llama(), "lamda", rank=4, **{"freeze": 0.5, **settings})
        watch = Watch(model, stop)
        train = TrainConfig(steps=10, batch_size=4, accumulate=2, save_every=1)
        given = OptimConfig(**{"lr": 1e-2, "options": {"weight_decay": 0.1}, **(optim or {})})
        return Loop(model, examples(), train, given, hooks=[watch], folder=folder, progress=False), watch


OPTIMIZERS = {
    "adamw": {"name": "adamw", "options": {"weight_decay": 0.1}},
    "adam": {"name": "adam", "options": {"weight_decay": 0.1}},
    "sgd": {"name": "sgd", "options": {"weight_decay": 0.1, "momentum": 0.9}},
}


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("order", ["largest_first", "smallest_first"])
def test_held_columns_are_bit_identical_from_their_step_on_and_the_others_move(
    order: str, optim: dict[str, Any]
) -> None:
    loop, watch = make_loop(optim=optim, freeze_order=order)
    loop.run()
    for t in range(10):  # t steps are done; the step that follows
        held = watch.delta.frozen_columns(t, 10)
        free = [j for j in range(4) if not held.start <= j < held.stop]
        before, after = watch.B[t], watch.B[t + 1]
        assert torch.equal(before[:, held], after[:, held])
        assert all((before[:, j] != after[:, j]).any() for j in free)
        assert (watch.norms[t][held] == 0).all(), "no part in clipping"
        assert all((m[:, held] == 0).all() for m in watch.moments[t + 1].values())
    assert torch.equal(watch.B[-1], watch.B[5])


def test_after_eta_t_steps_only_the_core_is_trained() -> None:
    loop, watch = make_loop()
    loop.run()
    assert watch.flags == [True] * 5 + [False] * 5
    assert all(watch.moments[1:6])
    assert not any(watch.moments[6:]), "the optimizer keeps nothing of a frozen B"
    assert all((a != b).all() for a, b in zip(watch.S[:-1], watch.S[1:], strict=True))
    assert watch.delta.B.requires_grad, "the freezing ends with the run"


def test_without_a_share_the_output_projection_is_never_trained() -> None:
    loop, watch = make_loop(freeze=0.0)
    A = watch.delta.A.clone()
    loop.run()
    assert all(torch.equal(B, watch.B[0]) for B in watch.B)
    assert not any(watch.moments)
    assert torch.equal(watch.delta.A, A)
    assert (watch.S[-1] != watch.S[0]).all()


def test_the_input_projection_never_changes() -> None:
    loop, watch = make_loop()
    A = watch.delta.A.clone()
    loop.run()
    assert torch.equal(watch.delta.A, A)


@pytest.mark.parametrize("stopped", [3, 8])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stopped: int) -> None:
    """In the middle of the schedule, and after it."""
    whole, _ = make_loop(tmp_path / "whole")
    history = whole.run()
    with pytest.raises(KeyboardInterrupt):
        make_loop(tmp_path / "cut", stopped)[0].run()
    second, _ = make_loop(tmp_path / "cut")
    assert second.restore()
    assert second.step == stopped - 1
    assert second.run().losses == history.losses
    resumed = trained_tensors(second.model)
    for name, tensor in trained_tensors(whole.model).items():
        assert torch.equal(resumed[name], tensor), name


def test_a_new_run_trains_b_again_also_after_one_that_was_cut_short() -> None:
    for stop in (3, 8):
        loop, watch = make_loop(stop=stop)
        with pytest.raises(KeyboardInterrupt):
            loop.run()
        train = TrainConfig(steps=4, batch_size=4)
        again = Loop(loop.model, examples(), train, OptimConfig(lr=1e-2), progress=False)
        assert watch.delta.B.requires_grad
        before = watch.delta.B.detach().clone()
        again.run()
        assert (before != watch.delta.B).any(dim=0).all(), "every column"


def test_the_hf_trainer_freezes_at_the_same_steps(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    model = rw.adapt(tiny_llama(), "lamda", rank=4, freeze=0.5)
    watch = Watch(model)
    settings = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        learning_rate=1e-2, weight_decay=0.1, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in examples()]
    Trainer(model, settings, train_dataset=data, callbacks=[HookCallback([watch])]).train()
    for t in range(10):
        held = watch.delta.frozen_columns(t, 10)
        assert torch.equal(watch.B[t][:, held], watch.B[t + 1][:, held])
    assert (watch.B[4][:, 3] != watch.B[5][:, 3]).any()
    assert watch.flags == [True] * 5 + [False] * 5


# ---- counts, files, refusals ----


def test_it_trains_r_squared_and_out_r_numbers() -> None:
    model = adapted(linear(9, 8), "lamda", rank=3)
    assert rw.trainable_parameters(model) == 3 * 3 + 8 * 3
    assert set(adapter_state(model)) == {"layer.B", "layer.S"}
    told = rw.plan("llama-2-7b", "lamda", rank=32, targets="all-linear")
    outputs = 4 * 4096 + 2 * 11008 + 4096
    assert told.trainable_parameters == 32 * (7 * 32**2 + 32 * outputs)


def test_a_rank_above_the_number_of_singular_vectors_is_refused_where_they_are_used() -> None:
    with pytest.raises(TargetError, match="start='code'"):
        adapted(linear(7, 5), "lamda", rank=6)
    adapted(linear(7, 5), "lamda", rank=6, start="code")


@pytest.mark.parametrize("start", STARTS)
def test_the_export_is_a_plain_lora_of_rank_r(tmp_path: Path, start: str) -> None:
    model = adapted(linear(9, 8), "lamda", rank=3, start=start)
    shake(model)
    close(delta_of(model).factors().A, delta_of(model).A)
    report = export(model, tmp_path / "lora", "lora")
    assert [site.rank for site in report.sites] == [3]
    assert report.error == 0
    with pytest.raises(ExportError):
        export(model, tmp_path / "peft", "peft")


@pytest.mark.parametrize("start", STARTS)
def test_it_learns(start: str) -> None:
    seen = losses(tiny_adapted("lamda", rank=8, start=start, dropout=0.0))
    assert seen[-1] < seen[0] - 0.1
