"""SHiRA: W' = W + s S with S zero but for K trained entries."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from facts import (
    KINDS,
    LAYERS,
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
    weight_of,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from learning import losses, tiny_adapted
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ExportError, TargetError
from rankworks.core.forms.sparse import index_dtype
from rankworks.core.site import Shape

MASKS = ["rand", "wm", "struct"]


def entries(model: nn.Module) -> Tensor:
    """The mask (out, in) of trained entries."""
    delta = delta_of(model)
    mask = torch.zeros(delta.shape.out * delta.shape.in_, dtype=torch.bool)
    mask[delta.index] = True
    return mask.reshape(delta.shape)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_leaves_the_output_bit_identical(kind: str, mask: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    assert torch.equal(adapted(layer, "shira", rank=1, mask=mask)(x), plain)


@pytest.mark.parametrize("mask", MASKS)
def test_it_trains_exactly_k_entries_as_many_as_loras_numbers(mask: str) -> None:
    model = adapted(linear(20, 30), "shira", rank=2, mask=mask)
    assert entries(model).sum() == 2 * (20 + 30) == rw.trainable_parameters(model)


@pytest.mark.parametrize("mask", MASKS)
def test_density_gives_the_share_of_entries(mask: str) -> None:
    assert entries(adapted(linear(20, 30), "shira", density=0.01, mask=mask)).sum() == 6


def test_more_entries_than_there_are_is_refused() -> None:
    with pytest.raises(TargetError, match="lower rank there, or set density"):
        adapted(linear(7, 5), "shira", rank=3)


def test_the_values_stand_at_their_places_times_the_scale() -> None:
    model = adapted(linear(), "shira", density=0.3, scale=2.5)
    delta = shake(model)
    change = change_of(model)
    close(change.flatten()[delta.index], 2.5 * delta.values)
    assert torch.equal(change != 0, entries(model))


@pytest.mark.parametrize("mask", MASKS)
def test_entries_outside_the_mask_stay_bit_identical_through_training_and_merging(mask: str) -> None:
    layer, x = linear(), torch.randn(4, 7)
    before = layer.weight.detach().clone()
    model = adapted(layer, "shira", density=0.3, mask=mask)
    optimiser = torch.optim.AdamW(delta_of(model).parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
    rw.merge(model)
    assert torch.equal(layer.weight != before, entries(model))


def test_loading_and_unloading_its_entries_gives_the_weight_back_bit_for_bit() -> None:
    layer = linear()
    before = layer.weight.detach().clone()
    model = adapted(layer, "shira", density=0.3)
    shake(model)
    rw.merge(model)
    assert not torch.equal(layer.weight, before)
    rw.unmerge(model)
    assert torch.equal(layer.weight, before)


def test_the_gradient_of_a_value_is_s_times_the_gradient_of_its_entry() -> None:
    model = adapted(linear(), "shira", density=0.3, scale=2.5)
    delta = shake(model)
    _, G = backward(model, torch.randn(4, 7))
    close(delta.values.grad, 2.5 * G.flatten()[delta.index])


# ---- the masks ----


def test_wm_takes_the_largest_magnitudes() -> None:
    model = adapted(linear(), "shira", density=0.3, mask="wm")
    kept = entries(model)
    magnitudes = model.layer.weight.abs()
    assert magnitudes[kept].min() > magnitudes[~kept].max()


def test_wm_breaks_ties_by_the_entrys_number() -> None:
    layer = linear()
    nn.init.ones_(layer.weight)
    assert delta_of(adapted(layer, "shira", density=0.3, mask="wm")).index.tolist() == list(range(10))


def test_rand_is_the_seeds_alone() -> None:
    layer = linear(20, 30)
    index = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.randn(3)
        index[name] = delta_of(adapted(layer, "shira", rank=1, seed=seed, name=name), name).index
    assert torch.equal(index["a"], index["b"])
    assert not torch.equal(index["a"], index["c"])


def test_rand_is_uniform_over_the_entries() -> None:
    """Over 400 seeds every entry is taken with frequency 0.3 within five standard errors."""
    total = sum(entries(adapted(linear(), "shira", density=0.3, seed=seed)).double() for seed in range(400))
    p = 10 / 35  # K = round(0.3 * 35)
    assert ((total / 400 - p).abs() < 5 * (p * (1 - p) / 400) ** 0.5).all()


def test_rand_takes_distinct_entries_all_over_a_large_weight() -> None:
    """Large weights are drawn from by rejection: 4,800 of 480,000 in blocks of a tenth, 480 each but for chance."""
    index = delta_of(adapted(linear(800, 600), "shira", density=0.01)).index
    assert len(index.unique()) == len(index) == 4800
    counts = torch.histc(index.double(), bins=10, min=0, max=480_000)
    assert ((counts - 480).abs() < 5 * (4800 * 0.1 * 0.9) ** 0.5).all()


def test_a_random_change_of_few_entries_has_nearly_full_rank() -> None:
    model = adapted(linear(60, 60), "shira", rank=2)
    shake(model)
    assert rank_of(change_of(model)) >= 57  # LoRA's rank at this count is 2


def scored(mask: str, gradient: Tensor, layer: nn.Module | None = None, **settings: Any) -> nn.Module:
    """A layer (7 -> 5) whose entries are chosen by this gradient."""
    evidence = {"layer": {"gradient": gradient, "gradient_magnitude": gradient}}
    settings = {"density": 0.3, **settings}
    return adapted(layer or linear(), "shira", mask=mask, evidence=evidence, **settings)


def brute_force(scores: Tensor, k: int) -> Tensor:
    """The mask of the k largest, ties by number, by Python's own sort."""
    flat = scores.flatten().tolist()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k]] = True
    return mask.reshape(scores.shape)


