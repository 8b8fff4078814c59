"""RandLoRA: W' = W + s sum_j B_j diag(l_j) A diag(g_j) with shared random bases and trained diagonals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    rank_of,
    shake,
    with_change,
)
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ExportError, TargetError
from rankworks.core.resolve import resolve
from rankworks.core.spec import AdaptSpec
from rankworks.plan.source import open_source

SIDES = {"in < out": (8, 12), "in > out": (12, 8), "square": (9, 9)}  # inputs, outputs
PAIRINGS = ["paper", "reference"]


def bases(delta: Any) -> tuple[Tensor, Tensor]:
    """The site's A (r, d) and B (D, n, r), cut out of the shared ones here."""
    d, most = min(delta.shape), max(delta.shape)
    n = delta.lam.shape[1]
    return delta.shared["A"].double()[:, :d], delta.shared["B"].double()[:most, :n]


def formula(delta: Any, scale: float = 20.0) -> Tensor:
    """The paper's sum, one product at a time: (out, in)."""
    A, B = bases(delta)
    total = sum(B[:, j] @ delta.lam[:, j].diag() @ A @ delta.gamma[j].diag() for j in range(B.shape[1]))
    return scale * (total if delta.shape.in_ <= delta.shape.out else total.t())


def as_the_reference_codes_do(delta: Any, scale: float = 20.0) -> Tensor:
    """(D, n, r) and (r, n, d) flattened as they lie and multiplied: (out, in)."""
    A, B = bases(delta)
    scaled = delta.lam.unsqueeze(-1) * A.unsqueeze(1) * delta.gamma  # (r, n, d)
    total = B.flatten(1) @ scaled.flatten(0, 1)
    return scale * (total if delta.shape.in_ <= delta.shape.out else total.t())


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_leaves_the_output_bit_identical(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    assert torch.equal(adapted(layer, "randlora", rank=3)(x), plain)


def test_the_start_leaves_many_tokens_bit_identical_too() -> None:
    layer, x = linear(8, 12), torch.randn(64, 8)
    plain = layer(x)
    assert torch.equal(adapted(layer, "randlora", rank=3)(x), plain)


@pytest.mark.parametrize(("inputs", "outputs"), SIDES.values(), ids=SIDES.keys())
def test_the_change_is_the_papers_sum_or_the_reference_codes_product(inputs: int, outputs: int) -> None:
    for pairing, wanted in (("paper", formula), ("reference", as_the_reference_codes_do)):
        model = adapted(linear(inputs, outputs), "randlora", rank=3, pairing=pairing)
        delta = shake(model)
        close(change_of(model), wanted(delta))


def test_the_two_pairings_differ_in_numbers_and_not_in_rows_or_columns() -> None:
    one, two = (adapted(linear(8, 12), "randlora", rank=3, pairing=p) for p in PAIRINGS)
    delta = shake(one)
    with torch.no_grad():
        delta_of(two).lam.copy_(delta.lam)
        delta_of(two).gamma.copy_(delta.gamma)
    apart = change_of(one) - change_of(two)
    assert apart.norm() > 0.1 * change_of(one).norm()
    assert rank_of(change_of(one)) == rank_of(change_of(two)) == 8


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_rank_of_the_change_is_full(pairing: str) -> None:
    model = adapted(linear(8, 12), "randlora", rank=3, pairing=pairing)
    shake(model)
    assert rank_of(change_of(model)) == 8


def test_with_one_basis_it_is_a_random_product_between_two_diagonals() -> None:
    model = adapted(linear(8, 12), "randlora", rank=8)
    delta = shake(model)
    A, B = bases(delta)
    assert B.shape[1] == 1
    close(change_of(model), 20 * B[:, 0] @ delta.lam[:, 0].diag() @ A @ delta.gamma[0].diag())


# ---- the bases ----


def test_one_seed_gives_one_pair_of_bases_and_another_another() -> None:
    one, two, other = (
        delta_of(adapted(linear(), "randlora", rank=3, **seeds)).shared
        for seeds in ({}, {"seed": 3}, {"projection_seed": 3})
    )
    assert torch.equal(one["A"], two["A"])
    assert torch.equal(one["B"], two["B"])
    assert not torch.equal(one["A"], other["A"])


def test_the_bases_come_from_a_cpu_generator_a_first_and_have_unit_deviation() -> None:
    shared = delta_of(adapted(linear(8, 12).float(), "randlora", rank=3, projection_seed=5)).shared
    generator = torch.Generator().manual_seed(5)
    A = nn.init.kaiming_uniform_(torch.empty(3, 1, 8, dtype=torch.float32), a=5**0.5, generator=generator)
    B = [nn.init.kaiming_uniform_(torch.empty(12, 1, 3, dtype=torch.float32), a=5**0.5, generator=generator)] + [
        nn.init.kaiming_uniform_(torch.empty(12, 1, 3, dtype=torch.float32), a=5**0.5, generator=generator)
        for _ in range(2)
    ]
    torch.testing.assert_close(shared["A"], (A / A.std()).squeeze(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(shared["B"], torch.cat(B, 1) / torch.cat(B, 1).std(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("law", ["sparse", "very-sparse"])
def test_sparse_bases_are_ternary_with_their_probabilities(law: str) -> None:
    B = delta_of(adapted(linear(100, 200).float(), "randlora", rank=10, bases=law)).shared["B"]
    assert len(B.unique()) == 3
    torch.testing.assert_close(B.std(), torch.tensor(1.0, dtype=torch.float32), rtol=1e-4, atol=0)
    q = 3 if law == "sparse" else 10
    for sign in (-1, 1):
        share, p = float((B.sign() == sign).double().mean()), 0.5 / q
        assert abs(share - p) < 5 * (p * (1 - p) / B.numel()) ** 0.5


def test_all_layers_read_corners_of_one_pair_without_a_copy() -> None:
    shapes = {"a": (9, 4), "b": (5, 8), "c": (9, 8)}
    model = rw.adapt(nn.ModuleDict({k: nn.Linear(*s) for k, s in shapes.items()}).float(), "randlora", rank=3)
    shared = delta_of(model, site="a").shared
    assert (shared["A"].shape, shared["B"].shape) == ((3, 8), (9, 3, 3))
    for site, (d, most) in {"a": (4, 9), "b": (5, 8), "c": (8, 9)}.items():
        A, B = delta_of(model, site=site)._slices()
        assert (A.shape, B.shape) == ((3, d), (most, 3 * -(-d // 3)))
        assert (A.data_ptr(), B.data_ptr()) == (shared["A"].data_ptr(), shared["B"].data_ptr())


def test_the_bases_are_neither_trained_nor_stored() -> None:
    model = adapted(linear(), "randlora", rank=3)
    assert set(delta_of(model).state_dict()) == {"lam", "gamma"}
    assert not any(b.requires_grad for b in model.buffers())
    assert {k for k in model.state_dict() if "adapters" in k} == {
        "layer.adapters.default.weight.lam",
        "layer.adapters.default.weight.gamma",
    }


# ---- gradients, and the ways of computing one thing ----


@pytest.mark.parametrize(("inputs", "outputs"), SIDES.values(), ids=SIDES.keys())
def test_at_the_first_step_lambda_has_a_gradient_and_gamma_has_none(inputs: int, outputs: int) -> None:
    model = adapted(linear(inputs, outputs), "randlora", rank=3)
    backward(model, torch.randn(40, inputs))
    delta = delta_of(model)
    assert torch.equal(delta.gamma.grad, torch.zeros_like(delta.gamma))
    assert (delta.lam.grad != 0).all()


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 40, 400])
@pytest.mark.parametrize(("inputs", "outputs"), SIDES.values(), ids=SIDES.keys())
def test_every_order_of_the_products_gives_one_output_and_one_gradient(
    inputs: int, outputs: int, tokens: int, pairing: str
) -> None:
    """Few tokens skip M, some go through it, many form the change: against the formula and autograd of it."""
    layer = linear(inputs, outputs)
    model = adapted(copy.deepcopy(layer), "randlora", rank=3, pairing=pairing)
    delta = shake(model)
    x = torch.randn(tokens, inputs, requires_grad=True)
    g = torch.randn(tokens, outputs)
    y = model(x)
    got = torch.autograd.grad((g * y).sum(), [x, delta.lam, delta.gamma])
    change = (formula if pairing == "paper" else as_the_reference_codes_do)(delta)
    plain = F.linear(x, layer.weight + change, layer.bias)
    close(y, plain)
    for mine, wanted in zip(got, torch.autograd.grad((g * plain).sum(), [x, delta.lam, delta.gamma]), strict=True):
        close(mine, wanted)
    with torch.no_grad():
        close(model(x), plain)
    close(delta.branch(x), F.linear(x, change))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_gradients_of_the_scaled_rows_are_the_entrys_formulas(pairing: str) -> None:
    """grad lambda[k, j] = sum_i dM A gamma, grad gamma[j, i] = sum_k dM A lambda; and their own derivatives."""
    from rankworks.deltas.randlora import _Rows

    paper = pairing == "paper"
    A, lam, gamma = torch.randn(3, 5), torch.randn(2, 3), torch.randn(2, 5)
    lam = lam if paper else lam.t()
    leaves = [t.clone().requires_grad_() for t in (lam, gamma)]

    def rows(lam: Tensor, gamma: Tensor) -> Tensor:
        return _Rows.apply(A, lam, gamma, paper)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(rows, leaves)
    assert torch.autograd.gradgradcheck(rows, leaves)


def test_many_tokens_keep_the_input_alone_and_some_never_keep_m_twice() -> None:
    model = adapted(linear(8, 12), "randlora", rank=3)
    shake(model)
    kept = kept_for_backward(model, torch.randn(400, 8))
    assert sorted(kept) == sorted([torch.Size([400, 8]), torch.Size([12, 8])])  # x and the base weight
    kept = kept_for_backward(model, torch.randn(4, 8, requires_grad=True))
    assert sum(shape.numel() == 3 * 3 * 8 for shape in kept) == 1  # M, for dL/dx


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_the_changed_weight_merged_or_not(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = copy.deepcopy(layer)
    model = adapted(layer, "randlora", rank=3)
    shake(model)
    wanted = with_change(plain, change_of(model))(x)
    close(model(x), wanted)
    rw.merge(model)
    close(model(x), wanted)


# ---- scale, counts, exports ----


def test_the_scale_is_alpha_over_r_or_over_r_root_n() -> None:
    settings = {"rank": 3, "alpha": 6.0}
    assert delta_of(adapted(linear(8, 12), "randlora", rank=3)).scale == 20
    assert delta_of(adapted(linear(8, 12), "randlora", **settings)).scale == 2
    root = delta_of(adapted(linear(8, 12), "randlora", scaling="sqrt-bases", **settings)).scale
    assert root == pytest.approx(2 / 3**0.5)


QKV_UP_DOWN = "q_proj,k_proj,v_proj,up_proj,down_proj"


def test_printed_count() -> None:
    """Llama-3-8B at rank 30, chosen by the authors to match LoRA's 56,623,104 at rank 32."""
    source = open_source("llama-3-8b")
    spec = AdaptSpec.from_flat({"delta": "randlora", "rank": 30, "targets": QKV_UP_DOWN})
    counted = sum(s.method.cls.count(s, site.shape) for site, s in resolve(source.model, spec))
    rw.adapt(source.model, spec)
    assert counted == rw.trainable_parameters(source.model) == 56_626_112


def test_a_larger_rank_trains_fewer_numbers() -> None:
    counts = [rw.trainable_parameters(adapted(linear(64, 64), "randlora", rank=r)) for r in (2, 4, 8, 16)]
    assert counts == [n * (r + 64) for r, n in ((2, 32), (4, 16), (8, 8), (16, 4))]
    assert counts == sorted(counts, reverse=True)


def test_it_has_no_plain_lora_short_of_full_rank_and_is_one_there(tmp_path: Any) -> None:
    model = adapted(linear(8, 12), "randlora", rank=3)
    shake(model)
    with pytest.raises(ExportError, match=r"no exact low-rank factors.*kind='merged'"):
        rw.export(model, tmp_path / "lora", kind="lora")
    assert rw.export(model, tmp_path / "short", kind="lora", rank=4).error > 0.05
    assert rw.export(model, tmp_path / "full", kind="lora", rank=8).error < 1e-7


def test_rank_zero_is_refused() -> None:
    with pytest.raises(TargetError, match="rank 0 leaves nothing to train"):
        adapted(linear(), "randlora", rank=0)


@pytest.mark.parametrize("tokens", [4, 64])
def test_a_few_steps_lower_the_loss(tokens: int) -> None:
    model = adapted(linear(8, 12), "randlora", rank=3, alpha=6)
    x = torch.randn(tokens, 8)
    y = x @ torch.randn(8, 12)
    optimiser = torch.optim.AdamW(delta_of(model).parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
