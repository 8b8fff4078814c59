"""ZO-RankSGD: steps from rankings of random candidates; a line search that never gets worse; the same in every run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, DivergedError, TrainingError
from rankworks.core.hooks import Hook
from rankworks.optim.zo_ranksgd import Candidates, RankSGD, rank_weights
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_llama
from train.training import adapted, make_loop, weights


def start(dim: int = 20, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def quadratic(x: Tensor, dim: int = 20) -> Callable[[], Tensor]:
    curvature = torch.linspace(1, 5, dim, dtype=torch.float64)
    return lambda: (curvature * x.detach().square()).sum() / 2


# ---- the estimate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), [(2, 1), (5, 1), (5, 3), (6, 6)])
def test_weights_are_those_of_the_comparison_graph_and_sum_to_zero(m: int, k: int) -> None:
    """Edge by edge: every pair whose order is known adds (better - worse)."""
    order = torch.randperm(m, generator=torch.Generator().manual_seed(m)).tolist()
    known = [(better, worse) for p, better in enumerate(order[:k]) for worse in order[p + 1 :]]
    wanted = [0.0] * m
    for better, worse in known:
        wanted[better] += 1 / len(known)
        wanted[worse] -= 1 / len(known)
    assert len(known) == k * (k - 1) // 2 + k * (m - k)
    found = rank_weights(order[:k], m)
    assert found == pytest.approx(wanted)
    assert math.fsum(found) == pytest.approx(0, abs=1e-15)
    released = rank_weights(order[:k], m, "released")
    more = [r - f for r, f in zip(released, found, strict=True)]
    assert more == pytest.approx([1 / len(known) if i in order[:k] else 0.0 for i in range(m)])


def perturbations(x: nn.Parameter, optimizer: RankSGD, count: int) -> list[Tensor]:
    """What the next step will draw, seen through an oracle that refuses to answer."""
    found: list[Tensor] = []

    def look(candidates: Candidates) -> Sequence[int]:
        found.extend(x.detach().clone() for _ in candidates)
        raise KeyboardInterrupt

    before = x.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(oracle=look)
    assert torch.equal(x, before), "an oracle that gives up leaves the weights as they were"
    return [(point - before) / optimizer.param_groups[0]["radius"] for point in found]


def test_two_candidates_give_a_signed_comparison() -> None:
    x = start()
    optimizer = RankSGD([x], lr=0.1, candidates=2, ranked=1, radius=0.5)
    first, second = perturbations(x, optimizer, 2)
    loss, before = quadratic(x), x.detach().clone()
    sides = []
    for z in (first, second):
        x.data = before + 0.5 * z
        sides.append(float(loss()))
    x.data = before.clone()
    optimizer.step(loss)
    sign = 1 if sides[0] < sides[1] else -1
    torch.testing.assert_close(x.detach(), before + 0.1 * sign * (first - second), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["published", "released"])
def test_the_step_is_the_weighted_mean_of_the_perturbations(kind: Any) -> None:
    x = start()
    optimizer = RankSGD([x], lr=0.1, candidates=5, ranked=2, weights=kind, seed=4)
    z, before = perturbations(x, optimizer, 5), x.detach().clone()
    optimizer.step(oracle=lambda candidates: [3, 0])
    share = rank_weights([3, 0], 5, kind)
    wanted = before + 0.1 * sum(w * each for w, each in zip(share, z, strict=True))
    torch.testing.assert_close(x.detach(), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("m", "k", "wanted"), [(2, 1, 0.99), (8, 8, 0.998)])
def test_on_a_linear_function_the_mean_step_is_the_descent_direction(m: int, k: int, wanted: float) -> None:
    slope = start(seed=1).detach()
    x = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = RankSGD([x], lr=1.0, candidates=m, ranked=k, radius=1e-3)
    for _ in range(2000):
        optimizer.step(lambda: slope @ x)
    assert float(torch.cosine_similarity(-slope, x.detach(), dim=0)) > wanted


@pytest.mark.parametrize("line_search", [0, 5])
def test_an_increasing_function_of_the_loss_gives_the_same_steps(line_search: int) -> None:
    ends = []
    for transform in (lambda t: t, lambda t: torch.log(t) * 7 - 3, lambda t: t**3):
        x = start()
        optimizer = RankSGD([x], lr=0.05, candidates=6, ranked=3, radius=0.1, line_search=line_search)
        loss = quadratic(x)
        for _ in range(10):
            optimizer.step(lambda loss=loss, transform=transform: transform(loss()))
        ends.append(x.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_it_converges_on_a_quadratic_from_rankings_alone() -> None:
    """The oracle sees the order of the points and nothing else."""
    x = start()
    loss = quadratic(x)
    first = float(loss())

    def oracle(candidates: Candidates) -> list[int]:
        seen = [float(loss()) for _ in candidates]
        return sorted(candidates, key=seen.__getitem__)[:1]

    optimizer = RankSGD([x], lr=0.5, candidates=6, ranked=1, radius=0.02, line_search=8)
    for _ in range(300):
        optimizer.step(oracle=oracle)
    assert float(loss()) < 1e-4 * first
    plain = start()
    loss = quadratic(plain)
    fixed = RankSGD([plain], lr=0.02, candidates=8, radius=0.05)
    for _ in range(600):
        fixed.step(loss)
    assert float(loss()) < 0.02 * first


# ---- the line search ---------------------------------------------------------------------------------------------


def test_with_a_line_search_the_loss_never_rises_and_is_returned() -> None:
    x = start()
    loss = quadratic(x)
    optimizer = RankSGD([x], lr=2.0, candidates=3, ranked=1, radius=0.3, line_search=2)
    seen, failed = [float(loss())], 0
    for _ in range(60):
        assert float(optimizer.step(loss)) == pytest.approx(seen[-1])
        seen.append(float(loss()))
        failed += optimizer.param_groups[0]["failed"] > 0
    assert all(after <= before for before, after in itertools.pairwise(seen))
    assert 0 < failed < 60, "rounds of both kinds"


def test_the_line_is_halved_and_ends_with_the_best_candidate_and_the_weights() -> None:
    x = start()
    optimizer = RankSGD([x], lr=0.4, candidates=4, ranked=1, radius=0.1, line_search=3)
    z, before = perturbations(x, optimizer, 4), x.detach().clone()
    points: list[Tensor] = []

    def oracle(candidates: Candidates) -> list[int]:
        if len(candidates) == 5:
            points.extend(x.detach().clone() for _ in candidates)
        return [2]

    optimizer.step(oracle=oracle)
    d = sum(w * each for w, each in zip(rank_weights([2], 4), z, strict=True))
    wanted = [before + 0.4 * d, before + 0.2 * d, before + 0.1 * d, before + 0.1 * z[2], before]
    for point, each in zip(points, wanted, strict=True):
        torch.testing.assert_close(point, each, atol=1e-12, rtol=0)
    torch.testing.assert_close(x.detach(), wanted[2], atol=1e-12, rtol=0)


def test_directions_of_failed_rounds_are_averaged_until_one_succeeds() -> None:
    x = start()
    optimizer = RankSGD([x], lr=0.4, candidates=4, ranked=1, radius=0.1, line_search=1)
    answers = [2, 2, 1, 2]  # of three points: x itself is 2
    directions, before = [], x.detach().clone()
    for round_, answer in enumerate(answers):
        z = perturbations(x, optimizer, 4)
        directions.append(sum(w * each for w, each in zip(rank_weights([1], 4), z, strict=True)))
        optimizer.step(oracle=lambda c, answer=answer: [1] if len(c) == 4 else [answer])
        since = directions[: round_ + 1] if round_ < 3 else directions[3:]
        mean = torch.stack(since).mean(0)
        torch.testing.assert_close(optimizer.state[x]["direction"], mean, atol=1e-12, rtol=0)
        assert optimizer.param_groups[0]["failed"] == (0, 1, 2, 0, 1)[round_ + 1]
        assert torch.equal(x, before) == (round_ < 2)


def test_a_closure_is_not_asked_twice_for_one_point() -> None:
    x, calls = start(), []
    loss = quadratic(x)
    for line_search, wanted in ((0, 6), (3, 6 + 4)):
        optimizer = RankSGD([x], lr=0.1, candidates=6, line_search=line_search)
        calls.clear()
        optimizer.step(lambda: calls.append(1) or loss())
        assert len(calls) == wanted


# ---- a person chooses --------------------------------------------------------------------------------------------


def test_a_person_chooses_the_best_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """The docstring's ten lines, with a scripted person who likes what the model says to be small."""
    model = nn.Linear(6, 3)
    optimizer = rw.make_optimizer(model, "zo-ranksgd", lr=0.5, candidates=4, ranked=1, radius=0.1, line_search=3)
    shown: list[Tensor] = []
    monkeypatch.setattr("builtins.input", lambda prompt: str(min(range(len(shown)), key=lambda i: shown[i].norm())))
    noise = torch.ones(6)

    def person(candidates: Candidates) -> list[int]:
        shown.clear()
        for _ in candidates:
            shown.append(model(noise).detach())
        return [int(input("the best: "))]

    first = model(noise).norm()
    for _ in range(20):
        assert optimizer.step(oracle=person) is None  # type: ignore[call-arg]
    assert model(noise).norm() < 0.5 * first


