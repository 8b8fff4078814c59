"""NLoRA and SLoRA: an r x r matrix between factors that start at zero, at blocks of the weight, or at Nystrom's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import (
    KINDS,
    adapted,
    backward,
    base_of,
    change_of,
    close,
    delta_of,
    layer_and_input,
    linear,
    negligible,
    rank_of,
    shake,
    weight_of,
)
from learning import losses, tiny_adapted
from torch import nn

import rankworks as rw
from rankworks.core.errors import TargetError
from rankworks.core.site import Shape

NYSTROM = {"init": "nlora", "form": "nystrom"}
LEADING = {**NYSTROM, "pivots": "leading"}


def of_rank(rank: int, outputs: int = 8, inputs: int = 9) -> nn.Linear:
    """A layer whose weight has exactly this rank."""
    layer = linear(inputs, outputs)
    layer.weight = nn.Parameter(torch.randn(outputs, rank) @ torch.randn(rank, inputs))
    return layer


def product(delta: Any) -> torch.Tensor:
    return delta.scale * delta.B @ delta.N @ delta.A


# ---- SLoRA ----


@pytest.mark.parametrize("kind", KINDS)
def test_slora_leaves_the_output_bit_identical(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    assert torch.equal(adapted(layer, "nlora", rank=2)(x), plain)


def test_slora_is_uniform_in_a_and_n_with_b_zero() -> None:
    delta = delta_of(adapted(linear(400, 30), "nlora", rank=20))
    for factor, bound in ((delta.A, 400**-0.5), (delta.N, 20**-0.5)):
        assert factor.abs().max() <= bound
        assert factor.abs().max() > 0.97 * bound
        assert abs(float(factor.detach().std()) / (bound / 3**0.5) - 1) < 0.06
    assert not delta.B.any()


def test_at_the_start_of_slora_only_b_has_a_gradient() -> None:
    model = adapted(linear(), "nlora", rank=3, alpha=6)
    _, G = backward(model, torch.randn(4, 7))
    delta = delta_of(model)
    negligible(delta.N.grad)
    negligible(delta.A.grad)
    close(delta.B.grad, 2 * G @ (delta.N @ delta.A).T)


def test_the_gradients_of_all_three() -> None:
    model = adapted(linear(), "nlora", rank=3, alpha=6)
    delta = shake(model)
    _, G = backward(model, torch.randn(4, 7))
    close(delta.N.grad, 2 * delta.B.T @ G @ delta.A.T)
    close(delta.A.grad, 2 * (delta.B @ delta.N).T @ G)
    close(delta.B.grad, 2 * G @ (delta.N @ delta.A).T)


# ---- blocks of the weight ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_released_start_is_literal_blocks_on_a_whole_base(kind: str) -> None:
    layer, x = layer_and_input(kind)
    model = adapted(layer, "nlora", rank=2, alpha=2, init="nlora")
    W, delta = weight_of(model), delta_of(model)
    for mine, block in ((delta.A, W[:2]), (delta.B, W[:, :2]), (delta.N, W[:2, :2])):
        assert torch.equal(mine, block)
    close(change_of(model), W[:, :2] @ W[:2, :2] @ W[:2])
    assert not torch.equal(model(x), base_of(model, x))


def test_the_released_start_is_off_by_s_sigma_squared_r() -> None:
    layer = linear(1024, 1024, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    model = adapted(layer, "nlora", rank=128, alpha=128, init="nlora")
    off = float(change_of(model).norm() / weight_of(model).norm())
    assert off == pytest.approx(0.02**2 * 128, rel=0.02)  # 0.0512


@pytest.mark.parametrize("init", [NYSTROM, LEADING])
@pytest.mark.parametrize("alpha", [1.0, 3.0, 12.0])
def test_nystrom_is_the_weight_where_that_has_rank_r(init: Any, alpha: float) -> None:
    model = adapted(of_rank(3), "nlora", rank=3, alpha=alpha, init=init)
    close(product(delta_of(model)), weight_of(model), 1e-9)


@pytest.mark.parametrize("init", [NYSTROM, LEADING])
def test_nystrom_reproduces_its_rows_and_columns(init: Any) -> None:
    model = adapted(linear(9, 8), "nlora", rank=3, alpha=6, init=init)
    W, delta = weight_of(model), delta_of(model)
    rows = [int((row == W).all(1).nonzero()) for row in delta.A]
    columns = [int((column == W.T).all(1).nonzero()) for column in delta.B.T]
    if init is LEADING:
        assert rows == columns == [0, 1, 2]
    close(product(delta)[rows], W[rows], 1e-9)
    close(product(delta)[:, columns], W[:, columns], 1e-9)


def test_a_singular_crossing_is_cut_at_rcond() -> None:
    layer = linear(9, 8)
    with torch.no_grad():
        layer.weight[0, :3] = 1e-9
    delta = delta_of(adapted(layer, "nlora", rank=3, init=LEADING))
    assert rank_of(delta.N.detach()) == 2
    assert delta.N.abs().max() < 1e6


def test_rook_pivots_leave_less_than_a_nearly_singular_leading_block() -> None:
    layer = linear(9, 8)
    with torch.no_grad():
        layer.weight[0, :3] = 1e-3 * layer.weight[1, :3] + 1e-4
    rest = {}
    for name, init in (("rook", NYSTROM), ("leading", LEADING)):
        model = adapted(layer, "nlora", rank=3, init=init)
        rest[name] = float((weight_of(model) - product(delta_of(model)).detach()).norm() / weight_of(model).norm())
        rw.detach(model)
    assert rest["rook"] < 1.2
    assert rest["leading"] > 10 * rest["rook"]


@pytest.mark.parametrize("delta", ["nlora", "lora-xs"])
@pytest.mark.parametrize("kind", KINDS)
def test_nystrom_leaves_the_output_bit_identical(kind: str, delta: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    model = adapted(layer, delta, rank=2, init=NYSTROM)
    assert torch.equal(model(x), plain)
    assert not change_of(model).any()


def test_a_weight_without_full_rank_has_a_finite_nystrom_start() -> None:
    for layer in (of_rank(2), of_rank(1)):
        delta = delta_of(adapted(layer, "nlora", rank=4, init=NYSTROM))
        assert all(p.isfinite().all() for p in delta.parameters())
        close(product(delta), layer.weight.detach(), 1e-9)


# ---- what comes of it ----


@pytest.mark.parametrize(("init", "rank"), [("default", 3), ("nlora", 3), (NYSTROM, 6)])
def test_the_change_is_a_plain_lora(init: Any, rank: int, tmp_path: Path) -> None:
    model, x = adapted(linear(9, 8), "nlora", rank=3, alpha=6, init=init), torch.randn(4, 9)
    start = product(delta_of(model)).detach() if init is NYSTROM else 0
    delta = shake(model)
    B, A = delta.factors()
    assert (B.shape, A.shape) == ((8, rank), (rank, 9))
    assert rank_of(change_of(model)) == rank
    close(change_of(model), product(delta).detach() - start)
    y, untouched = model(x), weight_of(model).clone()
    rw.save(model, tmp_path / "adapter")
    rw.merge(model)
    close(model(x), y)
    rw.unmerge(model)
    rw.detach(model)
    again = rw.load(model, tmp_path / "adapter")
    assert torch.equal(weight_of(again), untouched)
    assert torch.equal(again(x), y)


def test_dora_goes_around_it() -> None:
    model, x = adapted(linear(9, 8), "dora", inner="nlora", rank=2, init=NYSTROM), torch.randn(4, 9)
    close(model(x), base_of(model, x))
    shake(model)
    y = model(x)
    rw.merge(model)
    close(model(x), y)


def test_the_printed_count() -> None:
    """Llama-2-7B, seven projections of 32 layers at r = 128."""
    shapes = [Shape(4096, 4096)] * 4 + [Shape(11008, 4096)] * 2 + [Shape(4096, 11008)]
    spec = rw.NLoRA(rank=128)
    assert 32 * sum(spec.method.cls.count(spec, s) for s in shapes) == 319_815_680 + 3_670_016


def test_what_it_cannot_start_is_refused() -> None:
    with pytest.raises(TargetError, match="fills 3 factors and 'lora' has 2"):
        adapted(linear(), "lora", rank=2, init="nlora")
    with pytest.raises(TargetError, match="at most 5 here, and rank is 6"):
        adapted(linear(), "nlora", rank=6, init="nlora")
    with pytest.raises(TargetError, match="fills 2 factors"):
        adapted(linear(), "nlora", rank=2, init="pissa")


@pytest.mark.parametrize("init", ["default", "nlora", NYSTROM])
def test_it_learns(init: Any) -> None:
    seen = losses(tiny_adapted("nlora", rank=4, init=init))
    assert seen[-1] < 0.98 * seen[0]
