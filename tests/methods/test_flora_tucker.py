"""FLoRA: dW[o, i, a, b] = s sum G[p, q, c, d] P_in[i, p] P_out[o, q] P_1[a, c] P_2[b, d]."""

from __future__ import annotations

import copy
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from facts import (
    KINDS,
    adapted,
    backward,
    base_of,
    change_of,
    close,
    conv2d,
    delta_of,
    kept_for_backward,
    layer_and_input,
    linear,
    rank_of,
    shake,
)
from learning import losses, tiny_adapted
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import TargetError

CONVS: dict[str, tuple[Any, Any]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 11)),
    "2d": (conv2d, lambda: torch.randn(2, 4, 9, 9)),
    "2d, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), lambda: torch.randn(2, 4, 6, 6)),
    "3d": (lambda: nn.Conv3d(3, 5, (2, 1, 3), padding=(1, 0, 1)), lambda: torch.randn(2, 3, 4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), lambda: torch.randn(2, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), lambda: torch.randn(2, 6, 7, 7)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), lambda: torch.randn(2, 6, 7, 7)),
}


def ranks(layer: nn.Module) -> dict[str, int]:
    """Ranks 3 and 2 for input and output; a depthwise kernel has one input channel."""
    return {"rank_in": min(3, layer.weight.shape[1]), "rank_out": 2}  # type: ignore[union-attr,index]


every_conv = pytest.mark.parametrize("conv", CONVS)


def tucker(delta: Any) -> Tensor:
    """The definition in one einsum: (out, in, *kernel)."""
    sides = list(delta.sides)
    c, k = string.ascii_lowercase[: len(sides)], string.ascii_uppercase[: len(sides)]
    terms = ",".join([f"pq{c}", "ip", "oq", *(f"{b}{a}" for a, b in zip(c, k, strict=True))])
    return delta.multiplier * torch.einsum(f"{terms}->oi{k}", delta.G, delta.P_in, delta.P_out, *sides)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_leaves_the_output_bit_identical(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    assert torch.equal(adapted(layer, "flora-tucker", rank=3)(x), plain)


def test_the_core_is_zero_and_the_factors_have_the_deviation_of_their_rank() -> None:
    delta = delta_of(adapted(nn.Conv2d(400, 300, (5, 7)), "flora-tucker", rank_in=8, rank_out=6, kernel_rank=3))
    assert not delta.G.any()
    assert [tuple(p.shape) for p in delta.sides] == [(5, 3), (7, 3)]
    for P, rank in ((delta.P_in, 8), (delta.P_out, 6)):
        assert abs(P.std().item() * (2 * rank) ** 0.5 - 1) < 0.05


def test_at_the_first_step_only_the_core_has_a_gradient() -> None:
    model = adapted(linear(), "flora-tucker", rank=3)
    delta = delta_of(model)
    _, G = backward(model, torch.randn(4, 7))
    assert not delta.P_in.grad.any()
    assert not delta.P_out.grad.any()
    close(delta.G.grad, delta.P_in.t() @ G.t() @ delta.P_out)


@pytest.mark.parametrize(("rank_in", "rank_out"), [(2, 4), (4, 2), (3, 3)])
def test_a_linear_change_is_s_p_out_gt_p_in_t(rank_in: int, rank_out: int) -> None:
    model = adapted(linear(), "flora-tucker", rank_in=rank_in, rank_out=rank_out, scale=0.5)
    delta = shake(model)
    close(change_of(model), 0.5 * delta.P_out @ delta.G.t() @ delta.P_in.t())
    close(change_of(model), tucker(delta))


@every_conv
def test_a_convolutions_change_is_the_definition_and_the_released_tensordot_chain(conv: str) -> None:
    layer = CONVS[conv][0]()
    model = adapted(layer, "flora-tucker", **ranks(layer), scale=0.5)
    delta = shake(model)
    kernel = change_of(model).reshape(model.layer.weight.shape)
    close(kernel, tucker(delta))
    chain = delta.G
    for factor in (delta.P_in, delta.P_out, *delta.sides):
        chain = torch.tensordot(chain, factor, dims=([0], [1]))
    close(kernel, 0.5 * chain.transpose(0, 1))


@every_conv
def test_the_thin_convolutions_are_the_convolution_with_the_changed_kernel(conv: str) -> None:
    layer, x = (make() for make in CONVS[conv])
    plain = copy.deepcopy(layer)
    model = adapted(layer, "flora-tucker", **ranks(layer))
    shake(model)
    plain.weight = nn.Parameter(plain.weight + change_of(model).reshape(plain.weight.shape).detach())
    close(model(x), plain(x))
    wanted = model(x)
    close(rw.merge(model)(x), wanted)


def test_a_mode_has_the_rank_it_is_given_at_most() -> None:
    model = adapted(nn.Conv2d(9, 8, (5, 4)), "flora-tucker", rank_in=3, rank_out=4, kernel_rank=2)
    shake(model)
    change = change_of(model).reshape(8, 9, 5, 4)
    assert [rank_of(change.movedim(mode, 0).flatten(1)) for mode in range(4)] == [4, 3, 2, 2]


@every_conv
def test_the_defaults_are_cut_to_the_sizes_of_the_modes(conv: str) -> None:
    layer = CONVS[conv][0]()
    delta = delta_of(adapted(layer, "flora-tucker"))
    out, in_, *sides = layer.weight.shape
    assert delta.G.shape == (min(16, in_), min(16, out), *(min(2, n) for n in sides))
    wide = delta_of(adapted(nn.Conv2d(40, 30, 5), "flora-tucker", scale_mode="plain"))
    assert wide.G.shape == (16, 16, 2, 2)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"rank": 5}, r"rank 5 is more than the weight's input has values \(4\).*set rank_in to at most 4"),
        ({"rank_in": 5}, r"rank_in 5 is more than the weight's input"),
        ({"rank_out": 7}, r"rank_out 7 is more than the weight's output has values \(6\).*set rank_out to at most 6"),
        ({"rank": 7, "rank_in": 4}, r"rank 7 is more than the weight's output has values \(6\).*set rank_out"),
        ({"kernel_rank": 3}, r"kernel_rank 3 is more than the weight's side 2 of the kernel has values \(2\)"),
        ({"rank": 0}, "rank 0 leaves nothing to train"),
    ],
)
def test_a_rank_that_a_mode_cannot_have_is_refused(setting: dict[str, int], told: str) -> None:
    with pytest.raises(TargetError, match=told):
        adapted(conv2d(), "flora-tucker", **setting)
    with pytest.raises(TargetError, match="rank_out"):
        adapted(linear(40, 30), "flora-tucker", rank_out=31)


