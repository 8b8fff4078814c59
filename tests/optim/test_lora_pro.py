"""LoRA-Pro: the step of a pair whose product moves the weight nearest to its own gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairing import OnePair, draw
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.optim.gram import grams
from rankworks.core.optim.pairs import trained_pairs
from rankworks.optim.lora_pro import Closed, EquivalentGradient, sylvester
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_llama, token_batch

EXACT = {"atol": 1e-12, "rtol": 0}
DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "variant": "sgd",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "damping": 0.0,
    "moments": None,
}


def form(A: Tensor, B: Tensor, s: float, damping: float = 0.0) -> Closed:
    return Closed(A, B, s, *grams([A, B.t()], damping))


def closed(pair: OnePair, damping: float = 0.0) -> Closed:
    return form(pair.A.detach(), pair.B.detach(), pair.s, damping)


def moved_by(pair: OnePair, hA: Tensor, hB: Tensor) -> Tensor:
    """g~."""
    return pair.s * (pair.B @ hA + hB @ pair.A).detach()


def optimizer_of(pair: OnePair, lr: float = 0.1, **settings: Any) -> EquivalentGradient:
    return EquivalentGradient([pair.group()], lr=lr, **{**DEFAULTS, **settings})


def test_the_equivalent_gradient_is_two_projections_less_the_common_part_whatever_x_is() -> None:
    pair, G = OnePair(), draw(7, 9, seed=5)
    P_B, P_A = pair.projectors()
    wanted = P_B @ G + G @ P_A - P_B @ G @ P_A
    solved, gradients = closed(pair), pair.feel(G)
    for hA, hB in (solved.unbalanced(*gradients), solved.balanced(*gradients)):
        torch.testing.assert_close(moved_by(pair, hA, hB), wanted, **EXACT)
        X = draw(3, 3, seed=6)
        A, B = pair.A.detach(), pair.B.detach()
        torch.testing.assert_close(moved_by(pair, hA + X @ A, hB - B @ X), wanted, **EXACT)


def test_it_is_what_least_squares_finds() -> None:
    """The closest to G of all s (B hA + hB A), as a linear map of (hA, hB)."""
    pair, G = OnePair(m=4, n=5, r=2), draw(4, 5, seed=5)
    units = torch.eye(2 * 5 + 4 * 2, dtype=G.dtype)
    columns = [moved_by(pair, u[:10].view(2, 5), u[10:].view(4, 2)).flatten() for u in units]
    solution = torch.linalg.lstsq(torch.stack(columns, 1), G.flatten(), driver="gelsd").solution
    best = moved_by(pair, solution[:10].view(2, 5), solution[10:].view(4, 2))
    torch.testing.assert_close(moved_by(pair, *closed(pair).balanced(*pair.feel(G))), best, **EXACT)


def test_no_step_of_plain_lora_comes_as_near() -> None:
    for seed in range(5):
        pair, G = OnePair(seed=seed), draw(7, 9, seed=50 + seed)
        gA, gB = pair.feel(G)
        plain = moved_by(pair, gA, gB)
        plain = plain * ((plain * G).sum() / plain.square().sum())  # at its best step size
        ours = moved_by(pair, *closed(pair).balanced(gA, gB))
        assert (ours - G).norm() < (plain - G).norm()


def test_another_basis_of_the_same_product_moves_it_alike() -> None:
    pair, G, R = OnePair(), draw(7, 9, seed=5), draw(3, 3, seed=8)
    wanted = moved_by(pair, *closed(pair).balanced(*pair.feel(G)))
    with torch.no_grad():
        pair.A.copy_(torch.linalg.inv(R) @ pair.A)
        pair.B.copy_(pair.B @ R)
    torch.testing.assert_close(moved_by(pair, *closed(pair).balanced(*pair.feel(G))), wanted, **EXACT)


def test_x_solves_the_sylvester_equation_and_keeps_the_step_nearest_to_the_gradients() -> None:
    pair, G = OnePair(), draw(7, 9, seed=5)
    solved, (gA, gB) = closed(pair), pair.feel(G)
    A, B = pair.A.detach(), pair.B.detach()
    C = -torch.linalg.inv(B.t() @ B) @ gA @ A.t() / pair.s**2
    X = sylvester(solved.of_B, solved.of_A, C)
    torch.testing.assert_close(B.t() @ B @ X + X @ A @ A.t(), C, **EXACT)
    hA, hB = solved.balanced(gA, gB)
    unbalanced = solved.unbalanced(gA, gB)
    torch.testing.assert_close(hA, unbalanced.A + X @ A, **EXACT)
    torch.testing.assert_close(hB, unbalanced.B - B @ X, **EXACT)

    def distance(Y: Tensor) -> Tensor:
        return (hA + Y @ A - gA).square().sum() + (hB - B @ Y - gB).square().sum()

    for seed in range(5):
        assert distance(0.01 * draw(3, 3, seed=60 + seed)) > distance(torch.zeros(3, 3, dtype=G.dtype))


def test_it_descends_by_the_square_of_the_equivalent_gradient() -> None:
    pair, G = OnePair(), draw(7, 9, seed=5)
    gA, gB = pair.feel(G)
    for hA, hB in (closed(pair).unbalanced(gA, gB), closed(pair).balanced(gA, gB)):
        falls = (gA * hA).sum() + (gB * hB).sum()
        torch.testing.assert_close(falls, moved_by(pair, hA, hB).square().sum(), **EXACT)


@pytest.mark.parametrize(("m", "n", "r"), [(3, 9, 3), (7, 3, 3), (4, 4, 4)])
def test_with_factors_of_full_rank_it_is_the_gradient(m: int, n: int, r: int) -> None:
    pair, G = OnePair(m, n, r), draw(m, n, seed=5)
    torch.testing.assert_close(moved_by(pair, *closed(pair).balanced(*pair.feel(G))), G, atol=1e-10, rtol=0)


def test_one_step_of_sgd_moves_the_weight_along_it() -> None:
    pair, G, lr = OnePair(), draw(7, 9, seed=5), 0.1
    hA, hB = closed(pair).balanced(*pair.feel(G))
    before = pair.change
    wanted = -lr * moved_by(pair, hA, hB) + lr**2 * pair.s * hB @ hA
    optimizer = optimizer_of(pair, lr)
    optimizer.step()
    torch.testing.assert_close(pair.change - before, wanted, **EXACT)
    assert not optimizer.state


@pytest.mark.parametrize("variant", ["sgd", "adamw"])
@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("zero", ["A", "B"])
def test_where_a_factor_starts_at_zero_the_other_stays_and_it_moves(variant: str, damping: float, zero: str) -> None:
    """B = 0: hA = 0 and g~ = G P_A, or U P_A under Adam."""
    pair, G = OnePair(), draw(7, 9, seed=5)
    with torch.no_grad():
        getattr(pair, zero).zero_()
    P_B, P_A = pair.projectors()
    pair.feel(G)
    still = getattr(pair, "AB".replace(zero, "")).detach().clone()
    optimizer_of(pair, 1.0, variant=variant, damping=damping, eps=1e-30).step()
    assert torch.equal(getattr(pair, "AB".replace(zero, "")), still)
    project = (lambda g: g @ P_A) if zero == "B" else (lambda g: P_B @ g)
    wanted = project(G) if variant == "sgd" else project(project(G).sign())
    torch.testing.assert_close(pair.change, -wanted, atol=1e-11 if damping == 0 else 2e-5, rtol=0)


@pytest.mark.parametrize("strip", [1, 20, 10**6])
def test_adam_keeps_the_moments_of_the_equivalent_gradient(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the rule written with whole matrices: g~, Adam's direction U, and the closed form of U's gradients."""
    monkeypatch.setattr("rankworks.optim.lora_pro.STRIP_NUMBERS", {"cpu": strip})
    pair, plain = OnePair(), OnePair()
    optimizer = optimizer_of(pair, 0.05, variant="adamw", betas=(0.8, 0.9))
    M = V = torch.zeros(7, 9, dtype=torch.float64)
    for t in range(1, 5):
        G = draw(7, 9, seed=20 + t)
        pair.feel(G)
        optimizer.step()
        g = moved_by(plain, *closed(plain).unbalanced(*plain.feel(G)))
        M, V = 0.8 * M + 0.2 * g, 0.9 * V + 0.1 * g * g
        U = (M / (1 - 0.8**t)) / ((V / (1 - 0.9**t)).sqrt() + 1e-8)
        hA, hB = closed(plain).balanced(*plain.feel(U))
        with torch.no_grad():
            plain.A.sub_(0.05 * hA)
            plain.B.sub_(0.05 * hB)
    torch.testing.assert_close(pair.A, plain.A, atol=1e-10, rtol=0)
    torch.testing.assert_close(pair.B, plain.B, atol=1e-10, rtol=0)
    torch.testing.assert_close(optimizer.state[pair.B]["exp_avg"], M, atol=1e-10, rtol=0)
    assert pair.A not in optimizer.state


