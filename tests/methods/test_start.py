"""The default and gaussian starts: one factor random, the other zero."""

from __future__ import annotations

import pytest
import torch
from facts import adapted, backward, change_of, close, delta_of, embedding, linear, quick, sizes, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankworks as rw
from rankworks.core.draw import Draw
from rankworks.core.start import Init, Place, Start, begin
from rankworks.core.store import adapter_state
from tiny import tiny_mlp

STARTS = ["default", "gaussian"]


@pytest.mark.parametrize("init", STARTS)
def test_a_is_random_and_b_is_zero(init: str) -> None:
    delta = delta_of(adapted(linear(), "lora", rank=3, init=init))
    assert (delta.A != 0).all()
    assert torch.equal(delta.B, torch.zeros_like(delta.B))


@quick
@given(inputs=sizes, outputs=sizes, rank=st.integers(1, 12))
def test_default_a_lies_within_one_over_the_root_of_the_inputs(inputs: int, outputs: int, rank: int) -> None:
    delta = delta_of(adapted(linear(inputs, outputs), "lora", rank=rank))
    assert delta.A.abs().max() <= inputs**-0.5


def test_default_a_is_uniform() -> None:
    """Its k-th absolute moment is bound^k/(k + 1); 80,000 numbers tell it from other laws."""
    A = delta_of(adapted(linear(400, 3), "lora", rank=200)).A * 400**0.5
    assert abs(A.mean()) < 5 * (1 / 3 / A.numel()) ** 0.5
    for k in (1, 2, 4):
        mean, square = 1 / (k + 1), 1 / (2 * k + 1)
        assert abs(A.abs().pow(k).mean() - mean) < 5 * ((square - mean**2) / A.numel()) ** 0.5


@pytest.mark.parametrize("rank", [2, 200])
def test_gaussian_a_has_standard_deviation_one_over_r(rank: int) -> None:
    A = delta_of(adapted(linear(4000, 3), "lora", rank=rank, init="gaussian")).A * rank
    assert abs(A.mean()) < 5 / A.numel() ** 0.5
    assert abs(A.square().mean() - 1) < 5 * (2 / A.numel()) ** 0.5
    assert abs(A.pow(4).mean() - 3) < 5 * (96 / A.numel()) ** 0.5


@pytest.mark.parametrize("init", STARTS)
def test_after_one_sgd_step_the_change_is_minus_eta_s_squared_g_at_a(init: str) -> None:
    model, eta, s = adapted(linear(), "lora", rank=3, alpha=6, init=init), 0.1, 2
    delta = delta_of(model)
    A = delta.A.detach().clone()
    _, G = backward(model, torch.randn(4, 7))
    torch.optim.SGD(delta.parameters(), lr=eta).step()
    assert torch.equal(delta.A, A)
    close(delta.B, -eta * s * G @ A.t())
    close(change_of(model), -eta * s**2 * G @ A.t() @ A)


def test_with_the_roles_reversed_only_a_has_a_gradient() -> None:
    model = adapted(linear(), "lora", rank=3, alpha=6)
    delta = delta_of(model)
    with torch.no_grad():
        delta.A.zero_()
        delta.B.normal_()
    _, G = backward(model, torch.randn(4, 7))
    assert torch.equal(delta.B.grad, torch.zeros_like(delta.B))
    close(delta.A.grad, 2 * delta.B.t() @ G)


# ---- embeddings ----


@pytest.mark.parametrize("init", STARTS)
def test_an_embedding_starts_with_a_zero_and_b_standard_normal(init: str) -> None:
    delta = delta_of(adapted(nn.Embedding(12, 400), "lora", rank=200, init=init))
    assert torch.equal(delta.A, torch.zeros_like(delta.A))
    assert abs(delta.B.mean()) < 5 / delta.B.numel() ** 0.5
    assert abs(delta.B.square().mean() - 1) < 5 * (2 / delta.B.numel()) ** 0.5


