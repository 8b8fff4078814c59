"""BO-REP: against the exact hypergradient of quadratics, its schedule, and two real uses with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import DivergedError, TargetError, TrainingError
from rankworks.optim.bo_rep import Bilevel
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_bert_classifier, tiny_llama
from train.training import adapted, make_loop, weights


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Quadratic:
    """g = y'Hy/2 - y'(Mx + b), so y*(x) = H^-1 (Mx + b);  f = |y - c|^2/2 + |x - d|^2/2 + x'Ny."""

    def __init__(self, n: int = 3, m: int = 4):
        root = draw(m, m, seed=1)
        self.H = root @ root.t() / m + torch.eye(m, dtype=torch.float64)
        self.M, self.N, self.b, self.c, self.d = (
            draw(m, n, seed=2),
            draw(n, m, seed=3) / 10,
            draw(m, seed=4),
            draw(m, seed=5),
            draw(n, seed=6),
        )
        self.x, self.y = nn.Parameter(draw(n, seed=7)), nn.Parameter(draw(m, seed=8))
        self.lower_calls = 0

    def f_of(self, x: Tensor, y: Tensor) -> Tensor:
        return (y - self.c).square().sum() / 2 + (x - self.d).square().sum() / 2 + x @ self.N @ y

    def f(self) -> Tensor:
        return self.f_of(self.x, self.y)

    def g(self) -> Tensor:
        self.lower_calls += 1
        return self.y @ self.H @ self.y / 2 - self.y @ (self.M @ self.x + self.b)

    def best(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.H, self.M @ x + self.b)

    def value(self, x: Tensor) -> Tensor:
        return self.f_of(x, self.best(x))

    def slope(self) -> Tensor:
        """The exact derivative of f(x, y*(x)), by autograd through the solution."""
        x = self.x.detach().clone().requires_grad_()
        return torch.autograd.grad(self.value(x), x)[0]

    def optimizer(self, **settings: Any) -> Bilevel:
        groups = [{"params": [self.x]}, {"params": [self.y], "lower": True, "lr": settings.pop("lower_lr", 0.3)}]
        return Bilevel(groups, **{"lr": 0.0, "nu": 0.3, "beta": 0.0, **settings})


def test_with_the_upper_level_at_rest_z_and_h_become_exact() -> None:
    """z -> H^-1 grad_y f and h -> d f(x, y*(x))/dx, to float64's rounding."""
    task = Quadratic()
    optimizer = task.optimizer()
    for _ in range(600):
        optimizer.step(task.f, task.g)
    torch.testing.assert_close(task.y.detach(), task.best(task.x.detach()), atol=1e-12, rtol=0)
    of_y = task.y.detach() - task.c + task.N.t() @ task.x.detach()
    z = optimizer.state[task.y]["z"]
    torch.testing.assert_close(z, torch.linalg.solve(task.H, of_y), atol=1e-12, rtol=0)
    torch.testing.assert_close(optimizer.state[task.x]["momentum"], task.slope(), atol=1e-12, rtol=0)


