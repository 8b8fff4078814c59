"""AdaLoRA: the budget to the integer, scores by hand, masks that stay, and adapters of real ranks at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import One, adapted, change_of, close, delta_of, linear, negligible, rank_of
from runs import falls, resumes_exactly, tiny_run
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.hooks import Hook, Moment, method_hooks
from rankworks.core.ranks.orthogonal import departure
from rankworks.core.ranks.surgery import compact, gated_of, pair_of
from rankworks.core.site import Shape
from rankworks.core.state import state_of
from rankworks.ranks.adalora import Budget, budget_at
from tiny import tiny_llama, token_batch

PRINTED = {0: 144, 100: 144, 101: 143, 200: 126, 300: 113, 400: 104, 450: 102, 600: 97, 800: 96, 801: 96}


def test_the_budget_follows_its_cubic_to_the_integer() -> None:
    settings = {"start": 144, "end": 96, "warmup": 100, "final": 200, "steps": 1000}
    assert {t: budget_at(t, **settings) for t in PRINTED} == PRINTED
    every = [budget_at(t, **settings) for t in range(1, 1001)]
    assert every == sorted(every, reverse=True)
    exact = [96 + 48 * (1 - (t - 100) / 700) ** 3 for t in range(101, 801)]
    assert all(abs(b - v) < 1 for b, v in zip(every[100:800], exact, strict=True))


def test_an_exact_integer_is_not_lost_to_rounding() -> None:
    """(1 - t/10)^3 of 1000 is a whole number at every t."""
    assert [budget_at(t, 1000, 0, 0, 0, 10) for t in range(11)] == [(10 - t) ** 3 for t in range(11)]


# ---- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"delta": "dora"},
        {"delta": "vera"},
        {"delta": "lora-xs"},
        {"init": "pissa"},
        {"init": "gaussian"},
        {"delta": "dora", "inner": "vera"},
        {"scaling": "rslora"},
    ],
)
def test_the_start_leaves_the_output_to_the_bit_and_the_gates_alive(settings: dict[str, Any]) -> None:
    layer, x = linear(9, 8), torch.randn(4, 9)
    before = layer(x)
    model = adapted(layer, rank=4, ranks="adalora", **settings)
    assert torch.equal(model(x), before)
    (model(x) * torch.randn(4, 8)).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in delta_of(model).parameters())
    gate = gated_of(delta_of(model)).gate
    if "init" not in settings and settings.get("delta", "lora") in ("lora", "dora") and "inner" not in settings:
        assert not gate.any()
        assert gate.grad.all()
    elif settings.get("init") == "gaussian":
        assert not gate.any()
    else:
        assert (gate == 1).all()


def test_the_factors_start_at_002() -> None:
    pair = pair_of(delta_of(adapted(linear(400, 300), rank=8, ranks="adalora")))
    for factor in (pair.A, pair.B):
        assert abs(float(factor.detach().std()) - 0.02) < 0.001
        assert abs(float(factor.detach().mean())) < 0.001


def test_an_initialiser_that_gives_a_factor_keeps_it() -> None:
    layer = linear(9, 8)
    plain, budget = (
        adapted(layer, rank=4, init="gaussian", ranks=r, name=n) for r, n in ((None, "a"), ("adalora", "b"))
    )
    assert torch.equal(delta_of(plain, "a").A, pair_of(delta_of(budget, "b")).A)
    assert pair_of(delta_of(budget, "b")).B.all()


# ---- scores ---------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def two(rank: int = 4, delta: str = "lora", **ranks: Any) -> tuple[nn.Module, Budget]:
    torch.manual_seed(0)
    model = rw.adapt(Two(), delta, rank=rank, targets=["first", "second"], ranks={"ranks": "adalora", **ranks})
    hook = method_hooks(model)[0]
    assert isinstance(hook, Budget)
    return model, hook


class Drive:
    """Steps of SGD on random data, with the hook."""

    def __init__(self, model: nn.Module, hook: Hook, steps: int, lr: float = 0.5):
        self.model, self.hook, self.steps, self.done = model, hook, steps, 0
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
        hook.on_start(self.moment())

    def moment(self) -> Moment:
        return Moment(self.model, self.optimizer, self.done, self.steps)

    def step(self, seed: int | None = None) -> None:
        self.done += 1
        torch.manual_seed(self.done if seed is None else seed)
        x, y = torch.randn(16, 6), torch.randn(16, 5)
        self.optimizer.zero_grad()
        (self.model(x) - y).square().mean().backward()
        self.optimizer.step()
        self.hook.after_step(self.moment())


def gates(model: nn.Module) -> Tensor:
    return torch.cat([gated_of(d).gate.detach() for d in state_of(model).adapter("default").deltas.values()])


@torch.no_grad()
def alive(model: nn.Module) -> None:
    for p in state_of(model).adapter("default").parameters():
        p.add_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize("score", ["uncertainty", "sensitivity", "magnitude"])
def test_scores_match_two_steps_by_hand(score: str) -> None:
    model, hook = two(beta1=0.7, beta2=0.6, warmup=8, final=1, score=score)
    alive(model)
    drive = Drive(model, hook, 10)
    tensors: dict[str, list[Tensor]] = {}
    for _ in range(2):
        drive.step()
        for key, delta in hook.deltas.items():
            pair, gate = pair_of(delta), gated_of(delta).gate
            for name, p in (("A", pair.A), ("B", pair.B), ("gate", gate)):
                assert p.grad is not None
                tensors.setdefault(f"{key}.{name}", []).append((p * p.grad).detach().abs())
    for key, got in zip(hook.deltas, hook.scores(), strict=True):
        total = torch.zeros(4)
        for name in ("A", "B", "gate"):
            one, second = tensors[f"{key}.{name}"]
            mean1 = 0.3 * one
            spread1 = 0.4 * (one - mean1).abs()
            mean2 = 0.7 * mean1 + 0.3 * second
            spread2 = 0.6 * spread1 + 0.4 * (second - mean2).abs()
            s = mean2 * spread2 if score == "uncertainty" else mean2
            total += s if name == "gate" else s.mean(1) if name == "A" else s.mean(0)
        close(got, gated_of(hook.deltas[key]).gate.abs() if score == "magnitude" else total)


def test_a_gradient_of_zero_lets_the_averages_fade() -> None:
    model, hook = two(beta1=0.7, beta2=0.6, warmup=8, final=1)
    alive(model)
    Drive(model, hook, 10).step()
    mean, spread = ({k: t.clone() for k, t in d.items()} for d in (hook.smoothed.mean, hook.smoothed.spread))
    for p in model.parameters():
        p.grad = None
    hook._score()
    for key in mean:
        close(hook.smoothed.mean[key], 0.7 * mean[key])
        close(hook.smoothed.spread[key], 0.6 * spread[key] + 0.4 * 0.7 * mean[key])


def test_what_is_kept_of_the_gradients_is_no_more_than_the_score_needs() -> None:
    numbers = {}
    for score in ("uncertainty", "sensitivity", "magnitude"):
        model, hook = two(warmup=8, final=1, score=score)
        Drive(model, hook, 10).step()
        state = hook.state_dict()
        held = [*state["smoothed"]["mean"].values(), *state["smoothed"]["spread"].values()]
        numbers[score] = sum(t.numel() for t in [*held, *state["sensitivity"].values()])
    trained = 4 * (6 + 7 + 1) + 4 * (7 + 5 + 1)
    assert numbers == {"uncertainty": 2 * trained, "sensitivity": 8, "magnitude": 0}


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["uncertainty", "sensitivity", "magnitude"])
@pytest.mark.parametrize("delta", ["lora", "dora", "vera", "lora-xs"])
def test_after_every_step_exactly_the_budget_is_open_and_at_last_the_pattern_stays(score: str, delta: str) -> None:
    model, hook = two(delta=delta, target=1.5, warmup=2, final=4, score=score)
    alive(model)
    drive = Drive(model, hook, 12, lr=0.05)
    patterns = []
    for t in range(1, 13):
        drive.step()
        assert int(gates(model).count_nonzero()) == budget_at(t, 8, 3, 2, 4, 12)
        patterns.append(gates(model) != 0)
    assert all(torch.equal(p, patterns[7]) for p in patterns[8:])
    assert not hook.smoothed.mean
    assert not hook.sensitivity


def test_between_maskings_closed_gates_may_come_back() -> None:
    model, hook = two(target=1, warmup=0, final=1, interval=3)
    alive(model)
    drive = Drive(model, hook, 10)
    open_at = []
    for _ in range(10):
        drive.step()
        open_at.append(int(gates(model).count_nonzero()))
    wanted = [budget_at(t, 8, 2, 0, 1, 10) if t % 3 == 0 or t >= 9 else 8 for t in range(1, 11)]
    assert open_at == wanted


def test_equal_scores_leave_exactly_the_budget_the_first_of_them() -> None:
    model, hook = two(target=1.5, score="magnitude", warmup=0, final=1)
    drive = Drive(model, hook, 2)
    with torch.no_grad():
        for gated in hook.gated.values():
            gated.gate.fill_(1.0)
    hook._apply(hook._mask(3))
    assert gates(model).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert drive.done == 0


def test_permuting_the_ranks_permutes_the_mask() -> None:
    order, masks = torch.tensor([2, 0, 3, 1]), []
    for permuted in (False, True):
        model, hook = two(target=1.5, warmup=0, final=1)
        alive(model)
        if permuted:
            with torch.no_grad():
                for delta in hook.deltas.values():
                    pair, gated = pair_of(delta), gated_of(delta)
                    pair.A.copy_(pair.A[order])
                    pair.B.copy_(pair.B[:, order])
                    gated.gate.copy_(gated.gate[order])
        drive = Drive(model, hook, 4)
        for _ in range(3):
            drive.step()
        masks.append([gated.gate != 0 for gated in hook.gated.values()])
    for plain, turned in zip(*masks, strict=True):
        assert torch.equal(plain[order], turned)


def test_with_the_budget_it_starts_with_and_no_penalty_it_is_a_lora_with_a_diagonal() -> None:
    ends = []
    for hooked in (True, False):
        model, hook = two(target=4, orthogonal=0, compact=False)
        drive = Drive(model, hook if hooked else Hook(), 8)
        assert hook.penalty(drive.moment()) is None
        for _ in range(8):
            drive.step()
        ends.append([p.detach().clone() for p in state_of(model).adapter("default").parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


# ---- the penalty ----------------------------------------------------------------------------------------------------


def _released(*matrices: Tensor) -> Any:
    return departure(matrices[:2], matrices[2:])


def _paper(*matrices: Tensor) -> Any:
    return departure(matrices[:2], matrices[2:], "paper")


def test_the_penalty_by_hand_and_nothing_at_orthonormal_factors() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(3, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True), torch.randn(2, 4)]
    norms = [torch.linalg.matrix_norm(m @ m.t() - torch.eye(len(m))) for m in matrices]
    released, paper = departure(matrices), departure(matrices[:2], [matrices[2].t()], "paper")
    assert released is not None
    assert paper is not None
    close(released, torch.stack(norms).mean())
    close(paper, torch.stack(norms).square().sum())
    X, M = matrices[0], matrices[0] @ matrices[0].t() - torch.eye(3)
    close(torch.autograd.grad(released, X, retain_graph=True)[0], 2 * M @ X / norms[0] / 3)
    close(torch.autograd.grad(paper, X)[0], 4 * M @ X)
    tall = [torch.randn(7, 3, requires_grad=True), torch.randn(5, 2, requires_grad=True)]
    assert torch.autograd.gradcheck(_released, (*matrices[:2], *tall))
    assert torch.autograd.gradcheck(_paper, (*matrices[:2], *tall))
    for form in ("released", "paper"):
        q = torch.linalg.qr(torch.randn(7, 3)).Q.t().contiguous().requires_grad_()
        eye = torch.eye(3, 7).requires_grad_()  # exactly zero, where a norm has no gradient
        for each, size in ((q, 1e-14), (eye, 0.0)):
            term = departure([each], (), form)  # type: ignore[arg-type]
            assert term is not None
            assert term.detach() <= size
            assert torch.autograd.grad(term, each)[0].isfinite().all()


def test_the_penalty_is_of_the_trained_factors_alone() -> None:
    model, hook = two(orthogonal=0.5)
    moment = Moment(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, 8)
    pairs = [pair_of(d) for d in hook.deltas.values()]
    wanted = departure([p.A for p in pairs], [p.B for p in pairs])
    term = hook.penalty(moment)
    assert term is not None
    assert wanted is not None
    close(term, 0.5 * wanted)
    assert two(delta="vera", orthogonal=0.5)[1].penalty(moment) is None


# ---- at the end -----------------------------------------------------------------------------------------------------


def trained(delta: str = "lora", **ranks: Any) -> tuple[nn.Module, Budget, Drive]:
    model, hook = two(delta=delta, target=1.5, warmup=0, final=2, **ranks)
    alive(model)
    drive = Drive(model, hook, 6, lr=0.05)
    for _ in range(6):
        drive.step()
    return model, hook, drive


def test_a_change_has_no_more_ranks_than_its_gates() -> None:
    model, hook, _ = trained()
    for key, delta in hook.deltas.items():
        assert rank_of(change_of(model, site=key)) <= int(gated_of(delta).gate.count_nonzero())


@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_the_end_of_a_run_cuts_what_is_closed_and_changes_nothing(delta: str, tmp_path: Path) -> None:
    model, hook, drive = trained(delta)
    x, open_now = torch.randn(3, 6), {k: int(gated_of(d).gate.count_nonzero()) for k, d in hook.deltas.items()}
    y, scales = model(x).detach(), [pair_of(d).scale for d in hook.deltas.values()]
    hook.on_end(drive.moment())
    close(model(x), y, 1e-14)
    assert {k: pair_of(d).rank for k, d in hook.deltas.items()} == open_now
    close(torch.tensor([pair_of(d).scale for d in hook.deltas.values()]), torch.tensor(scales), 1e-15)
    assert sum(open_now.values()) == 3
    again = rw.load(_fresh(), rw.save(model, tmp_path / "a"))
    assert torch.equal(again(x), model(x))


def _fresh() -> nn.Module:
    torch.manual_seed(0)
    return Two()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("delta", ["lora", "vera"])
def test_the_exported_lora_is_the_masked_model(cut: bool, delta: str, tmp_path: Path) -> None:
    model, hook, _ = trained(delta)
    x = torch.randn(3, 6)
    y = model(x).detach()
    if cut:
        compact(model)
    report = rw.export(model, tmp_path / "lora", kind="lora")
    assert report.exact
    assert {s.site: s.rank for s in report.sites} == {
        k: n for k, d in hook.deltas.items() if (n := int(gated_of(d).gate.count_nonzero()))
    }
    close(rw.load(_fresh(), tmp_path / "lora")(x), y, 1e-12)


def test_the_numbers_trained_are_r_in_out_and_one() -> None:
    """Printed: 1,537 numbers for a rank of DeBERTa's attention, 3,841 of its feed-forward, and r a site beside LoRA."""
    for inputs, outputs, printed in ((768, 768, 1537), (768, 3072, 3841)):
        spec = rw.AdaptSpec(delta="lora", ranks="adalora").delta.replace(rank=1)
        assert spec.method.cls.count(spec, Shape(outputs, inputs)) == printed
    plan = rw.plan(
        "llama-7b", "lora", rank=4, ranks="adalora", targets="q_proj,k_proj,v_proj,up_proj,down_proj", optimizer="sgd"
    )
    lora = 4 * 32 * (3 * (4096 + 4096) + 2 * (4096 + 11008))
    assert plan.trainable_parameters - lora == 640 == 4 * plan.sites


