"""AdamW in 8 bits: the code books, the blocks, bitsandbytes' steps, and how near it is to 32 bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from eight_bits import adopt_moments
from loops import check_falls, check_resumes
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.codes.blocks import dequantise_blocks, quantise_blocks
from rankworks.core.codes.books import dynamic_book
from rankworks.core.errors import RankworksError
from rankworks.core.optim import moments
from rankworks.optim import adamw8bit
from rankworks.optim.adamw8bit import EightBitAdamW
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_llama


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one(weight: Tensor, lr: float = 0.01, decay: float = 0.0, bits: int = 8) -> tuple[nn.Parameter, EightBitAdamW]:
    parameter = nn.Parameter(weight.clone())
    group = {"params": [parameter], "bits": bits}
    return parameter, EightBitAdamW([group], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
    parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize(("signed", "least", "below_one"), [(True, 5.5e-7, 0.99296875), (False, 3.25e-7, 0.996484375)])
def test_the_books_are_bitsandbytes(signed: bool, least: float, below_one: float) -> None:
    book = dynamic_book(signed)
    assert len(book.unique()) == 256
    assert bool((book.diff() > 0).all())
    assert 0 in book
    assert book[-1] == 1
    assert torch.equal(book, create_dynamic_map(signed=signed).sort().values)
    positive = book[book > 0]
    assert positive[0] == pytest.approx(least, rel=1e-6)
    assert positive[-2] == pytest.approx(below_one, rel=1e-6)
    assert (len(positive), int((book < 0).sum())) == ((128, 127) if signed else (255, 0))


@pytest.mark.parametrize("signed", [True, False])
def test_a_books_values_times_a_scale_come_back_exactly(signed: bool) -> None:
    book = dynamic_book(signed)
    found = quantise_blocks(book * 0.125, book, 256)
    assert torch.equal(found.codes, torch.arange(256).byte())
    assert torch.equal(dequantise_blocks(found), book * 0.125)


@pytest.mark.parametrize(("signed", "gap"), [(True, 0.0140625), (False, 0.00703125)])
def test_the_error_is_at_most_half_the_largest_gap(signed: bool, gap: float) -> None:
    """But near -1, which is absent."""
    x = draw(256 * 64, seed=3)
    x = x if signed else x.abs()
    book = dynamic_book(signed)
    assert float(book.diff().max()) == pytest.approx(gap, rel=2e-5)
    scales = x.view(-1, 256).abs().amax(1, keepdim=True)
    error = (dequantise_blocks(quantise_blocks(x, book, 256)) - x).view(-1, 256).abs() / scales
    near_minus_one = x.view(-1, 256) / scales < -0.99296875
    assert float(error[~near_minus_one].max()) <= gap / 2 * (1 + 2e-5)
    least = quantise_blocks(torch.tensor([-2.0] + [0.0] * 255), dynamic_book(True), 256)
    assert dequantise_blocks(least)[0] == -2 * 0.99296875


def test_an_outlier_changes_only_its_block() -> None:
    x = draw(1024)
    loud = x.clone()
    loud[300] = 1e6
    a, b = (dequantise_blocks(quantise_blocks(v, dynamic_book(True), 256)) for v in (x, loud))
    same = torch.ones(1024, dtype=torch.bool)
    same[256:512] = False
    assert torch.equal(a[same], b[same])
    assert not torch.equal(a[~same], b[~same])


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_are_bitsandbytes_on_the_cpu(signed: bool) -> None:
    """Scales and decoding to the bit, codes but for the few where its quantiser takes a value further off than ours."""
    x = draw(256 * 400 + 100, seed=5) * 1e-3
    x = x if signed else x.square()
    book = dynamic_book(signed)
    found = quantise_blocks(x, book, 256)
    theirs, state = quantize_blockwise(x, code=book, blocksize=256)
    assert torch.equal(found.scales, state.absmax)
    decoded = dequantize_blockwise(found.codes, absmax=found.scales, code=book, blocksize=256)
    assert torch.equal(dequantise_blocks(found), decoded)
    other = found.codes != theirs
    assert other.float().mean() < (5e-3 if signed else 5e-2), "most of them among the small numbers"
    far = (dequantize_blockwise(theirs, state) - x).abs() - (dequantise_blocks(found) - x).abs()
    assert float(far.min()) >= -1e-9


@pytest.mark.parametrize("shape", [(64, 128), (65, 101)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_steps_are_bitsandbytes(shape: Any, dtype: torch.dtype) -> None:
    """From the same moments each time."""
    weight = draw(*shape).to(dtype)
    ours, optimizer = one(weight, decay=0.1)
    theirs = nn.Parameter(weight.clone())
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=0.01, weight_decay=0.1)
    near = 1e-6 if dtype == torch.float32 else 2**-7
    for i in range(6):
        gradient = (draw(*shape, seed=10 + i) * 0.1).to(dtype)
        step(ours, optimizer, gradient)
        step(theirs, reference, gradient)
        torch.testing.assert_close(ours.detach(), theirs.detach(), atol=near, rtol=near)
        adopt_moments(reference.state[theirs], optimizer.state[ours])
        theirs.data.copy_(ours.data)


def test_in_one_kernel_it_is_bitsandbytes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device runs, called on the CPU, where bitsandbytes registers the same operation."""
    monkeypatch.setattr(adamw8bit, "_has_kernel", lambda _: True)
    weight = draw(64, 128)
    ours, optimizer = one(weight, decay=0.1)
    theirs = nn.Parameter(weight.clone())
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=0.01, weight_decay=0.1)
    for i in range(6):
        gradient = draw(64, 128, seed=10 + i) * 0.1
        step(ours, optimizer, gradient)
        step(theirs, reference, gradient)
        assert torch.equal(ours, theirs)
        kept = optimizer.state[ours]
        for number, name in enumerate(("exp_avg", "exp_avg_sq"), start=1):
            assert torch.equal(kept[name], reference.state[theirs][f"state{number}"].flatten())
            assert torch.equal(kept[f"{name}_scales"], reference.state[theirs][f"absmax{number}"])
    monkeypatch.undo()
    step(ours, optimizer, draw(64, 128, seed=20) * 0.1)  # the same state goes on without the kernel
    step(theirs, reference, draw(64, 128, seed=20) * 0.1)
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-6, rtol=1e-6)


