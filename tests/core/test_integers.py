"""Weights held as integers: the layer computes with the numbers, and its parameter carries the gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import rankworks as rw
from rankworks.core.errors import MergeError
from rankworks.core.targets import find_sites
from rankworks.core.weights.holders import dense_weight
from rankworks.core.weights.integers import IntegerLayer, IntegerParameter, hold, holdable, make_dense
from tiny import tiny_gpt2, tiny_llama, token_batch

IDS = token_batch(vocab=320)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(bits: int = 8, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A linear layer held as integers, and a dense one of the same numbers."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 16, bias=bias)
    hold(layer, [layer.weight], bits)
    dense = nn.Linear(24, 16, bias=bias)
    with torch.no_grad():
        dense.weight.copy_(dense_weight(layer.weight))
        if bias:
            dense.bias.copy_(layer.bias)
    return layer, dense


def held_model(make: Any = tiny_llama) -> Any:
    model = make().requires_grad_(True)
    fits = holdable(model)
    hold(model, [p for n, p in model.named_parameters() if id(p) in fits and "lm_head" not in n])
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_outputs_and_gradients_are_those_of_the_dense_layer(bits: int, shape: tuple[int, ...]) -> None:
    layers = pair(bits)
    inputs = [draw(*shape).requires_grad_() for _ in layers]
    outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        (y * draw(*y.shape, seed=1)).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layers[0].weight.grad, layers[1].weight.grad)
    torch.testing.assert_close(layers[0].bias.grad, layers[1].bias.grad)


def test_the_parameter_is_the_same_object_with_the_storage_of_one_number() -> None:
    layer = nn.Linear(64, 32, bias=False)
    weight = layer.weight
    hold(layer, [weight])
    assert layer.weight is weight
    assert isinstance(weight, IntegerParameter)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, IntegerLayer)
    assert weight.shape == (32, 64)
    assert weight.untyped_storage().nbytes() == 4
    assert weight.isnan().all(), "whoever reads it as numbers is told"
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_gradients_gather_are_clipped_and_freed_like_any_other() -> None:
    layer, dense = pair()
    seen: list[Tensor] = []
    layer.weight.register_post_accumulate_grad_hook(seen.append)
    for x in (draw(4, 24), draw(3, 24, seed=1)):
        for net in (layer, dense):
            net(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)
    assert len(seen) == 2
    assert seen[0] is layer.weight
    norms = [clip_grad_norm_(net.parameters(), 0.1) for net in (layer, dense)]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)
    layer.zero_grad()
    assert layer.weight.grad is None


def test_a_frozen_weight_passes_the_gradient_on() -> None:
    layer, dense = pair()
    layer.requires_grad_(False)
    x, y = draw(3, 24).requires_grad_(), draw(3, 24).requires_grad_()
    layer(x).sum().backward()
    dense(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert layer.weight.grad is None


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_model_learns_the_same_whichever_layout_its_layers_have(make: Any) -> None:
    """Linear and transformers' Conv1D; tied embeddings are no layer of that kind and stay as they are."""
    model = held_model(make)
    held = [n for n, p in model.named_parameters() if isinstance(p, IntegerParameter)]
    assert held
    assert not any("embed" in n or "wte" in n for n in held)
    dense = copy.deepcopy(model)
    make_dense(dense)
    for net in (model, dense):
        net(input_ids=IDS, labels=IDS).loss.backward()
    theirs = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4)


def test_a_copy_has_its_own_codes() -> None:
    layer, _ = pair()
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, IntegerParameter)
    assert twin.weight.untyped_storage().nbytes() == 4
    twin.weight.held.codes.zero_()
    assert not torch.equal(dense_weight(twin.weight), dense_weight(layer.weight))
    torch.testing.assert_close(layer(draw(2, 24)), pair()[0](draw(2, 24)))


def test_a_state_dict_is_exact_and_a_dense_one_is_taken_up() -> None:
    layer, _ = pair()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    assert set(state) == {"weight.codes", "weight.scales", "weight.zeros", "bias"}
    other = nn.Linear(24, 16)
    dense_state = {k: v.clone() for k, v in other.state_dict().items()}
    hold(other, [other.weight])
    other.load_state_dict(state)
    assert torch.equal(dense_weight(other.weight), dense_weight(layer.weight))
    other.load_state_dict(dense_state)
    step = float((dense_state["weight"].max() - dense_state["weight"].min()) / 255)
    assert (dense_weight(other.weight) - dense_state["weight"]).abs().max() <= step
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        other.load_state_dict({"bias": state["bias"]})


def test_moving_to_another_type_leaves_the_scales_and_no_storage() -> None:
    layer, _ = pair()
    before = dense_weight(layer.weight)
    layer(draw(2, 24)).sum().backward()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert layer.weight.untyped_storage().nbytes() == 2
    assert layer.weight.held.scales.dtype == torch.float32  # type: ignore[attr-defined]
    torch.testing.assert_close(dense_weight(layer.weight), before.bfloat16())
    assert layer(draw(2, 24).bfloat16()).dtype == torch.bfloat16
    layer.float()
    torch.testing.assert_close(dense_weight(layer.weight), before, rtol=0, atol=0)


def test_autocast_computes_in_its_type_and_keeps_gradients_in_the_weights() -> None:
    layer, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(draw(2, 24))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_dense_again_it_is_a_plain_layer_of_the_same_numbers(tmp_path: Path) -> None:
    model = held_model()
    numbers = {n: dense_weight(p).detach().clone() for n, p in model.named_parameters()}
    outputs = model(input_ids=IDS).logits
    make_dense(model)
    assert not any(isinstance(m, IntegerLayer) for m in model.modules())
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter
        assert torch.equal(parameter, numbers[name])
    torch.testing.assert_close(model(input_ids=IDS).logits, outputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, outputs)


def test_adapters_stand_beside_integers_and_merging_into_them_is_refused() -> None:
    model = held_model()
    site = next(iter(find_sites(model, "q_proj")))
    assert site.quantised
    torch.testing.assert_close(site.weight, dense_weight(site.tensor).detach())
    assert tuple(site.shape) == tuple(site.tensor.shape)
    wanted = model(input_ids=IDS).logits
    rw.adapt(model, "lora", rank=2)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "adapters" not in n)
    assert any(p.grad is not None for p in model.parameters())
    with pytest.raises(MergeError, match="quantised"):
        rw.merge(model)


def test_gradients_are_those_under_checkpointing_too() -> None:
    grads = []
    for checkpointing in (False, True):
        model = held_model()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])