def test_the_count_of_a_budget_lies_between_its_cheapest_and_its_dearest_ranks() -> None:
    model, hook, _ = trained()
    cost = {key: 1 + sum(state_of(model).adapter("default").sites[key].shape[:2]) for key in hook.deltas}
    kept = compact(model)
    assert rw.trainable_parameters(model) == sum(kept[key] * cost[key] for key in cost)
    assert 3 * min(cost.values()) <= rw.trainable_parameters(model) <= 3 * max(cost.values())


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _single() -> Any:
    torch.set_default_dtype(torch.float32)


def run(folder: Path | None = None, **settings: Any) -> Any:
    return tiny_run(folder, rank=6, **{"ranks": {"ranks": "adalora", "target": 2, "final": 4}, **settings})


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize("score", ["uncertainty", "sensitivity"])
def test_a_run_cut_off_in_mid_schedule_goes_on_bit_for_bit(score: str, tmp_path: Path) -> None:
    ranks = {"ranks": "adalora", "target": 2, "final": 4, "score": score}
    model = resumes_exactly(tmp_path, lambda f, **k: run(f, ranks=ranks, **k), (5, 11))
    assert sum(pair_of(d).rank for d in state_of(model).adapter("default").deltas.values()) == 12


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize("settings", [{}, {"delta": "dora"}, {"delta": "vera"}, {"init": "pissa"}])
def test_it_learns(settings: dict[str, Any]) -> None:
    loop = run(steps=24, **settings)
    assert falls(loop.run().losses)


