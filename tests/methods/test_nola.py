"""NOLA: LoRA factors mixed from seeded random matrices that are made again in every pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from facts import KINDS, adapted, backward, base_of, change_of, close, delta_of, layer_and_input, linear, shake
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import TargetError
from rankworks.core.kernels import counter
from rankworks.core.kernels.counter import basis, combine
from rankworks.core.resolve import resolve
from rankworks.core.spec import AdaptSpec
from rankworks.plan.source import open_source

FEW = {"rank": 3, "bases_a": 20, "bases_b": 30}


def materialised(delta: Any) -> tuple[Tensor, Tensor]:
    """The bases (k, r, in) and (l, out, r), A0 left out, all entries at once."""
    out, in_ = delta.shape
    A = basis(delta.seeds[0], len(delta.a), 3 * in_, torch.float64).view(-1, 3, in_)
    return A, basis(delta.seeds[1], len(delta.b), 3 * out, torch.float64).view(-1, out, 3)


def start_of(delta: Any) -> Tensor:
    """A0 (r, in)."""
    in_ = delta.shape.in_
    return basis(delta.seeds[0], len(delta.a) + 1, 3 * in_, torch.float64)[-1].view(3, in_) / in_**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_leaves_the_output_bit_identical(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    assert torch.equal(adapted(layer, "nola", **FEW)(x), plain)


def test_the_change_is_the_product_of_the_two_mixtures() -> None:
    model = adapted(linear(), "nola", alpha=6, **FEW)
    delta = shake(model)
    basis_A, basis_B = materialised(delta)
    A = start_of(delta) + torch.einsum("k,kri->ri", delta.a, basis_A) / 20**0.5
    B = torch.einsum("l,lor->or", delta.b, basis_B) / 30**0.5
    close(change_of(model), 6 / 3 * B @ A)


def test_the_vision_form_starts_at_the_means_of_its_bases() -> None:
    model = adapted(linear(), "nola", form="vit", alpha=1, **FEW)
    delta = delta_of(model)
    basis_A, basis_B = materialised(delta)
    close(change_of(model), (basis_B.mean(0) / 3**0.5) @ (basis_A.mean(0) / 7**0.5) / 3)
    x = torch.randn(4, 7)
    assert not torch.equal(model(x), base_of(model, x))


def test_at_the_first_step_b_has_a_gradient_and_a_has_none() -> None:
    model = adapted(linear(), "nola", **FEW)
    backward(model, torch.randn(4, 7))
    assert torch.equal(delta_of(model).a.grad, torch.zeros(20))
    assert (delta_of(model).b.grad != 0).all()


def test_the_gradients_are_inner_products_with_the_bases() -> None:
    """dL/da_i = s <B^T G, A_i> and dL/db_j = s <G A^T, B_j>, and what autograd says of the whole bases."""
    model = adapted(linear(), "nola", alpha=6, **FEW)
    delta = shake(model)
    _, G = backward(model, torch.randn(4, 7))
    basis_A, basis_B = materialised(delta)
    B, A = delta.factors()  # the scale is in B
    close(delta.a.grad, torch.einsum("ri,kri->k", B.t() @ G, basis_A) / 20**0.5)
    close(delta.b.grad, 2 * torch.einsum("or,lor->l", G @ A.t(), basis_B) / 30**0.5)
    a, b = (t.detach().clone().requires_grad_() for t in (delta.a, delta.b))
    mixed = (
        torch.einsum("l,lor->or", b, basis_B)
        / 30**0.5
        @ (start_of(delta) + torch.einsum("k,kri->ri", a, basis_A) / 20**0.5)
    )
    (G * 2 * mixed).sum().backward()
    close(delta.a.grad, a.grad)
    close(delta.b.grad, b.grad)


def test_the_change_is_linear_in_a_for_a_fixed_b() -> None:
    model = adapted(linear(), "nola", **FEW)
    delta = shake(model)
    one, two = torch.randn(20), torch.randn(20)
    changes = []
    for a in (one, two, 0.3 * one + 0.7 * two):
        with torch.no_grad():
            delta.a.copy_(a)
        changes.append(change_of(model))
    close(0.3 * changes[0] + 0.7 * changes[1], changes[2])


def test_with_as_many_matrices_as_numbers_it_reaches_any_a() -> None:
    model = adapted(linear(), "nola", rank=3, bases_a=21, bases_b=21)
    delta = delta_of(model)
    basis_A, _ = materialised(delta)
    wanted = torch.randn(3, 7)
    assert torch.linalg.matrix_rank(basis_A.flatten(1)) == 21
    with torch.no_grad():
        mix = torch.linalg.solve(basis_A.flatten(1).t(), (wanted - start_of(delta)).flatten())
        delta.a.copy_(mix * 21**0.5)
        close(delta.factors().A, wanted)


# ---- the bases ----


def test_the_basis_is_the_same_in_every_call_and_after_a_file(tmp_path: Path) -> None:
    layer, x = linear(), torch.randn(4, 7)
    model = adapted(copy.deepcopy(layer), "nola", seed=3, **FEW)
    delta = shake(model)
    assert all(torch.equal(p, q) for p, q in zip(delta.factors(), delta.factors(), strict=True))
    rw.save(model, tmp_path / "adapter")
    again = rw.load(nn.ModuleDict({"layer": layer}).eval(), tmp_path / "adapter")
    assert torch.equal(delta_of(again).seeds, delta.seeds)
    assert torch.equal(again["layer"](x), model(x))


def test_the_file_holds_the_mixing_numbers_alone_and_knows_the_bases(tmp_path: Path) -> None:
    layer = linear()
    model = adapted(copy.deepcopy(layer), "nola", **FEW)
    assert set(delta_of(model).state_dict()) == {"a", "b"}
    rw.save(model, tmp_path / "adapter")
    import json

    meta = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    meta["frozen"]["layer"]["sample"] += 0.1  # as if numbers came out otherwise on this machine
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps(meta))
    with pytest.raises(rw.RankworksError, match=r"layer\.sample.*is not what the adapter was trained with"):
        rw.load(nn.ModuleDict({"layer": layer}), tmp_path / "adapter")


def test_each_factor_and_each_site_has_a_seed_of_its_own() -> None:
    model = rw.adapt(nn.ModuleDict({"a": nn.Linear(7, 5), "b": nn.Linear(7, 5)}), "nola", targets="a,b", **FEW)
    seeds = [int(s) for site in ("a", "b") for s in delta_of(model, site=site).seeds]
    assert len(set(seeds)) == 4
    assert all(0 <= s < 2**62 for s in seeds)


@pytest.mark.parametrize("keep", [False, True])
def test_a_step_leaves_the_global_random_stream_where_it_was(keep: bool) -> None:
    model = adapted(linear(), "nola", keep_bases=keep, **FEW).train()
    before = torch.get_rng_state()
    model(torch.ones(4, 7)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_bases_give_the_same_factors_and_gradients() -> None:
    layer, x = linear(), torch.randn(4, 7)
    one, two = (adapted(copy.deepcopy(layer), "nola", keep_bases=keep, **FEW) for keep in (False, True))
    torch.manual_seed(1)
    shake(one)
    torch.manual_seed(1)
    shake(two)
    close(one(x), two(x))
    for model in (one, two):
        model(x).square().sum().backward()
    close(delta_of(one).a.grad, delta_of(two).a.grad)
    close(delta_of(one).b.grad, delta_of(two).b.grad)


def test_chunks_bound_the_memory_and_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a chunk of entries, or one matrix, is made at a time."""
    seed, a = torch.tensor(12345678901234567), torch.randn(50)
    whole = combine(a, seed, 33)
    sizes = []
    made = counter._entries

    def noted(*parts: Any) -> Tensor:
        sizes.append(parts[2] * parts[3])
        return made(*parts)

    monkeypatch.setattr(counter, "_entries", noted)
    monkeypatch.setattr(counter, "CHUNK_NUMBERS", {"cpu": 100})
    close(combine(a, seed, 33), whole)
    assert len(sizes) == 17
    assert max(sizes) <= 100
    close(whole, a @ basis(seed, 50, 33, torch.float64))