def test_a_candidate_can_be_looked_at_again() -> None:
    x = start()
    optimizer = RankSGD([x], candidates=3, ranked=1, radius=0.1)

    def oracle(candidates: Candidates) -> list[int]:
        seen = [x.detach().clone() for _ in candidates]
        candidates.at(1)
        assert torch.equal(x, seen[1])
        return [0]

    optimizer.step(oracle=oracle)


@pytest.mark.parametrize("answer", [[], [0], [0, 0], [0, 7], [-1, 1]])
def test_a_ranking_that_is_none_is_refused_and_changes_nothing(answer: list[int]) -> None:
    x = start()
    optimizer, before = RankSGD([x], candidates=4, ranked=2), x.detach().clone()
    with pytest.raises(TrainingError, match=r"needs the 2 best|different candidates"):
        optimizer.step(oracle=lambda candidates: answer)
    assert torch.equal(x, before)
    assert optimizer.param_groups[0]["rounds"] == 0


def test_losses_that_are_not_finite_come_last_and_too_many_of_them_stop_it() -> None:
    x = start()
    before, calls = x.detach().clone(), []

    def closure() -> Tensor:
        calls.append(1)
        return x.sum() * (math.nan if len(calls) % 2 else 1.0)

    optimizer = RankSGD([x], lr=0.1, candidates=4, ranked=2)
    z = perturbations(x, optimizer, 4)
    assert math.isfinite(float(optimizer.step(closure)))
    order = sorted((1, 3), key=lambda i: float(z[i].sum()))
    d = sum(w * each for w, each in zip(rank_weights(order, 4), z, strict=True))
    torch.testing.assert_close(x.detach(), before + 0.1 * d, atol=1e-12, rtol=0)
    before = x.detach().clone()
    with pytest.raises(DivergedError, match="lower radius"):
        RankSGD([x], candidates=4).step(closure)
    assert torch.equal(x, before)


