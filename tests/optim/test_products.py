"""Fast products: operands rounded, sums exact, bases orthonormal all the same, and nothing left switched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.optim.products import exactly, multiplying
from rankworks.core.optim.projection import Basis, add_back
from rankworks.core.optim.subspace import find_basis

CPU = torch.device("cpu")
ROUNDED = 2.0**-8  # of one operand in bfloat16, relative


def matrices() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(96, 64, generator=generator), torch.randn(64, 16, generator=generator)


def far(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


def test_a_fast_product_is_one_of_rounded_operands() -> None:
    G, Q = matrices()
    exact, plain = G.double() @ Q.double(), G @ Q
    with multiplying("fast", CPU):
        fast = G @ Q
        with exactly(CPU):
            assert torch.equal(G @ Q, plain)
    rounded = G.bfloat16().double() @ Q.bfloat16().double()
    # where the processor has no such products it multiplies in full
    assert far(fast, rounded) < 1e-6 or torch.equal(fast, plain)
    assert far(fast, exact) < ROUNDED
    assert torch.equal(G @ Q, plain)


def test_full_leaves_torch_as_it_is_set_and_errors_leave_nothing_switched() -> None:
    G, Q = matrices()
    plain = G @ Q
    with multiplying("full", CPU):
        assert torch.equal(G @ Q, plain)
    with pytest.raises(ZeroDivisionError), multiplying("fast", CPU):
        raise ZeroDivisionError
    assert torch.equal(G @ Q, plain)


def test_float64_is_never_rounded() -> None:
    G, Q = (matrix.double() for matrix in matrices())
    with multiplying("fast", CPU):
        fast = G @ Q
    assert torch.equal(fast, G @ Q)


@pytest.mark.parametrize("how", ["warm", "randomised", "svd"])
def test_a_basis_is_orthonormal_however_it_was_found(how: str) -> None:
    G, _ = matrices()
    with multiplying("fast", CPU):
        found = find_basis(G, 8, "std", how)  # type: ignore[arg-type]
    assert found.Q is not None
    torch.testing.assert_close(found.Q.T @ found.Q, torch.eye(8), atol=1e-5, rtol=0)
    full = find_basis(G, 8, "std", how)  # type: ignore[arg-type]
    assert full.Q is not None
    kept, most = (torch.linalg.vector_norm(G @ columns).square() for columns in (found.Q, full.Q))
    torch.testing.assert_close(kept, most, atol=0, rtol=0.005)


def test_what_is_added_back_is_rounded_and_the_weight_is_not() -> None:
    G, Q = matrices()
    W, N = G.clone(), torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    with multiplying("fast", CPU):
        add_back(W, Basis(None, Q), N, 1e-3)
    step = 1e-3 * N.double() @ Q.double().T
    assert far(W.double() - G.double(), step) < 2 * ROUNDED
    assert far(W, G.double() + step) < 1e-4


@pytest.mark.parametrize("key", ["galore", "fira", "apollo", "q-galore"])
def test_an_optimizer_takes_nearly_the_same_steps(key: str) -> None:
    extra = {"weight_bits": None, "projector_bits": None} if key == "q-galore" else {}
    ends = [trained({"optimizer": key, "rank": 8, "refresh": 2, **extra, **given}) for given in ({}, *CHOICES)]
    started = linear().weight.detach()
    default, full, fast = (end - started for end in ends)
    assert torch.equal(default, full)
    assert far(fast, full.double()) < 0.05
    assert float(torch.linalg.vector_norm(full)) > 0.1


CHOICES = ({"products": "full"}, {"products": "fast"})


def linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(64, 96, bias=False)


def trained(optimizer: dict[str, object]) -> Tensor:
    """The weight after six steps towards another one."""
    model, layer = nn.Module(), linear()
    model.layers = nn.ModuleList([layer])
    goal, x = matrices()[0], torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    made = rw.make_optimizer(model, optimizer, lr=3e-2)
    for _ in range(6):
        made.zero_grad()
        (layer(x) - x @ goal.T).square().mean().backward()
        made.step()
    return layer.weight.detach().clone()
