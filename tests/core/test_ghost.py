"""Ghost batch normalisation: small batches within a large one; and the regime that goes with large batches."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.ghost import ghost_batch_norm
from rankworks.core.rates import adapted_regime
from tiny import tiny_convnet, tiny_mlp

KINDS: list[tuple[Any, tuple[int, ...]]] = [
    (nn.BatchNorm1d, (3,)),
    (nn.BatchNorm1d, (3, 5)),
    (nn.BatchNorm2d, (3, 4, 2)),
    (nn.BatchNorm3d, (3, 2, 2, 2)),
]
kinds = pytest.mark.parametrize(("kind", "shape"), KINDS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def norm(kind: Any, **settings: Any) -> Any:
    """A layer in float64 whose gamma, beta and statistics are not those of the start."""
    made = kind(3, **settings).double()
    with torch.no_grad():
        for i, tensor in enumerate([*made.parameters(), *made.buffers()]):
            if tensor.is_floating_point():
                tensor.copy_(draw(3, seed=90 + i).abs())
    return made


@kinds
def test_one_ghost_is_batch_normalisation(kind: Any, shape: tuple[int, ...]) -> None:
    plain, x = norm(kind), draw(8, *shape)
    for ghost in (8, 9, 128):
        ghosts = ghost_batch_norm(copy.deepcopy(plain), ghost)
        reference = copy.deepcopy(plain)
        assert torch.equal(ghosts(x), reference(x))
        for one, other in zip(ghosts.buffers(), reference.buffers(), strict=True):
            assert torch.equal(one, other)


@kinds
def test_every_ghost_has_its_own_statistics(kind: Any, shape: tuple[int, ...]) -> None:
    plain, x = norm(kind), draw(12, *shape)
    out = ghost_batch_norm(copy.deepcopy(plain), 4)(x)
    for i in range(0, 12, 4):
        torch.testing.assert_close(out[i : i + 4], copy.deepcopy(plain)(x[i : i + 4]), atol=1e-12, rtol=0)
    assert not torch.allclose(out, copy.deepcopy(plain)(x), atol=1e-2)


@kinds
def test_running_statistics_are_the_closed_form(kind: Any, shape: tuple[int, ...]) -> None:
    """(1 - eta)^K old + sum_j (1 - eta)^(K - j) eta stat_j; variances without bias, as they are kept."""
    plain, x, eta = norm(kind, momentum=0.3), draw(12, *shape), 0.3
    ghosts = ghost_batch_norm(copy.deepcopy(plain), 3)
    ghosts(x)
    parts = [part.transpose(0, 1).flatten(1) for part in x.split(3)]  # (3, n) each
    means, variances = ([getattr(p, f)(dim=1) for p in parts] for f in ("mean", "var"))
    for name, found in (("running_mean", means), ("running_var", variances)):
        wanted = (1 - eta) ** 4 * getattr(plain, name)
        wanted = wanted + sum((1 - eta) ** (4 - j) * eta * stat for j, stat in enumerate(found, 1))
        torch.testing.assert_close(getattr(ghosts, name), wanted, atol=1e-12, rtol=0)


def test_without_momentum_it_is_the_mean_over_all_ghosts() -> None:
    ghosts = ghost_batch_norm(nn.BatchNorm1d(3, momentum=None).double(), 2)
    x = draw(12, 3)
    ghosts(x[:6])
    ghosts(x[6:])
    means = torch.stack([part.mean(0) for part in x.split(2)])
    torch.testing.assert_close(ghosts.running_mean, means.mean(0), atol=1e-12, rtol=0)


@kinds
def test_evaluation_knows_no_ghosts(kind: Any, shape: tuple[int, ...]) -> None:
    plain, x = norm(kind).eval(), draw(12, *shape)
    ghosts = ghost_batch_norm(copy.deepcopy(plain), 3).eval()
    assert torch.equal(ghosts(x), plain(x))
    statistics = [b.clone() for b in plain.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(ghosts.buffers(), statistics, strict=True))


def test_identical_ghosts_are_one() -> None:
    plain, x = norm(nn.BatchNorm2d), draw(4, 3, 2, 2)
    out = ghost_batch_norm(copy.deepcopy(plain), 4)(torch.cat([x, x]))
    torch.testing.assert_close(out, torch.cat([plain(x)] * 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("batch", "ghost", "sizes"), [(10, 4, [4, 3, 3]), (9, 4, [3, 3, 3]), (7, 6, [4, 3]), (5, 5, [5])]
)
def test_no_ghost_is_larger_and_none_is_left_with_one(batch: int, ghost: int, sizes: list[int]) -> None:
    """A rest of one example, which has no variance, is avoided."""
    plain, x = norm(nn.BatchNorm1d), draw(batch, 3)
    out = ghost_batch_norm(copy.deepcopy(plain), ghost)(x)
    wanted = torch.cat([copy.deepcopy(plain)(part) for part in x.split(sizes)])
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_ghosts() -> None:
    plain, x, y = norm(nn.BatchNorm1d), draw(6, 3).requires_grad_(True), draw(6, 3).requires_grad_(True)
    ghosts = ghost_batch_norm(copy.deepcopy(plain), 3)
    (ghosts(x) * draw(6, 3, seed=4)).sum().backward()
    parts = torch.cat([plain(y[:3]), plain(y[3:])])
    (parts * draw(6, 3, seed=4)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-12, rtol=0)
    for one, other in zip(ghosts.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=0)


class Mine(nn.BatchNorm1d):
    """A user's own."""


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), Mine(4), nn.Linear(4, 2))


