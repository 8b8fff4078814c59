"""Every delta on layers that bitsandbytes holds in 4 or 8 bits: it works beside them, and merging is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matrix import LINEAR, case_of, settled
from torch import Tensor, nn

import rankworks as rw
from rankworks.conformance.case import biasless, evidence_for
from rankworks.core.errors import MergeError, TargetError
from rankworks.core.state import state_of
from rankworks.core.targets import find_sites
from rankworks.core.weights.holders import dense_weight

bnb = pytest.importorskip("bitsandbytes", reason="a development dependency")


class Stack(nn.Module):
    """Layers of the sizes that bitsandbytes packs for the CPU: (..., 64) -> (..., 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Linear(64, 128)
        self.wide = nn.Linear(128, 64, bias=False)
        self.square = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(torch.tanh(self.wide(torch.tanh(self.tall(x)))))


def quantised(bits: int) -> Any:
    """A stack of layers held in 4 or 8 bits."""
    torch.manual_seed(0)
    model: Any = Stack()
    for name, layer in list(model.named_children()):
        settings = {"bias": layer.bias is not None}
        held: Any
        if bits == 4:
            held = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4", **settings
            )
        else:
            held = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, **settings)
        held.load_state_dict(layer.state_dict())
        setattr(model, name, held.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_is_read_alike_before_and_after_the_first_call(bits: int) -> None:
    """bitsandbytes turns and moves what it holds when a layer is first called without gradients."""
    model = quantised(bits)
    before = {n: dense_weight(layer.weight, layer).clone() for n, layer in model.named_children()}
    with torch.no_grad():
        model(torch.randn(3, 64))
    for name, layer in model.named_children():
        after = dense_weight(layer.weight, layer)
        assert after.shape == before[name].shape
        # the CPU's kernel keeps the scales of 4-bit codes in bfloat16
        torch.testing.assert_close(after, before[name], atol=0, rtol=2**-8 if bits == 4 else 0)


def test_a_model_turned_for_inference_is_refused() -> None:
    """bitsandbytes' CPU kernel for 4 bits passes no gradient, and a layer called in eval mode has gone over to it."""
    model = quantised(4)
    with torch.no_grad():
        model(torch.randn(3, 64))
    with pytest.raises(TargetError, match="load the model again and adapt it before it is used"):
        rw.adapt(model, "lora", targets=["tall"])
    assert not any("adapters" in name for name, _ in model.named_modules())


def test_an_adapted_model_may_be_evaluated_and_trained_on() -> None:
    """Layers beside the adapted ones too stay as they are, so that gradients pass them after an evaluation."""
    model = rw.adapt(quantised(4), "lora", targets=["tall"], rank=2)
    with torch.no_grad():
        model(torch.randn(3, 64))
    model(torch.randn(3, 64)).sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    rw.detach(model)
    with torch.no_grad():
        model(torch.randn(3, 64))
    assert model.wide.weight.quant_state.packing_format_for_cpu == ("avx512_bf16" in cpu_flags())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("key", sorted(LINEAR))
def test_a_quantised_layer(key: str, bits: int) -> None:
    model = quantised(bits)
    codes = {n: dense_weight(layer.weight, layer).clone() for n, layer in model.named_children()}
    spec = case_of(key).spec(targets=["tall", "wide", "square"])
    sites = [s for s in find_sites(model, spec.targets) if not biasless(spec, s)]
    rw.adapt(model, case_of(key).spec(targets=[s.name for s in sites]), evidence=evidence_for(model, spec))
    settled(model, "default", 0)
    adapter = state_of(model).adapter("default")
    for name, site in adapter.sites.items():
        assert site.quantised
        layer: Any = model.get_submodule(name)
        x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(1))
        delta = adapter.deltas[name]
        shift = delta.bias_change(site.weight, site.bias)
        with torch.no_grad(), rw.disabled(model):
            frozen = layer(x)
        seen = layer(x) - frozen
        expected = F.linear(x, delta.dense(site.weight).to(x.dtype)) + (0 if shift is None else shift)
        # 8 bits round the layer's input too, so a method that reads the layer's output sees that rounding
        bound = 1e-4 if bits == 4 or delta.additive else 0.05
        assert float((seen - expected).norm()) <= bound * float(frozen.norm() + expected.norm())
    x = torch.randn(16, 64)
    losses = [step(model, x) for _ in range(25)]
    assert losses[-1] < losses[0]
    with pytest.raises(MergeError, match="quantised"):
        rw.merge(model)
    for name, numbers in codes.items():
        assert torch.equal(dense_weight(getattr(model, name).weight, getattr(model, name)), numbers)


def cpu_flags() -> str:
    """What the processor can do, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def step(model: nn.Module, x: Tensor) -> float:
    """One step of plain gradient descent towards fixed outputs; returns the loss before it."""
    y = model(x)
    loss = F.mse_loss(y, torch.ones_like(y))
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.sub_(1e-2 * parameter.grad / parameter.grad.norm().clamp_min(1e-12))
                parameter.grad = None
    return float(loss.detach())
