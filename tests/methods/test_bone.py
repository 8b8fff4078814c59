"""Bone, now MiSS: y = W x + b + D^T z with z the sums of the input's shards."""

from __future__ import annotations

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
from torch import Tensor

import rankworks as rw
from rankworks.core.errors import TargetError


def shards(rank: int, inputs: int) -> Tensor:
    """E (r, in): one where i mod r = j."""
    return (torch.arange(inputs) % rank == torch.arange(rank).unsqueeze(1)).double()


@pytest.mark.parametrize("settings", [{}, {"mini": 3}])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_leaves_the_output_bit_identical(kind: str, settings: dict[str, int]) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    assert torch.equal(adapted(layer, "bone", rank=4, **settings)(x), plain)


@quick
@given(inputs=sizes, outputs=sizes, data=st.data())
def test_the_change_is_dt_e_also_where_r_does_not_divide_the_inputs(
    inputs: int, outputs: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, inputs))
    model, x = adapted(linear(inputs, outputs), "bone", rank=rank), torch.randn(3, inputs)
    delta = shake(model)
    change = delta.D.t() @ shards(rank, inputs)
    close(change_of(model), change)
    close(model(x), x @ (model.layer.weight + change).t() + model.layer.bias)


def test_moving_mass_between_inputs_r_apart_changes_nothing() -> None:
    model, x = adapted(linear(7, 5), "bone", rank=3), torch.randn(4, 7)
    delta = shake(model)
    moved = x.clone()
    moved[:, 1] += 2.5
    moved[:, 4] -= 2.5  # 1 and 4 lie in shards of the same number mod 3
    close(delta.branch(moved), delta.branch(x))


def test_columns_r_apart_are_identical() -> None:
    model = adapted(linear(7, 5), "bone", rank=3)
    shake(model)
    change = change_of(model)
    assert torch.equal(change[:, :4], change[:, 3:])


def test_the_rank_of_the_change_is_at_most_r() -> None:
    model = adapted(linear(9, 8), "bone", rank=3)
    shake(model)
    assert rank_of(change_of(model)) == 3


def test_the_gradient_of_d_is_e_gt_and_dense_at_the_first_step() -> None:
    model = adapted(linear(7, 5), "bone", rank=3)
    delta = delta_of(model)
    _, G = backward(model, torch.randn(4, 7))
    close(delta.D.grad, shards(3, 7) @ G.t())
    assert (delta.D.grad != 0).all()


def test_it_is_a_lora_whose_a_is_the_shard_matrix() -> None:
    """Also in training: with A frozen at E, B^T takes the same steps as D."""
    bone, lora = adapted(linear(7, 5), "bone", rank=3), adapted(linear(7, 5), "lora", rank=3, alpha=3)
    D, pair = delta_of(bone).D, delta_of(lora)
    with torch.no_grad():
        lora.layer.weight.copy_(bone.layer.weight)
        lora.layer.bias.copy_(bone.layer.bias)
        pair.A.copy_(shards(3, 7))
    for _ in range(5):
        x = torch.randn(4, 7)
        for model, parameter in ((bone, D), (lora, pair.B)):
            parameter.grad = None
            model(x).square().sum().backward()
            with torch.no_grad():
                parameter.sub_(0.01 * parameter.grad)
    close(pair.B.t(), D)


def test_merged_equals_unmerged_where_r_does_not_divide_the_inputs() -> None:
    model, x = adapted(linear(7, 5), "bone", rank=3), torch.randn(4, 7)
    shake(model)
    y = model(x)
    close(rw.merge(model)(x), y)


# ---- mini ----


def test_mini_repeats_a_narrow_d_over_the_outputs() -> None:
    model, x = adapted(linear(7, 6), "bone", rank=3, mini=2), torch.randn(4, 7)
    delta = shake(model)
    assert delta.D.shape == (3, 2)
    change = torch.cat([delta.D] * 3, dim=1).t() @ shards(3, 7)
    close(change_of(model), change)
    close(model(x), x @ (model.layer.weight + change).t() + model.layer.bias)


def test_mini_as_wide_as_the_output_is_the_row_sum_form() -> None:
    model = adapted(linear(7, 6), "bone", rank=3, mini=6)
    delta = shake(model)
    close(change_of(model), delta.D.t() @ shards(3, 7))


def test_a_mini_that_does_not_divide_the_outputs_is_refused() -> None:
    with pytest.raises(TargetError, match="give a divisor"):
        adapted(linear(7, 6), "bone", rank=3, mini=4)


# ---- cost ----


def test_a_shard_wider_than_the_input_is_refused() -> None:
    with pytest.raises(TargetError, match="lower rank there"):
        adapted(linear(7, 5), "bone", rank=8)


def test_it_trains_rank_times_out_numbers_or_rank_times_mini() -> None:
    assert rw.trainable_parameters(adapted(linear(7, 6), "bone", rank=3)) == 18
    assert rw.trainable_parameters(adapted(linear(7, 6), "bone", rank=3, mini=2)) == 6


def test_few_tokens_are_not_kept_for_backward() -> None:
    """Many are: then D^T E is added into the weight, which costs less and needs x."""
    x = torch.randn(2, 7)
    kept = kept_for_backward(adapted(linear(7, 5), "bone", rank=3), x)
    assert x.shape not in kept
    assert (2, 3) in kept
