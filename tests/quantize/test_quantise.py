"""rw.quantise moves the base, and LoftQ and quantised PiSSA start an adapter that makes good what was lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, RankworksError, TargetError
from rankworks.core.holders import dense_weight
from rankworks.core.state import state_of
from rankworks.core.summary import trained
from rankworks.quantize import code_book, dequantise_blocks, quantise_blocks
from rankworks.quantize.loop import split
from tiny import tiny_gpt2, tiny_llama, token_batch

PISSA = {"init": "pissa", "quantised": True}


class Stack(nn.Module):
    """Two layers, float32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 48, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def quant(matrix: Tensor) -> Tensor:
    return dequantise_blocks(quantise_blocks(matrix, code_book("nf", 4)))


def started(order: Any = "loftq", rank: int = 8, **settings: Any) -> tuple[Any, nn.Module]:
    """A quantised stack with its adapter, and the stack as it was."""
    before = Stack()
    model = copy.deepcopy(before)
    adapter = {k: settings.pop(k) for k in list(settings) if k in ("alpha", "scaling", "delta")}
    evidence = rw.quantise(model, init=order, rank=rank, **settings)
    init = "loftq" if order == "loftq" else PISSA
    return rw.adapt(model, adapter.pop("delta", "lora"), rank=rank, init=init, evidence=evidence, **adapter), before


def error(model: Any, before: nn.Module, layer: str, adapted: bool = True) -> Tensor:
    """W - Q - s B A, or W - Q."""
    change = rw.delta_weights(model)[layer] if adapted else 0
    return before.get_submodule(layer).weight.detach() - model.get_submodule(layer).weight.detach() - change  # type: ignore[operator]


# ---- the turns ----


def test_loftqs_first_turn_leaves_what_the_svd_left_out() -> None:
    weight = Stack().up.weight.detach()
    quantised, (u, s, vh) = split(weight, 8, quant, "loftq")
    assert torch.equal(quantised, quant(weight))
    rest = torch.linalg.svdvals((weight - quantised).double())
    left = (weight - quantised - (u * s) @ vh).double()
    torch.testing.assert_close(left.square().sum(), rest[8:].square().sum(), rtol=1e-5, atol=0)


def test_pissas_first_turn_quantises_the_residual_of_the_principal_part() -> None:
    weight = Stack().up.weight.detach()
    quantised, (u, s, vh) = split(weight, 8, quant, "pissa")
    exact = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close((u * s) @ vh, (exact.U[:, :8] * exact.S[:8]) @ exact.Vh[:8])
    assert torch.equal(quantised, quant(weight - (u * s) @ vh))


@pytest.mark.parametrize("order", ["loftq", "pissa"])
def test_more_turns_follow_the_definition_and_bring_it_nearer(order: Any) -> None:
    weight = Stack().up.weight.detach()
    errors = []
    for turns in (1, 2, 5):
        quantised, (u, s, vh) = split(weight, 8, quant, order, turns)
        product = (u * s) @ vh
        errors.append(float((weight - quantised - product).norm()))
    assert errors[0] > errors[1] > errors[2]
    one, (u, s, vh) = split(weight, 8, quant, order, 1)
    two, _ = split(weight, 8, quant, order, 2)
    if order == "loftq":
        assert torch.equal(two, quant(weight - (u * s) @ vh))
    else:
        v = torch.linalg.svd(weight - one, full_matrices=False)
        torch.testing.assert_close(two, quant(weight - (v.U[:, :8] * v.S[:8]) @ v.Vh[:8]), rtol=0, atol=2e-2)


@pytest.mark.parametrize("order", ["loftq", "pissa"])
def test_a_lossless_quantiser_loses_nothing(order: Any) -> None:
    weight = Stack().up.weight.detach()
    quantised, (u, s, vh) = split(weight, 8, lambda matrix: matrix, order)
    torch.testing.assert_close(quantised + (u * s) @ vh, weight, rtol=0, atol=1e-6)


# ---- the step, and the start ----


@pytest.mark.parametrize("order", ["loftq", "pissa"])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_adapter_brings_the_quantised_weights_nearer_to_what_they_were(order: str, bits: int) -> None:
    model, before = started(order, bits=bits)
    for layer in ("up", "down"):
        plain = copy.deepcopy(before)
        rw.quantise(plain, bits=bits)
        lost = (before.get_submodule(layer).weight - plain.get_submodule(layer).weight).norm()  # type: ignore[operator]
        assert error(model, before, layer).norm() < 0.95 * lost


@pytest.mark.parametrize("order", ["loftq", "pissa"])
def test_the_output_is_nearer_to_the_float_models_than_the_bases(order: str) -> None:
    model, before = started(order, rank=16, bits=3)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, adapted = before(x), model(x)
        with rw.disabled(model):
            base = model(x)
    assert (adapted - wanted).norm() < 0.8 * (base - wanted).norm()
    assert not torch.equal(adapted, base)  # it does not start as its base


@pytest.mark.parametrize("order", ["loftq", "pissa"])
def test_the_base_has_quantised_values_and_the_product_is_balanced(order: str) -> None:
    model, _ = started(order, alpha=4)
    for name, site in state_of(model).adapter("default").deltas.items():
        delta: Any = site
        weight = model.get_submodule(name).weight.detach()
        assert torch.equal(quant(weight), weight)
        torch.testing.assert_close(delta.B.T @ delta.B, delta.A @ delta.A.T, rtol=0, atol=1e-5)
        assert delta.A0 is None