def test_combining_and_projecting_are_each_others_derivative_to_any_order() -> None:
    seed = torch.tensor(99)
    a = torch.randn(6, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: combine(t, seed, 5), a)
    assert torch.autograd.gradgradcheck(lambda t: combine(t, seed, 5).square(), a)


def test_the_entries_are_uniform_and_uncorrelated() -> None:
    """500 matrices of 400 numbers: moments, neighbours, halves of a word and two seeds, within five deviations."""
    one, two = (basis(torch.tensor(s), 500, 400, torch.float64) for s in (7, 8))
    n = one.numel()
    assert abs(one.mean()) < 5 * (1 / 3 / n) ** 0.5
    assert abs(one.square().mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    counts = torch.histc(one, bins=64, min=-1, max=1)
    assert ((counts - n / 64).abs() < 5.5 * (n / 64) ** 0.5).all()
    flat = one.flatten()
    for other in (two.flatten(), flat.roll(1), flat.roll(2), flat.roll(400), flat.roll(800)):
        assert abs((flat * other).mean() * 3) < 5 / n**0.5
    gram = one @ one.t() * 3 / 400
    assert (gram - torch.eye(500)).fill_diagonal_(0).abs().max() < 6 / 400**0.5


def test_a_word_is_its_counters_hash_in_plain_integers() -> None:
    """The same bits as the hash written out with Python's own integers: what other machines must give."""
    seed, first = 3_000_000_000_000_000_017, 3
    low, high, mask = seed & 0x7FFFFFFF, seed >> 31, 2**32 - 1

    def word(counter: int) -> int:
        x = (counter + low) & mask
        x = ((x ^ (x >> 16)) * 0x7FEB352D + high) & mask
        x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
        return x ^ (x >> 16)

    words = [word(first * 3 + i) for i in range(6)]  # two matrices of five numbers, three words each
    halves = [h - 2**16 if h >= 2**15 else h for w in words for h in (w & 0xFFFF, w >> 16)]
    wanted = torch.tensor([halves[:5], halves[6:11]], dtype=torch.int16)
    assert torch.equal(counter._entries(torch.tensor(seed), first, 2, 5), wanted)


# ---- counts, shapes, exports, training ----


def test_printed_count() -> None:
    """GPT-2 medium, query and value of 24 layers, k = l = 512."""
    layers = nn.ModuleDict({f"{i}": nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for i in range(24)})
    assert rw.plan(layers, "nola", targets="q,v", example=None).trainable_parameters == 49_152


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("model", ["roberta-base", "roberta-large"])
def test_the_count_depends_on_neither_rank_nor_width(model: str, rank: int) -> None:
    source = open_source(model)
    spec = AdaptSpec.from_flat({"delta": "nola", "rank": rank, "targets": "query,value"})
    sites = resolve(source.model, spec)
    rw.adapt(source.model, spec)
    assert rw.trainable_parameters(source.model) == len(sites) * 1024


def test_more_matrices_than_a_seed_can_make_are_refused() -> None:
    layer = nn.Linear(4096, 4096, bias=False, device="meta")
    with pytest.raises(TargetError, match="bases_a is 3,000: lower it, or rank, there"):
        rw.adapt(nn.ModuleDict({"layer": layer}), "nola", rank=1024, bases_a=3000, targets="layer")


def test_it_exports_as_a_lora_of_its_rank(tmp_path: Path) -> None:
    model = adapted(linear(), "nola", **FEW)
    shake(model)
    report = rw.export(model, tmp_path / "lora", kind="lora")
    assert report.error == 0
    assert [s.rank for s in report.sites] == [3]


@pytest.mark.parametrize("form", ["lm", "vit"])
def test_a_few_steps_lower_the_loss(form: str) -> None:
    model = adapted(linear(), "nola", form=form, rank=3, bases_a=100, bases_b=100)
    x = torch.randn(32, 7)
    y = x @ torch.randn(7, 5)
    optimiser = torch.optim.AdamW(delta_of(model).parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
