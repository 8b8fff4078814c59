"""ALLoRA: rows of the gradient times a factor that falls with the norm of the change's row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairing import draw, matrices
from torch import Tensor, nn
from training import make_loop, weights

import rankworks as rw
from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.forms.lowrank import Factored
from rankworks.core.hooks import Moment
from rankworks.core.optim.pairs import trained_pairs
from rankworks.optim.allora import row_factors
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_llama, tiny_moe, token_batch

EXACT = {"atol": 1e-12, "rtol": 0}
X, TARGET = draw(20, 9, seed=1), draw(20, 7, seed=2)


def one_layer(delta: str = "lora", **settings: Any) -> Any:
    """A linear layer 9 -> 7 with a change that is not zero."""
    torch.manual_seed(0)
    model = rw.adapt(nn.Sequential(nn.Linear(9, 7)).double(), delta, **{"rank": 3, "alpha": 3, **settings}, targets="0")
    with torch.no_grad():
        trained_pairs(model)[0].pair.B.copy_(draw(7, 3, seed=3))
    return model


def step(model: Any, optimizer: Any, x: Tensor = X, act: bool = True) -> Tensor:
    """One step with hooks; returns the gradient of x."""
    x = x.clone().requires_grad_()
    moment = Moment(model, optimizer, 1, 1)
    model.train()
    optimizer.zero_grad()
    for hook in optimizer.method_hooks:
        hook.before_forward(moment)
    (model(x) - TARGET).square().sum().backward()
    for hook in optimizer.method_hooks:
        hook.after_backward(moment)
    if act:
        optimizer.step()
    for hook in optimizer.method_hooks:
        hook.after_step(moment)
    assert x.grad is not None
    return x.grad


def closed_form(model: Any, eta: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """gA and gB of scaled rows, and c, from G."""
    pair = trained_pairs(model)[0].pair
    A, B, s = pair.A.detach(), pair.B.detach(), pair.scale
    G = 2 * (model(X) - TARGET).detach().t() @ X
    c = 1 / ((s * B @ A).norm(dim=1) + eta**-2).sqrt()
    scaled = c.unsqueeze(1) * G
    return s * B.t() @ scaled, s * scaled @ A.t(), c


@pytest.mark.parametrize("s", [1.0, 1.7])
def test_gradients_are_those_of_scaled_rows_and_that_of_the_input_is_plain(s: float) -> None:
    model = one_layer(alpha=3 * s)
    wanted_a, wanted_b, _ = closed_form(model)
    of_x = step(model, rw.make_optimizer(model, "allora"), act=False)
    pair = trained_pairs(model)[0].pair
    torch.testing.assert_close(pair.A.grad, wanted_a, **EXACT)
    torch.testing.assert_close(pair.B.grad, wanted_b, **EXACT)
    plain = step(model, rw.make_optimizer(model, "adamw"), act=False)
    torch.testing.assert_close(of_x, plain, **EXACT)
    assert (pair.A.grad - wanted_a).abs().max() > 1e-3, "and plain LoRA's are others"


def test_at_the_start_every_factor_is_eta_and_it_falls_with_the_norm() -> None:
    torch.testing.assert_close(row_factors(torch.zeros(4), 2.0), torch.full((4,), 2.0))
    c = row_factors(torch.linspace(0, 100, 50, dtype=torch.float64).square(), 2.0)
    assert (c.diff() < 0).all()
    torch.testing.assert_close(c[-1], torch.tensor(100.25, dtype=torch.float64).rsqrt(), **EXACT)
    model = one_layer()
    with torch.no_grad():
        trained_pairs(model)[0].pair.B.zero_()
    hook: Any = rw.make_optimizer(model, "allora", eta=3.0).method_hooks[0]  # type: ignore[attr-defined]
    assert torch.equal(hook.factors_of(hook.places[0]), torch.full((7,), 3.0, dtype=torch.float64))


def test_row_norms_come_from_the_gram_matrix() -> None:
    model = one_layer()
    hook: Any = rw.make_optimizer(model, "allora").method_hooks[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(hook.factors_of(hook.places[0]), closed_form(model)[2], atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("apply", ["grad", "lr"])
@pytest.mark.parametrize("rows", ["BA", "B"])
def test_as_eta_vanishes_it_is_lora_at_a_rate_times_eta(rows: str, apply: str) -> None:
    """Under SGD, from B = 0, whose A has no gradient."""
    ends, eta = [], 1e-3
    for key, lr, settings in (("allora", 1.0, {"eta": eta, "rows": rows, "apply": apply}), ("sgd", eta, {})):
        model = one_layer()
        with torch.no_grad():
            trained_pairs(model)[0].pair.B.zero_()
        step(model, rw.make_optimizer(model, key, lr=lr, **settings, **({"base": "sgd"} if key == "allora" else {})))
        ends.append(trained_pairs(model)[0].pair.B.detach())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-12, rtol=1e-9)


def test_rows_without_gradient_stay() -> None:
    model = one_layer()
    pair = trained_pairs(model)[0].pair
    B = pair.B.detach().clone()
    optimizer = rw.make_optimizer(model, "allora", lr=0.1, base="sgd")
    moment = Moment(model, optimizer, 1, 1)
    model.train()
    (hook,) = optimizer.method_hooks  # type: ignore[attr-defined]
    hook.before_forward(moment)
    (model(X) - TARGET)[:, :4].square().sum().backward()
    optimizer.step()
    assert torch.equal(pair.B[4:], B[4:])
    assert (pair.B[:4] != B[:4]).all()


def test_rows_of_b_scale_its_gradient_alone() -> None:
    model, plain = one_layer(), one_layer()
    step(model, rw.make_optimizer(model, "allora", rows="B"), act=False)
    step(plain, rw.make_optimizer(plain, "adamw"), act=False)
    pair, other = trained_pairs(model)[0].pair, trained_pairs(plain)[0].pair
    assert torch.equal(pair.A.grad, other.A.grad)  # type: ignore[arg-type]
    c = (pair.B.detach().norm(dim=1) + 0.25).rsqrt()
    torch.testing.assert_close(pair.B.grad, c.unsqueeze(1) * other.B.grad, **EXACT)


def test_under_adam_a_rate_of_rows_multiplies_the_step_and_a_factor_of_rows_cancels() -> None:
    """Adam's first step has one size everywhere; with apply="lr" row i of B moves c_i times as far."""
    moved = {}
    for apply in ("grad", "lr"):
        model = one_layer()
        c = closed_form(model)[2]
        pair = trained_pairs(model)[0].pair
        B, A = pair.B.detach().clone(), pair.A.detach().clone()
        step(model, rw.make_optimizer(model, "allora", lr=1e-3, apply=apply, eps=1e-30))
        moved[apply] = (pair.B.detach() - B).abs()
        torch.testing.assert_close((pair.A.detach() - A).abs(), torch.full_like(A, 1e-3), atol=1e-9, rtol=0)
    torch.testing.assert_close(moved["grad"], torch.full((7, 3), 1e-3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(moved["lr"], 1e-3 * c.unsqueeze(1).expand(7, 3), atol=1e-9, rtol=0)


def test_with_sgd_both_ways_agree_for_b() -> None:
    ends = []
    for apply in ("grad", "lr"):
        model = one_layer()
        step(model, rw.make_optimizer(model, "allora", lr=0.01, apply=apply, base="sgd"))
        ends.append(trained_pairs(model)[0].pair.B.detach())
    torch.testing.assert_close(ends[0], ends[1], **EXACT)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_model_computes_what_it_did(init: str) -> None:
    """A change of zero stays zero to the bit with its amended factors, which are gone after the step."""
    model, plain = (rw.adapt(tiny_llama(), "lora", rank=4, init=init) for _ in range(2))
    ids = token_batch(vocab=320)
    optimizer: Any = rw.make_optimizer(model, "allora")
    model.train()
    optimizer.method_hooks[0].before_forward(Moment(model, optimizer, 1, 1))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    optimizer.method_hooks[0].after_step(Moment(model, optimizer, 1, 1))
    assert all(m.amended is None for m in model.modules() if isinstance(m, Factored))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("delta", ["lora", "dora", "gated"])
def test_around_and_inside_other_deltas_only_gradients_change(delta: str, dropout: float) -> None:
    """Losses are LoRA's; gradients are others."""
    ids = token_batch(vocab=320)
    losses, gradients = [], []
    for key in ("allora", "adamw"):
        model = rw.adapt(tiny_llama(), delta, rank=4, dropout=dropout, init="pissa").train()
        with torch.no_grad():
            for found in trained_pairs(model):
                found.pair.B.mul_(1.5)
        optimizer: Any = rw.make_optimizer(model, key)
        for hook in optimizer.method_hooks:
            hook.before_forward(Moment(model, optimizer, 1, 1))
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name in matrices(model, (".A", ".B")):  # type: ignore[arg-type]
        assert (gradients[0][name] - gradients[1][name]).norm() > 1e-2 * gradients[1][name].norm(), name


def test_experts_whose_change_is_a_matrix_are_scaled_too() -> None:
    model = rw.adapt(tiny_moe(), "lora", rank=2, targets="model.layers.0.mlp.experts.down_proj").train()
    with torch.no_grad():
        for found in trained_pairs(model):
            found.pair.B.normal_(generator=torch.Generator().manual_seed(0))
    ids = token_batch(vocab=320)
    gradients = []
    for key in ("allora", "adamw"):
        optimizer: Any = rw.make_optimizer(model, key)
        optimizer.zero_grad()
        for hook in optimizer.method_hooks:
            hook.before_forward(Moment(model, optimizer, 1, 1))
        model(input_ids=ids, labels=ids).loss.backward()
        pair = trained_pairs(model)[0].pair
        gradients.append(pair.B.grad.clone())  # type: ignore[union-attr]
        c = ((pair.scale * pair.B @ pair.A).norm(dim=1) + 0.25).rsqrt().detach()
    torch.testing.assert_close(gradients[0], c.unsqueeze(1) * gradients[1], atol=1e-6, rtol=1e-4)  # in float32


@pytest.mark.parametrize("settings", [{}, {"apply": "lr"}, {"rows": "B"}])
def test_a_run_learns_and_resumes_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "allora", "lr": 1e-2, "steps": 8, "accumulate": 2, "options": settings}
    whole = make_loop(**options)
    losses = whole.run().losses
    assert sum(losses[-3:]) < sum(losses[:3])
    make_loop(**options, save_every=3, folder=tmp_path).run()
    later = make_loop(**options, save_every=3, folder=tmp_path)
    assert later.restore()
    later.run()
    for key, tensor in weights(whole.model).items():
        assert torch.equal(weights(later.model)[key], tensor), key


def test_at_alpha_equal_to_the_rank_the_export_has_no_scale(tmp_path: Path) -> None:
    model = rw.adapt(tiny_llama(), "lora", rank=4, alpha=4)
    rw.make_optimizer(model, "allora")
    rw.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4


def test_it_keeps_nothing_besides_its_base() -> None:
    model = rw.adapt(tiny_llama(), "lora", rank=4)
    assert optimizer_bytes("allora", model) == optimizer_bytes("adamw", model)
    assert optimizer_bytes({"optimizer": "allora", "base": "sgd"}, model) == 0


def test_it_says_where_it_cannot_go() -> None:
    with pytest.raises(TrainingError, match="ALLoRA works on the two factors"):
        rw.make_optimizer(rw.adapt(tiny_llama(), "vera", rank=4), "allora")
    with pytest.raises(TrainingError, match="leaves no room for that: adapt with lora"):
        rw.make_optimizer(rw.adapt(tiny_llama(), "maestro"), "allora")
    with pytest.raises(ConfigError, match="needs a base that takes a step from gradients"):
        rw.make_optimizer(rw.adapt(tiny_llama(), "lora"), "allora", base="lora-pro")
    with pytest.raises(ConfigError, match="allora steps on several gradients together"):
        make_loop(name="allora", layerwise=True)
