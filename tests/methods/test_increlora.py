"""IncreLoRA: growth to the budget and not beyond, reserves that do not act, and scores by hand."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import adapted, close, linear
from runs import falls, resumes_exactly, tiny_run
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, TargetError, TrainingError
from rankworks.core.hooks import Hook, Moment, method_hooks
from rankworks.core.ranks.orthogonal import departure
from rankworks.core.ranks.surgery import gated_of, pair_of
from rankworks.core.rates import learning_rate_factor
from rankworks.core.state import state_of
from rankworks.ranks.increlora import HELD, Growth
from rankworks.train.optim import make_optimizer

SHAPES = [(6, 7), (7, 9), (9, 5), (5, 8)]


class Four(nn.Module):
    """Four layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in SHAPES])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def four(delta: str = "lora", rank: int = 1, alpha: float = 4, **ranks: Any) -> tuple[nn.Module, Growth]:
    torch.manual_seed(0)
    settings = {"ranks": "increlora", "target": 4, "top": 2, "warmup": 0, "interval": 2, "orthogonal": 0, **ranks}
    model = rw.adapt(Four(), delta, rank=rank, alpha=alpha, targets="re:layers\\.\\d", ranks=settings)
    (hook,) = method_hooks(model)
    assert isinstance(hook, Growth)
    return model, hook


class Drive:
    """Steps on random data, in micro-batches, with the hook."""

    def __init__(
        self, model: nn.Module, hook: Hook, steps: int, lr: float = 0.1, name: str = "sgd", accumulate: int = 1
    ):
        self.model, self.hook, self.steps, self.done = model, hook, steps, 0
        self.lr, self.accumulate = lr, accumulate
        self.optimizer = make_optimizer(model, name, lr=lr)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = lr
        hook.on_start(self.moment())

    def moment(self) -> Moment:
        return Moment(self.model, self.optimizer, self.done, self.steps)

    def backward(self) -> None:
        """A step up to the optimizer."""
        self.done += 1
        self.optimizer.zero_grad()
        for part in range(self.accumulate):
            torch.manual_seed(100 * self.done + part)
            x, y = torch.randn(16, 6), torch.randn(16, 8)
            self.hook.before_forward(self.moment())
            (self.model(x) - y).square().mean().backward()

    def step(self) -> None:
        self.backward()
        self.hook.after_backward(self.moment())
        self.optimizer.step()
        self.hook.after_step(self.moment())

    def run(self) -> Drive:
        while self.done < self.steps:
            self.step()
        self.hook.on_end(self.moment())
        return self


def ranks_of(hook: Growth) -> list[int]:
    return [pair_of(d).rank for d in hook.deltas.values()]


@torch.no_grad()
def alive(hook: Growth) -> None:
    """Let active gates be something other than zero."""
    torch.manual_seed(2)
    for key, gated in hook.gated.items():
        gated.gate[: hook.active[key]].normal_()


# ---- growth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize(("target", "add", "top"), [(4, 2, 2), (4, 1, 3), (3.25, 2, 4), (4, 5, 1), (2, 1, 4)])
def test_the_total_after_every_round_and_never_a_rank_less(target: float, add: int, top: int, advance: bool) -> None:
    model, hook = four(target=target, add=add, top=top, advance=advance)
    drive = Drive(model, hook, 40)
    last, rounds = dict(hook.active), 0
    while drive.done < 40:
        drive.step()
        rounds += drive.done % 2 == 0
        assert hook.total == min(round(4 * target), 4 + rounds * top * add)
        changed = [k for k in last if hook.active[k] != last[k]]
        assert all(hook.active[k] > last[k] for k in changed)
        assert len(changed) <= top
        if hook.growing:
            reserve = hook.add if advance else 0
            assert [r - reserve for r in ranks_of(hook)] == list(hook.active.values())
        else:
            assert ranks_of(hook) == list(hook.active.values())
        last = dict(hook.active)
    assert hook.total == round(4 * target)
    assert rw.trainable_parameters(drive.model) == sum(
        hook.active[k] * (a + b + 1) for k, (a, b) in zip(hook.active, SHAPES, strict=True)
    )