def test_the_refused_rank_is_mended_by_an_override() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 16, 1))
    with pytest.raises(TargetError, match=r"rank_in to at most 3 .*: 0 .*rank_in to at most 1 .*: 1 "):
        rw.adapt(model, "flora-tucker", rank=8, targets=["0", "1", "2"])
    overrides = {"0": {"rank_in": 3}, "1": {"rank_in": 1}}
    rw.adapt(model, "flora-tucker", rank=8, targets=["0", "1", "2"], overrides=overrides)
    assert rw.get_delta(model, "1").G.shape == (1, 8, 2, 2)  # type: ignore[union-attr]
    assert rw.get_delta(model, "2").G.shape == (8, 8, 1, 1)  # type: ignore[union-attr]


def test_whole_sides_with_the_identity_are_an_ordinary_tucker_2_convolution() -> None:
    layer, x = nn.Conv2d(5, 6, 3, stride=2, padding=1), torch.randn(2, 5, 9, 9)
    model = adapted(layer, "flora-tucker", rank_in=3, rank_out=2, kernel_rank=3)
    delta = shake(model)
    with torch.no_grad():
        for side in delta.sides:
            side.copy_(torch.eye(3))
    narrow = F.conv2d(x, delta.P_in.t()[:, :, None, None])
    core = F.conv2d(narrow, delta.G.transpose(0, 1), stride=2, padding=1)
    close(model(x), base_of(model, x) + F.conv2d(core, delta.P_out[:, :, None, None]))


def test_with_the_identity_as_its_core_it_is_lora() -> None:
    layer, x = linear(), torch.randn(4, 7)
    lora = adapted(copy.deepcopy(layer), "lora", rank=3, alpha=1.5)
    model = adapted(layer, "flora-tucker", rank=3, scale=0.5)
    delta, pair = delta_of(model), shake(lora)
    with torch.no_grad():
        delta.G.copy_(torch.eye(3))
        delta.P_in.copy_(pair.A.t())
        delta.P_out.copy_(pair.B)
    close(model(x), lora(x))


@pytest.mark.parametrize(("init", "bounds"), [("kaiming_uniform", (40**-0.5, 8**-0.5)), ("normal002", None)])
def test_the_second_convention_is_alpha_over_r_b_e_a(init: str, bounds: tuple[float, float] | None) -> None:
    settings = {"scale_mode": "alpha_over_r", "alpha": 4, "factor_init": init}
    model, x = adapted(linear(40, 30), "flora-tucker", rank=8, **settings), torch.randn(4, 40)
    delta = delta_of(model)
    for P, bound in zip((delta.P_in, delta.P_out), bounds or (0, 0), strict=True):
        if bounds is None:
            assert abs(P.std().item() / 0.02 - 1) < 0.1
        else:
            assert 0.9 * bound < P.abs().max().item() <= bound
    shake(model)
    close(model(x), base_of(model, x) + (4 / 8) * x @ delta.P_in @ delta.G @ delta.P_out.t())


