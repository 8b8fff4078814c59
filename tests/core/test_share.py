"""Layers that read one input: the same numbers as alone, fewer products, and nothing stale or kept too long."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import rankworks as rw
from rankworks.core import share
from rankworks.core.kernels import lowrank, read, write
from tiny import tiny_llama, token_batch

NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three projections to be called by hand."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(8, 5, bias=False)


def attention(**settings):
    """The projections in float64, adapted, with factors away from their start."""
    torch.manual_seed(0)
    model = rw.adapt(Attention().double(), rank=2, targets=list(NAMES), dtype="float64", **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def layers(model):
    return [getattr(model, name) for name in NAMES]


def by_hand(layer, x):
    """The layer's output in plain operations."""
    delta = layer.adapters["default"]["weight"]
    return F.linear(x, layer.weight, layer.bias) + delta.branch(x)


def gradients(loss, model, *more):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, [*trained, *more], allow_unused=True)


def data(rows=7, grad=True):
    return torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=grad)


@pytest.fixture
def reads(monkeypatch):
    """How many factors each reading was made for, in order."""
    made = []

    def counting(x, A, p=0.0):
        made.append(len(A))
        return lowrank.read(x, A, p)

    monkeypatch.setattr(share, "read", counting)
    return made


def test_without_gradients_and_dropout_each_reads_alone(reads):
    """Sharing would cost more than it saves; with dropout the mask is shared all the same."""
    model, x = attention(dropout=0.3), data()
    with torch.no_grad():
        assert not any(layer(x).requires_grad for layer in layers(model.eval()))
        assert reads == []
        assert not any(layer(x).requires_grad for layer in layers(model.train()))
        assert reads == [3]


def test_gradients_are_not_taken_from_a_reading_without(reads):
    model, x = attention(dropout=0.3).train(), data()
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad
    assert reads == [3, 3]


@pytest.mark.parametrize("grad", [True, False])
def test_siblings_share_one_reading(reads, grad):
    model, x = attention(), data(grad=grad)
    outputs = [layer(x) for layer in layers(model)]
    wanted = [by_hand(layer, x) for layer in layers(model)]
    assert reads == [3]
    torch.testing.assert_close(outputs, wanted)
    more = [x] if grad else []
    mine = gradients(sum(y.square().sum() for y in outputs), model, *more)
    torch.testing.assert_close(mine, gradients(sum(y.square().sum() for y in wanted), model, *more))


@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_a_model_has_the_same_gradients_with_and_without(delta, monkeypatch):
    def run():
        model = rw.adapt(tiny_llama(), delta, rank=4).double()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        ids = token_batch()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    shared = run()
    monkeypatch.setattr(share, "SIBLINGS", ())
    torch.testing.assert_close(shared, run(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_derivatives_of_both_orders(p):
    """Also of the second order, where the gradient of x reaches the reading from more than its layers."""
    generator = torch.Generator().manual_seed(0)
    x, A1, B1, A2, B2 = (
        torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((4, 5), (2, 5), (3, 2), (1, 5), (6, 1))
    )
    W1, W2, b1 = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((3, 5), (6, 5), (3,)))

    def both(x, A1, B1, A2, B2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            reading = read(x, (A1, A2), p)
        return write(reading, 0, W1, b1, B1), write(reading, 1, W2, None, B2)

    def product(*operands):
        first, second = both(*operands)
        return first.sum() * second.square().sum()

    assert gradcheck(both, (x, A1, B1, A2, B2))
    assert gradgradcheck(both, (x, A1, B1, A2, B2))
    assert gradgradcheck(product, (x, A1, B1, A2, B2))


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2], [2, 1]])
def test_outputs_that_lead_nowhere(used):
    model, x = attention(), data()
    outputs = [layer(x) for layer in layers(model)]
    mine = gradients(sum(outputs[i].square().sum() for i in used), model, x)
    wanted = gradients(sum(by_hand(layers(model)[i], x).square().sum() for i in used), model, x)
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, check_dtype=False
        )


def test_others_may_use_the_input_too():
    """A layer in training between the siblings, and the input itself in the loss."""
    model, x, other = attention(), data(), nn.Linear(8, 6).double()
    q, k, v = layers(model)

    def loss(call):
        first = call(q, x) * other(x)
        return first.sum() + call(k, x).square().sum() + (call(v, x) @ x[:, :5].t()).sum()

    mine = gradients(loss(lambda layer, x: layer(x)), model, x, *other.parameters())
    torch.testing.assert_close(mine, gradients(loss(by_hand), model, x, *other.parameters()))