def test_during_training_the_reserve_is_counted_too() -> None:
    model, hook = four()
    assert rw.trainable_parameters(model) == sum(a + b + 1 for a, b in SHAPES)
    Drive(model, hook, 20)
    assert rw.trainable_parameters(model) == sum((1 + hook.add) * (a + b + 1) for a, b in SHAPES)


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize(
    ("target", "add", "top"), [(4, 2, 2), (4, 1, 3), (3.25, 2, 4), (4, 5, 1), (2, 1, 4), (1, 1, 1)]
)
@pytest.mark.filterwarnings("ignore:increlora starts with its whole budget")
def test_a_plan_counts_it_at_its_largest(target: float, add: int, top: int, advance: bool) -> None:
    ranks = {"ranks": "increlora", "target": target, "add": add, "top": top, "advance": advance}
    planned = rw.plan(
        Four(), "lora", rank=1, targets="re:layers\\.\\d", ranks=ranks, example=torch.ones(2, 6), dtype="float32"
    )
    model, hook = four(target=target, add=add, top=top, advance=advance)
    drive, seen, trained = Drive(model, hook, 40), [sum(ranks_of(hook))], [rw.trainable_parameters(model)]
    while drive.done < 40:
        drive.step()
        seen.append(sum(ranks_of(hook)))
        trained.append(rw.trainable_parameters(model))
    assert planned.ranks == "increlora"
    assert "lora with increlora on 4 sites" in str(planned)
    if target == 1:
        assert not planned.notes
    else:
        assert f"is counted at its largest, {max(seen)} ranks at 4 sites" in planned.notes[0]
    alike = target == 1 or (top == 4 and max(seen) % 4 == 0)
    assert not alike or planned.trainable_parameters == max(trained)


def test_the_sites_with_the_highest_scores_grow_the_first_of_equal_ones() -> None:
    model, hook = four(window=0)
    drive = Drive(model, hook, 20)
    drive.step()
    drive.backward()
    hook._watch(False)
    hook._score()
    hook.mean, hook.spread = torch.tensor([1.0, 3.0, 2.0, 3.0]), torch.ones(4)
    hook._grow(drive.moment())
    assert list(hook.active.values()) == [1, 3, 1, 3]
    hook.mean = torch.ones(4)
    hook._grow(drive.moment())
    assert list(hook.active.values()) == [3, 5, 1, 3]


@pytest.mark.parametrize("rescale", [True, False])
def test_at_the_instant_of_growth_the_change_moves_by_its_multiplier_and_a_reserve(rescale: bool) -> None:
    model, hook = four(rescale=rescale)
    drive = Drive(model, hook, 20)
    alive(hook)
    drive.step()
    drive.backward()
    before = rw.delta_weights(model)
    scales = {k: pair_of(d).scale for k, d in hook.deltas.items()}
    old = dict(hook.active)
    hook.after_backward(drive.moment())
    grown = [k for k in old if hook.active[k] > old[k]]
    assert len(grown) == 2
    for key, delta in hook.deltas.items():
        pair, new = pair_of(delta), slice(old[key] + hook.add, None)
        factor = old[key] / hook.active[key] if rescale else 1.0
        close(torch.tensor(pair.scale), torch.tensor(scales[key] * factor), 1e-15)
        assert abs(pair.scale - 4 / (hook.active[key] if rescale else 1)) < 1e-15
        reserve = pair.scale * HELD * pair.B[:, new] @ pair.A[new]
        change = rw.delta_weights(model)[key]
        close(change, factor * before[key] + reserve.detach(), 1e-12)
        bound = pair.scale * HELD * pair.B[:, new].norm() * pair.A[new].norm()
        assert (change - factor * before[key]).norm() <= bound + 1e-12
        assert (bound > 0) == (key in grown)


def test_reserves_have_no_gradient_at_their_gates_and_train_their_factors() -> None:
    model, hook = four()
    drive = Drive(model, hook, 20, name="adamw")
    for _ in range(3):
        drive.step()
        for key, gated in hook.gated.items():
            active, pair = hook.active[key], pair_of(hook.deltas[key])
            assert (gated.gate[active:] == HELD).all()
            if drive.done != 2:  # in a round, new ranks have no gradient yet
                assert not gated.gate.grad[active:].any()
                assert pair.A.grad[active:].any()
                assert pair.B.grad[:, active:].any()