@pytest.mark.parametrize("setting", [{"scale_mode": "alpha_over_r"}, {"factor_init": "kaiming_uniform"}])
def test_the_second_convention_is_for_linear_layers(setting: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match="linear layers: leave both out for convolutions"):
        adapted(conv2d(), "flora-tucker", **setting)


def test_dropout_of_a_convolution_drops_pixels_of_its_input() -> None:
    model, x = adapted(nn.Conv2d(4, 4, 1), "flora-tucker", rank=4, dropout=0.25), torch.randn(2, 4, 30, 30)
    shake(model)
    added = model.train()(x) - base_of(model, x)
    dropped = torch.linalg.solve(change_of(model), added.movedim(1, 0).flatten(1))
    kept = dropped / x.movedim(1, 0).flatten(1) * (1 - 0.25)
    close(kept, kept.round(), 1e-6)
    assert abs(kept.mean().item() - 0.75) < 0.05


def test_nothing_of_the_outputs_size_is_kept_for_backward() -> None:
    x = torch.randn(11, 7)
    assert (11, 5) not in kept_for_backward(adapted(linear(), "flora-tucker", rank=2), x)


def test_layers_that_read_one_input_read_it_together() -> None:
    model = tiny_adapted("flora-tucker", rank=2, targets="q_proj,k_proj,v_proj")
    layer = model.get_submodule("model.layers.0.self_attn")
    assert layer.q_proj._shared is layer.k_proj._shared is layer.v_proj._shared is not None


# ---- counts ----


def test_one_layers_counts() -> None:
    told = rw.plan(nn.Sequential(nn.Linear(768, 768)), "flora-tucker", rank=8, targets="0", example=torch.empty(1, 768))
    assert told.trainable_parameters == 2 * 768 * 8 + 64 == 12_352
    conv = nn.Sequential(nn.Conv2d(256, 256, 3))
    told = rw.plan(conv, "flora-tucker", rank=16, targets="0", example=torch.empty(1, 256, 5, 5))
    assert told.trainable_parameters == 2 * 256 * 16 + 2 * 3 * 2 + 1024 == 9_228


@pytest.mark.parametrize(
    ("shape", "rank", "more"), [("llama-7b", 4, 2_560), ("llama-7b", 32, 163_840), ("llama-3-8b", 16, 40_960)]
)
def test_the_printed_difference_to_lora(shape: str, rank: int, more: int) -> None:
    """r^2 per matrix on q, k, v, up and down of 32 layers."""
    settings = {"rank": rank, "targets": "q_proj,k_proj,v_proj,up_proj,down_proj", "sequence": 4}
    own, lora = (rw.plan(shape, key, **settings).trainable_parameters for key in ("flora-tucker", "lora"))
    assert own - lora == more


# ---- export ----


@pytest.mark.parametrize(("rank_in", "rank_out"), [(2, 4), (4, 2)])
def test_a_linear_change_is_exported_at_the_smaller_rank(tmp_path: Path, rank_in: int, rank_out: int) -> None:
    layer, x = linear(), torch.randn(9, 7)
    model = adapted(copy.deepcopy(layer), "flora-tucker", rank_in=rank_in, rank_out=rank_out)
    shake(model)
    report = rw.export(model, tmp_path / "lora", kind="lora")
    assert report.exact
    assert [s.rank for s in report.sites] == [2]
    close(rw.load(adapted(layer, "lora", rank=1, name="other"), tmp_path / "lora")(x), model(x), 1e-6)


@pytest.mark.parametrize("conv", ["1d", "3d", "pointwise", "depthwise"])
def test_a_convolution_is_exported_at_rank_r_out(tmp_path: Path, conv: str) -> None:
    layer, x = (make() for make in CONVS[conv])
    model = adapted(copy.deepcopy(layer), "flora-tucker", **ranks(layer))
    delta = shake(model)
    B, A = delta.factors()
    assert B.shape == (len(B), 2)
    close(B @ A, change_of(model))
    rw.export(model, tmp_path / "lora", kind="lora")
    close(rw.load(adapted(layer, "lora", rank=1, name="other"), tmp_path / "lora")(x), model(x), 1e-6)


def test_training_lowers_the_loss() -> None:
    seen = losses(tiny_adapted("flora-tucker", rank=4), lr=3e-2)
    assert seen[-1] < 0.8 * seen[0]
