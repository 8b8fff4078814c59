"""Stacked experts: the change reaches the module's own code, names stay, copies are independent, MoE models work."""

from __future__ import annotations

import copy

import pytest
import torch

import rankworks as rw
from rankworks.conformance.models import build, inputs
from rankworks.core.state import state_of
from rankworks.core.store import load, save
from tiny import tiny_moe, token_batch

TARGETS = ["first.up", "first.down#1", "second.across"]


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in rw.adapters(model):
            for p in state_of(model).adapter(name).parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator).to(p)
    return model


def mixture():
    return rw.adapt(build("expert"), "lora", rank=2, targets=TARGETS)


def test_the_parameters_stay_under_their_names():
    base = build("expert")
    names = list(base.state_dict())
    order = [n for n, _ in base.named_parameters()]
    rw.adapt(base, "lora", rank=2, targets=TARGETS)
    assert [n for n in base.state_dict() if ".adapters." not in n] == names
    assert [n for n, _ in base.named_parameters() if ".adapters." not in n] == order
    rw.detach(base)
    assert [n for n, _ in base.named_parameters()] == order


def test_detaching_a_copy_leaves_the_original_adapted():
    model, x = shaken(mixture()), inputs("expert")
    before = model(x)
    twin = copy.deepcopy(model)
    rw.detach(twin)
    assert torch.equal(model(x), before)
    assert torch.equal(twin(x), build("expert")(x))


def test_only_the_named_expert_changes():
    model = rw.adapt(build("expert"), "lora", rank=2, targets="first.down#1")
    changed = shaken(model).first.down - build("expert").first.down
    assert changed[1].abs().min() > 0
    assert not changed[0].any()
    assert not changed[2].any()


def test_each_stack_is_changed_once_per_forward(monkeypatch):
    from rankworks.core.weights import stack

    calls = []
    real = stack._change
    monkeypatch.setattr(stack, "_change", lambda module, held, pairs: calls.append(held) or real(module, held, pairs))
    shaken(mixture())(inputs("expert", 6))  # six rows, each reading its own expert
    assert len(calls) == 3


def test_an_error_in_the_forward_leaves_no_stale_stack():
    model = shaken(mixture())
    x = inputs("expert")
    wanted = model(x)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 5))
    assert model.first._changed is None
    assert torch.equal(model(x), wanted)


def test_a_mixture_of_experts_model(tmp_path):
    ids = token_batch()
    targets = ["gate_up_proj", "down_proj#0:2", "q_proj"]
    model = shaken(rw.adapt(tiny_moe(), "lora", rank=2, targets=targets))
    adapted = model(ids).logits
    assert not torch.allclose(adapted, tiny_moe()(ids).logits, atol=1e-4)
    save(model, tmp_path / "adapter")
    again = load(tiny_moe(), tmp_path / "adapter")
    assert torch.equal(again(ids).logits, adapted)
    rw.merge(model)
    assert torch.allclose(model(ids).logits, adapted, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    reloaded = type(model).from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(reloaded(ids).logits, model(ids).logits, atol=1e-6)
    rw.detach(model)
    assert torch.equal(model(ids).logits, tiny_moe()(ids).logits)


def test_every_adapted_expert_gets_a_gradient():
    model = shaken(rw.adapt(tiny_moe(), "lora", rank=2, targets=["gate_up_proj", "down_proj"]))
    ids = token_batch(length=64)
    model(ids, labels=ids).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