def test_an_embeddings_first_step_moves_only_the_rows_that_were_looked_up() -> None:
    model, ids = adapted(embedding(), "lora", rank=3, alpha=6), tokens(4, 5, below=7)
    delta = delta_of(model)
    y = model(ids)
    g = torch.randn_like(y)
    (g * y).sum().backward()
    one_hot = torch.nn.functional.one_hot(ids.flatten(), 12).double()
    G = g.flatten(0, 1).t() @ one_hot  # (dimension, vocabulary)
    close(delta.A.grad, 2 * delta.B.t() @ G)
    assert torch.equal(delta.A.grad[:, 7:], torch.zeros(3, 5))
    assert torch.equal(delta.B.grad, torch.zeros_like(delta.B))


# ---- randomness ----


def factors(targets: str, seed: int = 0) -> dict[str, torch.Tensor]:
    model = rw.adapt(tiny_mlp().double(), "lora", rank=3, targets=targets, seed=seed)
    return {name: delta_of(model, site=name).A.detach() for name in rw.delta_weights(model)}


def test_the_same_seed_gives_the_same_factors_whatever_else_is_drawn() -> None:
    first = factors("first,second,head")
    torch.randn(17)
    assert all(torch.equal(first[name], again) for name, again in factors("first,second,head").items())


def test_a_sites_factors_do_not_depend_on_the_other_sites() -> None:
    assert torch.equal(factors("first,second,head")["head"], factors("head")["head"])


def test_sites_of_one_shape_draw_different_numbers() -> None:
    model = rw.adapt(nn.ModuleDict({"a": linear(), "b": linear()}), "lora", rank=3, targets="a,b")
    assert not torch.equal(delta_of(model, site="a").A, delta_of(model, site="b").A)


def test_another_seed_gives_other_factors() -> None:
    assert not torch.equal(factors("head")["head"], factors("head", seed=1)["head"])


def test_the_numbers_do_not_depend_on_the_default_type() -> None:
    model = tiny_mlp().float()
    in_double = delta_of(rw.adapt(model, "lora", rank=3, targets="head", name="a"), "a", "head").A
    torch.set_default_dtype(torch.float32)
    in_single = delta_of(rw.adapt(model, "lora", rank=3, targets="head", name="a2"), "a2", "head").A
    assert torch.equal(in_double, in_single)


@pytest.mark.parametrize("init", [*STARTS, "pissa", "olora"])
def test_starting_an_adapter_leaves_the_global_random_state_alone(init: str) -> None:
    layer = linear()
    before = torch.get_rng_state()
    adapted(layer, "lora", rank=2, init=init)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("delta", "init", "extra"),
    [
        ("lora", "lora-ga", {"A0", "B0"}),
        ("lora", "pissa", {"A0", "B0"}),
        ("lora", {"init": "pissa", "quantised": True}, set()),
        ("lora", "olora", {"A0", "B0"}),
        ("lora", "corda", {"A0", "B0"}),
        ("lora", "eva", set()),
        ("lora", "loftq", set()),
        ("lora-xs", "lora-sb", {"A", "B"}),
        ("nlora", "nlora", set()),
        ("nlora", {"init": "nlora", "form": "nystrom"}, {"A0", "N0", "B0"}),
    ],
)
def test_where_there_are_no_numbers_a_start_has_its_shapes(delta: str, init: object, extra: set[str]) -> None:
    """A plan of a large model is made on the meta device, without data: what will be stored is known all the same."""
    model = rw.adapt(nn.Sequential(nn.Linear(64, 48, device="meta")), delta, rank=4, init=init)
    found = {k.rsplit(".", 1)[-1]: t for k, t in adapter_state(model).items()}
    trained = {"lora": {"A", "B"}, "lora-xs": {"R"}, "nlora": {"A", "N", "B"}}[delta]
    assert set(found) == trained | extra
    assert all(t.is_meta for t in found.values())


def test_a_start_that_is_not_what_it_declares_is_an_error() -> None:
    class Wrong(Init):
        from_base = True

        def start(self, place: Place) -> Start:
            return Start(place.weight[: place.rank], place.weight[:, : place.rank])

    wrong = object.__new__(Wrong)
    with pytest.raises(TypeError, match="declared otherwise"):
        begin(wrong, Place(torch.randn(4, 5), 2, 1.0, Draw(0)))
