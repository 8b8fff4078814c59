"""Learning to adapt: the posterior of a task in a few steps from the prior, and the prior over many tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, DivergedError
from rankworks.core.kernels.gaussian import divergence, log_prior
from rankworks.core.store import adapter_state, load_adapter_state
from rankworks.train.batching.batches import Example
from tiny import tiny_llama, tiny_mlp
from train.training import make_examples


def network(delta: str = "abmll", **settings: Any) -> nn.Module:
    return rw.adapt(tiny_mlp(), delta, rank=2, seed=3, **settings)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in adapter_state(model).items()}


def batch(seed: int, count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 12, generator=generator), torch.randint(5, (count,), generator=generator)


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda data: F.cross_entropy(model(data[0]), data[1])


def learner(model: nn.Module, **settings: Any) -> rw.MetaLearner:
    return rw.MetaLearner(model, loss=loss_of(model), **{"lr": 1e-2, "inner_lr": 1e-2, **settings})


# ---- one task ----------------------------------------------------------------------------------------------------


def test_without_divergence_and_samples_a_task_is_an_ordinary_lora() -> None:
    """Step by step to the bit, from the same factors."""
    model, plain = network(), network("lora", alpha=16.0)
    meta = learner(model, beta=0.0, samples=0)
    losses = meta.adapt(batch(1), steps=5)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    wanted = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(plain)(batch(1))
        loss.backward()
        optimizer.step()
        wanted.append(float(loss.detach()))
    assert losses == wanted
    ours, theirs = tensors(model), tensors(plain)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_adapting_lowers_the_loss_leaves_the_prior_and_starts_from_it_again() -> None:
    model = network()
    meta = learner(model, inner_lr=3e-2)
    start = tensors(model)
    losses = meta.adapt(batch(1), steps=20)
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]
    first = tensors(model)
    assert all(torch.equal(first[k], t) for k, t in start.items() if "prior_" in k or "deviation" in k)
    assert any(not torch.equal(first[k], t) for k, t in start.items() if k.endswith("spread_B"))
    assert meta.divergence() > 0
    meta.adapt(batch(2), steps=3)
    meta.adapt(batch(1), steps=20)
    again = tensors(model)
    assert all(torch.equal(again[k], t) for k, t in first.items())
    meta.reset()
    assert meta.divergence() == 0
    assert all(not t.requires_grad for k, t in adapter_state(model).items() if "spread" in k or "prior_" in k)
    assert all(p.grad is None for p in model.parameters())


def test_a_large_beta_keeps_the_posterior_at_the_prior() -> None:
    found = []
    for beta in (0.0, 1e-3, 1e3):
        model = network(c=0.1)
        meta = learner(model, beta=beta, inner_lr=1e-2)
        meta.adapt(batch(1), steps=40)
        found.append(meta.divergence())
    assert found[0] > found[1] > found[2]
    assert found[2] < 1e-2 * found[0]


def test_samples_average_and_evaluate_without_training_mode() -> None:
    model = network(c=0.5).eval()
    meta = learner(model)
    x = batch(1)[0]
    with torch.no_grad():
        plain = model(x)
        with meta.sampled(1):
            one = model(x)
            with meta.sampled(None):
                assert torch.equal(model(x), plain)
            assert torch.equal(model(x), one)
        with meta.sampled(2):
            assert not torch.equal(model(x), one)
        assert torch.equal(model(x), plain)
    mean = meta.average(lambda: model(x).softmax(-1), samples=64)
    torch.testing.assert_close(mean.sum(-1), torch.ones(16))
    assert not torch.allclose(mean, plain.softmax(-1), atol=1e-3)
    with pytest.raises(ConfigError, match="samples=1"):
        meta.average(lambda: model(x), samples=0)


# ---- the prior ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["first-order", "prior"])
def test_a_step_of_the_prior_by_hand(outer: Any) -> None:
    """The gradient AdamW gets is the sum over tasks, plus that of the prior's own prior."""
    model = network(c=0.3)
    with torch.no_grad():
        for delta in learner(model).deltas.values():
            for tensor in delta.tensors():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.shape[0])))
            delta.settle_prior()
    reference = copy.deepcopy(model)
    settings = {"beta": 1e-2, "gamma": 1e-3, "samples": 0, "steps": 3, "outer": outer}
    meta, hand = learner(model, **settings), learner(reference, **settings)
    seen: list[list[Tensor]] = []
    step = meta.optimizer.step
    meta.optimizer.step = lambda *a, **k: (seen.append([p.grad.clone() for p in meta._tensors(True)]), step())[1]  # type: ignore[method-assign, union-attr]
    pairs = [(batch(1), batch(2)), (batch(3), batch(4))]
    meta.step(pairs)

    wanted = [torch.zeros_like(t) for t in hand._tensors(prior=True)]
    for support, query in pairs:
        hand.adapt(support, steps=3)
        phi = [t.detach().clone() for t in hand._tensors()]
        places, starts = hand._tensors(), hand._tensors(prior=True)
        for tensor in (*places, *starts):
            tensor.requires_grad_(True)
        kl: Any = sum(divergence(d.law(), d.law(prior=True)) for d in hand.deltas.values())
        of_theta = torch.autograd.grad(1e-2 * kl, starts, retain_graph=True)
        of_phi = torch.autograd.grad(loss_of(reference)(query) + 1e-2 * kl, places, allow_unused=True)
        for i, (a, b) in enumerate(zip(of_theta, of_phi, strict=True)):
            wanted[i] += a if outer == "prior" or b is None else a + b
        for tensor in (*places, *starts):
            tensor.requires_grad_(False)
        assert all(torch.equal(t.detach(), p) for t, p in zip(hand._tensors(), phi, strict=True))
    starts = hand._tensors(prior=True)
    for tensor in starts:
        tensor.requires_grad_(True)
    prior: Any = sum(log_prior(d.law(prior=True), d.hyper_prior()) for d in hand.deltas.values())
    for i, gradient in enumerate(torch.autograd.grad(-1e-3 * prior, starts)):
        wanted[i] += gradient
    for mine, theirs in zip(seen[0], wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert meta.divergence() == 0, "the posterior is the prior after a step"


def test_gamma_is_beta_over_the_tasks_unless_it_is_given() -> None:
    ends = []
    for gamma, tasks in ((None, 2), (5e-2, 2), (1.0, 2)):
        model = network(c=0.3)
        meta = learner(model, beta=1e-1, gamma=gamma, samples=0, steps=1)
        meta.step([(batch(i), batch(10 + i)) for i in range(tasks)])
        ends.append(tensors(model))
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert any(not torch.equal(ends[0][k], ends[2][k]) for k in ends[0])


def test_absolute_units_of_the_hyper_prior_push_the_spread_up() -> None:
    spreads = []
    for units in ("relative", "absolute"):
        model = network()
        meta = learner(model, gamma=1e-6, hyper_prior=units, samples=0, steps=1)
        for delta in meta.deltas.values():
            assert not delta.tensors(prior=True)[3].any()
        for seed in range(5):
            meta.step([(batch(seed), batch(10 + seed))])
        spreads.append(sum(float((D @ C).mean()) for d in meta.deltas.values() for _, _, C, D in [d.tensors(True)]))
    assert spreads[1] > spreads[0]


def draw(seed: int, count: int, part: int) -> tuple[Tensor, Tensor]:
    """A batch of a regression task: one matrix in common, its size and a shift of each."""
    generator = torch.Generator().manual_seed(seed)
    size, shift = 0.5 + torch.rand((), generator=generator), 0.1 * torch.randn(5, generator=generator)
    common = torch.randn(12, 5, generator=torch.Generator().manual_seed(77)) / 12**0.5
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(1000 * seed + part))
    return x, size * x @ common + shift


