"""AltLoRA: one factor a step, along projections of the gradient, with a momentum that follows the factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_hf import check_learned_and_resumed, trained
from pairing import OnePair, draw, matrices
from torch import Tensor
from training import adapted, make_loop, weights

import rankworks as rw
from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.hooks import Hook
from rankworks.core.optim.pairs import trained_pairs
from rankworks.core.ranks.surgery import keep_ranks
from rankworks.optim.altlora import Alternating
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_llama, token_batch

EXACT = {"atol": 1e-12, "rtol": 0}
DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "betas": (0.0, 0.9),
    "eps": 1e-8,
    "damping": 0.0,
    "every": 1,
    "correct_bias": False,
    "plus": False,
}


def optimizer_of(pair: OnePair, lr: float = 0.1, **settings: Any) -> Alternating:
    return Alternating([pair.group()], lr=lr, **{**DEFAULTS, **settings})


def take(pair: OnePair, optimizer: Alternating, G: Tensor) -> None:
    pair.feel(G)
    optimizer.step()


@pytest.mark.parametrize("first", ["A", "B"])
def test_a_step_moves_the_weight_along_the_projected_gradient(first: str) -> None:
    """s B dA = P_B G and s dB A = G P_A, and one factor alone changes."""
    pair, G = OnePair(), draw(7, 9, seed=5)
    optimizer = optimizer_of(pair, lr=0.1)
    if first == "A":
        optimizer.param_groups[0]["taken"] = 1
    P_B, P_A = pair.projectors()
    before, factors = pair.change, {"A": pair.A.detach().clone(), "B": pair.B.detach().clone()}
    take(pair, optimizer, G)
    wanted = P_B @ G if first == "A" else G @ P_A
    torch.testing.assert_close(pair.change - before, -0.1 * wanted, **EXACT)
    changed = {name for name, was in factors.items() if not torch.equal(getattr(pair, name), was)}
    assert changed == {first}


@pytest.mark.parametrize(("plus", "same"), [(False, True), (True, False)])
def test_the_path_of_the_product_does_not_depend_on_its_basis(plus: bool, same: bool) -> None:
    """From (B0, A0) and from (B0 R, R^-1 A0), with momentum; a second moment by element breaks it."""
    R = torch.eye(3, dtype=torch.float64) + 0.4 * draw(3, 3, seed=8)
    one, other = OnePair(), OnePair()
    with torch.no_grad():
        other.A.copy_(torch.linalg.inv(R) @ other.A)
        other.B.copy_(other.B @ R)
    target = draw(7, 9, seed=9)
    settings = {"betas": (0.9, 0.99), "plus": plus}
    optimizers = [optimizer_of(one, 0.05, **settings), optimizer_of(other, 0.05, **settings)]
    apart = 0.0
    for _ in range(12):
        for pair, optimizer in zip((one, other), optimizers, strict=True):
            take(pair, optimizer, pair.change - target)
        apart = max(apart, float((one.change - other.change).abs().max()))
    assert (apart < 1e-12) == same
    assert apart < 1e-12 or apart > 1e-3


def test_without_momentum_at_a_rate_of_one_it_is_alternating_least_squares() -> None:
    """0.5 ||W0 + s B A - T||^2: after A's step no residual is left in B's span, after B's none in A's."""
    pair, W0, target = OnePair(), draw(7, 9, seed=3), draw(7, 9, seed=4)
    optimizer = optimizer_of(pair, lr=1.0)
    for factor in "BABA":
        take(pair, optimizer, W0 + pair.change - target)
        residual = W0 + pair.change - target
        left = pair.B.detach().t() @ residual if factor == "A" else residual @ pair.A.detach().t()
        assert left.abs().max() < 1e-12


def test_with_a_square_factor_its_step_is_full_gradient_descent() -> None:
    pair, G = OnePair(m=4, n=9, r=4), draw(4, 9, seed=5)
    optimizer = optimizer_of(pair, lr=0.1)
    optimizer.param_groups[0]["taken"] = 1
    before = pair.change
    take(pair, optimizer, G)
    torch.testing.assert_close(pair.change - before, -0.1 * G, atol=1e-11, rtol=0)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_the_momentum_is_left_alone_where_the_other_factor_did_not_change(damping: float) -> None:
    pair = OnePair()
    optimizer = optimizer_of(pair, betas=(1.0, 0.9), every=5, damping=damping)  # b1 = 1: nothing else acts on it
    take(pair, optimizer, draw(7, 9, seed=5))
    optimizer.state[pair.B]["exp_avg"].copy_(draw(7, 3, seed=6))
    take(pair, optimizer, draw(7, 9, seed=7))
    assert torch.equal(optimizer.state[pair.B]["exp_avg"], draw(7, 3, seed=6))


def test_the_momentum_is_carried_over_by_projection() -> None:
    """MB A_old A^T (A A^T)^-1, and (B^T B)^-1 B^T B_old MA, by the formulas as printed."""
    pair, b1 = OnePair(), 0.9
    optimizer = optimizer_of(pair, betas=(b1, 0.9))
    A, B = pair.A.detach().clone(), pair.B.detach().clone()
    MA, MB, A_old, B_old = torch.zeros_like(A), torch.zeros_like(B), A, B
    for t in range(6):
        G = draw(7, 9, seed=20 + t)
        if t % 2 == 0:
            inverse = torch.linalg.inv(A @ A.t())
            MB = b1 * MB @ A_old @ A.t() @ inverse + (1 - b1) * G @ A.t() @ inverse / pair.s
            B, A_old = B - 0.1 * MB, A
        else:
            inverse = torch.linalg.inv(B.t() @ B)
            MA = b1 * inverse @ B.t() @ B_old @ MA + (1 - b1) * inverse @ B.t() @ G / pair.s
            A, B_old = A - 0.1 * MA, B
        take(pair, optimizer, G)
    torch.testing.assert_close(pair.A.detach(), A, atol=1e-11, rtol=0)
    torch.testing.assert_close(pair.B.detach(), B, atol=1e-11, rtol=0)


def test_plus_divides_by_the_root_of_the_mean_square() -> None:
    pair, G = OnePair(), draw(7, 9, seed=5)
    dB = G @ pair.A.detach().t() @ torch.linalg.inv((pair.A @ pair.A.t()).detach()) / pair.s
    wanted = pair.B.detach() - 0.1 * 0.1 * dB / ((0.01 * dB**2).sqrt() + 1e-8)
    take(pair, optimizer_of(pair, plus=True, betas=(0.9, 0.99)), G)
    torch.testing.assert_close(pair.B.detach(), wanted, **EXACT)


def test_the_first_moment_can_be_corrected_for_its_bias() -> None:
    """The first step is then that without momentum."""
    moved = []
    for settings in ({"betas": (0.9, 0.9), "correct_bias": True}, {"betas": (0.0, 0.9)}):
        pair = OnePair()
        take(pair, optimizer_of(pair, **settings), draw(7, 9, seed=5))
        moved.append(pair.B.detach())
    torch.testing.assert_close(*moved, **EXACT)


def test_turns_last_as_long_as_told_and_b_goes_first() -> None:
    pair = OnePair()
    optimizer = optimizer_of(pair, every=2)
    moved = ""
    for t in range(6):
        before = pair.A.detach().clone()
        take(pair, optimizer, draw(7, 9, seed=t))
        moved += "B" if torch.equal(pair.A, before) else "A"
    assert moved == "BBAABB"


@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_factor_of_zeros_breaks_nothing(zero: str) -> None:
    pair = OnePair()
    with torch.no_grad():
        getattr(pair, zero).zero_()
    optimizer = optimizer_of(pair)
    for t in range(4):
        take(pair, optimizer, draw(7, 9, seed=t))
    assert pair.change.isfinite().all()
    assert pair.change.any()


def test_decay_is_of_the_factor_that_moves() -> None:
    pair, plain = OnePair(), OnePair()
    B, A = pair.B.detach().clone(), pair.A.detach().clone()
    take(pair, optimizer_of(pair, weight_decay=0.5), draw(7, 9, seed=5))
    take(plain, optimizer_of(plain), draw(7, 9, seed=5))
    torch.testing.assert_close(pair.B, plain.B - 0.1 * 0.5 * B, **EXACT)
    assert torch.equal(pair.A, A)


IDS = token_batch(vocab=320)


@pytest.mark.parametrize("delta", ["lora", "dora"])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_with_its_hook_half_of_the_gradients_are_made_and_the_steps_are_the_same(delta: str, init: str) -> None:
    ends = []
    for hooked in (False, True):
        model = rw.adapt(tiny_llama(), delta, rank=4, init=init)
        optimizer: Any = rw.make_optimizer(model, "altlora", lr=1e-2)
        moment = type("M", (), {"optimizer": optimizer, "model": model})()
        model.train()
        for t in range(4):
            optimizer.zero_grad()
            for hook in optimizer.method_hooks if hooked else ():
                hook.before_forward(moment)
            model(input_ids=IDS, labels=IDS).loss.backward()
            if hooked:
                found = {name[-1] for name, p in model.named_parameters() if p.grad is not None and name[-1] in "AB"}
                assert found == {"B" if t % 2 == 0 else "A"}
            optimizer.step()
            for hook in optimizer.method_hooks if hooked else ():
                hook.after_step(moment)
        ends.append(matrices(model, ("A", "B", "m")))
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


@pytest.mark.parametrize("name", ["altlora", "altlora-plus"])
def test_a_run_learns_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Also with micro-batches, all of which belong to one turn, and left in the middle of a turn."""
    settings: dict[str, Any] = {"name": name, "lr": 0.5 if name == "altlora" else 3e-3, "steps": 12, "accumulate": 2}
    settings |= {"options": {"every": 2}}
    whole = make_loop(**settings)
    losses = whole.run().losses
    assert sum(losses[-4:]) < sum(losses[:4])
    make_loop(**settings, save_every=5, folder=tmp_path).run()
    later = make_loop(**settings, save_every=5, folder=tmp_path)
    assert later.restore()
    assert later.step == 10
    later.run()
    for key, tensor in weights(whole.model).items():
        assert torch.equal(weights(later.model)[key], tensor), key
    assert all(found.pair.held is None for found in trained_pairs(later.model))


