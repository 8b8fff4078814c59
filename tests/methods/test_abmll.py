"""ABMLL's Gaussians: divergence, samples without a matrix of the weight's size, and the mean that is left."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import KINDS, adapted, change_of, close, delta_of, layer_and_input, linear, shake, with_change
from torch import Tensor

import rankworks as rw
from rankworks.core.kernels import gaussian
from rankworks.core.kernels.gaussian import Gaussian, HyperPrior, Spread, divergence, log_prior, noise_linear
from rankworks.core.store import adapter_state
from rankworks.deltas.abmll import ABMLL, Noise

FORMS = ("log", "additive")


@pytest.fixture(params=[1 << 20, 20])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whole matrices, and blocks of two or three rows."""
    monkeypatch.setattr(gaussian, "BLOCK", request.param)
    return request.param


def law(form: Any, seed: int, out: int = 6, in_: int = 8, rank: int = 2, c: float = 0.3) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()

    return Gaussian(draw(out, rank), draw(rank, in_), Spread(draw(out, rank), draw(rank, in_), c, form))


def normal(p: Gaussian) -> torch.distributions.Normal:
    S = p.spread.D @ p.spread.C
    spread = p.spread.c * S.exp() if p.spread.form == "log" else (S + p.spread.c).clamp(min=1e-6)
    return torch.distributions.Normal(p.B @ p.A, spread)


def cast(p: Gaussian, dtype: torch.dtype) -> Gaussian:
    B, A, D, C = (t.detach().clone().to(dtype).requires_grad_() for t in factors(p))
    return Gaussian(B, A, Spread(D, C, p.spread.c, p.spread.form))


def factors(*laws: Gaussian) -> list[Tensor]:
    return [t for p in laws for t in (p.B, p.A, p.spread.D, p.spread.C)]


# ---- divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_divergence_is_that_of_independent_gaussians(form: str, blocks: int) -> None:
    phi, theta = law(form, 1, c=0.9), law(form, 2, c=0.9)
    wanted = torch.distributions.kl_divergence(normal(phi), normal(theta)).sum()
    found = divergence(phi, theta)
    close(found, wanted)
    grads = zip(
        torch.autograd.grad(3 * found, factors(phi, theta)),
        torch.autograd.grad(3 * wanted, factors(phi, theta)),
        strict=True,
    )
    for mine, theirs in grads:
        close(mine, theirs)


def test_its_gradient_is_the_closed_form() -> None:
    """d/dM = M/st^2, d/dlog sp = e^{2R} - 1, d/dlog st = 1 - e^{2R} - (M/st)^2, written out with dense matrices."""
    phi, theta = law("log", 1), law("log", 2)
    M = phi.B @ phi.A - theta.B @ theta.A
    sp, st = normal(phi).stddev, normal(theta).stddev
    of_M, of_p, of_t = M / st**2, (sp / st) ** 2 - 1, 1 - (sp / st) ** 2 - (M / st) ** 2
    wanted = [
        of_M @ phi.A.t(),
        phi.B.t() @ of_M,
        of_p @ phi.spread.C.t(),
        phi.spread.D.t() @ of_p,
        -of_M @ theta.A.t(),
        -theta.B.t() @ of_M,
        of_t @ theta.spread.C.t(),
        theta.spread.D.t() @ of_t,
    ]
    for mine, theirs in zip(torch.autograd.grad(divergence(phi, theta), factors(phi, theta)), wanted, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_zero_where_both_are_equal_and_positive_elsewhere(form: str, dtype: torch.dtype) -> None:
    same = cast(law(form, 3), dtype)
    assert float(divergence(same, same).detach()) == 0.0
    for place in range(4):
        for size in (1e-1, 1e-3, 1e-5):
            other = cast(same, dtype)
            factors(other)[place].data[0] += size
            assert float(divergence(other, same).detach()) > 0
            assert float(divergence(same, other).detach()) > 0


def test_in_half_precision_it_is_computed_in_float32() -> None:
    phi, theta = law("log", 1), law("log", 2)
    half = [cast(p, torch.bfloat16) for p in (phi, theta)]
    found = divergence(*half)
    assert found.dtype == torch.float32
    (1e-7 * found).backward()
    gradient = half[0].B.grad
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    assert gradient.abs().max() > 0
    exact = divergence(*(cast(p, torch.float64) for p in half))
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_priors_prior_is_gaussian_in_means_and_gamma_in_precisions(form: str, blocks: int) -> None:
    theta, prior = law(form, 4, c=0.9), HyperPrior(0.7, 0.2, 2.5, 0.3)
    found = log_prior(theta, prior)
    p = normal(theta)
    precision = (0.2 / p.stddev) ** 2
    terms = torch.distributions.Normal(0.0, 0.7).log_prob(p.mean)
    gamma = torch.distributions.Gamma(torch.tensor(2.5).double(), torch.tensor(0.3).double())
    constants = torch.distributions.Normal(0.0, 0.7).log_prob(torch.zeros(()).double())
    constant = gamma.log_prob(torch.ones(()).double()) + 0.3
    wanted = (terms - constants + gamma.log_prob(precision) - constant).sum()
    close(found, wanted)
    mine, theirs = (torch.autograd.grad(value, factors(theta)) for value in (found, wanted))
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


# ---- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_is_applied_as_its_matrix_would_be(form: str, blocks: int) -> None:
    spread = law(form, 5).spread
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = noise_linear(x, spread, 7)
    wanted = torch.nn.functional.linear(x, gaussian.noise_matrix(spread, 7))
    close(y, wanted)
    g = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad(value, [x, spread.D, spread.C], g) for value in (y, wanted))
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)
    assert not torch.equal(noise_linear(x, spread, 8), y)


