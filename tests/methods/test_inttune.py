"""IntTune: W' = W + s B R A with A = W[:r], B = W[:, :r] literal blocks of the weight, and R (r, r) alone trained."""

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

import rankworks as rw
from rankworks.core.errors import TargetError
from rankworks.core.site import Shape
from rankworks.core.store import adapter_state
from rankworks.core.summary import trained

NYSTROM = {"init": "nlora", "form": "nystrom"}
STARTS = ["default", "nlora", NYSTROM]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bases_are_literal_blocks_and_the_output_is_bit_identical(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    model = adapted(layer, "inttune", rank=2)
    W, delta = weight_of(model), delta_of(model)
    assert torch.equal(delta.A, W[:2])
    assert torch.equal(delta.B, W[:, :2])
    assert not delta.R.any()
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_released_start_has_the_block_they_cross_in_on_a_whole_base(kind: str) -> None:
    layer, x = layer_and_input(kind)
    model = adapted(layer, "inttune", rank=2, alpha=2, init="nlora")
    W, delta = weight_of(model), delta_of(model)
    for mine, block in ((delta.A, W[:2]), (delta.B, W[:, :2]), (delta.R, W[:2, :2])):
        assert torch.equal(mine, block)
    close(change_of(model), W[:, :2] @ W[:2, :2] @ W[:2])
    assert not torch.equal(model(x), base_of(model, x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_nystrom_start_leaves_the_output_bit_identical(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    model = adapted(layer, "inttune", rank=2, init=NYSTROM)
    assert torch.equal(model(x), plain)
    assert not change_of(model).any()


def test_the_cores_gradient_at_the_start_and_later() -> None:
    model = adapted(linear(), "inttune", rank=3, alpha=6)
    for _ in range(2):
        _, G = backward(model, torch.randn(4, 7))
        delta = delta_of(model)
        close(delta.R.grad, 2 * delta.B.T @ G @ delta.A.T)
        shake(model)


@pytest.mark.parametrize("init", STARTS)
def test_the_core_alone_is_trained_and_kept(init: Any, tmp_path: Path) -> None:
    model, x = adapted(linear(9, 8), "inttune", rank=3, init=init), torch.randn(4, 9)
    delta = delta_of(model)
    A, B = delta.A.clone(), delta.B.clone()
    assert [p.shape for p in trained(model)] == [(3, 3)]
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(delta.A, A)
    assert torch.equal(delta.B, B)
    assert rank_of(change_of(model)) == 3
    y = model(x)
    rw.save(model, tmp_path / "adapter")
    kept = {k.rsplit(".", 1)[-1] for k in adapter_state(model)}
    assert kept == ({"R"} if init != NYSTROM else {"A", "B", "R", "R0"})  # blocks are rebuilt, found crosses stored
    rw.detach(model)
    close(rw.load(model, tmp_path / "adapter")(x), y)


@pytest.mark.parametrize("init", STARTS)
def test_the_change_is_a_plain_lora_of_rank_r_and_merges(init: Any) -> None:
    model, x = adapted(linear(9, 8), "inttune", rank=3, alpha=6, init=init), torch.randn(4, 9)
    start = delta_of(model).R.detach().clone() if init is NYSTROM else torch.zeros(3, 3)
    delta = shake(model)
    B, A = delta.factors()
    assert (B.shape, A.shape) == ((8, 3), (3, 9))
    close(change_of(model), 2 * delta.B @ (delta.R.detach() - start) @ delta.A)
    y = model(x)
    rw.merge(model)
    close(model(x), y)


def test_dora_goes_around_it() -> None:
    model, x = adapted(linear(9, 8), "dora", inner="inttune", rank=2, init=NYSTROM), torch.randn(4, 9)
    close(model(x), base_of(model, x))
    shake(model)
    y = model(x)
    rw.merge(model)
    close(model(x), y)


def test_the_change_stays_in_the_span_of_the_weights_first_columns_and_rows() -> None:
    model = adapted(linear(9, 8), "inttune", rank=3)
    shake(model)
    W, change = weight_of(model), change_of(model)
    columns, rows = torch.linalg.qr(W[:, :3]).Q, torch.linalg.qr(W[:3].T).Q
    negligible(change - columns @ (columns.T @ change))
    negligible(change - (change @ rows) @ rows.T)


def test_the_printed_count() -> None:
    """Llama-2-7B, seven projections of 32 layers at r = 128."""
    shapes = [Shape(4096, 4096)] * 4 + [Shape(11008, 4096)] * 2 + [Shape(4096, 11008)]
    spec = rw.IntTune(rank=128)
    assert 32 * sum(spec.method.cls.count(spec, s) for s in shapes) == 3_670_016


def test_more_ranks_than_rows_are_refused() -> None:
    with pytest.raises(TargetError, match="at most 5 here, and rank is 6"):
        adapted(linear(), "inttune", rank=6)


@pytest.mark.parametrize("init", STARTS)
def test_it_learns(init: Any) -> None:
    seen = losses(tiny_adapted("inttune", rank=4, init=init))
    assert seen[-1] < 0.98 * seen[0]
