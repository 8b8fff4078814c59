"""Thin products: the same numbers as `mm`, by oneDNN where it serves and nobody needs to see ordinary operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rankworks.core.kernels import lowrank_linear
from rankworks.linalg import randomised_svd, thin
from rankworks.linalg.thin import LEAST_NUMBERS

T, IN, R = 1100, 500, 6
assert T * IN >= LEAST_NUMBERS

serves = pytest.mark.skipif(not thin._serves(), reason="a torch without the operation")


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was asked."""
    made = []
    thin._serves()
    inner = thin._onednn
    monkeypatch.setattr(thin, "_onednn", lambda a, b: made.append(1) or inner(a, b))
    return made


def normal(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


OPERANDS = {
    "read": lambda: (normal(T, IN), normal(R, IN)),
    "of h": lambda: (normal(T, IN), normal(IN, R).t()),
    "of A": lambda: (normal(T, R).t(), normal(T, IN).t()),
    "part of a wider one": lambda: (normal(T, 2 * IN)[:, :IN], normal(R, 2 * IN)[:, IN:]),
    "rank 0": lambda: (normal(T, IN), normal(0, IN)),
}


@serves
@pytest.mark.parametrize("kind", OPERANDS)
def test_equals_the_product(kind, calls):
    a, b = OPERANDS[kind]()
    with torch.no_grad():
        made = thin.thin(a, b)
    assert bool(calls) == (kind != "rank 0")
    wanted = a.double() @ b.double().t()
    error = (made.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    assert made.shape == wanted.shape
    assert error < 1e-6 or not wanted.numel()


@serves
@pytest.mark.parametrize("why", ["small", "double", "gradient", "counted", "switched off", "fails"])
def test_otherwise_it_is_the_plain_product(why, calls, monkeypatch):
    a, b = normal(T, IN), normal(R, IN)
    if why == "small":
        a = a[:100]
    if why == "double":
        a, b = a.double(), b.double()
    if why == "fails":
        monkeypatch.setattr(thin, "_serves", lambda: False)
    b.requires_grad_(why == "gradient")
    with torch.set_grad_enabled(why == "gradient"):
        if why == "counted":
            with FlopCounterMode(display=False) as counter:
                made = thin.thin(a, b)
            assert counter.get_total_flops() == 2 * T * IN * R
        else:
            with torch.backends.mkldnn.flags(enabled=why != "switched off"):
                made = thin.thin(a, b)
    assert not calls
    assert torch.equal(made, a @ b.t())


def test_a_torch_without_the_operation_is_noticed(monkeypatch):
    def raises(a, b):
        raise AttributeError("no such operation")

    thin._serves.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(thin, "_onednn", raises)
        assert not thin._serves()
        thin._serves.cache_clear()
        patched.setattr(thin, "_onednn", lambda a, b: a @ b.t() + 1)
        assert not thin._serves()
    thin._serves.cache_clear()


@serves
def test_gradients_of_a_layer_large_enough(calls):
    """All four thin products of a layer take this way, and the gradients are those of float64."""
    x, W, A, B = normal(T, IN), normal(700, IN), normal(R, IN), normal(700, R)
    out = normal(T, 700)
    found, wanted = [], []
    for dtype, into in ((torch.float32, found), (torch.float64, wanted)):
        of_x, of_A, of_B = (t.to(dtype).requires_grad_() for t in (x, A, B))
        y = lowrank_linear(of_x, W.to(dtype), None, of_A, of_B)
        into += [y, *torch.autograd.grad(y, (of_x, of_A, of_B), out.to(dtype))]
    assert len(calls) == 4
    for f, w in zip(found, wanted, strict=True):
        assert (f.double() - w).norm() / w.norm() < 1e-6


@serves
def test_a_randomised_svd_takes_this_way(calls):
    """Ten products with the weight in four iterations; the factors are those of float64."""
    left, right = torch.linalg.qr(normal(T, R)).Q, torch.linalg.qr(normal(R, IN).mT).Q
    matrix = left @ torch.diag(torch.arange(R, 0, -1.0)) @ right.mT
    found = randomised_svd(matrix, R)
    assert len(calls) == 10
    for part, exact in zip(found, randomised_svd(matrix.double(), R), strict=True):
        assert (part.double() - exact).norm() / exact.norm() < 1e-5