def test_several_and_broken_backward_passes():
    """A pass that fails half-way leaves nothing that the next would add to."""
    model, x = attention(), data()
    wanted = gradients(sum(by_hand(layer, x).square().sum() for layer in layers(model)), model, x)
    outputs = [layer(x) for layer in layers(model)]
    loss = sum(y.square().sum() for y in outputs)
    handle = outputs[0].register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        torch.autograd.grad(loss, x, retain_graph=True)
    handle.remove()
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True), wanted[-1:])
    torch.testing.assert_close(gradients(loss, model, x), wanted)


def test_cross_attention_reads_two_inputs(reads):
    model, x, other = attention(), data(), data(4)
    q, k, v = layers(model)
    outputs = q(x), k(other), v(other)
    assert reads == [3, 3]
    torch.testing.assert_close(outputs, (by_hand(q, x), by_hand(k, other), by_hand(v, other)))


def test_nothing_stale_is_taken(reads):
    """An input changed in place, a factor that was stepped, exchanged or frozen, another mode: all are read anew."""
    model, x = attention(), data(grad=False)
    q, k, _ = layers(model)

    def changed(change, layer=k):
        q(x)
        before = len(reads)
        change()
        torch.testing.assert_close(layer(x), by_hand(layer, x))
        assert len(reads) == before + 1

    def quietly(change):
        with torch.no_grad():
            change()

    A = k.adapters["default"]["weight"].A
    changed(lambda: quietly(lambda: x.mul_(2)))
    changed(lambda: quietly(lambda: A.mul_(2)))
    changed(lambda: setattr(A, "data", A.data * 2))
    changed(lambda: A.requires_grad_(False))
    q(x)
    q(x)  # the same sibling twice
    torch.testing.assert_close(q(x), by_hand(q, x))


def test_an_input_changed_before_the_backward_pass_is_told():
    model, x = attention(), data()
    hidden = x * 2
    loss = sum(layer(hidden).sum() for layer in layers(model))
    with torch.no_grad():
        hidden.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_left_goes_with_the_input():
    model, x = attention(), data()
    held = torch.rand_like(x)
    hidden = x * held
    kept = weakref.ref(held)
    del held
    y = model.q_proj(hidden)
    assert model.q_proj._shared._last is not None
    del hidden
    assert model.q_proj._shared._last is None
    assert kept() is not None
    del y
    gc.collect()
    assert kept() is None
    for layer in layers(model):
        layer(x)
    assert model.q_proj._shared._last is None


def test_siblings_drop_the_same_coordinates():
    model, x = attention(dropout=0.4), data(50, grad=False)
    torch.manual_seed(0)
    changes = [layer(x) - F.linear(x, layer.weight, layer.bias) for layer in layers(model.train())]
    deltas = [layer.adapters["default"]["weight"] for layer in layers(model)]
    torch.manual_seed(0)
    reading = read(x, [delta.A for delta in deltas], 0.4)
    for delta, change, h in zip(deltas, changes, reading.h, strict=True):
        torch.testing.assert_close(change, delta.scale * h @ delta.B.t())


@pytest.mark.parametrize("settings", [{"overrides": {"k_proj": {"dropout": 0.2}}}, {"exclude": ["k_proj", "v_proj"]}])
def test_layers_that_cannot_share_read_alone(reads, settings):
    """Another dropout, or no sibling that is adapted."""
    model, x = attention(**settings).train(), data()
    model.q_proj(x)
    assert reads == []


def test_two_adapters_read_alone_and_detaching_leaves_nothing():
    model, x = attention(), data()
    rw.adapt(model, "lora", rank=2, targets=list(NAMES), name="other")
    rw.activate(model, ["default", "other"])
    assert all(layer._shared is None for layer in layers(model))
    rw.activate(model, "default")
    assert model.q_proj._shared is model.v_proj._shared is not None
    with rw.disabled(model):
        assert model.q_proj._shared is None
    torch.testing.assert_close(model.q_proj(x), by_hand(model.q_proj, x))
    rw.detach(model)
    assert not any("_shared" in layer.__dict__ for layer in layers(model))


def test_a_copy_shares_among_its_own():
    model, x = attention(), data()
    model.q_proj(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.k_proj.adapters["default"]["weight"].B.mul_(3)
    torch.testing.assert_close([layer(x) for layer in layers(twin)], [by_hand(layer, x) for layer in layers(twin)])
    assert twin.q_proj._shared.deltas[1] is twin.k_proj.adapters["default"]["weight"]
    torch.testing.assert_close(model.k_proj(x), by_hand(model.k_proj, x))
