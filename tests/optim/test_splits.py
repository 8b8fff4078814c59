"""What FRUGAL and its kin are made of: coordinates, bases, turns of blocks, rules, moments over a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.errors import ConfigError
from rankworks.core.optim.blocks import Blocks
from rankworks.core.optim.carry import carry, meeting, realigned
from rankworks.core.optim.coordinates import Coordinates, count_coordinates, draw_coordinates, portion
from rankworks.core.optim.projection import Basis
from rankworks.core.optim.rules import direction, moments_of
from rankworks.core.optim.split import Share, add_kept, left_over, store, stored

COORDINATES = [
    ("columns", "std"),
    ("rows", "std"),
    ("randk", "std"),
    *(("randperm", s) for s in ("std", "left", "full")),
]
BASES = [(p, s) for p in ("svd", "random", "dct") for s in ("std", "reverse_std", "left", "right", "full")]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_of(projection: Any, side: Any, G: Tensor, density: float = 0.4, seed: int = 0) -> Any:
    found = Share(projection, density, side).find(G, Draw(seed, "w"))
    return None if found is None else store({}, found, G)


@pytest.mark.parametrize(("projection", "side"), [*COORDINATES, *BASES])
@pytest.mark.parametrize("shape", [(10, 7), (7, 10)])
def test_down_after_up_is_the_identity_and_the_rest_is_what_is_missing(projection: Any, side: Any, shape: Any) -> None:
    G = draw(*shape)
    kept = kept_of(projection, side, G)
    R = kept.into(G)
    assert R.numel() == Share(projection, 0.4, side).numbers(shape)
    back = kept.back(R) if isinstance(kept, Basis) else kept.back(R, shape)
    torch.testing.assert_close(kept.into(back), R, atol=1e-12, rtol=0)
    rest = left_over(kept, G, R, signed=False)
    torch.testing.assert_close(rest, G - back, atol=1e-12, rtol=0)
    torch.testing.assert_close(G.square().sum(), R.square().sum() + rest.square().sum(), atol=1e-10, rtol=0)
    torch.testing.assert_close(left_over(kept, G, R, signed=True), rest.sign(), atol=0, rtol=0)
    moved, N = draw(*shape, seed=3), draw(*R.shape, seed=4)
    wanted = moved - 0.3 * (kept.back(N) if isinstance(kept, Basis) else kept.back(N, shape))
    add_kept(moved, kept, N, -0.3)
    torch.testing.assert_close(moved, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("projection", "side"), COORDINATES)
def test_coordinates_keep_numbers_as_they_are(projection: Any, side: Any) -> None:
    G = draw(10, 7).t()  # of another order in memory
    kept = kept_of(projection, side, G)
    back = kept.back(kept.into(G), tuple(G.shape))
    assert torch.equal(back[back != 0], G[back != 0])
    assert int((back != 0).sum()) == Share(projection, 0.4, side).numbers((7, 10))
    turned = torch.zeros(10, 7, dtype=torch.float64).t()
    kept.put(turned, kept.into(G))
    assert torch.equal(turned, back)


def test_shares_are_rounded_down_as_they_were_meant() -> None:
    assert [portion(d, n) for d, n in ((0.29, 100), (0.25, 5461), (0.1, 30), (1.0, 7), (0.0, 7))] == [29, 1365, 3, 7, 0]
    assert [portion(8 / n, n) for n in range(8, 5000)] == [8] * 4992
    assert count_coordinates("rows", (10, 4), 0.39).rows == 3
    assert count_coordinates("columns", (10, 4), 0.49).columns == 1
    assert count_coordinates("randk", (10, 4), 0.49).entries == 19
    assert count_coordinates("randperm", (10, 4), 0.4).columns == 2, "the nearest of 1.6"
    assert count_coordinates("columns", (10,), 0.49).entries == 4, "a vector has entries alone"
    assert Share("svd", 0.4).rank((10, 4)) == 2
    assert Share("svd", 0.9, "reverse_std").rank((10, 4)) == 4, "of 9: there are no more singular vectors"
    assert Share("random", 0.9, "reverse_std").rank((10, 4)) == 9


@pytest.mark.parametrize(("projection", "side"), [("random", "std"), ("random", "full"), *COORDINATES])
def test_draws_depend_on_their_source_alone(projection: Any, side: Any) -> None:
    first = kept_of(projection, side, draw(30, 20))
    torch.manual_seed(5)
    again, other = kept_of(projection, side, draw(30, 20, seed=9)), kept_of(projection, side, draw(30, 20), seed=1)
    for a, b, c in zip(first, again, other, strict=True):
        assert (a is None) == (b is None) == (c is None)
        if a is not None:
            assert torch.equal(a, b)
            assert not torch.equal(a, c)


def test_every_coordinate_is_as_likely() -> None:
    """Of 8 columns 2, 4000 times: each 1000 times with a deviation of sqrt(4000 * 1/4 * 3/4) = 27."""
    counts = count_coordinates("columns", (4, 8), 0.25)
    drawn = [draw_coordinates(counts, (4, 8), Draw(seed, "w")).columns for seed in range(4000)]
    seen = torch.bincount(torch.cat(drawn), minlength=8)  # type: ignore[arg-type]
    assert (seen - 1000).abs().max() < 4 * 27.4


def test_what_is_kept_goes_into_a_state_and_out_again() -> None:
    for projection, side in [*COORDINATES, *BASES]:
        G, state = draw(10, 7), {}
        share = Share(projection, 0.4, side)  # type: ignore[arg-type]
        kept = store(state, share.find(G, Draw(0)), G)  # type: ignore[arg-type]
        assert sum(t.numel() * t.element_size() for t in state.values()) == share.bytes((10, 7), 8)
        again = stored(state, G)
        assert type(again) is type(kept)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    assert stored({}, draw(10, 7)) is None
    assert Share("columns", 0.05).find(draw(10, 7), Draw(0)) is None


# ---- moments over a change ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_realigned_moments_are_what_the_new_basis_sees_of_what_the_old_one_held(side: Any) -> None:
    G = draw(8, 6)
    old, new = kept_of("random", side, G), kept_of("random", side, G, seed=1)
    m, v = draw(*old.into(G).shape, seed=2), draw(*old.into(G).shape, seed=3).square()
    torch.testing.assert_close(realigned(m, old, new), new.into(old.back(m)), atol=1e-12, rtol=0)
    assert bool((realigned(v, old, new, squares=True) >= 0).all())
    torch.testing.assert_close(realigned(m, old, old), m, atol=1e-12, rtol=0)
    torch.testing.assert_close(realigned(v, old, old, squares=True), v, atol=1e-12, rtol=0)


def test_realigned_squares_are_the_variance_of_uncorrelated_coordinates() -> None:
    """200,000 draws with variances v in the old basis: their variance in the new one is (T*T) v, to 5 deviations."""
    old, new = kept_of("random", "left", draw(8, 1)), kept_of("random", "left", draw(8, 1), seed=1)
    v = torch.tensor([[4.0], [1.0], [0.25]], dtype=torch.float64)
    seen = new.into(old.back(v.sqrt() * draw(3, 200_000))).square().mean(1, keepdim=True)
    wanted = realigned(v, old, new, squares=True)
    assert bool(((seen - wanted).abs() < 5 * wanted * (2 / 200_000) ** 0.5).all())


@pytest.mark.parametrize(("projection", "side"), COORDINATES)
def test_between_choices_of_coordinates_what_stays_moves_and_what_is_new_is_zero(projection: Any, side: Any) -> None:
    G = draw(10, 7)
    old, new = kept_of(projection, side, G, 0.6), kept_of(projection, side, G, 0.6, seed=1)
    m = draw(*old.into(G).shape, seed=2)
    wanted = new.into(old.back(m, (10, 7)))
    assert torch.equal(realigned(m, old, new), wanted)
    assert torch.equal(realigned(m.square(), old, new, squares=True), wanted.square())
    assert (wanted == 0).any()
    assert (wanted != 0).any()


def test_meetings_of_lists_in_any_order() -> None:
    old, new = torch.tensor([9, 2, 5, 7]), torch.tensor([5, 1, 9, 30])
    source, target = meeting(old, new)
    assert old[source].tolist() == new[target].tolist() == [5, 9]
    assert meeting(old[:0], new)[0].tolist() == meeting(old, new[:0])[1].tolist() == []


def test_moments_are_kept_or_go() -> None:
    G = draw(10, 7)
    old, new = kept_of("columns", "std", G), kept_of("columns", "std", G, seed=1)
    state = {"exp_avg": old.into(G), "exp_avg_sq": old.into(G), "step": torch.zeros(())}
    carry(state, "keep", old, new)
    assert torch.equal(state["exp_avg"], old.into(G))
    carry(state, "reset", old, new)
    assert list(state) == ["step"]
    with pytest.raises(TypeError, match="from a basis to a basis"):
        realigned(G, kept_of("svd", "left", G), Coordinates(rows=torch.arange(3)))


# ---- turns ----------------------------------------------------------------------------------------------------------

NAMES = [f"w{i}" for i in range(8)]


def test_turns_go_round_in_their_order() -> None:
    places = {
        order: [sorted(int(n[1:]) for n in Blocks(NAMES, 3, order).active(k)) for k in range(3)]  # type: ignore[arg-type]
        for order in ("ascending", "descending")
    }
    assert places["ascending"] == [[0, 1, 2], [3, 4, 5], [0, 6, 7]]
    assert places["descending"] == [[5, 6, 7], [2, 3, 4], [0, 1, 7]]
    mirror = [sorted(int(n[1:]) for n in Blocks(NAMES, 2, "mirror").active(k)) for k in range(5)]
    assert mirror == [[0, 7], [1, 6], [2, 5], [3, 4], [0, 7]]


def test_random_turns_are_drawn_anew_from_seed_and_period() -> None:
    blocks = Blocks(NAMES, 3)
    far = blocks.active(40)
    drawn = [blocks.active(k) for k in range(40)]
    assert all(len(active) == 3 for active in drawn)
    assert len(set(drawn)) > 20
    assert Blocks(NAMES, 3).active(40) == far == blocks.active(40), "whatever was asked before"
    assert [Blocks(NAMES, 3, seed=1).active(k) for k in range(3)] != drawn[:3]
    assert Blocks(NAMES, 0).active(0) == Blocks([], 0).active(3) == frozenset()


def test_how_long_a_tensor_has_been_active_is_a_function_too() -> None:
    """Asked for step by step, or once at the end as a resumed run does."""
    asked = Blocks(NAMES, 5)
    for period in range(30):
        for name in asked.active(period):
            start = next(k for k in range(period, -1, -1) if k == 0 or name not in Blocks(NAMES, 5).active(k - 1))
            assert asked.since(name, period) == Blocks(NAMES, 5).since(name, period) == start


def test_pairs_need_an_even_number() -> None:
    with pytest.raises(ConfigError, match=r"density that makes it an even number, for example 0\.5"):
        Blocks(NAMES, 3, "mirror")


# ---- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgdm", "signsgdm"])
def test_rules_are_their_formulas(rule: Any) -> None:
    state: dict[str, Any] = {}
    m, v, betas, mu = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), (0.7, 0.9), 0.8
    for t in range(1, 5):
        R = draw(5, seed=t)
        if rule == "adamw":
            m, v = 0.7 * m + 0.3 * R, 0.9 * v + 0.1 * R**2
            wanted = (m / (1 - 0.7**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        elif rule == "lion":
            wanted, m = (0.7 * m + 0.3 * R).sign(), 0.9 * m + 0.1 * R
        else:
            m = mu * m + R
            wanted = m.sign() if rule == "signsgdm" else m
        kept = R.clone()
        N, factor = direction(rule, state, R, t, betas, 1e-3, mu)
        torch.testing.assert_close(factor * N, wanted, atol=1e-12, rtol=0)
        assert torch.equal(R, kept), "the gradient is left as it is"
    assert sum(t.numel() for t in state.values()) == 5 * moments_of(rule, mu)


def test_without_momentum_nothing_is_kept() -> None:
    R, state = draw(5), {}
    assert torch.equal(direction("sgdm", state, R, 1, (0, 0), 1, 0.0).N, R)
    assert torch.equal(direction("signsgdm", state, R, 1, (0, 0), 1, 0.0).N, R.sign())
    assert not state
    assert moments_of("sgdm", 0.0) == 0