def test_wm_grad_and_snip_are_the_brute_force_top_k() -> None:
    layer, g = linear(), torch.randn(5, 7)
    g[2] = g[1]  # ties
    W = layer.weight.detach().clone()
    assert torch.equal(entries(scored("wm", g, copy.deepcopy(layer))), brute_force(W.abs(), 10))
    assert torch.equal(entries(scored("grad", g, copy.deepcopy(layer))), brute_force(g.abs(), 10))
    assert torch.equal(entries(scored("snip", g, copy.deepcopy(layer))), brute_force((g * W).abs(), 10))


def test_snip_with_weights_of_one_magnitude_is_grad() -> None:
    layer, g = linear(), torch.randn(5, 7)
    with torch.no_grad():
        layer.weight.copy_(0.5 * torch.randn(5, 7).sign())
    assert torch.equal(entries(scored("snip", g, copy.deepcopy(layer))), entries(scored("grad", g, layer)))


def test_snip_with_gradients_of_one_magnitude_is_wm() -> None:
    layer, g = linear(), torch.randn(5, 7).sign()
    assert torch.equal(entries(scored("snip", g, copy.deepcopy(layer))), entries(scored("wm", g, layer)))


def test_grad_without_a_measurement_is_refused_with_the_remedy() -> None:
    with pytest.raises(TargetError, match=r"SHiRA starts from the gradient .*rankworks\.calibrate"):
        adapted(linear(), "shira", density=0.3, mask="grad")


def test_the_reductions_choose_what_is_measured() -> None:
    layer, one, two = linear(), torch.randn(5, 7), torch.randn(5, 7)
    evidence = {"layer": {"gradient": one, "gradient_magnitude": two.abs()}}
    for reduction, g in (("sum", one), ("absolute", two)):
        model = adapted(copy.deepcopy(layer), "shira", density=0.3, mask="grad", gradient=reduction, evidence=evidence)
        assert torch.equal(entries(model), brute_force(g.abs(), 10))


@pytest.mark.parametrize("mask", ["rand", "wm", "grad", "snip"])
def test_the_masks_of_several_tasks_share_no_entry(mask: str) -> None:
    layer, g = linear(), torch.randn(5, 7)
    masks = [entries(scored(mask, g, copy.deepcopy(layer), task_index=t)) for t in (1, 2, 3)]
    assert [int(m.sum()) for m in masks] == [10, 10, 10]
    assert sum(m.long() for m in masks).max() == 1
    assert torch.equal(masks[0], entries(scored(mask, g, copy.deepcopy(layer))))


def test_a_task_takes_the_next_ranks_of_the_order() -> None:
    g = torch.randn(5, 7)
    second = entries(scored("grad", g, task_index=2))
    assert torch.equal(second, brute_force(g.abs(), 20) & ~brute_force(g.abs(), 10))


def test_tasks_drawn_at_random_are_uniform_over_what_is_left() -> None:
    total = sum(entries(adapted(linear(), "shira", density=0.3, seed=s, task_index=3)).double() for s in range(400))
    p = 10 / 35
    assert ((total / 400 - p).abs() < 5 * (p * (1 - p) / 400) ** 0.5).all()


@pytest.mark.parametrize(
    ("settings", "match"), [({"task_index": 4}, "task 4"), ({"task_index": 2, "mask": "struct"}, "struct")]
)
def test_tasks_beyond_the_weight_or_without_an_order_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(TargetError, match=match):
        adapted(linear(), "shira", density=0.3, **settings)


@quick
@given(data=st.data(), inputs=st.integers(1, 12), outputs=st.integers(1, 12))
def test_struct_takes_exactly_k_entries_the_diagonal_first(data: Any, inputs: int, outputs: int) -> None:
    k = data.draw(st.integers(1, inputs * outputs))
    mask = entries(adapted(linear(inputs, outputs), "shira", density=k / (inputs * outputs), mask="struct"))
    assert mask.sum() == k
    assert mask.diagonal().sum() == min(k, inputs, outputs)