def test_without_advance_learning_there_is_no_reserve_and_new_gates_are_zero() -> None:
    model, hook = four(advance=False)
    drive = Drive(model, hook, 20)
    assert ranks_of(hook) == [1, 1, 1, 1]
    drive.step()
    drive.backward()
    before = rw.delta_weights(model)
    hook.after_backward(drive.moment())
    for key, gated in hook.gated.items():
        assert not gated.gate[1:].any()
        assert gated.trained_gates is None
        close(rw.delta_weights(model)[key], before[key] / hook.active[key], 1e-12)


def test_new_factors_are_drawn_at_002_and_differ() -> None:
    model = rw.adapt(
        nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 300)), rank=1, ranks={"ranks": "increlora", "add": 8}
    )
    hook: Any = method_hooks(model)[0]
    Drive(model, hook, 400)
    one, two = (pair_of(d) for d in hook.deltas.values())
    for factor in (one.A[1:], one.B[:, 1:], two.A[1:], two.B[:, 1:]):
        assert abs(float(factor.detach().std()) - 0.02) < 0.002
    assert torch.linalg.matrix_rank(one.A) == 9


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser", ["sqrt", "mean", "none"])
@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_scores_match_two_steps_by_hand(normaliser: str, delta: str) -> None:
    model, hook = four(delta, normaliser=normaliser, beta1=0.7, beta2=0.6, interval=10)
    drive = Drive(model, hook, 40)
    alive(hook)
    mean, spread = torch.zeros(4), torch.zeros(4)
    for _ in range(2):
        drive.backward()
        now = []
        for key, each in hook.deltas.items():
            layer: Any = model.get_submodule(key)
            layer.weight.requires_grad_(True)
            now.append((key, each, layer))
        torch.manual_seed(100 * drive.done)
        x, y = torch.randn(16, 6), torch.randn(16, 8)
        hook._watch(False)
        found = torch.autograd.grad((model(x) - y).square().mean(), [layer.weight for _, _, layer in now])
        sizes = []
        for (key, each, layer), G in zip(now, found, strict=True):
            layer.weight.requires_grad_(False)
            inner = each if delta == "lora" else each.inner
            numel = G.numel()
            size = (inner.dense(layer.weight) * G).abs().sum().detach()
            sizes.append(size / {"sqrt": numel**0.5, "mean": numel, "none": 1}[normaliser])
            assert key in hook.seen
        total = torch.stack(sizes)
        mean = 0.7 * mean + 0.3 * total
        spread = 0.6 * spread + 0.4 * (total - mean).abs()
        hook.after_backward(drive.moment())
        drive.optimizer.step()
        hook.after_step(drive.moment())
    close(hook.mean, mean)
    close(hook.spread, spread)


def test_scores_of_gates_need_no_matrix() -> None:
    model, hook = four(score="gates", interval=10)
    drive = Drive(model, hook, 40)
    alive(hook)
    drive.backward()
    assert not hook.seen
    wanted = torch.stack([(g.gate * g.gate.grad).abs().sum() for g in hook.gated.values()]).detach()
    hook.after_backward(drive.moment())
    close(hook.mean, 0.15 * wanted)


def test_scores_are_measured_in_the_first_micro_batch_of_the_steps_before_a_round() -> None:
    model, hook = four(interval=10, window=3, warmup=12)
    drive = Drive(model, hook, 60, accumulate=3)
    rounds = [step for step in range(1, 41) if hook._due(step)]
    measured, notes, note = [], [], hook._note
    hook._note = lambda key, G: (notes.append(key), note(key, G))  # type: ignore[method-assign, assignment, return-value]
    while drive.done < 40:
        notes.clear()
        drive.step()
        if notes:
            measured.append(drive.done)
            assert len(notes) == 4
        assert all(gated.watch is None for gated in hook.gated.values())
    assert rounds == [20, 30, 40]
    assert measured == [18, 19, 20, 28, 29, 30, 38, 39, 40]