@pytest.mark.parametrize("order", ["loftq", "pissa"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_product_does_not_depend_on_alpha(order: str, scaling: str) -> None:
    one, two = (started(order, alpha=alpha, scaling=scaling)[0] for alpha in (1.0, 32.0))
    for name, change in rw.delta_weights(one).items():
        torch.testing.assert_close(change, rw.delta_weights(two)[name], rtol=0, atol=1e-6)


def test_it_is_deterministic_and_leaves_other_weights_alone() -> None:
    one, two = Stack(), Stack()
    first, second = (rw.quantise(m, "up", rank=4) for m in (one, two))
    assert list(first) == ["up"]
    assert all(torch.equal(first["up"][k], second["up"][k]) for k in first["up"])
    assert torch.equal(one.up.weight, two.up.weight)
    assert torch.equal(one.down.weight, Stack().down.weight)
    assert torch.equal(one.up.bias, Stack().up.bias)


def test_a_16_bit_weight_is_rounded_once_more_and_the_product_knows() -> None:
    before = Stack(torch.bfloat16)
    model = copy.deepcopy(before)
    evidence = rw.quantise(model, rank=48)
    rw.adapt(model, "lora", rank=48, init="loftq", evidence=evidence)
    lost = error(model, before, "down").float()
    assert model.down.weight.dtype == torch.bfloat16
    assert lost.norm() < 1e-3 * before.down.weight.norm()  # of full rank it makes good for everything


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_language_model_is_nearer_and_learns(build: Any) -> None:
    before, batch = build(), token_batch(batch=4)
    model = copy.deepcopy(before)
    rw.adapt(model, "lora", rank=8, init="loftq", evidence=rw.quantise(model, bits=2, rank=8))
    with torch.no_grad():
        wanted = before(input_ids=batch).logits
        with rw.disabled(model):
            base = model(input_ids=batch).logits
        adapted = model(input_ids=batch).logits
    assert (adapted - wanted).norm() < (base - wanted).norm()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    seen = []
    for _ in range(8):
        loss = model(input_ids=batch, labels=batch).loss
        seen.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[-1] < 0.9 * seen[0]


def test_the_adapter_is_a_plain_lora_against_the_quantised_base(tmp_path: Path) -> None:
    model, _ = started()
    x = torch.randn(4, 64)
    y = model(x)
    assert state_of(model).adapter("default").deltas["up"].factors().A.shape == (8, 64)  # type: ignore[union-attr]
    rw.save(model, tmp_path / "adapter")
    rw.merge(model)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)
    rw.unmerge(model)
    rw.detach(model)
    assert torch.equal(rw.load(model, tmp_path / "adapter")(x), y)


def test_dora_goes_around_it() -> None:
    model, before = started(delta="dora")
    x = torch.randn(32, 64)
    with torch.no_grad():
        adapted = model(x)
        with rw.disabled(model):
            base = model(x)
        assert (adapted - before(x)).norm() < (base - before(x)).norm()


@pytest.mark.parametrize("order", ["loftq", "pissa"])
def test_bitsandbytes_holds_the_very_same_numbers(order: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="a development dependency")
    dense, _ = started(order)
    held = Stack()
    evidence = rw.quantise(held, init=order, rank=8, holder="bitsandbytes")  # type: ignore[arg-type]
    for name in ("up", "down"):
        layer: Any = held.get_submodule(name)
        assert isinstance(layer, bnb.nn.Linear4bit)
        assert torch.equal(dense_weight(layer.weight, layer), dense.get_submodule(name).weight)
    rw.adapt(held, "lora", rank=8, init="loftq" if order == "loftq" else PISSA, evidence=evidence)
    x = torch.randn(4, 64)
    torch.testing.assert_close(held(x), dense(x), rtol=0, atol=1e-5)


# ---- refusals ----


def test_what_cannot_be_quantised_is_refused_with_the_model_untouched() -> None:
    model = Stack()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bits": 1}, "2 to 8 bits"),
        ({"rank": 0}, "at least 1"),
        ({"init": "svd"}, "'loftq' or 'pissa'"),
        ({"holder": "bitsandbytes", "bits": 3}, "holder='dense'"),
    ]
    for settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            rw.quantise(model, **settings)
    with pytest.raises(RankworksError):
        rw.quantise(model, "nothing")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Stack().parameters(), strict=True))
    rw.adapt(model, "lora")
    with pytest.raises(ConfigError, match="quantise the base first"):
        rw.quantise(model)


def test_bitsandbytes_is_given_no_rows_of_broken_blocks() -> None:
    pytest.importorskip("bitsandbytes", reason="a development dependency")
    with pytest.raises(TargetError, match="no multiple of block = 64"):
        rw.quantise(nn.Sequential(nn.Linear(96, 64)), holder="bitsandbytes")
    with pytest.raises(TargetError, match="no plain linear layer"):
        rw.quantise(nn.Sequential(nn.Conv1d(4, 4, 3)), "0", holder="bitsandbytes")


def test_a_weight_under_two_names_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(TargetError, match="exclude one of them"):
        rw.quantise(model)
    rw.quantise(model, exclude=["1"])


def test_a_start_without_the_step_or_of_a_higher_rank_is_refused() -> None:
    for init in ("loftq", PISSA):
        with pytest.raises(TargetError, match=r"rankworks.quantise\(model"):
            rw.adapt(Stack(), "lora", init=init)
    model = Stack()
    evidence = rw.quantise(model, rank=4)
    with pytest.raises(ConfigError, match="rank=8 on the unquantised"):
        rw.adapt(model, "lora", rank=8, init="loftq", evidence=evidence)
    with pytest.raises(ConfigError, match="not measured on data"):
        rw.calibrate(model, [{}], rw.AdaptSpec.from_flat({"delta": "lora", "init": "loftq"}), progress=False)