def test_in_chunks_it_is_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for chunk in (256 * 4, 1 << 20):
        monkeypatch.setattr(moments, "CHUNK", chunk)
        parameter, optimizer = one(draw(70, 101))
        for i in range(3):
            step(parameter, optimizer, draw(70, 101, seed=i))
        made.append((parameter.detach(), optimizer.state[parameter]["exp_avg"]))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


@pytest.mark.parametrize("shape", [(4095,), (63, 65), (5, 7)])
def test_small_tensors_are_adamw_bit_for_bit(shape: Any) -> None:
    weight = draw(*shape)
    ours, optimizer = one(weight, decay=0.1)
    kept, other = one(weight, decay=0.1, bits=32)
    theirs = nn.Parameter(weight.clone())
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, fused=True)
    for i in range(4):
        for parameter, taker in ((ours, optimizer), (kept, other), (theirs, reference)):
            step(parameter, taker, draw(*shape, seed=i))
    assert torch.equal(ours, kept)
    assert optimizer.state[ours]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-7, rtol=1e-6)


def test_8_and_32_bits_reach_the_same_loss_on_a_quadratic() -> None:
    curvature, start = torch.logspace(-2, 0, 64 * 128).view(64, 128), draw(64, 128)
    first, falls = float((curvature * start.square()).sum() / 2), {}
    for bits in (8, 32):
        parameter, optimizer = one(start, lr=0.02, bits=bits)
        for i in range(80):
            step(parameter, optimizer, curvature * parameter.detach() + 0.01 * draw(64, 128, seed=i))
        falls[bits] = math.log(first / float((curvature * parameter.detach().square()).sum() / 2))
    assert falls[32] > 2.5
    assert falls[8] == pytest.approx(falls[32], rel=0.04), "which is so many steps more"


def test_an_outlier_in_every_block_harms_few_entries_and_none_that_are_kept() -> None:
    """The second moment of what is a thousand times smaller may round to zero while the first does not.

    Then the step is lr m / (sqrt((1 - b2) g^2) + eps), of any size; the paper's remedy is 32 bits where this happens.
    """
    far, typical = {}, {}
    for bits in (8, 32):
        parameter, optimizer = one(torch.zeros(64, 256), lr=1e-3, bits=bits)
        steps = []
        for i in range(40):
            before, gradient = parameter.detach().clone(), 1e-3 * draw(64, 256, seed=i)
            gradient[:, 7] = 1.0
            step(parameter, optimizer, gradient)
            steps.append((parameter.detach() - before).abs())
        all_steps = torch.stack(steps)
        far[bits], typical[bits] = float((all_steps > 1e-2).float().mean()), float(all_steps.median())
    assert far[32] == 0 < far[8] < 5e-3
    assert typical[8] == pytest.approx(typical[32], rel=0.1)


def test_two_bytes_a_parameter_and_eight_a_block() -> None:
    model = open_source("llama-60m", "bfloat16").model.requires_grad_(True)
    told = optimizer_bytes("adamw8bit", model)
    wanted = sum(
        2 * p.numel() + 8 * -(-p.numel() // 256) if p.numel() >= 4096 else 8 * p.numel() for p in model.parameters()
    )
    assert told == wanted
    kept = optimizer_bytes({"optimizer": "adamw8bit", "keep": ["embed_tokens"]}, model)
    embedding = 32000 * 512
    assert kept - told == 8 * embedding - (2 * embedding + 8 * embedding // 256)


def test_kept_weights_have_moments_in_float32() -> None:
    model = tiny_llama().requires_grad_(True)
    optimizer = rw.make_optimizer(model, "adamw8bit", keep=["embed_tokens"])
    bits = {name: group["bits"] for group in optimizer.param_groups for name in group["names"]}
    assert {name for name, b in bits.items() if b == 32} == {"model.embed_tokens.weight"}
    with pytest.raises(RankworksError, match="embed_token"):
        rw.make_optimizer(model, "adamw8bit", keep=["embed_tokenz"])


def test_the_loss_falls_and_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_falls("adamw8bit", {})
    check_resumes(tmp_path, "adamw8bit", {})