def test_it_asks_for_what_it_needs() -> None:
    with pytest.raises(TrainingError, match=r"call step\(closure\)"):
        RankSGD([start()]).step()
    with pytest.raises(ConfigError, match="lower ranked"):
        rw.make_optimizer(nn.Linear(2, 2), "zo-ranksgd", candidates=3, ranked=4)


# ---- memory, types and runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line_search", "bytes_"), [(0, 0), (4, 2)])
def test_its_state_is_the_direction_alone(line_search: int, bytes_: int) -> None:
    """Of LLaMA 130M in 16 bits: 268 MB with a line search, nothing without."""
    model = open_source("llama-130m", "bfloat16").model.requires_grad_(True)
    told = optimizer_bytes({"optimizer": "zo-ranksgd", "line_search": line_search}, model)
    assert told == bytes_ * sum(p.numel() for p in model.parameters()) == (268_211_712 if line_search else 0)
    model = rw.adapt(tiny_llama(), "lora", rank=2)
    optimizer = rw.make_optimizer(model, "zo-ranksgd", candidates=2, line_search=line_search)
    optimizer.step(lambda: model(torch.tensor([[5, 6]])).logits.sum())
    kept = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    assert kept == optimizer_bytes({"optimizer": "zo-ranksgd", "line_search": line_search}, model)


def test_candidates_do_not_depend_on_the_order_of_groups_nor_on_the_global_generator() -> None:
    ends = []
    for turned in (False, True):
        torch.manual_seed(int(turned))
        a, b = start(3, 1), start(4, 2)
        groups = [{"params": [a], "names": ["a"]}, {"params": [b], "names": ["b"]}]
        optimizer = RankSGD(groups[::-1] if turned else groups, lr=0.1, candidates=4, seed=3)
        for _ in range(3):
            optimizer.step(lambda a=a, b=b: a.square().sum() + b.square().sum())
        ends.append(torch.cat([a.detach(), b.detach()]))
    assert torch.equal(*ends)


