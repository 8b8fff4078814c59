"""GaLore: AdamW's step on P^T G or G Q, taken back; the subspace is found anew every `refresh` steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.optim.projection import leading_basis, projected_shape
from rankworks.optim.galore import Projected
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes

DEFAULTS: dict[str, Any] = {
    "rank": 2,
    "refresh": 200,
    "scale": 1.0,
    "side": "std",
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "subspace": "svd",
    "rule": "adamw",
    "seed": 0,
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "beta1": 0.0,
    "weight_decay": 0.0,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(weight: Tensor, **settings: Any) -> tuple[nn.Parameter, Projected]:
    parameter = nn.Parameter(weight.clone())
    optimizer = Projected([{"params": [parameter], "projected": True}], lr=0.1, **{**DEFAULTS, **settings})
    return parameter, optimizer


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: Tensor) -> Tensor:
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach() - before


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_at_full_rank_the_projection_loses_nothing(shape: tuple[int, int], side: Any) -> None:
    """So plain SGD on R, taken back, is SGD."""
    G = draw(*shape)
    basis = leading_basis(G, 9, side)
    torch.testing.assert_close(basis.back(basis.into(G)), G, atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
def test_bases_are_orthonormal_and_lose_the_discarded_singular_values(side: Any) -> None:
    G = draw(7, 5)
    basis = leading_basis(G, 2, side)
    for part in basis:
        if part is not None:
            torch.testing.assert_close(part.t() @ part, torch.eye(2, dtype=G.dtype), atol=1e-12, rtol=0)
    lost = (G - basis.back(basis.into(G))).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(G)[2:].square().sum(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("shape", "kept", "basis"), [((6, 4), (6, 2), ("Q", (4, 2))), ((4, 6), (2, 6), ("P", (4, 2)))])
def test_moments_lie_along_the_long_side(shape: Any, kept: Any, basis: Any) -> None:
    parameter, optimizer = one(draw(*shape))
    step(parameter, optimizer, draw(*shape, seed=1))
    state = optimizer.state[parameter]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == kept == projected_shape(shape, 2, "std")
    assert {k: tuple(v.shape) for k, v in state.items() if k in "PQ"} == dict([basis])


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
def test_within_a_subspace_the_change_has_its_rank(shape: Any, side: Any) -> None:
    parameter, optimizer = one(draw(*shape), side=side, refresh=4)
    start = parameter.detach().clone()
    for i in range(8):
        step(parameter, optimizer, draw(*shape, seed=10 + i))
        rank = int(torch.linalg.matrix_rank(parameter.detach() - start, atol=1e-9))
        assert rank <= (2 if i < 4 else 4)
    assert rank == 4, "a second subspace, and no moments that were cleared away"


def test_a_worked_step() -> None:
    """G = [[3,0],[0,1],[0,0]], rank 1: R = +-[3,0,0]^T, and the step is the sign of it at the learning rate."""
    G = torch.tensor([[3.0, 0], [0, 1], [0, 0]], dtype=torch.float64)
    parameter, optimizer = one(torch.zeros(3, 2, dtype=torch.float64), rank=1, eps=1e-30)
    moved = step(parameter, optimizer, G)
    wanted = torch.tensor([[-0.1, 0], [0, 0], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(moved, wanted, atol=1e-12, rtol=0)


def test_the_first_step_is_the_sign_of_the_projected_gradient_taken_back() -> None:
    G = draw(6, 4, seed=3)
    parameter, optimizer = one(draw(6, 4), eps=1e-30, scale=0.25)
    basis = leading_basis(G, 2, "std")
    wanted = -0.1 * 0.25 * basis.back(basis.into(G).sign())
    torch.testing.assert_close(step(parameter, optimizer, G), wanted, atol=1e-12, rtol=0)


def test_scale_multiplies_the_step() -> None:
    moves = []
    for scale in (0.25, 1.0):
        parameter, optimizer = one(draw(6, 4), scale=scale)
        moves.append(step(parameter, optimizer, draw(6, 4, seed=1)))
    torch.testing.assert_close(4 * moves[0], moves[1], atol=1e-12, rtol=0)


def test_full_rank_adam_is_not_adam() -> None:
    """Its moments live in a rotated basis; without a projection the rule is Adam's."""
    weight, G = draw(5, 5), draw(5, 5, seed=1)
    rotated, optimizer = one(weight, rank=5)
    plain = nn.Parameter(weight.clone())
    reference = torch.optim.AdamW([plain], lr=0.1, eps=1e-30, weight_decay=0.0)
    own = nn.Parameter(weight.clone())
    unprojected = Projected([{"params": [own], "projected": False}], lr=0.1, **{**DEFAULTS, "eps": 1e-30})
    for i in range(3):
        gradient = G + draw(5, 5, seed=20 + i)
        step(rotated, optimizer, gradient)
        step(plain, reference, gradient)
        step(own, unprojected, gradient)
    torch.testing.assert_close(own, plain, atol=1e-12, rtol=0)
    assert (rotated - plain).abs().max() > 1e-2


def test_decay_follows_the_step() -> None:
    weight, G = draw(6, 4), draw(6, 4, seed=1)
    parameter, optimizer = one(weight, weight_decay=0.5)
    plain, without = one(weight)
    step(parameter, optimizer, G)
    step(plain, without, G)
    torch.testing.assert_close(parameter.detach(), plain.detach() * (1 - 0.1 * 0.5), atol=1e-12, rtol=0)


def test_what_is_projected_are_the_linear_layers_but_the_head() -> None:
    from tiny import tiny_llama

    optimizer = rw.make_optimizer(tiny_llama(), "galore", rank=4)
    for group in optimizer.param_groups:
        for name in group["names"]:
            assert group["projected"] == ("_proj" in name), name


@pytest.mark.parametrize("side", ["std", "reverse_std", "right", "left"])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_it_takes_the_released_packages_steps(shape: Any, side: str) -> None:
    """galore-torch on the same gradients: equal weights to rounding (its projector works in float32).

    Within one subspace: over a refresh the moments meet new singular vectors, whose signs are arbitrary there and fixed
    here, so that the two runs part.
    """
    import galore_torch as galore

    weight = draw(*shape).float()
    ours, optimizer = one(weight, rank=3, scale=0.25, side=side, weight_decay=0.01)
    theirs = nn.Parameter(weight.clone())
    group: Any = {"params": [theirs], "rank": 3, "update_proj_gap": 200, "scale": 0.25, "proj_type": side}
    reference = galore.GaLoreAdamW([group], lr=0.1, weight_decay=0.01, no_deprecation_warning=True)
    for i in range(8):
        gradient = draw(*shape, seed=30 + i).float()
        step(ours, optimizer, gradient)
        step(theirs, reference, gradient)
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "rank", "told"),
    [
        ("llama-60m", 128, 163_743_744),
        ("llama-130m", 256, 342_961_152),
        ("llama-350m", 256, 652_808_192),
        ("llama-1b", 512, 2_084_921_344),
        ("llama-7b", 1024, 9_404_694_528),
    ],
)
def test_the_state_of_the_papers_models_in_16_bits(shape: str, rank: int, told: int) -> None:
    """All weights trained, on the meta device: 2 r L + r S numbers of a linear layer, two of any other number."""
    model = open_source(shape, "bfloat16").model.requires_grad_(True)
    assert optimizer_bytes({"optimizer": "galore", "rank": rank}, model) == told