@pytest.mark.usefixtures("_single")
def test_it_acts_in_another_trainer() -> None:
    from transformers import TrainerState

    from rankworks.train.hooks import HookCallback

    model = rw.adapt(tiny_llama(), rank=4, ranks={"ranks": "adalora", "target": 1, "final": 1, "warmup": 0})
    callback, state = HookCallback(), TrainerState(max_steps=3, num_train_epochs=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    words = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(None, state, None, **words)
    ids = token_batch()
    for step in range(3):
        state.global_step = step
        optimizer.zero_grad()
        callback.on_step_begin(None, state, None, **words)
        model(input_ids=ids, labels=ids).loss.backward()
        callback.on_pre_optimizer_step(None, state, None, **words)
        optimizer.step()
        callback.on_optimizer_step(None, state, None, **words)
    callback.on_train_end(None, state, None, **words)
    deltas = state_of(model).adapter("default").deltas
    assert sum(pair_of(d).rank for d in deltas.values()) == len(deltas)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_budget_that_would_grow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prunes from 4 ranks at 1 sites.*would be 9.*increlora"):
        adapted(linear(), rank=4, ranks={"ranks": "adalora", "target": 9})


def test_phases_that_do_not_fit_are_refused() -> None:
    _, hook = two(warmup=6, final=5)
    with pytest.raises(ConfigError, match=r"6 steps of warmup and a fixed mask from step 5 on.*shorten"):
        Drive(hook.deltas["first"], hook, 10)
    _, hook = two(warmup=2.5)
    with pytest.raises(ConfigError, match=r"ranks.warmup is 2.5.*whole number"):
        Drive(hook.deltas["first"], hook, 10)


@pytest.mark.parametrize("delta", ["shira", "bone", "randlora"])
def test_a_change_without_factors_is_refused(delta: str) -> None:
    with pytest.raises(TargetError, match=f"{delta}.*choose lora"):
        rw.adapt(One(linear(8, 8)), delta, targets="layer", ranks="adalora")


def test_a_budget_of_one_leaves_one_rank_of_the_whole_model() -> None:
    model, hook = two(target=0.1, warmup=0, final=1, score="magnitude")
    alive(model)
    hook._apply(hook._mask(hook.end))
    assert hook.end == 1
    parts = [change_of(model, site=key) for key in hook.deltas]
    kept = [rank_of(p) for p in parts]
    assert sorted(kept) == [0, 1]
    negligible(parts[kept.index(0)])
