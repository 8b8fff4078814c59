"""LoRA-MGPO: forward and backward at weights one look ahead along the momentum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_hf import check_learned_and_resumed, trained
from loops import check_is_plain_lora, check_perturbs
from pairing import draw
from torch import Tensor, nn
from training import adapted, make_loop

import rankworks as rw
from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.hooks import Moment
from rankworks.core.optim.pairs import trained_pairs
from rankworks.optim.lora_mgpo import moments_of
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_llama, token_batch

EXACT = {"atol": 1e-12, "rtol": 0}
IDS = token_batch(vocab=320)


def one_layer(delta: str = "lora", **settings: Any) -> Any:
    """A linear layer with a change that is not zero."""
    torch.manual_seed(0)
    model = rw.adapt(nn.Sequential(nn.Linear(9, 7)).double(), delta, rank=3, alpha=5, targets="0", **settings).train()
    with torch.no_grad():
        (found,) = trained_pairs(model)
        found.pair.B.copy_(draw(7, 3, seed=3))
        if found.gate is not None:
            found.gate.copy_(torch.tensor([1.0, 0.5, -2.0]))
    return model


class Steps:
    """Steps on the layer, hooks included, one half at a time."""

    def __init__(self, model: Any, **settings: Any):
        self.model, self.done = model, 0
        self.optimizer: Any = rw.make_optimizer(model, "lora-mgpo", lr=1e-2, **settings)
        (self.hook,) = self.optimizer.method_hooks
        (self.place,) = self.hook.places

    @property
    def moment(self) -> Moment:
        return Moment(self.model, self.optimizer, self.done, 99)

    def enter(self) -> Tensor:
        """Begin a step and return e (out, in)."""
        self.done += 1
        self.optimizer.zero_grad()
        self.hook.before_forward(self.moment)
        weight = self.model[0].weight
        return (self.place.factored.acting_dense(weight) - self.place.factored.dense(weight)).detach()

    def leave(self) -> None:
        x, target = draw(20, 9, seed=self.done), draw(20, 7, seed=50)
        (self.model(x) - target).square().sum().backward()
        self.hook.after_backward(self.moment)
        self.optimizer.step()
        self.hook.after_step(self.moment)

    def momentum(self) -> Tensor:
        """v = s (mB D A + B D mA), by definition."""
        found = moments_of(self.place, self.optimizer)
        assert found is not None
        pair, gate = self.place.pair, self.place.gate
        D = torch.eye(3, dtype=torch.float64) if gate is None else gate.detach().diag()
        return (pair.scale * (found[1] @ D @ pair.A + pair.B @ D @ found[0])).detach()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("delta", ["lora", "gated"])
def test_the_perturbation_has_its_size_against_the_momentum(delta: str, init: str, dropout: float) -> None:
    steps = Steps(one_layer(delta, init=init, dropout=dropout), rho=0.3)
    assert not steps.enter().any(), "no moments yet"
    steps.leave()
    for _ in range(3):
        v, gbar = steps.momentum(), steps.hook.mean[steps.place.name]
        e = steps.enter()
        c = min(1 / float(gbar), 10)
        assert float(e.norm()) == pytest.approx(0.3 * c, rel=1e-6)
        torch.testing.assert_close(e, -0.3 * c * v / v.norm(), **EXACT)
        steps.leave()


@pytest.mark.parametrize("base", ["adamw", {"optimizer": "sgd", "momentum": 0.9}])
def test_any_base_with_a_momentum_will_do(base: Any) -> None:
    steps = Steps(one_layer(), base=base)
    steps.enter()
    steps.leave()
    v = steps.momentum()
    e = steps.enter()
    assert float((e * v).sum() / (e.norm() * v.norm())) == pytest.approx(-1, abs=1e-9)


def test_the_mean_norm_follows_its_average_and_c_has_a_top() -> None:
    steps = Steps(one_layer(), beta=0.8)
    steps.enter()
    x, target, pair, averages = draw(20, 9, seed=1), draw(20, 7, seed=50), steps.place.pair, []
    for size in (1.0, 3.0):
        steps.optimizer.zero_grad()
        (size * (steps.model(x) - target).square().sum()).backward()
        gn = float((pair.scale * (pair.B.grad @ pair.A + pair.B @ pair.A.grad)).detach().norm())
        averages.append(gn if not averages else 0.8 * averages[0] + 0.2 * gn)
        steps.hook.after_backward(steps.moment)
        assert float(steps.hook.mean[steps.place.name]) == pytest.approx(averages[-1], rel=1e-12)
    steps.optimizer.step()
    steps.hook.after_step(steps.moment)
    steps.hook.mean[steps.place.name].fill_(1e-3)
    assert float(steps.enter().norm()) == pytest.approx(0.05 * 10, rel=1e-6)


def test_without_normalising_c_is_one() -> None:
    steps = Steps(one_layer(), rho=0.3, normalise=False)
    steps.enter()
    steps.leave()
    assert float(steps.enter().norm()) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_at_the_perturbed_weight(dropout: float) -> None:
    """Against a base that has e in it: e sees the input without dropout, and no gradient passes through it."""
    steps = Steps(one_layer(dropout=dropout), rho=5.0)
    steps.enter()
    steps.leave()
    e = steps.enter()
    x = draw(20, 9, seed=7)

    def run() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        steps.optimizer.zero_grad()
        torch.manual_seed(0)
        inner = x.clone().requires_grad_()
        loss = (steps.model(inner) - 1).square().sum()
        loss.backward()
        pair = steps.place.pair
        return loss.detach(), pair.A.grad.clone(), pair.B.grad.clone(), inner.grad  # type: ignore[return-value,union-attr]

    found = run()
    steps.hook.on_end(steps.moment)
    plain = run()
    with torch.no_grad():
        steps.model[0].weight += e
    for one, other in zip(found, run(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-12)
    assert (plain[1] - found[1]).abs().max() > 1e-3


def test_a_momentum_of_zero_perturbs_nothing() -> None:
    steps = Steps(one_layer())
    steps.enter()
    steps.leave()
    for factor in (steps.place.pair.A, steps.place.pair.B):
        steps.optimizer.state[factor]["exp_avg"].zero_()
    assert torch.equal(steps.enter(), torch.zeros(7, 9, dtype=torch.float64))


def test_without_size_it_is_lora_bit_for_bit() -> None:
    check_is_plain_lora("lora-mgpo", {"rho": 0.0})


def test_a_run_learns_resumes_bit_for_bit_and_leaves_the_base(tmp_path: Path) -> None:
    check_perturbs(tmp_path, "lora-mgpo", {})


def test_evaluation_is_plain_and_nothing_is_left_between_steps() -> None:
    steps = Steps(one_layer(), rho=5.0)
    steps.enter()
    steps.leave()
    x = draw(5, 9, seed=1)
    plain = steps.model(x)
    steps.enter()
    assert not torch.allclose(steps.model(x), plain)
    assert torch.equal(steps.model.eval()(x), plain)
    steps.hook.after_step(steps.moment)
    assert torch.equal(steps.model.train()(x), plain)


def test_the_hf_trainer(tmp_path: Path) -> None:
    """Resumed from a checkpoint with its hook."""
    options, lengths = {"lr": 1e-2, "rho": 0.5}, {"max_steps": 10, "save_steps": 4}
    model, losses = trained(tmp_path, "lora-mgpo", options, **lengths)
    again, _ = trained(tmp_path, "lora-mgpo", options, resume="checkpoint-4", **lengths)
    check_learned_and_resumed(model, losses, again)


def test_the_exported_adapter_is_plain_lora_and_the_state_the_bases() -> None:
    model = rw.adapt(tiny_llama(), "lora", rank=4)
    assert optimizer_bytes("lora-mgpo", model) == optimizer_bytes("lora-ggpo", model) == optimizer_bytes("adamw", model)


def test_it_says_where_it_cannot_go() -> None:
    with pytest.raises(TrainingError, match="LoRA-MGPO works on the two factors"):
        rw.make_optimizer(tiny_llama(), "lora-mgpo")
    with pytest.raises(ConfigError, match="a momentum above 0"):
        rw.make_optimizer(adapted(), "lora-mgpo", base="sgd")
    with pytest.raises(TrainingError, match="none that has the factors' shape"):
        make_loop(name="lora-mgpo", options={"base": "adafactor"}).run()