def test_when_the_budget_is_spent_nothing_is_measured() -> None:
    model, hook = four(top=4, add=3, window=0)
    drive = Drive(model, hook, 20)
    drive.step()
    assert hook._measures(2)
    drive.step()
    assert not hook.growing
    assert not hook._measures(3)


# ---- the learning rate of new ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_new_ranks_move_at_their_own_rate_and_the_others_at_the_runs(name: str) -> None:
    """Against plain steps from the same state at the two rates: what a group of their own would do."""
    model, hook = four(top=1, rise=4)
    drive = Drive(model, hook, 20, name=name)
    alive(hook)
    drive.step()
    drive.step()
    (new,) = hook.fresh
    key, rows, gates = new["site"], slice(*new["rows"]), slice(*new["gates"])
    assert (new["since"], gates) == (2, slice(1, 1 + hook.add))
    for group in drive.optimizer.param_groups:
        group["lr"] = 0.05  # the run's schedule is at a half
    pair, gate = pair_of(hook.deltas[key]), hook.gated[key].gate
    own = 0.1 * learning_rate_factor("linear", 1, 19, 4)
    ends = []
    for rate in (0.05, own):
        other = copy.deepcopy(model)
        optimizer = make_optimizer(other, name, lr=rate)
        optimizer.load_state_dict(copy.deepcopy(drive.optimizer.state_dict()))
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(300)
        x, y = torch.randn(16, 6), torch.randn(16, 8)
        (other(x) - y).square().mean().backward()
        optimizer.step()
        twin = rw.get_delta(other, key)
        ends.append((pair_of(twin).A, pair_of(twin).B, gated_of(twin).gate))
    drive.step()
    (A, B, g), (A_own, B_own, g_own) = ends
    close(pair.A[rows], A_own[rows], 1e-12)
    close(pair.B[:, rows], B_own[:, rows], 1e-12)
    close(gate[gates], g_own[gates], 1e-12)
    assert torch.equal(pair.A[: rows.start], A[: rows.start])
    assert torch.equal(pair.B[:, : rows.start], B[:, : rows.start])
    assert torch.equal(gate[:1], g[:1])
    assert (pair.A[rows] - A[rows]).abs().max() > 1e-11


def test_parameter_groups_and_names_never_change() -> None:
    model, hook = four()
    drive = Drive(model, hook, 20, name="adamw")
    names = [group["names"] for group in drive.optimizer.param_groups]
    drive.run()
    assert [group["names"] for group in drive.optimizer.param_groups] == names
    parameters = dict(model.named_parameters())
    for group in drive.optimizer.param_groups:
        assert all(parameters[n] is p for n, p in zip(group["names"], group["params"], strict=True))


def test_at_the_common_rate_nothing_is_held() -> None:
    model, hook = four(rate="common")
    drive = Drive(model, hook, 20)
    drive.step()
    drive.backward()
    hook.after_backward(drive.moment())
    assert hook.fresh
    assert not hook.pace._parts


# ---- the penalty ----------------------------------------------------------------------------------------------------


def test_the_penalty_over_a_site_or_over_the_ranks_of_a_round() -> None:
    model, hook = four(orthogonal=0.5)
    drive = Drive(model, hook, 20)
    drive.step()
    drive.step()  # one round: sites of 1 + 2 + 2 rows and of 1 + 2
    pairs = [pair_of(d) for d in hook.deltas.values()]
    term, wanted = hook.penalty(drive.moment()), departure([p.A for p in pairs], [p.B for p in pairs])
    assert term is not None
    assert wanted is not None
    close(term, 0.5 * wanted)
    chunked, other = four(orthogonal=0.5, penalty_over="chunks")
    chunked_drive = Drive(chunked, other, 20)
    chunked_drive.step()
    chunked_drive.step()
    edges = {k: [0, 1, 3, 5] if len(pair_of(d).A) == 5 else [0, 1, 3] for k, d in other.deltas.items()}
    assert sorted(map(len, edges.values())) == [3, 3, 4, 4]
    parts = []
    for key, delta in other.deltas.items():
        for a, b in pairwise(edges[key]):
            parts += [pair_of(delta).A[a:b], pair_of(delta).B[:, a:b].t()]
    term, wanted = other.penalty(chunked_drive.moment()), departure(parts)
    assert term is not None
    assert wanted is not None
    close(term, 0.5 * wanted)