def test_at_a_rate_of_zero_nothing_moves_and_decay_follows_the_step() -> None:
    still = start()
    optimizer = RankSGD([still], lr=0.0, candidates=4, line_search=4)
    before = still.detach().clone()
    optimizer.step(quadratic(still))
    assert torch.equal(still, before)
    moved, decayed = start(), start()
    RankSGD([moved], lr=0.1, candidates=4).step(quadratic(moved))
    RankSGD([decayed], lr=0.1, candidates=4, weight_decay=0.5).step(quadratic(decayed))
    torch.testing.assert_close(decayed.detach(), moved.detach() * (1 - 0.1 * 0.5), atol=1e-14, rtol=0)


def test_weights_in_16_bits_stay_in_16_bits() -> None:
    x = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = RankSGD([x], lr=0.2, candidates=8, radius=0.1, line_search=5)
    for _ in range(30):
        optimizer.step(lambda: x.float().square().sum())
    assert x.dtype == optimizer.state[x]["direction"].dtype == torch.bfloat16
    assert float(x.detach().float().square().sum()) < 20


SETTINGS: dict[str, Any] = {"name": "zo-ranksgd", "lr": 0.05, "options": {"candidates": 4, "radius": 0.05}}


@pytest.mark.parametrize("whole", [False, True])
def test_the_own_loop_trains_with_it(whole: bool) -> None:
    """On one batch again and again, adapters and a whole model; what is logged is the loss before each step."""
    model = tiny_llama(layers=1) if whole else adapted(layers=1)
    radius = 0.003 if whole else 0.05
    options = {"candidates": 8, "radius": radius, "line_search": 6}
    settings = {**SETTINGS, "lr": 20 * radius, "options": options, "schedule": "constant"}
    loop = make_loop(model, steps=30, batch_size=24, **settings)
    before, calls = weights(model), []
    backward = torch.Tensor.backward
    torch.Tensor.backward = lambda *args, **keywords: calls.append(1) or backward(*args, **keywords)  # type: ignore[method-assign]
    try:
        losses = loop.run().losses
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    assert not calls
    assert all(p.grad is None for p in model.parameters())
    # The batch is in another order at every step, so equal weights give a loss equal to float32's rounding.
    assert all(b <= a + 2e-6 * abs(a) for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 0.02
    assert any(not torch.equal(p, before[name]) for name, p in weights(model).items())


def test_micro_batches_are_one_batch_and_dropout_is_the_same_for_all_candidates() -> None:
    runs = [make_loop(batch_size=8 // a, accumulate=a, **SETTINGS) for a in (1, 2)]
    for loop in runs:
        loop.run()
    torch.testing.assert_close(runs[0].history.losses, runs[1].history.losses, atol=1e-5, rtol=0)
    loop = make_loop(adapted(attention_dropout=0.3), steps=2, **SETTINGS)
    loop.model.train()
    loop.step = 1
    batches = loop.collator.micro_batches(loop.examples[:8])
    assert loop.evaluating is not None
    closure = loop.evaluating.closure(batches, 24, loop._moment())
    with torch.no_grad():
        first = closure()
        torch.rand(3)
        assert torch.equal(closure(), first)


@pytest.mark.parametrize("line_search", [0, 4])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, line_search: int) -> None:
    options = {**SETTINGS["options"], "line_search": line_search}
    settings = {**SETTINGS, "options": options, "save_every": 2}
    whole = make_loop(adapted(attention_dropout=0.2), tmp_path / "whole", **settings)
    torch.manual_seed(1)
    whole.run()
    whole2 = make_loop(adapted(attention_dropout=0.2), tmp_path / "whole", **settings)
    assert whole2.restore()
    assert whole2.step == 4
    torch.manual_seed(99)
    whole2.restore()
    assert whole2.run().losses == whole.history.losses
    for name, tensor in weights(whole.model).items():
        assert torch.equal(weights(whole2.model)[name], tensor), name


class Penalty(Hook):
    def penalty(self, moment: Any) -> Tensor:
        return torch.tensor(100.0)


class ReadsGradients(Hook):
    def after_backward(self, moment: Any) -> None:
        raise AssertionError("there are none")


def test_penalties_are_part_of_the_loss_and_hooks_that_read_gradients_are_refused() -> None:
    assert make_loop(steps=1, hooks=[Penalty()], **SETTINGS).run().losses[0] > 100
    with pytest.raises(ConfigError, match="ReadsGradients acts on the gradients"):
        make_loop(hooks=[ReadsGradients()], **SETTINGS)
    with pytest.raises(ConfigError, match="layerwise=false"):
        make_loop(layerwise=True, **SETTINGS)