@pytest.mark.parametrize("samples", [0, 1])
def test_learning_to_adapt_makes_new_tasks_easier(samples: int) -> None:
    """Held-out tasks, the same ten steps: from the learned prior the query loss is far below that from the start."""
    model = rw.adapt(tiny_mlp(), "abmll", rank=4, alpha=8.0, seed=1)
    settings = {"lr": 1e-2, "inner_lr": 1e-2, "steps": 3, "samples": samples}
    meta = rw.MetaLearner(model, loss=lambda data: F.mse_loss(model(data[0]), data[1]), **settings)

    def after() -> float:
        total = 0.0
        for seed in range(100, 104):
            meta.adapt(draw(seed, 16, 0))
            with torch.no_grad():
                total += float(F.mse_loss(model(draw(seed, 64, 1)[0]), draw(seed, 64, 1)[1])) / 4
        meta.reset()
        return total

    first = after()
    for step in range(30):
        meta.step([(draw(2 * step + i, 16, 0), draw(2 * step + i, 16, 1)) for i in range(2)])
    assert after() < 0.6 * first


def test_what_it_holds_does_not_grow_with_the_tasks() -> None:
    held = []
    for tasks in (1, 6):
        model = network()
        meta = learner(model, steps=2)
        meta.step([(batch(i), batch(i + 50)) for i in range(tasks)])
        moments = sum(t.numel() for s in meta.optimizer.state.values() for t in s.values() if t.dim())
        numbers = sum(t.numel() for t in adapter_state(model).values())
        held.append((moments, numbers, len(vars(meta))))
        learned = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert moments == 2 * learned == numbers - len(meta.deltas), "two moments for each of the prior's factors"
    assert held[0] == held[1]


