"""LoRA-GGPO: noise on the weights in training forward passes, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import check_is_plain_lora, check_perturbs
from pairing import draw
from torch import Tensor, nn
from training import adapted, make_loop, weights

import rankworks as rw
from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.hooks import Moment
from rankworks.core.kernels import add_noise, noise
from rankworks.core.optim.pairs import trained_pairs
from rankworks.core.optim.thin import product_norm, row_squares
from tiny import tiny_convnet, tiny_llama, token_batch

EXACT = {"atol": 1e-12, "rtol": 0}
IDS = token_batch(vocab=320)


def one_layer(inputs: int = 9, outputs: int = 7) -> Any:
    """A linear layer with a change that is not zero and gradients of both factors."""
    torch.manual_seed(0)
    model = rw.adapt(nn.Sequential(nn.Linear(inputs, outputs)).double(), "lora", rank=3, alpha=5, targets="0").train()
    with torch.no_grad():
        trained_pairs(model)[0].pair.B.copy_(draw(outputs, 3, seed=3))
    return model


def hook_of(model: Any, **settings: Any) -> tuple[Any, Any]:
    """The optimizer and its hook."""
    optimizer: Any = rw.make_optimizer(model, "lora-ggpo", **settings)
    (hook,) = optimizer.method_hooks
    return optimizer, hook


def backward(model: Any) -> Tensor:
    """Leave gradients; return G (out, in)."""
    inputs, outputs = model[0].in_features, model[0].out_features
    x, target = draw(20, inputs, seed=1), draw(20, outputs, seed=2)
    y = model(x)
    (y - target).square().sum().backward()
    return (2 * (y - target)).detach().t() @ x


def norms(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Squared row norms of W0 + s B A without the cross term, with it, and of the surrogate gradient, by definition."""
    pair = trained_pairs(model)[0].pair
    W, A, B, s = model[0].weight.detach(), pair.A.detach(), pair.B.detach(), pair.scale
    g = s * (B @ pair.A.grad + pair.B.grad @ A)
    change = s * B @ A
    return W.square().sum(1) + change.square().sum(1), (W + change).square().sum(1), g.square().sum(1)


def test_the_surrogate_of_the_gradient() -> None:
    """s (B gA + gB A) = s^2 (B B^T G + G A^T A)."""
    model = one_layer()
    G = backward(model)
    pair = trained_pairs(model)[0].pair
    A, B, s = pair.A.detach(), pair.B.detach(), pair.scale
    wanted = s**2 * (B @ B.t() @ G + G @ A.t() @ A)
    torch.testing.assert_close(s * (B @ pair.A.grad + pair.B.grad @ A), wanted, atol=1e-10, rtol=0)
    optimizer, hook = hook_of(model)
    hook.after_backward(Moment(model, optimizer, 1, 9))
    torch.testing.assert_close(hook.of_gradient[hook.places[0].name], wanted.square().sum(1), rtol=1e-12, atol=0)


def test_norms_of_thin_products() -> None:
    P, Q = draw(7, 4, seed=1), draw(4, 9, seed=2)
    torch.testing.assert_close(product_norm(P, Q), (P @ Q).norm(), **EXACT)
    torch.testing.assert_close(row_squares(P, Q), (P @ Q).square().sum(1), **EXACT)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, lambda w, c, g: 0.03 * ((w + 0.01 * g) / 9).sqrt()),
        ({"cross": True}, lambda w, c, g: 0.03 * ((c + 0.01 * g) / 9).sqrt()),
        ({"sigma": 0.1, "beta": 0.0}, lambda w, c, g: 0.1 * (w / 9).sqrt()),  # Flat-LoRA's
        ({"form": "deviation"}, lambda w, c, g: (0.03 * w.sqrt() + 0.01 * g) / 7**0.5),
    ],
)
def test_a_row_has_the_deviation_of_its_formula(settings: dict[str, Any], wanted: Any) -> None:
    model = one_layer()
    backward(model)
    optimizer, hook = hook_of(model, **settings)
    moment = Moment(model, optimizer, 1, 9)
    hook.after_backward(moment)
    tau = hook.amendment(hook.places[0], moment).tau
    torch.testing.assert_close(tau, wanted(*norms(model)), atol=1e-12, rtol=1e-10)


def test_the_noise_that_acts_has_that_deviation() -> None:
    """Rows of 20,000 numbers: the deviation found is within 2 % (four standard errors), the mean near zero."""
    model = one_layer(inputs=20_000, outputs=7)
    optimizer, hook = hook_of(model, beta=0.0, sigma=0.5)
    x = torch.eye(200, 20_000, dtype=torch.float64)
    plain = model(x)
    moment = Moment(model, optimizer, 1, 9)
    hook.before_forward(moment)
    E = (model(x) - plain).detach().t()  # (7, 200) of it
    tau = hook.places[0].factored.amended.tau
    whole = hook.places[0].factored.acting_dense(model[0].weight) - hook.places[0].factored.dense(model[0].weight)
    torch.testing.assert_close(whole.detach().std(dim=1), tau, rtol=0.02, atol=0)
    torch.testing.assert_close(E, whole.detach()[:, :200], **EXACT)
    assert (whole.mean(dim=1).abs() < 4 * tau / 20_000**0.5).all()