class Turns(Hook):
    """Notes which factors got gradients."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def after_backward(self, moment: Any) -> None:
        named = moment.model.named_parameters()
        self.seen.append("".join(sorted({n[-1] for n, p in named if p.grad is not None and p.grad.any()})))


def test_the_hf_trainer(tmp_path: Path) -> None:
    lengths = {"max_steps": 8, "save_steps": 3, "max_grad_norm": 0.0}
    turns, later = Turns(), Turns()
    model, losses = trained(tmp_path, "altlora", {"lr": 0.5}, hooks=[turns], **lengths)
    assert turns.seen == ["B", "A"] * 4
    again, _ = trained(tmp_path, "altlora", {"lr": 0.5}, hooks=[later], resume="checkpoint-3", **lengths)
    assert later.seen == ["A", "B"] * 2 + ["A"]
    check_learned_and_resumed(model, losses, again)


def test_a_run_whose_ranks_are_cut_goes_on() -> None:
    """What is kept of a factor is cut like it."""
    model = adapted()
    optimizer: Any = rw.make_optimizer(model, "altlora-plus", lr=1e-3)
    for t in range(4):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        if t == 1:
            first = trained_pairs(model)[0]
            keep_ranks(first.delta, torch.tensor([1, 3]), optimizer)
            assert {tuple(v.shape) for v in optimizer.state[first.pair.A].values() if v.dim()} == {(2, 32)}
    assert all(p.isfinite().all() for p in model.parameters())


def test_its_state_is_twice_or_three_times_the_factors() -> None:
    """LLaMA 7B, q, k, v, o at rank 8: r (m + n) = 65,536 numbers at each of 128 sites, in 16 bits."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = rw.adapt(open_source("llama-7b", "bfloat16").model, "lora", rank=8, targets=targets, dtype="bfloat16")
    assert optimizer_bytes("altlora", model) == 2 * 128 * 65_536 * 2
    assert optimizer_bytes("altlora-plus", model) == 3 * 128 * 65_536 * 2


def test_it_says_where_it_cannot_go() -> None:
    with pytest.raises(TrainingError, match="AltLoRA works on the two factors"):
        rw.make_optimizer(tiny_llama(), "altlora")
    with pytest.raises(ConfigError, match="every"):
        rw.make_optimizer(adapted(), "altlora", every=0)
    with pytest.raises(ConfigError, match="altlora steps on several gradients together"):
        make_loop(name="altlora", layerwise=True)