@quick
@given(data=st.data(), inputs=st.integers(2, 12), outputs=st.integers(1, 12))
def test_struct_fills_evenly_spaced_rows_and_at_most_one_in_part(data: Any, inputs: int, outputs: int) -> None:
    k = data.draw(st.integers(min(inputs, outputs) + 1, max(inputs * outputs, min(inputs, outputs) + 1)))
    assume(k <= inputs * outputs)
    mask = entries(adapted(linear(inputs, outputs), "shira", density=k / (inputs * outputs), mask="struct"))
    beside = mask.clone()
    beside.fill_diagonal_(False)
    rows = beside.any(1).nonzero().squeeze(1).tolist()
    assert sum(not mask[row].all() for row in rows) <= 1
    gaps = [after - row for row, after in zip(rows, [*rows[1:], rows[0] + outputs], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_a_struct_change_is_of_high_rank_by_its_diagonal() -> None:
    model = adapted(linear(60, 60), "shira", rank=2, mask="struct")
    shake(model)
    assert rank_of(change_of(model)) == 60


# ---- against training the weight itself ----


def trajectory(model: nn.Module, parameters: Any, optimiser: str, mask: Tensor | None = None) -> Tensor:
    """Train 10 steps and return the output; with a mask, the weight's gradient is masked after every backward."""
    generator = torch.Generator().manual_seed(3)
    parameters = list(parameters)
    settings = {"SGD": {"lr": 0.05, "momentum": 0.9}, "AdamW": {"lr": 0.01, "weight_decay": 0.0}}[optimiser]
    optim = getattr(torch.optim, optimiser)(parameters, **settings)
    for _ in range(10):
        x, y = torch.randn(8, 7, generator=generator), torch.randn(8, 5, generator=generator)
        optim.zero_grad()
        F.mse_loss(model(x), y).backward()
        if mask is not None:
            parameters[0].grad.mul_(mask)
        optim.step()
    with torch.no_grad():
        return model(torch.eye(7))


@pytest.mark.parametrize("optimiser", ["SGD", "AdamW"])
@pytest.mark.parametrize("mask", MASKS)
def test_training_the_values_is_training_the_weight_under_a_gradient_mask(mask: str, optimiser: str) -> None:
    layer = linear()
    twin = copy.deepcopy(layer)
    model = adapted(layer, "shira", density=0.3, mask=mask)
    hooked = trajectory(twin, [twin.weight], optimiser, entries(model))
    close(trajectory(model, delta_of(model).parameters(), optimiser), hooked)


@pytest.mark.parametrize("optimiser", ["SGD", "AdamW"])
@pytest.mark.parametrize("mask", MASKS)
def test_with_every_entry_it_is_full_fine_tuning_of_the_weight(mask: str, optimiser: str) -> None:
    layer = linear()
    twin = copy.deepcopy(layer)
    model = adapted(layer, "shira", density=1.0, mask=mask)
    close(trajectory(model, delta_of(model).parameters(), optimiser), trajectory(twin, [twin.weight], optimiser))


# ---- the entries alone ----


def test_a_count_from_the_paper() -> None:
    """4096 x 4096 at r = 32: 262,144 entries, 1.56 %."""
    layer = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta"))
    told = rw.plan(layer, "shira", rank=32, targets="0", example=torch.empty(1, 4096))
    assert told.trainable_parameters == 262_144
    assert round(100 * 262_144 / 4096**2, 2) == 1.56


@pytest.mark.parametrize("kind", KINDS)
def test_adding_the_exported_entries_gives_the_merged_weight_bit_for_bit(kind: str) -> None:
    model = adapted(LAYERS[kind][0](), "shira", rank=1, scale=2.0)
    shake(model)
    index, values = rw.sparse_entries(model)["layer"]
    assert torch.equal(index, index.sort().values)
    weight = weight_of(model).clone()
    flat = weight.reshape(-1).index_add(0, index, values).reshape(weight.shape)
    rw.merge(model)
    assert torch.equal(weight_of(model), flat)


def test_entries_of_a_change_that_is_not_sparse_are_refused() -> None:
    with pytest.raises(ExportError, match="not sparse"):
        rw.sparse_entries(adapted(linear(), "lora", rank=1))


def test_the_places_are_int32_in_the_file_and_older_int64_is_read(tmp_path: Path) -> None:
    layer, x = linear(), torch.randn(3, 7)
    model = adapted(copy.deepcopy(layer), "shira", rank=1)
    shake(model)
    rw.save(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter.safetensors"
    tensors = load_file(file)
    assert tensors["layer.index"].dtype == torch.int32
    tensors["layer.index"] = tensors["layer.index"].long()
    save_file(tensors, file, metadata={"format": "rankworks-adapter"})
    meta = tmp_path / "a" / "adapter.json"
    described = json.loads(meta.read_text())
    described["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    meta.write_text(json.dumps(described))
    again = rw.load(type(model)(copy.deepcopy(layer)).eval(), tmp_path / "a")
    assert torch.equal(again(x), model(x))


def test_wide_weights_need_int64() -> None:
    assert index_dtype(Shape(46340, 46341)) == torch.int32  # 2,147,441,940
    assert index_dtype(Shape(46341, 46341)) == torch.int64  # 2,147,488,281 > 2^31 - 1


@pytest.mark.parametrize("inner", ["shira", "dora"])
def test_between_the_passes_nothing_of_the_weights_size_is_kept(inner: str) -> None:
    layer = linear(40, 50)
    settings = {"inner": "shira"} if inner == "dora" else {}
    model = adapted(layer, inner, rank=1, **settings)
    kept = kept_for_backward(model, torch.randn(3, 40))
    dense = [s for s in kept if s.numel() >= 40 * 50]
    assert all(tuple(s) == (50, 40) for s in dense)
    assert len(dense) <= 1  # the frozen weight itself, by reference


def test_the_row_norms_from_the_entries_are_those_of_the_sum() -> None:
    model = adapted(linear(), "shira", density=0.3, scale=1.5)
    delta = shake(model)
    W = weight_of(model)
    close(delta.row_norms(W), (W + change_of(model)).norm(dim=1))


def test_a_row_of_zeros_has_norm_zero_and_a_finite_gradient() -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[2] = 0
    delta = delta_of(adapted(layer, "shira", density=0.3))
    norms = delta.row_norms(layer.weight.detach())
    assert norms[2] == 0
    norms.sum().backward()
    assert torch.isfinite(delta.values.grad).all()


def test_dora_around_shira_is_the_formula_and_its_gradient_without_detaching() -> None:
    model = adapted(linear(), "dora", inner="shira", density=0.3, detach_norm=False)
    delta = shake(model)
    W, S, m = weight_of(model), delta.inner.matrix().detach(), delta.m.detach()
    V = W + S
    W_new = m[:, None] * V / V.norm(dim=1, keepdim=True)
    x = torch.randn(4, 7)
    close(model(x), x @ W_new.t() + model.layer.bias)
    _, G = backward(model, x)
    n = V.norm(dim=1, keepdim=True)
    G_V = m[:, None] / n * (G - V / n * ((G * V / n).sum(1, keepdim=True)))
    close(delta.inner.values.grad, G_V.flatten()[delta.inner.index.long()])


# ---- interference ----


def test_interference_is_the_norm_and_the_zeros_of_the_product() -> None:
    layer = linear(9, 8)
    model = adapted(layer, "shira", density=0.2, seed=1, name="a")
    rw.adapt(model, "shira", density=0.2, seed=2, targets="layer", name="b")
    shake(model, "a")
    shake(model, "b")
    found = rw.interference(model, "a", "b")["layer"]
    product = change_of(model, "a").t() @ change_of(model, "b")
    close(torch.tensor(found.awom), product.norm())
    assert found.awor == 1 - int((product != 0).sum()) / 81


def test_struct_adapters_with_disjoint_rows_are_orthogonal() -> None:
    """A_t = I + S_t: S1^T S2 = 0 exactly, and nnz(A1^T A2) <= nnz(S1) + nnz(S2) + m."""
    m = 12
    S1, S2 = torch.zeros(m, m), torch.zeros(m, m)
    S1[::4], S2[2::4] = torch.randn(3, m), torch.randn(3, m)
    model = adapted(linear(m, m), "shira", density=0.25, name="a")
    rw.adapt(model, "shira", density=0.25, targets="layer", name="b")
    for name, S in (("a", S1), ("b", S2)):
        delta = delta_of(model, name)
        delta.index.copy_(S.flatten().nonzero().squeeze(1))
        delta.values.data.copy_(S.flatten()[S.flatten() != 0])
    found = rw.interference(model, "a", "b")["layer"]
    assert found.awom == 0
    assert found.awor == 1
    A1, A2 = torch.eye(m) + S1, torch.eye(m) + S2
    assert int(((A1.t() @ A2) != 0).sum()) <= 36 + 36 + m


def test_it_learns() -> None:
    seen = losses(tiny_adapted("shira", rank=4))
    assert seen[-1] < 0.8 * seen[0]


def test_dora_around_it_learns() -> None:
    seen = losses(tiny_adapted("dora", inner="shira", rank=4))
    assert seen[-1] < 0.8 * seen[0]