def test_its_gradients_are_derivatives() -> None:
    spread = law("log", 5, out=3, in_=4).spread
    x = torch.randn(2, 4, requires_grad=True)
    torch.autograd.gradcheck(lambda x, D, C: noise_linear(x, Spread(D, C, 0.3, "log"), 7), (x, spread.D, spread.C))


def test_nothing_of_the_weights_size_is_kept_for_backward() -> None:
    kept: list[tuple[int, ...]] = []
    spread = Spread(torch.randn(40, 2, requires_grad=True), torch.randn(2, 50, requires_grad=True), 0.1, "log")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        noise_linear(torch.randn(5, 50), spread, 1)
    assert sorted(kept) == [(2, 50), (5, 50), (40, 2)]


def noisy(delta: ABMLL, seed: int | None) -> None:
    delta.noise = None if seed is None else Noise(delta, seed)


def test_samples_have_the_law_of_the_posterior() -> None:
    delta: Any = shake(adapted(linear(9, 7), "abmll", rank=2, alpha=6.0, c=0.05))
    delta.spread_B.normal_()
    drawn = []
    for seed in range(4000):
        noisy(delta, seed)
        drawn.append(delta.acting_dense(torch.zeros(7, 9)).detach())
    samples = torch.stack(drawn)
    mean, spread = delta.scale * delta.B @ delta.A, delta.scale * 0.05 * (delta.spread_B @ delta.spread_A).exp()
    assert ((samples.mean(0) - mean) / spread).abs().max() < 5 / 4000**0.5
    assert (samples.std(0) / spread - 1).abs().max() < 5 / 8000**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_acts_alike_at_every_kind_of_layer_and_means_are_what_is_seen_from_outside(kind: str) -> None:
    layer, x = layer_and_input(kind)
    before = copy.deepcopy(layer)
    model = adapted(layer, "abmll", rank=2)
    delta: Any = shake(model)
    weight, plain = change_of(model), model(x)
    noisy(delta, 3)
    sampled = model(x)
    close(change_of(model), weight)
    assert not torch.allclose(sampled, plain)
    assert torch.equal(model(x), sampled), "one sample for as long as the seed stands"
    close(sampled, with_change(before, delta.acting_dense(weight))(x))
    noisy(delta, None)
    assert torch.equal(model(x), plain)


# ---- the start, the file, the export -----------------------------------------------------------------------------


def test_at_the_start_the_weight_is_the_base_up_to_noise_of_c() -> None:
    layer = linear(60, 50)
    delta: Any = delta_of(adapted(layer, "abmll", rank=4, alpha=8.0))
    assert not delta.dense(layer.weight).any()
    noisy(delta, 1)
    change = delta.acting_dense(layer.weight).detach()
    c = 0.01 * layer.weight.std(correction=0)
    assert float(change.std() / (delta.scale * c)) == pytest.approx(1, abs=0.05)
    close(delta.spread_at_rest, c.detach())
    assert delta_of(adapted(linear(), "abmll", c=0.2)).spread_at_rest == 0.2
    assert float(divergence(delta.law(), delta.law(prior=True)).detach()) == 0


def test_the_variance_of_outputs_grows_with_c() -> None:
    x, spreads = torch.randn(4, 7), []
    for c in (0.001, 0.01, 0.1, 1.0):
        torch.manual_seed(0)
        model = adapted(linear(), "abmll", c=c)
        delta: Any = delta_of(model)
        outputs = []
        for seed in range(50):
            noisy(delta, seed)
            outputs.append(model(x).detach())
        spreads.append(float(torch.stack(outputs).var(0).mean()))
    assert all(b == pytest.approx(100 * a, rel=1e-6) for a, b in itertools.pairwise(spreads))


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_prior_starts_at_the_posterior(init: str) -> None:
    model = adapted(linear(), "abmll", rank=2, init=init)
    delta: Any = delta_of(model)
    assert delta.A.any()
    for mine, start in zip(delta.tensors(), delta.tensors(prior=True), strict=True):
        assert torch.equal(mine, start)
    assert not start.requires_grad


def test_a_file_holds_both_and_an_export_the_mean_alone(tmp_path: Path) -> None:
    layer = linear(9, 8)
    model = adapted(layer, "abmll", rank=3)
    delta: Any = delta_of(model)
    with torch.no_grad():
        for tensor in (*delta.tensors(), *delta.tensors(prior=True)):
            tensor.normal_()
    state = adapter_state(model)
    assert sum(t.numel() for t in state.values()) == 4 * 3 * (9 + 8) + 1
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (9 + 8)
    rw.save(model, tmp_path / "adapter")
    change = delta.dense(layer.weight).detach()
    found = delta.factors()
    assert found.B.shape == (8, 3)
    close(found.B @ found.A, 16 / 3 * delta.B @ delta.A)
    rw.detach(model)
    rw.load(model, tmp_path / "adapter")
    again: Any = delta_of(model)
    for mine, theirs in zip(again.tensors(True) + again.tensors(), delta.tensors(True) + delta.tensors(), strict=True):
        assert torch.equal(mine, theirs)
    close(again.dense(layer.weight), change)


def test_schedules_of_ranks_are_refused() -> None:
    with pytest.raises(rw.RankworksError):
        adapted(linear(), "abmll", rank=2, ranks="increlora")


def test_counts() -> None:
    """Of Llama-3 8B at q and v: a LoRA's in an ordinary run, four times as many in the file and for a learner."""
    plan = rw.plan("llama-3-8b", "abmll", rank=8, targets=["q_proj", "v_proj"])
    assert plan.trainable_parameters == 3_407_872
    assert plan.adapter_bytes == 4 * (4 * 3_407_872 + 64)  # and a standard deviation for each of 64 sites
