"""SoRA: the proximal step, gates that are zero to the bit, and one model per strength."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import adapted, backward, change_of, close, delta_of, linear, rank_of
from runs import falls, resumes_exactly, tiny_run
from torch import Tensor

import rankworks as rw
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.hooks import Moment, method_hooks
from rankworks.core.ranks.surgery import compact, gated_of, pair_of
from rankworks.core.state import state_of
from rankworks.linalg.threshold import released_threshold, shrink_, soft_threshold
from rankworks.ranks.sora import Proximal, spaced

# ---- the threshold --------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_proximal_point_of_the_l1_norm() -> None:
    x, xi = torch.linspace(-1, 1, 41), 0.3
    z = torch.linspace(-1.5, 1.5, 6001).unsqueeze(1)
    best = z[(0.5 * (z - x) ** 2 + xi * z.abs()).argmin(dim=0), 0]
    assert (soft_threshold(x, xi) - best).abs().max() < 5e-4  # the grid's step


def test_it_gives_exact_zeros_is_odd_and_brings_points_no_further_apart() -> None:
    x, y = torch.randn(200), torch.randn(200)
    a, b = soft_threshold(x, 0.4), soft_threshold(y, 0.4)
    assert torch.equal(a == 0, x.abs() <= 0.4)
    assert torch.equal(soft_threshold(-x, 0.4), -a)
    assert ((a - b).abs() <= (x - y).abs() + 1e-15).all()
    assert torch.equal(soft_threshold(x, 0.0), x)


def test_the_released_threshold_is_zero_below_twice_xi() -> None:
    x = torch.tensor([0.05, 0.15, 0.25, -0.15, -0.25, 0.5])
    close(released_threshold(x, 0.1), torch.tensor([0.0, 0.0, 0.15, 0.0, -0.15, 0.4]))
    assert released_threshold(torch.tensor([0.1, -0.1]), 0.1).tolist() == [0.1, -0.1]
    close(soft_threshold(x, 0.1), torch.tensor([0.0, 0.05, 0.15, -0.05, -0.15, 0.4]))


def test_many_vectors_shrink_at_once() -> None:
    vectors = [torch.randn(3), torch.zeros(0), torch.randn(5)]
    wanted = [soft_threshold(v, 0.2) for v in vectors]
    shrink_(vectors, 0.2)
    for got, want in zip(vectors, wanted, strict=True):
        assert torch.equal(got, want)


def test_gradient_and_proximal_steps_converge_to_the_threshold_of_the_minimum() -> None:
    """min (g - a)^2 / 2 + xi |g| by SGD of rate eta and threshold eta xi."""
    a = torch.tensor([1.0, -0.7, 0.2, -0.1])
    g, eta, xi = torch.randn(4), 0.1, 0.3
    for _ in range(600):
        g = soft_threshold(g - eta * (g - a), eta * xi)
    close(g, soft_threshold(a, xi), 1e-12)


# ---- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"delta": "dora"}, {"delta": "vera"}, {"delta": "lora-xs"}, {"init": "pissa"}]
)
def test_the_start_leaves_the_output_to_the_bit(settings: dict[str, Any]) -> None:
    layer, x = linear(9, 8), torch.randn(4, 9)
    before = layer(x)
    model = adapted(layer, rank=4, ranks="sora", **settings)
    assert torch.equal(model(x), before)
    gate = gated_of(delta_of(model)).gate
    assert bool((gate == 1).all()) == ("init" in settings)
    assert gate.all()


def test_gates_are_standard_normal_and_the_factors_the_initialisers() -> None:
    layer = linear(400, 300)
    plain, sparse = (adapted(layer, rank=64, ranks=r, name=n) for r, n in ((None, "a"), ("sora", "b")))
    assert torch.equal(delta_of(plain, "a").A, pair_of(delta_of(sparse, "b")).A)
    gate = gated_of(delta_of(sparse, "b")).gate.detach()
    assert abs(float(gate.std()) - 1) < 0.3
    assert abs(float(gate.mean())) < 0.4


# ---- a step ---------------------------------------------------------------------------------------------------------


def one(delta: str = "lora", rank: int = 6, **ranks: Any) -> tuple[Any, Proximal]:
    torch.manual_seed(7)
    model = adapted(linear(9, 8), delta, rank=rank, ranks={"ranks": "sora", **ranks})
    (hook,) = method_hooks(model)
    assert isinstance(hook, Proximal)
    return model, hook


def drive(model: Any, hook: Proximal, count: int, steps: int | None = None, lr: float = 0.05, make: Any = None) -> Any:
    """`count` steps of a run of `steps` on one regression."""
    optimizer = (make or torch.optim.SGD)([p for p in model.parameters() if p.requires_grad], lr=lr)
    moment = Moment(model, optimizer, 0, steps or count)
    hook.on_start(moment)
    torch.manual_seed(3)
    x, y = torch.randn(20, 9), torch.randn(20, 8)
    for step in range(1, count + 1):
        moment = Moment(model, optimizer, step, steps or count)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        term = hook.penalty(moment)
        if term is not None:
            term.backward()
        hook.after_backward(moment)
        optimizer.step()
        hook.after_step(moment)
    return moment


@pytest.mark.parametrize("times_rate", [True, False])
@pytest.mark.parametrize("threshold", ["soft", "released"])
def test_a_step_is_the_optimizers_and_then_the_threshold(threshold: str, times_rate: bool) -> None:
    settings = {"strength": 0.8 if times_rate else 0.04, "threshold": threshold, "times_rate": times_rate}
    model, hook = one(**settings)
    plain, idle = one(strength=0.0)
    for m, h in ((model, hook), (plain, idle)):
        drive(m, h, 1)
    stepped = gated_of(delta_of(plain)).gate.detach()
    operator = soft_threshold if threshold == "soft" else released_threshold
    assert torch.equal(gated_of(delta_of(model)).gate, operator(stepped, 0.05 * 0.8 if times_rate else 0.04))
    assert torch.equal(pair_of(delta_of(model)).B, pair_of(delta_of(plain)).B)


def test_a_threshold_of_zero_is_a_lora_with_gates() -> None:
    model, hook = one(strength=0.0)
    other, _ = one()
    other.load_state_dict(model.state_dict())
    drive(model, hook, 5)
    idle = Proximal(hook.schedule, {})
    idle.after_backward = idle.after_step = lambda moment: None  # type: ignore[method-assign]
    drive(other, idle, 5)
    for a, b in zip(delta_of(model).parameters(), delta_of(other).parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_closed_gate_stops_its_factors_gradients_and_may_open_again() -> None:
    model, _ = one()
    delta = delta_of(model)
    with torch.no_grad():
        pair_of(delta).B.normal_()
        gated_of(delta).gate[2] = 0
    backward(model, torch.randn(5, 9))
    pair = pair_of(delta)
    assert not pair.A.grad[2].any()
    assert not pair.B.grad[:, 2].any()
    assert pair.A.grad[[0, 1, 3, 4, 5]].all()
    assert gated_of(delta).gate.grad.all()


def test_the_l1_term_is_the_mean_over_all_gates() -> None:
    model, hook = one(l1=3.0)
    gate = gated_of(delta_of(model)).gate
    moment: Any = None
    term = hook.penalty(moment)
    assert term is not None
    close(term, 3 * gate.abs().mean())
    close(torch.autograd.grad(term, gate)[0], 3 * gate.sign() / 6)
    assert one()[1].penalty(moment) is None


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_the_gates_own_rate_is_that_of_a_group_of_their_own(make: Any) -> None:
    model, hook = one(strength=0.5, gate_rate=0.4)
    other, idle = one(strength=0.0)
    other.load_state_dict(model.state_dict())
    drive(model, hook, 4, lr=0.05, make=make)
    gate = gated_of(delta_of(other)).gate

    def grouped(parameters: list[Tensor], lr: float) -> Any:
        rest = [p for p in parameters if p is not gate]
        return make([{"params": rest, "lr": lr}, {"params": [gate], "lr": 0.02}], lr=lr)

    class Threshold(Proximal):
        def after_step(self, moment: Moment) -> None:
            shrink_([gate], 0.5 * 0.02)

    drive(other, Threshold(idle.schedule, idle.deltas), 4, lr=0.05, make=grouped)
    for a, b in zip(delta_of(model).parameters(), delta_of(other).parameters(), strict=True):
        close(a, b, 1e-12)


# ---- what is left ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_cutting_closed_ranks_leaves_the_output_and_real_ranks(delta: str, tmp_path: Path) -> None:
    model, hook = one(delta, strength=12.0)
    moment = drive(model, hook, 25, lr=0.005)
    x, gate = torch.randn(4, 9), gated_of(delta_of(model)).gate
    kept, y, scale = int(gate.count_nonzero()), model(x).detach(), pair_of(delta_of(model)).scale
    assert 0 < kept < 6
    if delta == "lora":
        assert rank_of(change_of(model)) <= kept
        assert rw.export(model, tmp_path / "lora", kind="lora").sites[0].rank == kept
        close(rw.load(type(model)(_base(model)), tmp_path / "lora")(x), y, 1e-13)
    hook.on_end(moment)
    close(model(x), y, 1e-15)
    assert pair_of(delta_of(model)).rank == len(gated_of(delta_of(model)).gate) == kept
    close(torch.tensor(pair_of(delta_of(model)).scale), torch.tensor(scale), 1e-15)
    assert rw.trainable_parameters(model) == kept * (9 + 8 + 1) + (8 if delta == "dora" else 0)
    assert compact(model) == {"layer": kept}


def _base(model: Any) -> torch.nn.Linear:
    layer = torch.nn.Linear(9, 8)
    with torch.no_grad():
        layer.weight.copy_(model.layer.weight)
        layer.bias.copy_(model.layer.bias)
    return layer


def test_cutting_is_exact_where_sums_are() -> None:
    """In whole numbers no sum depends on its order, and the scale 8/8 is 3/3 too: the same bits."""
    model, hook = one(rank=8)
    delta = delta_of(model)
    with torch.no_grad():
        for p in delta.parameters():
            p.copy_(torch.randint(-3, 4, p.shape))
        gated_of(delta).gate[[1, 4, 5, 6, 7]] = 0
        model.layer.weight.copy_(torch.randint(-3, 4, (8, 9)))
    x = torch.randint(-3, 4, (5, 9)).double()
    before = model(x).detach()
    compact(model)
    assert torch.equal(model(x), before)
    assert hook.deltas["layer"] is delta


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_strengths_between() -> None:
    close(torch.tensor(spaced(0.0, 6.0, 4, "linear")), torch.tensor([0.0, 2, 4, 6]))
    close(torch.tensor(spaced(1.0, 8.0, 4, "geometric")), torch.tensor([1.0, 2, 4, 8]))
    logs = torch.tensor(spaced(0.5, 2.0, 5, "log"))
    close(logs.exp().diff(), torch.full((4,), float(logs.exp()[-1] - logs.exp()[0]) / 4))
    close(logs[[0, -1]], torch.tensor([0.5, 2.0]))


def test_every_stage_has_its_strength_and_its_own_learning_rate_schedule(tmp_path: Path) -> None:
    model, hook = one(strength=0.2, strongest=0.8, stages=3, first=0.5, keep=str(tmp_path / "models"))
    assert hook.ends(12) == [6, 9, 12]
    assert [hook.stage(s, 12) for s in (1, 6, 7, 9, 10, 12)] == [
        (0, 0, 6), (0, 5, 6), (1, 0, 3), (1, 2, 3), (2, 0, 3), (2, 2, 3),
    ]  # fmt: skip
    seen: list[tuple[float, int]] = []
    after = hook.after_step

    def noting(moment: Moment) -> None:
        after(moment)
        seen.append((moment.optimizer.param_groups[0]["lr"] / 0.05, hook.stage(moment.step, 12)[0]))

    hook.after_step = noting  # type: ignore[method-assign]
    drive(model, hook, 12, lr=0.05)
    wanted = [*(1 - i / 6 for i in range(6)), *(1 - i / 3 for i in range(3)), *(1 - i / 3 for i in range(3))]
    close(torch.tensor([rate for rate, _ in seen]), torch.tensor(wanted))
    close(torch.tensor([hook.strengths[s] for _, s in seen]), torch.tensor([0.2] * 6 + [0.5] * 3 + [0.8] * 3))
    kept = [rw.load(type(model)(_base(model)), tmp_path / "models" / f"stage-{i}") for i in (1, 2, 3)]
    assert torch.equal(change_of(kept[2]), change_of(model))
    assert not torch.equal(change_of(kept[0]), change_of(kept[1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 3}, "to ranks.strongest None in 3 stages"),
        ({"stages": 3, "strength": 2.0, "strongest": 1.0}, "give a strongest that is larger"),
        ({"stages": 3, "strength": 0.0, "strongest": 1.0, "spacing": "geometric"}, "no geometric sequence starts at 0"),
    ],
)
def test_strengths_that_make_no_sequence_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        one(**settings)


def test_more_stages_than_steps_are_refused() -> None:
    model, hook = one(strength=0.1, strongest=1.0, stages=5)
    with pytest.raises(ConfigError, match="5 stages do not fit into 4 steps"):
        drive(model, hook, 4)


def test_a_change_without_factors_is_refused() -> None:
    with pytest.raises(TargetError, match=r"gates stand between two factors.*choose lora"):
        adapted(linear(8, 8), "shira", ranks="sora")


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _single() -> Any:
    torch.set_default_dtype(torch.float32)


STAGED = {"ranks": "sora", "strength": 2.0, "strongest": 20.0, "stages": 3, "gate_rate": 2.0}


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize("ranks", ["sora", STAGED])
def test_a_run_cut_off_in_mid_schedule_goes_on_bit_for_bit(ranks: Any, tmp_path: Path) -> None:
    model = resumes_exactly(tmp_path, lambda f, **k: tiny_run(f, rank=6, ranks=ranks, **k), (5, 11))
    if ranks is STAGED:
        assert min(pair_of(d).rank for d in state_of(model).adapter("default").deltas.values()) < 6


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize(
    "settings", [{}, {"delta": "dora"}, {"delta": "vera"}, {"init": "pissa"}, {"ranks": STAGED, "delta": "dora"}]
)
def test_it_learns(settings: dict[str, Any]) -> None:
    assert falls(tiny_run(steps=24, **{"rank": 6, "ranks": "sora", **settings}).run().losses)
