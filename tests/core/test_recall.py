"""Products that autograd can form again are not kept: the same numbers, less memory, and no surprise for others."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import rankworks as rw
from rankworks.core.kernels import lowrank_linear
from rankworks.core.kernels.recall import maker, recall
from tiny import tiny_llama, token_batch


def tensors(*shapes, grad=True):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=grad) for s in shapes]


def test_a_product_of_two_that_need_gradients_is_formed_again():
    a, b = tensors((4, 5), (4, 5))
    x = a * b
    assert torch.equal(recall(maker(x)), x)


def test_what_autograd_does_not_hold_is_kept():
    a, b, row = tensors((4, 5), (4, 5), (5,))
    frozen = b.detach()
    with torch.no_grad():
        quiet = a * b
    others = [a, a + b, a * 2, a * frozen, a * row, (a * b).view(5, 4), (a * b).sum(0), quiet]
    assert [maker(x) for x in others] == [None] * len(others)
    assert maker(a * b.float()) is None


def saved_bytes(loss):
    """Bytes that a graph holds for its backward pass, each storage once."""
    seen, stack, storages = set(), [loss.grad_fn], {}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [n for n, _ in node.next_functions]
        held = list(getattr(node, "saved_tensors", None) or ())
        held += [getattr(node, k) for k in dir(node) if k.startswith("_saved_") and k != "_saved_tensors"]
        for t in held:
            if isinstance(t, torch.Tensor):
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_derivatives_of_both_orders(p):
    a, b, A, B = tensors((4, 5), (4, 5), (2, 5), (3, 2))
    (W,) = tensors((3, 5), grad=False)

    def last(a, b, A, B):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return lowrank_linear(a * b, W, None, A, B, p)

    assert gradcheck(last, (a, b, A, B))
    assert gradgradcheck(last, (a, b, A, B))


def test_the_widest_activation_is_not_kept(monkeypatch):
    """Of a whole model, against the same with every input kept: the bytes of one MLP activation per layer."""

    def run():
        model = rw.adapt(tiny_llama(layers=3), "lora", rank=4)
        ids = token_batch()
        loss = model(input_ids=ids, labels=ids).loss
        held = saved_bytes(loss)
        loss.backward()
        return held, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, ids.numel(), model.config

    less, gradients, numbers, config = run()
    monkeypatch.setattr("rankworks.core.kernels.lowrank.maker", lambda x: None)
    more, wanted, _, _ = run()
    assert more - less == 3 * numbers * config.intermediate_size * 4
    assert all(torch.equal(gradients[n], wanted[n]) for n in wanted)


def test_a_factor_changed_before_the_backward_pass_is_told():
    a, b, A, B = tensors((4, 5), (4, 5), (2, 5), (3, 2))
    (W,) = tensors((3, 5), grad=False)
    c = b * 1
    y = lowrank_linear(a * c, W, None, A, B).sum()
    with torch.no_grad():
        c.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_gradient_checkpointing_and_offloading_get_the_tensor():
    a, b, A, B = tensors((4, 5), (4, 5), (2, 5), (3, 2))
    (W,) = tensors((3, 5), grad=False)

    def last(a, b, A, B):
        return lowrank_linear(a * b, W, None, A, B).square().sum()

    wanted = torch.autograd.grad(last(a, b, A, B), (a, b, A, B))
    again = torch.autograd.grad(checkpoint(last, a, b, A, B, use_reentrant=False), (a, b, A, B))
    torch.testing.assert_close(again, wanted)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        loss = last(a, b, A, B)
    assert packed.count(torch.Size((4, 5))) >= 3  # a, b and their product
    torch.testing.assert_close(torch.autograd.grad(loss, (a, b, A, B)), wanted)


def test_a_graph_kept_for_a_second_pass():
    a, b, A, B = tensors((4, 5), (4, 5), (2, 5), (3, 2))
    (W,) = tensors((3, 5), grad=False)
    loss = lowrank_linear(a * b, W, None, A, B).square().sum()
    first = torch.autograd.grad(loss, (a, A), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (a, A)), first)
