"""GaLore: AdamW's step on P^T G or G Q, taken back; the subspace is found anew every `refresh` steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from eight_bits import adopt_moments
from loops import check_falls, check_resumes, whole_loop
from steps import draw, step
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.optim.projection import leading_basis, projected_shape
from rankworks.optim.galore import GaLoreSteps
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


def one(weight: Tensor, **settings: Any) -> tuple[nn.Parameter, GaLoreSteps]:
    parameter = nn.Parameter(weight.clone())
    optimizer = GaLoreSteps([{"params": [parameter], "projected": True}], lr=0.1, **{**DEFAULTS, **settings})
    return parameter, optimizer


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
    unprojected = GaLoreSteps([{"params": [own], "projected": False}], lr=0.1, **{**DEFAULTS, "eps": 1e-30})
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


# ---- other rules, tensors of more dimensions, runs -----------------------------------------------------------------


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_with_adafactor_it_takes_the_released_packages_steps(shape: Any, beta1: float) -> None:
    """On one subspace, as with AdamW; also the running mean of steps and the decay before the step."""
    import galore_torch as galore

    weight = draw(*shape).float()
    ours, optimizer = one(weight, rank=3, scale=0.25, rule="adafactor", eps=1e-30, beta1=beta1, weight_decay=0.01)
    theirs = nn.Parameter(weight.clone())
    group: Any = {"params": [theirs], "rank": 3, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    reference = galore.GaLoreAdafactor(
        [group], lr=0.1, beta1=beta1 or None, weight_decay=0.01, scale_parameter=False, relative_step=False
    )
    for i in range(8):
        gradient = draw(*shape, seed=30 + i).float()
        step(ours, optimizer, gradient)
        step(theirs, reference, gradient)
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_in_8_bits_it_takes_bitsandbytes_steps_in_the_subspace(shape: Any) -> None:
    """As the released code does it: the package's optimizer on zeros of R's shape, its step projected back.

    From the same moments each time: bitsandbytes' quantiser on the CPU puts 1 code in 700 in a neighbour's place.
    """
    import bitsandbytes

    weight = draw(*shape).float()
    ours, optimizer = one(weight, rank=48, scale=0.25, rule="adamw8bit", eps=1e-8, weight_decay=0.01)
    kept = nn.Parameter(torch.zeros(projected_shape(shape, 48, "std")))
    reference = bitsandbytes.optim.AdamW8bit([kept], lr=0.1, weight_decay=0.0)
    theirs, basis = weight.clone(), leading_basis(draw(*shape, seed=30).float(), 48, "std")
    for i in range(5):
        gradient = draw(*shape, seed=30 + i).float()
        step(ours, optimizer, gradient)
        kept.data.zero_()
        step(kept, reference, basis.into(gradient))
        theirs = (theirs + 0.25 * basis.back(kept.data)) * (1 - 0.1 * 0.01)
        torch.testing.assert_close(ours.detach(), theirs, atol=3e-6, rtol=0)
        adopt_moments(reference.state[kept], optimizer.state[ours])


def test_in_8_bits_small_projections_keep_float32() -> None:
    for shape, kind in (((96, 64), torch.uint8), ((30, 20), torch.float32)):
        parameter, optimizer = one(draw(*shape).float(), rank=48, rule="adamw8bit")
        step(parameter, optimizer, draw(*shape, seed=1).float())
        assert optimizer.state[parameter]["exp_avg"].dtype == kind


def test_a_tensor_keeps_moments_of_its_core_and_a_factor_a_dimension() -> None:
    weight, G = draw(12, 7, 3, 3), draw(12, 7, 3, 3, seed=1)
    parameter, optimizer = one(weight, rank=4, scale=0.5, eps=1e-30)
    moved = step(parameter, optimizer, G)
    state = optimizer.state[parameter]
    shapes = {k: tuple(v.shape) for k, v in state.items() if k != "step"}
    assert shapes == {"exp_avg": (4, 4, 3, 3), "exp_avg_sq": (4, 4, 3, 3), "U0": (12, 4), "U1": (7, 4)}
    U = [torch.linalg.svd(G.movedim(i, 0).reshape(G.shape[i], -1)).U[:, :4] for i in range(2)]
    core = torch.einsum("abij,ax,by->xyij", G, *U)
    wanted = -0.1 * 0.5 * torch.einsum("xyij,ax,by->abij", core.sign(), *U)
    torch.testing.assert_close(moved, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "adafactor"])
def test_convolutions_are_projected_where_they_are_named(rule: Any) -> None:
    model = nn.Sequential(nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24, 8))
    settings: dict[str, Any] = {"rank": 6, "refresh": 3, "rule": rule, "targets": "0"}
    optimizer = rw.make_optimizer(model, "galore", lr=1e-2, **settings)
    x, y = draw(16, 16, 3, 3).float(), torch.arange(16) % 8
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = optimizer.state[model[0].weight]  # type: ignore[index]
    assert {"U0", "U1"} <= set(state)
    assert "U2" not in state
    held = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert optimizer_bytes({"optimizer": "galore", **settings}, model) == held


def test_settings_of_another_rule_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"beta1": 0.9}, "beta1 .* rule=adafactor"),
        ({"rule": "adamw8bit", "clip_threshold": 2.0}, "clip_threshold .* rule=adafactor"),
        ({"rule": "adafactor", "betas": (0.8, 0.9)}, "betas .* rule=adamw"),
        ({"eps": 0.0}, "above zero"),
        ({"rank": 0}, "rank"),
        ({"rule": "adam"}, "adamw"),
        ({"subspace": "exact"}, "warm"),
    ]
    for settings, told in cases:
        with pytest.raises(ConfigError, match=told):
            rw.make_optimizer(nn.Linear(4, 4), "galore", **settings)


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "adafactor"])
@pytest.mark.parametrize("side", ["std", "full"])
def test_steps_in_the_backward_pass_give_the_same_weights(rule: Any, side: Any) -> None:
    runs = []
    for layerwise in (False, True):
        options = {"rank": 4, "refresh": 2, "rule": rule, "side": side}
        runs.append(whole_loop("galore", options, steps=5, lr=1e-3, clip=None, layerwise=layerwise))
        runs[-1].model.double()
        runs[-1].run()
    for one_, other in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one_, other, atol=1e-9, rtol=0)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"subspace": "randomised", "side": "full"},
    {"subspace": "svd", "rule": "adafactor", "beta1": 0.5},
    {"rule": "adamw8bit", "side": "reverse_std"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_falls_and_a_run_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    """Left after five steps and one refresh of every three."""
    options = {"rank": 4, "refresh": 3, "scale": 1.0, **options}
    check_falls("galore", options)
    check_resumes(tmp_path, "galore", options)