def test_moments_of_another_type_take_half_the_room_and_nearly_the_same_steps() -> None:
    ends = []
    for kind in (None, "bfloat16"):
        pair = OnePair()
        optimizer = optimizer_of(pair, 0.05, variant="adamw", moments=kind)
        for t in range(3):
            pair.feel(draw(7, 9, seed=20 + t))
            optimizer.step()
        ends.append(pair.change)
    assert optimizer.state[pair.B]["exp_avg"].dtype == torch.bfloat16
    assert 0 < (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()


def test_decay_is_apart_from_the_gradient() -> None:
    pair, plain = OnePair(), OnePair()
    for it, decay in ((pair, 0.5), (plain, 0.0)):
        it.feel(draw(7, 9, seed=5))
        start = it.A.detach().clone()
        optimizer_of(it, weight_decay=decay).step()
    torch.testing.assert_close(pair.A, plain.A - 0.1 * 0.5 * start, **EXACT)


def test_what_the_base_gives_a_start_changes_nothing_in_it() -> None:
    """PiSSA: the change is s (B A - B0 A0), whose gradient in A and B is that of s B A."""
    model = rw.adapt(nn.Sequential(nn.Linear(9, 7)).double(), "lora", rank=3, alpha=5, init="pissa", targets="0")
    x, target = draw(20, 9, seed=1), draw(20, 7, seed=2)
    (trained,) = trained_pairs(model)
    A, B, s = trained.pair.A, trained.pair.B, trained.pair.scale
    y = model(x)
    (y - target).square().sum().backward()
    G = (2 * (y - target)).t() @ x
    hA, hB = form(A.detach(), B.detach(), s).balanced(A.grad, B.grad)  # type: ignore[arg-type]
    P_B, P_A = B.detach() @ torch.linalg.pinv(B.detach()), torch.linalg.pinv(A.detach()) @ A.detach()
    wanted = P_B @ G + G @ P_A - P_B @ G @ P_A
    torch.testing.assert_close(s * (B @ hA + hB @ A).detach(), wanted.detach(), atol=1e-10, rtol=0)


def test_around_a_pair_in_dora_it_is_the_gradient_of_what_the_magnitudes_scale() -> None:
    model = rw.adapt(nn.Sequential(nn.Linear(9, 7)).double(), "dora", rank=3, targets="0")
    (trained,) = trained_pairs(model)
    delta: Any = trained.delta
    with torch.no_grad():
        trained.pair.B.copy_(draw(7, 3, seed=3))
        delta.m.mul_(1.3)
    A, B, s = trained.pair.A.detach(), trained.pair.B.detach(), trained.pair.scale
    x, target = draw(20, 9, seed=1), draw(20, 7, seed=2)
    y = model(x)
    (y - target).square().sum().backward()
    weight = model[0].weight.detach()
    c = delta.m.detach() / (weight + s * B @ A).norm(dim=1)
    G = c.unsqueeze(1) * ((2 * (y - target)).t() @ x).detach()  # dL/dV
    hA, hB = form(A, B, s).balanced(trained.pair.A.grad, trained.pair.B.grad)  # type: ignore[arg-type]
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    torch.testing.assert_close(s * (B @ hA + hB @ A), P_B @ G + G @ P_A - P_B @ G @ P_A, atol=1e-9, rtol=0)


IDS = token_batch(vocab=320)


@pytest.mark.parametrize("delta", ["lora", "dora"])
@pytest.mark.parametrize("variant", ["sgd", "adamw"])
def test_a_model_learns(delta: str, variant: str) -> None:
    model = rw.adapt(tiny_llama(), delta, rank=4)
    optimizer = rw.make_optimizer(model, "lora-pro", lr=5e-3 if variant == "adamw" else 5e-2, variant=variant)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_a_run_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    from training import make_loop, weights

    whole = make_loop(name="lora-pro", lr=5e-3, steps=8)
    losses = whole.run().losses
    assert sum(losses[-3:]) < sum(losses[:3])
    first = make_loop(name="lora-pro", lr=5e-3, steps=8, save_every=3, folder=tmp_path)
    first.run()
    later = make_loop(name="lora-pro", lr=5e-3, steps=8, save_every=3, folder=tmp_path)
    assert later.restore()
    assert later.step == 6
    later.run()
    for name, tensor in weights(whole.model).items():
        assert torch.equal(weights(later.model)[name], tensor), name


def test_its_state_is_that_of_full_fine_tuning() -> None:
    """2 m n numbers for every adapted weight: LLaMA 7B's 6,476,005,376 in 16 bits, whatever the rank."""
    linear = {"llama-60m": 25_296_896, "llama-7b": 6_476_005_376}
    for shape, numbers in linear.items():
        for rank in (8, 64):
            model = rw.adapt(open_source(shape, "bfloat16").model, "lora", rank=rank, dtype="bfloat16")
            assert optimizer_bytes("lora-pro", model) == 2 * numbers * 2
    assert optimizer_bytes({"optimizer": "lora-pro", "variant": "sgd"}, model) == 0
    assert optimizer_bytes({"optimizer": "lora-pro", "moments": "float32"}, model) == 2 * numbers * 4


def test_it_says_where_it_cannot_go() -> None:
    with pytest.raises(TrainingError, match="LoRA-Pro works on the two factors"):
        rw.make_optimizer(tiny_llama(), "lora-pro")
    with pytest.raises(TrainingError, match="gates stand between"):
        rw.make_optimizer(rw.adapt(tiny_llama(), "gated", rank=4), "lora-pro")
    with pytest.raises(ConfigError, match="damping"):
        rw.make_optimizer(rw.adapt(tiny_llama(), "lora"), "lora-pro", damping=-1)
