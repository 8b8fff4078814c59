"""Riemannian preconditioned LoRA: each factor's gradient divided by the other's Gram matrix, whatever steps on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training import adapted, make_loop, weights

import rankworks as rw
from rankworks.core.errors import TrainingError
from rankworks.core.optim.pairs import trained_pairs
from rankworks.train.layerwise import Layerwise
from tiny import tiny_llama, token_batch

IDS = token_batch(vocab=320)


def pairs_of(model: nn.Module) -> list[Any]:
    return [pair for _, pair, _ in trained_pairs(model)]


def shaken(rank: int = 4, **settings: Any) -> Any:
    """A model with LoRA in float64 whose B's are not zero."""
    model = rw.adapt(tiny_llama(), "lora", **{"rank": rank, "seed": 1, **settings}).double()
    generator = torch.Generator().manual_seed(3)
    for pair in pairs_of(model):
        pair.B.data.normal_(generator=generator).mul_(0.1)
    return model


def backward(model: Any) -> Any:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss


def test_the_gradients_are_divided_by_the_other_factors_gram_matrix() -> None:
    model = shaken()
    optimizer = rw.make_optimizer(model, "riemannian", lr=0.1, base="sgd", reg=0.05)
    backward(model)
    before = [(p.A.detach().clone(), p.B.detach().clone(), p.A.grad.clone(), p.B.grad.clone()) for p in pairs_of(model)]
    optimizer.step()
    eye = torch.eye(4, dtype=torch.float64)
    for pair, (A, B, gA, gB) in zip(pairs_of(model), before, strict=True):
        torch.testing.assert_close(pair.A, A - 0.1 * (B.t() @ B + 0.05 * eye).inverse() @ gA, atol=1e-12, rtol=0)
        torch.testing.assert_close(pair.B, B - 0.1 * gB @ (A @ A.t() + 0.05 * eye).inverse(), atol=1e-12, rtol=0)


def test_the_step_is_that_of_the_projected_gradient_however_the_product_is_divided() -> None:
    """s^2 (P_B G + G P_A) / s with G the gradient of W, for B A and for (B M^-1)(M A), as reg goes to zero."""
    found = []
    for turned in (False, True):
        model = shaken()
        if turned:
            generator = torch.Generator().manual_seed(8)
            for pair in pairs_of(model):
                M = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4, dtype=torch.float64)
                pair.A.data = M @ pair.A.data
                pair.B.data = pair.B.data @ M.inverse()
        starts = [(p.A.detach().clone(), p.B.detach().clone()) for p in pairs_of(model)]
        optimizer = rw.make_optimizer(model, "riemannian", lr=1.0, base="sgd", reg=1e-13)
        layer = model.model.layers[0].self_attn.q_proj
        layer.weight.requires_grad_(True)  # not in the optimizer: it only shows its gradient
        backward(model)
        G = layer.weight.grad
        optimizer.step()
        here = []
        for pair, (A, B) in zip(pairs_of(model), starts, strict=True):
            dA, dB = pair.A.detach() - A, pair.B.detach() - B
            here.append(dB @ A + B @ dA)
        first = pairs_of(model)[0]
        A, B = starts[0]
        P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
        torch.testing.assert_close(here[0], -first.scale * (P_B @ G + G @ P_A), atol=1e-7, rtol=1e-6)
        found.append(here)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


def test_a_large_reg_leaves_adamw() -> None:
    """Gradients divided by one number are the same to Adam, whose eps is zero here."""
    models = [shaken(), shaken()]
    made = [
        rw.make_optimizer(models[0], "riemannian", lr=1e-3, reg=1e12, eps=1e-30),
        rw.make_optimizer(models[1], "adamw", lr=1e-3, eps=1e-30),
    ]
    for model, optimizer in zip(models, made, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_at_the_start_b_moves_and_a_does_not() -> None:
    model = rw.adapt(tiny_llama(), "lora", rank=4)
    starts = [(p.A.detach().clone(), p.B.detach().clone()) for p in pairs_of(model)]
    optimizer = rw.make_optimizer(model, "riemannian", lr=1e-3)
    backward(model)
    optimizer.step()
    for pair, (A, B) in zip(pairs_of(model), starts, strict=True):
        assert torch.equal(pair.A, A)
        assert not torch.equal(pair.B, B)


def test_a_closure_is_evaluated_before_its_gradients_are_changed() -> None:
    models = [shaken(), shaken()]
    made = [rw.make_optimizer(model, "riemannian", lr=1e-2) for model in models]

    def closure() -> Any:
        made[0].zero_grad()
        return backward(models[0])

    for _ in range(3):
        made[0].step(closure)
        made[1].zero_grad()
        backward(models[1])
        made[1].step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_what_is_in_no_pair_has_the_bases_steps() -> None:
    """Magnitudes of DoRA; in bfloat16 factors keep their type."""
    models = [rw.adapt(tiny_llama(), "dora", rank=4) for _ in range(2)]
    for model, name in zip(models, ("riemannian", "adamw"), strict=True):
        optimizer = rw.make_optimizer(model, name, lr=1e-3)
        backward(model)
        optimizer.step()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if name.endswith(".m"):
            assert torch.equal(one, other)
    model = rw.adapt(tiny_llama().bfloat16(), "lora", rank=4)
    optimizer = rw.make_optimizer(model, "riemannian", lr=1e-3)
    backward(model)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_where_it_cannot_work_it_says_so() -> None:
    with pytest.raises(TrainingError, match="choose adamw"):
        rw.make_optimizer(tiny_llama(), "riemannian")
    with pytest.raises(TrainingError, match="gates"):
        rw.make_optimizer(rw.adapt(tiny_llama(), "lora", rank=4, ranks="sora"), "riemannian")
    with pytest.raises(Exception, match="layerwise=false"):
        Layerwise(rw.make_optimizer(adapted(), "riemannian"), "riemannian", [], 1)


@pytest.mark.parametrize("options", [{}, {"base": "sgd", "momentum": 0.9, "reg": 0.1}], ids=str)
def test_the_loss_falls_in_a_run_that_goes_on_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"name": "riemannian", "options": options, "lr": 1e-2, "batch_size": 24}
    wanted = make_loop(folder=tmp_path / "whole", steps=8, save_every=3, **settings)
    losses = wanted.run().losses
    assert losses[-1] < losses[0] - 0.05, losses
    again = make_loop(folder=tmp_path / "whole", steps=8, save_every=3, **settings)
    assert again.restore()
    assert again.step == 6
    again.run()
    assert all(torch.equal(weights(again.model)[n], t) for n, t in weights(wanted.model).items())


def test_it_follows_ranks_that_change() -> None:
    """LoRA-Squeeze cuts the factors; the pairs are those that stand under their names now."""
    model = rw.adapt(tiny_llama(), "lora", rank=2, ranks={"ranks": "lora-squeeze"})
    before = [pair.A.shape[0] for pair in pairs_of(model)]
    loop = make_loop(model, steps=6, name="riemannian", lr=1e-2)
    loop.run()
    assert before != [pair.A.shape[0] for pair in pairs_of(loop.model)]