# ---- the ends -------------------------------------------------------------------------------------------------------


def test_with_the_budget_it_starts_with_it_is_a_lora_with_a_diagonal() -> None:
    ends = []
    for hooked in (True, False):
        model, hook = four(rank=2, target=2)
        if hooked:
            with pytest.warns(UserWarning, match=r"whole budget of 8 ranks.*rank=1"):
                drive = Drive(model, hook, 6)
        else:
            drive = Drive(model, Hook(), 6)
        drive.run()
        ends.append([p.detach().clone() for p in state_of(model).adapter("default").parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_what_a_run_leaves_is_saved_exported_and_merged(delta: str, tmp_path: Path) -> None:
    model, hook = four(delta)
    Drive(model, hook, 30).run()
    x = torch.randn(5, 6)
    y = model(x).detach()
    torch.manual_seed(0)
    assert torch.equal(rw.load(Four(), rw.save(model, tmp_path / "a"))(x), y)
    if delta == "lora":
        torch.manual_seed(0)
        report = rw.export(model, tmp_path / "lora", kind="lora")
        assert [s.rank for s in report.sites] == [min(r, *s) for r, s in zip(hook.active.values(), SHAPES, strict=True)]
        close(rw.load(Four(), tmp_path / "lora")(x), y, 1e-12)
    rw.merge(model)
    close(model(x), y, 1e-13)


def test_a_run_too_short_for_its_rounds_says_so_and_still_ends_without_a_reserve() -> None:
    model, hook = four(top=1, add=1)
    with pytest.warns(UserWarning, match=r"needs 12 rounds to grow from 4 to 16 ranks.*room for 3"):
        drive = Drive(model, hook, 6)
    drive.run()
    assert hook.total == 7
    assert ranks_of(hook) == list(hook.active.values())


def test_left_to_itself_it_grows_within_half_of_the_run() -> None:
    model, hook = four(interval=None, top=None, warmup=0.1, target=5)
    drive = Drive(model, hook, 80)
    assert (hook.top, hook.add) == (1, 2)
    last = 0
    while hook.growing:
        drive.step()
        last = drive.done
    assert 8 < last <= 48


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_start_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"starts with 4 ranks at 1 sites and ranks.target = 2.*adalora"):
        adapted(linear(), rank=4, ranks={"ranks": "increlora", "target": 2})


@pytest.mark.parametrize("delta", ["vera", "lora-xs"])
def test_a_change_without_a_trained_pair_is_refused(delta: str) -> None:
    with pytest.raises(TargetError, match=f"adds ranks of a trained pair B A, which {delta} lacks"):
        adapted(linear(9, 8), delta, rank=2, ranks="increlora")


def test_a_start_taken_out_of_the_base_is_refused() -> None:
    with pytest.raises(TargetError, match="choose init default"):
        adapted(linear(9, 8), rank=2, init="pissa", ranks="increlora")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hook = four()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(TrainingError, match=r"increlora changes the shapes.*2 processes"):
        Drive(model, hook, 10)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _single() -> Any:
    torch.set_default_dtype(torch.float32)


RANKS = {"ranks": "increlora", "target": 4, "top": 3, "warmup": 2, "interval": 2}


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize("advance", [True, False])
def test_a_run_cut_off_in_mid_growth_goes_on_bit_for_bit(advance: bool, tmp_path: Path) -> None:
    ranks = {**RANKS, "advance": advance}
    model = resumes_exactly(tmp_path, lambda f, **k: tiny_run(f, rank=1, ranks=ranks, **k), (5, 11))
    assert sum(pair_of(d).rank for d in state_of(model).adapter("default").deltas.values()) == 24


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize("settings", [{}, {"delta": "dora"}, {"init": "gaussian"}])
def test_it_learns(settings: dict[str, Any]) -> None:
    loop = tiny_run(steps=24, rank=1, ranks=RANKS, train={"accumulate": 2, "batch_size": 4}, **settings)
    assert falls(loop.run().losses)
