"""The sharpness is the Hessian's eigenvalue, whatever the model, and measuring it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.conformance.models import build, inputs
from rankworks.core.errors import TrainingError
from rankworks.core.summary import trained
from rankworks.train.rates.sharpness import sharpness


def slopes(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Callable[[], Sequence[Tensor]]:
    return lambda: torch.autograd.grad(loss(), list(parameters))


@pytest.mark.parametrize("eigenvalues", [[4.0, 1.0, 0.5], [2.0, 1.0, -6.0], [3.0, 3.0, 0.0]])
def test_of_a_quadratic_it_is_the_largest_eigenvalue(eigenvalues: list[float]) -> None:
    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    H = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    found = sharpness(slopes(lambda: 0.5 * w @ H @ w, [w]), [w], iterations=100, tolerance=1e-12)
    assert found.value == pytest.approx(eigenvalues[0], rel=1e-6)
    assert found.numbers == 3
    assert found.gradient_norm == pytest.approx(float((H @ w.detach()).norm()), rel=1e-9)


def test_of_a_model_it_is_that_of_the_whole_hessian() -> None:
    """Against the Hessian as a matrix, by double backward; the most curved direction is a concave one."""
    model = rw.adapt(build("linear").double(), "lora", rank=2, targets=["tall", "square"])
    parameters, x = trained(model), inputs("linear", 6, torch.float64)
    target = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    before = [p.detach().clone() for p in parameters]
    loss = lambda: -(model(x) * target).sum()  # noqa: E731
    found = sharpness(slopes(loss, parameters), parameters, iterations=80, tolerance=1e-12, step=1e-6)
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    rows = [torch.cat([r.flatten() for r in torch.autograd.grad(g, parameters, retain_graph=True)]) for g in flat]
    eigenvalues = torch.linalg.eigvalsh(torch.stack(rows))
    assert -eigenvalues[0] > eigenvalues[-1] > 0
    assert found.value == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert all(torch.equal(p, was) for p, was in zip(parameters, before, strict=True))


def test_it_stops_early_and_repeats() -> None:
    w = nn.Parameter(torch.tensor([1.0, 1.0]))
    quadratic = slopes(lambda: 5 * w[0] ** 2 + 0.1 * w[1] ** 2, [w])
    first, again = (sharpness(quadratic, [w], iterations=50) for _ in range(2))
    assert first == again
    assert first.iterations < 10


def test_where_nothing_is_finite_it_says_so() -> None:
    w = nn.Parameter(torch.tensor([0.0, 0.0]))
    with pytest.raises(TrainingError, match="not finite"):
        sharpness(slopes(lambda: w.sum().sqrt(), [w]), [w])
    assert torch.equal(w.detach(), torch.zeros(2))