def test_the_mean_output_is_the_plain_one_and_evaluation_has_no_noise() -> None:
    model = one_layer()
    optimizer, hook = hook_of(model, beta=0.0, sigma=0.2)
    x = draw(5, 9, seed=1)
    model.eval()
    plain = model(x).detach()
    total = torch.zeros_like(plain)
    for step in range(1, 2001):
        model.train()
        hook.before_forward(Moment(model, optimizer, step, 2000))
        total += model(x).detach()
        if step == 1:
            assert not torch.equal(model(x), plain)
            assert torch.equal(model(x), model(x)), "one noise for a step"
            assert torch.equal(model.eval()(x), plain)
        tau = hook.places[0].factored.amended.tau
        hook.after_step(Moment(model, optimizer, step, 2000))
    error = 4.5 * x.norm(dim=1).unsqueeze(1) * tau / 2000**0.5  # deviations of a mean of 2000
    assert ((total / 2000 - plain).abs() < error).all()
    assert torch.equal(model.train()(x), plain), "and none between steps"


@pytest.mark.parametrize("needs_x", [False, True])
def test_the_noisy_product_has_the_gradients_of_its_definition(needs_x: bool) -> None:
    tau, x = draw(5, seed=1).abs(), draw(2, 4, 6, seed=2).requires_grad_(needs_x)
    y = draw(2, 4, 5, seed=3).requires_grad_()
    E, weight = noise(tau, 6, 11, torch.float64), draw(2, 4, 5, seed=4)
    grads = []
    for product in (lambda: add_noise(1.0 * y, x, tau, 11), lambda: y + x @ E.t()):
        out = product()
        grads.append((out, *torch.autograd.grad((out * weight).sum(), [y, x] if needs_x else [y])))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("delta", ["lora", "gated"])
def test_gradients_are_those_at_the_perturbed_weight(delta: str) -> None:
    """Against a model whose base has E in it: the same loss, and the same gradients of A and B (E is a constant)."""
    model = rw.adapt(tiny_llama().double(), delta, rank=3, targets=["q_proj", "down_proj"], dtype="float64").train()
    with torch.no_grad():
        for found in trained_pairs(model):
            found.pair.B.copy_(draw(*found.pair.B.shape, seed=4) / 10)
    optimizer, hook = hook_of(model, beta=0.0, sigma=0.5)
    hook.before_forward(Moment(model, optimizer, 1, 9))

    def run() -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = run()
    with torch.no_grad():
        for place in hook.places:
            place.site.module.weight += place.factored.amended.matrix_of(torch.float64)
    hook.after_step(Moment(model, optimizer, 1, 9))
    other, wanted = run()
    assert loss == pytest.approx(other, rel=1e-12)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-11, rtol=1e-9)


def test_inside_dora_the_noise_is_on_what_the_magnitudes_scale() -> None:
    """y = diag(m/n) (V + E) x with the norms n of V."""
    model = rw.adapt(nn.Sequential(nn.Linear(9, 7, bias=False)).double(), "dora", rank=3, targets="0").train()
    delta: Any = trained_pairs(model)[0].delta
    with torch.no_grad():
        trained_pairs(model)[0].pair.B.copy_(draw(7, 3, seed=3))
        delta.m.mul_(1.3)
    optimizer, hook = hook_of(model, beta=0.0, sigma=0.5)
    hook.before_forward(Moment(model, optimizer, 1, 9))
    weight = model[0].weight.detach()
    V = weight + delta.inner.dense(weight).detach()
    scaled = (delta.m / V.norm(dim=1)).unsqueeze(1) * (V + hook.places[0].factored.amended.matrix_of(torch.float64))
    x = draw(5, 9, seed=1)
    torch.testing.assert_close(model(x), x @ scaled.t(), **EXACT)


def test_convolutions_embeddings_and_grouped_kernels_have_noise() -> None:
    model = rw.adapt(tiny_convnet(), "lora", rank=2, targets=["stem", "dilated", "grouped"]).train()
    optimizer, hook = hook_of(model, beta=0.0, sigma=0.5)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    hook.before_forward(Moment(model, optimizer, 1, 9))
    noisy = model(x)
    assert not torch.allclose(noisy, plain)
    noisy.square().sum().backward()
    assert all(found.pair.B.grad.isfinite().all() for found in trained_pairs(model))  # type: ignore[union-attr]
    language = rw.adapt(tiny_llama(), "lora", rank=2, targets="embed_tokens").train()
    optimizer, hook = hook_of(language, beta=0.0, sigma=0.5)
    before = language(input_ids=IDS).logits
    hook.before_forward(Moment(language, optimizer, 1, 9))
    assert not torch.allclose(language(input_ids=IDS).logits, before)


@pytest.mark.parametrize("settings", [{"sigma": 0.0}, {"sigma": 0.0, "beta": 0.0, "form": "deviation"}])
def test_without_size_it_is_lora_bit_for_bit(settings: dict[str, Any]) -> None:
    check_is_plain_lora("lora-ggpo", settings)


def test_a_run_learns_resumes_bit_for_bit_and_leaves_the_base(tmp_path: Path) -> None:
    check_perturbs(tmp_path, "lora-ggpo", {"sigma": 0.2})


def test_recomputed_layers_see_the_same_noise() -> None:
    ends = []
    for checkpointing in (False, True):
        loop = make_loop(steps=4, name="lora-ggpo", options={"sigma": 0.2}, gradient_checkpointing=checkpointing)
        loop.run()
        ends.append(weights(loop.model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-6, rtol=0)


def test_it_says_where_it_cannot_go() -> None:
    with pytest.raises(TrainingError, match="LoRA-GGPO works on the two factors"):
        rw.make_optimizer(tiny_llama(), "lora-ggpo")
    tied = rw.adapt(tiny_llama(tie=True), "lora", rank=2, targets=["embed_tokens", "lm_head"], tied="shared")
    with pytest.raises(TrainingError, match="tied='separate'"):
        rw.make_optimizer(tied, "lora-ggpo")
    with pytest.raises(ConfigError, match="sigma"):
        rw.make_optimizer(adapted(), "lora-ggpo", sigma=-1)
