"""The principal directions of inputs that come in batches: exact where they can be, and until they stand still."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.calibrate.input_svd import InputSVD
from rankworks.core.errors import ConfigError
from rankworks.core.evidence import Need
from rankworks.linalg.incremental import METRICS, IncrementalSVD, share_out, worth
from tiny import tiny_llama, token_batch


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(before)


def low_rank(rows: int = 60, inputs: int = 12, rank: int = 3) -> Tensor:
    """Rows with `rank` directions of clearly different size around a large mean."""
    basis = torch.linalg.qr(torch.randn(inputs, rank)).Q
    return torch.randn(rows, rank) * torch.linspace(3, 1, rank) @ basis.t() + 10 * torch.randn(inputs)


def directions(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top k of the whole centred matrix, by torch's own SVD."""
    _, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return s[:k], vh[:k]


def fed(x: Tensor, sizes: list[int], k: int, iterations: int = 0) -> IncrementalSVD:
    svd = IncrementalSVD(k, iterations)
    for rows in x.split(sizes):
        svd.update(rows)
    return svd


SPLITS = [[60], [20, 20, 20], [5, 55], [13, 4, 40, 3]]


@pytest.mark.parametrize("iterations", [0, 4])
@pytest.mark.parametrize("sizes", SPLITS)
def test_on_rows_of_rank_k_every_split_gives_the_svd_of_the_whole(sizes: list[int], iterations: int) -> None:
    x = low_rank()
    svd = fed(x, sizes, 3, iterations)
    values, vh = directions(x, 3)
    assert svd.components is not None
    torch.testing.assert_close(svd.values, values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((svd.components * vh).sum(1).abs(), torch.ones(3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(svd.mean, x.mean(0))
    torch.testing.assert_close(svd.spread, (x - x.mean(0)).square().sum())
    assert svd.count == 60


def test_one_batch_of_any_rows_is_exact() -> None:
    x = torch.randn(40, 9)
    svd = fed(x, [40], 4)
    values, vh = directions(x, 4)
    assert svd.components is not None
    torch.testing.assert_close(svd.values, values)
    torch.testing.assert_close((svd.components * vh).sum(1).abs(), torch.ones(4))


def test_the_rows_are_orthonormal_and_their_largest_entries_positive() -> None:
    for iterations in (0, 4):
        components = fed(torch.randn(90, 12), [30, 30, 30], 5, iterations).components
        assert components is not None
        torch.testing.assert_close(components @ components.t(), torch.eye(5))
        assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()


def test_on_rows_of_full_rank_the_leading_directions_are_near() -> None:
    x = torch.randn(400, 20) * torch.linspace(4, 0.5, 20)
    components = fed(x, [50] * 8, 8).components
    assert components is not None
    assert (components[:4] * directions(x, 4)[1]).sum(1).abs().min() > 0.98


def test_the_same_batch_again_leaves_the_directions_where_they_are() -> None:
    x, svd = torch.randn(30, 9), IncrementalSVD(4)
    assert svd.update(x) is None
    cosines = svd.update(x)
    assert cosines is not None
    torch.testing.assert_close(cosines, torch.ones(4))
    torch.testing.assert_close(svd.values, 2**0.5 * directions(x, 4)[0])


def test_rows_without_any_variance_have_some_directions_and_explain_nothing() -> None:
    svd = fed(torch.ones(10, 6), [5, 5], 2)
    assert torch.isfinite(worth("ratio", svd.values, svd.spread, svd.count)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_metrics(metric: str) -> None:
    x = torch.randn(50, 8)
    svd = fed(x, [50], 5)
    squares = torch.linalg.eigvalsh((x - x.mean(0)).t() @ (x - x.mean(0))).flip(0)
    wanted = {
        "ratio": squares / squares.sum(),
        "variance": squares / 49,
        "sum": squares / squares[:5].sum(),
        "max": squares / squares[0],
    }[metric][:5]
    torch.testing.assert_close(worth(metric, svd.values, svd.spread, svd.count), wanted)


def test_ranks_go_to_the_largest() -> None:
    worths = {"b": torch.tensor([0.5, 0.4, 0.1]), "a": torch.tensor([0.45, 0.2]), "c": torch.tensor([0.01])}
    assert share_out(worths, 4) == {"b": 2, "a": 2, "c": 0}
    assert share_out({"b": torch.tensor([0.5, 0.4]), "a": torch.tensor([0.5, 0.4])}, 3) == {"b": 1, "a": 2}


# ---- as a statistic ----


class Stack(nn.Module):
    """Layers that each read x in a basis of its own."""

    def __init__(self, count: int = 3, inputs: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, inputs) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def measure(model: nn.Module, data: list[Tensor], **options: Any) -> Any:
    need = Need("input_svd", {"rank": 2, "limit": 4, **options})
    return rw.calibrate(model, data, [need], loss=squares)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[IncrementalSVD]:
    """Every update that was made."""
    seen: list[IncrementalSVD] = []
    plain = IncrementalSVD.update

    def update(self: IncrementalSVD, rows: Tensor) -> Tensor | None:
        seen.append(self)
        return plain(self, rows)

    monkeypatch.setattr(IncrementalSVD, "update", update)
    return seen


def test_it_stops_after_the_second_of_equal_batches(updates: list[IncrementalSVD]) -> None:
    model, x, forwards = Stack(), torch.randn(20, 8), itertools.count()

    def count(module: nn.Module, args: object) -> None:
        next(forwards)

    model.register_forward_pre_hook(count)
    found = measure(model, [x] * 10)
    assert len(updates) == 6
    assert next(forwards) == 2
    assert all(int(parts["input_svd.count"]) == 40 for parts in found.values())


def test_the_data_are_gone_through_again_where_that_is_asked(updates: list[IncrementalSVD]) -> None:
    model, x = Stack(), torch.randn(20, 8)
    measure(model, [x], passes=1)
    assert len(updates) == 3
    measure(model, [x], passes=5)
    assert len(updates) == 3 + 6  # a second pass, after which nothing moves


def test_what_sees_the_data_once_takes_no_part_in_a_second_pass() -> None:
    model, data = Stack(1), [torch.randn(20, 8) for _ in range(2)]
    both = [Need("input_svd", {"rank": 2, "limit": 4, "tau": 1.0, "passes": 3}), "input_second_moment", "gradient"]
    found = rw.calibrate(model, data, both, loss=squares)["layers.0"]
    x = torch.cat(data)
    torch.testing.assert_close(found["input_second_moment"], x.t() @ x / 40)
    assert int(found["input_svd.count"]) == 120
    once = rw.calibrate(model, data, ["gradient"], loss=squares)["layers.0"]
    assert torch.equal(found["gradient"], once["gradient"])


def test_a_finished_site_does_no_more_work_while_others_go_on(updates: list[IncrementalSVD]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.still, self.moving = nn.Linear(8, 1), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.still(fixed) + self.moving(x)

    fixed = torch.randn(20, 8)
    still = {"rank": 4, "limit": 4, "tau": 1 - 1e-6}  # equal rows give equal directions, to the rounding of float32
    rw.calibrate(Two(), [torch.randn(20, 8) for _ in range(6)], [Need("input_svd", still)], loss=squares)
    assert sorted(updates.count(svd) for svd in set(updates)) == [2, 6]


def test_a_finished_site_goes_on_when_it_wins_directions_that_still_move() -> None:
    done, other = InputSVD(rank=1, limit=2), InputSVD(rank=1, limit=2)
    x = torch.randn(30, 4) * torch.tensor([5.0, 3.0, 0.1, 0.1])
    for statistic in (done, other):
        for _ in range(2):
            statistic.read(x, torch.zeros(30, dtype=torch.long))
    assert done.still is not None
    assert other.svd is not None
    done.still = torch.tensor([True, False])
    InputSVD.settle({"done": done, "other": other})
    assert done.done  # one rank each
    other.svd.values = other.svd.values / 10  # what is won elsewhere falls
    InputSVD.settle({"done": done, "other": other})
    assert not done.done
    assert other.done  # and holds nothing now


def test_small_batches_wait_for_others_and_too_small_data_are_refused(updates: list[IncrementalSVD]) -> None:
    model, large, small = Stack(1), torch.randn(20, 8), torch.randn(3, 8)
    found = measure(model, [small, large, small], tau=1.0)["layers.0"]
    assert len(updates) == 2  # 23 tokens, and at the end the three that waited
    whole = measure(model, [torch.cat([small, large])], tau=1.0)["layers.0"]
    assert int(found["input_svd.count"]) == 26
    assert int(whole["input_svd.count"]) == 23
    mean = torch.cat([small, large, small]).mean(0)
    torch.testing.assert_close(found["input_svd.mean"], mean)
    ones = measure(model, list(torch.cat([small, large])[:22].split(1)), tau=1.0)["layers.0"]  # a token at a time
    assert int(ones["input_svd.count"]) == 22
    with pytest.raises(ConfigError, match=r"layers\.0 and 2 more reads 3 tokens .* 4 directions .*calibrate\.batches"):
        measure(Stack(), [small])


def test_no_more_directions_are_tracked_than_there_are_inputs() -> None:
    found = measure(Stack(1, inputs=3), [torch.randn(20, 3)], limit=10)
    assert found["layers.0"]["input_svd.components"].shape == (3, 3)


def test_equal_calls_give_equal_bits_and_the_random_state_stays() -> None:
    model = tiny_llama()
    data = [{"input_ids": (ids := token_batch(batch=4, seed=s)), "labels": ids} for s in range(2)]
    need = [Need("input_svd", {"rank": 4, "limit": 8, "iterations": 2})]
    state = torch.random.get_rng_state()
    first, second = (rw.calibrate(model, data, need) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[n][p], second[n][p]) for n in first for p in first[n])


def test_hooks_are_gone_after_an_exception_in_a_later_batch() -> None:
    model, calls = Stack(), itertools.count()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        if next(calls):
            raise RuntimeError("no more")
        return squares(model, x)

    with pytest.raises(RuntimeError, match="no more"):
        rw.calibrate(model, [torch.randn(20, 8)] * 2, [Need("input_svd", {"rank": 2, "limit": 4})], loss=loss)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