def test_one_step_by_hand() -> None:
    task = Quadratic()
    H, M, N, b, c, d = task.H, task.M, task.N, task.b, task.c, task.d
    x, y = task.x.detach().clone(), task.y.detach().clone()
    z, u = torch.zeros(4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    optimizer = task.optimizer(lr=0.2, nu=0.1, beta=0.9, interval=2, lower_steps=1, warm_start=2, lower_lr=0.05)
    for t in range(5):
        told = optimizer.step(task.f, task.g)
        if t % 2 == 0:
            for _ in range(1 if t else 2):
                y = y - 0.05 * (H @ y - M @ x - b)
        torch.testing.assert_close(told, task.f_of(x, y), atol=1e-12, rtol=0)
        z = z - 0.1 * (H @ z - (y - c + N.t() @ x))
        h = (x - d + N @ y) + M.t() @ z  # grad_xy g = -M'
        u = 0.9 * u + 0.1 * h
        x = x - 0.2 * u / (u.norm() + 1e-10)
        torch.testing.assert_close(task.y.detach(), y, atol=1e-12, rtol=0)
        torch.testing.assert_close(task.x.detach(), x, atol=1e-12, rtol=0)


def test_every_step_has_the_length_of_the_rate() -> None:
    task = Quadratic()
    optimizer = task.optimizer(lr=0.07, beta=0.9)
    for _ in range(10):
        before = task.x.detach().clone()
        optimizer.step(task.f, task.g)
        assert float((task.x.detach() - before).norm()) == pytest.approx(0.07, rel=1e-8)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_the_lower_level_is_fitted_every_so_often_and_warm_at_first(interval: int) -> None:
    task = Quadratic()
    optimizer = task.optimizer(lr=0.05, interval=interval, lower_steps=3, warm_start=10)
    for t in range(11):
        before, calls = task.y.detach().clone(), task.lower_calls
        optimizer.step(task.f, task.g)
        fitted = t % interval == 0
        assert torch.equal(task.y, before) != fitted
        assert task.lower_calls - calls == 1 + (10 if t == 0 else 3) * fitted


def test_it_solves_both_levels() -> None:
    task = Quadratic()
    start = task.x.detach().clone()
    optimizer = task.optimizer(lr=0.05, beta=0.9, interval=2)
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.99**step
        optimizer.step(task.f, task.g)
    assert float(task.slope().norm()) < 1e-3
    assert float(task.value(task.x.detach())) < float(task.value(start)) - 1


def test_with_one_closure_x_moves_as_if_y_were_fitted() -> None:
    """Both levels see g: the hypergradient is that of min_y g(x, y), grad_x g at the solution."""
    task = Quadratic()
    optimizer = task.optimizer()
    for _ in range(400):
        optimizer.step(task.g)
    x = task.x.detach().clone().requires_grad_()
    y = task.best(x)
    least = y @ task.H @ y / 2 - y @ (task.M @ x + task.b)
    wanted = torch.autograd.grad(least, x)[0]
    torch.testing.assert_close(optimizer.state[task.x]["momentum"], wanted, atol=1e-12, rtol=0)


def test_decay_of_the_lower_level_is_a_penalty_of_g_and_that_of_the_upper_is_decoupled() -> None:
    penalised, plain = Quadratic(), Quadratic()
    plain.H = plain.H + 0.4 * torch.eye(4, dtype=torch.float64)
    ends = []
    for task, decay in ((penalised, 0.4), (plain, 0.0)):
        optimizer = task.optimizer(lr=0.1, beta=0.5)
        optimizer.param_groups[1]["weight_decay"] = decay
        for _ in range(6):
            optimizer.step(task.f, task.g)
        ends.append((task.x.detach(), task.y.detach()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    decayed, plain = Quadratic(), Quadratic()
    for task, decay in ((decayed, 0.5), (plain, 0.0)):
        optimizer = task.optimizer(lr=0.1)
        optimizer.param_groups[0]["weight_decay"] = decay
        optimizer.step(task.f, task.g)
    torch.testing.assert_close(decayed.x.detach(), plain.x.detach() * (1 - 0.1 * 0.5), atol=1e-12, rtol=0)


def test_losses_that_do_not_depend_on_a_level() -> None:
    """f without x, as in choosing a hyperparameter; g linear in y, which has no curvature: z grows, nothing breaks."""
    x, y = nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.ones(3).double())
    optimizer = Bilevel([{"params": [x]}, {"params": [y], "lower": True}], lr=0.1, nu=0.5, beta=0.0)
    optimizer.step(lambda: y.square().sum(), lambda: x.sum() * y.square().sum() / 2)
    assert optimizer.state[x]["momentum"].norm() > 0
    x, y = nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.ones(3).double())
    optimizer = Bilevel([{"params": [x]}, {"params": [y], "lower": True, "lr": 0.0}], lr=0.1, nu=0.5, beta=0.0)
    optimizer.step(lambda: y.square().sum() + x.sum(), lambda: y.sum())
    torch.testing.assert_close(optimizer.state[y]["z"], torch.ones(3).double())
    torch.testing.assert_close(optimizer.state[x]["momentum"], torch.ones(2).double())


def test_what_it_refuses() -> None:
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(TrainingError, match="two levels"):
        Bilevel([x])
    task = Quadratic()
    with pytest.raises(TrainingError, match=r"step\(upper, lower\)"):
        task.optimizer().step()
    before = task.x.detach().clone(), task.y.detach().clone()
    with pytest.raises(DivergedError, match="lower loss became nan"):
        task.optimizer().step(task.f, lambda: task.y.sum() * torch.nan)
    with pytest.raises(DivergedError, match="upper loss became inf"):
        task.optimizer(lower_lr=0.0).step(lambda: task.y.sum() * 0 + torch.inf, task.g)
    assert torch.equal(task.x, before[0])
    assert torch.equal(task.y, before[1])
    for lower in ("nothing", "*"):
        with pytest.raises(TargetError, match="at two levels"):
            rw.make_optimizer(adapted(), "bo-rep", lower=lower)


# ---- models ------------------------------------------------------------------------------------------------------


def levels(optimizer: torch.optim.Optimizer) -> tuple[set[str], set[str]]:
    lower = {n for g in optimizer.param_groups if g["lower"] for n in g["names"]}
    return lower, {n for g in optimizer.param_groups if not g["lower"] for n in g["names"]}


def test_the_lower_parameters_are_the_last_layers_or_those_that_are_named() -> None:
    model = rw.adapt(tiny_bert_classifier(), "lora", rank=2, full=["classifier"])
    lower, upper = levels(rw.make_optimizer(model, "bo-rep", lr=0.1))
    assert len(lower) == 2
    assert all(name.startswith("classifier") for name in lower)
    assert not any(name.startswith("classifier") for name in upper)
    assert levels(rw.make_optimizer(model, "bo-rep", lower="classifier"))[0] == lower
    optimizer = rw.make_optimizer(adapted(), "bo-rep", lr=0.1, lower="*.B")
    lower, upper = levels(optimizer)
    assert {n[-1] for n in lower} == {"B"}
    assert {n[-1] for n in upper} == {"A"}
    assert {g["lower"]: g["lr"] for g in optimizer.param_groups} == {True: pytest.approx(0.01), False: 0.1}
    lower, _ = levels(rw.make_optimizer(adapted(), "bo-rep"))
    assert {name.split(".adapters")[0] for name in lower} == {"model.layers.1.mlp.down_proj"}


def texts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token sequences of three classes: each has favourite tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    ids = torch.randint(60, 300, (count, 10), generator=generator)
    favourites = torch.randint(3, 20, (count, 10), generator=generator) + 18 * labels.unsqueeze(1)
    return torch.where(torch.rand(count, 10, generator=generator) < 0.5, favourites, ids), labels


def test_hyper_representation_with_lora_on_a_classifier() -> None:
    """The adapter (upper) is judged on one set by a head (lower) that is fitted to another.

    The rate of the adapter falls to zero: steps of a fixed length do not come to rest.
    """
    model = rw.adapt(tiny_bert_classifier(layers=1), "lora", rank=4, full=["classifier"], seed=0)
    optimizer: Any = rw.make_optimizer(model, "bo-rep", lr=0.3, ratio=1.0, lower="classifier", nu=0.1)

    def loss(data: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(input_ids=data[0]).logits, data[1])

    test = texts(60, 99)
    with torch.no_grad():
        first = float(loss(test))
    for step in range(40):
        for group in optimizer.param_groups:
            group["lr"] = 0.3 if group["lower"] else 0.3 * (1 - step / 40)
        support, query = texts(48, 2 * step), texts(48, 2 * step + 1)
        optimizer.step(lambda query=query: loss(query), lambda support=support: loss(support))
    with torch.no_grad():
        accuracy = (model(input_ids=test[0]).logits.argmax(-1) == test[1]).float().mean()
        assert float(loss(test)) < 0.7 * first
    assert accuracy > 0.6, "a third is chance, and what a head on the frozen base stays near"


def test_reweighting_learns_to_leave_out_wrong_examples() -> None:
    """The weights of the examples (upper) are trained such that a LoRA (lower) trained on them does well on clean ones.

    A third of the labels are wrong; nobody says which.
    """
    model = rw.adapt(tiny_bert_classifier(layers=1), "lora", rank=4, full=["classifier"], seed=0)
    ids, right = texts(24, 1)
    wrong = torch.arange(24) < 8
    noisy = torch.where(wrong, (right + 1) % 3, right)
    clean = texts(48, 2)
    w = nn.Parameter(torch.zeros(24))
    trained = [p for p in model.parameters() if p.requires_grad]
    lower_level = {"params": trained, "lower": True, "lr": 0.5, "weight_decay": 1e-2}
    optimizer = rw.Bilevel([{"params": [w]}, lower_level], lr=0.3, nu=0.1, interval=1, warm_start=20)

    def lower() -> Tensor:
        losses = F.cross_entropy(model(input_ids=ids).logits, noisy, reduction="none")
        return (w.sigmoid() * losses).mean()

    for _ in range(40):
        optimizer.step(lambda: F.cross_entropy(model(input_ids=clean[0]).logits, clean[1]), lower)
    assert w[~wrong].mean() > w[wrong].mean() + 0.5


@pytest.mark.parametrize("model", ["whole", "adapter"])
def test_the_own_loop_trains_with_it(model: str) -> None:
    """Both levels on the loop's loss, also of a language model, whose loss then has a second derivative."""
    made: Any = tiny_llama(layers=1) if model == "whole" else adapted(layers=1)
    loop = make_loop(made, steps=8, name="bo-rep", lr=0.3, batch_size=24, options={"ratio": 1.0}, schedule="constant")
    losses = loop.run().losses
    assert losses[-1] < losses[0] - 0.05


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": "bo-rep", "lr": 0.1, "options": {"interval": 3}, "save_every": 2, "steps": 6}
    whole = make_loop(adapted(attention_dropout=0.2), tmp_path, **settings)
    torch.manual_seed(1)
    whole.run()
    again = make_loop(adapted(attention_dropout=0.2), tmp_path, **settings)
    assert again.restore()
    assert again.step == 4
    assert again.run().losses == whole.history.losses
    for name, tensor in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], tensor), name


def test_its_state_is_one_number_for_each() -> None:
    model = open_source("llama-130m", "bfloat16").model.requires_grad_(True)
    assert optimizer_bytes("bo-rep", model) == 2 * sum(p.numel() for p in model.parameters()) == 268_211_712
