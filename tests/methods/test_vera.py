"""VeRA: W' = W + diag(b) B diag(d) A with one frozen random pair A, B for the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from facts import (
    KINDS,
    adapted,
    backward,
    change_of,
    close,
    delta_of,
    kept_for_backward,
    layer_and_input,
    linear,
    quick,
    rank_of,
    shake,
    sizes,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rankworks as rw


def several() -> nn.ModuleDict:
    """Layers of four shapes; the widest input is 9 and the widest output 8, in different layers."""
    shapes = {"a": (9, 4), "b": (5, 8), "c": (9, 8), "d": (3, 2)}
    return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})


def pair(delta: Any) -> tuple[Tensor, Tensor]:
    """The site's A (r, in) and B (out, r), which are drawn in float32."""
    return delta.shared["A"].double(), delta.shared["B"].double()


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_leaves_the_output_bit_identical(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    assert torch.equal(adapted(layer, "vera", rank=4)(x), plain)


def test_the_change_is_diag_b_times_b_diag_d_a() -> None:
    model = adapted(linear(), "vera", rank=4)
    delta = shake(model)
    A, B = pair(delta)
    close(change_of(model), torch.diag(delta.b) @ B @ torch.diag(delta.d) @ A)


def test_b_starts_at_zero_and_d_at_d_initial() -> None:
    delta = delta_of(adapted(linear(), "vera", rank=4, d_initial=0.3))
    assert torch.equal(delta.b, torch.zeros(5))
    assert torch.equal(delta.d, torch.full((4,), 0.3))


def test_at_the_first_step_only_b_has_a_gradient() -> None:
    model = adapted(linear(), "vera", rank=4)
    delta = delta_of(model)
    _, G = backward(model, torch.randn(4, 7))
    A, B = pair(delta)
    assert torch.equal(delta.d.grad, torch.zeros(4))
    close(delta.b.grad, (G * (0.1 * B @ A)).sum(1))


def test_the_gradients_of_both_vectors() -> None:
    """dL/db = diag(G (B D A)^T) and dL/dd = diag(B^T diag(b) G A^T)."""
    model = adapted(linear(), "vera", rank=4)
    delta = shake(model)
    _, G = backward(model, torch.randn(4, 7))
    A, B = pair(delta)
    close(delta.b.grad, (G @ (B @ torch.diag(delta.d) @ A).t()).diagonal())
    close(delta.d.grad, (B.t() @ torch.diag(delta.b) @ G @ A.t()).diagonal())


# ---- the shared pair ----


def test_every_site_reads_a_corner_of_one_pair_without_a_copy() -> None:
    model = rw.adapt(several().float(), "vera", rank=4, targets="a,b,c,d")
    pointers = set()
    for site, (outputs, inputs) in {"a": (4, 9), "b": (8, 5), "c": (8, 9), "d": (2, 3)}.items():
        B, A = delta_of(model, site=site)._slices()
        assert (B.shape, A.shape) == ((outputs, 4), (4, inputs))
        pointers.add((B.data_ptr(), A.data_ptr()))
    assert len(pointers) == 1


def test_the_pair_is_as_wide_as_the_widest_input_and_output() -> None:
    model = rw.adapt(several(), "vera", rank=4, targets="a,b,d")
    shared = delta_of(model, site="d").shared
    assert (shared["A"].shape, shared["B"].shape) == ((4, 9), (8, 4))


def test_the_pair_is_kaiming_uniform_from_a_cpu_generator_a_first() -> None:
    delta = delta_of(adapted(linear().float(), "vera", rank=4, projection_seed=5))
    generator = torch.Generator().manual_seed(5)
    for name, shape in (("A", (4, 7)), ("B", (5, 4))):
        expected = torch.empty(shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(expected, generator=generator)
        torch.testing.assert_close(delta.shared[name], expected, rtol=1e-6, atol=0)


def test_the_adapters_seed_does_not_change_the_pair_and_projection_seed_does() -> None:
    one, two, other = (
        delta_of(adapted(linear(), "vera", rank=4, **seeds)).shared["A"]
        for seeds in ({}, {"seed": 3}, {"projection_seed": 3})
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_two_adapters_with_the_same_request_share_the_pair_whatever_their_seeds() -> None:
    model = adapted(linear(), "vera", rank=4, name="a")
    rw.adapt(model, "vera", rank=4, targets="layer", name="b", seed=1)
    assert delta_of(model, "a").shared is delta_of(model, "b").shared


def test_the_pair_is_not_trained_and_not_stored() -> None:
    model = adapted(linear(), "vera", rank=4)
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert set(delta_of(model).state_dict()) == {"b", "d"}
    assert set(model.state_dict()) == {
        "layer.weight",
        "layer.bias",
        "layer.adapters.default.weight.b",
        "layer.adapters.default.weight.d",
    }


# ---- reach ----


@quick
@given(inputs=sizes, outputs=sizes, rank=st.integers(1, 12))
def test_the_rank_of_the_change_is_at_most_r_and_r_may_exceed_the_weight(inputs: int, outputs: int, rank: int) -> None:
    model = adapted(linear(inputs, outputs), "vera", rank=rank)
    shake(model)
    assert rank_of(change_of(model)) <= min(rank, inputs, outputs)
    x = torch.randn(3, inputs)
    close(model(x), x @ (model.layer.weight + change_of(model)).t() + model.layer.bias)


def test_at_b_one_and_d_s_it_is_the_lora_of_its_own_pair() -> None:
    model, x = adapted(linear(), "vera", rank=4), torch.randn(3, 7)
    delta = delta_of(model)
    with torch.no_grad():
        delta.b.fill_(1)
        delta.d.fill_(2)
    same = adapted(linear(), "lora", rank=4, alpha=8)
    lora = delta_of(same)
    with torch.no_grad():
        same.layer.weight.copy_(model.layer.weight)
        same.layer.bias.copy_(model.layer.bias)
        lora.A.copy_(pair(delta)[0])
        lora.B.copy_(pair(delta)[1])
    close(model(x), same(x))


def test_few_tokens_are_not_kept_for_backward() -> None:
    """Many are: then the product is added into the weight, which costs less and needs x."""
    x = torch.randn(2, 7)
    assert x.shape not in kept_for_backward(adapted(linear(), "vera", rank=4), x)