def test_a_resumed_learner_goes_on_bit_for_bit() -> None:
    pairs = [[(batch(i), batch(i + 50)), (batch(i + 100), batch(i + 150))] for i in range(6)]
    whole = network(c=0.2)
    meta = learner(whole)
    losses = [meta.step(pair) for pair in pairs]
    first = network(c=0.2)
    cut = learner(first)
    for pair in pairs[:3]:
        cut.step(pair)
    second = network(c=0.2)
    load_adapter_state(second, tensors(first))
    again = learner(second)
    again.load_state_dict(copy.deepcopy(cut.state_dict()))
    assert [again.step(pair) for pair in pairs[3:]] == losses[3:]
    wanted = tensors(whole)
    assert all(torch.equal(tensors(second)[k], t) for k, t in wanted.items())


# ---- language models, and what is refused ------------------------------------------------------------------------


def texts(seed: int, count: int = 12) -> list[Example]:
    """Documents over a task's own few tokens."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(3, 250, (4,), generator=generator)
    made = []
    for _ in range(count):
        ids = tuple(own[torch.randint(4, (12,), generator=generator)].tolist())
        made.append(Example(ids, ids))
    return made


def test_a_language_model_learns_to_adapt_to_data_sets() -> None:
    model = rw.adapt(tiny_llama(layers=1), "abmll", rank=4, targets=["q_proj", "v_proj", "o_proj"])
    meta = rw.MetaLearner(model, lr=1e-2, inner_lr=1e-2, steps=3)
    state = torch.get_rng_state()
    losses = meta.fit([texts(i) for i in range(6)], steps=12, batch=2, support=4, query=4, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    adapted = meta.adapt(texts(50), steps=10)
    assert adapted[-1] < adapted[0]
    base = rw.adapt(tiny_llama(layers=1), "abmll", rank=4, targets=["q_proj", "v_proj", "o_proj"])
    again = rw.MetaLearner(base, lr=1e-2, inner_lr=1e-2, steps=3)
    assert again.fit([texts(i) for i in range(6)], steps=12, support=4, query=4, progress=False) == losses


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="no prior to learn"):
        rw.MetaLearner(network("lora"))
    with pytest.raises(ConfigError, match="no adapter"):
        rw.MetaLearner(tiny_llama())
    model = rw.adapt(tiny_llama(layers=1), "abmll", rank=2)
    meta = rw.MetaLearner(model)
    with pytest.raises(ConfigError, match=r"task 1 has 5: lower batch"):
        meta.fit([make_examples(40), make_examples(5)], steps=1)
    with pytest.raises(ConfigError, match="there are 1 tasks"):
        meta.fit([make_examples(40)], steps=1)
    before = tensors(model)
    meta.loss = lambda data: next(model.parameters()).sum() * torch.nan
    with pytest.raises(DivergedError, match="The prior was not"):
        meta.step([(make_examples(2), make_examples(2))])
    assert all(torch.equal(tensors(model)[k], t) for k, t in before.items())


def test_other_trained_parameters_and_the_base_stay() -> None:
    model = rw.adapt(tiny_mlp(), "abmll", rank=2)
    extra = next(p for n, p in model.named_parameters() if n.endswith("bias")).requires_grad_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learner(model).step([(batch(1), batch(2))])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert all(".adapters." in n for n in moved)
    assert extra.requires_grad
    assert extra.grad is None