def test_it_acts_in_place_and_back() -> None:
    model: Any = body()
    names, first, second = list(model.state_dict()), model[1], model[3]
    assert ghost_batch_norm(model, 4) is model
    assert list(model.state_dict()) == names
    assert isinstance(first, nn.BatchNorm1d)
    assert isinstance(second, Mine)
    assert type(second).__name__ == "GhostMine"
    assert (first.ghost, second.ghost) == (4, 4)
    ghost_batch_norm(model, 8)
    assert type(second).__mro__.count(Mine) == 1
    assert second.ghost == 8
    fresh = body()
    fresh.load_state_dict(copy.deepcopy(model).state_dict())
    ghost_batch_norm(model, None)
    assert [type(m) for m in model] == [type(m) for m in fresh]
    assert not hasattr(first, "ghost")


def test_what_has_no_batch_normalisation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no nn\.BatchNorm1d"):
        ghost_batch_norm(tiny_mlp())
    with pytest.raises(ConfigError, match="at least 1"):
        ghost_batch_norm(body(), 0)
    with pytest.raises(ConfigError, match="run the model once"):
        ghost_batch_norm(nn.Sequential(nn.LazyBatchNorm1d()))


def test_a_model_trains_with_ghosts() -> None:
    model = ghost_batch_norm(nn.Sequential(tiny_convnet(), nn.BatchNorm1d(5), nn.Linear(5, 5)), 8)
    x = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        width = tiny_convnet()(x[:2]).shape
    assert width == (2, 5)
    labels = torch.randint(0, 5, (24,), generator=torch.Generator().manual_seed(1))
    optimizer = rw.make_optimizer(model, "sgd", lr=0.1, momentum=0.9)
    losses = []
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_the_rate_of_4096_for_128() -> None:
    assert adapted_regime(4096, 128, 0.1, 1).lr == pytest.approx(math.sqrt(32) * 0.1, rel=1e-15)
    assert adapted_regime(4096, 128, 0.1, 1, rule="linear").lr == pytest.approx(3.2)
    assert adapted_regime(4096, 128, 0.1, 1, rule="none").lr == 0.1


@pytest.mark.parametrize(("batch", "small"), [(2048, 128), (4096, 256), (512, 512)])
def test_as_many_updates_are_made_at_each_rate(batch: int, small: int) -> None:
    """ResNet44 on CIFAR: 81, 122, 164 of 200 epochs; 32,768 examples."""
    regime = adapted_regime(batch, small, 0.1, 200, (81, 122, 164))
    for epochs, before in zip((*regime.boundaries, regime.epochs), (81, 122, 164, 200), strict=True):
        assert epochs * (32768 // batch) == before * (32768 // small)


def test_uneven_batches_round_up_and_epochs_may_stay() -> None:
    assert adapted_regime(300, 128, 0.1, 10, (4,)) == (pytest.approx(0.1 * math.sqrt(300 / 128)), 30, (12,))
    assert adapted_regime(300, 128, 0.1, 10, [4], longer=False)[1:] == (10, (4,))


@pytest.mark.parametrize("wrong", [(64, 128, 0.1, 5), (128, 0, 0.1, 5), (128, 64, 0.1, 0)])
def test_what_is_no_larger_batch_is_refused(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="larger ones"):
        adapted_regime(*wrong)
